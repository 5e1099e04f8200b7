use crate::cli::LaunchArgs;
use crate::report::{Exit, Failure, Outcome};

pub(crate) fn run(_args: &LaunchArgs) -> Outcome {
    Err(Failure::msg(Exit::Internal, "not built"))
}
