use crate::cli::ServeArgs;
use crate::env::Environment;
use crate::host::Host;
use crate::report::Outcome;
use crate::resolve;
use crate::start::{Output, foreground};
use crate::supervise::block_signals;

pub(crate) fn run(args: &ServeArgs) -> Outcome {
    block_signals()?;
    let resolved = resolve::serve(args, &Environment::of_process(), &Host::probe()?)?;
    foreground(resolved, Output::Url)
}
