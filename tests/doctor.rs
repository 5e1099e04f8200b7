//! `doctor`, and what ranks on devices look at before they load anything. NVML's answers are a stand-in's: `tests/standin/nvml.c`.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use super::support::{finish, nemotron, root};

/// A folder with the stand-in for the driver's library.
fn standin() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-w", "-o"]).arg(folder.path().join("libnvidia-ml.so.1"));
    let (code, _, stderr) = finish(cc.arg(root().join("tests/standin/nvml.c")));
    assert_eq!(code, 0, "{stderr}");
    folder
}

fn doctor(home: &Path, standin: Option<(&TempDir, &str)>, arguments: &[&str]) -> (i32, Value, String) {
    let mut command = nemotron(home);
    if let Some((folder, defects)) = standin {
        command.env("LD_LIBRARY_PATH", folder.path()).env("NVML_STANDIN", defects);
    }
    let (code, stdout, stderr) = finish(command.args(["doctor", "--json"]).args(arguments));
    (code, serde_json::from_str(&stdout).unwrap(), stderr)
}

/// The first finding of that name.
fn check<'a>(report: &'a Value, name: &str) -> &'a Value {
    report["checks"].as_array().unwrap().iter().find(|check| check["name"] == name).unwrap()
}

#[test]
fn without_a_driver_only_runs_on_devices_are_impossible() {
    let home = tempfile::tempdir().unwrap();
    let (code, report, _) = doctor(home.path(), None, &[]);
    assert_eq!((code, &check(&report, "driver")["grade"]), (0, &"SKIP".into()), "{report}");
    let (code, report, stderr) = doctor(home.path(), None, &["--profile", "h100x16"]);
    let driver = check(&report, "driver");
    assert_eq!((code, &driver["grade"]), (23, &"CRIT".into()), "{report}");
    assert!(driver["found"].as_str().unwrap().contains("no NVIDIA driver") && driver["cure"].is_string(), "{stderr}");
}

#[test]
fn devices_are_counted_and_their_defects_named() {
    let (home, standin) = (tempfile::tempdir().unwrap(), standin());
    let (code, report, _) = doctor(home.path(), Some((&standin, "")), &["--profile", "h100x16"]);
    assert_eq!(code, 0, "{report}");
    assert!(check(&report, "driver")["found"].as_str().unwrap().contains("550.54.15 (CUDA 12.4)"), "{report}");
    for name in ["devices", "device 0", "device 7", "peer access"] {
        assert_eq!(check(&report, name)["grade"], "OK", "{report}");
    }
    for (defect, name, words) in [
        ("devices=4", "devices", "4 devices, 8 wanted"),
        ("free=30,pid=4711", "device 0", "processes [4711]"),
        ("ecc=3", "device 0", "3 uncorrected ECC errors"),
    ] {
        let (code, report, _) = doctor(home.path(), Some((&standin, defect)), &["--profile", "h100x16"]);
        let found = check(&report, name);
        assert_eq!((code, &found["grade"]), (23, &"CRIT".into()), "{defect}: {report}");
        assert!(found["found"].as_str().unwrap().contains(words), "{defect}: {found}");
    }
}

#[test]
fn a_run_folder_that_cannot_be_written_is_found_before_a_run_needs_it() {
    let home = tempfile::tempdir().unwrap();
    let (code, stdout, stderr) = finish(nemotron(home.path()).env("NEMOTRON_RUN_ROOT", "/proc/runs").arg("doctor"));
    assert_eq!(code, 11, "{stdout}{stderr}");
    assert!(stdout.contains("CRIT  run folder") && stdout.contains("login.run_root"), "{stdout}");
}

#[test]
fn a_rank_refuses_a_sick_device() {
    let (home, standin) = (tempfile::tempdir().unwrap(), standin());
    let tiny = root().join("tests/fixtures/golden/tiny-hf");
    for (defect, words) in [("ecc=1", "uncorrected ECC errors"), ("devices=0", "NVML")] {
        let mut launch = nemotron(home.path());
        launch.env("LD_LIBRARY_PATH", standin.path()).env("NVML_STANDIN", defect);
        launch.args(["launch", "--profile", "h100x1", "--serve", "--port", "0", "--model"]).arg(&tiny);
        let (code, _, stderr) = finish(&mut launch);
        assert_eq!(code, 23, "{defect}: {stderr}");
        assert!(stderr.contains(words), "{defect}: {stderr}");
    }
}
