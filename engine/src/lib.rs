//! From a Nemotron checkpoint and requests to tokens.

pub mod backend;
pub mod chat;
pub mod checkpoint;
pub mod collective;
pub mod config;
pub(crate) mod end_strings;
pub mod engine;
pub(crate) mod error_chain;
pub mod job;
pub mod kv_cache;
pub mod memory;
pub mod mesh;
pub mod model;
pub mod rank;
pub mod rank_bench;
pub mod report;
pub mod request;
pub mod reward;
pub mod runner;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod serve;
pub mod spec;
pub mod step;
pub mod tokenizer;
pub mod wire;

#[cfg(test)]
#[path = "../../tests/support/parity_model.rs"]
mod parity_model;
