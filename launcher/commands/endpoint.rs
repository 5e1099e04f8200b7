use crate::cli::EndpointArgs;
use crate::report::{Exit, Failure, Outcome};

pub(crate) fn run(_args: &EndpointArgs) -> Outcome {
    Err(Failure::msg(Exit::Internal, "not built"))
}
