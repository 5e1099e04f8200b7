//! Reward models outside of a server: jobs with the table `[reward]`, and conversions.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::support::reward_model::reward_model;
use super::support::{finish, nemotron};

fn lines(file: &Path) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn write_job(home: &Path, name: &str, text: &str) {
    fs::write(home.join(name), format!("schema = 1\n{text}")).expect("written");
}

#[test]
fn a_job_scores_what_another_has_answered() {
    let home = tempfile::tempdir().expect("a directory");
    let home = home.path();
    let model = reward_model(home);
    let run = |args: &[&str]| finish(nemotron(home).args(args));

    // The last prompt does not fit the context.
    let long = "Sing of the sea. ".repeat(400);
    let rows = [
        json!({"id": "a", "prompt": "Sing of the sea.", "topic": "sea"}),
        json!({"id": "b", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sing."}]}),
        json!({"id": "long", "prompt": long}),
    ];
    fs::write(home.join("prompts.jsonl"), rows.map(|row| format!("{row}\n")).concat()).expect("written");
    let answer = "[input]\npath = 'prompts.jsonl'\n[output]\npath = 'answers.jsonl'\ninclude_prompt = true\n\
        [sampling]\ntokens_to_generate = 12\ngreedy = false\n[generation]\nsamples_per_prompt = 2\nmax_failed = 0.5\n";
    write_job(home, "answer.toml", answer);
    let (code, _, stderr) = run(&["batch", "--job", "answer.toml"]);
    assert_eq!(code, 0, "{stderr}");
    let answers = lines(&home.join("answers.jsonl"));
    assert_eq!(answers.len(), 6);
    assert_eq!(
        (&answers[0]["prompt"], &answers[2]["messages"][1]["content"]),
        (&json!("Sing of the sea."), &json!("Sing."))
    );

    let score =
        "[input]\npath = 'answers.jsonl'\n[output]\npath = 'scores.jsonl'\n[reward]\n[generation]\nmax_failed = 0.5\n";
    write_job(home, "score.toml", score);
    let (code, _, stderr) = run(&["batch", "--job", "score.toml", "--dry-run", "--model", &model]);
    assert!(
        code == 0 && stderr.contains("<extra_id_2>"),
        "the first prompt is shown in the annotator's form: {stderr}"
    );
    let job = ["launch", "--profile", "cpu", "--job", "score.toml", "--model", &model, "--dtype", "f32"];
    let (code, _, stderr) = run(&[&job[..], &["--name", "one"]].concat());
    assert_eq!(code, 0, "{stderr}");
    let text = fs::read(home.join("scores.jsonl")).expect("an output");
    let scores = lines(&home.join("scores.jsonl"));
    assert_eq!(scores.len(), 6);
    for (scored, answer) in scores.iter().zip(&answers) {
        let mut rest = scored.as_object().expect("an object").clone();
        let (rewards, score) = (rest.remove("rewards").expect("rewards"), rest.remove("score").expect("a score"));
        assert_eq!(&Value::Object(rest), answer, "the row is as it was");
        if answer["id"] == "long" {
            assert_eq!((rewards, score), (Value::Null, Value::Null), "there is no answer to score");
            continue;
        }
        let value = |name: &str| rewards[name].as_f64().expect("a number");
        let sum = 0.3 * value("helpfulness")
            + 0.74 * value("correctness")
            + 0.46 * value("coherence")
            + 0.47 * value("complexity")
            - 0.33 * value("verbosity");
        assert!((score.as_f64().expect("a number") - sum).abs() < 1e-5, "{scored}");
    }
    let (code, stdout, _) = run(&["results", "one", "verify", "--json"]);
    assert!(code == 0 && stdout.contains("\"output_matches\":true"), "{stdout}");

    // On another mesh and by another attempt the same bytes.
    fs::remove_file(home.join("scores.jsonl")).expect("it was there");
    let (code, _, stderr) = run(&[&job[..], &["--name", "four", "--tp", "2", "--pp", "2"]].concat());
    assert_eq!(code, 0, "{stderr}");
    assert!(fs::read(home.join("scores.jsonl")).expect("an output") == text);
    fs::remove_file(home.join("scores.jsonl")).expect("it was there");

    // The same through tables, where rows that lack a column have a null there.
    write_job(home, "answer-table.toml", &answer.replace("answers.jsonl", "answers.parquet"));
    let (code, _, stderr) = run(&["batch", "--job", "answer-table.toml"]);
    assert_eq!(code, 0, "{stderr}");
    let score_table = score.replace("answers.jsonl", "answers.parquet").replace("scores.jsonl", "scores.parquet");
    write_job(home, "score-table.toml", &score_table);
    let (code, _, stderr) = run(&["batch", "--job", "score-table.toml", "--model", &model]);
    assert_eq!(code, 0, "{stderr}");
    let (code, stdout, stderr) = run(&["results", "latest", "stats"]);
    assert!(code == 0 && stdout.contains("6 of 6, 2 failed"), "{stdout}{stderr}");
    let (code, stdout, stderr) = run(&["results", "latest", "verify"]);
    assert_eq!(code, 0, "{stdout}{stderr}");

    // Of each kind of model only its own jobs.
    let (code, _, stderr) = run(&["batch", "--job", "score.toml"]);
    assert!(code == 2 && stderr.contains("has [reward], but") && stderr.contains("--model"), "{code}: {stderr}");
    let (code, _, stderr) = run(&["batch", "--job", "answer.toml", "--model", &model]);
    assert!(code == 2 && stderr.contains("is a reward model and writes no texts"), "{code}: {stderr}");

    // What cannot be scored is told before anything is started.
    write_job(home, "plain.toml", "[input]\nprompts = ['Sing.']\n[output]\npath = 'o.jsonl'\n[reward]\n");
    let (code, _, stderr) = run(&["batch", "--job", "plain.toml", "--model", &model]);
    assert!(code == 2 && stderr.contains("prompt 1: ") && stderr.contains("an assistant message"), "{code}: {stderr}");
    fs::write(home.join("answers.jsonl"), "{\"id\": 1, \"sample\": 0, \"response\": \"La.\"}\n").expect("written");
    let (code, _, stderr) = run(&["batch", "--job", "score.toml", "--model", &model]);
    assert!(code == 2 && stderr.contains("line 1: ") && stderr.contains("output.include_prompt"), "{code}: {stderr}");
}

#[test]
fn a_converted_reward_model_gives_the_same_values() {
    let home = tempfile::tempdir().expect("a directory");
    let home = home.path();
    let model = reward_model(home);
    let run = |args: &[&str]| finish(nemotron(home).args(args));
    let (_, stdout, _) = run(&["inspect", &model]);
    assert!(stdout.contains("reward model  9 values a text"), "{stdout}");
    let row = json!({"prompt": "Sing.", "response": "La."});
    fs::write(home.join("rows.jsonl"), format!("{row}\n")).expect("written");
    write_job(home, "score.toml", "[input]\npath = 'rows.jsonl'\n[output]\npath = 'scores.jsonl'\n[reward]\n");
    let score = |model: &str| {
        let (code, _, stderr) = run(&["batch", "--job", "score.toml", "--model", model, "--dtype", "f32"]);
        assert_eq!(code, 0, "{model}: {stderr}");
        fs::read_to_string(home.join("scores.jsonl")).expect("an output")
    };
    let expected = score(&model);
    for flags in [&["--to", "hf"][..], &["--to", "shards"]] {
        let (code, _, stderr) = run(&[&["convert", &model, flags[1]], flags].concat());
        assert_eq!(code, 0, "{stderr}");
        assert_eq!(score(flags[1]), expected, "{flags:?}");
    }
    let config: Value = serde_json::from_slice(&fs::read(home.join("hf/config.json")).expect("a file")).expect("JSON");
    assert_eq!(config["architectures"], json!(["NemotronForSequenceClassification"]));
    assert_eq!(config["id2label"]["4"], "helpfulness");
}
