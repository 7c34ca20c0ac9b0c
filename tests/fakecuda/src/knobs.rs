//! What a test can set: the machine's properties and the faults to inject.

use std::array;
use std::sync::atomic::{AtomicI64, Ordering::SeqCst};
use std::time::Duration;

use crate::codes::{Answer, Code, INVALID_VALUE, OUT_OF_MEMORY, SUCCESS, describe};

/// One value a test can set; the crate's docs say what each means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Knob {
    LatencyUs,
    BandwidthMbps,
    DecodeUs,
    Vram,
    PinCapacity,
    Devices,
    DriverVersion,
    NullSync,
    InitCode,
    Sticky,
    FailCode,
    FailCopyIn,
    FlipCopyIn,
    FailAllocIn,
    FailRegisterIn,
    FailRecordIn,
    FailWaitIn,
    FailStreamCreate,
    FailModuleIn,
    FailFunctionIn,
    FailLaunchIn,
}

struct Row {
    knob: Knob,
    key: &'static str,
    /// The environment variable that overrides `default`.
    variable: Option<&'static str>,
    default: i64,
}

const fn row(knob: Knob, key: &'static str, variable: Option<&'static str>, default: i64) -> Row {
    Row { knob, key, variable, default }
}

const COUNT: usize = 21;

/// In the order of [`Knob`], so that a knob is its row's index.
const ROWS: [Row; COUNT] = [
    row(Knob::LatencyUs, "lat_us", Some("FAKECUDA_LAT_US"), 0),
    row(Knob::BandwidthMbps, "bw_mbps", Some("FAKECUDA_BW_MBPS"), 0),
    row(Knob::DecodeUs, "decode_us", Some("FAKECUDA_DECODE_US"), 0),
    row(Knob::Vram, "vram", Some("FAKECUDA_VRAM"), 8 << 30),
    row(Knob::PinCapacity, "pin_cap", Some("FAKECUDA_PIN"), 64 << 30),
    row(Knob::Devices, "devices", Some("FAKECUDA_DEVICES"), 1),
    row(Knob::DriverVersion, "driver", Some("FAKECUDA_DRIVER"), 12_090),
    row(Knob::NullSync, "null_sync", Some("FAKECUDA_NULL_SYNC"), 1),
    row(Knob::InitCode, "init_code", Some("FAKECUDA_INIT"), 0),
    row(Knob::Sticky, "sticky", None, 0),
    row(Knob::FailCode, "fail_code", None, 1),
    row(Knob::FailCopyIn, "fail_copy_in", None, 0),
    row(Knob::FlipCopyIn, "flip_copy_in", None, 0),
    row(Knob::FailAllocIn, "fail_alloc_in", None, 0),
    row(Knob::FailRegisterIn, "fail_register_in", None, 0),
    row(Knob::FailRecordIn, "fail_record_in", None, 0),
    row(Knob::FailWaitIn, "fail_wait_in", None, 0),
    row(Knob::FailStreamCreate, "fail_stream_create", None, 0),
    row(Knob::FailModuleIn, "fail_module_in", None, 0),
    row(Knob::FailFunctionIn, "fail_function_in", None, 0),
    row(Knob::FailLaunchIn, "fail_launch_in", None, 0),
];

/// The value a knob starts with.
///
/// # Panics
///
/// If the environment holds a value the knob cannot take: a test that asked for one machine must
/// not run on another.
fn start(row: &Row) -> i64 {
    let Some(text) = row.variable.and_then(std::env::var_os) else { return row.default };
    let value = text.to_str().and_then(|text| text.trim().parse().ok());
    match value.filter(|&value| takes(row.knob, value)) {
        Some(value) => value,
        None => panic!("fakecuda: {} cannot be {text:?}", row.variable.unwrap_or_default()),
    }
}

fn takes(knob: Knob, value: i64) -> bool {
    let code = || Code::try_from(value).is_ok_and(|code| describe(code).is_some());
    match knob {
        Knob::Sticky | Knob::InitCode => code(),
        Knob::FailCode => code() && value != i64::from(SUCCESS),
        Knob::DriverVersion | Knob::Devices => u16::try_from(value).is_ok(),
        Knob::LatencyUs | Knob::BandwidthMbps | Knob::DecodeUs | Knob::Vram | Knob::PinCapacity => {
            0 <= value
        }
        Knob::NullSync => matches!(value, 0 | 1),
        Knob::FailCopyIn
        | Knob::FlipCopyIn
        | Knob::FailAllocIn
        | Knob::FailRegisterIn
        | Knob::FailRecordIn
        | Knob::FailWaitIn
        | Knob::FailStreamCreate
        | Knob::FailModuleIn
        | Knob::FailFunctionIn
        | Knob::FailLaunchIn => true,
    }
}

/// The present value of every knob.
pub(crate) struct Knobs {
    values: [AtomicI64; COUNT],
}

impl Knobs {
    pub(crate) fn new() -> Self {
        Self { values: array::from_fn(|index| AtomicI64::new(start(&ROWS[index]))) }
    }

    pub(crate) fn reset(&self) {
        for (value, row) in self.values.iter().zip(&ROWS) {
            value.store(start(row), SeqCst);
        }
    }

    pub(crate) fn set(&self, key: &str, value: i64) -> Answer {
        let row = ROWS.iter().find(|row| row.key == key).ok_or(INVALID_VALUE)?;
        if !takes(row.knob, value) {
            return Err(INVALID_VALUE);
        }
        self.turn(row.knob, value);
        Ok(())
    }

    pub(crate) fn value(&self, key: &str) -> Result<i64, Code> {
        let row = ROWS.iter().find(|row| row.key == key).ok_or(INVALID_VALUE)?;
        Ok(self.values[row.knob as usize].load(SeqCst))
    }

    /// Makes every later call answer `code`.
    pub(crate) fn stick(&self, code: Code) {
        self.turn(Knob::Sticky, code.into());
    }

    pub(crate) fn size(&self, knob: Knob) -> u64 {
        u64::try_from(self.values[knob as usize].load(SeqCst)).unwrap_or(0)
    }

    pub(crate) fn number(&self, knob: Knob) -> i32 {
        i32::try_from(self.values[knob as usize].load(SeqCst)).unwrap_or(i32::MAX)
    }

    pub(crate) fn is_on(&self, knob: Knob) -> bool {
        self.values[knob as usize].load(SeqCst) != 0
    }

    /// The code a knob holds, as an error unless it is 0.
    pub(crate) fn code(&self, knob: Knob) -> Answer {
        match Code::try_from(self.values[knob as usize].load(SeqCst)) {
            Ok(SUCCESS) => Ok(()),
            Ok(code) => Err(code),
            Err(_) => Err(INVALID_VALUE),
        }
    }

    /// Counts the fault `knob` down and fails when it fires.
    pub(crate) fn fault(&self, knob: Knob) -> Answer {
        match (self.is_due(knob), knob) {
            (true, Knob::FailAllocIn) => Err(OUT_OF_MEMORY),
            (true, _) => self.code(Knob::FailCode),
            (false, _) => Ok(()),
        }
    }

    /// Counts `knob` down; whether it fires.
    pub(crate) fn is_due(&self, knob: Knob) -> bool {
        let count = &self.values[knob as usize];
        count.fetch_update(SeqCst, SeqCst, |left| (0 < left).then(|| left - 1)) == Ok(1)
    }

    /// How long a copy of `bytes` takes once its engine is free.
    pub(crate) fn copy_time(&self, bytes: usize) -> Duration {
        let latency = Duration::from_micros(self.size(Knob::LatencyUs));
        // 1 MB/s is one byte per 1000 ns.
        let transfer =
            (bytes as u64).saturating_mul(1000).checked_div(self.size(Knob::BandwidthMbps));
        latency + Duration::from_nanos(transfer.unwrap_or(0))
    }

    fn turn(&self, knob: Knob, value: i64) {
        self.values[knob as usize].store(value, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_knob_is_its_rows_index() {
        assert!(ROWS.iter().enumerate().all(|(index, row)| row.knob as usize == index));
    }

    #[test]
    fn a_fault_fires_at_the_nth_call_and_once() {
        let knobs = Knobs::new();
        assert_eq!(knobs.set("fail_copy_in", 2), Ok(()));
        assert_eq!(knobs.set("fail_code", 719), Ok(()));
        let answers = [(); 4].map(|()| knobs.fault(Knob::FailCopyIn));
        assert_eq!(answers, [Ok(()), Err(719), Ok(()), Ok(())]);
        assert_eq!(knobs.value("fail_copy_in"), Ok(0));
    }

    #[test]
    fn an_allocation_fault_is_always_out_of_memory() {
        let knobs = Knobs::new();
        assert_eq!(knobs.set("fail_code", 719), Ok(()));
        assert_eq!(knobs.set("fail_alloc_in", 1), Ok(()));
        assert_eq!(knobs.fault(Knob::FailAllocIn), Err(OUT_OF_MEMORY));
    }

    #[test]
    fn unknown_keys_and_impossible_values_are_refused() {
        let knobs = Knobs::new();
        let refused = [
            ("vram_bytes", 1),
            ("vram", -1),
            ("decode_us", -1),
            ("sticky", 4242),
            ("fail_code", 0),
            ("null_sync", 2),
            ("devices", 1 << 20),
        ];
        for (key, value) in refused {
            assert_eq!(knobs.set(key, value), Err(INVALID_VALUE), "{key}");
        }
        assert_eq!(knobs.set("fail_copy_in", -1), Ok(()));
        assert_eq!(knobs.fault(Knob::FailCopyIn), Ok(()));
    }

    #[test]
    fn copy_time_is_latency_plus_bytes_over_bandwidth() {
        let knobs = Knobs::new();
        assert_eq!(knobs.copy_time(1 << 30), Duration::ZERO);
        assert_eq!(knobs.set("lat_us", 10), Ok(()));
        assert_eq!(knobs.set("bw_mbps", 2), Ok(()));
        assert_eq!(knobs.copy_time(4_000), Duration::from_micros(2_010));
        assert_eq!(knobs.copy_time(usize::MAX).as_secs(), u64::MAX / 2 / 1_000_000_000);
    }
}
