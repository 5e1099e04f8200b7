//! What Slurm says, as text: pure parsers, no commands.

pub mod hostlist;
pub mod inventory;
pub mod parse;
