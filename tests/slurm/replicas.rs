//! Replicas of one job, each a job of Slurm's on a node of its own.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Instant;

use super::support::{Cluster, PATIENCE, job_file};
use crate::replicas::rows_by_replica;
use crate::support::nemotron;

#[test]
fn two_replicas_share_a_job_and_one_is_killed() {
    let Some(cluster) = Cluster::up('w', &[]) else { return };
    cluster.run(&[
        ("two replicas, one killed", two_replicas_one_killed),
        ("the second replica is refused", second_replica_refused),
    ]);
}

fn two_replicas_one_killed(cluster: &Cluster) {
    let home = cluster.home.path();
    let prompts: Vec<String> = (0..800).map(|row| format!("'Sing of {row}.'")).collect();
    let file = |output: &str| {
        let path = home.join(format!("{output}.toml"));
        let text = format!(
            "schema = 1\n[input]\nprompts = [{}]\n[output]\npath = '{output}'\n[prompt]\ntemplate = 'raw'\n[sampling]\n\
             tokens_to_generate = 40\nmin_tokens_to_generate = 40\ngreedy = false\nend_strings = []\n",
            prompts.join(", ")
        );
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    cluster.stdout(&["batch", "--job", &file("alone.jsonl")]);
    let shared = file("shared.jsonl");
    let launch = ["launch", "--cluster", "site.toml", "--profile", "cpu", "--name", "both", "--replicas", "2", "--job"];
    let settings = ["--set", "deadlines.lease=3s", "--set", "limits.max_sequences=4"];
    cluster.stdout(&[&launch[..], &[&shared], &settings].concat());
    let deadline = Instant::now() + PATIENCE;
    while rows_by_replica(&cluster.status("both")).iter().filter(|&&rows| rows > 0).count() < 2 {
        assert!(Instant::now() < deadline, "{}", cluster.status("both"));
    }
    cluster.slurm(&format!("scancel --full --signal=KILL {}", cluster.job("both/both-0")));
    cluster.stdout(&["wait", "both", "--for", "done", "--timeout", "120s"]);
    assert_eq!(fs::read(home.join("shared.jsonl")).unwrap(), fs::read(home.join("alone.jsonl")).unwrap());
    let verified = cluster.stdout(&["results", "both", "verify"]);
    assert!(verified.contains("800 of 800"), "{verified}");
    let status = cluster.status("both");
    assert_eq!((&status["phase"], &status["replicas"][1]["phase"]), (&"DONE".into(), &"DONE".into()), "{status}");
    assert_ne!(status["replicas"][0]["phase"], "DONE", "{status}");
}

fn second_replica_refused(cluster: &Cluster) {
    let home = cluster.home.path();
    // Slurm's own, with a limit of one job to submit.
    let sbatch = home.join("bin/sbatch");
    fs::create_dir(home.join("bin")).unwrap();
    let real = cluster.slurm("which sbatch");
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in *' --test-only '*) exec {0} \"$@\";; esac\nif mkdir {1}/submitted 2>/dev/null; then exec {0} \"$@\"; fi\n\
         echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit)' >&2\nexit 1\n",
        real.trim(),
        home.display()
    );
    fs::write(&sbatch, script).unwrap();
    fs::set_permissions(&sbatch, fs::Permissions::from_mode(0o755)).unwrap();
    let job = job_file(home, "refused.jsonl");
    let launch = ["launch", "--cluster", "site.toml", "--profile", "cpu", "--name", "half", "--replicas", "2", "--job"];
    let path = format!("{}:{}", home.join("bin").display(), std::env::var("PATH").unwrap());
    let (code, _, stderr) = cluster.command(nemotron(home).env("PATH", path).args(launch).arg(&job));
    assert_eq!(code, 12, "{stderr}");
    assert!(stderr.contains("replica half-1 cannot be started, so none of run half is"), "{stderr}");
    assert!(stderr.contains("run half-0 is CANCELLED; nothing of it is left"), "{stderr}");
    assert!(home.join("submitted").is_dir() && !home.join("runs/half").exists());
}
