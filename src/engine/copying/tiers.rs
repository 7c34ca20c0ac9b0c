//! What the tiers of host memory hold, and what each costs.

use super::feed::Host;
use super::lane::Weight;
use crate::driver::Source;
use crate::engine::Spec;
use crate::plan::{Plan, Tensor};
use crate::pool::Way;
use crate::units::{index, narrow, real, whole};

/// Tiers whose rates differ by less are one.
const ALIKE: f64 = 1.05;

/// What host memory an engine has, and what became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HostFacts {
    /// Bytes of whole pages held as copies of what a file holds, page-locked or not.
    pub cached_bytes: u64,
    /// Bytes copied in each pass from page-locked memory, from other memory, and from files.
    pub pass_bytes: [u64; 3],
    /// Bytes read so far by the reading threads: from memory, from files through the page cache,
    /// and past it.
    pub read_bytes: [u64; 3],
    /// Whether files are read past the page cache.
    pub reads_directly: bool,
    /// Threads that read at a time.
    pub threads: u32,
    /// Bytes per second that they read from memory and from files; 0 while unknown.
    pub bytes_per_s: [u64; 2],
    /// How often memory was given back because the system ran short, and how many bytes.
    pub given_back: (u64, u64),
}

impl HostFacts {
    /// All of it in the order of the fields.
    pub fn numbers(&self) -> [u64; 13] {
        let ([locked, memory, file], [copied, cached, direct]) = (self.pass_bytes, self.read_bytes);
        let ([memory_rate, file_rate], (times, bytes)) = (self.bytes_per_s, self.given_back);
        let (directly, threads) = (u64::from(self.reads_directly), u64::from(self.threads));
        [
            self.cached_bytes,
            locked,
            memory,
            file,
            copied,
            cached,
            direct,
            directly,
            threads,
            memory_rate,
            file_rate,
            times,
            bytes,
        ]
    }
}

impl Host {
    /// For each tensor how many times as long as over the link its bytes take, if they differ: the
    /// tier of what is streamed, and the one that a resident would have. A resident of `plan` has
    /// no page-lock and no copy in RAM, since nobody needs them; streamed, it would get them, where
    /// all the others have.
    pub(in crate::engine) fn slow(
        &self,
        spec: &Spec,
        plan: &Plan,
        link_bytes_per_s: f64,
    ) -> Vec<f64> {
        let weights = self.weights(spec);
        let lacks_lock = |(weight, stays): (&Weight, &bool)| {
            !stays && !weight.direct && matches!(weight.source, Source::Memory { .. })
        };
        let enough_locks = !std::iter::zip(&weights, &plan.resident).any(lacks_lock);
        let cache = self.cache.read();
        let lacks_copy = |number: usize| {
            let in_file = matches!(spec.sources[number], Source::File { .. });
            in_file && !plan.resident[number] && !cache.has(narrow(number))
        };
        let enough_copies = !(0..spec.sources.len()).any(lacks_copy);
        drop(cache);
        let choice = self.choice.lock();
        let times = |rate: Option<f64>| rate.map_or(1.0, |rate| (link_bytes_per_s / rate).max(1.0));
        let (memory, file) = (times(choice.memory_bytes_per_s()), times(choice.file_bytes_per_s()));
        let of = |(weight, &stays): (&Weight, &bool)| {
            let in_file = matches!(weight.source, Source::File { .. });
            if weight.direct {
                1.0
            } else if in_file && !(stays && enough_copies) {
                file
            } else if stays && enough_locks {
                1.0
            } else {
                memory
            }
        };
        let slow: Vec<f64> = std::iter::zip(&weights, &plan.resident).map(of).collect();
        let least = slow.iter().copied().fold(f64::INFINITY, f64::min);
        let most = slow.iter().copied().fold(0.0, f64::max);
        if most > ALIKE * least { slow } else { Vec::new() }
    }

    /// For each tensor that only a file holds now, seconds to read it: what its first copy takes,
    /// if it is streamed from now on. Nothing where no rate is known.
    pub(in crate::engine) fn reading_s(&self, spec: &Spec) -> Vec<f64> {
        let Some(rate) = self.choice.lock().file_bytes_per_s() else { return Vec::new() };
        let of = |(weight, tensor): (&Weight, &Tensor)| match weight.source {
            Source::File { .. } => real(tensor.bytes) / rate,
            Source::Memory { .. } | Source::Encoded { .. } => 0.0,
        };
        std::iter::zip(&self.weights(spec), &spec.profile.tensors).map(of).collect()
    }

    /// Numbers for a report.
    pub(in crate::engine) fn facts(&self, spec: &Spec, plan: &Plan) -> HostFacts {
        let weights = self.weights(spec);
        let mut pass_bytes = [0; 3];
        for used in plan.program.uses.iter().take(index(plan.program.cycle)) {
            for copy in plan.program.copies_of(used) {
                let weight = weights[index(copy.tensor)];
                let tier = match weight.source {
                    Source::File { .. } => 2,
                    Source::Memory { .. } | Source::Encoded { .. } => usize::from(!weight.direct),
                };
                pass_bytes[tier] += copy.bytes;
            }
        }
        let passes = u64::from(plan.program.passes.max(1));
        let choice = self.choice.lock();
        let rate = |rate: Option<f64>| rate.map_or(0, whole);
        HostFacts {
            cached_bytes: self.cache.read().bytes(),
            pass_bytes: pass_bytes.map(|bytes| bytes / passes),
            read_bytes: choice.bytes(),
            reads_directly: choice.preferred() == Way::Direct,
            threads: choice.threads(pass_bytes[2] > 0),
            bytes_per_s: [rate(choice.memory_bytes_per_s()), rate(choice.file_bytes_per_s())],
            given_back: self.given_back,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::feed::tests::spec;
    use super::*;
    use crate::driver::host::{HostDevice, HostOptions};
    use crate::driver::sim::{SimDevice, SimOptions};
    use crate::plan::{Profile, plan};

    fn host() -> Host {
        let options = HostOptions { copy_bytes_per_s: 1 << 40, ..HostOptions::default() };
        Host::new(Arc::new(HostDevice::new(options).expect("a thread")))
    }

    #[test]
    fn a_tier_costs_what_its_rate_says() {
        let (mut host, spec) = (host(), spec());
        let plan = plan(&spec.profile, spec.budget_bytes).expect("feasible");
        host.prepare(&spec, &plan);
        assert_eq!(host.slow(&spec, &plan, 10e9), [0.0; 0], "nothing was measured");
        assert_eq!(host.reading_s(&spec), [0.0; 0]);
        {
            let mut choice = host.choice.lock();
            choice.note_all(false, 64 << 20, real(64 << 20) / 10e9);
            choice.note_all(true, 64 << 20, real(64 << 20) / 2e9);
        }
        let reading_s = host.reading_s(&spec);
        let expected_s = real(1 << 20) / 2e9;
        assert!(reading_s[0] == 0.0 && (reading_s[1] / expected_s - 1.0).abs() < 1e-9);
        let slow = host.slow(&spec, &plan, 10e9);
        assert!((slow[0] - 1.0).abs() < 1e-9, "{slow:?}");
        assert!(slow[1..].iter().all(|slow| (slow - 5.0).abs() < 1e-9), "{slow:?}");
        // A copy that has arrived is memory.
        let tensor = host.cache.read().tensors().next().expect("one fits");
        let bytes = vec![7_u8; 1 << 20];
        host.cache.read().keep(tensor, 0, bytes.as_ptr() as u64, 1 << 20);
        assert!((host.slow(&spec, &plan, 10e9)[index(tensor)] - 1.0).abs() < 1e-9);
    }

    #[test]
    fn residents_without_a_copy_in_ram_would_get_one_where_all_others_have() {
        let file = |number: u64| Source::File { file: 0, offset: number << 20 };
        let filed = Spec { sources: (0..4).map(file).collect(), ..spec() };
        let plan = plan(&filed.profile, 3 << 20).expect("feasible");
        let stay = plan.resident.iter().filter(|&&stays| stays).count();
        assert!(stay > 0 && stay < 3, "residents, and more streamed ones than copies");
        for (ram_bytes, is_enough) in [(4 << 20, true), (1 << 20, false)] {
            let spec = Spec { ram_bytes, ..filed.clone() };
            let mut host = host();
            host.prepare(&spec, &plan);
            host.choice.lock().note_all(true, 64 << 20, real(64 << 20) / 2e9);
            let (bytes, cache) = (vec![7_u8; 1 << 20], host.cache.read());
            for tensor in cache.tensors() {
                cache.keep(tensor, 0, bytes.as_ptr() as u64, 1 << 20);
            }
            drop(cache);
            let slow = host.slow(&spec, &plan, 10e9).iter().filter(|&&slow| slow > 4.9).count();
            // Else all but the one that has a copy.
            assert_eq!(slow, if is_enough { 0 } else { 3 }, "{ram_bytes} bytes of RAM");
        }
    }

    #[test]
    fn residents_without_page_locks_would_get_some_unless_these_are_scarce() {
        let tensors = (0..4).map(|block| Tensor { block, bytes: 1 << 20 }).collect();
        let profile = Profile { tensors, order: (0..4).collect(), ..Profile::default() };
        let memory = |at: u64| Source::Memory { address: (1 << 30) + (at << 20) };
        let mut spec = Spec { profile, sources: (0..4).map(memory).collect(), ..Spec::default() };
        let plan = plan(&spec.profile, 3 << 20).expect("feasible");
        let streamed = plan.resident.iter().filter(|&&stays| !stays).count() as u64;
        assert!(0 < streamed && streamed < 4);
        let enough = [(4 << 20, true), (streamed << 20, true), ((streamed - 1) << 20, false)];
        for (pinned_bytes, is_enough) in enough {
            spec.pinned_bytes = pinned_bytes;
            let options =
                SimOptions { staged_from: Some(0), lockable: true, ..SimOptions::default() };
            let mut host = Host::new(Arc::new(SimDevice::new(options)));
            host.prepare(&spec, &plan);
            host.choice.lock().note_all(false, 64 << 20, real(64 << 20) / 2e9);
            let found = host.slow(&spec, &plan, 10e9);
            let slow = found.iter().filter(|&&slow| slow > 4.9).count() as u64;
            // Else one that is streamed lacks a lock, and so would the residents.
            let expected = if is_enough { 0 } else { 4 - streamed + 1 };
            assert_eq!(slow, expected, "{pinned_bytes} bytes of page-locks: {found:?}");
        }
    }
}
