use crate::cli::SuperviseArgs;
use crate::report::{Exit, Failure, Outcome};

pub(crate) fn run(_args: &SuperviseArgs) -> Outcome {
    Err(Failure::msg(Exit::Internal, "not built"))
}
