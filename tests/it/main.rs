//! The integration tests, as one binary.

mod adaptation;
mod allocation;
mod batches;
mod cuda_fake;
mod cuda_faults;
mod fake;
mod flaky;
mod fuzz;
mod host;
mod lagging;
mod models;
mod optimum;
mod overlap;
mod plan;
mod random;
mod schedule;
mod simulation;
mod slow;
mod stack;
mod tidy;
mod tiers;
mod watchdog;
mod weights;
mod world;
