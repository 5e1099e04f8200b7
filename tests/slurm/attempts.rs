//! Jobs that lose their nodes, their time or their ranks go on, and end with the bytes of an undisturbed run.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::support::{Cluster, LAYOUT, PATIENCE};

/// Partitions of which one takes nodes from the other, after a while in which it may end by itself.
const PREEMPTION: &str = "PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=10
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
";

/// One test, so that the cluster is there once and goes whatever happens.
#[test]
fn jobs_go_on() {
    let extra = tempfile::NamedTempFile::new().unwrap();
    fs::write(&extra, PREEMPTION).unwrap();
    let options = ["--extra", extra.path().to_str().unwrap(), "--requeue-delay", "1", "--kill-wait", "2"];
    let Some(cluster) = Cluster::up('a', &options) else { return };
    cluster.run(&[
        ("a time limit", a_time_limit),
        ("a chain of jobs", a_chain_of_jobs),
        ("nodes that are taken away", nodes_that_are_taken_away),
        ("ranks that are lost", ranks_that_are_lost),
        ("a run that does not get on", a_run_that_does_not_get_on),
        ("a server that nobody uses", a_server_that_nobody_uses),
    ]);
}

/// A job in the cluster's home, and what it gives undisturbed.
struct Work {
    file: String,
    output: PathBuf,
    expected: Vec<u8>,
}

impl Work {
    fn new(cluster: &Cluster, name: &str, rows: usize, tokens: usize) -> Self {
        let home = cluster.home.path();
        let lines = (0..rows).map(|row| format!("{{\"id\":\"r{row}\",\"prompt\":\"Sing of {row}.\"}}\n"));
        fs::write(home.join(format!("{name}.jsonl")), lines.collect::<String>()).unwrap();
        let write = |output: &str| {
            let job = format!(
                "schema = 1\n[input]\npath = '{name}.jsonl'\n[output]\npath = '{output}'\n[prompt]\ntemplate = 'raw'\n[sampling]\n\
                 tokens_to_generate = {tokens}\nmin_tokens_to_generate = {tokens}\ngreedy = false\nend_strings = []\n"
            );
            let path = home.join(format!("{output}.toml"));
            fs::write(&path, job).unwrap();
            (path.to_str().unwrap().to_owned(), home.join(output))
        };
        let (undisturbed, expected) = write(&format!("{name}-undisturbed"));
        cluster.stdout(&["batch", "--job", &undisturbed]);
        let (file, output) = write(&format!("{name}-out"));
        Self { file, output, expected: fs::read(expected).unwrap() }
    }

    fn launch(&self, cluster: &Cluster, run: &str, more: &[&str]) {
        // Without a port, which a job has none of.
        let layout = &LAYOUT[..10];
        let common = ["launch", "--cluster", "site.toml", "--name", run, "--job", &self.file];
        cluster.stdout(&[&common[..], layout, more].concat());
    }

    #[track_caller]
    fn is_whole(&self, cluster: &Cluster, run: &str) {
        let (code, _, stderr) = cluster.nemotron(&["wait", run, "--for", "done", "--timeout", "120"]);
        assert_eq!(code, 0, "{stderr}");
        assert!(fs::read(&self.output).unwrap() == self.expected, "the output differs");
        cluster.stdout(&["results", run, "verify"]);
    }
}

fn wait_until(cluster: &Cluster, run: &str, what: &str, holds: impl Fn(&Value) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = cluster.status(run);
        if holds(&status) {
            return;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}: {status}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until an attempt has completed rows.
fn wait_for_rows(cluster: &Cluster, run: &str, attempt: u64) {
    wait_until(cluster, run, "rows are done", |status| {
        let (done, kept) = (&status["job"]["rows_done"], &status["job"]["rows_kept"]);
        status["attempt"] == attempt && status["phase"] == "BUSY" && done.as_u64() > kept.as_u64()
    });
}

fn report(cluster: &Cluster, run: &str) -> Value {
    serde_json::from_slice(&fs::read(cluster.file(run, "report.json")).unwrap()).unwrap()
}

/// Exit codes of the attempts of a run that has ended.
fn codes(report: &Value) -> Vec<u64> {
    report["attempts"].as_array().unwrap().iter().map(|one| one["end"]["exit_code"].as_u64().unwrap()).collect()
}

fn kill_rank(cluster: &Cluster, run: &str, rank: usize) {
    let pid = cluster.status(run)["ranks"][rank]["process"]["pid"].as_i64().unwrap();
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();
}

/// The shortest that Slurm has; the rows need longer. Whoever resumes it may take other ranks and more time.
fn a_time_limit(cluster: &Cluster) {
    let work = Work::new(cluster, "limit", 1200, 200);
    work.launch(cluster, "limit", &["--time", "1", "--set", "limits.max_sequences=1"]);
    let (code, _, stderr) = cluster.nemotron(&["wait", "limit", "--for", "done", "--timeout", "90"]);
    assert_eq!(code, 30, "{stderr}");
    assert!(stderr.contains("the time is over") && stderr.contains("nemotron resume limit"), "{stderr}");
    let ended = report(cluster, "limit");
    let seconds = ended["phases"].as_array().unwrap().iter().filter_map(|span| span["seconds"].as_f64());
    assert!(seconds.sum::<f64>() < 60.0, "{ended}");
    assert!(cluster.last_words("limit").contains("device-hours"), "{}", cluster.last_words("limit"));
    cluster.is_free();

    let one_rank = ["--tp", "1", "--pp", "1", "--set", "nodes=1", "--set", "devices_per_node=1"];
    let resume = ["resume", "limit", "--time", "30", "--set", "limits.max_sequences=32", "--wait", "ready"];
    cluster.stdout(&[&resume[..], &one_rank].concat());
    work.is_whole(cluster, "limit");
    let report = report(cluster, "limit");
    assert_eq!(codes(&report), [30, 0]);
    assert!(report["rows"]["rows_kept"].as_u64() > Some(0), "{report}");
}

fn a_chain_of_jobs(cluster: &Cluster) {
    // Many short rows, so that even a slow machine completes some in each job, and a fast one not all.
    let work = Work::new(cluster, "chain", 3000, 10);
    work.launch(cluster, "chain", &["--chain", "60", "--set", "job.deadline=7s", "--set", "limits.max_sequences=1"]);
    work.is_whole(cluster, "chain");
    let report = report(cluster, "chain");
    let codes = codes(&report);
    let (last, before) = codes.split_last().unwrap();
    assert!(*last == 0 && !before.is_empty() && before.iter().all(|&code| code == 30), "{codes:?}");
    let jobs: Vec<u64> = report["attempts"].as_array().unwrap().iter().filter_map(|one| one["job"].as_u64()).collect();
    assert!(jobs.len() == codes.len() && jobs.is_sorted_by(|a, b| a < b), "a job each: {jobs:?}");
    let text = fs::read_to_string(cluster.file("chain", "REPORT.md")).unwrap();
    assert!(text.contains("| 30 | the time is over: "), "{text}");
}

/// Preempted, requeued by hand, a node down, held: each time with the same job, until it is held; then with another.
fn nodes_that_are_taken_away(cluster: &Cluster) {
    let work = Work::new(cluster, "taken", 600, 100);
    let common = ["--partition", "low", "--set", "slurm.requeue=true", "--set", "slurm.exclusive=true"];
    work.launch(cluster, "taken", &[&common[..], &["--set", "limits.max_sequences=4"]].concat());
    let job = cluster.job("taken");
    let back = |attempt| {
        wait_until(cluster, "taken", "it is pending", |status| status["phase"] == "PENDING");
        let deadline = Instant::now() + PATIENCE;
        let update = format!("scontrol update jobid={job} starttime=now");
        // Slurm itself would wait for two minutes.
        while cluster.status("taken")["phase"] == "PENDING" {
            assert!(Instant::now() < deadline, "{}", cluster.slurm("squeue"));
            let mut words = update.split(' ');
            _ = cluster.command(std::process::Command::new(words.next().unwrap()).args(words));
            std::thread::sleep(Duration::from_millis(200));
        }
        wait_for_rows(cluster, "taken", attempt);
    };
    wait_for_rows(cluster, "taken", 0);
    let script = cluster.home.path().join("urgent.sh");
    fs::write(&script, "#!/bin/sh\nsleep 1\n").unwrap();
    let urgent = format!("sbatch --partition=high --nodes=2 --exclusive --output=/dev/null {}", script.display());
    cluster.slurm(&urgent);
    back(1);
    cluster.slurm(&format!("scontrol requeue {job}"));
    back(2);
    cluster.slurm(&format!("scontrol update nodename={} state=down reason=test", cluster.nodes[1]));
    wait_until(cluster, "taken", "it has lost its nodes", |status| status["phase"] != "BUSY");
    cluster.slurm(&format!("scontrol update nodename={} state=idle", cluster.nodes[1]));
    back(3);
    cluster.slurm(&format!("scontrol requeuehold {job}"));
    wait_until(cluster, "taken", "it is held", |status| {
        status["note"].as_str().is_some_and(|note| note.contains("it will not start by itself"))
    });
    cluster.stdout(&["resume", "taken"]);
    assert_ne!(cluster.job("taken"), job);
    work.is_whole(cluster, "taken");
    let report = report(cluster, "taken");
    assert_eq!(codes(&report), [30, 30, 25, 30, 0]);
    let causes: Vec<_> = report["attempts"].as_array().unwrap().iter().map(|one| one["end"]["cause"].clone()).collect();
    for (cause, words) in causes.iter().zip(["to another job", "back into the queue", "lost a node", "back into the"]) {
        assert!(cause.as_str().unwrap().contains(words), "{causes:?}");
    }
}

/// The first time on the same nodes, the second time with another job, which cannot avoid the node: there are no others.
fn ranks_that_are_lost(cluster: &Cluster) {
    let work = Work::new(cluster, "lost", 400, 100);
    work.launch(cluster, "lost", &["--retries", "3", "--set", "limits.max_sequences=4"]);
    let first = cluster.job("lost");
    for attempt in 0..2 {
        wait_for_rows(cluster, "lost", attempt);
        assert_eq!(cluster.job("lost"), first);
        kill_rank(cluster, "lost", 3);
    }
    work.is_whole(cluster, "lost");
    assert_ne!(cluster.job("lost"), first);
    let report = report(cluster, "lost");
    assert_eq!(codes(&report), [25, 25, 0]);
    let [blamed] = report["nodes_blamed"].as_array().unwrap().as_slice() else { panic!("{report}") };
    assert_eq!((blamed["node"].as_str(), blamed["attempt"].as_u64()), (Some(cluster.nodes[1].as_str()), Some(1)));
    assert!(cluster.file("lost", "attempt-000/rank-003.log").exists(), "the logs of each attempt are kept");
}

fn a_run_that_does_not_get_on(cluster: &Cluster) {
    let work = Work::new(cluster, "stuck", 2, 4);
    work.launch(cluster, "stuck", &["--retries", "9", "--set", "deadlines.rendezvous=0.001s"]);
    let (code, _, stderr) = cluster.nemotron(&["wait", "stuck", "--for", "done", "--timeout", "60"]);
    assert_eq!(code, 33, "{stderr}");
    assert!(stderr.contains("two attempts in a row completed no row"), "{stderr}");
    assert_eq!(codes(&report(cluster, "stuck")).len(), 2);
}

fn a_server_that_nobody_uses(cluster: &Cluster) {
    let (code, _, stderr) = cluster.launch("idle", &["--serve", "--idle-timeout", "2s", "--wait", "done"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(cluster.last_words("idle").contains("no request came"), "{}", cluster.last_words("idle"));
}
