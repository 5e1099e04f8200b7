//! `nemotron serve` over real HTTP with the built-in model: NeMo's `PUT /generate`, OpenAI's endpoints, authentication, health.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use futures_util::future::join_all;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;

mod client;
mod conformance;
mod connections;
mod generate;
mod manners;
mod openai;
mod python;
mod reference;
mod reward;

/// The single-turn prompt of the recipe.
const PROMPT: &str = "<extra_id_0>System\n\n<extra_id_1>User\nWrite a poem on NVIDIA in the style of Shakespeare\n<extra_id_1>Assistant\n";

/// A server of its own for a test; killed at the end.
struct Server {
    child: Child,
    url: String,
    client: Client,
    home: TempDir,
}

impl Server {
    /// With `--no-auth`.
    fn start() -> Self {
        Self::start_with(|_| vec!["--no-auth".into()])
    }

    /// With the flags that `flags` gives, which may put files into the server's home.
    fn start_with(flags: impl FnOnce(&Path) -> Vec<String>) -> Self {
        let home = tempfile::tempdir().expect("a directory");
        let mut child = Command::new(env!("CARGO_BIN_EXE_nemotron"))
            .arg("serve")
            .args(flags(home.path()))
            .current_dir(&home)
            .env("HOME", home.path())
            .env("NEMOTRON_RUN_ROOT", home.path().join("runs"))
            .env("NEMOTRON_PORT", "0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the binary starts");
        let mut url = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut url).expect("stdout is text");
        let url = url.trim().trim_end_matches('/').to_owned();
        assert!(url.starts_with("http://"), "no URL on stdout: {url:?}");
        Self { child, url, client: Client::builder().no_proxy().build().expect("a client"), home }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url))
    }

    /// The status and JSON body of an answer to `PUT /generate`.
    async fn put(&self, body: &Value) -> (StatusCode, Value) {
        let response = self.request(Method::PUT, "/generate").json(body).send().await.expect("an answer");
        let status = response.status();
        assert_eq!(response.headers()["content-type"], "application/json");
        let text = response.text().await.expect("a body");
        assert!(text.ends_with('\n'));
        (status, serde_json::from_str(&text).expect("JSON"))
    }

    /// A greedy reply of eight tokens to [`PROMPT`], but for `changes`.
    async fn generate(&self, changes: Value) -> Reply {
        let (status, reply) = self.put(&base(changes)).await;
        assert_eq!(status, StatusCode::OK);
        assert!(reply.is_object(), "{reply}");
        Reply(reply)
    }

    async fn get(&self, path: &str) -> (StatusCode, String) {
        let response = self.request(Method::GET, path).send().await.expect("an answer");
        (response.status(), response.text().await.expect("a body"))
    }

    /// Waits until a line of `/metrics` is `line`.
    async fn wait_for_metric(&self, line: &str) {
        for _ in 0..600 {
            if self.get("/metrics").await.1.lines().any(|candidate| candidate == line) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{line} never came");
    }

    /// The value of a metric without labels.
    async fn metric(&self, name: &str) -> u64 {
        let text = self.get("/metrics").await.1;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name} in {text}"))
    }

    /// The supervisor and its ranks.
    fn processes(&self) -> Vec<i32> {
        let pid = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("it runs");
        let children = children.split_whitespace().map(|pid| pid.parse().expect("a number"));
        std::iter::once(pid.cast_signed()).chain(children).collect()
    }

    fn address(&self) -> &str {
        &self.url["http://".len()..]
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn base(changes: Value) -> Value {
    let mut body = json!({"sentences": [PROMPT], "tokens_to_generate": 8, "greedy": true, "end_strings": []});
    for (key, value) in changes.as_object().expect("an object") {
        body[key] = value.clone();
    }
    body
}

/// An answer of `PUT /generate`.
#[derive(Debug, PartialEq)]
struct Reply(Value);

impl Reply {
    fn ids(&self, row: usize) -> Vec<u64> {
        self.0["token_ids"][row].as_array().expect("a row").iter().map(|id| id.as_u64().expect("an id")).collect()
    }

    fn tokens(&self, row: usize) -> Vec<&str> {
        self.0["tokens"][row].as_array().expect("a row").iter().map(|token| token.as_str().expect("a piece")).collect()
    }

    fn sentence(&self, row: usize) -> &str {
        self.0["sentences"][row].as_str().expect("a sentence")
    }

    /// What follows [`PROMPT`].
    fn completion(&self) -> &str {
        self.sentence(0).strip_prefix(PROMPT).expect("a sentence starts with its prompt")
    }

    fn floats(&self, key: &str, row: usize) -> Vec<f64> {
        self.0[key][row].as_array().expect("a row").iter().map(|value| value.as_f64().expect("a number")).collect()
    }
}

#[tokio::test]
async fn a_token_guards_everything_but_the_probes() {
    let server = Server::start_with(|home| {
        let file = home.join("token");
        std::fs::write(&file, "s3cret\n").expect("a token file");
        vec!["--token-file".into(), file.display().to_string()]
    });
    let get = |path, token: Option<&str>| {
        let request = server.request(Method::GET, path);
        token.map_or(request.try_clone().expect("no body"), |token| request.bearer_auth(token)).send()
    };
    for path in ["/livez", "/readyz", "/startupz", "/healthz"] {
        assert_eq!(get(path, None).await.expect("an answer").status(), StatusCode::OK, "{path}");
    }
    for path in ["/v1/models", "/metrics", "/generate", "/"] {
        for token in [None, Some("s3cre"), Some("s3cret2")] {
            let response = get(path, token).await.expect("an answer");
            assert_eq!(response.status(), StatusCode::UNAUTHORIZED, "{path}");
            assert_eq!(response.headers()["www-authenticate"], "Bearer");
            let answer: Value = response.json().await.expect("JSON");
            let message = if path.starts_with("/v1/") { &answer["error"]["message"] } else { &answer["message"] };
            assert!(message.is_string(), "{path}: {answer}");
        }
    }
    assert_eq!(get("/v1/models", Some("s3cret")).await.expect("an answer").status(), StatusCode::OK);
}

#[tokio::test]
async fn answers_carry_a_request_id_and_are_counted() {
    let server = Server::start();
    let given = server.request(Method::GET, "/livez").header("x-request-id", "abc-1").send().await.expect("an answer");
    assert_eq!(given.headers()["x-request-id"], "abc-1");
    let made = server.request(Method::GET, "/livez").send().await.expect("an answer");
    assert_eq!(made.headers()["x-request-id"].len(), 32);
    let reply = server.generate(json!({})).await;
    server.wait_for_metric("nemotron_http_responses_total{route=\"/generate\",status=\"200\"} 1").await;
    server.wait_for_metric("nemotron_row_seconds_count 1").await;
    server.wait_for_metric("nemotron_time_between_tokens_seconds_count 7").await;
    let run =
        std::fs::read_dir(server.home.path().join("runs")).expect("runs").next().expect("a run").expect("its entry");
    let log = std::fs::read_to_string(run.path().join("attempt-000/rank-000.log")).expect("rank 0's log");
    let line = log.lines().find(|line| line.contains("/generate")).expect("the access log");
    for part in ["127.0.0.1:", &format!("prompt_tokens={}", reply.ids(0).len() - 8), "completion_tokens=8", "200", "ms"]
    {
        assert!(line.contains(part), "{part} is not in {line}");
    }
    assert!(!log.contains("Shakespeare"), "{log}");
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_rows() {
    let server = Server::start();
    let body =
        base(json!({"tokens_to_generate": 100_000, "sentences": [PROMPT, PROMPT], "min_tokens_to_generate": 100_000}));
    let mut connection = send_raw(&server, &body);
    server.wait_for_metric("nemotron_rows_running 2").await;
    // The page for `/` does not wait for what runs.
    assert_eq!(server.request(Method::PUT, "/").send().await.expect("an answer").status(), StatusCode::NOT_FOUND);
    connection.flush().expect("still open");
    drop(connection);
    server.wait_for_metric("nemotron_rows_running 0").await;
    server.wait_for_metric("nemotron_http_responses_total{route=\"/generate\",status=\"499\"} 1").await;
    assert_eq!(server.generate(json!({})).await.ids(0).len(), server.generate(json!({})).await.ids(0).len());
}

#[tokio::test]
async fn a_running_request_is_finished_on_termination() {
    let mut server = Server::start();
    let mut connection = send_raw(&server, &base(json!({"tokens_to_generate": 200, "min_tokens_to_generate": 200})));
    server.wait_for_metric("nemotron_rows_running 1").await;
    kill(Pid::from_raw(server.child.id().cast_signed()), Signal::SIGTERM).expect("it runs");
    let mut answer = String::new();
    connection.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("token_ids"));
    server.child.wait().expect("it ends");
    assert!(TcpStream::connect(server.address()).is_err());
}

/// Sends `PUT /generate` without waiting for an answer.
fn send_raw(server: &Server, body: &Value) -> TcpStream {
    let body = body.to_string();
    let mut connection = TcpStream::connect(server.address()).expect("a connection");
    let length = body.len();
    let head = format!(
        "PUT /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    connection.write_all((head + &body).as_bytes()).expect("sent");
    connection
}
