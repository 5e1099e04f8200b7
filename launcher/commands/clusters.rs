use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;
use nix::unistd::{User, getuid};
use serde_json::json;

use crate::cli::ClustersCommand;
use crate::cluster;
use crate::env::Environment;
use crate::report::{Exit, Failure, Outcome, print_json, print_line};
use crate::settings::Settings;
use crate::slurm::inventory::{self, Habits};
use crate::supervise::narrate;

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
    let nodes = inventory::ask()?;
    let chosen = inventory::choose(&nodes, partition).ok_or_else(|| {
        let names: Vec<_> = nodes.iter().map(|nodes| nodes.partition.as_str()).collect();
        Failure::msg(Exit::Usage, format!("Slurm has no partition {}", partition.unwrap_or("with nodes")))
            .hint(format!("it reports: {}", names.join(", ")))
    })?;
    let user = User::from_uid(getuid()).ok().flatten().map(|user| user.name).unwrap_or_default();
    let text = inventory::cluster_file(&nodes, chosen, &Habits::ask(&user)?);
    let Some(path) = output else {
        return print_line(text.trim_end()).map(drop);
    };
    let file = std::fs::OpenOptions::new().write(true).create_new(true).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
        .map_err(|error| Failure::new(Exit::Usage, error))?;
    let what = "look at account, run_root and fabric, then try it with launch --test-only";
    narrate(&format!("wrote {}; {what}", path.display()));
    Ok(())
}
