use crate::cli::CompletionsArgs;
use crate::report::{Exit, Failure, Outcome};

pub(crate) fn run(_args: &CompletionsArgs) -> Outcome {
    Err(Failure::msg(Exit::Internal, "not built"))
}
