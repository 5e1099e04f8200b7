use crate::cli::WorkerArgs;
use crate::report::{Exit, Failure, Outcome};

pub(crate) fn run(_args: &WorkerArgs) -> Outcome {
    Err(Failure::msg(Exit::Internal, "not built"))
}
