use crate::cli::LogsArgs;
use crate::report::{Exit, Failure, Outcome};

pub(crate) fn run(_args: &LogsArgs) -> Outcome {
    Err(Failure::msg(Exit::Internal, "not built"))
}
