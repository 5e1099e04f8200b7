use crate::cli::PlanArgs;
use crate::report::{Exit, Failure, Outcome};

pub(crate) fn run(_args: &PlanArgs) -> Outcome {
    Err(Failure::msg(Exit::Internal, "not built"))
}
