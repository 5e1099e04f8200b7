use crate::cli::ServeArgs;
use crate::env::Environment;
use crate::host::Host;
use crate::report::{Exit, Failure, Outcome};
use crate::resolve;

pub(crate) fn run(args: &ServeArgs) -> Outcome {
    let resolved = resolve::serve(args, &Environment::of_process(), &Host::probe()?)?;
    Err(Failure::msg(Exit::Internal, format!("cannot start {:?}", resolved.spec)))
}
