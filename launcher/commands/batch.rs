use crate::cli::BatchArgs;
use crate::env::Environment;
use crate::host::Host;
use crate::report::{Exit, Failure, Outcome};
use crate::resolve;

pub(crate) fn run(args: &BatchArgs) -> Outcome {
    let resolved = resolve::batch(args, &Environment::of_process(), &Host::probe()?)?;
    Err(Failure::msg(Exit::Internal, format!("cannot start {:?}", resolved.spec)))
}
