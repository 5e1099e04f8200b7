//! End-to-end tests on the real binary.

mod batch;
mod serve;
