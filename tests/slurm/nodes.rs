//! What is not right on one node is found before anything is loaded, and named with host and path.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use super::support::{Cluster, covered, hidden};
use crate::support::root;

#[test]
fn nodes_are_checked_before_anything_is_loaded() {
    let Some(cluster) = Cluster::up('n', &[]) else { return };
    cluster.run(&[
        ("a model that one node does not have", a_model_that_one_node_does_not_have),
        ("a run directory that one node does not see", a_run_directory_that_one_node_does_not_see),
        ("a binary that one node does not have", a_binary_that_one_node_does_not_have),
        ("nodes that are not as agreed", nodes_that_are_not_as_agreed),
        ("an interface by name", an_interface_by_name),
        ("nodes that do not reach each other", nodes_that_do_not_reach_each_other),
    ]);
}

/// A copy of a small checkpoint, in a folder of its own.
fn model(cluster: &Cluster) -> String {
    let copy = cluster.home.path().join("models/tiny");
    fs::create_dir_all(&copy).unwrap();
    for entry in fs::read_dir(root().join("tests/fixtures/golden/tiny-hf")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    copy.to_str().unwrap().to_owned()
}

/// Fails with this exit code, in good time, and says all of this.
fn fails(cluster: &Cluster, name: &str, more: &[&str], exit: i32, words: &[&str]) {
    let start = Instant::now();
    let (code, _, stderr) = cluster.launch(name, &[&["--serve", "--wait", "ready"], more].concat());
    assert_eq!(code, exit, "{stderr}");
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    for word in words {
        assert!(stderr.contains(word), "{word}: {stderr}");
    }
}

fn a_model_that_one_node_does_not_have(cluster: &Cluster) {
    let (model, host) = (model(cluster), &cluster.nodes[1]);
    let shard = format!("{model}/model-00002-of-00002.safetensors");
    hidden(cluster, &cluster.home.path().join("models"), || {
        let words = [host.as_str(), &model, "No such file or directory", "help: --model must be"];
        fails(cluster, "no-model", &["--model", &model], 11, &words);
    });
    // The login node looks too.
    fs::remove_file(&shard).unwrap();
    let (code, _, stderr) = cluster.launch("no-shard", &["--serve", "--model", &model]);
    assert!(code == 22 && stderr.contains("model-00002-of-00002.safetensors"), "{code}: {stderr}");
}

fn a_run_directory_that_one_node_does_not_see(cluster: &Cluster) {
    let run_dir = cluster.file("no-runs", "");
    hidden(cluster, cluster.home.path(), || {
        let words = [&cluster.nodes[1], run_dir.to_str().unwrap().trim_end_matches('/'), "login.run_root"];
        fails(cluster, "no-runs", &[], 11, &words);
    });
}

fn a_binary_that_one_node_does_not_have(cluster: &Cluster) {
    let folder = cluster.home.path().join("bin");
    let binary = folder.join("nemotron");
    fs::create_dir_all(&folder).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_nemotron"), &binary).unwrap();
    let set = format!("slurm.binary={}", binary.display());
    hidden(cluster, &folder, || {
        let words = [cluster.nodes[1].as_str(), "execve()", binary.to_str().unwrap(), "slurm.binary"];
        fails(cluster, "no-binary", &["--set", &set], 11, &words);
    });
}

/// Another binary of the same name, and fewer nodes than were asked for: what ranks and allocation must agree on.
fn nodes_that_are_not_as_agreed(cluster: &Cluster) {
    let folder = cluster.home.path().join("bin");
    let (binary, other) = (folder.join("nemotron"), folder.join("other"));
    fs::create_dir_all(&folder).unwrap();
    let mut bytes = fs::read(env!("CARGO_BIN_EXE_nemotron")).unwrap();
    fs::write(&binary, &bytes).unwrap();
    bytes.push(0);
    fs::write(&other, &bytes).unwrap();
    for file in [&binary, &other] {
        fs::set_permissions(file, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let set = format!("slurm.binary={}", binary.display());
    covered(cluster, &format!("mount --bind {}", other.display()), &binary, || {
        let words = ["does not match this supervisor", "build is "];
        fails(cluster, "other-binary", &["--set", &set], 21, &words);
    });
    let words = ["has 1 nodes", "4 ranks need 2 with 2 on each"];
    fails(cluster, "one-node", &["--set", "slurm.extra=--nodes=1"], 21, &words);
}

fn an_interface_by_name(cluster: &Cluster) {
    let words = [cluster.nodes[0].as_str(), "no interface bond7", "eth0 (10.", "fabric.interface"];
    fails(cluster, "no-interface", &["--set", "fabric.interface=bond7"], 21, &words);
    let (code, _, stderr) =
        cluster.launch("interface", &["--serve", "--wait", "ready", "--set", "fabric.interface=eth0"]);
    assert_eq!(code, 0, "{stderr}");
    cluster.stdout(&["cancel", "interface"]);
}

fn nodes_that_do_not_reach_each_other(cluster: &Cluster) {
    let second = &cluster.nodes[1];
    // Loopback is up, but no other node is there.
    let more = ["--set", "fabric.interface=lo", "--set", "deadlines.rendezvous=4s"];
    let missing = format!("missing: rank 2 (host {second}), rank 3 (host {second})");
    fails(cluster, "loopback", &more, 21, &[&missing, "fabric.interface"]);
    let log = fs::read_to_string(cluster.file("loopback", "attempt-000/rank-002.log")).unwrap();
    assert!(log.contains("cannot reach its supervisor (127.0.0.1:"), "{log}");
}
