//! From a Nemotron checkpoint and requests to tokens.

pub mod backend;
pub mod checkpoint;
pub mod collective;
pub mod config;
pub mod engine;
pub mod job;
pub mod memory;
pub mod rank;
pub mod report;
pub mod request;
pub mod serve;
pub mod tokenizer;

#[cfg(test)]
#[path = "../../tests/support/parity_model.rs"]
mod parity_model;
