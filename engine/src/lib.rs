//! From a Nemotron checkpoint and requests to tokens.

pub mod backend;
pub mod checkpoint;
pub mod collective;
pub mod config;
pub(crate) mod end_strings;
pub mod engine;
pub(crate) mod error_chain;
pub mod job;
pub mod rank;
pub mod report;
pub mod request;
pub mod serve;
pub mod tokenizer;
