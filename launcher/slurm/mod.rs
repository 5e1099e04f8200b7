//! Slurm, spoken through its commands and the variables that it sets; nothing else in the launcher knows either.
//!
//! `hostlist` and `parse` are pure parsers of what it says.

mod again;
pub(crate) mod client;
pub(crate) mod daemon;
pub(crate) mod env;
pub mod hostlist;
pub mod inventory;
pub(crate) mod job;
pub mod parse;
pub(crate) mod step;
