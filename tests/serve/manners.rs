//! Many clients at once, clients that leave, and answers larger than memory should be.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::*;

/// Resident memory of a server's processes in MiB: now, or at its peak.
fn memory(server: &Server, field: &str) -> u64 {
    let of = |pid: i32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':').map(str::to_owned));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) / 1024
    };
    server.processes().into_iter().map(of).sum()
}

/// The finaliser of SplitMix64.
fn hash(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// `NEMOTRON_TEST_SOAK_SECONDS` makes it longer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_come_and_go_leave_nothing() {
    let seconds = std::env::var("NEMOTRON_TEST_SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(8);
    let server = Arc::new(Server::start());
    let bodies: Vec<Value> = (0..8)
        .map(|index| {
            let prompt = format!("<extra_id_1>User\nVerse {index}\n<extra_id_1>Assistant\n");
            let mut body = base(json!({"sentences": [prompt], "tokens_to_generate": 8 + 4 * index}));
            if index % 2 == 1 {
                body["greedy"] = json!(false);
                body["random_seed"] = json!(index);
            }
            body
        })
        .collect();
    let mut expected = Vec::new();
    for body in &bodies {
        expected.push(server.put(body).await.1);
    }
    let (bodies, expected) = (Arc::new(bodies), Arc::new(expected));
    let (finished, left) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..200_u64 {
        let (server, bodies, expected) = (server.clone(), bodies.clone(), expected.clone());
        let (finished, left) = (finished.clone(), left.clone());
        clients.spawn(async move {
            let mut round = 0;
            while Instant::now() < end {
                round += 1;
                let random = hash(client << 32 | round);
                let index = (random % 8) as usize;
                let patience = Duration::from_millis(if random >> 8 & 1 == 0 { random >> 16 & 0x3ff } else { 120_000 });
                match tokio::time::timeout(patience, server.put(&bodies[index])).await {
                    Ok((status, answer)) => {
                        assert_eq!(status, StatusCode::OK);
                        assert_eq!(answer, expected[index], "as alone");
                        finished.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(_) => _ = left.fetch_add(1, Ordering::Relaxed),
                }
            }
        });
    }
    tokio::time::sleep(Duration::from_secs(seconds / 2)).await;
    let half_way = memory(&server, "VmRSS");
    while let Some(client) = clients.join_next().await {
        client.expect("no client fails");
    }
    for gauge in ["nemotron_rows_waiting 0", "nemotron_rows_running 0", "nemotron_kv_pages_used 0"] {
        server.wait_for_metric(gauge).await;
    }
    let (at_end, counts) = (memory(&server, "VmRSS"), [&finished, &left].map(|count| count.load(Ordering::Relaxed)));
    println!("{} answers, {} clients left, {half_way} MiB half-way, {at_end} MiB at the end", counts[0], counts[1]);
    assert!(counts[0] > 50 && counts[1] > 50, "{counts:?}");
    assert!(at_end < half_way + 64, "{half_way} MiB, then {at_end} MiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn distributions_of_many_rows_take_no_memory() {
    let server = Server::start();
    let mut body = base(json!({"sentences": vec![PROMPT; 128], "tokens_to_generate": 16}));
    let plain = server.put(&body).await.1;
    let before = memory(&server, "VmHWM");
    body["all_probs"] = json!(true);
    let mut response = server.request(Method::PUT, "/generate").json(&body).send().await.expect("an answer");
    let (mut bytes, mut tail) = (0, Vec::new());
    while let Some(chunk) = response.chunk().await.expect("a stream") {
        bytes += chunk.len();
        tail.extend_from_slice(&chunk);
        tail.drain(..tail.len().saturating_sub(1 << 20));
    }
    let grown = memory(&server, "VmHWM") - before;
    println!("{} MB of text, {grown} MiB more than without", bytes / 1_000_000);
    let tokens = plain["tokens"].to_string();
    assert!(String::from_utf8_lossy(&tail).ends_with(&format!("\"tokens\":{tokens}}}\n")));
    assert!(bytes > 150_000_000 && grown < 48, "{bytes} bytes, {grown} MiB");
    // A client that leaves in the middle of it stops it.
    let mut response = server.request(Method::PUT, "/generate").json(&body).send().await.expect("an answer");
    response.chunk().await.expect("a stream");
    drop(response);
    for gauge in ["nemotron_rows_waiting 0", "nemotron_rows_running 0", "nemotron_kv_pages_used 0"] {
        server.wait_for_metric(gauge).await;
    }
    server.generate(json!({})).await;
}

#[tokio::test]
async fn a_short_prompt_does_not_wait_for_128_long_ones() {
    let server = Server::start();
    let long = "To be, or not to be, that is the question. ".repeat(40);
    let many = send_raw(&server, &base(json!({"sentences": vec![long; 128], "tokens_to_generate": 32})));
    while server.metric("nemotron_rows_running").await < 2 {
        tokio::task::yield_now().await;
    }
    let before = server.metric("nemotron_steps_total").await;
    server.generate(json!({"tokens_to_generate": 4})).await;
    let steps = server.metric("nemotron_steps_total").await - before;
    let waiting = server.metric("nemotron_rows_waiting").await;
    assert!(waiting > 16 && steps < 30, "{steps} steps for four tokens, {waiting} rows wait");
    drop(many);
}

#[tokio::test]
async fn a_full_queue_turns_openais_clients_away_and_lets_nemos_wait() {
    let server = Server::start();
    let body = base(json!({"sentences": vec!["a"; 128], "tokens_to_generate": 900, "min_tokens_to_generate": 900}));
    let waiting: Vec<TcpStream> = (0..35).map(|_| send_raw(&server, &body)).collect();
    let patience = Instant::now() + Duration::from_secs(60);
    while server.metric("nemotron_rows_waiting").await < 4096 {
        assert!(Instant::now() < patience, "they never wait");
    }
    let complete = || {
        let body = json!({"prompt": "a", "max_tokens": 1});
        server.request(Method::POST, "/v1/completions").json(&body).send()
    };
    let refused = complete().await.expect("an answer");
    assert_eq!(
        (refused.status(), &refused.headers()["retry-after"]),
        (StatusCode::TOO_MANY_REQUESTS, &"5".parse().unwrap())
    );
    assert_eq!(refused.json::<Value>().await.expect("JSON")["error"]["type"], "rate_limit_error");
    drop(waiting);
    server.wait_for_metric("nemotron_rows_waiting 0").await;
    assert_eq!(complete().await.expect("an answer").status(), StatusCode::OK);
}

#[tokio::test]
async fn a_lost_rank_is_told_to_clients() {
    let mut server = Server::start_with(|_| ["--no-auth", "--tp", "2"].map(String::from).to_vec());
    server.wait_for_metric("nemotron_rank_step_lag{rank=\"1\"} 0").await;
    let mut connection = send_raw(&server, &base(json!({"tokens_to_generate": 900, "min_tokens_to_generate": 900})));
    server.wait_for_metric("nemotron_rows_running 1").await;
    let start = Instant::now();
    kill(Pid::from_raw(server.processes()[2]), Signal::SIGKILL).expect("it runs");
    let mut answer = String::new();
    connection.read_to_string(&mut answer).expect("an answer");
    assert!(
        answer.starts_with("HTTP/1.1 500") && answer.contains("{\"message\":\"Internal Server Error"),
        "{answer:?}"
    );
    assert!(!server.child.wait().expect("it ends").success());
    assert!(start.elapsed() < Duration::from_secs(10));
    assert!(TcpStream::connect(server.address()).is_err());
}

#[tokio::test]
async fn an_idle_server_does_nothing_and_other_origins_get_no_leave() {
    let server = Server::start();
    server.generate(json!({})).await;
    let steps = server.metric("nemotron_steps_total").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(server.metric("nemotron_steps_total").await, steps);
    server.generate(json!({})).await;
    for method in [Method::OPTIONS, Method::POST] {
        let request = server.request(method, "/v1/chat/completions").header("origin", "http://evil.example");
        let answer = request.header("access-control-request-method", "POST").send().await.expect("an answer");
        assert!(!answer.headers().keys().any(|name| name.as_str().starts_with("access-control")));
    }
    server.wait_for_metric("nemotron_phase{phase=\"ready\"} 1").await;
    // Larger than any request may be: refused, not read to its end.
    let large = vec![b' '; 257 << 20];
    for (method, path) in [(Method::PUT, "/generate"), (Method::POST, "/v1/completions")] {
        let request = server.request(method, path).header("content-type", "application/json").body(large.clone());
        if let Ok(answer) = request.send().await {
            assert_eq!(answer.status(), StatusCode::PAYLOAD_TOO_LARGE);
        }
    }
    server.generate(json!({})).await;
}

/// The tiny model, with a context of 8192.
fn long_context_model(home: &Path) -> String {
    let from = crate::support::root().join("tests/fixtures/golden/tiny-hf");
    let folder = home.join("long");
    std::fs::create_dir(&folder).expect("a folder");
    for entry in std::fs::read_dir(from).expect("the model").map(|entry| entry.expect("an entry")) {
        std::fs::copy(entry.path(), folder.join(entry.file_name())).expect("copied");
    }
    let config = folder.join("config.json");
    let text = std::fs::read_to_string(&config).expect("a configuration");
    let longer = text.replace("\"max_position_embeddings\": 256", "\"max_position_embeddings\": 8192");
    assert_ne!(longer, text);
    std::fs::write(config, longer).expect("written");
    folder.display().to_string()
}

/// `NEMOTRON_TEST_LONG_ROWS=128` makes it the largest request that there is; it takes minutes.
#[tokio::test(flavor = "multi_thread")]
async fn long_prompts_are_served_however_many_there_are() {
    let rows = std::env::var("NEMOTRON_TEST_LONG_ROWS").ok().and_then(|text| text.parse().ok()).unwrap_or(4);
    // Prompts of 4096 tokens take more work than a test should, unless it is asked for.
    let tokens = if rows == 128 { 4096 } else { 1500 };
    let server = Server::start_with(|home| {
        // Fewer rows at a time than there are: the others wait for their turn.
        let kv_tokens = format!("kv_tokens={}", tokens * 3);
        let flags = ["--no-auth", "--set", &kv_tokens, "--model"].map(String::from);
        flags.into_iter().chain([long_context_model(home)]).collect()
    });
    let prompt = |row: u64| (0..tokens).map(|at| 300 + hash(row << 32 | at) % 700).collect::<Vec<u64>>();
    let prompts: Vec<Vec<u64>> = (0..rows).map(prompt).collect();
    let body =
        |prompts: &[Vec<u64>]| base(json!({"sentences": prompts, "tokens_to_generate": 2, "compute_logprob": true}));
    let alone = server.put(&body(&prompts[1..2])).await.1;
    let before = memory(&server, "VmHWM");
    let (status, reply) = server.put(&body(&prompts)).await;
    assert!(status == StatusCode::OK && reply.is_object(), "{}", reply.to_string().get(..500).unwrap_or_default());
    let last = tokens as usize - 1;
    for key in ["token_ids", "tokens", "offsets", "sentences", "logprob"] {
        assert_eq!(reply[key].as_array().expect("rows").len() as u64, rows);
        // A row that stops early is filled up to the longest.
        let row = &reply[key][1];
        match row.as_array() {
            Some(values) => assert_eq!(values[..last], alone[key][0].as_array().expect("a row")[..last], "{key}"),
            None => assert!(row.as_str().is_some_and(|text| text.starts_with(alone[key][0].as_str().expect("a text")))),
        }
    }
    let grown = memory(&server, "VmHWM") - before;
    println!("{grown} MiB more for {rows} rows than for one");
    assert!(grown < 400, "{grown} MiB");

    // Distributions of all positions: tens megabytes of text that are never held together.
    let before = memory(&server, "VmHWM");
    let mut body = body(&prompts[..2]);
    body["all_probs"] = json!(true);
    let mut response = server.request(Method::PUT, "/generate").json(&body).send().await.expect("an answer");
    let mut bytes = 0;
    while let Some(chunk) = response.chunk().await.expect("a stream") {
        bytes += chunk.len();
    }
    let grown = memory(&server, "VmHWM") - before;
    println!("{} MB of distributions, {grown} MiB more", bytes / 1_000_000);
    assert!(bytes > 20_000_000 && grown < 48, "{bytes} bytes, {grown} MiB");
}
