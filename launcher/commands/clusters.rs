use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::cli::ClustersCommand;
use crate::cluster;
use crate::env::Environment;
use crate::report::{Exit, Failure, Outcome, print_json, print_line};
use crate::settings::Settings;
use crate::slurm::inventory;
use crate::supervise::narrate;

/// A controller that is frozen never answers.
const SINFO_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) fn run(command: &ClustersCommand) -> Outcome {
    let environment = Environment::of_process();
    match command {
        ClustersCommand::List { json } => list(*json, &environment),
        ClustersCommand::Init { partition, output } => init(partition.as_deref(), output.as_deref()),
        ClustersCommand::Show { name, json } => show(name, *json, &environment),
    }
}

fn list(json: bool, environment: &Environment) -> Outcome {
    let mut rows = Vec::new();
    for name in cluster::names(environment) {
        let document = cluster::find(&name, environment)?;
        let settings = Settings::of_cluster(&name, &document, environment)?;
        rows.push((name, settings.text("description").unwrap_or_default().to_owned(), document.label));
    }
    if json {
        let clusters: Vec<_> = rows
            .iter()
            .map(|(name, description, file)| json!({ "name": name, "description": description, "file": file }))
            .collect();
        return print_json(&json!({ "schema": 1, "clusters": clusters })).map(drop);
    }
    let width = rows.iter().map(|(name, ..)| name.len()).max().unwrap_or(0);
    for (name, description, _) in rows {
        print_line(format!("{name:width$}  {description}"))?;
    }
    Ok(())
}

fn show(name: &str, json: bool, environment: &Environment) -> Outcome {
    let document = cluster::find(name, environment)?;
    let settings = Settings::of_cluster(name, &document, environment)?;
    if json {
        let keys: serde_json::Map<String, serde_json::Value> =
            settings.iter().map(|(key, value, _)| (key.to_owned(), json!(value))).collect();
        return print_json(&json!({ "schema": 1, "file": document.label, "keys": keys })).map(drop);
    }
    print_line(document.text.trim_end()).map(drop)
}

fn init(partition: Option<&str>, output: Option<&Path>) -> Outcome {
    let nodes = inventory::nodes(&sinfo()?);
    let chosen = inventory::choose(&nodes, partition).ok_or_else(|| {
        let names: Vec<_> = nodes.iter().map(|nodes| nodes.partition.as_str()).collect();
        Failure::msg(Exit::Usage, format!("Slurm has no partition {}", partition.unwrap_or("with nodes")))
            .hint(format!("it reports: {}", names.join(", ")))
    })?;
    let text = inventory::cluster_file(&nodes, chosen);
    let Some(path) = output else {
        return print_line(text.trim_end()).map(drop);
    };
    let file = std::fs::OpenOptions::new().write(true).create_new(true).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
        .map_err(|error| Failure::new(Exit::Usage, error))?;
    narrate(&format!("wrote {}; look at account and run_root", path.display()));
    Ok(())
}

fn sinfo() -> Outcome<String> {
    let silent = |message: String| Failure::msg(Exit::SchedulerSilent, message);
    let child = Command::new("sinfo")
        .args(["-h", "-o", inventory::SINFO_FORMAT])
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let child = child.map_err(|error| silent(format!("cannot run sinfo: {error}")).hint("run it where Slurm is"))?;
    let pid = child.id();
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    let Ok(output) = receiver.recv_timeout(SINFO_TIMEOUT) else {
        // It has not been waited for, so the id is still its own.
        _ = i32::try_from(pid).map(|pid| kill(Pid::from_raw(pid), Signal::SIGKILL));
        return Err(silent(format!("sinfo did not answer within {} s", SINFO_TIMEOUT.as_secs())));
    };
    let output = output.context("cannot read what sinfo prints")?;
    if !output.status.success() {
        return Err(silent(format!("sinfo failed: {}", String::from_utf8_lossy(&output.stderr).trim())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
