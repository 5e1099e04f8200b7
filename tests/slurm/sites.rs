//! What a site's own ways do to runs: prologs, memory limits, and nodes that may not submit.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::support::{Cluster, LAYOUT, PATIENCE, job_file};
use crate::support::zero_model::zero_model;

/// Waits for Slurm's own requeueing, which takes minutes on a busy machine.
const REQUEUES: &str = "NEMOTRON_TEST_REQUEUES";

#[test]
fn sites_have_their_ways() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    // A host whose name stands in this file is not prepared.
    script(Path::new(&path("prolog")), &format!("! grep -qs \"^$(hostname)$\" {}", path("unprepared")));
    fs::write(path("extra"), format!("Prolog={}\nSelectTypeParameters=CR_Core_Memory\n", path("prolog"))).unwrap();
    let cgroups = "CgroupPlugin=cgroup/v1\nConstrainDevices=no\nConstrainCores=no\nConstrainRAMSpace=yes\nConstrainSwapSpace=yes\n";
    fs::write(path("cgroup.conf"), cgroups).unwrap();
    let options = ["--cgroup", "--etc", &path("cgroup.conf"), "--extra", &path("extra"), "--requeue-delay", "1"];
    let Some(cluster) = Cluster::up('w', &options) else { return };
    fs::write(cluster.home.path().join("unprepared-list"), path("unprepared")).unwrap();
    cluster.run(&[("a prolog that fails", a_prolog_that_fails), ("too little memory", too_little_memory)]);
    if std::env::var_os(REQUEUES).is_some() {
        cluster.run(&[("nodes that may not submit", nodes_that_may_not_submit)]);
    }
}

fn script(path: &Path, text: &str) {
    fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Slurm cancels the job as if its user had; srun knows better.
fn a_prolog_that_fails(cluster: &Cluster) {
    let second = &cluster.nodes[1];
    let list = fs::read_to_string(cluster.home.path().join("unprepared-list")).unwrap();
    fs::write(&list, format!("{second}\n")).unwrap();
    let (code, _, stderr) = cluster.launch("unprepared", &["--serve", "--wait", "ready"]);
    fs::remove_file(&list).unwrap();
    // Slurm has drained the node.
    cluster.is_free();
    cluster.slurm(&format!("scontrol update nodename={second} state=resume"));
    assert_eq!(code, 21, "{stderr}");
    let who = format!("rank 2 (host {second}) could not be started: Job prolog failed");
    assert!(stderr.contains(&who), "{who}: {stderr}");
}

fn too_little_memory(cluster: &Cluster) {
    let model = zero_model(cluster.home.path());
    let little = ["--serve", "--model", &model, "--set", "slurm.quirks.mem=150M", "--wait", "ready"];
    let (code, _, stderr) = cluster.launch("little", &little);
    assert_eq!(code, 25, "{stderr}");
    for words in ["Out Of Memory", "(host ", "slurm.quirks.mem"] {
        assert!(stderr.contains(words), "{words}: {stderr}");
    }
}

/// The job that shall follow is refused, so Slurm starts the same one again.
fn nodes_that_may_not_submit(cluster: &Cluster) {
    let fake = cluster.home.path().join("fake");
    fs::create_dir_all(&fake).unwrap();
    script(&fake.join("sbatch"), "echo 'sbatch: error: jobs are submitted on login nodes' >&2; exit 1");
    let path = format!("env.set.PATH={}:/usr/bin:/bin", fake.display());
    let job = job_file(cluster.home.path(), "chained.jsonl");
    let rows = (0..3000).map(|row| format!("{{\"id\":\"r{row}\",\"prompt\":\"Sing of {row}.\"}}\n"));
    fs::write(cluster.home.path().join("rows.jsonl"), rows.collect::<String>()).unwrap();
    let text = fs::read_to_string(&job).unwrap();
    let prompts = text.lines().find(|line| line.starts_with("prompts")).unwrap();
    fs::write(&job, text.replace(prompts, "path = 'rows.jsonl'")).unwrap();
    let common = ["launch", "--cluster", "site.toml", "--name", "chained", "--job", &job, "--chain", "60"];
    let short =
        ["--set", "job.deadline=7s", "--set", "limits.max_sequences=1", "--set", "slurm.requeue=true", "--set", &path];
    // Without a port, which a job has none of.
    cluster.stdout(&[&common[..], &LAYOUT[..10], &short].concat());
    let id = cluster.job("chained");
    let deadline = Instant::now() + 2 * PATIENCE;
    while cluster.status("chained")["phase"] != "DONE" {
        let queue = || cluster.slurm("squeue") + &cluster.slurm("sinfo -N");
        assert!(Instant::now() < deadline, "{}{}", cluster.stdout(&["events", "chained"]), queue());
        // Slurm itself would wait for two minutes.
        _ = cluster.command(Command::new("scontrol").args(["update", &format!("jobid={id}"), "starttime=now"]));
        std::thread::sleep(Duration::from_millis(500));
    }
    assert_eq!(cluster.job("chained"), id, "there is one job");
    assert_eq!(fs::read_to_string(cluster.home.path().join("chained.jsonl")).unwrap().lines().count(), 3000);
    let report: Value = serde_json::from_slice(&fs::read(cluster.file("chained", "report.json")).unwrap()).unwrap();
    assert!(report["attempts"].as_array().unwrap().len() > 1, "{report}");
    let events = cluster.stdout(&["events", "chained"]);
    let refused = "no job could be submitted that goes on";
    assert!(events.contains(refused) && events.contains("submitted on login nodes"), "{events}");
    cluster.stdout(&["results", "chained", "verify"]);
}
