//! What goes wrong around a run is found in time, named, and leaves nothing behind.

use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::support::{Cluster, PATIENCE, frozen};

/// One test, so that the cluster is there once and goes whatever happens.
#[test]
fn faults_are_found_and_named() {
    let Some(cluster) = Cluster::up('f', &[]) else { return };
    cluster.run(&[
        ("a killed rank", a_killed_rank),
        ("a node that starts no rank", a_node_that_starts_no_rank),
        ("a start is cancelled by hand", a_start_is_cancelled_by_hand),
        ("a silent controller", a_silent_controller),
    ]);
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
