//! The rest of what NeMo's, Megatron-LM's and OpenAPI's clients may expect, as black-box cases.

use super::*;

/// The built-in model with the rows of `</s>` and `<extra_id_1>` exchanged in its head: it ends its turn with the end of sequence.
fn model_that_ends_with_eos(home: &Path) -> String {
    let from = crate::support::root().join("engine/assets/nemotron-shakespeare");
    let folder = home.join("model");
    std::fs::create_dir(&folder).expect("a folder");
    for file in ["config.json", "generation_config.json", "tokenizer.model"] {
        std::fs::copy(from.join(file), folder.join(file)).expect("copied");
    }
    let mut bytes = std::fs::read(from.join("model.safetensors")).expect("the weights");
    let data = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into().expect("eight"))).expect("a length");
    let header: Value = serde_json::from_slice(&bytes[8..data]).expect("a header");
    let head = &header["lm_head.weight"];
    let row = 2 * head["shape"][1].as_u64().expect("columns") as usize;
    let start = data + head["data_offsets"][0].as_u64().expect("an offset") as usize;
    for byte in 0..row {
        bytes.swap(start + 3 * row + byte, start + 5 * row + byte);
    }
    std::fs::write(folder.join("model.safetensors"), bytes).expect("written");
    folder.display().to_string()
}

#[tokio::test]
async fn the_end_of_sequence_ends_a_row_and_is_not_shown() {
    let server = Server::start_with(|home| vec!["--no-auth".into(), "--model".into(), model_that_ends_with_eos(home)]);
    let turn = server.generate(json!({"tokens_to_generate": 900, "end_strings": ["zzz"]})).await;
    assert_eq!((turn.ids(0).last(), turn.tokens(0).last()), (Some(&3), Some(&"</s>")));
    assert!(!turn.sentence(0).contains("</s>"));
    let ids = turn.ids(0);
    // A prompt whose next token is the end.
    let prompt = &ids[..ids.len() - 1];
    let ended = server.generate(json!({"sentences": [prompt], "end_strings": ["zzz"]})).await;
    assert_eq!(ended.ids(0), ids);
    assert_eq!(ended.sentence(0), turn.sentence(0));
    let forced = server.generate(json!({"sentences": [prompt], "min_tokens_to_generate": 4})).await;
    assert!(forced.ids(0).len() >= ids.len() + 3);
    assert!(!forced.ids(0)[prompt.len()..prompt.len() + 4].contains(&3));
    // OpenAI's dialect neither shows it.
    let body = json!({"prompt": prompt, "temperature": 0});
    let answer = server.request(Method::POST, "/v1/completions").json(&body).send().await.expect("an answer");
    let answer: Value = answer.json().await.expect("JSON");
    assert_eq!((&answer["choices"][0]["text"], &answer["choices"][0]["finish_reason"]), (&json!(""), &json!("stop")));
}

#[tokio::test]
async fn every_bad_value_gets_its_text_and_every_good_one_an_answer() {
    let server = Server::start();
    let booleans =
        [("all_probs", json!(0)), ("add_BOS", json!("no")), ("greedy", json!(1)), ("compute_logprob", json!(null))];
    let booleans = booleans.map(|(field, value)| (field, json!([value]), format!("{field} must be a boolean value")));
    let others = [
        (
            "temperature",
            json!([0, -1, 101, "1", true, null]),
            "temperature must be a positive number less than or equal to 100.0",
        ),
        ("tokens_to_generate", json!([0, 5.0, "5", null]), "tokens_to_generate must be an integer greater than 0"),
        ("top_p", json!([1.01, -0.1]), "top_p must be a positive number less than or equal to 1.0"),
        ("top_k", json!([-1, true]), "top_k must be a positive integer number"),
        ("repetition_penalty", json!([0.9]), "repetition_penalty must be a positive number no less than 1.0"),
        ("end_strings", json!(["x", [1], null]), "expect end_strings to be a list of strings"),
        ("random_seed", json!([-1, 1.5]), "random_seed must be a positive integer number or None"),
        ("min_tokens_to_generate", json!([-1]), "min_tokens_to_generate must be an integer no less than 0"),
        ("neighbors", json!([-1]), "num of neighbors must be an integer no less than 0"),
    ]
    .map(|(field, values, text)| (field, values, text.to_owned()));
    for (field, values, text) in booleans.into_iter().chain(others) {
        for value in values.as_array().expect("values") {
            let answer = server.put(&base(json!({field: value}))).await;
            assert_eq!(answer, (StatusCode::OK, json!(text)), "{field} {value}");
        }
    }
    let task_ids = "Input at 'sentences' must by a tuple of two tensors like:                    (context_tokens_tensor, context_length_tensor) if task ids are given";
    assert_eq!(server.put(&base(json!({"task_ids": [1]}))).await, (StatusCode::OK, json!(task_ids)));
    let several = json!({"random_seed": -1, "greedy": 1, "all_probs": 0, "temperature": 0});
    assert_eq!(server.put(&base(several)).await.1, json!("all_probs must be a boolean value"));
    for (field, values) in [
        ("temperature", json!([100, 1e-8])),
        ("top_p", json!([0, 1, 0.5])),
        ("top_k", json!([0, 0.0, 40, 1_000_000_000])),
        ("repetition_penalty", json!([1])),
        ("random_seed", json!([null, 0, 4_294_967_295_u64])),
        ("tokens_to_generate", json!([true])),
    ] {
        for value in values.as_array().expect("values") {
            server.generate(json!({field: value, "greedy": false})).await;
        }
    }
}

#[tokio::test]
async fn collated_conversations_are_rendered_with_the_chat_template() {
    let server = Server::start();
    let turn = |role: &str, contents: [&str; 2]| json!({"role": [role, role], "content": contents});
    let turns = [turn("System", ["", "Be brief."]), turn("User", ["Sing of the sea.", "Sing of the moon."])];
    let reply = server.generate(json!({"sentences": turns})).await;
    for (row, (system, user)) in [("", "Sing of the sea."), ("Be brief.", "Sing of the moon.")].into_iter().enumerate()
    {
        let prompt = format!("<extra_id_0>System\n{system}\n<extra_id_1>User\n{user}\n<extra_id_1>Assistant\n");
        assert!(reply.sentence(row).starts_with(&prompt), "{:?}", reply.sentence(row));
    }
    let (status, answer) = server.put(&base(json!({"sentences": [{"role": ["User"], "content": []}]}))).await;
    assert_eq!((status, answer.as_str()), (StatusCode::OK, Some("sentences must be a list of strings")));
}

#[tokio::test]
async fn megatrons_dialect() {
    let server = Server::start();
    let api = async |body: Value| {
        let response = server.request(Method::PUT, "/api").json(&body).send().await.expect("an answer");
        (response.status().as_u16(), response.json::<Value>().await.expect("JSON"))
    };
    let nemo = server.generate(json!({})).await;
    let body = json!({"prompts": [PROMPT, "a"], "tokens_to_generate": 8, "top_k": 1, "logprobs": true});
    let (status, reply) = api(body).await;
    assert_eq!((status, &reply["text"][0]), (200, &nemo.0["sentences"][0]));
    let length = nemo.ids(0).len();
    let lengths = |key: &str| reply[key][0].as_array().expect("a row").len();
    assert_eq!((lengths("segments"), lengths("logprobs")), (length, length - 1));
    let (_, scored) = api(json!({"prompts": [PROMPT], "tokens_to_generate": 0, "logprobs": true})).await;
    assert_eq!(scored["text"], json!([PROMPT]));
    assert_eq!(
        scored["logprobs"][0].as_array().expect("a row")[..],
        reply["logprobs"][0].as_array().expect("a row")[..length - 9]
    );
    for (body, status, text) in [
        (json!({}), 400, "prompts argument required"),
        (json!({"prompts": [1]}), 400, "prompts is not a list of strings"),
        (json!({"prompts": ["a"], "sentences": ["a"]}), 400, "sentences is no longer used.  Replace with prompts"),
        (json!({"prompts": [""]}), 200, "Empty prompts require add_BOS=true"),
        (json!({"prompts": ["a"], "beam_width": 4}), 200, "beam_width: beam search is not supported"),
    ] {
        assert_eq!(api(body).await, (status, json!(text)));
    }
    assert_eq!(server.request(Method::POST, "/api").send().await.expect("an answer").status(), 405);
}

#[tokio::test]
async fn the_openapi_document_names_routes_and_fields_that_are_there() {
    let server = Server::start();
    let (_, document) = server.get("/openapi.json").await;
    let document: Value = serde_json::from_str(&document).expect("JSON");
    let models: Value = serde_json::from_str(&server.get("/v1/models").await.1).expect("JSON");
    let model = models["data"][0]["id"].as_str().expect("an id");
    let mut fields = 0;
    for (path, methods) in document["paths"].as_object().expect("paths") {
        let path = &path.replace("{model}", model);
        for (method, operation) in methods.as_object().expect("methods") {
            let method = Method::from_bytes(method.to_uppercase().as_bytes()).expect("a method");
            let Some(schema) = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].as_str()
            else {
                let status = server.request(method, path).send().await.expect("an answer").status();
                assert_eq!(status, StatusCode::OK, "{path}");
                continue;
            };
            let properties = &document.pointer(&schema[1..]).expect("a schema")["properties"];
            for field in properties.as_object().expect("properties").keys().filter(|field| *field != "model") {
                let mut body = json!({"sentences": ["a"], "prompts": ["a"], "prompt": "a", "max_tokens": 1,
                    "messages": [{"role": "user", "content": "a"}]});
                if path == "/api" {
                    body = json!({"prompts": ["a"]});
                }
                body[field] = json!([[{}]]);
                let response = server.request(method.clone(), path).json(&body).send().await.expect("an answer");
                let answer: Value = response.json().await.expect("JSON");
                let refused = answer.is_string() || !answer["error"].is_null() || answer["message"].is_string();
                assert!(refused, "{path} takes any {field}: {answer}");
                fields += 1;
            }
        }
    }
    assert!(fields > 60, "{fields}");
}
