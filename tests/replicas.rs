//! Replicas that share one job, here as processes of this machine; `tests/slurm/replicas.rs` has them as jobs.

use std::fs;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::resume::{Job, PATIENCE, undisturbed};

/// How many rows each replica has done.
pub(super) fn rows_by_replica(status: &Value) -> Vec<u64> {
    let replicas = status["replicas"].as_array().cloned().unwrap_or_default();
    replicas.iter().map(|replica| replica["job"]["rows_done"].as_u64().unwrap_or(0)).collect()
}

#[test]
fn a_replica_that_is_killed_leaves_its_rows_to_the_others() {
    let expected = undisturbed(800, 40);
    let job = Job::new(800, 40);
    let launch = Job::launch(&["--replicas", "2", "--set", "deadlines.lease=2s", "--detach", "--parsable"]);
    assert!(job.expect(0, &launch).starts_with("r\n"));
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        let status = job.status();
        if rows_by_replica(&status).iter().filter(|&&rows| rows > 0).count() == 2 {
            break status;
        }
        assert!(Instant::now() < deadline, "{status}");
    };
    let supervisor = status["replicas"][0]["supervisor"]["pid"].as_i64().unwrap();
    kill(Pid::from_raw(supervisor as i32), Signal::SIGKILL).unwrap();
    job.expect(0, &["wait", "r", "--for", "done", "--timeout", "120s"]);
    assert!(job.output() == expected, "the output differs");
    let said = job.expect(0, &["results", "r", "verify"]);
    assert!(said.contains("800 of 800"), "{said}");
    let status = job.status();
    assert_eq!((&status["phase"], &status["replicas"][0]["phase"]), (&"DONE".into(), &"FAILED".into()), "{status}");
    let stats: Value = serde_json::from_str(&job.run(&["results", "r", "stats", "--json"]).1).unwrap();
    // Rows in flight at the kill are generated again; no row that was done is.
    assert!(stats["stats"]["rows_repeated"].as_u64() <= Some(8), "{stats}");
    assert!(job.expect(2, &["resume", "r"]).contains("run r is done"));
    // What each has of its own is shown for all of them together, and for one by its name.
    let logs = job.expect(0, &["logs", "r"]);
    assert!(logs.contains("[r-0 r00 ") && logs.contains("[r-1 r00 "), "{logs}");
    assert!(!job.expect(0, &["logs", "r-1"]).contains("r-0"));
    let times = job.expect(0, &["events", "r"]);
    let times: Vec<&str> =
        times.lines().map(|line| line.split_once(' ').unwrap().1.split(' ').next().unwrap()).collect();
    assert!(times.is_sorted() && times.len() > 10, "{times:?}");
    let events = job.expect(0, &["events", "r", "--json"]);
    assert!(["r-0", "r-1"].iter().all(|run| events.contains(&format!("\"run\":\"{run}\""))), "{events}");
    let report: Value = serde_json::from_slice(&fs::read(job.path().join("runs/r/report.json")).unwrap()).unwrap();
    assert_eq!((&report["outcome"], &report["rows"]["rows_done"]), (&"DONE".into(), &800.into()), "{report}");
    let ends: Vec<_> = (0..2).map(|replica| &report["replicas"][replica]["outcome"]).collect();
    assert_eq!(ends, ["FAILED", "DONE"], "{report}");
    assert_eq!(report["attempts"].as_array().unwrap().len(), 2);
    let text = fs::read_to_string(job.path().join("runs/r/REPORT.md")).unwrap();
    assert!(text.contains("| r-0 | FAILED |") && text.contains("| r-1, 0 |"), "{text}");
}

#[test]
fn replicas_that_were_all_stopped_are_resumed_together() {
    let job = Job::new(800, 40);
    let mut launcher = job.start(&Job::launch(&["--replicas", "3"]));
    let process = |value: &Value| value["pid"].as_i64().map(|pid| Pid::from_raw(pid as i32));
    let deadline = Instant::now() + PATIENCE;
    let pids = loop {
        let status = job.status();
        let replicas = status["replicas"].as_array().cloned().unwrap_or_default();
        let supervisors = replicas.iter().filter_map(|replica| process(&replica["supervisor"]));
        let ranks = replicas.iter().filter_map(|replica| process(&replica["ranks"][0]["process"]));
        let pids: Vec<Pid> = supervisors.chain(ranks).collect();
        if pids.len() == 6 && rows_by_replica(&status).iter().any(|&rows| rows > 0) {
            break pids;
        }
        assert!(Instant::now() < deadline, "{status}");
    };
    // Ctrl-C ends all of them, and nothing is left.
    kill(Pid::from_raw(launcher.id() as i32), Signal::SIGINT).unwrap();
    assert_eq!(launcher.wait().unwrap().code(), Some(130));
    let deadline = Instant::now() + PATIENCE;
    while pids.iter().any(|pid| kill(*pid, None).is_ok()) {
        assert!(Instant::now() < deadline, "{pids:?}");
    }
    let kept = job.rows_done();
    assert_eq!(job.status()["phase"], "CANCELLED");
    let report: Value = serde_json::from_slice(&fs::read(job.path().join("runs/r/report.json")).unwrap()).unwrap();
    assert_eq!((&report["outcome"], &report["exit_code"]), (&"CANCELLED".into(), &130.into()), "{report}");
    assert!((1..800).contains(&kept), "{kept}");
    job.expect(30, &["results", "r", "verify"]);
    job.expect(0, &["resume", "r"]);
    assert!(job.output() == undisturbed(800, 40));
    job.expect(0, &["results", "r", "verify"]);
    assert!(
        !fs::read_dir(job.path()).unwrap().any(|entry| entry.unwrap().path().extension() == Some("partial".as_ref()))
    );
}
