//! Weights in their encoded form: page-locked host memory that takes less time on the link.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::{Pins, Span, whole_pages};
use crate::codec::Element;
use crate::driver::host::shim::{self, Pages, page_bytes};
use crate::driver::{Device, Source};
use crate::error::{Error, Result};
use crate::units::{index, narrow};

/// A run of a tensor's bytes that is encoded as one segment of [`crate::codec`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    raw_offset: u64,
    raw_bytes: u64,
    source: Source,
}

/// A part of a copy: from its encoded form if there is one of just these bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// First byte within the tensor.
    pub raw_offset: u64,
    /// Size there.
    pub raw_bytes: u64,
    /// The encoded form.
    pub encoded: Option<Source>,
}

/// The encoded form of one tensor. Unlocked and given back on drop.
#[derive(Debug)]
pub struct Code {
    // Dropped before the pages that it locks.
    _pins: Pins,
    pages: Pages,
    segments: Vec<Segment>,
}

impl Code {
    /// Takes segments, each with the place of its raw bytes in the tensor, into page-locked memory,
    /// by so many threads. They decode to such elements. Tells how long other calls of the driver
    /// had to wait meanwhile.
    ///
    /// # Errors
    ///
    /// [`Error::PageLock`] when there is no memory, or it cannot be locked.
    pub fn new(
        device: &Arc<dyn Device>,
        element: Element,
        segments: &[(u64, u64, Vec<u8>)],
        threads: usize,
    ) -> Result<(Self, Duration)> {
        let bytes = segments.iter().map(|(.., encoded)| encoded.len() as u64).sum();
        let pages = Pages::new(bytes)?;
        let span = Span { address: pages.address(), bytes };
        let mut at = pages.address();
        let mut placed = Vec::with_capacity(segments.len());
        for (raw_offset, raw_bytes, encoded) in segments {
            let bytes = narrow(encoded.len());
            let source = Source::Encoded { address: at, bytes, element };
            placed.push(Segment { raw_offset: *raw_offset, raw_bytes: *raw_bytes, source });
            at += encoded.len() as u64;
        }
        // New memory is slow to write, a page at a time.
        let copy = |number: usize| {
            let Source::Encoded { address, bytes, .. } = placed[number].source else { return };
            shim::copy(address, segments[number].2.as_ptr() as u64, u64::from(bytes));
        };
        each_in_threads(segments.len(), threads, copy);
        let (mut pins, begun) = (Pins::none(Arc::clone(device)), Instant::now());
        if !device.takes(Source::Memory { address: span.address }, false) {
            pins.lock(&[span], u64::MAX, page_bytes());
            if !pins.covers(span) {
                let reason = "the system refused it for encoded weights".into();
                return Err(Error::PageLock { bytes, reason });
            }
        }
        Ok((Self { _pins: pins, pages, segments: placed }, begun.elapsed()))
    }

    /// Bytes of whole pages held.
    pub fn bytes(&self) -> u64 {
        whole_pages(self.pages.bytes())
    }

    /// Whether a copy that begins at one of the places would need a part of a segment.
    pub fn is_cut_at(&self, places: &[u64]) -> bool {
        places.iter().any(|&place| {
            let first = self.segments.partition_point(|segment| segment.raw_offset < place);
            let before = self.segments[..first].last();
            before.is_some_and(|segment| place < segment.raw_offset + segment.raw_bytes)
        })
    }

    /// The parts of a copy of `bytes` bytes from `offset` on, in order: encoded segments that lie
    /// within it as a whole, and what is between them.
    pub fn parts(&self, offset: u64, bytes: u64) -> Parts<'_> {
        let first = self.segments.partition_point(|segment| segment.raw_offset < offset);
        Parts { segments: &self.segments[first..], at: offset, end: offset + bytes }
    }
}

/// See [`Code::parts`]. Allocates nothing.
#[derive(Debug)]
pub struct Parts<'a> {
    /// Those that are not behind yet.
    segments: &'a [Segment],
    at: u64,
    end: u64,
}

impl Iterator for Parts<'_> {
    type Item = Part;

    fn next(&mut self) -> Option<Part> {
        let whole = |segment: &&Segment| segment.raw_offset + segment.raw_bytes <= self.end;
        let (raw_offset, segment) = (self.at, self.segments.first().filter(whole));
        let (after, encoded) = match segment {
            Some(segment) if segment.raw_offset == self.at => {
                self.segments = &self.segments[1..];
                (self.at + segment.raw_bytes, Some(segment.source))
            }
            segment => (segment.map_or(self.end, |segment| segment.raw_offset), None),
        };
        self.at = after;
        (raw_offset < after).then_some(Part { raw_offset, raw_bytes: after - raw_offset, encoded })
    }
}

/// Calls `act` for all numbers below `count`, in several threads; the calling one is one of them.
pub fn each_in_threads(count: usize, threads: usize, act: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    let numbers = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&number| number < count);
    let work = || {
        while let Some(number) = numbers() {
            act(number);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(count) {
            // Where the system refuses a thread, the others do its part.
            let _ =
                std::thread::Builder::new().name("dgls-encode".into()).spawn_scoped(scope, work);
        }
        work();
    });
}

/// The encoded forms of one engine, by tensor.
#[derive(Debug, Default)]
pub struct Codes {
    slots: Vec<Option<Code>>,
    /// Of weights that have changed: copies under way may still read them.
    retired: Vec<Code>,
    /// For each tensor how often its weights have changed.
    changes: Vec<u64>,
    /// For each tensor whether copies come from there.
    picks: Vec<bool>,
}

impl Codes {
    /// For `tensors` tensors, none of them encoded.
    pub fn new(tensors: usize) -> Self {
        let slots = std::iter::repeat_with(|| None).take(tensors).collect();
        Self { slots, changes: vec![0; tensors], ..Self::default() }
    }

    /// The encoded form of a tensor.
    pub fn get(&self, tensor: u32) -> Option<&Code> {
        self.slots.get(index(tensor)).and_then(Option::as_ref)
    }

    /// The encoded form of a tensor, if copies are to come from there.
    pub fn to_copy(&self, tensor: u32) -> Option<&Code> {
        self.get(tensor).filter(|_| self.is_picked(tensor))
    }

    /// Whether copies of a tensor are to come from its encoded form; at first none are.
    pub fn is_picked(&self, tensor: u32) -> bool {
        self.picks.get(index(tensor)).copied().unwrap_or(false)
    }

    /// Says of each tensor whether copies of it are to come from its encoded form.
    pub fn set_picks(&mut self, picks: Vec<bool>) {
        self.picks = picks;
    }

    /// How often the weights of a tensor have changed.
    pub fn changes(&self, tensor: u32) -> u64 {
        self.changes.get(index(tensor)).copied().unwrap_or(0)
    }

    /// Takes the encoded form of a tensor, if its weights have not changed since it was begun, when
    /// they had changed `changes` times; else gives it back.
    pub fn put(&mut self, tensor: u32, code: Code, changes: u64) -> Option<Code> {
        if let Some(slot) = self.slots.get_mut(index(tensor))
            && self.changes[index(tensor)] == changes
        {
            self.retired.extend(slot.replace(code));
            return None;
        }
        Some(code)
    }

    /// The weights of a tensor have changed: its encoded form is used no more.
    pub fn changed(&mut self, tensor: u32) {
        if let Some(slot) = self.slots.get_mut(index(tensor)) {
            self.retired.extend(slot.take());
            self.changes[index(tensor)] += 1;
        }
    }

    /// Gives back all but what `stays` says of, and what is used no more; nothing reads any of it
    /// any more. Returns how many bytes of whole pages that were.
    pub fn keep(&mut self, stays: impl Fn(usize, &Code) -> bool) -> u64 {
        let mut bytes: u64 = self.retired.drain(..).map(|code| code.bytes()).sum();
        for (number, slot) in self.slots.iter_mut().enumerate() {
            let gone = slot.take_if(|code| !stays(number, code));
            bytes += gone.map_or(0, |code| code.bytes());
        }
        bytes
    }

    /// Whether what is used no more is held still.
    pub fn has_retired(&self) -> bool {
        !self.retired.is_empty()
    }

    /// Bytes of whole pages held.
    pub fn bytes(&self) -> u64 {
        self.slots.iter().flatten().chain(&self.retired).map(Code::bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::sim::{SimDevice, SimOptions};

    fn device() -> Arc<dyn Device> {
        let options = SimOptions { staged_from: Some(0), lockable: true, ..SimOptions::default() };
        Arc::new(SimDevice::new(options))
    }

    fn code(device: &Arc<dyn Device>) -> Code {
        let segments = [(0, 100, vec![1; 60]), (100, 100, vec![2; 50]), (300, 100, vec![3; 70])];
        Code::new(device, Element::Fp8, &segments, 2).expect("host memory").0
    }

    #[test]
    fn a_copy_comes_from_whole_segments_and_what_is_between_them() {
        let code = code(&device());
        let parts = |offset, bytes| -> Vec<(u64, u64, bool)> {
            let of = |part: &Part| (part.raw_offset, part.raw_bytes, part.encoded.is_some());
            code.parts(offset, bytes).map(|part| of(&part)).collect()
        };
        let all = [(0, 100, true), (100, 100, true), (200, 100, false), (300, 100, true)];
        assert_eq!(parts(0, 400), all);
        assert_eq!(parts(0, 450)[4..], [(400, 50, false)]);
        assert_eq!(parts(50, 150), [(50, 50, false), (100, 100, true)]);
        assert_eq!(parts(100, 250), [(100, 100, true), (200, 150, false)]);
        assert_eq!(parts(1, 98), [(1, 98, false)]);
        assert!(code.is_cut_at(&[0, 399]) && code.is_cut_at(&[1]));
        assert!(!code.is_cut_at(&[0, 100, 200, 250, 300, 400, 500]));
        let sources: Vec<Source> = code.segments.iter().map(|segment| segment.source).collect();
        let Source::Encoded { address, bytes, element } = sources[0] else { panic!("encoded") };
        assert_eq!(sources[1], Source::Encoded { address: address + 60, bytes: 50, element });
        assert_eq!((bytes, element), (60, Element::Fp8), "so that neighbours are one copy");
    }

    #[test]
    fn what_cannot_be_page_locked_is_refused() {
        let options = SimOptions { staged_from: Some(0), ..SimOptions::default() };
        let device: Arc<dyn Device> = Arc::new(SimDevice::new(options));
        Code::new(&device, Element::Bf16, &[(0, 100, vec![1; 60])], 1)
            .expect_err("nothing can be locked");
    }

    #[test]
    fn weights_that_change_meanwhile_are_not_taken_and_older_ones_are_used_no_more() {
        let (device, mut codes) = (device(), Codes::new(2));
        let page = whole_pages(1);
        assert!(codes.put(1, code(&device), 0).is_none());
        assert!(codes.get(1).is_some() && codes.get(0).is_none() && codes.bytes() == page);
        assert!(codes.to_copy(1).is_none());
        codes.set_picks(vec![true, false]);
        assert!(codes.to_copy(1).is_none());
        codes.set_picks(vec![true, true]);
        assert!(codes.to_copy(1).is_some() && codes.to_copy(0).is_none());
        codes.changed(1);
        assert!(codes.get(1).is_none() && codes.has_retired());
        assert_eq!(codes.bytes(), page, "copies under way may read it");
        assert!(codes.put(1, code(&device), 0).is_some());
        assert!(codes.get(1).is_none(), "made of the weights before");
        assert!(codes.put(1, code(&device), codes.changes(1)).is_none());
        assert!(codes.get(1).is_some());
        assert_eq!(codes.keep(|_, _| true), page);
        assert!(!codes.has_retired());
        assert!(codes.get(1).is_some() && codes.bytes() == page);
        assert_eq!(codes.keep(|number, _| number != 1), page);
        assert_eq!((codes.get(1).is_none(), codes.bytes()), (true, 0));
        assert!(codes.put(7, code(&device), 0).is_some());
        codes.changed(7);
        assert_eq!(codes.bytes(), 0, "no such tensor");
    }
}
