use crate::cli::StatusArgs;
use crate::report::{Exit, Failure, Outcome};

pub(crate) fn run(_args: &StatusArgs) -> Outcome {
    Err(Failure::msg(Exit::Internal, "not built"))
}
