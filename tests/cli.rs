//! Commands that start nothing: what they print, where, and with which code they end.

use std::fs;
use std::process::Stdio;

use serde_json::Value;

use crate::support::{finish, nemotron};

/// Exit code, stdout and stderr of `nemotron LINE` in an empty home.
fn run(line: &str) -> (i32, String, String) {
    let home = tempfile::tempdir().expect("a folder");
    finish(nemotron(home.path()).args(line.split(' ')))
}

fn json(line: &str) -> Value {
    let (code, stdout, stderr) = run(line);
    assert_eq!((code, stderr.as_str()), (0, ""), "{line}");
    let value: Value = serde_json::from_str(&stdout).expect("one JSON object");
    assert_eq!(value["schema"], 1);
    value
}

#[test]
fn plan_says_what_fits() {
    let plan = json("plan --profile h100x16 --json");
    assert_eq!(plan["parameters"], 341_029_195_776_u64);
    assert_eq!(plan["mesh"], serde_json::json!({ "tp": 8, "pp": 2 }));
    assert_eq!((&plan["device"], &plan["dtype"], &plan["fits"]), (&"cuda".into(), &"bf16".into(), &true.into()));
    assert_eq!(plan["ranks"].as_array().map(Vec::len), Some(16));
    assert_eq!(plan["ranks"][8]["stage"], 1);
    assert_eq!(plan["ranks"][8]["kv_bytes_per_token"], 36_864);
    let (code, stdout, _) = run("plan --profile h200x8");
    assert_eq!(code, 0);
    assert!(stdout.contains("341,029,195,776 parameters") && stdout.contains("79.41"), "{stdout}");
}

#[test]
fn plan_says_what_would_fit() {
    for line in ["plan --profile h100x16 --set pp=1", "plan --profile h100x16 --set nodes=1", "plan --profile h100x1"] {
        let (code, _, stderr) = run(line);
        assert_eq!(code, 10, "{line}");
        assert!(stderr.contains("help: would fit: --profile h100x16 (TP8 x PP2"), "{stderr}");
    }
    let (code, stdout, _) = run("plan --profile h100x1 --json");
    let plan: Value = serde_json::from_str(&stdout).expect("JSON also when it does not fit");
    assert_eq!((code, &plan["fits"]), (10, &false.into()));
    assert_eq!(run("plan --profile h100x1 --model nemotron-mini-4b").0, 0);
}

#[test]
fn plan_for_this_machine_takes_the_built_in_model() {
    let plan = json("plan --profile cpu --json");
    assert_eq!((&plan["model"], &plan["device"]), (&"nemotron-shakespeare".into(), &"cpu".into()));
}

#[test]
fn usage_errors_end_with_2() {
    for line in [
        "plan",
        "plan --profile nothing",
        "plan --profile cpu --set no_such_key=1",
        "plan --profile cpu --unknown",
        "launch --profile cpu",
        "launch --profile cpu --serve --cluster nowhere",
        "nonsense",
        "batch --job missing.toml",
        "completions no-such-shell",
        "launch --profile cpu --serve --name=",
        "serve --model=",
        "serve --set kv_tokens=0",
        "generate --url ftp://somewhere --prompt x",
    ] {
        let (code, stdout, stderr) = run(line);
        assert_eq!((code, stdout.as_str()), (2, ""), "{line}: {stderr}");
        assert!(stderr.starts_with("error: "), "{line}: {stderr}");
    }
}

#[test]
fn job_files_are_checked_to_the_column() {
    let home = tempfile::tempdir().expect("a folder");
    let job =
        "schema = 1\n\n[input]\nprompts = [\"a\"]\n\n[output]\npath = \"o\"\n\n[sampling]\ntokens_to_genrate = 8\n";
    fs::write(home.path().join("job.toml"), job).expect("written");
    for line in ["plan --profile cpu --job job.toml", "batch --job job.toml --dry-run"] {
        let (code, _, stderr) = finish(nemotron(home.path()).args(line.split(' ')));
        assert_eq!(code, 2, "{line}: {stderr}");
        let expected = "job.toml:10:1: unknown key `tokens_to_genrate`; did you mean `tokens_to_generate`?";
        assert!(stderr.contains(expected), "{line}: {stderr}");
    }
}

#[test]
fn the_environment_is_a_layer() {
    let home = tempfile::tempdir().expect("a folder");
    let plan = |variable: &str, flags: &[&str]| {
        let mut command = nemotron(home.path());
        command.args(["plan", "--json"]).args(flags).env("NEMOTRON_PROFILE", "cpu").env("NEMOTRON_TP", variable);
        finish(&mut command)
    };
    let tp = |stdout: &str| serde_json::from_str::<Value>(stdout).expect("JSON")["mesh"]["tp"].clone();
    assert_eq!(tp(&plan("2", &[]).1), 2);
    assert_eq!(tp(&plan("2", &["--tp", "4"]).1), 4);
    let (code, _, stderr) = plan("two", &[]);
    assert_eq!(code, 2);
    assert!(stderr.contains("NEMOTRON_TP=two"), "{stderr}");
}

#[test]
fn profiles_are_listed_and_shown() {
    let list = json("profiles list --json");
    let names: Vec<_> = list["profiles"].as_array().expect("a list").iter().map(|row| row["name"].clone()).collect();
    assert_eq!(names, ["a100x1", "a100x16", "cpu", "h100x1", "h100x16", "h200x1", "h200x8"]);
    assert_eq!(json("profiles show h100x16 --json")["keys"]["mesh.pp"], 2);
    let (code, stdout, _) = run("profiles show cpu");
    assert!(code == 0 && stdout.contains("model = \"builtin\""), "{stdout}");
}

#[test]
fn a_shown_profile_can_be_saved_and_used() {
    let home = tempfile::tempdir().expect("a folder");
    let (_, text, _) = finish(nemotron(home.path()).args(["profiles", "show", "h200x8"]));
    fs::write(home.path().join("mine.toml"), text.replace("devices_per_node = 8", "devices_per_node = 4"))
        .expect("written");
    let (code, _, stderr) = finish(nemotron(home.path()).args(["plan", "--profile", "mine.toml"]));
    assert_eq!(code, 10, "4 devices cannot be TP8: {stderr}");
    let (code, ..) = finish(nemotron(home.path()).args([
        "plan",
        "--profile",
        "mine.toml",
        "--tp",
        "4",
        "--model",
        "nemotron-4-15b",
    ]));
    assert_eq!(code, 0);
}

#[test]
fn version_and_completions_print() {
    assert_eq!(run("version"), (0, format!("nemotron {}\n", env!("CARGO_PKG_VERSION")), String::new()));
    assert_eq!(json("version --json")["version"], env!("CARGO_PKG_VERSION"));
    for shell in ["bash", "zsh", "fish"] {
        let (code, stdout, _) = run(&format!("completions {shell}"));
        assert!(code == 0 && stdout.contains("generate"), "{shell}");
    }
}

#[test]
fn a_bad_checkpoint_ends_with_22() {
    let home = tempfile::tempdir().expect("a folder");
    fs::create_dir(home.path().join("empty")).expect("made");
    for model in ["empty", "missing"] {
        let (code, stdout, stderr) = finish(nemotron(home.path()).args(["inspect", model]));
        assert_eq!((code, stdout.as_str()), (22, ""), "{stderr}");
        assert!(stderr.contains(model), "{stderr}");
    }
}

#[test]
fn inspect_describes_the_built_in_model() {
    let model = json("inspect builtin --json");
    assert_eq!(model["model"], "nemotron-shakespeare");
    assert_eq!(model["architecture"]["num_layers"], 6);
    assert_eq!(model["tokenizer"]["vocab_size"], 4096);
    assert!(model["tensors"].as_array().is_some_and(|tensors| tensors.iter().all(|tensor| tensor["dtype"] == "bf16")));
    let (code, stdout, _) = run("inspect nemotron-shakespeare");
    assert!(code == 0 && stdout.contains("model.safetensors"), "{stdout}");
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let home = tempfile::tempdir().expect("a folder");
    let mut child = nemotron(home.path())
        .args(["completions", "zsh"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("it ends");
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
}

#[test]
fn help_goes_to_stdout() {
    for line in ["--help", "launch --help", "generate -h"] {
        let (code, stdout, stderr) = run(line);
        assert!(code == 0 && stderr.is_empty() && stdout.contains("Usage: nemotron"), "{line}");
    }
}
