use serde_json::json;

use crate::cli::ProfilesCommand;
use crate::env::Environment;
use crate::profile;
use crate::report::{Outcome, print_json, print_line};
use crate::settings::Settings;

pub(crate) fn run(command: &ProfilesCommand) -> Outcome {
    let environment = Environment::of_process();
    match command {
        ProfilesCommand::List { json } => list(*json, &environment),
        ProfilesCommand::Show { name, json } => show(name, *json, &environment),
    }
}

fn list(json: bool, environment: &Environment) -> Outcome {
    let mut rows = Vec::new();
    for name in profile::names(environment) {
        let document = profile::find(&name, environment)?;
        let settings = Settings::of_profile(&name, &document, environment)?;
        rows.push((name, settings.text("description").unwrap_or_default().to_owned(), document.label));
    }
    if json {
        let profiles: Vec<_> = rows
            .iter()
            .map(|(name, description, file)| json!({ "name": name, "description": description, "file": file }))
            .collect();
        return print_json(&json!({ "schema": 1, "profiles": profiles })).map(drop);
    }
    let width = rows.iter().map(|(name, ..)| name.len()).max().unwrap_or(0);
    for (name, description, _) in rows {
        print_line(format!("{name:width$}  {description}"))?;
    }
    Ok(())
}

fn show(name: &str, json: bool, environment: &Environment) -> Outcome {
    let document = profile::find(name, environment)?;
    let settings = Settings::of_profile(name, &document, environment)?;
    if json {
        let keys: serde_json::Map<String, serde_json::Value> =
            settings.iter().map(|(key, value, _)| (key.to_owned(), json!(value))).collect();
        return print_json(&json!({ "schema": 1, "file": document.label, "keys": keys })).map(drop);
    }
    print_line(document.text.trim_end()).map(drop)
}
