use crate::cli::CancelArgs;
use crate::report::{Exit, Failure, Outcome};

pub(crate) fn run(_args: &CancelArgs) -> Outcome {
    Err(Failure::msg(Exit::Internal, "not built"))
}
