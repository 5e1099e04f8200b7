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
mod parquet;
mod render;
mod replicas;
mod resume;
mod reward;
mod serve;
mod slurm;
mod storage;
mod support;
mod tidy;
