use crate::cli::ServeArgs;
use crate::report::{Exit, Failure, Outcome};

pub(crate) fn run(_args: &ServeArgs) -> Outcome {
    Err(Failure::msg(Exit::Internal, "not built"))
}
