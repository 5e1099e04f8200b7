use anyhow::Context as _;

use crate::cli::ResumeArgs;
use crate::cluster;
use crate::job_file::load_job;
use crate::report::{Exit, Failure, Outcome, print_json, print_line};
use crate::rundir::{find_run, write_atomic, write_json};
use crate::spec::Task;
use crate::start::{Output, attend, detach, launched};
use crate::state::{RunPhase, Status};
use crate::supervise::{block_signals, narrate};

pub(crate) fn run(args: &ResumeArgs) -> Outcome {
    if !args.detach {
        block_signals()?;
    }
    let run_dir = find_run(&args.run)?;
    let name = run_dir.name();
    let refuse = |text: String| Failure::msg(Exit::Usage, text);
    let spec = run_dir.spec()?;
    let Task::Job { file, overrides, .. } = &spec.task else {
        return Err(refuse(format!("run {name} serves; only jobs are resumed")));
    };
    if spec.cluster != cluster::LOCAL {
        return Err(refuse(format!(
            "run {name} is one of cluster {}; this version resumes only local ones",
            spec.cluster
        )));
    }
    let status = Status::of(&run_dir)?;
    match status.phase {
        RunPhase::Done => {
            return Err(refuse(format!("run {name} is done")).hint(format!("nemotron results {name} verify")));
        }
        phase if !phase.is_end() && status.supervisor.is_some() => {
            return Err(refuse(format!("run {name} is {phase}")).hint(format!("nemotron status {name}")));
        }
        _ => {}
    }
    let output = load_job(file, overrides)?.file.output.path;
    let attempt = run_dir.next_attempt()?;
    let begin = || -> anyhow::Result<()> {
        if args.allow_changed {
            write_atomic(&run_dir.allow_changed_file(attempt), b"")?;
        }
        // Whoever waits for the run must not find how the attempt before ended.
        write_json(&run_dir.status_file(), &Status::pending(&spec, attempt))?;
        Ok(())
    };
    begin().with_context(|| format!("cannot begin attempt {attempt}"))?;
    narrate(&format!("run {name}, attempt {attempt}"));
    if !args.detach {
        return attend(&run_dir, attempt, Some(&output), if args.json { Output::Json } else { Output::Url });
    }
    detach(&run_dir, attempt)?;
    if args.json { print_json(&launched(&run_dir, None)) } else { print_line(name) }.map(drop)
}
