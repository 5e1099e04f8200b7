use crate::cli::WaitArgs;
use crate::report::{Exit, Failure, Outcome};

pub(crate) fn run(_args: &WaitArgs) -> Outcome {
    Err(Failure::msg(Exit::Internal, "not built"))
}
