//! How an engine gets to better plans: times, the search for a plan, and the change to it.

mod change;
mod learn;
mod review;
mod tuner;

pub use review::Adapt;
pub(in crate::engine) use review::{Proposal, Review};
pub(in crate::engine) use tuner::Assembly;
pub use tuner::{PassTimes, Reason, Tuner};
