//! What a site with accounts refuses.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use super::support::{Cluster, PATIENCE};

/// Also where its packages are not there yet: to install them takes a minute.
const INSTALL: &str = "NEMOTRON_TEST_ACCOUNTS";

#[test]
fn accounts_are_asked_for() {
    let is_there = |program: &str| Command::new(program).arg("-V").output().is_ok();
    if std::env::var_os(INSTALL).is_none() && !(is_there("mariadbd") && is_there("slurmdbd")) {
        println!("skipped: no accounting database here; {INSTALL}=1 installs one");
        return;
    }
    let extra = tempfile::NamedTempFile::new().unwrap();
    fs::write(&extra, "MinJobAge=2\n").unwrap();
    let Some(cluster) = Cluster::up('k', &["--acct", "--extra", extra.path().to_str().unwrap()]) else { return };
    cluster.run(&[("what is refused", what_is_refused), ("how a job ended", how_a_job_ended)]);
}

fn what_is_refused(cluster: &Cluster) {
    cluster.slurm("sacctmgr --immediate modify user root where account=test set MaxWall=20");
    for (more, words) in [
        (&["-A", "nosuch"][..], &["Invalid account or account/partition combination", "--account (slurm.account)"][..]),
        (&["-A", "test", "--qos", "nosuch"], &["Invalid qos specification", "--qos (slurm.qos)"]),
        (
            &["-A", "test", "--time", "30"],
            &["would never start", "AssocMaxWallDurationPerJobLimit", "sacctmgr show associations"],
        ),
    ] {
        let (code, _, stderr) = cluster.launch("refused", &[&["--serve"], more].concat());
        assert_eq!(code, 12, "{more:?}: {stderr}");
        for word in words {
            assert!(stderr.contains(word), "{more:?}: {word}: {stderr}");
        }
        assert!(!cluster.file("refused", "").exists(), "{more:?}");
        cluster.is_free();
    }
    cluster.stdout(&["clusters", "init", "-o", "written.toml"]);
    let text = fs::read_to_string(cluster.home.path().join("written.toml")).unwrap();
    assert!(text.contains("account = \"root\"") && !text.contains("sacct = false"), "{text}");
}

/// By the books, when neither a supervisor nor the queue knows: it waited, was cancelled and forgotten.
fn how_a_job_ended(cluster: &Cluster) {
    for node in &cluster.nodes {
        cluster.slurm(&format!("scontrol update nodename={node} state=drain reason=test"));
    }
    let (code, _, stderr) = cluster.launch("forgotten", &["-A", "test", "--time", "10", "--serve"]);
    assert_eq!(code, 0, "{stderr}");
    let job = cluster.job("forgotten");
    cluster.slurm(&format!("scancel {job}"));
    for node in &cluster.nodes {
        cluster.slurm(&format!("scontrol update nodename={node} state=resume"));
    }
    let deadline = Instant::now() + 2 * PATIENCE;
    while cluster.command(Command::new("scontrol").args(["show", "job", &job])).0 == 0 {
        assert!(Instant::now() < deadline, "Slurm forgets no job");
        std::thread::sleep(Duration::from_secs(1));
    }
    let (code, _, stderr) = cluster.nemotron(&["wait", "forgotten", "--for", "done", "--timeout", "30"]);
    assert_eq!(code, 143, "{stderr}");
    assert!(stderr.contains("was cancelled") && stderr.contains("its supervisor never started"), "{stderr}");
}
