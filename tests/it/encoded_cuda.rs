//! Goal: the CUDA device decodes what comes encoded, in order with all else, and gives everything
//! back.
//! Method: copies of a few tiles on a fake driver whose copies or decodes are slow, so that each
//! wait that is left out shows as wrong bytes; buffers, segments and kernels that are no good.

use dgls_core::codec::{self, Element, SEGMENT_BYTES};
use dgls_core::driver::cuda::{CudaDevice, CudaOptions};
use dgls_core::driver::host::shim::{self, Pages};
use dgls_core::driver::{Device, EventSlot, H2d, Source};
use dgls_core::{ALIGN_BYTES, Error, Result};

use crate::fake::Session;
use crate::weights::{bytes_at, trained_as};

const SLOT: EventSlot = EventSlot(0);
/// The fewest parts of a buffer, and the segments of one launch.
const PARTS: u64 = 2;
const LAUNCH: usize = 32;
const MIB: u32 = 1 << 20;

/// The smallest part of a buffer that is taken.
fn part_bytes() -> u64 {
    let bytes =
        u64::try_from(codec::most_encoded_bytes(Element::Bf16, SEGMENT_BYTES)).expect("some MiB");
    bytes.next_multiple_of(ALIGN_BYTES)
}

/// The smallest buffer, which begins `shift` bytes after an aligned address.
pub(crate) struct Buffer(Pages, u64);

impl Buffer {
    pub(crate) fn new(shift: u64) -> Self {
        let pages = Pages::new(PARTS * part_bytes() + ALIGN_BYTES).expect("host memory");
        assert_eq!(pages.address() % ALIGN_BYTES, 0);
        Self(pages, shift)
    }

    /// Its address and its size.
    pub(crate) fn place(&self) -> (u64, u64) {
        let Self(pages, shift) = self;
        let before = (ALIGN_BYTES - shift) % ALIGN_BYTES;
        (pages.address() + shift, PARTS * part_bytes() + before)
    }
}

fn device(decode_buffer: (u64, u64)) -> Result<CudaDevice> {
    let decode_buffer = Some(decode_buffer);
    CudaDevice::new(CudaOptions { decode_buffer, ..CudaOptions::default() })
}

/// A device with page-locked tensors of one to three tiles, each raw and encoded, and memory to
/// copy them to.
struct Bench {
    /// Until it is dropped.
    device: Option<CudaDevice>,
    _buffer: Buffer,
    raw: Pages,
    encoded: Pages,
    target: Pages,
    /// Of each tensor its place and size among the raw ones, and among the encoded ones.
    places: Vec<[(u64, u32); 2]>,
    /// What each is of: bf16 and fp8 by turns, twice each.
    elements: Vec<Element>,
}

impl Bench {
    fn new(count: u64) -> Self {
        Self::with(count, Buffer::new(0))
    }

    fn with(count: u64, buffer: Buffer) -> Self {
        let (mut all, mut segments, mut places) = (Vec::new(), Vec::new(), Vec::new());
        let element = |number: u64| if number / 2 % 2 == 0 { Element::Bf16 } else { Element::Fp8 };
        let elements: Vec<Element> = (0..count).map(element).collect();
        for (number, &element) in (0..).zip(&elements) {
            let raw = trained_as(element, (1 + number % 3) * element.tile_bytes() as u64, number);
            let (raw_at, at) = (all.len() as u64, segments.len());
            assert!(codec::encode(element, &raw, &mut segments), "whole tiles");
            let size = |bytes: usize| u32::try_from(bytes).expect("a few tiles");
            places.push([(raw_at, size(raw.len())), (at as u64, size(segments.len() - at))]);
            all.extend(raw);
        }
        // Behind the last one there is room for segments that say that they are larger.
        segments.resize(segments.len() + 8 * usize::try_from(MIB).expect("small"), 0);
        let pages = |bytes: &[u8]| {
            let pages = Pages::new(bytes.len() as u64).expect("host memory");
            shim::copy(pages.address(), bytes.as_ptr() as u64, pages.bytes());
            pages
        };
        let (raw, encoded) = (pages(&all), pages(&segments));
        let target = Pages::new(raw.bytes()).expect("host memory");
        let device = device(buffer.place()).expect("it decodes");
        device.prepare(1, 0).expect("no faults");
        for locked in [&raw, &encoded] {
            device.page_lock(locked.address(), locked.bytes()).expect("no faults");
        }
        Self { device: Some(device), _buffer: buffer, raw, encoded, target, places, elements }
    }

    fn encoded(&self, number: usize) -> H2d {
        let [(raw_at, raw_bytes), (at, bytes)] = self.places[number];
        let (address, element) = (self.encoded.address() + at, self.elements[number]);
        let source = Source::Encoded { address, bytes, element };
        H2d { source, target: self.target.address() + raw_at, bytes: raw_bytes.into() }
    }

    /// As [`Bench::encoded`], but with so many bytes on the link.
    fn padded(&self, number: usize, link_bytes: u32) -> H2d {
        let mut source = self.encoded(number).source;
        let Source::Encoded { bytes, .. } = &mut source else { unreachable!() };
        *bytes = link_bytes;
        H2d { source, ..self.encoded(number) }
    }

    fn raw(&self, number: usize) -> H2d {
        let source = Source::Memory { address: self.raw.address() + self.places[number][0].0 };
        H2d { source, ..self.encoded(number) }
    }

    fn copy(&self, copies: &[H2d]) {
        self.device().copy_batch(copies).expect("no faults");
    }

    /// Copies these, all encoded, in one call.
    fn copy_encoded(&self, numbers: std::ops::Range<usize>) {
        self.copy(&numbers.map(|number| self.encoded(number)).collect::<Vec<H2d>>());
    }

    /// Tensors that a kernel which waits for *ready* finds wrong.
    fn wrong_when_ready(&self, session: &Session) -> usize {
        let stream = session.stream(0);
        self.device().mark_ready(SLOT).expect("no faults");
        self.device().wait_ready(SLOT, stream, false).expect("no faults");
        let seen = session.read(stream, self.target.address(), self.target.bytes(), 0);
        session.synchronize();
        self.wrong(&seen.bytes())
    }

    fn wrong(&self, found: &[u8]) -> usize {
        let raw = bytes_at(self.raw.address(), self.raw.bytes());
        let of = |&[(at, bytes), _]: &[(u64, u32); 2]| {
            let at = usize::try_from(at).expect("small");
            let range = at..at + usize::try_from(bytes).expect("small");
            found[range.clone()] != raw[range]
        };
        self.places.iter().filter(|place| of(place)).count()
    }

    /// Copies all encoded, by a launch of one segment and another one that takes longer.
    fn copy_in_two(&self) {
        self.copy_encoded(0..1);
        self.copy_encoded(1..self.places.len());
    }

    fn device(&self) -> &CudaDevice {
        self.device.as_ref().expect("it is there")
    }

    fn finish(self, session: Session) {
        drop(self);
        session.finish();
    }
}

impl Drop for Bench {
    /// Also after a failure, so that only one test fails.
    fn drop(&mut self) {
        let device = self.device.take().map_or_else(|| CudaDevice::new(CudaOptions::default()), Ok);
        let Ok(device) = device else { return };
        let _ = device.quiesce(None);
        for locked in [&self.raw, &self.encoded] {
            device.page_unlock(locked.address(), locked.bytes());
        }
    }
}

#[test]
fn raw_and_encoded_sources_arrive_together() {
    let session = Session::new();
    for shift in [0, 1, 255] {
        let bench = Bench::with(130, Buffer::new(shift));
        assert!(bench.device().decodes());
        let before = session.get("h2d_bytes");
        // Of every five two are raw; eight are so large on the link that a part holds two of them.
        let copies: Vec<H2d> = (0..130)
            .map(|number| match number {
                40..48 => bench.padded(number, 2 * MIB),
                _ if number % 5 < 2 => bench.raw(number),
                _ => bench.encoded(number),
            })
            .collect();
        bench.copy(&copies);
        assert_eq!(bench.wrong_when_ready(&session), 0, "a buffer {shift} bytes askew");
        let on_link: u64 = copies.iter().map(H2d::link_bytes).sum();
        let passed = u64::try_from(session.get("h2d_bytes") - before).expect("a count");
        assert_eq!(passed, on_link);
    }
    session.finish();
}

#[test]
fn older_drivers_decode_as_well() {
    let session = Session::new();
    session.set("driver", 12_040);
    let bench = Bench::new(40);
    bench.copy_encoded(0..40);
    assert_eq!(bench.wrong_when_ready(&session), 0);
    assert_eq!(session.get("nbatches"), 0);
    bench.finish(session);
}

#[test]
fn a_part_is_overwritten_only_when_it_was_decoded() {
    let session = Session::new();
    let launches = 5;
    let bench = Bench::new(launches * LAUNCH as u64);
    session.set("decode_us", 3000);
    bench.copy_encoded(0..bench.places.len());
    assert_eq!(bench.wrong_when_ready(&session), 0);
    bench.finish(session);
}

#[test]
fn what_has_not_arrived_is_not_decoded() {
    let session = Session::new();
    let bench = Bench::new(40);
    session.set("lat_us", 3000);
    bench.copy_encoded(0..40);
    assert_eq!(bench.wrong_when_ready(&session), 0);
    bench.finish(session);
}

#[test]
fn ready_waits_for_the_decoder() {
    let session = Session::new();
    let bench = Bench::new(40);
    session.set("decode_us", 5000);
    bench.copy_encoded(0..40);
    assert_eq!(bench.wrong_when_ready(&session), 0);
    bench.finish(session);
}

#[test]
fn ready_waits_for_raw_copies_behind_encoded_ones() {
    let session = Session::new();
    let bench = Bench::new(12);
    bench.copy_encoded(0..6);
    session.set("lat_us", 3000);
    bench.copy(&(6..12).map(|number| bench.raw(number)).collect::<Vec<H2d>>());
    assert_eq!(bench.wrong_when_ready(&session), 0);
    // A use without encoded weights comes after one with them.
    shim::fill(bench.target.address(), 0, bench.target.bytes());
    bench.copy(&(0..12).map(|number| bench.raw(number)).collect::<Vec<H2d>>());
    assert_eq!(bench.wrong_when_ready(&session), 0);
    bench.finish(session);
}

#[test]
fn a_quiet_device_has_decoded_everything() {
    let session = Session::new();
    let bench = Bench::new(33);
    session.set("decode_us", 5000);
    bench.copy_in_two();
    bench.device().quiesce(None).expect("no faults");
    assert_eq!(bench.wrong(&bytes_at(bench.target.address(), bench.target.bytes())), 0);
    shim::fill(bench.target.address(), 0, bench.target.bytes());
    bench.copy_in_two();
    bench.device().finish_reads();
    assert_eq!(bench.wrong(&bytes_at(bench.target.address(), bench.target.bytes())), 0);
    bench.finish(session);
}

#[test]
fn a_device_that_is_dropped_has_decoded_everything() {
    let session = Session::new();
    let mut bench = Bench::new(33);
    session.set("decode_us", 5000);
    bench.copy_in_two();
    drop(bench.device.take());
    assert_eq!(bench.wrong(&bytes_at(bench.target.address(), bench.target.bytes())), 0);
    bench.finish(session);
}

#[test]
fn a_buffer_has_room_for_a_segment_in_each_part() {
    let session = Session::new();
    for shift in [0, 1, 255] {
        let buffer = Buffer::new(shift);
        let (address, bytes) = buffer.place();
        device((address, bytes)).map(drop).expect("the smallest one");
        for bytes in [0, 1, bytes / 2, bytes - 1] {
            let error = device((address, bytes)).map(drop).expect_err("too small");
            let Error::Invalid(text) = &error else { panic!("{error}") };
            assert!(text.contains(&format!("got {bytes} bytes")), "{text}");
        }
    }
    session.finish();
}

#[test]
fn a_segment_that_fits_no_part_is_refused() {
    let session = Session::new();
    let bench = Bench::new(4);
    let most = u32::try_from(part_bytes()).expect("some MiB");
    bench.copy(&[bench.padded(0, most)]);
    let copies = [bench.encoded(1), bench.padded(2, most + 256), bench.encoded(3)];
    let error = bench.device().copy_batch(&copies).expect_err("too large");
    assert!(matches!(&error, Error::Internal(text) if text.contains("segment of")), "{error}");
    bench.copy(&[1, 2, 3].map(|number| bench.encoded(number)));
    assert_eq!(bench.wrong_when_ready(&session), 0);
    bench.finish(session);
}

#[test]
fn a_device_without_a_buffer_takes_nothing_encoded() {
    let session = Session::new();
    let bench = Bench::new(2);
    let plain = CudaDevice::new(CudaOptions::default()).expect("the fake driver");
    assert!(!plain.decodes());
    let error = plain.copy_batch(&[bench.encoded(0), bench.encoded(1)]).expect_err("no decoder");
    assert!(matches!(error, Error::Internal(_)), "{error}");
    plain.quiesce(None).expect("nothing runs");
    drop(plain);
    bench.finish(session);
}

#[test]
fn a_kernel_that_cannot_be_loaded_or_started_is_told_and_leaks_nothing() {
    let session = Session::new();
    let buffer = Buffer::new(0);
    let faults = [
        ("fail_module_in", "cuModuleLoadData", 221),
        ("fail_module_in", "cuModuleLoadData", 222),
        ("fail_function_in", "cuModuleGetFunction", 500),
        ("fail_launch_in", "cuLaunchKernel", 701),
        ("fail_launch_in", "cuLaunchKernel", 1),
    ];
    let used = session.get("used");
    for (key, call, code) in faults {
        session.set("fail_code", code);
        session.set(key, 1);
        let error = device(buffer.place()).map(drop).expect_err("no kernel");
        let Error::Driver { call: found, code: found_code, .. } = &error else { panic!("{error}") };
        assert_eq!((*found, i64::from(*found_code)), (call, code));
        assert_eq!((session.get(key), session.get("used")), (0, used), "{key}");
        CudaDevice::new(CudaOptions::default()).map(drop).expect("it copies all the same");
        device(buffer.place()).map(drop).expect("it decodes now");
    }
    session.finish();
}

#[test]
fn a_device_that_decodes_wrongly_is_refused() {
    let session = Session::new();
    let buffer = Buffer::new(0);
    session.set("flip_copy_in", 1);
    let error = device(buffer.place()).map(drop).expect_err("a byte is another one");
    assert!(error.is_sticky(), "{error}");
    session.set("reset", 0);
    device(buffer.place()).map(drop).expect("no faults");
    session.finish();
}
