//! What goes wrong around a run is found in time, named, and leaves nothing behind.

use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::support::{Cluster, PATIENCE, frozen};
use crate::support::zero_model::zero_model;

/// One test, so that the cluster is there once and goes whatever happens.
#[test]
fn faults_are_found_and_named() {
    let Some(cluster) = Cluster::up('f', &[]) else { return };
    cluster.run(&[
        ("a killed rank", a_killed_rank),
        ("a node that starts no rank", a_node_that_starts_no_rank),
        ("a start is cancelled by hand", a_start_is_cancelled_by_hand),
        ("a silent controller", a_silent_controller),
        ("a start is cancelled at any time", a_start_is_cancelled_at_any_time),
        ("a start is cancelled while it loads", a_start_is_cancelled_while_it_loads),
        ("a server is cancelled by hand", a_server_is_cancelled_by_hand),
        ("a node that dies", a_node_that_dies),
        ("a node without its network", a_node_without_its_network),
        ("a slurmd that is killed", a_slurmd_that_is_killed),
    ]);
}

/// On a cluster of its own, because it takes half a minute to be sure that a rank stands still.
#[test]
fn a_stopped_rank_is_found_and_named() {
    let Some(cluster) = Cluster::up('p', &[]) else { return };
    cluster.run(&[("a stopped rank", |cluster| {
        assert_eq!(cluster.launch("stopped", &["--serve", "--wait", "ready"]).0, 0);
        let pid = cluster.pid("stopped", 3);
        let start = Instant::now();
        kill(pid, Signal::SIGSTOP).unwrap();
        let who = format!("rank 3 (host {}, pid {pid})", cluster.nodes[1]);
        let took = ends_with(cluster, "stopped", 26, &who, start);
        assert!(took < Duration::from_secs(40), "{took:?}");
    })]);
}

/// The run ends with this exit code and names this; how long that took.
fn ends_with(cluster: &Cluster, run: &str, exit: i32, who: &str, start: Instant) -> Duration {
    let (code, _, stderr) = cluster.nemotron(&["wait", run, "--for", "done", "--timeout", "60"]);
    let took = start.elapsed();
    assert_eq!(code, exit, "{stderr}");
    assert!(stderr.contains(who), "{who}: {stderr}");
    assert!(!cluster.file(run, "endpoint.json").exists());
    took
}

fn a_killed_rank(cluster: &Cluster) {
    assert_eq!(cluster.launch("killed", &["--serve", "--wait", "ready"]).0, 0);
    let pid = cluster.pid("killed", 3);
    let start = Instant::now();
    kill(pid, Signal::SIGKILL).unwrap();
    let who = format!("rank 3 (host {}, pid {pid})", cluster.nodes[1]);
    ends_with(cluster, "killed", 25, &who, start);
    assert!(cluster.last_words("killed").contains(&who));
    cluster.is_free();
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
}

fn a_node_that_starts_no_rank(cluster: &Cluster) {
    let [_, second] = &cluster.nodes;
    frozen(cluster, &format!("slurmd-{second}"), || {
        let late = ["--serve", "--set", "deadlines.rendezvous=3s", "--wait", "ready"];
        let (code, _, stderr) = cluster.launch("late", &late);
        assert_eq!(code, 21, "{stderr}");
        let missing = format!("missing: rank 2 (host {second}), rank 3 (host {second})");
        assert!(stderr.contains(&missing), "{stderr}");
    });
}

fn a_start_is_cancelled_by_hand(cluster: &Cluster) {
    frozen(cluster, &format!("slurmd-{}", cluster.nodes[1]), || {
        assert_eq!(cluster.launch("scancelled", &["--serve"]).0, 0);
        let deadline = Instant::now() + PATIENCE;
        while cluster.status("scancelled")["phase"] != "RENDEZVOUS" {
            assert!(Instant::now() < deadline, "{}", cluster.status("scancelled"));
            std::thread::sleep(Duration::from_millis(50));
        }
        // Slurm itself cannot end a job on a node that does not answer, so the node answers from here on.
        cluster.slurm(&format!("scancel {}", cluster.job("scancelled")));
    });
    let (code, _, stderr) = cluster.nemotron(&["wait", "scancelled", "--for", "done", "--timeout", "30"]);
    assert_eq!(code, 143, "{stderr}");
    assert_eq!(cluster.status("scancelled")["phase"], "CANCELLED");
}

fn a_silent_controller(cluster: &Cluster) {
    assert_eq!(cluster.launch("unheard", &["--serve", "--wait", "ready"]).0, 0);
    frozen(cluster, "slurmctld", || {
        assert_eq!(cluster.status("unheard")["phase"], "READY");
        // A run whose supervisor is not heard either: its state is not known, and that is said.
        let unknown = cluster.file("unknown", "");
        fs::create_dir(&unknown).unwrap();
        for name in ["run.lock.toml", "token", "job.json"] {
            fs::copy(cluster.file("unheard", name), unknown.join(name)).unwrap();
        }
        let status = cluster.stdout(&["status", "unknown"]);
        assert!(status.contains("scheduler unreachable, last seen"), "{status}");
        fs::remove_dir_all(unknown).unwrap();
    });
    cluster.stdout(&["cancel", "unheard"]);
}

/// Whatever the run is doing, Slurm's own cancellation ends it soon, and nothing is left.
fn a_start_is_cancelled_at_any_time(cluster: &Cluster) {
    for (number, pause) in [0, 100, 200, 300, 500, 900].into_iter().enumerate() {
        let run = format!("cancelled-{number}");
        let sixteen =
            ["launch", "--cluster", "site.toml", "--profile", "h100x16", "--set", "device=cpu", "--port", "0"];
        let (code, _, stderr) =
            cluster.nemotron(&[&sixteen[..], &["--serve", "--model", "builtin", "--name", &run]].concat());
        assert_eq!(code, 0, "{stderr}");
        std::thread::sleep(Duration::from_millis(pause));
        let phase = cluster.status(&run)["phase"].clone();
        let start = Instant::now();
        cluster.slurm(&format!("scancel {}", cluster.job(&run)));
        cluster.is_free();
        let took = start.elapsed();
        println!("  {phase}: {:.1} s", took.as_secs_f64());
        assert!(took < Duration::from_secs(5), "{phase}: {took:?}");
        let (code, _, stderr) = cluster.nemotron(&["wait", &run, "--for", "done", "--timeout", "30"]);
        assert_eq!(code, 143, "{phase}: {stderr}");
        assert_eq!(cluster.processes(&run), [0; 0], "{phase}");
        assert!(!cluster.file(&run, "endpoint.json").exists(), "{phase}");
    }
}

/// One rank stands still while it reads its weights, so that there is time to look.
fn a_start_is_cancelled_while_it_loads(cluster: &Cluster) {
    let model = zero_model(cluster.home.path());
    assert_eq!(cluster.launch("loading", &["--serve", "--model", &model]).0, 0);
    let start = Instant::now();
    let snapshot = || serde_json::from_slice(&fs::read(cluster.file("loading", "status.json")).ok()?).ok();
    let pid = loop {
        let status: Value = snapshot().unwrap_or_default();
        if status["phase"] == "LOADING" {
            break Pid::from_raw(status["ranks"][3]["process"]["pid"].as_i64().unwrap() as i32);
        }
        assert!(start.elapsed() < PATIENCE && status["phase"] != "READY", "it was never seen to load: {status}");
        std::thread::sleep(Duration::from_millis(2));
    };
    kill(pid, Signal::SIGSTOP).unwrap();
    let start = Instant::now();
    let shown = loop {
        let (shown, events) = (cluster.stdout(&["status", "loading"]), cluster.stdout(&["events", "loading"]));
        // The others have read theirs.
        if shown.contains("rank 3 is slowest at ") && events.contains(" loaded ") {
            assert!(events.lines().any(|line| line.contains(" loaded ") && line.contains(" GB/s")), "{events}");
            break shown;
        }
        assert!(start.elapsed() < Duration::from_secs(15) && shown.contains("LOADING"), "{shown}");
        std::thread::sleep(Duration::from_millis(50));
    };
    assert!(shown.contains(" GB, ") && shown.contains(" GB/s"), "{shown}");
    let start = Instant::now();
    cluster.slurm(&format!("scancel {}", cluster.job("loading")));
    cluster.is_free();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    println!("  {}: {:.1} s", shown.lines().next().unwrap_or_default(), start.elapsed().as_secs_f64());
    ends_with(cluster, "loading", 143, "the job was cancelled: the ranks were still starting", start);
    assert_eq!(cluster.processes("loading"), [0; 0]);
}

/// Whoever did that did not ask for a success.
fn a_server_is_cancelled_by_hand(cluster: &Cluster) {
    assert_eq!(cluster.launch("taken", &["--serve", "--wait", "ready"]).0, 0);
    let start = Instant::now();
    cluster.slurm(&format!("scancel {}", cluster.job("taken")));
    ends_with(cluster, "taken", 143, "run taken is CANCELLED: the job was cancelled", start);
    let report = fs::read_to_string(cluster.file("taken", "REPORT.md")).unwrap();
    assert!(report.contains("CANCELLED") && report.contains("the job was cancelled"), "{report}");
}

fn a_node_that_dies(cluster: &Cluster) {
    let [_, second] = &cluster.nodes;
    assert_eq!(cluster.launch("dead", &["--serve", "--wait", "ready"]).0, 0);
    let start = Instant::now();
    // Power is gone: slurmd and everything that it started.
    assert!(cluster.script(&["node", "crash", second]).status.success());
    let took = ends_with(cluster, "dead", 25, &format!("(host {second}, pid "), start);
    assert!(took < Duration::from_secs(15), "{took:?}");
    assert!(cluster.script(&["node", "start", second]).status.success());
}

fn a_node_without_its_network(cluster: &Cluster) {
    let [_, second] = &cluster.nodes;
    assert_eq!(cluster.launch("cut", &["--serve", "--wait", "ready"]).0, 0);
    let start = Instant::now();
    assert!(cluster.script(&["node", "cut", second]).status.success());
    // The supervisor's own connections notice: Slurm would need minutes.
    let took = ends_with(cluster, "cut", 25, &format!("(host {second}, pid "), start);
    assert!(took < Duration::from_secs(15), "{took:?}");
    // Nor do the ranks behind the cut outlive it.
    let deadline = Instant::now() + PATIENCE;
    while !cluster.processes("cut").is_empty() {
        assert!(Instant::now() < deadline, "{:?}", cluster.processes("cut"));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(cluster.script(&["node", "heal", second]).status.success());
}

/// Its tasks live on: a restart in time harms nobody, and a slurmd that stays away ends the run before Slurm does.
fn a_slurmd_that_is_killed(cluster: &Cluster) {
    let [_, second] = &cluster.nodes;
    let warnings = |run: &str| cluster.status(run)["warnings"].as_array().cloned().unwrap_or_default();
    let within_15_s = |what: &str, holds: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < Duration::from_secs(15), "{what}: {}", cluster.status("upgraded"));
            std::thread::sleep(Duration::from_millis(100));
        }
        println!("  {what}: {:.1} s", start.elapsed().as_secs_f64());
    };
    let node = |action: &str| assert!(cluster.script(&["node", action, second]).status.success());
    let generate = ["generate", "--run", "upgraded", "--raw", "--tokens-to-generate", "4", "--prompt", "O"];

    assert_eq!(cluster.launch("upgraded", &["--serve", "--wait", "ready"]).0, 0);
    node("kill");
    let gone = format!("slurmd on {second} is gone");
    within_15_s("the loss is seen", &|| !warnings("upgraded").is_empty());
    let shown = cluster.stdout(&["status", "upgraded"]);
    // Half of the cluster's SlurmdTimeout.
    assert!(shown.contains(&format!("warning: {gone}")) && shown.contains("not back within 1m00s"), "{shown}");
    assert!(cluster.stdout(&generate).len() > 1);
    node("start");
    within_15_s("the return is seen", &|| warnings("upgraded").is_empty());
    let events = cluster.stdout(&["events", "upgraded"]);
    assert!(events.contains(&gone) && events.contains(&format!("slurmd on {second} is back")), "{events}");
    assert!(cluster.stdout(&generate).len() > 1);
    cluster.stdout(&["cancel", "upgraded"]);
    assert_eq!(cluster.status("upgraded")["phase"], "DONE");

    assert_eq!(cluster.launch("abandoned", &["--serve", "--set", "deadlines.slurmd=2s", "--wait", "ready"]).0, 0);
    let start = Instant::now();
    node("kill");
    let took = ends_with(cluster, "abandoned", 25, &format!("slurmd on {second} has been gone for 2s"), start);
    assert!(took < Duration::from_secs(15), "{took:?}");
    let report: Value = serde_json::from_slice(&fs::read(cluster.file("abandoned", "report.json")).unwrap()).unwrap();
    assert_eq!(report["nodes_blamed"][0]["node"], second.as_str(), "{report}");
    node("start");
}
