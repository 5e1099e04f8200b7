use std::path::Path;

use nemotron_engine::checkpoint;
use nemotron_engine::job::Job;

use crate::cli::BatchArgs;
use crate::env::Environment;
use crate::host::Host;
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
            let folder = job.path.parent().unwrap_or(Path::new("/"));
            let model = checkpoint::open(&resolved.spec.model)?;
            let measure =
                Job::load(&job.file, folder, args.limit, &model.tokenizer()?)?.measure(model.config().max_context);
            narrate(&format!(
                "{} rows, {} prompt tokens, at most {} new tokens; {} rows do not fit the context",
                measure.rows, measure.prompt_tokens, measure.max_new_tokens, measure.rejected
            ));
        }
        return dry_run(&resolved, false);
    }
    foreground(resolved, Output::Url)
}
