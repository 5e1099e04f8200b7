//! The whole engine, through its public interface.

#![expect(clippy::unwrap_used, reason = "tests")]

mod checkpoints;
mod numerics;
#[path = "../../../tests/support/parity_model.rs"]
mod parity_model;
mod rows;
mod support;
