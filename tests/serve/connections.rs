//! HTTP as it may come over the wire: reused, pipelined, chunked, cut short, and bodies that nobody means.

use super::*;

/// Sends bytes as they are and reads until the server closes the connection.
fn exchange(server: &Server, parts: &[&[u8]]) -> String {
    let mut connection = TcpStream::connect(server.address()).expect("a connection");
    connection.set_read_timeout(Some(Duration::from_secs(60))).expect("a limit");
    for part in parts {
        connection.write_all(part).expect("sent");
        connection.flush().expect("sent");
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut answer = String::new();
    connection.read_to_string(&mut answer).expect("an answer, then the end");
    answer
}

fn put_head(extra: &str) -> String {
    format!("PUT /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{extra}\r\n")
}

#[tokio::test]
async fn requests_share_connections_and_come_in_pieces() {
    let server = Server::start();
    let expected = server.generate(json!({"tokens_to_generate": 3})).await.0["token_ids"][0].to_string();
    let body = base(json!({"tokens_to_generate": 3})).to_string();
    let length = format!("Content-Length: {}\r\n", body.len());

    // Two requests sent before the first is answered, and a third that closes.
    let one = put_head(&length) + &body;
    let last = put_head(&format!("{length}Connection: close\r\n")) + &body;
    let answers = exchange(&server, &[(one.clone() + &one + &last).as_bytes()]);
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 3, "{answers}");
    assert_eq!(answers.matches(&expected).count(), 3);

    let chunks: String = body
        .as_bytes()
        .chunks(7)
        .map(|chunk| format!("{:x}\r\n{}\r\n", chunk.len(), String::from_utf8_lossy(chunk)))
        .collect();
    let head = put_head("Transfer-Encoding: chunked\r\nConnection: close\r\n");
    let (first, second) = chunks.split_at(chunks.len() / 2);
    let answer = exchange(&server, &[head.as_bytes(), first.as_bytes(), second.as_bytes(), b"0\r\n\r\n"]);
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains(&expected), "{answer}");

    let head = put_head(&format!("{length}Expect: 100-continue\r\nConnection: close\r\n"));
    let answer = exchange(&server, &[head.as_bytes(), body.as_bytes()]);
    assert!(answer.starts_with("HTTP/1.1 100 Continue") && answer.contains(&expected), "{answer}");

    // HTTP/1.0 and a slow sender.
    let old = format!("PUT /generate HTTP/1.0\r\nContent-Type: application/json\r\n{length}\r\n");
    let mut parts: Vec<&[u8]> = vec![old.as_bytes()];
    parts.extend(body.as_bytes().chunks(40));
    let answer = exchange(&server, &parts);
    assert!(answer.contains(" 200 OK") && answer.contains(&expected), "{answer}");

    // Nonsense, a promise that is not kept, and nothing at all.
    assert!(exchange(&server, &[b"GARBAGE\r\n\r\n"]).starts_with("HTTP/1.1 400"));
    for part in [
        put_head("Content-Length: 100\r\n") + "{",
        put_head("Transfer-Encoding: chunked\r\n") + "5\r\n{",
        String::new(),
    ] {
        let mut connection = TcpStream::connect(server.address()).expect("a connection");
        connection.write_all(part.as_bytes()).expect("sent");
    }
    server.generate(json!({})).await;
    server.wait_for_metric("nemotron_rows_running 0").await;
}

#[tokio::test]
async fn methods_that_a_route_lacks_are_refused_in_its_dialect() {
    let server = Server::start();
    for (method, path, status, is_openai) in [
        (Method::GET, "/v1/chat/completions", 405, true),
        (Method::PUT, "/v1/completions", 405, true),
        (Method::DELETE, "/v1/models", 405, true),
        (Method::OPTIONS, "/v1/completions", 405, true),
        (Method::POST, "/v1/nothing", 404, true),
        (Method::GET, "/v1/models/gpt-4o", 404, true),
        (Method::POST, "/metrics", 405, false),
        (Method::DELETE, "/readyz", 405, false),
    ] {
        let answer = server.request(method.clone(), path).send().await.expect("an answer");
        assert_eq!(answer.status().as_u16(), status, "{method} {path}");
        assert_eq!(answer.headers().contains_key("allow"), status == 405, "{method} {path}");
        let answer: Value = answer.json().await.expect("JSON");
        let message = if is_openai { &answer["error"]["message"] } else { &answer["message"] };
        assert!(message.is_string(), "{method} {path}: {answer}");
    }
    for (path, status) in [("/livez", 200), ("/v1/models", 200), ("/metrics", 200), ("/generate", 404), ("/", 404)] {
        let answer = server.request(Method::HEAD, path).send().await.expect("an answer");
        assert_eq!(answer.status().as_u16(), status, "HEAD {path}");
        assert_eq!(answer.bytes().await.expect("a body").len(), 0, "HEAD {path}");
    }
    let (_, models) = server.get("/v1/models").await;
    let models: Value = serde_json::from_str(&models).expect("JSON");
    let id = models["data"][0]["id"].as_str().expect("an id");
    let (status, model) = server.get(&format!("/v1/models/{id}")).await;
    assert_eq!(
        (status, serde_json::from_str::<Value>(&model).expect("JSON")),
        (StatusCode::OK, models["data"][0].clone())
    );
}

#[tokio::test]
async fn bodies_that_nobody_means_are_refused_and_harm_nothing() {
    let server = Server::start();
    let expected = server.generate(json!({})).await;
    let deep = "[".repeat(100_000) + &"]".repeat(100_000);
    let bodies = [
        deep.clone().into_bytes(),
        format!("{{\"sentences\": {deep}}}").into_bytes(),
        format!("{{\"prompt\": {deep}, \"messages\": {deep}, \"prompts\": {deep}}}").into_bytes(),
        b"{\"sentences\": [\"\\ud800\"], \"prompt\": \"\\ud800\"}".to_vec(),
        b"{\"sentences\": [\"\xff\"], \"prompt\": \"\xff\"}".to_vec(),
        b"{\"sentences\": [\"a\"], \"prompt\": \"a\", \"temperature\": 1e999}".to_vec(),
        b"{\"sentences\": [\"a\"], \"prompt\": \"a\", \"temperature\": NaN}".to_vec(),
        b"{\"prompt\": \"a\"}{\"prompt\": \"a\"}".to_vec(),
        b"\xef\xbb\xbf{}".to_vec(),
        b"null".to_vec(),
        b"0".to_vec(),
        vec![0; 64],
    ];
    for body in bodies {
        for (method, path) in [
            (Method::PUT, "/generate"),
            (Method::PUT, "/api"),
            (Method::POST, "/v1/completions"),
            (Method::POST, "/v1/chat/completions"),
        ] {
            let request = server.request(method, path).header("content-type", "application/json").body(body.clone());
            let answer = request.send().await.expect("an answer");
            let shown = String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned();
            assert_eq!(answer.status(), StatusCode::BAD_REQUEST, "{path} {shown}");
            let answer: Value = answer.json().await.expect("JSON");
            let message = if path.starts_with("/v1") { &answer["error"]["message"] } else { &answer };
            assert!(message.is_string() || message["message"].is_string(), "{path} {shown}: {answer}");
        }
    }
    assert_eq!(server.generate(json!({})).await, expected);
    // Integers that Python has and 64 bits have not; fields twice; keys that are long.
    let body = format!(
        "{{\"sentences\": [\"a\"], \"tokens_to_generate\": 1, \"tokens_to_generate\": 1{}, \"top_k\": 1{}, \"{}\": 1}}",
        "0".repeat(40),
        "0".repeat(60),
        "k".repeat(100_000)
    );
    let request = server.request(Method::PUT, "/generate").header("content-type", "application/json").body(body);
    let answer: Value = request.send().await.expect("an answer").json().await.expect("JSON");
    assert!(answer["sentences"].is_array(), "{answer}");
}
