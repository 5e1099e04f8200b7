//! A served reward model, against the values that tests/python/reward_reference.py computed.

use super::*;
use crate::support::reward_model::reward_model;
use crate::support::{finish, nemotron, root};

fn reward_server(flags: &[&str]) -> Server {
    Server::start_with(|home| {
        let fixed = ["--no-auth".into(), "--model".into(), reward_model(home)];
        fixed.into_iter().chain(flags.iter().map(ToString::to_string)).collect()
    })
}

impl Server {
    async fn ask(&self, method: Method, path: &str, body: &Value) -> (u16, Value) {
        let response = self.request(method, path).json(body).send().await.expect("an answer");
        (response.status().as_u16(), response.json().await.expect("JSON"))
    }
}

/// The largest difference between two lists of rows of numbers.
fn distance(a: &[Vec<f64>], b: &[Vec<f64>]) -> f64 {
    assert_eq!(a.iter().map(Vec::len).collect::<Vec<_>>(), b.iter().map(Vec::len).collect::<Vec<_>>());
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[tokio::test]
async fn scores_are_those_of_the_reference_on_every_mesh() {
    let expected = std::fs::read(root().join("tests/fixtures/reward/expected.json")).expect("the reference");
    let expected: Value = serde_json::from_slice(&expected).expect("JSON");
    let cases = expected.as_array().expect("cases");
    let ids: Vec<&Value> = cases.iter().map(|case| &case["ids"]).collect();
    let expected: Vec<Vec<f64>> =
        cases.iter().map(|case| serde_json::from_value(case["rewards"].clone()).expect("numbers")).collect();
    let mut first = None;
    for (flags, tolerance) in [
        // Products of bf16 operands lie within 1 % of values near 1; f32 within rounding.
        (&["--dtype", "f32"][..], 2e-5),
        (&["--dtype", "f32", "--tp", "2", "--pp", "2"], 2e-5),
        (&["--dtype", "bf16"], 0.05),
    ] {
        let server = reward_server(flags);
        let (status, reply) = server.ask(Method::PUT, "/score", &json!({ "sentences": ids })).await;
        assert_eq!(status, 200, "{reply}");
        let rewards: Vec<Vec<f64>> = serde_json::from_value(reply["rewards"].clone()).expect("numbers");
        let distance = distance(&rewards, &expected);
        println!("{flags:?}: {distance:.1e}");
        assert!(distance < tolerance, "{flags:?}: {distance}");
        if tolerance < 1e-3 {
            assert_eq!(
                first.get_or_insert_with(|| reply["rewards"].clone()),
                &reply["rewards"],
                "every mesh gives the same bits"
            );
        }
        assert_eq!(reply["attributes"][4], "helpfulness");
        let sum: f64 =
            [0.3, 0.74, 0.46, 0.47, -0.33].iter().zip(&rewards[1][4..]).map(|(weight, value)| weight * value).sum();
        assert!((reply["scores"][1].as_f64().expect("a number") - sum).abs() < 1e-5);
    }
}

#[tokio::test]
async fn conversations_and_tritons_clients_get_the_same_values() {
    let server = reward_server(&[]);
    let conversation = json!([{"role": "user", "content": "Sing."}, {"role": "assistant", "content": "La."}]);
    let text = "<extra_id_0>System\nA chat between a curious user and an artificial intelligence assistant. The assistant gives \
        helpful, detailed, and polite answers to the user's questions.\n<extra_id_1>User\nSing.\n<extra_id_1>Assistant\nLa.\n<extra_id_2>";
    let (_, chat) = server.ask(Method::PUT, "/score", &json!({"conversations": [conversation]})).await;
    let (_, raw) = server.ask(Method::PUT, "/score", &json!({"sentences": [text]})).await;
    assert!(chat["rewards"][0].is_array(), "{chat}");
    assert_eq!(chat, raw);
    let input = json!({"name": "sentences", "datatype": "BYTES", "shape": [1, 1], "data": [[text]]});
    let (status, infer) =
        server.ask(Method::POST, "/v2/models/reward_model/infer", &json!({"id": "7", "inputs": [input]})).await;
    assert_eq!((status, &infer["id"], &infer["outputs"][0]["shape"]), (200, &json!("7"), &json!([1, 9])), "{infer}");
    assert_eq!((&infer["outputs"][0]["data"], &infer["outputs"][1]["data"]), (&raw["rewards"][0], &json!([0])));
    // Longer than the context: cut, and said so.
    let (_, long) = server.ask(Method::PUT, "/score", &json!({"sentences": ["La. ".repeat(1000)]})).await;
    assert_eq!(long["exceeded"], json!([true]));
    for path in [
        "/v2/health/ready",
        "/v2/health/live",
        "/v2/models/reward_model/ready",
        "/v2/models/reward_model",
        "/v2/models/reward_model/config",
    ] {
        assert_eq!(server.get(path).await.0, StatusCode::OK, "{path}");
    }
    for (method, path, body, status, words) in [
        (Method::PUT, "/score", json!({}), 400, "one of `sentences` and `conversations`"),
        (Method::PUT, "/score", json!({"sentences": [""]}), 400, "the prompt is empty"),
        (Method::PUT, "/score", json!({"sentences": [[999_999]]}), 400, "outside the vocabulary"),
        (Method::PUT, "/score", json!({"sentences": vec!["a"; 129]}), 400, "at most 128"),
        (
            Method::PUT,
            "/score",
            json!({"conversations": [[{"role": "user", "content": "a"}]]}),
            400,
            "an assistant message",
        ),
        (
            Method::POST,
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "a"}]}),
            400,
            "an assistant message",
        ),
        (Method::POST, "/v1/chat/completions", json!({"messages": conversation, "stream": true}), 400, "comes at once"),
        (Method::POST, "/v2/models/reward_model/infer", json!({"inputs": []}), 400, "sentences is missing"),
        (Method::POST, "/v1/completions", json!({"prompt": "a"}), 400, "scores texts and writes none"),
        (Method::PUT, "/generate", json!({"sentences": ["a"]}), 200, "scores texts and writes none"),
    ] {
        let (given, answer) = server.ask(method, path, &body).await;
        assert!(given == status && answer.to_string().contains(words), "{path} {body}: {given} {answer}");
    }
    let (_, again) = server.ask(Method::PUT, "/score", &json!({"sentences": [text]})).await;
    assert_eq!(again, raw);
}

#[tokio::test]
async fn a_chat_gets_the_values_as_nvidias_hosted_model_gives_them() {
    let server = reward_server(&[]);
    let conversation = json!([{"role": "user", "content": "Sing."}, {"role": "assistant", "content": "La."}]);
    let (_, scores) = server.ask(Method::PUT, "/score", &json!({"conversations": [conversation]})).await;
    let body = json!({"model": "nvidia/nemotron-4-340b-reward", "messages": conversation});
    let (status, reply) = server.ask(Method::POST, "/v1/chat/completions", &body).await;
    assert_eq!(
        (status, &reply["object"], &reply["usage"]["completion_tokens"]),
        (200, &json!("chat.completion"), &json!(1))
    );
    let choice = &reply["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    // As NeMo Curator reads it.
    let tokens = choice["logprobs"]["content"].as_array().expect("attributes");
    let values: Vec<(&str, f64)> = tokens
        .iter()
        .map(|token| (token["token"].as_str().expect("a name"), token["logprob"].as_f64().expect("a number")))
        .collect();
    assert_eq!(
        values.iter().map(|value| value.0).collect::<Vec<_>>(),
        ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
    );
    for (value, expected) in values.iter().zip(scores["rewards"][0].as_array().expect("values").iter().skip(4)) {
        assert!((value.1 - expected.as_f64().expect("a number")).abs() < 1e-6);
    }
    let text: Vec<String> = values.iter().map(|(name, value)| format!("{name}:{value}")).collect();
    assert_eq!(choice["message"], json!([{"role": "assistant", "content": text.join(",")}]));
}

#[tokio::test]
async fn the_client_scores_lines() {
    let server = reward_server(&[]);
    let home = server.home.path();
    let messages = json!([{"role": "user", "content": "Sing."}, {"role": "assistant", "content": "La."}]);
    let (_, expected) = server.ask(Method::PUT, "/score", &json!({"conversations": [messages]})).await;
    let rows = [
        json!({"id": "k", "prompt": "Sing.", "response": "La.", "topic": "sea"}),
        json!({"messages": messages}),
        messages.clone(),
    ];
    std::fs::write(home.join("rows.jsonl"), rows.map(|row| format!("{row}\n")).concat()).expect("written");
    let score = |args: &[&str]| finish(nemotron(home).args(["score", "--url", &server.url]).args(args));
    let (code, stdout, stderr) = score(&["--json", "rows.jsonl"]);
    assert_eq!(code, 0, "{stderr}");
    let lines: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!((lines.len(), &lines[0]["id"], &lines[0]["topic"]), (3, &json!("k"), &json!("sea")));
    for line in &lines {
        assert_eq!((&line["schema"], &line["exceeded"]), (&json!(1), &json!(false)));
        let names: Vec<&String> = line["rewards"].as_object().expect("values").keys().collect();
        assert_eq!(json!(names), expected["attributes"]);
        for (value, expected) in
            [(&line["score"], &expected["scores"][0]), (&line["rewards"]["verbosity"], &expected["rewards"][0][8])]
        {
            let [value, expected] = [value, expected].map(|value| value.as_f64().expect("a number"));
            assert!((value - expected).abs() < 1e-6, "{line}");
        }
    }
    let (code, stdout, _) = score(&["--prompt", "Sing.", "--response", "La."]);
    assert!(code == 0 && stdout.starts_with(&format!("score={} quality=", lines[0]["score"])), "{stdout}");
    std::fs::write(home.join("bad.jsonl"), "\n{\"response\": \"La.\"}\n").expect("written");
    let (code, _, stderr) = score(&["bad.jsonl"]);
    assert!(code == 2 && stderr.contains("bad.jsonl: line 2: one of `prompt` and `messages`"), "{code}: {stderr}");
    let (code, _, stderr) = score(&["none.jsonl"]);
    assert!(code == 2 && stderr.contains("cannot read none.jsonl"), "{code}: {stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tritons_client_asks_as_nemo_aligners_annotator_does() {
    let Some(python) = crate::support::python::environment("triton", "pytriton.client", &["nvidia-pytriton==0.5.5"])
    else {
        return;
    };
    let server = reward_server(&[]);
    let program = root().join("tests/python/triton_client.py").display().to_string();
    let text = "<extra_id_0>System\n\n<extra_id_1>User\nSing.\n<extra_id_1>Assistant\nLa.\n<extra_id_2>";
    let (_, expected) = server.ask(Method::PUT, "/score", &json!({"sentences": [text, "La."]})).await;
    let python = python.display().to_string();
    let command = [python.as_str(), &program, server.address(), text, "La."];
    let printed = tokio::task::block_in_place(|| super::python::succeed(120, &command, server.home.path()));
    let printed: Value = serde_json::from_str(&printed).expect("JSON");
    let values = |reply: &Value| serde_json::from_value::<Vec<Vec<f64>>>(reply["rewards"].clone()).expect("numbers");
    assert!(distance(&values(&printed), &values(&expected)) < 1e-6, "{printed}");
    assert_eq!(printed["exceeded"], json!([[0], [0]]));
}

#[tokio::test]
async fn a_model_that_writes_does_not_score() {
    let server = Server::start();
    let (status, answer) = server.ask(Method::PUT, "/score", &json!({"sentences": ["a"]})).await;
    assert!(status == 400 && answer["message"].to_string().contains("no reward head"), "{answer}");
    assert_eq!(server.get("/v2/models/reward_model").await.0, StatusCode::NOT_FOUND);
}
