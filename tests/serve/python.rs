//! What people run: the recipe's script, OpenAI's client, and a fuzzer of OpenAPI documents. Each needs packages from PyPI; where they cannot
//! be had, the test says so and is skipped.

use std::path::PathBuf;
use std::process::Output;
use std::sync::OnceLock;
use std::time::Instant;

use super::*;
use crate::support::python::environment;
use crate::support::root;

/// A Python with `openai`, `requests` and `schemathesis`.
fn python() -> Option<&'static Path> {
    static PYTHON: OnceLock<Option<PathBuf>> = OnceLock::new();
    let packages = ["openai~=3.54", "requests", "schemathesis~=4.32"];
    PYTHON.get_or_init(|| environment("python", "openai, requests, schemathesis", &packages)).as_deref()
}

/// Runs a command that must end in time and succeed; its standard output.
pub(super) fn succeed(seconds: u32, command: &[&str], home: &Path) -> String {
    let Output { status, stdout, stderr } = Command::new("timeout")
        .arg(seconds.to_string())
        .args(command)
        .current_dir(home)
        .env_remove("http_proxy")
        .env_remove("HTTP_PROXY")
        .env("NO_PROXY", "*")
        .output()
        .expect("timeout is there");
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}: {status}\n{stdout}\n{stderr}");
    stdout.into_owned()
}

fn program(name: &str) -> String {
    root().join("tests/python").join(name).display().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_recipes_client_and_the_documents_examples_work_unmodified() {
    let home = tempfile::tempdir().expect("a directory");
    let Some(python) = python().and_then(Path::to_str) else { return };
    // The port is written into people's scripts; another checkout's tests may have it just now.
    let patience = Instant::now() + Duration::from_secs(120);
    while let Err(error) = std::net::TcpListener::bind("127.0.0.1:1424") {
        assert!(Instant::now() < patience, "port 1424: {error}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let (folder, wait, ask) = (home.path().to_owned(), program("poll.sh"), program("call_server.py"));
    let recipe = tokio::task::spawn_blocking(move || succeed(120, &["bash", &wait, python, &ask], &folder));
    // It waits for a server that is not there yet.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let server = Server::start_with(|_| ["--no-auth", "--port", "1424"].map(String::from).to_vec());
    let poem = recipe.await.expect("it ends");
    assert!(poem.lines().count() > 2 && !poem.contains("<extra_id"), "{poem}");
    let reply = server
        .generate(json!({"tokens_to_generate": 1024, "end_strings": ["<|endoftext|>", "<extra_id_1>", "\u{11}", "<extra_id_1>User"]}))
        .await;
    assert_eq!(poem, reply.completion().trim_end_matches("<extra_id_1>").to_owned() + "\n");
    examples_work(python, server.home.path());
}

/// What docs/api.md shows, at the port that it names.
fn examples_work(python: &str, home: &Path) {
    let text = std::fs::read_to_string(root().join("docs/api.md")).expect("the document");
    let block = |kind: &str| {
        let (_, rest) = text.split_once(&format!("```{kind}\n")).expect("a block");
        rest.split_once("```").expect("its end").0.to_owned()
    };
    let console = block("console").replace("\\\n", " ");
    let commands: Vec<&str> = console.lines().filter_map(|line| line.strip_prefix("$ curl ")).collect();
    assert!(commands.len() >= 2, "{commands:?}");
    for command in commands {
        let said = succeed(60, &["bash", "-c", &format!("curl -sS --fail-with-body {command}")], home);
        assert!(
            said.contains("\"sentences\":[\"<extra_id_0>") || said.ends_with("data: [DONE]\n\n"),
            "{command}: {said}"
        );
    }
    assert!(!succeed(60, &[python, "-c", &block("python")], home).trim().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_conformance_cases_hold() {
    if Command::new("python3").arg("--version").output().is_err() {
        println!("skipped: there is no python3");
        return;
    }
    let server = Server::start();
    let said = succeed(240, &["python3", &program("conformance.py"), &server.url], server.home.path());
    assert_eq!(said, "all cases hold\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn openais_client_works() {
    let Some(python) = python().and_then(Path::to_str) else { return };
    let server = Server::start_with(|home| {
        let file = home.join("token");
        std::fs::write(&file, "s3cret\n").expect("a token file");
        vec!["--token-file".into(), file.display().to_string()]
    });
    let url = format!("{}/v1", server.url);
    let text = succeed(120, &[python, &program("openai_client.py"), &url, "s3cret"], server.home.path());
    assert!(!text.trim().is_empty());
}

/// `NEMOTRON_TEST_FUZZ_SECONDS` makes it longer.
#[tokio::test(flavor = "multi_thread")]
async fn a_fuzzer_finds_nothing() {
    let Some(python) = python().and_then(Path::to_str) else { return };
    let server = Server::start();
    let (_, document) = server.get("/openapi.json").await;
    let mut document: Value = serde_json::from_str(&document).expect("JSON");
    // Short rows: this is not about speed.
    for (schema, limits) in [
        ("GenerateRequest", &[("tokens_to_generate", 8)][..]),
        ("MegatronRequest", &[("tokens_to_generate", 8)]),
        ("CompletionRequest", &[("max_tokens", 8), ("n", 3)]),
        ("ChatRequest", &[("max_tokens", 8), ("max_completion_tokens", 8), ("n", 3)]),
    ] {
        let schema = &mut document["components"]["schemas"][schema];
        for (field, limit) in limits {
            schema["properties"][field]["maximum"] = json!(limit);
            if *field != "n" {
                schema["required"].as_array_mut().expect("a list").push(json!(field));
            }
        }
    }
    let path = server.home.path().join("openapi.json");
    std::fs::write(&path, document.to_string()).expect("written");
    let checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance";
    let (path, url) = (path.display().to_string(), format!("--url={}", server.url));
    let seconds = std::env::var("NEMOTRON_TEST_FUZZ_SECONDS").unwrap_or_else(|_| "25".into());
    let limit = format!("--max-time={seconds}");
    let mut command = vec![python, "-m", "schemathesis.cli", "run", &path, &url, "--checks", checks];
    command.extend([
        "--max-examples=20",
        &limit,
        "--phases=examples,coverage,fuzzing",
        "--seed=1",
        "--request-timeout=30",
    ]);
    command.extend(["--suppress-health-check=all", "--no-color"]);
    succeed(600, &command, server.home.path());
    server.generate(json!({})).await;
}
