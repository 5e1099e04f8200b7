//! `nemotron render`: golden files of every built-in profile on every cluster file that has its devices, serving and with a job file.
//! `UPDATE_GOLDEN=1` writes them anew.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{finish, nemotron, root};

const CANARY: &str = "canary-77c1e0";

fn render(home: &Path, line: &str) -> (i32, String, String) {
    let mut command = nemotron(home);
    command.env("NEMOTRON_RUN_ROOT", "/shared/runs").env("NEMOTRON_SLURM_BINARY", "/opt/nemotron/bin/nemotron");
    command.env("HF_TOKEN", CANARY);
    finish(command.arg("render").args(line.split(' ')))
}

fn names(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(root().join(folder)).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.filter(|path| path.extension().is_some_and(|extension| extension == "toml"));
    let mut names: Vec<_> = files.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

fn home_with_job() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    let job = "schema = 1\n[input]\nprompts = ['a']\n[output]\npath = 'o'\n";
    fs::write(home.path().join("job.toml"), job).unwrap();
    home
}

#[test]
fn scripts_are_the_golden_ones() {
    let golden = root().join("tests/golden/render");
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let home = home_with_job();
    let (mut written, mut wrong): (Vec<PathBuf>, Vec<String>) = (Vec::new(), Vec::new());
    for cluster in names("cluster-configs").into_iter().filter(|name| name != "local") {
        for profile in names("cluster-configs/profiles") {
            for (task, flag) in [("serve", "--serve"), ("job", "--job job.toml")] {
                let model = if profile.ends_with("x1") { " --model nemotron-mini-4b" } else { "" };
                let (code, stdout, stderr) =
                    render(home.path(), &format!("--profile {profile} --cluster {cluster} {flag}{model}"));
                let path = golden.join(&cluster).join(format!("{profile}-{task}.sbatch"));
                if code == 11 && stderr.contains(&format!("cluster {cluster} has")) {
                    assert!(!path.exists(), "{} is of a pair that does not fit", path.display());
                    continue;
                }
                assert_eq!(code, 0, "{profile} on {cluster}: {stderr}");
                if update {
                    fs::create_dir_all(path.parent().unwrap()).unwrap();
                    fs::write(&path, &stdout).unwrap();
                }
                if fs::read_to_string(&path).ok().as_deref() != Some(&stdout) {
                    wrong.push(path.display().to_string());
                }
                assert!(!stdout.contains(CANARY) && stdout.lines().count() < 60, "{stdout}");
                written.push(path);
            }
        }
    }
    assert!(wrong.is_empty(), "run with UPDATE_GOLDEN=1 and look at what changed: {wrong:#?}");
    for path in &written {
        let output = Command::new("bash").arg("-n").arg(path).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{}: {output:?}", path.display());
    }
    match Command::new("shellcheck").args(&written).output() {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout)),
        Err(error) => println!("skipped: shellcheck cannot be run ({error})"),
    }
}

/// What `--profile auto` makes of partitions, by Slurm's own words: `sinfo` is a script that says them.
#[test]
fn scripts_of_a_chosen_profile_are_those_of_that_profile() {
    let home = home_with_job();
    let sinfo = home.path().join("bin/sinfo");
    fs::create_dir_all(sinfo.parent().unwrap()).unwrap();
    let path = format!("{}:{}", sinfo.parent().unwrap().display(), std::env::var("PATH").unwrap());
    for (offers, profile) in [
        ("gpu*|up|1-00:00:00|4|gpu:h100:8(S:0-1)|112|hopper,gpu80g|idle", "h100x16"),
        (
            "gpu*|up|1-00:00:00|4|gpu:h100:8|112|hopper,gpu80g|idle\nbig|up|1-00:00:00|1|gpu:h200:8|112|hopper|idle",
            "h200x8",
        ),
        ("gpu*|up|1-00:00:00|2|gpu:a100:8|128|ampere,gpu80g|mixed", "a100x16"),
    ] {
        fs::write(&sinfo, format!("#!/bin/sh\nprintf '{offers}\\n'\n")).unwrap();
        fs::set_permissions(&sinfo, fs::Permissions::from_mode(0o755)).unwrap();
        let render = |profile: &str, more: &[&str]| {
            let mut command = nemotron(home.path());
            command.env("NEMOTRON_RUN_ROOT", "/shared/runs").env("PATH", &path);
            finish(command.args(["render", "--cluster", "generic", "--serve", "--profile", profile]).args(more))
        };
        let (code, chosen, stderr) = render("auto", &[]);
        assert_eq!(code, 0, "{stderr}");
        assert!(stderr.contains(&format!("profile {profile}: ")), "{stderr}");
        let directive = |name: &str| {
            let line = chosen.lines().find_map(|line| line.strip_prefix(&format!("#SBATCH --{name}=")));
            line.unwrap_or_default().to_owned()
        };
        let kind = directive("gpus-per-node").split(':').next().unwrap().to_owned();
        let named = [format!("slurm.partition={}", directive("partition")), format!("slurm.quirks.gres_type={kind}")];
        let named: Vec<&str> = named.iter().flat_map(|value| ["--set", value]).collect();
        let (code, by_name, stderr) = render(profile, &named);
        assert_eq!(code, 0, "{stderr}");
        assert_eq!(chosen, by_name);
    }
}

#[test]
fn every_value_has_a_source() {
    let home = home_with_job();
    fs::write(home.path().join("site.toml"), "[slurm]\naccount = 'site'\n[fabric]\npreset = 'ib'\n").unwrap();
    let line = "--profile h100x16 --cluster site.toml --serve --explain -t 1-00 --set env.set.A=b --set fabric.env.NCCL_DEBUG=INFO";
    let (code, stdout, stderr) = render(home.path(), line);
    assert_eq!(code, 0, "{stderr}");
    for expected in [
        "slurm.account \"site\" site.toml",
        "slurm.time 86400.0 --time",
        "env.set.A \"b\" --set",
        "mesh.tp 8 <built-in profile h100x16>",
        "slurm.binary \"/opt/nemotron/bin/nemotron\" NEMOTRON_SLURM_BINARY",
        "slurm.qos none <default>",
        "$NCCL_DEBUG \"INFO\" --set",
        "$NCCL_IB_TIMEOUT \"22\" <built-in fabric ib>",
    ] {
        let found = stdout.lines().any(|line| line.split_whitespace().collect::<Vec<_>>().join(" ") == expected);
        assert!(found, "{expected}\n{stdout}");
    }
}

#[test]
fn files_are_written_into_a_folder() {
    let home = home_with_job();
    let line = "--profile cpu --cluster generic --job job.toml --name n";
    let (_, script, _) = render(home.path(), line);
    let (code, stdout, stderr) = render(home.path(), &format!("{line} -o out"));
    assert_eq!((code, stdout.as_str()), (0, ""), "{stderr}");
    assert_eq!(fs::read_to_string(home.path().join("out/job.sbatch")).unwrap(), script);
    assert!(fs::read_to_string(home.path().join("out/run.lock.toml")).unwrap().contains("[site]"));
}

#[test]
fn what_a_site_does_not_give_is_refused() {
    let home = home_with_job();
    let site = "[limits]\nmax_nodes = 1\nmax_time = '02:00:00'\npartitions = ['gpu']\n[hardware]\ngpu = 'H100-80GB'\n";
    fs::write(home.path().join("site.toml"), site).unwrap();
    fs::write(home.path().join("typo.toml"), "[slurm]\nacount = 'x'\n").unwrap();
    for (line, code, text) in [
        ("--profile h100x16 --cluster site.toml", 11, "limits.max_nodes"),
        ("--profile a100x16 --cluster site.toml", 11, "profile a100x16 is for A100-80GB"),
        ("--profile cpu --cluster site.toml -t 3:00:00", 11, "limits.max_time"),
        ("--profile cpu --cluster site.toml -p cpu", 11, "use one of gpu (limits.partitions)"),
        ("--profile cpu --cluster generic -t soon", 2, "expected minutes, HH:MM:SS"),
        ("--profile cpu --cluster generic --set container.runtime=pyxis", 2, "container.image"),
        ("--profile cpu --cluster generic --set env.set.A-B=1", 2, "`A-B` is no name of a variable"),
        (
            "--profile cpu --cluster typo.toml",
            2,
            "typo.toml:2:1: unknown key `slurm.acount`; did you mean `slurm.account`?",
        ),
        ("--profile cpu", 2, "cluster local has no batch script"),
        ("--profile h100x16 --cluster four-gpu-nodes --set tp=8", 10, "the cluster's nodes have 4"),
    ] {
        let (got, _, stderr) = render(home.path(), &format!("{line} --serve"));
        assert_eq!(got, code, "{line}: {stderr}");
        assert!(stderr.contains(text), "{line}: {stderr}");
    }
}

#[test]
fn cluster_files_are_listed_and_shown() {
    let home = tempfile::tempdir().unwrap();
    let (code, stdout, _) = finish(nemotron(home.path()).args(["clusters", "list"]));
    assert_eq!(code, 0);
    for name in names("cluster-configs") {
        assert!(stdout.lines().any(|line| line.starts_with(&format!("{name} "))), "{name} is built in\n{stdout}");
    }
    let (code, stdout, _) = finish(nemotron(home.path()).args(["clusters", "show", "generic"]));
    assert_eq!((code, stdout), (0, fs::read_to_string(root().join("cluster-configs/generic.toml")).unwrap()));
}
