use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::time::Duration;

use serde_json::json;

use crate::cli::StatusArgs;
use crate::observe::Observer;
use crate::report::{Outcome, print_line};
use crate::rundir::{RunDir, find_run, run_root};
use crate::state::Status;
use crate::supervise::{line, span};

/// How often `--watch` looks.
const INTERVAL: Duration = Duration::from_millis(500);

pub(crate) fn run(args: &StatusArgs) -> Outcome {
    let mut shown = String::new();
    let mut observer = match &args.run {
        Some(selector) => Some(Observer::new(&find_run(selector)?)?),
        None => None,
    };
    loop {
        let (view, over) = match &mut observer {
            Some(observer) => one(observer, args)?,
            None => all(args)?,
        };
        if view != shown {
            // A terminal shows the newest view alone.
            let clear = if args.watch && !args.json && std::io::stdout().is_terminal() { "\x1b[2J\x1b[H" } else { "" };
            if !print_line(format!("{clear}{view}"))? {
                return Ok(());
            }
            shown = view;
        }
        if !args.watch || over {
            return Ok(());
        }
        std::thread::sleep(INTERVAL);
    }
}

/// One run, and whether it has ended.
fn one(observer: &mut Observer, args: &StatusArgs) -> Outcome<(String, bool)> {
    let status = observer.look()?;
    let view = match (args.json, args.metrics) {
        (true, _) => serde_json::to_string(&status).map_err(anyhow::Error::new)?,
        (_, true) => metrics(std::slice::from_ref(&status)),
        _ => table(&status),
    };
    Ok((view, status.phase.is_end()))
}

/// All runs, the newest last; there is always a next one, so it never ends.
fn all(args: &StatusArgs) -> Outcome<(String, bool)> {
    let mut runs = Vec::new();
    for run_dir in RunDir::list(&run_root()?) {
        match Observer::new(&run_dir).and_then(|mut observer| observer.look()) {
            Ok(status) => runs.push(status),
            Err(failure) => tracing::warn!(run = run_dir.name(), %failure, "skipped"),
        }
    }
    let view = if args.json {
        json!({ "schema": 1, "runs": runs }).to_string()
    } else if args.metrics {
        metrics(&runs)
    } else {
        let mut view = format!("{:<24} {:<6} {:<10} STATE", "RUN", "TASK", "PROFILE");
        for status in &runs {
            _ = write!(view, "\n{:<24} {:<6} {:<10} {}", status.run, status.task, status.profile, line(status));
        }
        view
    };
    Ok((view, false))
}

/// The jobs among the runs in Prometheus' text format.
fn metrics(runs: &[Status]) -> String {
    let mut text = String::new();
    let mut family = |name, kind, help, samples: &dyn Fn(&Status) -> Vec<(&'static str, f64)>| {
        _ = write!(text, "# HELP nemotron_job_{name} {help}\n# TYPE nemotron_job_{name} {kind}\n");
        for status in runs.iter().filter(|status| status.job.is_some()) {
            for (label, value) in samples(status) {
                _ = writeln!(text, "nemotron_job_{name}{{run=\"{}\"{label}}} {value}", status.run);
            }
        }
    };
    family("rows", "gauge", "Rows of the job.", &|status| {
        let job = status.job.unwrap_or_default();
        let states = [",state=\"total\"", ",state=\"done\"", ",state=\"failed\""];
        states.into_iter().zip([job.rows_total, job.rows_done, job.rows_failed].map(|rows| rows as f64)).collect()
    });
    family("tokens_total", "counter", "Tokens of the rows that are done.", &|status| {
        let job = status.job.unwrap_or_default();
        let kinds = [",kind=\"prompt\"", ",kind=\"generated\""];
        kinds.into_iter().zip([job.prompt_tokens, job.completion_tokens].map(|tokens| tokens as f64)).collect()
    });
    family("tokens_per_second", "gauge", "Tokens generated.", &|status| vec![("", status.tokens_per_second)]);
    family("eta_seconds", "gauge", "Until the last row is done.", &|status| {
        status.eta_s.map(|eta| ("", eta)).into_iter().collect()
    });
    family("paused", "gauge", "1 while journal or output cannot be written.", &|status| {
        vec![("", f64::from(status.job.unwrap_or_default().paused))]
    });
    text.trim_end().to_owned()
}

fn table(status: &Status) -> String {
    let mut view = format!("{}  {}", status.run, line(status));
    let end = if status.phase.is_end() { status.since } else { status.updated };
    let age = end.duration_since(status.started).as_secs_f64();
    _ = write!(view, "\n{} on {} ({}), attempt {}", status.task, status.cluster, status.profile, status.attempt);
    if status.supervisor.is_some() {
        _ = write!(view, ", started {}, {}", status.started, span(age.max(0.0)));
    }
    if let Some(supervisor) = &status.supervisor {
        _ = write!(view, "\nsupervisor: host {}, pid {}", supervisor.host, supervisor.pid);
    }
    for warning in &status.warnings {
        _ = write!(view, "\nwarning: {warning}");
    }
    for part in &status.replicas {
        _ = write!(view, "\n{:<24} {}", part.run, line(part));
    }
    let stats = &status.stats;
    if stats.steps > 0 || stats.finished_rows > 0 {
        _ = write!(
            view,
            "\nrows finished {}, prompt tokens {}, generated tokens {}, KV pages {}/{}",
            stats.finished_rows, stats.prompt_tokens, stats.generated_tokens, stats.kv_pages_used, stats.kv_pages_total
        );
    }
    if status.ranks.is_empty() {
        return view;
    }
    _ = write!(
        view,
        "\n\n{:>4}  {:<16} {:>8}  {:<8} {:<11} {:>6} {:>10}",
        "RANK", "HOST", "PID", "DEVICE", "PHASE", "LOAD", "STEPS"
    );
    for rank in &status.ranks {
        let host = rank.process.as_ref().map_or("-", |process| &process.host);
        let pid = rank.process.as_ref().map_or_else(|| "-".into(), |process| process.pid.to_string());
        let phase = rank.phase.map_or_else(|| "-".into(), |phase| crate::state::RunPhase::from(phase).to_string());
        let load = if rank.phase >= Some(nemotron_engine::report::Phase::Ready) { 1.0 } else { rank.progress };
        _ = write!(
            view,
            "\n{:>4}  {host:<16} {pid:>8}  {:<8} {phase:<11} {:>5.0}% {:>10}",
            rank.rank,
            rank.device,
            load * 100.0,
            rank.steps
        );
        if let Some(ended) = &rank.ended {
            _ = write!(view, "  {ended}");
        }
    }
    view
}
