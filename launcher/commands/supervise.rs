use anyhow::Context as _;
use nix::unistd::setsid;

use crate::cli::SuperviseArgs;
use crate::env::Environment;
use crate::report::Outcome;
use crate::rundir::RunDir;
use crate::start::DETACHED;
use crate::supervise;

pub(crate) fn run(args: &SuperviseArgs) -> Outcome {
    if Environment::of_process().get(DETACHED).is_some() {
        setsid().context("cannot leave the terminal's session")?;
    }
    supervise::block_signals()?;
    let run_dir = RunDir::open(&args.run_dir)?;
    let status = supervise::supervise(&run_dir, Box::new(|_| ()))?;
    supervise::narrate(&format!("run {} is {}", run_dir.name(), status.phase));
    Ok(())
}
