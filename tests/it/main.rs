//! The integration tests, as one binary.

mod flaky;
mod plan;
mod random;
mod simulation;
mod stack;
mod watchdog;
mod world;
