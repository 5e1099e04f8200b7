//! How runs are submitted, start, work and end as they should.

use std::fs;

use serde_json::Value;

use super::support::{Cluster, job_file};

/// One test, so that the cluster is there once and goes whatever happens.
#[test]
fn runs_start_and_end() {
    let Some(cluster) = Cluster::up('s', &[]) else { return };
    cluster.run(&[
        ("a server on two nodes", a_server_on_two_nodes),
        ("a job gives what one rank gives", a_job_gives_what_one_rank_gives),
        ("sixteen ranks", sixteen_ranks),
        ("a refused job", a_refused_job),
        ("a pending run", a_pending_run),
    ]);
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
