//! Recorded outputs of another implementation, over HTTP and on every kind of mesh.

use super::*;
use crate::support::root;

const MESHES: [&[&str]; 4] = [&[], &["--tp", "2"], &["--pp", "2"], &["--tp", "2", "--pp", "2"]];

fn server(flags: &[&str]) -> Server {
    Server::start_with(|_| ["--no-auth"].iter().chain(flags).map(ToString::to_string).collect())
}

fn fixture(path: &str) -> std::path::PathBuf {
    root().join("tests/fixtures").join(path)
}

fn recorded(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(path)).expect("a fixture")).expect("JSON")
}

fn items(value: &Value) -> &Vec<Value> {
    value.as_array().expect("a list")
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

/// The server's log-probabilities of one position.
fn assert_close(found: &Value, expected: f64) {
    assert!((number(found) - expected).abs() < 1e-3, "{found} is not {expected}");
}

#[tokio::test]
async fn golden_prompts_in_f32_on_every_mesh() {
    let cases = recorded("golden/expected.json");
    let model = fixture("golden/tiny-hf").display().to_string();
    for mesh in MESHES {
        let server = server(&[&["--dtype", "f32", "--model", &model], mesh].concat());
        for case in items(&cases) {
            let asked = json!({"tokens_to_generate": 32, "compute_logprob": true, "all_probs": true});
            let mut body = base(asked);
            body["sentences"] = json!([case["prompt"]]);
            let (_, reply) = server.put(&body).await;
            let expected: Vec<Value> = items(&case["ids"]).iter().chain(items(&case["greedy32"])).cloned().collect();
            assert_eq!(items(&reply["token_ids"][0]), &expected, "{mesh:?} {}", case["prompt"]);

            let full = items(&reply["full_logprob"][0]);
            let last = &full[items(&case["ids"]).len() - 1];
            for (found, logit) in items(last).iter().zip(items(&case["logits_last_first16"])) {
                assert_close(found, number(logit) - number(&case["last_logsumexp"]));
            }
            for top in items(&case["top5_last"]) {
                assert_close(&last[top[0].as_u64().expect("an id") as usize], number(&top[2]));
            }
            for (found, id) in items(&reply["logprob"][0]).iter().zip(full.iter().zip(&expected[1..])) {
                assert_close(found, number(&id.0[id.1.as_u64().expect("an id") as usize]));
            }

            body["sentences"] = json!([case["ids"]]);
            assert_eq!(server.put(&body).await.1["token_ids"], reply["token_ids"], "the prompt as ids");
        }
    }
}

#[tokio::test]
async fn the_built_in_model_in_f32() {
    let recorded = recorded("nemotron-shakespeare/expected.json");
    for mesh in [MESHES[0], MESHES[3]] {
        let server = server(&[&["--dtype", "f32"], mesh].concat());
        for case in items(&recorded["cases"]) {
            let mut body = base(json!({"tokens_to_generate": items(&case["greedy"]).len()}));
            body["sentences"] = json!([case["prompt"]]);
            body["end_strings"] = json!(["<extra_id_1>"]);
            let expected: Vec<Value> = items(&case["ids"]).iter().chain(items(&case["greedy"])).cloned().collect();
            assert_eq!(items(&server.put(&body).await.1["token_ids"][0]), &expected, "{}", case["prompt"]);
        }
    }
}

#[tokio::test]
async fn requests_at_once_get_the_bytes_they_get_alone() {
    let server = server(&["--tp", "2", "--pp", "2"]);
    let bodies = (0..64).map(|row: u32| {
        let mut body = base(json!({
            "tokens_to_generate": 1 + row * 7 % 40,
            "greedy": row.is_multiple_of(2),
            "temperature": 0.6 + f64::from(row) / 50.0,
            "top_k": row % 40,
            "random_seed": row,
            "compute_logprob": row.is_multiple_of(3),
        }));
        body["sentences"] = json!([PROMPT.repeat(1 + row as usize % 4), "And number ".repeat(row as usize % 9 + 1)]);
        body
    });
    let ask = async |body: &Value| server.put(body).await;
    let bodies: Vec<Value> = bodies.collect();
    let together = join_all(bodies.iter().map(&ask)).await;
    for (body, answer) in bodies.iter().zip(&together) {
        assert_eq!(&ask(body).await, answer, "{body}");
    }
}
