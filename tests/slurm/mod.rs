//! Runs on a real Slurm, with two nodes that have networks of their own.

#![expect(clippy::unwrap_used, reason = "tests")]

mod accounts;
mod attempts;
mod containers;
mod faults;
mod nodes;
mod replicas;
mod sites;
mod start;
mod support;
