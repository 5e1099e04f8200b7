//! End-to-end tests on the real binary.

#![expect(clippy::unwrap_used, reason = "tests")]

mod batch;
mod cli;
mod local;
mod serve;
mod slurm;
mod support;
mod tidy;
