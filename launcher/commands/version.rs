use crate::cli::VersionArgs;
use crate::report::{Exit, Failure, Outcome};

pub(crate) fn run(_args: &VersionArgs) -> Outcome {
    Err(Failure::msg(Exit::Internal, "not built"))
}
