//! Runs on a real Slurm with two nodes, brought up for this test on this machine: see `tests/slurm-cluster`.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use serde_json::Value;
use tempfile::TempDir;

use super::support::{finish, nemotron, root};

/// Two nodes with two ranks each, without devices.
const LAYOUT: [&str; 12] = [
    "--profile",
    "cpu",
    "--set",
    "tp=2",
    "--set",
    "pp=2",
    "--set",
    "nodes=2",
    "--set",
    "devices_per_node=2",
    "--port",
    "0",
];
/// Nothing takes so long, even when this machine stalls for a while.
const PATIENCE: Duration = Duration::from_secs(60);

/// A cluster of our own. Dropping it leaves nothing behind.
struct Cluster {
    dir: PathBuf,
    nodes: [String; 2],
    home: TempDir,
}

impl Cluster {
    /// `None`, with a line that says why, where there can be no Slurm.
    fn up() -> Option<Self> {
        if !geteuid().is_root() {
            println!("skipped: nodes with networks of their own need root");
            return None;
        }
        let name = format!("n{}x", std::process::id());
        let cluster = Self {
            dir: PathBuf::from(format!("/tmp/nemotron-slurm-{}", std::process::id())),
            nodes: [1, 2].map(|number| format!("{name}-{number:02}")),
            home: tempfile::tempdir().unwrap(),
        };
        let up = cluster.script(&["up", "--net", "netns", "--nodes", &format!("{name}=2x8")]);
        if !up.status.success() {
            println!("skipped: no Slurm: {}", String::from_utf8_lossy(&up.stderr));
            return None;
        }
        fs::write(cluster.home.path().join("site.toml"), "schema = 1\n[slurm]\ntime = '00:30:00'\n").unwrap();
        Some(cluster)
    }

    fn script(&self, arguments: &[&str]) -> Output {
        let mut script = Command::new(root().join("tests/slurm-cluster"));
        script.args(arguments).arg("--dir").arg(&self.dir).output().unwrap()
    }

    fn command(&self, program: &mut Command) -> (i32, String, String) {
        finish(program.env("SLURM_CONF", self.dir.join("etc/slurm.conf")))
    }

    /// A command of Slurm's that must succeed.
    fn slurm(&self, line: &str) -> String {
        let mut words = line.split(' ');
        let (code, stdout, stderr) = self.command(Command::new(words.next().unwrap()).args(words));
        assert_eq!(code, 0, "{line}: {stderr}");
        stdout
    }

    fn nemotron(&self, arguments: &[&str]) -> (i32, String, String) {
        let mut command = nemotron(self.home.path());
        // A small cache, so that many runs fit.
        command.env("NEMOTRON_KV_TOKENS", "4096").args(arguments);
        self.command(&mut command)
    }

    /// The standard output of a command that must succeed.
    fn stdout(&self, arguments: &[&str]) -> String {
        let (code, stdout, stderr) = self.nemotron(arguments);
        assert_eq!(code, 0, "{arguments:?}: {stdout}{stderr}");
        stdout
    }

    fn launch(&self, name: &str, more: &[&str]) -> (i32, String, String) {
        let common = ["launch", "--cluster", "site.toml", "--name", name];
        self.nemotron(&[&common[..], &LAYOUT, more].concat())
    }

    fn status(&self, run: &str) -> Value {
        serde_json::from_str(&self.stdout(&["status", run, "--json"])).unwrap()
    }

    fn file(&self, run: &str, name: &str) -> PathBuf {
        self.home.path().join("runs").join(run).join(name)
    }

    fn job(&self, run: &str) -> String {
        let text = fs::read_to_string(self.file(run, "job.json")).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["id"].to_string()
    }

    /// What the batch script said last.
    fn last_words(&self, run: &str) -> String {
        fs::read_to_string(self.file(run, &format!("slurm-{}.log", self.job(run)))).unwrap()
    }

    fn daemon(&self, name: &str, signal: Signal) {
        let pid = fs::read_to_string(self.dir.join(format!("run/{name}.pid"))).unwrap();
        kill(Pid::from_raw(pid.trim().parse().unwrap()), signal).unwrap();
    }

    /// Waits until no job holds anything.
    fn is_free(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.slurm("squeue --noheader").is_empty() {
            assert!(Instant::now() < deadline, "jobs are left: {}", self.slurm("squeue"));
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        _ = self.script(&["down"]);
    }
}

/// Runs while a daemon stands still.
fn frozen(cluster: &Cluster, daemon: &str, scenario: impl FnOnce()) {
    cluster.daemon(daemon, Signal::SIGSTOP);
    let outcome = catch_unwind(AssertUnwindSafe(scenario));
    cluster.daemon(daemon, Signal::SIGCONT);
    outcome.unwrap();
}

type Scenario = fn(&Cluster);

/// One test, so that the cluster is there once and goes whatever happens.
#[test]
fn runs_on_a_real_slurm() {
    let Some(cluster) = Cluster::up() else { return };
    let scenarios: [(&str, Scenario); 9] = [
        ("a server on two nodes", a_server_on_two_nodes),
        ("a job gives what one rank gives", a_job_gives_what_one_rank_gives),
        ("sixteen ranks", sixteen_ranks),
        ("a killed rank", a_killed_rank),
        ("a refused job", a_refused_job),
        ("a pending run", a_pending_run),
        ("a node that starts no rank", a_node_that_starts_no_rank),
        ("a start is cancelled by hand", a_start_is_cancelled_by_hand),
        ("a silent controller", a_silent_controller),
    ];
    let mut failed = Vec::new();
    for (name, scenario) in scenarios {
        let start = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            scenario(&cluster);
            cluster.is_free();
        }));
        println!("{name}: {} in {:.1} s", if outcome.is_ok() { "ok" } else { "FAILED" }, start.elapsed().as_secs_f64());
        if outcome.is_err() {
            failed.push(name);
            _ = cluster.command(Command::new("scancel").arg("--user=root"));
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}

fn a_server_on_two_nodes(cluster: &Cluster) {
    let (code, stdout, stderr) = cluster.launch("serve", &["--serve", "--wait", "ready"]);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(stdout.trim(), format!("serve {}", cluster.job("serve")));
    let hosts: Vec<Value> = cluster.status("serve")["ranks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|rank| rank["process"]["host"].clone())
        .collect();
    let [first, second] = &cluster.nodes;
    assert_eq!(hosts, [first.as_str(), first, second, second]);
    let generate = ["generate", "--run", "serve", "--raw", "--tokens-to-generate", "8", "--prompt", "Shall I"];
    assert!(cluster.stdout(&generate).len() > 1);
    let token = fs::read_to_string(cluster.file("serve", "token")).unwrap();
    assert!(!fs::read_to_string(cluster.file("serve", "job.sbatch")).unwrap().contains(&token));
    cluster.stdout(&["cancel", "serve"]);
    assert_eq!(cluster.status("serve")["phase"], "DONE");
    assert!(!cluster.file("serve", "endpoint.json").exists() && cluster.file("serve", "report.json").exists());
}

fn job_file(folder: &Path, output: &str) -> String {
    let path = folder.join(format!("{output}.toml"));
    let text = format!(
        "schema = 1\n[input]\nprompts = ['Shall I', 'When in', 'O thou']\n[output]\npath = '{output}'\n[prompt]\n\
         template = 'raw'\n[sampling]\ntokens_to_generate = 6\nend_strings = []\n"
    );
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

fn a_job_gives_what_one_rank_gives(cluster: &Cluster) {
    let home = cluster.home.path();
    let here = job_file(home, "here.jsonl");
    cluster.stdout(&["batch", "--job", &here]);
    let there = job_file(home, "there.jsonl");
    let (code, _, stderr) = cluster.launch("job", &["--job", &there, "--wait", "done"]);
    assert_eq!(code, 0, "{stderr}");
    let texts = |name: &str| fs::read_to_string(home.join(name)).unwrap();
    assert_eq!(texts("there.jsonl").lines().count(), 3);
    assert_eq!(texts("here.jsonl"), texts("there.jsonl"));
}

/// The recipe's own layout, with processors in place of devices; and with devices that have no driver.
fn sixteen_ranks(cluster: &Cluster) {
    let profile =
        ["launch", "--cluster", "site.toml", "--profile", "h100x16", "--model", "builtin", "--port", "0", "--serve"];
    let on_cpus = ["--name", "sixteen", "--set", "device=cpu", "--wait", "ready"];
    cluster.stdout(&[&profile[..], &on_cpus].concat());
    assert_eq!(cluster.status("sixteen")["ranks"].as_array().unwrap().len(), 16);
    cluster.stdout(&["cancel", "sixteen"]);

    let tested = cluster.stdout(&[&profile[..], &["--test-only"]].concat());
    assert!(tested.contains("to start at"), "{tested}");
    let (code, _, stderr) = cluster.nemotron(&[&profile[..], &["--name", "devices", "--wait", "ready"]].concat());
    assert_eq!(code, 23, "{stderr}");
    assert!(stderr.contains("no CUDA driver is installed"), "{stderr}");
}

fn a_killed_rank(cluster: &Cluster) {
    assert_eq!(cluster.launch("killed", &["--serve", "--wait", "ready"]).0, 0);
    let pid = cluster.status("killed")["ranks"][3]["process"]["pid"].as_i64().unwrap();
    let start = Instant::now();
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();
    let (code, _, stderr) = cluster.nemotron(&["wait", "killed", "--for", "done", "--timeout", "30"]);
    assert_eq!(code, 25, "{stderr}");
    let who = format!("rank 3 (host {}, pid {pid})", cluster.nodes[1]);
    assert!(stderr.contains(&who) && cluster.last_words("killed").contains(&who), "{stderr}");
    cluster.is_free();
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
}

fn a_refused_job(cluster: &Cluster) {
    let (code, _, stderr) = cluster.launch("refused", &["--serve", "--partition", "nosuch"]);
    assert_eq!(code, 12, "{stderr}");
    assert!(stderr.contains("invalid partition specified: nosuch") && stderr.contains("help: `sinfo -s`"), "{stderr}");
    assert!(!cluster.file("refused", "").exists());
}

fn a_pending_run(cluster: &Cluster) {
    let script = cluster.home.path().join("blocker.sh");
    fs::write(&script, "#!/bin/sh\nexec sleep 60\n").unwrap();
    let blocker =
        cluster.slurm(&format!("sbatch --parsable --nodes=2 --exclusive --output=/dev/null {}", script.display()));
    let (code, _, stderr) = cluster.launch("pending", &["--serve", "--set", "slurm.exclusive=true"]);
    assert_eq!(code, 0, "{stderr}");
    let status = cluster.status("pending");
    assert_eq!(status["phase"], "PENDING", "{status}");
    assert!(status["note"].as_str().unwrap().contains(&format!("job {} waits", cluster.job("pending"))), "{status}");
    cluster.stdout(&["cancel", "pending"]);
    assert_eq!(cluster.status("pending")["phase"], "CANCELLED");
    assert_eq!(cluster.nemotron(&["wait", "pending", "--for", "done"]).0, 143);
    cluster.slurm(&format!("scancel {}", blocker.trim()));
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
