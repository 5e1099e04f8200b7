//! `nemotron batch`: job files from end to end with the built-in model.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

/// A folder with a job file.
struct JobDir(TempDir);

impl JobDir {
    /// `tables` follow the input `in.jsonl` with these lines and the output `out.jsonl`.
    fn new(input: &[Value], tables: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let lines: String = input.iter().map(|row| format!("{row}\n")).collect();
        fs::write(dir.path().join("in.jsonl"), lines).expect("written");
        let job = format!("schema = 1\n[input]\npath = \"in.jsonl\"\n[output]\npath = \"out.jsonl\"\n{tables}");
        fs::write(dir.path().join("job.toml"), job).expect("written");
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// The exit code and what stderr says.
    fn run(&self) -> (i32, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_nemotron"))
            .args(["batch", "--job"])
            .arg(self.path().join("job.toml"))
            .current_dir(self.path())
            .env("HOME", self.path())
            .env("NEMOTRON_RUN_ROOT", self.path().join("runs"))
            .output()
            .expect("the binary starts");
        (output.status.code().expect("an exit code"), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn output(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.path().join("out.jsonl")).expect("an output");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }
}

#[test]
fn lines_come_in_input_order_with_what_the_rows_carried() {
    let messages = json!([
        {"role": "user", "content": "Who goes there?"},
        {"role": "assistant", "content": "A friend."},
        {"role": "user", "content": "What friend?"},
    ]);
    let rows = [
        json!({"prompt": "Sing of the sea.", "topic": "sea", "weight": 0.5}),
        json!({"id": "k", "prompt": "Sing."}),
        json!({"id": 7, "messages": messages}),
    ];
    let dir = JobDir::new(
        &rows,
        "[generation]\nsamples_per_prompt = 2\n[sampling]\ntokens_to_generate = 40\ngreedy = false\n",
    );
    assert_eq!(dir.run().0, 0);
    let lines = dir.output();
    let keys: Vec<(Value, Value)> = lines.iter().map(|line| (line["id"].clone(), line["sample"].clone())).collect();
    let expected = [(json!(0), 0), (json!(0), 1), (json!("k"), 0), (json!("k"), 1), (json!(7), 0), (json!(7), 1)];
    assert_eq!(keys, expected.map(|(id, sample)| (id, json!(sample))));
    let text = fs::read_to_string(dir.path().join("out.jsonl")).expect("an output");
    assert!(text.starts_with(r#"{"id":0,"sample":0,"response":""#), "{text}");
    assert!(text.lines().next().is_some_and(|line| line.ends_with(r#","topic":"sea","weight":0.5}"#)), "{text}");
    for line in &lines {
        let response = line["response"].as_str().expect("text");
        assert!(!response.contains("<extra_id_1>"), "{response:?}");
        assert!(["stop", "length"].contains(&line["finish_reason"].as_str().expect("a reason")));
        assert!((1..=40).contains(&line["completion_tokens"].as_u64().expect("a count")));
    }
    assert_ne!(lines[0]["response"], lines[1]["response"]);
    assert!(!dir.path().join("out.jsonl.partial").exists());

    // The same again, and the same row among others: the text depends on the row and the seed alone.
    assert_eq!(dir.run().0, 0);
    assert_eq!(dir.output(), lines);
    let alone = JobDir::new(
        &rows[1..2],
        "[generation]\nsamples_per_prompt = 2\n[sampling]\ntokens_to_generate = 40\ngreedy = false\n",
    );
    assert_eq!(alone.run().0, 0);
    assert_eq!(alone.output(), lines[2..4]);
}

#[test]
fn rows_that_do_not_fit_fail_alone() {
    let rows = [json!({"prompt": "word ".repeat(2000), "k": 1}), json!({"prompt": "Sing."})];
    let sampling = "[sampling]\ntokens_to_generate = 4\n";
    let dir = JobDir::new(&rows, sampling);
    let (code, stderr) = dir.run();
    assert_eq!(code, 31, "{stderr}");
    assert!(stderr.contains("1 of 2 rows failed, at most 0 may; the first: "), "{stderr}");
    let lines = dir.output();
    assert_eq!(lines[0]["finish_reason"], "error");
    assert_eq!(
        (&lines[0]["error"]["code"], &lines[0]["response"], &lines[0]["k"]),
        (&json!("context_overflow"), &json!(""), &json!(1))
    );
    assert_eq!(lines[1]["finish_reason"], "length");
    assert!(lines[1].get("error").is_none());

    assert_eq!(JobDir::new(&rows, &format!("{sampling}[generation]\nmax_failed = 0.5\n")).run().0, 0);
    let cut = JobDir::new(&rows, &format!("{sampling}[generation]\ncontext_overflow = \"truncate_left\"\n"));
    assert_eq!(cut.run().0, 0);
    assert_eq!(cut.output()[0]["prompt_tokens"], 1020);
}

#[test]
fn a_bad_input_is_named_by_line_and_nothing_is_written() {
    let dir = JobDir::new(&[json!({"id": "a", "prompt": "x"}), json!({"id": "a", "prompt": "y"})], "");
    fs::write(dir.path().join("out.jsonl"), "old").expect("written");
    let (code, stderr) = dir.run();
    assert_eq!(code, 2);
    assert!(stderr.contains("in.jsonl: line 2: the id \"a\" is that of line 1 already"), "{stderr}");
    assert_eq!(fs::read_to_string(dir.path().join("out.jsonl")).expect("still there"), "old");
}

#[test]
fn an_input_without_rows_is_an_error() {
    let (code, stderr) = JobDir::new(&[], "").run();
    assert_eq!(code, 2);
    assert!(stderr.contains("in.jsonl: there is no row in it"), "{stderr}");
}

#[test]
fn an_output_that_cannot_be_written_is_said_at_once() {
    let dir = JobDir::new(&[json!({"prompt": "x"})], "");
    let job = fs::read_to_string(dir.path().join("job.toml")).expect("a job");
    fs::write(dir.path().join("job.toml"), job.replace("out.jsonl", "no/such/out.jsonl")).expect("written");
    let (code, stderr) = dir.run();
    assert_eq!(code, 32);
    assert!(stderr.contains("no/such/out.jsonl"), "{stderr}");
}
