//! `nemotron batch`: job files from end to end with the built-in model.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::support::nemotron;

/// A folder with a job file.
pub(super) struct JobDir(TempDir);

impl JobDir {
    /// `tables` follow the input `in.jsonl` with these lines and the output `out.jsonl`.
    pub(super) fn new(input: &[Value], tables: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let lines: String = input.iter().map(|row| format!("{row}\n")).collect();
        fs::write(dir.path().join("in.jsonl"), lines).expect("written");
        let job = format!("schema = 1\n[input]\npath = \"in.jsonl\"\n[output]\npath = \"out.jsonl\"\n{tables}");
        fs::write(dir.path().join("job.toml"), job).expect("written");
        Self(dir)
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }

    /// The exit code and what stderr says.
    pub(super) fn run(&self) -> (i32, String) {
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

    pub(super) fn output(&self) -> Vec<Value> {
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

/// Runs with other names for input and output.
pub(super) fn renamed(dir: &JobDir, input: &str, output: &str) {
    let job = fs::read_to_string(dir.path().join("job.toml")).expect("a job");
    let job = job.replace("in.jsonl", input).replace("out.jsonl", output);
    fs::write(dir.path().join("job.toml"), job).expect("written");
}

#[test]
fn compressed_lines_go_in_and_out() {
    let rows: Vec<Value> =
        (0..20).map(|row| json!({"id": row, "prompt": format!("Sing of {row}."), "k": row})).collect();
    let tables = "[sampling]\ntokens_to_generate = 4\n";
    let plain = JobDir::new(&rows, tables);
    assert_eq!(plain.run().0, 0);
    let packed = JobDir::new(&rows, tables);
    renamed(&packed, "in.jsonl.zst", "out.jsonl.zst");
    let text = fs::read(packed.path().join("in.jsonl")).expect("an input");
    let bytes = zstd::encode_all(&text[..], 3).expect("compressed");
    fs::write(packed.path().join("in.jsonl.zst"), &bytes).expect("written");
    let (code, stderr) = packed.run();
    assert_eq!(code, 0, "{stderr}");
    let output = fs::read(packed.path().join("out.jsonl.zst")).expect("an output");
    let unpacked = zstd::decode_all(&output[..]).expect("compressed lines");
    assert_eq!(unpacked, fs::read(plain.path().join("out.jsonl")).expect("an output"));
    let verified = nemotron(packed.path()).args(["results", "latest", "verify"]).output().expect("the binary starts");
    assert!(verified.status.success(), "{verified:?}");
    // The same rows give the same file, byte for byte.
    assert_eq!(packed.run().0, 0);
    assert!(fs::read(packed.path().join("out.jsonl.zst")).expect("an output") == output);

    fs::write(packed.path().join("in.jsonl.zst"), &bytes[..bytes.len() / 2]).expect("written");
    let (code, stderr) = packed.run();
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("in.jsonl.zst: line"), "{stderr}");
}

#[test]
fn a_template_over_the_columns_makes_the_prompts() {
    let prompts = |texts: [&str; 2]| texts.map(|text| json!({"prompt": text}));
    let sampling = "[sampling]\ntokens_to_generate = 8\n";
    let plain = JobDir::new(&prompts(["Sing of the sea.", "Sing of war."]), sampling);
    assert_eq!(plain.run().0, 0);
    let columns = [json!({"topic": "the sea", "n": 1}), json!({"topic": "war", "n": 2})];
    let inline = JobDir::new(&columns, &format!("[prompt]\nuser = \"Sing of {{{{ topic }}}}.\"\n{sampling}"));
    let (code, stderr) = inline.run();
    assert_eq!(code, 0, "{stderr}");
    let file = JobDir::new(&columns, &format!("[prompt]\nuser_file = \"user.jinja\"\n{sampling}"));
    fs::write(file.path().join("user.jinja"), "Sing of {{ topic }}.").expect("written");
    assert_eq!(file.run().0, 0);
    assert_eq!(inline.output(), file.output());
    for (templated, expected) in inline.output().iter().zip(plain.output()) {
        assert_eq!(templated["response"], expected["response"]);
    }
    assert_eq!((&inline.output()[1]["topic"], &inline.output()[1]["n"]), (&json!("war"), &json!(2)));

    fs::write(inline.path().join("in.jsonl"), "{\"topic\":\"x\"}\n{\"subject\":\"y\"}\n").expect("written");
    let (code, stderr) = inline.run();
    assert_eq!(code, 2);
    let expected = "in.jsonl: line 2: the prompt template needs the column `topic`; the row has `subject`";
    assert!(stderr.contains(expected), "{stderr}");
}

#[test]
fn a_job_is_measured_before_anything_is_started() {
    let rows = [json!({"prompt": "word ".repeat(2000)}), json!({"prompt": "Sing."}), json!({"prompt": "Weep."})];
    let dir = JobDir::new(&rows, "[generation]\nsamples_per_prompt = 2\n[sampling]\ntokens_to_generate = 4\n");
    let run = |arguments: &[&str]| {
        let output = nemotron(dir.path()).args(arguments).output().expect("the binary starts");
        let text = |bytes| String::from_utf8(bytes).expect("text");
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, stdout, stderr) =
        run(&["plan", "--profile", "cpu", "--model", "builtin", "--job", "job.toml", "--json"]);
    assert_eq!(code, Some(0), "{stderr}");
    let job = &serde_json::from_str::<Value>(&stdout).expect("JSON")["job"];
    assert_eq!((&job["rows"], &job["rejected"], &job["max_new_tokens"]), (&json!(6), &json!(2), &json!(16)), "{job}");
    let prompts = job["prompt_lengths"].as_array().expect("a histogram").iter().map(|entry| entry[1].as_u64());
    assert_eq!(prompts.sum::<Option<u64>>(), Some(3));
    assert!(job["first_prompt"].as_str().is_some_and(|prompt| prompt.contains("<extra_id_1>User")), "{job}");
    let (code, _, stderr) = run(&["batch", "--job", "job.toml", "--dry-run"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("6 rows") && stderr.contains("2 rows do not fit the context of 1024"), "{stderr}");
    assert!(stderr.contains("first prompt, as the model sees it:\n<extra_id_0>System"), "{stderr}");
    fs::write(dir.path().join("in.jsonl"), "{\"prompt\":\"a\"}\n{}\n").expect("written");
    for arguments in [
        &["plan", "--profile", "cpu", "--model", "builtin", "--job", "job.toml"][..],
        &["batch", "--job", "job.toml", "--dry-run"],
    ] {
        let (code, _, stderr) = run(arguments);
        assert_eq!(code, Some(2));
        assert!(stderr.contains("in.jsonl: line 2: one of `prompt` and `messages` is needed"), "{stderr}");
    }
    assert!(!dir.path().join("runs").exists() && !dir.path().join("out.jsonl").exists());
}
