//! Runs on this machine, from the command line to the last process, with the built-in model.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::zero_model::zero_model;

/// Nothing here takes that long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// After a death, everything of the run must have gone by then.
const AFTERMATH: Duration = Duration::from_secs(5);

/// A place for runs of its own. Whatever a test leaves running is killed.
struct World {
    root: TempDir,
}

impl World {
    fn new() -> Self {
        Self { root: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nemotron"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("NEMOTRON_")) {
            command.env_remove(name);
        }
        command.env("NEMOTRON_RUN_ROOT", self.path("runs")).env("HOME", self.root.path());
        // A small cache, so that a start takes a moment.
        command.env("NEMOTRON_KV_TOKENS", "4096");
        command.current_dir(self.root.path()).args(arguments).stdin(Stdio::null());
        command
    }

    fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// The standard output of a command that must succeed.
    fn stdout(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.stdout(arguments)).unwrap()
    }

    /// `nemotron serve` on a free port, once it has printed its URL.
    fn serve(&self, arguments: &[&str]) -> Server<'_> {
        let mut command = self.command(&["serve", "--port", "0"]);
        let mut process = command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut url = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut url).unwrap();
        let mut server = Server { world: self, process, url: url.trim().to_owned() };
        if server.url.is_empty() {
            panic!("not served: {}", server.end().1);
        }
        server
    }

    fn file(&self, run: &str, name: &str) -> PathBuf {
        self.path("runs").join(run).join(name)
    }

    /// Processes of the newest run: its supervisor, then its ranks.
    fn processes(&self) -> Vec<i32> {
        let status = self.json(&["status", "latest", "--json"]);
        let pid = |process: &Value| i32::try_from(process["pid"].as_i64().unwrap()).unwrap();
        let ranks = status["ranks"].as_array().unwrap().iter().map(|rank| pid(&rank["process"]));
        std::iter::once(pid(&status["supervisor"])).chain(ranks).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let runs = fs::read_dir(self.path("runs")).into_iter().flatten().filter_map(Result::ok);
        for run in runs {
            _ = self.command(&["cancel", "--now", &run.file_name().to_string_lossy()]).output();
        }
    }
}

/// A server in the foreground.
struct Server<'a> {
    world: &'a World,
    process: Child,
    url: String,
}

impl Server<'_> {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id() as i32), signal).unwrap();
    }

    /// Exit code (of a signal: `None`) and what it said.
    fn end(&mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        let mut stderr = BufReader::new(self.process.stderr.take().unwrap());
        while stderr.read_line(&mut said).unwrap() > 0 {}
        (self.process.wait().unwrap().code(), said)
    }

    fn generate(&self, prompt: &str) -> Output {
        let arguments = ["generate", "--run", "latest", "--raw", "--tokens-to-generate", "8", "--prompt", prompt];
        self.world.output(&arguments)
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        _ = self.process.kill();
        _ = self.process.wait();
    }
}

/// Waits for what must become true within `limit`.
fn eventually(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Neither running nor waiting to be reaped by someone else.
fn is_gone(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
        || kill(Pid::from_raw(pid), None).is_err()
}

fn all_gone(pids: &[i32]) {
    eventually(AFTERMATH, "all processes gone", || pids.iter().all(|&pid| is_gone(pid)));
}

fn endpoints(world: &World) -> usize {
    let runs = fs::read_dir(world.path("runs")).unwrap();
    runs.filter(|run| run.as_ref().unwrap().path().join("endpoint.json").exists()).count()
}

fn job_file(world: &World, prompts: usize, tokens: usize) -> PathBuf {
    let path = world.path("job.toml");
    let prompts: Vec<_> = (0..prompts).map(|prompt| format!("Shall I compare thee to number {prompt}?")).collect();
    let text = format!(
        "schema = 1\n[input]\nprompts = {prompts:?}\n[output]\npath = \"responses.jsonl\"\n[prompt]\ntemplate = \"raw\"\n\
         [sampling]\ntokens_to_generate = {tokens}\nend_strings = []\n"
    );
    fs::write(&path, text).unwrap();
    path
}

fn responses(world: &World) -> Vec<Value> {
    let text = fs::read_to_string(world.path("responses.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_server_answers_and_drains_on_a_signal() {
    let world = World::new();
    for (signal, arguments) in [(Signal::SIGTERM, &["--tp", "1"]), (Signal::SIGINT, &["--tp", "2"])] {
        let mut server = world.serve(arguments);
        let first = server.generate("Shall I compare thee");
        assert!(first.status.success() && first.stdout.len() > 1, "{first:?}");
        assert_eq!(first.stdout, server.generate("Shall I compare thee").stdout);
        let pids = world.processes();
        server.signal(signal);
        let (code, said) = server.end();
        assert_eq!(code, Some(0), "{said}");
        all_gone(&pids);
        assert_eq!(endpoints(&world), 0);
        assert_eq!(world.json(&["status", "latest", "--json"])["phase"], "DONE");
    }
}

#[test]
fn a_drain_lets_a_request_finish() {
    let world = World::new();
    let mut server = world.serve(&[]);
    let mut client = world.command(&["generate", "--raw", "--tokens-to-generate", "200", "--prompt", "Shall I"]);
    client.args(["--min-tokens-to-generate", "200", "--end-string", "no such string"]);
    let client = client.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    eventually(PATIENCE, "the request runs", || {
        let status = world.json(&["status", "latest", "--json"]);
        assert!(!matches!(status["phase"].as_str(), Some("DONE" | "FAILED")), "{status}");
        status["stats"]["running"].as_u64() > Some(0) || status["stats"]["finished_rows"].as_u64() > Some(0)
    });
    // As `timeout` does: to the command, and again to its process group.
    server.signal(Signal::SIGTERM);
    std::thread::sleep(Duration::from_millis(20));
    server.signal(Signal::SIGTERM);
    let answer = client.wait_with_output().unwrap();
    assert!(answer.status.success() && answer.stdout.len() > 100, "{answer:?}");
    let (code, said) = server.end();
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn the_token_is_asked_for_and_kept_private() {
    let world = World::new();
    let mut server = world.serve(&[]);
    let without = ["generate", "--url", &server.url, "--raw", "--prompt", "a", "--tokens-to-generate", "1"];
    let refused = world.output(&without);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    let endpoint = world.json(&["endpoint", "latest", "--json"]);
    let token_file = endpoint["token_file"].as_str().unwrap();
    let accepted = world.output(&[&without[..], &["--token-file", token_file]].concat());
    assert!(accepted.status.success(), "{accepted:?}");

    let token = fs::read_to_string(token_file).unwrap();
    let shows = |path: String| fs::read(path).is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains(&token));
    for pid in world.processes() {
        assert!(!shows(format!("/proc/{pid}/cmdline")) && !shows(format!("/proc/{pid}/environ")));
    }
    server.signal(Signal::SIGTERM);
    assert!(!server.end().1.contains(&token));
}

#[test]
fn a_killed_rank_ends_the_run_at_once() {
    let world = World::new();
    for victim in 0..2 {
        let mut server = world.serve(&["--tp", "2"]);
        let pids = world.processes();
        let start = Instant::now();
        kill(Pid::from_raw(pids[1 + victim]), Signal::SIGKILL).unwrap();
        let (code, said) = server.end();
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
        assert_eq!(code, Some(25), "{said}");
        assert!(said.contains(&format!("rank {victim} (host ")) && said.contains("was killed by SIGKILL"), "{said}");
        all_gone(&pids);
        assert_eq!(endpoints(&world), 0);
        assert_eq!(world.output(&["wait", "latest", "--for", "done"]).status.code(), Some(25));
    }
}

/// It gets a seventh of the time, as on a host that is busy with something else. The model is large enough for steps that compute.
#[test]
fn a_slow_rank_is_named() {
    let world = World::new();
    let (job, model) = (job_file(&world, 2000, 200), zero_model(world.root.path()));
    let launch = ["launch", "--profile", "cpu", "--tp", "2", "--name", "held-up", "--detach", "--wait", "ready"];
    let work = ["--model", &model, "--set", "limits.max_sequences=4", "--job", job.to_str().unwrap()];
    world.stdout(&[&launch[..], &work].concat());
    let slow = world.processes()[2];
    let warnings = || world.json(&["status", "held-up", "--json"])["warnings"].to_string();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        _ = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                for (signal, pause) in [(Signal::SIGSTOP, 60), (Signal::SIGCONT, 10)] {
                    if kill(Pid::from_raw(slow), signal).is_err() {
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(pause));
                }
            }
        });
        let deadline = Instant::now() + 2 * PATIENCE;
        while !warnings().contains(&format!(", pid {slow}) is slow")) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(200));
        }
        is_over.store(true, Ordering::Relaxed);
    });
    assert!(warnings().contains("times as long as the other ranks of its stage"), "{}", warnings());
    eventually(PATIENCE, "it keeps up again", || warnings() == "null");
    let events = world.stdout(&["events", "held-up"]);
    assert!(events.contains(" warning ") && events.contains(" keeps up"), "{events}");
    world.stdout(&["cancel", "--now", "held-up"]);
}

#[test]
fn a_killed_launcher_leaves_nothing() {
    let world = World::new();
    let mut server = world.serve(&["--tp", "2"]);
    let pids = world.processes();
    server.signal(Signal::SIGKILL);
    server.end();
    all_gone(&pids);
    eventually(AFTERMATH, "endpoint.json removed", || endpoints(&world) == 0);
    let status = world.stdout(&["status", "latest"]);
    assert!(status.contains("FAILED") && status.contains("the supervisor is gone"), "{status}");
}

#[test]
fn a_launcher_killed_while_it_starts_leaves_nothing() {
    let world = World::new();
    let mut launcher = world.command(&["serve", "--port", "0", "--tp", "2"]);
    let mut launcher = launcher.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut pids = Vec::new();
    eventually(PATIENCE, "ranks start", || {
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", launcher.id())).unwrap_or_default();
        pids = children.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
        !pids.is_empty()
    });
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    all_gone(&pids);
    assert_eq!(endpoints(&world), 0);
}

#[test]
fn a_killed_client_does_not_disturb_the_server() {
    let world = World::new();
    let server = world.serve(&[]);
    let mut client = world.command(&["generate", "--raw", "--tokens-to-generate", "400", "--prompt", "Shall I"]);
    let mut client = client.args(["--min-tokens-to-generate", "400"]).stdout(Stdio::null()).spawn().unwrap();
    eventually(PATIENCE, "the request runs", || {
        let stats = world.json(&["status", "latest", "--json"])["stats"].clone();
        stats["running"].as_u64() > Some(0) || stats["finished_rows"].as_u64() > Some(0)
    });
    client.kill().unwrap();
    client.wait().unwrap();
    let answer = server.generate("Shall I compare thee");
    assert!(answer.status.success(), "{answer:?}");
    eventually(PATIENCE, "the cancelled row is gone", || {
        world.json(&["status", "latest", "--json"])["stats"]["running"] == 0
    });
}

#[test]
fn a_port_in_use_is_named_before_anything_is_loaded() {
    let world = World::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let refused = world.output(&["serve", "--port", &port]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(11), "{said}");
    assert!(said.contains(&format!("port {port} is in use")) && !said.contains("LOADING"), "{said}");
    assert!(refused.stdout.is_empty());
}

#[test]
fn the_port_refuses_until_the_model_is_ready() {
    let world = World::new();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let run = world.stdout(&["launch", "--profile", "cpu", "--serve", "--port", &port.to_string(), "--detach"]);
    let run = run.trim();
    let mut connected = false;
    while !connected {
        connected = TcpStream::connect(("127.0.0.1", port)).is_ok();
        let phase = world.json(&["status", run, "--json"])["phase"].clone();
        assert!(phase != "FAILED", "{}", world.stdout(&["logs", run]));
        // Looked at after the connection: the phase may have moved on, but never back.
        assert!(!connected || matches!(phase.as_str(), Some("WARMUP" | "READY")), "connected in {phase}");
    }
}

#[test]
fn a_job_runs_to_its_end() {
    let world = World::new();
    let job = job_file(&world, 5, 6);
    let batch = world.output(&["batch", "--job", job.to_str().unwrap()]);
    assert!(batch.status.success(), "{batch:?}");
    assert!(String::from_utf8_lossy(&batch.stderr).contains("5 rows (0 failed)"), "{batch:?}");
    let first = responses(&world);
    assert_eq!(first.len(), 5);
    assert!(first.iter().enumerate().all(|(row, response)| response["id"] == row), "{first:?}");

    let launched = ["launch", "--profile", "cpu", "--tp", "2", "--job", job.to_str().unwrap(), "--json"];
    let report = world.json(&launched);
    assert_eq!((report["schema"].clone(), report["rows"]["rows_done"].clone()), (1.into(), 5.into()));
    assert_eq!(responses(&world), first, "the text of a row does not depend on the mesh");
}

#[test]
fn a_job_that_is_stopped_says_so() {
    let world = World::new();
    let job = job_file(&world, 200, 200);
    let launched = world.stdout(&["launch", "--profile", "cpu", "--job", job.to_str().unwrap(), "--wait", "ready"]);
    let run = launched.trim();
    world.stdout(&["cancel", run]);
    let waited = world.output(&["wait", run, "--for", "done"]);
    assert_eq!(waited.status.code(), Some(143), "{waited:?}");
    assert_eq!(world.json(&["status", run, "--json"])["phase"], "CANCELLED");
    assert!(!world.path("responses.jsonl").exists());
}

#[test]
fn a_job_with_retries_goes_on_after_a_lost_rank() {
    let world = World::new();
    let job = job_file(&world, 200, 60);
    let undisturbed = world.output(&["batch", "--job", job.to_str().unwrap()]);
    assert!(undisturbed.status.success(), "{undisturbed:?}");
    let expected = responses(&world);
    fs::remove_file(world.path("responses.jsonl")).unwrap();

    let launch = ["launch", "--profile", "cpu", "--tp", "2", "--retries", "2", "--name", "again", "--detach"];
    let few = ["--set", "limits.max_sequences=4", "--job", job.to_str().unwrap()];
    world.stdout(&[&launch[..], &few].concat());
    let status = || world.json(&["status", "again", "--json"]);
    eventually(PATIENCE, "rows are done", || status()["job"]["rows_done"].as_u64() > Some(0));
    kill(Pid::from_raw(world.processes()[2]), Signal::SIGKILL).unwrap();
    eventually(PATIENCE, "another attempt", || status()["attempt"] == 1);
    world.stdout(&["wait", "again", "--for", "done", "--timeout", "60s"]);
    assert_eq!(responses(&world), expected);

    let report: Value = serde_json::from_slice(&fs::read(world.file("again", "report.json")).unwrap()).unwrap();
    let attempts = report["attempts"].as_array().unwrap();
    assert_eq!(attempts.iter().map(|one| one["end"]["exit_code"].as_u64().unwrap()).collect::<Vec<_>>(), [25, 0]);
    let rows: u64 = attempts.iter().map(|one| one["rows"].as_u64().unwrap()).sum();
    // The rows of a killed attempt's last moment are in the journal, but nobody was told.
    assert!(rows > 100 && rows <= 200, "{report}");
    assert_eq!((&report["rows"]["rows_done"], report["nodes_blamed"].as_array().unwrap().len()), (&200.into(), 1));
    assert!(report["device_hours"]["useful"].as_f64() > Some(0.0), "{report}");
    let events = world.stdout(&["events", "again"]);
    assert!(events.contains("handed_on") && events.contains("was killed by SIGKILL"), "{events}");
    for log in ["attempt-000/rank-001.log", "attempt-001/rank-001.log", "REPORT.md"] {
        assert!(world.file("again", log).exists(), "{log}");
    }
}

#[test]
fn a_server_that_nobody_uses_ends() {
    let world = World::new();
    let mut server = world.serve(&["--idle-timeout", "1s"]);
    assert!(server.generate("Shall I").status.success());
    let (code, said) = server.end();
    assert_eq!(code, Some(0), "{said}");
    assert!(world.stdout(&["status", "latest"]).contains("no request came"));
}

#[test]
fn a_detached_run_is_watched_and_cancelled() {
    let world = World::new();
    let launch = ["launch", "--profile", "cpu", "--serve", "--port", "0", "--name", "quiet-owl", "--detach", "--json"];
    let launched = world.json(&launch);
    assert_eq!((launched["schema"].clone(), launched["run"].clone()), (1.into(), "quiet-owl".into()));
    let again = world.output(&launch);
    assert_eq!(again.status.code(), Some(2), "{again:?}");
    world.stdout(&["wait", "quiet", "--for", "ready", "--timeout", "60s"]);
    assert_eq!(world.output(&["wait", "quiet", "--for", "done", "--timeout", "0"]).status.code(), Some(124));

    let url = world.stdout(&["endpoint", "quiet-owl"]);
    let endpoint: Value = serde_json::from_slice(&fs::read(world.file("quiet-owl", "endpoint.json")).unwrap()).unwrap();
    assert_eq!(endpoint["url"], url.trim());
    world.stdout(&["generate", "--raw", "--tokens-to-generate", "2", "--prompt", "Shall"]);

    let status = world.json(&["status", "latest", "--json"]);
    assert_eq!((status["schema"].clone(), status["run"].clone()), (1.into(), "quiet-owl".into()));
    assert!(world.stdout(&["status"]).contains("quiet-owl"));
    let host = status["ranks"][0]["process"]["host"].as_str().unwrap();
    assert!(world.stdout(&["logs", "latest"]).starts_with(&format!("[r00 {host}] ")));
    assert!(!world.stdout(&["logs", "latest", "--rank", "0"]).contains("[r00"));
    assert_eq!(world.output(&["logs", "latest", "--rank", "1"]).status.code(), Some(2));

    let pids = world.processes();
    let follower = world.command(&["events", "quiet-owl", "-f", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
    world.stdout(&["cancel", "quiet-owl"]);
    all_gone(&pids);
    world.stdout(&["wait", "quiet-owl", "--for", "done"]);
    assert_ne!(world.output(&["endpoint", "quiet-owl"]).status.code(), Some(0));
    let followed = String::from_utf8(follower.wait_with_output().unwrap().stdout).unwrap();
    let events: Vec<Value> = followed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let phases: Vec<_> =
        events.iter().filter(|event| event["rank"].is_null()).filter_map(|event| event["phase"].as_str()).collect();
    let expected =
        ["PREFLIGHT", "RENDEZVOUS", "COMM_INIT", "LOADING", "WARMUP", "READY", "DRAINING", "DONE"].map(|phase| {
            phases.iter().position(|&seen| seen == phase).unwrap_or_else(|| panic!("{phase} is not in {phases:?}"))
        });
    assert!(expected.is_sorted(), "{phases:?}");
    check_report(&world.file("quiet-owl", "report.json"));
}

fn check_report(path: &Path) {
    let report: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert_eq!((report["outcome"].clone(), report["exit_code"].clone()), ("DONE".into(), 0.into()));
    assert!(report["generated_tokens"].as_u64() >= Some(2), "{report}");
}

#[test]
fn nothing_starts_in_a_dry_run() {
    let world = World::new();
    let shown = world.stdout(&["launch", "--profile", "cpu", "--serve", "--dry-run"]);
    assert!(shown.contains("[mesh]"), "{shown}");
    // Neither devices nor weights are here.
    let shown = world.stdout(&["launch", "--profile", "h100x16", "--serve", "--dry-run"]);
    assert!(shown.contains("tp = 8") && shown.contains("nemotron-4-340b"), "{shown}");
    assert!(!world.path("runs").exists());
}
