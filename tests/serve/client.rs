//! `nemotron generate` against a server.

use std::process::Output;

use super::*;

impl Server {
    /// Runs the client with `stdin`.
    fn client(&self, arguments: &[&str], stdin: &str) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_nemotron"))
            .args(["generate", "--url", &self.url])
            .args(arguments)
            .env("HOME", self.home.path())
            .env("NEMOTRON_RUN_ROOT", self.home.path().join("runs"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        // A client that ends early does not read it.
        let _ = child.stdin.take().expect("piped").write_all(stdin.as_bytes());
        child.wait_with_output().expect("it ends")
    }

    fn said(&self, arguments: &[&str], stdin: &str) -> String {
        let Output { status, stdout, stderr } = self.client(arguments, stdin);
        assert!(status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&stderr));
        String::from_utf8(stdout).expect("text")
    }
}

#[tokio::test]
async fn one_prompt_is_completed_in_every_way() {
    let server = Server::start();
    let prompt = "Write a poem on NVIDIA in the style of Shakespeare";
    let poem = server.said(&["--prompt", prompt], "");
    let ends = json!({"tokens_to_generate": 1024, "end_strings": ["<|endoftext|>", "<extra_id_1>", "\u{11}", "<extra_id_1>User"]});
    let reply = server.generate(ends).await;
    assert_eq!(poem, format!("{}\n", reply.completion().trim_end_matches("<extra_id_1>")));
    assert_eq!(server.said(&[], &format!("{prompt}\n")), poem, "stdin");
    assert_eq!(server.said(&["--raw", "--prompt", PROMPT], ""), poem, "raw");
    assert_eq!(server.said(&["--stream", "--prompt", prompt], ""), poem, "streamed");
    std::fs::write(server.home.path().join("plain.jinja"), "{{ messages[-1].content }}").expect("a template");
    let template = server.home.path().join("plain.jinja").display().to_string();
    assert_eq!(server.said(&["--template", &template, "--prompt", PROMPT], ""), poem, "a template of one's own");
    assert_ne!(server.said(&["--system", "Be brief.", "--prompt", prompt], ""), poem, "a system text");
    let sampled =
        ["--greedy=false", "--random-seed", "7", "--top-k", "9", "--tokens-to-generate", "20", "--prompt", prompt];
    assert_eq!(server.said(&[&sampled[..], &["--stream"]].concat(), ""), server.said(&sampled, ""), "sampled");
}

#[tokio::test]
async fn several_prompts_are_answered_in_order() {
    let server = Server::start();
    let prompts: Vec<String> = (0..40).map(|index| format!("Verse {index}")).collect();
    let arguments = ["--raw", "--tokens-to-generate", "6", "--json", "--concurrency", "8"];
    let said = server.said(&[&arguments[..], &["--lines"]].concat(), &prompts.join("\n"));
    let answers: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(answers.iter().map(|answer| answer["prompt"].as_str().expect("a prompt")).collect::<Vec<_>>(), prompts);
    let alone = server.said(&["--raw", "--tokens-to-generate", "6", "--prompt", &prompts[33]], "");
    assert_eq!(format!("{}\n", answers[33]["response"].as_str().expect("a text")), alone);
    assert!(answers.iter().all(|answer| answer["schema"] == 1
        && ["stop", "length"].contains(&answer["finish_reason"].as_str().expect("a reason"))));
    let two = server.said(&[&arguments[..], &["--prompt", &prompts[3], "--prompt", "-"]].concat(), &prompts[33]);
    assert_eq!(two.lines().collect::<Vec<_>>(), [3, 33].map(|index| said.lines().nth(index).expect("a line")));
    assert_eq!(server.said(&["--lines"], ""), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_says_what_went_wrong() {
    let mut server = Server::start();
    for (arguments, code, words) in [
        (&["--prompt", "a", "--greedy=false", "--temperature", "0"][..], 2, "temperature must be a positive number"),
        (&["--raw", "--prompt", ""], 2, "Empty prompts require add_BOS=true"),
        (&["--prompt", &"word ".repeat(3000), "--stream"], 2, "context"),
        (&["--prompt", "a", "--stream", "--json"], 2, "cannot be used with"),
        (&["--prompt", "a", "--concurrency", "0"], 2, "--concurrency"),
        (&["--prompt", "a", "--template", "nowhere.jinja"], 2, "nowhere.jinja"),
    ] {
        let Output { status, stdout, stderr } = server.client(arguments, "");
        let stderr = String::from_utf8_lossy(&stderr);
        assert_eq!((status.code(), stdout.as_slice()), (Some(code), &b""[..]), "{arguments:?}: {stderr}");
        assert!(stderr.starts_with("error: ") && stderr.contains(words), "{arguments:?}: {stderr}");
    }
    // Killed in the middle of an answer.
    let long = [
        "--raw",
        "--tokens-to-generate",
        "900",
        "--min-tokens-to-generate",
        "900",
        "--end-string",
        "never",
        "--prompt",
        "a",
    ];
    for extra in [None, Some("--stream")] {
        let arguments: Vec<&str> = long.into_iter().chain(extra).collect();
        let output = std::thread::scope(|scope| {
            let asking = scope.spawn(|| server.client(&arguments, ""));
            tokio::task::block_in_place(|| {
                tokio::runtime::Handle::current().block_on(server.wait_for_metric("nemotron_rows_running 1"));
            });
            for pid in server.processes().into_iter().rev() {
                kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it runs");
            }
            asking.join().expect("it ends")
        });
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("the connection to http://127.0.0.1:"), "{stderr}");
        server.child.wait().expect("it ends");
        // The rank that listens may take a moment longer to go.
        while TcpStream::connect(server.address()).is_ok() {
            std::thread::sleep(Duration::from_millis(10));
        }
        let absent = server.client(&["--prompt", "a"], "");
        let stderr = String::from_utf8_lossy(&absent.stderr);
        assert!(absent.status.code() == Some(1) && stderr.contains("nothing answers at"), "{stderr}");
        server = Server::start();
    }
}
