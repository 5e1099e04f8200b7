//! `/v1/*` as clients of OpenAI's API know it.

use super::*;

impl Server {
    async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        let response = self.request(Method::POST, path).json(&body).send().await.expect("an answer");
        (response.status(), response.json().await.expect("JSON"))
    }

    async fn complete(&self, path: &str, body: Value) -> Value {
        let (status, answer) = self.post(path, body).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    }

    /// The objects of a stream, which must end as the API says.
    async fn stream(&self, path: &str, mut body: Value) -> Vec<Value> {
        body["stream"] = true.into();
        let response = self.request(Method::POST, path).json(&body).send().await.expect("an answer");
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let text = response.text().await.expect("text");
        let mut events: Vec<&str> = text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        events.into_iter().map(|event| serde_json::from_str(event).expect("JSON")).collect()
    }
}

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn chat(changes: Value) -> Value {
    let mut body =
        json!({"model": "any", "messages": [{"role": "user", "content": "Sing of the sea."}], "temperature": 0});
    for (key, value) in changes.as_object().expect("an object") {
        body[key] = value.clone();
    }
    body
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[tokio::test]
async fn models_and_errors() {
    let server = Server::start();
    let (status, models) = server.get("/v1/models").await;
    let models: Value = serde_json::from_str(&models).expect("JSON");
    assert_eq!(
        (status, &models["object"], &models["data"][0]["object"]),
        (StatusCode::OK, &json!("list"), &json!("model"))
    );
    let (status, one) = server.get(&format!("/v1/models/{}", text(&models["data"][0]["id"]))).await;
    assert_eq!(
        (status, serde_json::from_str::<Value>(&one).expect("JSON")),
        (StatusCode::OK, models["data"][0].clone())
    );
    let (status, none) = server.get("/v1/models/no/such").await;
    assert!(status == StatusCode::NOT_FOUND && none.contains("model_not_found"), "{none}");
    for (path, body, status, param) in [
        (COMPLETIONS, json!({"prompt": "a", "temperature": -1}), 400, json!("temperature")),
        (COMPLETIONS, json!({"prompt": ""}), 400, json!("prompt")),
        (COMPLETIONS, json!({"prompt": [[999_999_999]]}), 400, json!("prompt")),
        (COMPLETIONS, json!({"prompt": "a", "max_tokens": 1_000_000}), 400, json!(null)),
        (COMPLETIONS, json!({"prompt": "a", "n": 1000}), 400, json!("n")),
        (COMPLETIONS, json!({}), 400, json!(null)),
        (CHAT, json!({"messages": []}), 400, json!("messages")),
        (CHAT, json!({"messages": "a"}), 400, json!("messages")),
        (CHAT, chat(json!({"max_tokens": 0})), 400, json!("max_tokens")),
        (CHAT, chat(json!({"max_tokens": 1.5})), 400, json!("max_tokens")),
        (CHAT, chat(json!({"max_tokens": 1e30})), 400, json!("max_tokens")),
        (CHAT, chat(json!({"seed": "7"})), 400, json!("seed")),
        (CHAT, chat(json!({"logit_bias": {"1": 101}})), 400, json!("logit_bias")),
        (CHAT, chat(json!({"logit_bias": {"-1": 1}})), 400, json!("logit_bias")),
        (CHAT, chat(json!({"logprobs": true, "top_logprobs": 21})), 400, json!("logprobs")),
        (CHAT, chat(json!({"stream_options": {"include_usage": "yes"}})), 400, json!("stream_options.include_usage")),
        (CHAT, chat(json!({"tools": [{"type": "function", "function": {"name": "f"}}]})), 400, json!("tools")),
        (CHAT, chat(json!({"response_format": {"type": "json_object"}})), 400, json!("response_format")),
        (CHAT, json!({"messages": [{"role": "tool", "content": "4", "tool_call_id": "1"}]}), 400, json!("messages")),
        (COMPLETIONS, json!({"prompt": "a", "suffix": "b"}), 400, json!("suffix")),
        (COMPLETIONS, json!({"prompt": "a", "best_of": 2}), 400, json!("best_of")),
        (COMPLETIONS, json!({"prompt": []}), 400, json!("n")),
        (COMPLETIONS, json!({"prompt": [1, "a"]}), 400, json!("prompt")),
        ("/v1/embeddings", json!({}), 404, json!(null)),
    ] {
        let (given, answer) = server.post(path, body.clone()).await;
        assert_eq!((given.as_u16(), &answer["error"]["param"]), (status, &param), "{path} {body}: {answer}");
        assert_eq!(answer["error"]["type"], "invalid_request_error");
        assert!(answer["error"]["message"].is_string());
    }
}

#[tokio::test]
async fn chat_and_its_stream_say_the_same() {
    let server = Server::start();
    let answer = server.complete(CHAT, chat(json!({}))).await;
    let choice = &answer["choices"][0];
    let content = text(&choice["message"]["content"]);
    assert!(!content.is_empty() && !content.contains("<extra_id_1>"), "{content:?}");
    assert_eq!((&choice["finish_reason"], &choice["message"]["role"]), (&json!("stop"), &json!("assistant")));
    let usage = &answer["usage"];
    let counts =
        ["prompt_tokens", "completion_tokens", "total_tokens"].map(|key| usage[key].as_u64().expect("a count"));
    assert_eq!(counts[0] + counts[1], counts[2]);

    let chunks = server.stream(CHAT, chat(json!({"stream_options": {"include_usage": true}}))).await;
    let (last, chunks) = chunks.split_last().expect("chunks");
    assert_eq!((&last["choices"], &last["usage"]), (&json!([]), usage));
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let streamed: String = chunks.iter().map(|chunk| text(&chunk["choices"][0]["delta"]["content"])).collect();
    assert_eq!(streamed, content);
    let reasons: Vec<&Value> =
        chunks.iter().map(|chunk| &chunk["choices"][0]["finish_reason"]).filter(|r| !r.is_null()).collect();
    assert_eq!(reasons, ["stop"]);

    let short = server.complete(CHAT, chat(json!({"max_completion_tokens": 2, "max_tokens": 50}))).await;
    assert_eq!(short["choices"][0]["finish_reason"], "length");
    assert_eq!(short["usage"]["completion_tokens"], 2);
}

#[tokio::test]
async fn a_stop_string_is_cut_and_never_streamed() {
    let server = Server::start();
    let body = |stop: Value| json!({"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "stop": stop});
    let whole = server.complete(COMPLETIONS, body(json!(null))).await;
    let whole = text(&whole["choices"][0]["text"]).to_owned();
    // From the middle of one word into another, so that no token ends where the stop string begins.
    let chars: Vec<char> = whole.chars().collect();
    let stop: String = chars[chars.len() / 3..chars.len() / 3 + 5].iter().collect();
    let expected = &whole[..whole.find(&stop).expect("it is there")];
    let answer = server.complete(COMPLETIONS, body(json!(["never", stop]))).await;
    assert_eq!(answer["choices"][0]["text"], expected);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let chunks = server.stream(COMPLETIONS, body(json!(stop))).await;
    let streamed: String = chunks.iter().map(|chunk| text(&chunk["choices"][0]["text"])).collect();
    assert_eq!(streamed, expected);
}

#[tokio::test]
async fn prompts_choices_echo_and_logprobs() {
    let server = Server::start();
    let body = json!({"prompt": ["To be", "Or not"], "n": 2, "max_tokens": 4, "seed": 1, "temperature": 1.5});
    let answer = server.complete(COMPLETIONS, body.clone()).await;
    let choices = answer["choices"].as_array().expect("choices");
    assert_eq!(choices.iter().map(|choice| &choice["index"]).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_ne!(choices[0]["text"], choices[1]["text"]);
    assert_eq!(answer["choices"], server.complete(COMPLETIONS, body.clone()).await["choices"]);
    let mut streamed = vec![String::new(); 4];
    for chunk in server.stream(COMPLETIONS, body).await {
        let choice = &chunk["choices"][0];
        streamed[choice["index"].as_u64().expect("an index") as usize] += text(&choice["text"]);
    }
    assert_eq!(streamed, choices.iter().map(|choice| text(&choice["text"])).collect::<Vec<_>>());

    let body = json!({"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "echo": true, "logprobs": 2});
    let answer = server.complete(COMPLETIONS, body).await;
    let (choice, logprobs) = (&answer["choices"][0], &answer["choices"][0]["logprobs"]);
    assert!(text(&choice["text"]).starts_with(PROMPT));
    let tokens = logprobs["tokens"].as_array().expect("tokens").len() as u64;
    assert_eq!(answer["usage"]["total_tokens"], tokens);
    let values = logprobs["token_logprobs"].as_array().expect("values");
    assert!(values[0].is_null() && values[1..].iter().all(|value| value.as_f64().is_some_and(|value| value <= 0.0)));
    assert_eq!(logprobs["top_logprobs"][1].as_object().expect("alternatives").len(), 2);
    assert_eq!(logprobs["text_offset"].as_array().expect("offsets").len() as u64, tokens);

    let answer = server.complete(CHAT, chat(json!({"max_tokens": 3, "logprobs": true, "top_logprobs": 3}))).await;
    let content = answer["choices"][0]["logprobs"]["content"].as_array().expect("tokens");
    assert_eq!(content.len(), 3);
    for token in content {
        assert_eq!(token["top_logprobs"].as_array().expect("alternatives").len(), 3);
        assert_eq!(token["top_logprobs"][0]["logprob"], token["logprob"]);
    }
}

#[tokio::test]
async fn fields_that_say_nothing_change_nothing_and_no_new_token_scores_the_prompt() {
    let server = Server::start();
    let plain = server.complete(CHAT, chat(json!({"max_tokens": 3}))).await;
    let nothing = json!({"max_tokens": 3, "n": null, "stop": null, "seed": null, "top_p": null, "logit_bias": null, "stream": null, "tools": [],
        "tool_choice": "none", "response_format": {"type": "text"}, "presence_penalty": 0, "user": "u", "store": false, "metadata": {"a": "b"}});
    assert_eq!(plain["choices"], server.complete(CHAT, chat(nothing)).await["choices"]);

    let body = |max_tokens: u32| json!({"prompt": ["To be, or not to be", "All the world's a stage"], "max_tokens": max_tokens, "temperature": 0, "echo": true, "logprobs": 1});
    let (none, two) = (server.complete(COMPLETIONS, body(0)).await, server.complete(COMPLETIONS, body(2)).await);
    assert_eq!((&none["usage"]["completion_tokens"], &two["usage"]["completion_tokens"]), (&json!(0), &json!(4)));
    for (none, two) in
        none["choices"].as_array().expect("choices").iter().zip(two["choices"].as_array().expect("choices"))
    {
        assert_eq!(none["finish_reason"], "length");
        assert!(text(&two["text"]).starts_with(text(&none["text"])) && text(&none["text"]).len() > 10);
        let values = |choice: &Value| choice["logprobs"]["token_logprobs"].as_array().expect("values").clone();
        assert_eq!(values(two)[..values(two).len() - 2], values(none));
    }
}

#[tokio::test]
async fn biases_and_penalties_reach_the_sampler() {
    let server = Server::start();
    let plain = server.generate(json!({"tokens_to_generate": 1})).await;
    let first = plain.ids(0).last().copied().expect("a token").to_string();
    let body = |bias: Value| json!({"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logit_bias": bias});
    let unbiased = server.complete(COMPLETIONS, body(json!({}))).await;
    let biased = server.complete(COMPLETIONS, body(json!({first: -100}))).await;
    assert_ne!(unbiased["choices"][0]["text"], biased["choices"][0]["text"]);
    // The end-of-sequence symbol ends the row, counts as a token, and has no text.
    let ended = server.complete(COMPLETIONS, body(json!({"3": 100}))).await;
    assert_eq!((&ended["choices"][0]["text"], &ended["choices"][0]["finish_reason"]), (&json!(""), &json!("stop")));
    assert_eq!(ended["usage"]["completion_tokens"], 1);
}

#[tokio::test]
async fn a_stream_that_nobody_reads_any_more_is_cancelled() {
    let server = Server::start();
    let body = json!({"prompt": PROMPT, "max_tokens": 900, "stream": true, "logit_bias": {"3": -100, "5": -100}});
    let mut response = server.request(Method::POST, COMPLETIONS).json(&body).send().await.expect("an answer");
    assert!(response.chunk().await.expect("a stream").is_some());
    drop(response);
    server.wait_for_metric("nemotron_rows_running 0").await;
    let (_, metrics) = server.get("/metrics").await;
    assert!(metrics.lines().any(|line| line == "nemotron_row_seconds_count 0"), "it ran to its end");
}
