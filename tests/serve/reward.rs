//! A reward model: the tiny NeMo model with the regression head of tests/fixtures/reward, whose values tests/python/reward_reference.py computed.

use super::*;
use crate::support::root;

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder").map(|entry| entry.expect("an entry")) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            _ = std::fs::copy(entry.path(), target).expect("copied");
        }
    }
}

fn reward_model(home: &Path) -> String {
    let folder = home.join("reward");
    copy(&root().join("tests/fixtures/golden/tiny-nemo"), &folder);
    let config = folder.join("model_config.yaml");
    let text = std::fs::read_to_string(&config).expect("a configuration");
    std::fs::write(config, text + "\nregression:\n  num_attributes: 9\n").expect("written");
    let weights = folder.join("model_weights");
    std::fs::remove_dir_all(weights.join("model.output_layer.weight")).expect("it is not used");
    for name in ["model.rm_head.weight", "model.rm_head.bias"] {
        copy(&root().join("tests/fixtures/reward").join(name), &weights.join(name));
    }
    folder.display().to_string()
}

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
    for path in ["/v2/health/ready", "/v2/health/live", "/v2/models/reward_model/ready", "/v2/models/reward_model"] {
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
async fn a_model_that_writes_does_not_score() {
    let server = Server::start();
    let (status, answer) = server.ask(Method::PUT, "/score", &json!({"sentences": ["a"]})).await;
    assert!(status == 400 && answer["message"].to_string().contains("no reward head"), "{answer}");
    assert_eq!(server.get("/v2/models/reward_model").await.0, StatusCode::NOT_FOUND);
}
