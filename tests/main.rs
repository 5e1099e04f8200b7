//! End-to-end tests on the real binary.

#![expect(clippy::unwrap_used, reason = "tests")]

mod cli;
mod local;
mod serve;
mod support;
mod tidy;
