use crate::cli::BatchArgs;
use crate::report::{Exit, Failure, Outcome};

pub(crate) fn run(_args: &BatchArgs) -> Outcome {
    Err(Failure::msg(Exit::Internal, "not built"))
}
