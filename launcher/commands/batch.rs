use crate::cli::BatchArgs;
use crate::env::Environment;
use crate::host::Host;
use crate::preview::Preview;
use crate::report::Outcome;
use crate::resolve;
use crate::start::{Output, foreground};
use crate::supervise::{block_signals, narrate};

use super::launch::dry_run;

pub(crate) fn run(args: &BatchArgs) -> Outcome {
    block_signals()?;
    let resolved = resolve::batch(args, &Environment::of_process(), &Host::probe()?)?;
    if args.dry_run {
        if let Some(job) = &resolved.job {
            let preview = Preview::of(job, args.limit, &resolved.spec.model, &resolved.plan)?;
            narrate(&preview.table());
        }
        return dry_run(&resolved, false);
    }
    foreground(resolved, Output::Url)
}
