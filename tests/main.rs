//! End-to-end tests on the real binary.

#![expect(clippy::unwrap_used, reason = "tests")]

mod batch;
mod bench;
mod checkpoints;
mod cli;
mod cuda;
mod docs;
mod doctor;
mod local;
mod render;
mod replicas;
mod resume;
mod reward;
mod serve;
mod slurm;
mod support;
mod tidy;
