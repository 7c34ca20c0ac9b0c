//! Learns the order of use from what runs. Pure.

/// Watches passes and says when another order should be planned for.
#[derive(Debug, Default)]
pub struct Order {
    planned: Vec<u32>,
    current: Vec<u32>,
    last: Vec<u32>,
    /// The caller says where passes begin and end; else it is inferred.
    bounded: bool,
    passes: u64,
    learned: Option<Vec<u32>>,
}

impl Order {
    /// Starts from an assumption: the order in which the blocks are registered.
    pub fn new(planned: Vec<u32>) -> Self {
        let current = Vec::with_capacity(4 * planned.len() + 64);
        let last = Vec::with_capacity(current.capacity());
        Self { planned, current, last, ..Self::default() }
    }

    /// Passes that ended.
    pub fn passes(&self) -> u64 {
        self.passes
    }

    /// A pass begins; one that was under way did not end, so it teaches nothing.
    pub fn begin(&mut self) {
        self.bounded = true;
        self.current.clear();
    }

    /// A block begins.
    pub fn seen(&mut self, block: u32) {
        let whole = self.current.len() >= self.planned.len();
        if !self.bounded && whole && self.current.first() == Some(&block) {
            self.end();
        }
        if self.current.len() == self.current.capacity() {
            // No pass looks like this: give up on it rather than grow without end.
            self.current.clear();
        }
        self.current.push(block);
    }

    /// A pass ended. Another order is adopted at once after the first pass, later when two passes
    /// in a row agree on it: a single pass with skipped blocks is no news.
    pub fn end(&mut self) {
        self.passes += 1;
        let agreed = self.passes == 1 || self.current == self.last;
        if agreed && !self.current.is_empty() && self.current != self.planned {
            self.learned = Some(self.current.clone());
        }
        std::mem::swap(&mut self.current, &mut self.last);
        self.current.clear();
    }

    /// Whether a new order waits to be taken.
    pub fn has_learned(&self) -> bool {
        self.learned.is_some()
    }

    /// The order to plan for, as far as is known.
    pub fn best(&self) -> &[u32] {
        self.learned.as_ref().unwrap_or(&self.planned)
    }

    /// The order to plan for from now on.
    pub fn take(&mut self) -> Vec<u32> {
        if let Some(learned) = self.learned.take() {
            self.planned = learned;
        }
        self.planned.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(order: &mut Order, blocks: &[u32]) {
        order.begin();
        for &block in blocks {
            order.seen(block);
        }
        order.end();
    }

    #[test]
    fn the_first_pass_teaches_at_once() {
        let mut order = Order::new(vec![0, 1, 2]);
        pass(&mut order, &[2, 0, 1, 0]);
        assert!(order.has_learned());
        assert_eq!(order.take(), [2, 0, 1, 0]);
        assert!(!order.has_learned());
    }

    #[test]
    fn later_two_passes_must_agree() {
        let mut order = Order::new(vec![0, 1, 2]);
        pass(&mut order, &[0, 1, 2]);
        pass(&mut order, &[0, 2]);
        assert!(!order.has_learned());
        pass(&mut order, &[0, 1, 2]);
        assert!(!order.has_learned());
        pass(&mut order, &[0, 2]);
        pass(&mut order, &[0, 2]);
        assert_eq!(order.take(), [0, 2]);
    }

    #[test]
    fn a_pass_that_breaks_off_teaches_nothing() {
        let mut order = Order::new(vec![0, 1, 2]);
        order.begin();
        order.seen(0);
        pass(&mut order, &[0, 1, 2]);
        assert!(!order.has_learned());
    }

    #[test]
    fn without_bounds_the_first_block_begins_a_pass() {
        let mut order = Order::new(vec![0, 1, 2]);
        for block in [1, 0, 2, 1] {
            order.seen(block);
        }
        assert_eq!(order.take(), [1, 0, 2]);
    }
}
