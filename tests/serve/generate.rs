//! `PUT /generate` as clients of NeMo's server know it.

use super::*;

/// The recipe's end strings.
const RECIPE_ENDS: [&str; 4] = ["<|endoftext|>", "<extra_id_1>", "\u{11}", "<extra_id_1>User"];

#[tokio::test]
async fn transport() {
    let server = Server::start();
    for (method, path, status, allow) in [
        (Method::PUT, "/", 404, None),
        (Method::GET, "/", 404, None),
        (Method::GET, "/generate", 404, None),
        (Method::HEAD, "/generate", 404, None),
        (Method::POST, "/generate", 405, Some("HEAD, OPTIONS, PUT, GET")),
        (Method::OPTIONS, "/generate", 200, Some("HEAD, OPTIONS, PUT, GET")),
        (Method::PUT, "/generate/", 405, Some("HEAD, OPTIONS, GET")),
    ] {
        let response = server.request(method.clone(), path).send().await.expect("an answer");
        assert_eq!(response.status(), status, "{method} {path}");
        assert_eq!(
            response.headers().get("allow").map(|allow| allow.to_str().expect("text")),
            allow,
            "{method} {path}"
        );
        assert_eq!(response.headers()["content-type"], "text/html; charset=utf-8", "{method} {path}");
    }
    let good = base(json!({})).to_string();
    for (kind, body, status) in [
        ("text/plain", good.as_str(), 415),
        ("application/x-www-form-urlencoded", good.as_str(), 415),
        ("application/json", "", 400),
        ("application/json", "{\"sentences\": [", 400),
        ("application/json", "{\"sentences\": [\"a\"], \"temperature\": NaN}", 400),
        ("application/json", "{\"sentences\": [\"a\"], \"temperature\": Infinity}", 400),
        ("application/json", "{}", 400),
        ("application/json", "[1]", 400),
        ("application/json", "{\"sentences\": null}", 400),
    ] {
        let request = server.request(Method::PUT, "/generate").header("content-type", kind);
        let response = request.body(body.to_owned()).send().await.expect("an answer");
        assert_eq!(response.status(), status, "{kind} {body}");
        assert!(response.json::<Value>().await.expect("JSON")["message"].is_string(), "{kind} {body}");
    }
    let request = server.request(Method::PUT, "/generate").header("content-type", "application/json; charset=utf-8");
    let reply: Value = request.body(good).send().await.expect("an answer").json().await.expect("JSON");
    assert!(reply.is_object());
}

#[tokio::test]
async fn refusals_are_strings_and_leave_the_server_healthy() {
    let server = Server::start();
    let refuse = async |changes: Value, text: &str| {
        let (status, answer) = server.put(&base(changes.clone())).await;
        let status = status.as_u16();
        assert_eq!(
            (status, answer.as_str().map(|answer| answer.contains(text))),
            (200, Some(true)),
            "{changes}: {answer}"
        );
    };
    refuse(json!({"temperature": 0}), "temperature must be a positive number less than or equal to 100.0").await;
    refuse(json!({"tokens_to_generate": 5.0}), "tokens_to_generate must be an integer greater than 0").await;
    refuse(json!({"sentences": "abc"}), "sentences must be a list of strings").await;
    refuse(json!({"sentences": [{}]}), "sentences must be a list of strings").await;
    refuse(json!({"sentences": [""]}), "Empty prompts require add_BOS=true").await;
    refuse(json!({"sentences": [[1, 1_000_000_000]]}), "outside the vocabulary").await;
    refuse(json!({"sentences": ["word ".repeat(20_000)]}), "context").await;
    refuse(json!({"task_ids": [1]}), "if task ids are given").await;
    let (status, answer) = server.put(&base(json!({"sentences": vec!["a"; 129]}))).await;
    assert_eq!((status, answer), (StatusCode::BAD_REQUEST, json!("Maximum number of sentences is 128")));
    let empty = server.generate(json!({"sentences": []})).await;
    assert_eq!(empty.0, json!({"logprob": null, "offsets": [], "sentences": [], "token_ids": [], "tokens": []}));
    server.generate(json!({"foo": 1})).await;
}

#[tokio::test]
async fn strict_mode_gives_refusals_a_status() {
    let server = Server::start_with(|_| vec!["--no-auth".into(), "--strict".into()]);
    let (status, answer) = server.put(&base(json!({"top_p": 2}))).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(answer, json!("top_p must be a positive number less than or equal to 1.0"));
}

#[tokio::test]
async fn shape() {
    let server = Server::start();
    let reply = server.generate(json!({})).await;
    let keys: Vec<&str> = reply.0.as_object().expect("an object").keys().map(String::as_str).collect();
    assert_eq!(keys, ["logprob", "offsets", "sentences", "token_ids", "tokens"]);
    assert!(reply.0["logprob"].is_null());
    let (ids, tokens, offsets) = (reply.ids(0), reply.tokens(0), reply.floats("offsets", 0));
    assert_eq!((ids.len(), offsets.len()), (tokens.len(), tokens.len()));
    let mut offset = 0;
    for (token, at) in tokens.iter().zip(offsets) {
        assert_eq!(at as usize, offset);
        offset += token.chars().count();
    }
    assert_eq!(reply, server.generate(json!({})).await);

    for prompt in [
        "a  b",
        " lead",
        "trail ",
        "tab\there",
        "line\r\nbreak\n\n",
        "🙂 naïve 日本語",
        "</s> <s> <|endoftext|>",
        "\u{0}",
    ] {
        let reply = server.generate(json!({"sentences": [prompt]})).await;
        assert!(reply.sentence(0).starts_with(prompt), "{prompt:?}: {:?}", reply.sentence(0));
        assert!(!reply.ids(0)[..reply.ids(0).len() - 8].iter().any(|id| [2, 3].contains(id)), "{prompt:?}");
    }

    let num_prompt = ids.len() - 8;
    let with_bos = server.generate(json!({"add_BOS": true})).await;
    assert_eq!((with_bos.ids(0)[0], with_bos.tokens(0)[0], with_bos.ids(0).len()), (2, "<s>", num_prompt + 9));
    assert!(with_bos.sentence(0).starts_with(PROMPT));
    let unconditional = server.generate(json!({"add_BOS": true, "sentences": ["", ""]})).await;
    assert_eq!(unconditional.ids(0)[0], 2);
    assert_eq!(server.generate(json!({"tokens_to_generate": 1})).await.ids(0).len(), num_prompt + 1);
    let as_ids = server.generate(json!({"sentences": [ids[..num_prompt]]})).await;
    assert_eq!(as_ids, reply);
    // The first byte of a character alone is shown as a replacement, never as broken JSON.
    let cut = server.generate(json!({"sentences": [ids], "tokens_to_generate": 1})).await;
    assert!(!cut.sentence(0).is_empty());
}

#[tokio::test]
async fn logprobs() {
    let server = Server::start();
    let reply = server.generate(json!({"compute_logprob": true, "all_probs": true})).await;
    let (ids, logprob) = (reply.ids(0), reply.floats("logprob", 0));
    assert_eq!(logprob.len(), ids.len() - 1);
    assert!(logprob.iter().all(|value| *value <= 0.0));
    let full = reply.0["full_logprob"][0].as_array().expect("a row");
    assert_eq!(full.len(), ids.len() - 1);
    for (position, values) in full.iter().enumerate() {
        let values: Vec<f64> =
            values.as_array().expect("values").iter().map(|value| value.as_f64().expect("finite")).collect();
        let sum: f64 = values.iter().map(|value| value.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-3, "position {position}: {sum}");
        assert_eq!(values[ids[position + 1] as usize], logprob[position]);
        if position + 9 >= ids.len() {
            let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert_eq!(max, logprob[position], "greedy takes the most likely token at {position}");
        }
    }
    let only = server.generate(json!({"compute_logprob": true})).await;
    assert_eq!(only.floats("logprob", 0), logprob);
    assert_eq!(server.generate(json!({"all_probs": true})).await, reply);
}

#[tokio::test]
async fn stops() {
    let server = Server::start();
    let plain = server.generate(json!({})).await;
    let num_prompt = plain.ids(0).len() - 8;
    let mut texts = Vec::new();
    for new in 1..=3 {
        texts.push(server.generate(json!({"tokens_to_generate": new})).await.completion().to_owned());
    }
    let third = plain.tokens(0)[num_prompt + 2].replace('\u{2581}', " ");
    let first =
        plain.ids(0)[num_prompt..].iter().position(|id| *id == plain.ids(0)[num_prompt + 2]).expect("it is there");
    let stopped = server.generate(json!({"end_strings": [third]})).await;
    assert_eq!(stopped.ids(0), plain.ids(0)[..=num_prompt + first], "{third:?}");
    assert!(stopped.sentence(0).ends_with(&third));

    let stopped = server.generate(json!({"end_strings": [texts[2].strip_prefix(&texts[0])]})).await;
    assert_eq!(stopped.completion(), texts[2]);
    let one = |ends: Value| server.generate(json!({"end_strings": ends, "min_tokens_to_generate": 4}));
    assert_eq!(one(json!([""])).await.completion(), texts[0]);
    assert_eq!(one(json!([texts[0]])).await.completion(), texts[0]);
    assert_eq!(one(json!([format!("Assistant\n{}", texts[0])])).await.completion(), texts[0]);
    assert_eq!(server.generate(json!({"end_strings": ["<|endoftext|>"]})).await, plain);

    // The model ends its turn by itself, and the end symbol stays.
    let turn = server.generate(json!({"end_strings": RECIPE_ENDS, "tokens_to_generate": 900})).await;
    assert_eq!(turn.tokens(0).last(), Some(&"<extra_id_1>"));
    assert_eq!(turn.completion().matches("<extra_id_1>").count(), 1);
    assert!(turn.completion().ends_with("<extra_id_1>"));
}

#[tokio::test]
async fn batches() {
    let server = Server::start();
    let (short, long) = ("<extra_id_1>User\nSing.\n<extra_id_1>Assistant\n", PROMPT);
    let alone = [
        server.generate(json!({"sentences": [short], "tokens_to_generate": 4})).await,
        server.generate(json!({"sentences": [long], "tokens_to_generate": 4})).await,
    ];
    let both = server.generate(json!({"sentences": [short, long], "tokens_to_generate": 4})).await;
    let length = alone[1].ids(0).len();
    for (row, alone) in alone.iter().enumerate() {
        assert_eq!(both.ids(row).len(), length, "rows may grow to the longest prompt and four tokens");
        assert_eq!(both.ids(row)[..alone.ids(0).len()], alone.ids(0));
    }
    assert!(both.sentence(0).starts_with(short) && both.sentence(1).starts_with(long));

    let turns = server
        .generate(json!({"sentences": [short, long], "tokens_to_generate": 900, "end_strings": RECIPE_ENDS, "compute_logprob": true}))
        .await;
    assert_eq!(turns.ids(0).len(), turns.ids(1).len());
    let filled = (0..2).find(|row| turns.tokens(*row).last() == Some(&"</s>")).expect("one turn ends first");
    assert_eq!(turns.ids(filled).last(), Some(&3));
    assert!(!turns.sentence(filled).contains("</s>"));
    assert!(turns.sentence(filled).ends_with("<extra_id_1>"));
    assert_eq!(turns.floats("logprob", filled).len(), turns.ids(filled).len() - 1);

    let many = server.generate(json!({"sentences": vec![PROMPT; 128], "tokens_to_generate": 2})).await;
    assert!((0..128).all(|row| many.ids(row) == many.ids(0)));
}

#[tokio::test]
async fn sampling() {
    let server = Server::start();
    let greedy = server.generate(json!({})).await;
    for changes in [
        json!({"greedy": false, "top_k": 1}),
        json!({"greedy": false, "temperature": 1e-8, "top_k": 0, "top_p": 1}),
        json!({"temperature": 5, "top_p": 0.1, "top_k": 7, "repetition_penalty": 2, "random_seed": 3}),
    ] {
        assert_eq!(server.generate(changes.clone()).await, greedy, "{changes}");
    }
    let sample = async |seed: u64, mut changes: Value| {
        changes["greedy"] = json!(false);
        changes["random_seed"] = json!(seed);
        server.generate(changes).await.ids(0)
    };
    let seven = sample(7, json!({})).await;
    assert_eq!(sample(7, json!({})).await, seven);
    assert_eq!(sample(7, json!({"repetition_penalty": 1.0})).await, seven);
    let off = sample(7, json!({"top_p": 0, "top_k": 0})).await;
    assert_eq!(sample(7, json!({"top_p": 1, "top_k": 1_000_000_000})).await, off);
    let seeds = join_all((1..=8).map(|seed| sample(seed, json!({})))).await;
    assert!(seeds.iter().any(|ids| *ids != seeds[0]));
    let free = server.generate(json!({"greedy": false, "sentences": vec![PROMPT; 8]})).await;
    assert!((1..8).any(|row| free.ids(row) != free.ids(0)), "rows of one request differ");
}

#[tokio::test]
async fn draws_follow_the_filtered_distribution() {
    let server = Server::start();
    let reply = server.generate(json!({"tokens_to_generate": 1, "all_probs": true})).await;
    let last = reply.0["full_logprob"][0].as_array().and_then(|rows| rows.last()).and_then(Value::as_array);
    let values = last.expect("the new token's distribution").iter().map(|value| value.as_f64().expect("finite"));
    let mut best: Vec<(usize, f64)> = values.enumerate().collect();
    best.sort_by(|a, b| b.1.total_cmp(&a.1));
    best.truncate(5);
    let mass: f64 = best.iter().map(|(_, logprob)| logprob.exp()).sum();
    let mut counts = vec![0.0; best.len()];
    let draws = 16 * 128;
    for seed in 0..16 {
        let reply = server
            .generate(json!({"sentences": vec![PROMPT; 128], "tokens_to_generate": 1, "greedy": false, "top_k": 5, "top_p": 0, "random_seed": seed}))
            .await;
        for row in 0..128 {
            let id = *reply.ids(row).last().expect("a token") as usize;
            counts[best.iter().position(|(best, _)| *best == id).expect("one of the five best")] += 1.0;
        }
    }
    for ((id, logprob), count) in best.iter().zip(counts) {
        let probability = logprob.exp() / mass;
        let expected = probability * f64::from(draws);
        let sigma = (expected * (1.0 - probability)).sqrt();
        assert!((count - expected).abs() <= 4.0 * sigma + 1.0, "id {id}: {count} of {expected} ± {sigma}");
    }
}

#[tokio::test]
async fn parallel_requests_and_long_rows() {
    let server = Server::start();
    let prompts: Vec<String> =
        (0..16).map(|index| format!("<extra_id_1>User\nVerse {index}\n<extra_id_1>Assistant\n")).collect();
    let replies = join_all(prompts.iter().map(|prompt| server.generate(json!({"sentences": [prompt]})))).await;
    for (prompt, reply) in prompts.iter().zip(&replies) {
        assert!(reply.sentence(0).starts_with(prompt));
        assert_eq!(*reply, server.generate(json!({"sentences": [prompt]})).await);
    }
    // Rows are clipped to the context, whatever was asked for.
    let long =
        server.generate(json!({"tokens_to_generate": 1_000_000_000, "min_tokens_to_generate": 1_000_000_000})).await;
    assert_eq!(long.ids(0).len(), 1024);
}
