//! From a command line to running ranks, and what watches them.

pub mod report;
pub(crate) mod seconds;
pub mod spec;

pub fn main() -> std::process::ExitCode {
    std::process::ExitCode::SUCCESS
}
