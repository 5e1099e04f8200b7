use crate::cli::ProfilesCommand;
use crate::report::{Exit, Failure, Outcome};

pub(crate) fn run(_command: &ProfilesCommand) -> Outcome {
    Err(Failure::msg(Exit::Internal, "not built"))
}
