//! End-to-end tests on the real binary.

mod cli;
mod local;
mod support;
