//! Host memory in the course of a run: takes note of copies that have arrived, gives memory back
//! when the system runs short, and tells what each tier costs.

use super::copying::HostFacts;
use super::core::Core;
use crate::error::Result;
use crate::pool::Staging;

impl Core {
    /// Copies of the file that have arrived in RAM are read from there, or copied as they are.
    pub(super) fn refresh(&mut self) {
        if self.host.take_news() {
            let weights = self.host.weights(&self.spec);
            // Where it stages already, no thread has to be started and nothing can fail.
            let _ = self.executor.update(weights);
        }
        let link = self.tuner.times(self.order.best().len()).map(|times| times.link.bytes_per_s);
        if let (Some(link), true) = (link, self.executor.is_staging()) {
            self.slow = self.host.slow(&self.spec, &self.plan, link);
        }
    }

    /// Gives `bytes` bytes of host memory back, or as many as there are: what they held is read
    /// from the file from now on, or goes through the staging chunks. Blocks until the copies under
    /// way have ended; the pass goes on.
    ///
    /// # Errors
    ///
    /// The device's error; nothing was given back then.
    pub(super) fn give_back(&mut self, bytes: u64) -> Result<()> {
        // Page-locks of plans that are not in force are the first to go.
        self.review.discard();
        self.proposal = None;
        let encoded = self.give_codes_back()?;
        let chosen = self.host.to_give_back(bytes.saturating_sub(encoded));
        if chosen.is_empty() {
            return Ok(());
        }
        let weights = self.host.weights_without(&self.spec, &chosen);
        if !self.executor.has_staging() {
            let staging = self.host.staging_for(&self.spec, &self.plan, &weights, None)?;
            self.staging_bytes = staging.as_ref().map_or(0, Staging::bytes);
            self.executor.give_staging(staging);
        }
        self.executor.settle();
        self.executor.update(weights)?;
        self.device.flush();
        self.device.quiesce(None)?;
        self.host.give_back(&chosen);
        Ok(())
    }

    /// Numbers for a report.
    pub(super) fn host_facts(&self) -> HostFacts {
        self.host.facts(&self.spec, &self.plan)
    }
}
