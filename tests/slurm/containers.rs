//! Ranks in containers: with options of srun that a plugin takes, and behind a command on the nodes.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use super::support::Cluster;

#[test]
fn ranks_run_in_containers() {
    let Some(cluster) = Cluster::up('c', &["--pyxis"]) else { return };
    cluster.run(&[("pyxis", pyxis), ("apptainer", apptainer)]);
}

/// What a rank finds in its environment.
fn environment(cluster: &Cluster, run: &str, rank: usize) -> String {
    fs::read_to_string(format!("/proc/{}/environ", cluster.pid(run, rank))).unwrap().replace('\0', "\n")
}

fn generates(cluster: &Cluster, run: &str) {
    let generate = ["generate", "--run", run, "--raw", "--tokens-to-generate", "4", "--prompt", "Shall I"];
    assert!(cluster.stdout(&generate).len() > 1);
}

fn pyxis(cluster: &Cluster) {
    let data = cluster.home.path().join("data");
    fs::create_dir_all(&data).unwrap();
    let mount = format!("container.mounts={}:/data", data.display());
    let in_container = ["--serve", "--wait", "ready", "--set", "container.runtime=pyxis"];
    let image = ["--set", "container.image=nvcr.io#nvidia/cuda:12.6.3", "--set", &mount];
    let (code, _, stderr) = cluster.launch("pyxis", &[&in_container[..], &image].concat());
    assert_eq!(code, 0, "{stderr}");
    generates(cluster, "pyxis");
    let environment = environment(cluster, "pyxis", 3);
    let run_dir = cluster.file("pyxis", "").display().to_string();
    let run_dir = run_dir.trim_end_matches('/');
    for expected in
        ["nvcr.io#nvidia/cuda:12.6.3", &format!("{}:/data", data.display()), &format!("{run_dir}:{run_dir}")]
    {
        let shown = environment.lines().any(|line| line.starts_with("STUB_CONTAINER_") && line.contains(expected));
        assert!(shown, "{expected}: {environment}");
    }
    cluster.stdout(&["cancel", "pyxis"]);

    // Slurm ends the step with code 0 although no rank was started.
    let missing = ["--set", "container.image=x", "--set", "container.mounts=/no/such/folder:/data"];
    let (code, _, stderr) = cluster.launch("no-mount", &[&in_container[..], &missing].concat());
    assert_eq!(code, 21, "{stderr}");
    assert!(
        stderr.contains(" could not be started") && stderr.contains("(host ") && stderr.contains("/no/such/folder"),
        "{stderr}"
    );
}

/// There is none to be had here, so its command is one that shows what it was asked for, and runs what stands behind the image.
fn apptainer(cluster: &Cluster) {
    let home = cluster.home.path();
    let fake = home.join("fake/apptainer");
    fs::create_dir_all(fake.parent().unwrap()).unwrap();
    let script =
        "#!/bin/bash\nexport APPTAINER_ASKED=\"$*\"\nwhile [[ $1 != *.sif ]]; do shift; done\nshift\nexec \"$@\"\n";
    fs::write(&fake, script).unwrap();
    fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("env.set.PATH={}:/usr/bin:/bin", fake.parent().unwrap().display());
    let in_container = ["--serve", "--wait", "ready", "--set", "container.runtime=apptainer", "--set", &path];
    let image = ["--set", "container.image=/images/site image.sif"];
    let (code, _, stderr) = cluster.launch("apptainer", &[&in_container[..], &image].concat());
    assert_eq!(code, 0, "{stderr}");
    generates(cluster, "apptainer");
    let environment = environment(cluster, "apptainer", 2);
    let run_dir = cluster.file("apptainer", "").display().to_string();
    let run_dir = run_dir.trim_end_matches('/');
    let asked = environment.lines().find(|line| line.starts_with("APPTAINER_ASKED=")).unwrap();
    let bind = format!("--bind={run_dir}:{run_dir}");
    assert!(
        asked.contains("exec --no-home") && asked.contains(&bind) && asked.contains("/images/site image.sif"),
        "{asked}"
    );
    cluster.stdout(&["cancel", "apptainer"]);

    // Without the command the nodes are named.
    let bare = ["--set", "env.set.PATH=/usr/bin:/bin"];
    let (code, _, stderr) = cluster.launch("no-apptainer", &[&in_container[..5], &image, &bare].concat());
    assert_eq!(code, 11, "{stderr}");
    assert!(stderr.contains("(host ") && stderr.contains("execve(): apptainer"), "{stderr}");
}
