//! How runs are submitted, start, work and end as they should.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use super::support::{Cluster, LAYOUT, job_file};

const POEM: &str = "Write a poem on NVIDIA in the style of Shakespeare";

/// One test, so that the cluster is there once and goes whatever happens.
#[test]
fn runs_start_and_end() {
    let Some(cluster) = Cluster::up('s', &[]) else { return };
    cluster.run(&[
        ("a server on two nodes", a_server_on_two_nodes),
        ("a job gives what one rank gives", a_job_gives_what_one_rank_gives),
        ("what a launch says", what_a_launch_says),
        ("sixteen ranks", sixteen_ranks),
        ("a refused job", a_refused_job),
        ("a cluster file is written", a_cluster_file_is_written),
        ("a profile for what there is", a_profile_for_what_there_is),
        ("an output has one writer", an_output_has_one_writer),
        ("secrets stay secret", secrets_stay_secret),
        ("a pending run", a_pending_run),
        ("two runs on the same nodes", two_runs_on_the_same_nodes),
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
    // The nodes are given back as soon as the rows are there.
    let written = fs::metadata(home.join("there.jsonl")).unwrap().modified().unwrap();
    cluster.is_free();
    assert!(written.elapsed().unwrap() < Duration::from_secs(15), "{:?}", written.elapsed());
    assert_eq!(cluster.status("job")["phase"], "DONE");
    let texts = |name: &str| fs::read_to_string(home.join(name)).unwrap();
    assert_eq!(texts("there.jsonl").lines().count(), 3);
    assert_eq!(texts("here.jsonl"), texts("there.jsonl"));
}

/// What a launch prints: for people, for scripts, and while it is followed.
fn what_a_launch_says(cluster: &Cluster) {
    let job = |name: &str, more: &[&str]| {
        let file = job_file(cluster.home.path(), &format!("{name}.jsonl"));
        let (code, stdout, stderr) = cluster.launch(name, &[&["--job", &file], more].concat());
        assert_eq!(code, 0, "{stderr}");
        (stdout, stderr)
    };
    let (stdout, stderr) = job("parsable", &["--parsable", "--detach"]);
    assert_eq!((stdout.as_str(), stderr.contains("next: ")), ("parsable\n", false), "{stderr}");
    let (stdout, stderr) = job("json", &["--json", "--wait", "done"]);
    let said: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((said["run"].as_str(), said["job"].to_string()), (Some("json"), cluster.job("json")));
    assert!(stderr.contains("PENDING") || stderr.contains("PREFLIGHT"), "{stderr}");
    let (stdout, stderr) = job("followed", &["--follow"]);
    for expected in ["submitted job ", "joined   r03", "phase    DONE", "ended"] {
        assert!(stdout.contains(expected), "{expected}: {stdout}");
    }
    assert!(stderr.contains("nemotron cancel followed"), "{stderr}");
}

/// The recipe's own layout, with processors in place of devices; and with devices that have no driver.
fn sixteen_ranks(cluster: &Cluster) {
    let start = Instant::now();
    let profile =
        ["launch", "--cluster", "site.toml", "--profile", "h100x16", "--model", "builtin", "--port", "0", "--serve"];
    let on_cpus = ["--name", "sixteen", "--set", "device=cpu", "--wait", "ready"];
    cluster.stdout(&[&profile[..], &on_cpus].concat());
    assert_eq!(cluster.status("sixteen")["ranks"].as_array().unwrap().len(), 16);
    let poem = ["generate", "--prompt", POEM, "--tokens-to-generate", "60", "--run"];
    let of_sixteen = cluster.stdout(&[&poem[..], &["sixteen"]].concat());
    cluster.stdout(&["cancel", "sixteen"]);
    cluster.is_free();
    println!("  launched, ready, poem, cancelled: {:.1} s", start.elapsed().as_secs_f64());

    let one = ["launch", "--profile", "cpu", "--serve", "--detach", "--wait", "ready", "--port", "0", "--name", "one"];
    cluster.stdout(&one);
    let of_one = cluster.stdout(&[&poem[..], &["one"]].concat());
    cluster.stdout(&["cancel", "one"]);
    assert!(of_one.lines().count() > 2, "{of_one}");
    assert_eq!(of_sixteen, of_one);

    let tested = cluster.stdout(&[&profile[..], &["--test-only"]].concat());
    assert!(tested.contains("to start at"), "{tested}");
    let (code, _, stderr) = cluster.nemotron(&[&profile[..], &["--name", "devices", "--wait", "ready"]].concat());
    assert_eq!(code, 23, "{stderr}");
    assert!(stderr.contains("no NVIDIA driver"), "{stderr}");
}

/// What Slurm refuses: its reason, what to do, and nothing left of the run.
fn a_refused_job(cluster: &Cluster) {
    for (more, reason, cure) in [
        ("slurm.partition=nosuch", "invalid partition specified: nosuch", "--partition (slurm.partition)"),
        ("slurm.constraint=nosuch", "Invalid feature specification", "--constraint (slurm.constraint)"),
        ("slurm.reservation=nosuch", "Requested reservation is invalid", "--reservation (slurm.reservation)"),
        ("slurm.extra=--gres=tpu:8", "Invalid generic resource", "slurm.quirks.gpu_request"),
        ("slurm.extra=--no-such-option", "unrecognized option '--no-such-option'", "slurm.extra"),
        ("slurm.quirks.mem=9000G", "Memory specification can not be satisfied", "slurm.quirks.mem"),
        ("slurm.quirks.cpus_per_task=200", "node configuration is not available", "slurm.partition"),
        ("slurm.nodelist=nosuch", "Invalid node name specified", "slurm.nodelist"),
    ] {
        let (code, _, stderr) = cluster.launch("refused", &["--serve", "--set", more]);
        assert_eq!(code, 12, "{more}: {stderr}");
        assert!(stderr.contains(reason) && stderr.contains("help: ") && stderr.contains(cure), "{more}: {stderr}");
        assert!(!cluster.file("refused", "").exists(), "{more}");
    }
}

/// A profile is chosen for the devices of a partition, of which Slurm has so many.
fn a_profile_for_what_there_is(cluster: &Cluster) {
    let auto = ["--profile", "auto", "--cluster", "site.toml"];
    let (code, stdout, stderr) =
        cluster.nemotron(&[&["plan"], &auto[..2], &["--set", "cluster=site.toml", "--json"]].concat());
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("profile h100x16: partition ") && stderr.contains("has 2 nodes with 8 x "), "{stderr}");
    assert_eq!(serde_json::from_str::<Value>(&stdout).unwrap()["profile"], "h100x16");
    let serve = ["--serve", "--model", "nemotron-4-340b"];
    let (code, script, stderr) = cluster.nemotron(&[&["render"], &auto[..], &serve].concat());
    assert_eq!(code, 0, "{stderr}");
    let kind = cluster.nodes[0].trim_end_matches("-01");
    assert!(script.contains(&format!("#SBATCH --gpus-per-node={kind}:8")), "{script}");
    let (_, explained, _) = cluster.nemotron(&[&["render"], &auto[..], &serve, &["--explain"]].concat());
    assert!(
        explained.lines().any(|line| line.starts_with("profile ") && line.ends_with("--profile auto")),
        "{explained}"
    );
    // One node is too little, and that is said.
    cluster.slurm(&format!("scontrol update nodename={} state=drain reason=test", cluster.nodes[1]));
    let (code, _, stderr) = cluster.nemotron(&[&["render"], &auto[..], &serve].concat());
    cluster.slurm(&format!("scontrol update nodename={} state=resume", cluster.nodes[1]));
    assert_eq!(code, 10, "{stderr}");
    assert!(stderr.contains("has 1 node with 8 x ") && stderr.contains("h100x16 (2 x 8 x H100-80GB)"), "{stderr}");
}

/// What `clusters init` writes works as it is.
fn a_cluster_file_is_written(cluster: &Cluster) {
    cluster.stdout(&["clusters", "init", "-o", "written.toml"]);
    let text = fs::read_to_string(cluster.home.path().join("written.toml")).unwrap();
    assert!(text.contains("gpus_per_node = 8") && text.contains("sacct = false"), "{text}");
    let tested = ["launch", "--cluster", "written.toml", "--profile", "h100x16", "--model", "builtin", "--serve"];
    assert!(cluster.stdout(&[&tested[..], &["--test-only"]].concat()).contains("to start at"));
}

/// Two runs do not write the same rows.
fn an_output_has_one_writer(cluster: &Cluster) {
    let file = job_file(cluster.home.path(), "shared.jsonl");
    let node = &cluster.nodes[0];
    cluster.slurm(&format!("scontrol update nodename={node} state=drain reason=test"));
    let first = cluster.launch("first", &["--job", &file]);
    let second = cluster.launch("second", &["--job", &file]);
    let again = cluster.launch("first", &["--serve"]);
    cluster.stdout(&["cancel", "first"]);
    cluster.slurm(&format!("scontrol update nodename={node} state=resume"));
    // Slurm may not take a job whose nodes are drained; that is told by its reason.
    assert!(first.0 == 0 || first.2.contains("node configuration"), "{first:?}");
    assert_eq!(second.0, 11, "{second:?}");
    assert!(second.2.contains("run first writes to") && second.2.contains("nemotron cancel first"), "{second:?}");
    assert!(again.0 == 2 && again.2.contains("a run named first exists already"), "{again:?}");
    assert!(!cluster.file("second", "").exists());
}

/// The run's token, a secret by name, and what else the shell has, are in no file, no argument and no answer of Slurm's.
fn secrets_stay_secret(cluster: &Cluster) {
    const SECRET: &str = "canary-5ec4e7";
    const STRAY: &str = "canary-57a4ed";
    let site = "schema = 1\n[slurm]\ntime = '00:30:00'\n[secrets]\nnames = ['HF_TOKEN']\n";
    fs::write(cluster.home.path().join("secret.toml"), site).unwrap();
    let mut command = crate::support::nemotron(cluster.home.path());
    command.env("NEMOTRON_KV_TOKENS", "4096").env("HF_TOKEN", SECRET).env("OTHER_TOKEN", STRAY).arg("-vv");
    command.args(["launch", "--cluster", "secret.toml", "--name", "secret", "--serve", "--wait", "ready"]).args(LAYOUT);
    let (code, stdout, stderr) = cluster.command(&mut command);
    assert_eq!(code, 0, "{stderr}");
    let token = fs::read_to_string(cluster.file("secret", "token")).unwrap();
    let found =
        |text: &str| [SECRET, STRAY, &token].into_iter().find(|secret| text.contains(secret)).map(str::to_owned);
    assert_eq!(found(&format!("{stdout}{stderr}")), None);
    // The ranks have what they were promised, and nothing else.
    let environment = fs::read_to_string(format!("/proc/{}/environ", cluster.pid("secret", 3))).unwrap();
    assert!(environment.contains(&format!("HF_TOKEN={SECRET}")) && !environment.contains(STRAY));
    for process in fs::read_dir("/proc").unwrap() {
        let arguments = fs::read(process.unwrap().path().join("cmdline")).unwrap_or_default();
        assert_eq!(found(&String::from_utf8_lossy(&arguments)), None);
    }
    cluster.stdout(&["generate", "--run", "secret", "--raw", "--tokens-to-generate", "2", "--prompt", "O"]);
    for command in
        [&["status", "secret"][..], &["events", "secret", "--json"], &["logs", "secret"], &["endpoint", "secret"]]
    {
        assert_eq!(found(&cluster.stdout(command)), None, "{command:?}");
    }
    assert_eq!(found(&cluster.slurm(&format!("scontrol show job {}", cluster.job("secret")))), None);
    cluster.stdout(&["cancel", "secret"]);
    assert_eq!(fs::metadata(cluster.file("secret", "")).unwrap().mode() & 0o777, 0o700);
    let (mut folders, mut files) = (vec![cluster.file("secret", "")], 0);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            files += 1;
            let name = path.file_name().unwrap().to_str().unwrap();
            let mode = fs::metadata(&path).unwrap().mode() & 0o777;
            match name {
                "token" | "secrets.env" => assert_eq!(mode, 0o600, "{name}"),
                _ => assert_eq!(found(&String::from_utf8_lossy(&fs::read(&path).unwrap())), None, "{name}"),
            }
        }
    }
    assert!(files > 10, "{files}");
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

/// They share hosts, and neither ports, nor tokens, nor an end.
fn two_runs_on_the_same_nodes(cluster: &Cluster) {
    let runs = ["left", "right"];
    for run in runs {
        let (code, _, stderr) = cluster.launch(run, &["--serve"]);
        assert_eq!(code, 0, "{stderr}");
    }
    let endpoints = runs.map(|run| {
        cluster.stdout(&["wait", run, "--for", "ready", "--timeout", "60"]);
        serde_json::from_str::<Value>(&cluster.stdout(&["endpoint", run, "--json"])).unwrap()
    });
    let text = |endpoint: &Value, key: &str| endpoint[key].as_str().unwrap().to_owned();
    let generate = ["generate", "--raw", "--tokens-to-generate", "4", "--prompt", "O", "--url"];
    for (own, other) in [(0, 1), (1, 0)] {
        let (url, token) = (text(&endpoints[own], "url"), text(&endpoints[own], "token_file"));
        cluster.stdout(&[&generate[..], &[&url, "--token-file", &token]].concat());
        let token = text(&endpoints[other], "token_file");
        let (code, _, stderr) = cluster.nemotron(&[&generate[..], &[&url, "--token-file", &token]].concat());
        assert!(code == 2 && stderr.contains("does not accept this token"), "{code}: {stderr}");
    }
    // A rank that dies is missed by its own run alone.
    kill(cluster.pid("left", 3), Signal::SIGKILL).unwrap();
    assert_eq!(cluster.nemotron(&["wait", "left", "--for", "done", "--timeout", "60"]).0, 25);
    assert_eq!(cluster.status("right")["phase"], "READY");
    cluster.stdout(&["generate", "--run", "right", "--raw", "--tokens-to-generate", "4", "--prompt", "O"]);
    cluster.stdout(&["cancel", "right"]);
    let report = fs::read_to_string(cluster.file("right", "REPORT.md")).unwrap();
    assert!(report.contains("it was cancelled: what was asked has been answered"), "{report}");
}
