//! From a Nemotron checkpoint and requests to tokens.

pub mod backend;
pub mod checkpoint;
pub mod collective;
pub mod config;
pub mod engine;
pub mod job;
pub(crate) mod nemo;
pub mod rank;
pub mod report;
pub mod request;
pub mod serve;
pub mod tokenizer;
