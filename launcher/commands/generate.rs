use crate::cli::GenerateArgs;
use crate::report::{Exit, Failure, Outcome};

pub(crate) fn run(_args: &GenerateArgs) -> Outcome {
    Err(Failure::msg(Exit::Internal, "not built"))
}
