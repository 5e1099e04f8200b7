use crate::cli::EventsArgs;
use crate::report::{Exit, Failure, Outcome};

pub(crate) fn run(_args: &EventsArgs) -> Outcome {
    Err(Failure::msg(Exit::Internal, "not built"))
}
