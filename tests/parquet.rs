//! Parquet as input and output of jobs.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::batch::{JobDir, renamed};
use super::support::python::environment;
use super::support::{finish, nemotron, root};

const SHORT: &str = "[sampling]\ntokens_to_generate = 4\n";

#[test]
fn tables_of_pyarrow_go_in_and_out_with_their_types() {
    let Some(python) = environment("pyarrow", "pyarrow", &["pyarrow~=26.0"]) else { return };
    let dir = JobDir::new(&[], SHORT);
    let tables = |arguments: &[&str]| {
        let script = root().join("tests/python/tables.py");
        let (code, _, stderr) = finish(Command::new(&python).arg(script).args(arguments).current_dir(dir.path()));
        assert_eq!(code, 0, "{arguments:?}: {stderr}");
    };
    tables(&["write", "in.parquet"]);
    renamed(&dir, "in.parquet", "out.jsonl");
    let (code, stderr) = dir.run();
    assert_eq!(code, 0, "{stderr}");
    let lines = dir.output();
    assert_eq!((&lines[3]["id"], &lines[3]["price"]), (&json!("r3"), &json!("123456789012348.003")));
    renamed(&dir, "in.parquet", "out.parquet");
    assert_eq!(dir.run().0, 0);
    tables(&["check", "in.parquet", "out.parquet"]);
    let output = || fs::read(dir.path().join("out.parquet")).expect("an output");
    let first = output();
    assert_eq!(dir.run().0, 0);
    assert!(output() == first, "the same rows give another file");

    tables(&["gzip", "in.parquet"]);
    let (code, stderr) = dir.run();
    assert_eq!(code, 2);
    assert!(stderr.contains("in.parquet: the column `id` is compressed with GZIP"), "{stderr}");
}

fn verify(home: &Path) -> (i32, String) {
    let (code, stdout, stderr) = finish(nemotron(home).args(["results", "latest", "verify"]));
    (code, stdout + &stderr)
}

#[test]
fn lines_become_a_table_that_is_verified_row_by_row() {
    let rows: Vec<Value> = (0..20)
        .map(|row| json!({"prompt": format!("Sing of {row}."), "k": row, "deep": {"list": [row, null], "text": "é"}}))
        .collect();
    let table = JobDir::new(&rows, SHORT);
    renamed(&table, "in.jsonl", "out.parquet");
    let (code, stderr) = table.run();
    assert_eq!(code, 0, "{stderr}");
    let (code, said) = verify(table.path());
    assert_eq!(code, 0, "{said}");

    // A table as input; rows are named by their number.
    let again = JobDir::new(&[], SHORT);
    fs::copy(table.path().join("out.parquet"), again.path().join("in.parquet")).expect("copied");
    renamed(&again, "in.parquet", "out.jsonl");
    let (code, stderr) = again.run();
    assert_eq!(code, 2);
    assert!(stderr.contains("in.parquet: row 1: the key `sample` is one that the output has"), "{stderr}");

    // What the output holds is what the journal has: with another row it is not.
    let other: Vec<Value> =
        rows.iter().take(19).chain([&json!({"prompt": "x", "k": 1, "deep": null})]).cloned().collect();
    let other = JobDir::new(&other, SHORT);
    renamed(&other, "in.jsonl", "out.parquet");
    assert_eq!(other.run().0, 0);
    fs::copy(other.path().join("out.parquet"), table.path().join("out.parquet")).expect("copied");
    let (code, said) = verify(table.path());
    assert_eq!(code, 32);
    assert!(said.contains("line 20 is not the one that the journal has"), "{said}");
}

#[test]
fn a_column_that_no_table_can_hold_is_named_before_anything_runs() {
    let rows = [json!({"prompt": "a", "k": {"x": 1}}), json!({"prompt": "b", "k": {"x": "one"}})];
    let dir = JobDir::new(&rows, SHORT);
    renamed(&dir, "in.jsonl", "out.parquet");
    let (code, stderr) = dir.run();
    assert_eq!(code, 2);
    let expected = "in.jsonl: line 2: the column `k.x` holds a string here and a number before";
    assert!(stderr.contains(expected), "{stderr}");
    assert!(!dir.path().join("out.parquet").exists());
}
