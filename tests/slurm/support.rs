//! A real Slurm cluster of a test's own, brought up on this machine: see `tests/slurm-cluster`.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{finish, nemotron, root};

/// Two nodes with two ranks each, without devices.
pub(super) const LAYOUT: [&str; 12] = [
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
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// What a test does on a cluster.
pub(super) type Scenario = fn(&Cluster);

/// A cluster of our own. Dropping it leaves nothing behind.
pub(super) struct Cluster {
    pub(super) dir: PathBuf,
    pub(super) nodes: [String; 2],
    pub(super) home: TempDir,
}

impl Cluster {
    /// `None`, with a line that says why, where there can be no Slurm. `letter` tells the clusters of one test process apart; `options`
    /// are further ones of `slurm-cluster up`.
    pub(super) fn up(letter: char, options: &[&str]) -> Option<Self> {
        if !geteuid().is_root() {
            println!("skipped: nodes with networks of their own need root");
            return None;
        }
        let name = format!("{letter}{}x", std::process::id());
        let cluster = Self {
            dir: PathBuf::from(format!("/tmp/nemotron-slurm-{letter}{}", std::process::id())),
            nodes: [1, 2].map(|number| format!("{name}-{number:02}")),
            home: tempfile::tempdir().unwrap(),
        };
        // The feature says what the devices are.
        let nodes = format!("{name}=2x8:h100+gpu80g");
        let up = cluster.script(&[&["up", "--net", "netns", "--nodes", &nodes], options].concat());
        if !up.status.success() {
            println!("skipped: no Slurm: {}", String::from_utf8_lossy(&up.stderr));
            return None;
        }
        fs::write(cluster.home.path().join("site.toml"), "schema = 1\n[slurm]\ntime = '00:30:00'\n").unwrap();
        Some(cluster)
    }

    /// Runs every scenario, each on a cluster where no job is left, and fails if one of them did.
    pub(super) fn run(&self, scenarios: &[(&str, Scenario)]) {
        let mut failed = Vec::new();
        for (name, scenario) in scenarios {
            let start = Instant::now();
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                scenario(self);
                self.is_free();
            }));
            let word = if outcome.is_ok() { "ok" } else { "FAILED" };
            println!("{name}: {word} in {:.1} s", start.elapsed().as_secs_f64());
            if outcome.is_err() {
                failed.push(*name);
                _ = self.command(Command::new("scancel").arg("--user=root"));
            }
        }
        assert!(failed.is_empty(), "{failed:?}");
    }

    pub(super) fn script(&self, arguments: &[&str]) -> Output {
        let mut script = Command::new(root().join("tests/slurm-cluster"));
        script.args(arguments).arg("--dir").arg(&self.dir).output().unwrap()
    }

    pub(super) fn command(&self, program: &mut Command) -> (i32, String, String) {
        finish(program.env("SLURM_CONF", self.dir.join("etc/slurm.conf")))
    }

    /// A command of Slurm's that must succeed.
    pub(super) fn slurm(&self, line: &str) -> String {
        let mut words = line.split(' ');
        let (code, stdout, stderr) = self.command(Command::new(words.next().unwrap()).args(words));
        assert_eq!(code, 0, "{line}: {stderr}");
        stdout
    }

    pub(super) fn nemotron(&self, arguments: &[&str]) -> (i32, String, String) {
        let mut command = nemotron(self.home.path());
        // A small cache, so that many runs fit.
        command.env("NEMOTRON_KV_TOKENS", "4096").args(arguments);
        self.command(&mut command)
    }

    /// The standard output of a command that must succeed.
    pub(super) fn stdout(&self, arguments: &[&str]) -> String {
        let (code, stdout, stderr) = self.nemotron(arguments);
        assert_eq!(code, 0, "{arguments:?}: {stdout}{stderr}");
        stdout
    }

    pub(super) fn launch(&self, name: &str, more: &[&str]) -> (i32, String, String) {
        let common = ["launch", "--cluster", "site.toml", "--name", name];
        self.nemotron(&[&common[..], &LAYOUT, more].concat())
    }

    pub(super) fn status(&self, run: &str) -> Value {
        serde_json::from_str(&self.stdout(&["status", run, "--json"])).unwrap()
    }

    pub(super) fn file(&self, run: &str, name: &str) -> PathBuf {
        self.home.path().join("runs").join(run).join(name)
    }

    pub(super) fn job(&self, run: &str) -> String {
        let text = fs::read_to_string(self.file(run, "job.json")).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["id"].to_string()
    }

    /// What the batch script said last.
    pub(super) fn last_words(&self, run: &str) -> String {
        fs::read_to_string(self.file(run, &format!("slurm-{}.log", self.job(run)))).unwrap()
    }

    pub(super) fn daemon(&self, name: &str, signal: Signal) {
        let pid = fs::read_to_string(self.dir.join(format!("run/{name}.pid"))).unwrap();
        kill(Pid::from_raw(pid.trim().parse().unwrap()), signal).unwrap();
    }

    /// Ids of the processes that have the run's directory among their arguments.
    pub(super) fn processes(&self, run: &str) -> Vec<i32> {
        let run_dir = self.file(run, "").display().to_string();
        let of_run = |pid: &i32| {
            let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            arguments.split('\0').any(|argument| argument == run_dir.trim_end_matches('/'))
        };
        let pids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        pids.filter(of_run).collect()
    }

    /// Process id of a rank.
    pub(super) fn pid(&self, run: &str, rank: usize) -> Pid {
        let pid = self.status(run)["ranks"][rank]["process"]["pid"].as_i64().unwrap();
        Pid::from_raw(i32::try_from(pid).unwrap())
    }

    /// Waits until no job holds anything.
    pub(super) fn is_free(&self) {
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
pub(super) fn frozen(cluster: &Cluster, daemon: &str, scenario: impl FnOnce()) {
    cluster.daemon(daemon, Signal::SIGSTOP);
    let outcome = catch_unwind(AssertUnwindSafe(scenario));
    cluster.daemon(daemon, Signal::SIGCONT);
    outcome.unwrap();
}

/// Runs while the second node sees something else where `path` is; `mount` says what.
pub(super) fn covered(cluster: &Cluster, mount: &str, path: &Path, scenario: impl FnOnce()) {
    let node = fs::read_to_string(cluster.dir.join(format!("run/slurmd-{}.pid", cluster.nodes[1]))).unwrap();
    let on_node = |line: &str| {
        let mut command = Command::new("nsenter");
        command.args(["-t", node.trim(), "-m"]).args(line.split(' ')).arg(path);
        assert_eq!(finish(&mut command).0, 0, "{command:?}");
    };
    on_node(mount);
    let outcome = catch_unwind(AssertUnwindSafe(scenario));
    on_node("umount");
    outcome.unwrap();
}

/// Runs while the second node sees an empty folder where `path` is: a mount that is missing there.
pub(super) fn hidden(cluster: &Cluster, path: &Path, scenario: impl FnOnce()) {
    covered(cluster, "mount -t tmpfs none", path, scenario);
}

/// A job file in `folder` with three short prompts, whose rows go to `output` beside it.
pub(super) fn job_file(folder: &Path, output: &str) -> String {
    let path = folder.join(format!("{output}.toml"));
    let text = format!(
        "schema = 1\n[input]\nprompts = ['Shall I', 'When in', 'O thou']\n[output]\npath = '{output}'\n[prompt]\n\
         template = 'raw'\n[sampling]\ntokens_to_generate = 6\nend_strings = []\n"
    );
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}
