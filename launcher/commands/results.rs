use std::io;
use std::path::Path;

use nemotron_engine::job::{Results, Stats};
use serde_json::{Value, json};

use crate::cli::{ResultsArgs, ResultsView};
use crate::job_file::load_job;
use crate::replicas;
use crate::report::{Exit, Failure, Outcome, print_json, print_line};
use crate::rundir::find_run;
use crate::spec::Task;

pub(crate) fn run(args: &ResultsArgs) -> Outcome {
    let run_dir = find_run(&args.run)?;
    let name = run_dir.name();
    let spec = run_dir.spec()?;
    let journals = replicas::journals(&run_dir, &spec);
    let Task::Job { file, limit, overrides, .. } = spec.task else {
        return Err(Failure::msg(Exit::Usage, format!("run {name} serves; it has no rows")));
    };
    let job = load_job(&file, &overrides)?;
    let folder = job.path.parent().unwrap_or(Path::new("/"));
    let results = Results::read(&job.file, folder, limit, &journals)?;
    match args.view {
        ResultsView::Verify => verify(name, &results, args.json),
        ResultsView::Stats => stats(name, &results.stats()?, args.json),
        ResultsView::Failed => failed(name, &results, args.json),
    }
}

fn verify(name: &str, results: &Results, json: bool) -> Outcome {
    let (stats, verified) = (results.stats()?, results.verify()?);
    let rows = stats.rows;
    if json {
        print_json(&json!({ "schema": 1, "run": name, "rows": rows, "verified": verified }))?;
    } else {
        print_line(format!("rows      {} of {}, {} failed", rows.rows_done, rows.rows_total, rows.rows_failed))?;
        let state = verified.problem.as_deref().unwrap_or("each row once, in input order, as the journal has it");
        print_line(format!("output    {}: {state}", verified.output.display()))?;
        print_line(format!("sha256    {}", verified.sha256))?;
    }
    if !verified.complete {
        let text = format!("{} rows are missing", stats.rows_missing);
        return Err(Failure::msg(Exit::Resumable, text).hint(format!("if it does not run: nemotron resume {name}")));
    }
    match verified.problem {
        None => Ok(()),
        Some(problem) => {
            let text = format!("{}: {problem}", verified.output.display());
            Err(Failure::msg(Exit::OutputStorage, text))
        }
    }
}

fn stats(name: &str, stats: &Stats, json: bool) -> Outcome {
    if json {
        return print_json(&json!({ "schema": 1, "run": name, "stats": stats })).map(drop);
    }
    let rows = stats.rows;
    print_line(format!(
        "rows      {} of {}, {} failed, {} missing",
        rows.rows_done, rows.rows_total, rows.rows_failed, stats.rows_missing
    ))?;
    let endings: Vec<_> = stats.endings.iter().map(|(ending, count)| format!("{ending} {count}")).collect();
    print_line(format!("endings   {}", endings.join(", ")))?;
    if stats.rows_repetitive > 0 {
        print_line(format!("repeating {} rows end in the same few characters again and again", stats.rows_repetitive))?;
    }
    print_line(format!("tokens    {} of prompts, {} generated", rows.prompt_tokens, rows.completion_tokens))?;
    print_line(format!(
        "journal   {} attempts, {} records damaged, {} rows generated more than once",
        stats.attempts, stats.records_damaged, stats.rows_repeated
    ))
    .map(drop)
}

fn failed(name: &str, results: &Results, json: bool) -> Outcome {
    let mut lines = Vec::new();
    results.failed(|line| {
        match json {
            true => lines.push(line.clone()),
            false => _ = print_line(line).map_err(|failure| io::Error::other(failure.error.to_string()))?,
        }
        Ok(())
    })?;
    if json { print_json(&json!({ "schema": 1, "run": name, "failed": Value::from(lines) })).map(drop) } else { Ok(()) }
}
