//! Starting a resolved run on this machine: in the foreground, or as a process that outlives the command.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;

use crate::report::{Exit, Failure, Outcome, print_json, print_line};
use crate::resolve::Resolved;
use crate::rundir::RunDir;
use crate::state::{Endpoint, Status};
use crate::supervise::{narrate, span, supervise};

/// Variable that tells a supervisor to leave the session of the terminal that started it.
pub(crate) const DETACHED: &str = "NEMOTRON_DETACHED";

/// How often files of another process are looked at.
pub(crate) const POLL: Duration = Duration::from_millis(100);

/// What a command prints on stdout about a run in the foreground.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    /// The URL when it serves.
    Url,
    /// The run's name as soon as it has one.
    Name,
    /// One object: at READY when it serves, at the end when it works through a job.
    Json,
}

/// Runs to the end. Signals were blocked before: [`crate::supervise::block_signals`].
pub(crate) fn foreground(mut resolved: Resolved, output: Output) -> Outcome {
    let run_dir = RunDir::create(&resolved.run_root, &mut resolved.spec)?;
    tracing::info!(run = run_dir.name(), directory = %run_dir.path().display(), "run created");
    attend(&run_dir, 0, resolved.job.as_ref().map(|job| job.file.output.path.as_path()), output)
}

/// Runs an attempt to its end. `job_output` is where the rows of a job go.
pub(crate) fn attend(run_dir: &RunDir, attempt: u32, job_output: Option<&Path>, output: Output) -> Outcome {
    if output == Output::Name {
        print_line(run_dir.name())?;
    }
    let announced = run_dir.clone();
    let on_ready = move |endpoint: &Endpoint| {
        // Whoever closed stdout can still ask `nemotron endpoint`.
        _ = match output {
            Output::Url => print_line(&endpoint.url),
            Output::Name => Ok(true),
            Output::Json => print_json(&launched(&announced, Some(endpoint))),
        };
        let token = endpoint.token_file.as_ref();
        let token = token.map_or_else(|| "no token needed".into(), |file| format!("token in {}", file.display()));
        narrate(&format!("run {}, {token}", announced.name()));
    };
    let status = supervise(run_dir, Box::new(on_ready))?;
    if let (Some(progress), Some(output_file)) = (status.job, job_output) {
        if output == Output::Json {
            print_json(&json!({
                "schema": 1,
                "run": run_dir.name(),
                "run_dir": run_dir.path(),
                "output": output_file,
                "rows": progress,
                "tokens_per_second": status.tokens_per_second,
            }))?;
        }
        let seconds = status.since.duration_since(status.started).as_secs_f64();
        narrate(&format!(
            "{} rows ({} failed{}) in {}: {} tokens, {:.1} tokens/s\n{}",
            progress.rows_done,
            progress.rows_failed,
            if attempt > 0 { format!(", {} of earlier attempts", progress.rows_kept) } else { String::new() },
            span(seconds),
            progress.completion_tokens,
            status.tokens_per_second,
            output_file.display()
        ));
    }
    Ok(())
}

/// Starts a supervisor in a session of its own, and returns when it has taken over.
pub(crate) fn detached(mut resolved: Resolved) -> Outcome<RunDir> {
    let run_dir = RunDir::create(&resolved.run_root, &mut resolved.spec)?;
    detach(&run_dir, 0)?;
    Ok(run_dir)
}

/// Starts the supervisor of an attempt, which is the newest one.
pub(crate) fn detach(run_dir: &RunDir, attempt: u32) -> Outcome {
    let path = run_dir.supervise_log(attempt);
    let log = OpenOptions::new().append(true).create(true).mode(0o600).open(&path);
    let log = log.with_context(|| format!("cannot open {}", path.display()))?;
    let mut supervisor = Command::new("/proc/self/exe")
        .arg0("nemotron")
        .arg("supervise")
        .arg(run_dir.path())
        .env(DETACHED, "1")
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("cannot share the log")?)
        .stderr(log)
        .spawn()
        .context("cannot start the supervisor")?;
    let has_begun =
        |status: &Status| status.attempt >= attempt && (status.supervisor.is_some() || status.phase.is_end());
    while !has_begun(&Status::of(run_dir)?) {
        if let Some(status) = supervisor.try_wait().context("cannot wait for the supervisor")? {
            return Err(Failure::msg(Exit::Internal, format!("the supervisor ended at once ({status})"))
                .hint(format!("see {}", path.display())));
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// What `--json` says about a run that was launched.
pub(crate) fn launched(run_dir: &RunDir, endpoint: Option<&Endpoint>) -> serde_json::Value {
    json!({
        "schema": 1,
        "run": run_dir.name(),
        "run_dir": run_dir.path(),
        "url": endpoint.map(|endpoint| &endpoint.url),
        "token_file": endpoint.and_then(|endpoint| endpoint.token_file.as_ref()),
    })
}
