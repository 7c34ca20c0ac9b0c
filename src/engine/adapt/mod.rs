//! How an engine gets to better plans: times, the search for a plan, and the change to it.

mod assembly;
mod balance;
mod change;
mod learn;
mod review;
mod tuner;
mod usual;

pub(in crate::engine) use assembly::Assembly;
pub(in crate::engine) use balance::{Balance, Weighed};
pub use review::Adapt;
pub(in crate::engine) use review::{Proposal, Review};
pub use tuner::{News, PassTimes, Reason, Tuner};
