use crate::cli::InspectArgs;
use crate::report::{Exit, Failure, Outcome};

pub(crate) fn run(_args: &InspectArgs) -> Outcome {
    Err(Failure::msg(Exit::Internal, "not built"))
}
