use crate::cli::WorkerArgs;
use crate::report::Outcome;

pub(crate) fn run(args: &WorkerArgs) -> Outcome {
    crate::worker::run(args)
}
