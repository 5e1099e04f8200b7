//! Storage that is full, read-only or out of inodes while a job runs: what is done is kept, and the job goes on where it can.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::resume::{Job, PATIENCE, undisturbed};

/// A small file system of its own, with these options.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None`, with a line that says so, where mounting is not allowed.
    fn mount(path: PathBuf, options: &str) -> Option<Self> {
        fs::create_dir_all(&path).unwrap();
        let disk = Self(path);
        let mounted = disk.is_mounted(&["-t", "tmpfs", "-o", options, "tmpfs"]);
        if !mounted {
            println!("skipped: a file system cannot be mounted here");
        }
        mounted.then_some(disk)
    }

    fn remount(&self, options: &str) {
        assert!(self.is_mounted(&["-o", &format!("remount,{options}")]), "{options}");
    }

    fn is_mounted(&self, arguments: &[&str]) -> bool {
        let mount = Command::new("mount").args(arguments).arg(&self.0).output();
        mount.is_ok_and(|output| output.status.success())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

/// With its output in `results/`, where a small disk is.
fn job_and_disk(rows: usize, tokens: usize, options: &str) -> Option<(Job, SmallDisk)> {
    let job = Job::new(rows, tokens);
    let disk = SmallDisk::mount(job.path().join("results"), options)?;
    let text = fs::read_to_string(job.path().join("job.toml")).unwrap();
    fs::write(job.path().join("job.toml"), text.replace("out.jsonl", "results/out.jsonl")).unwrap();
    Some((job, disk))
}

fn output(job: &Job) -> PathBuf {
    job.path().join("results/out.jsonl")
}

#[track_caller]
fn wait_until(job: &Job, what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not {what}: {}", job.status());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn is_paused(job: &Job) -> bool {
    job.status()["job"]["paused"] == true
}

fn said(launcher: Child) -> (i32, String) {
    let output = launcher.wait_with_output().unwrap();
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn launch(job: &Job, more: &[&str]) -> Child {
    job.command(&Job::launch(more)).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn a_full_disk_is_borne_then_given_up_and_resumed() {
    let job = Job::new(600, 40);
    let Some(disk) = SmallDisk::mount(job.path().join("runs"), "size=512k") else { return };
    let ballast = disk.0.join("ballast");
    let launcher = launch(&job, &["--set", "deadlines.storage=1s"]);
    job.wait_for_rows(1);
    // To the last byte; what is written before the disk is full stays.
    _ = fs::write(&ballast, vec![0; 512 << 10]);
    let (code, said) = said(launcher);
    assert_eq!(code, 32, "{said}");
    assert!(said.contains("No space left") && said.contains("nemotron resume r"), "{said}");
    assert!(!job.path().join("out.jsonl").exists());
    fs::remove_file(ballast).unwrap();
    let report: Value = serde_json::from_str(&job.run(&["resume", "r", "--json"]).1).unwrap();
    assert!((1..600).contains(&report["rows"]["rows_kept"].as_u64().unwrap()), "{report}");
    job.expect(0, &["results", "r", "verify"]);
    assert!(job.output() == undisturbed(600, 40));
}

#[test]
fn space_that_is_given_back_in_time_lets_the_job_go_on() {
    let job = Job::new(400, 40);
    let Some(disk) = SmallDisk::mount(job.path().join("runs"), "size=512k") else { return };
    let launcher = launch(&job, &[]);
    job.wait_for_rows(1);
    let ballast = disk.0.join("ballast");
    _ = fs::write(&ballast, vec![0; 512 << 10]);
    // Nothing says so on a full disk, except that nothing is written any more.
    let size = || fs::metadata(job.journal(0)).unwrap().len();
    wait_until(&job, "paused", || {
        let before = size();
        std::thread::sleep(Duration::from_millis(1500));
        size() == before
    });
    assert!(!job.path().join("out.jsonl").exists());
    fs::remove_file(ballast).unwrap();
    let (code, said) = said(launcher);
    assert_eq!(code, 0, "{said}");
    assert!(job.output() == undisturbed(400, 40));
    job.expect(0, &["results", "r", "verify"]);
}

/// The output's file system breaks while rows are generated: the job gives up and is resumed, or waits until it is mended.
fn output_breaks(options: &str, sentence: &str, break_it: impl Fn(&SmallDisk), mend: impl Fn(&SmallDisk)) {
    let expected = undisturbed(600, 60);
    for gives_up in [true, false] {
        let Some((job, disk)) = job_and_disk(600, 60, options) else { return };
        let patience = if gives_up { "1s" } else { "60s" };
        let launcher = launch(&job, &["--set", &format!("deadlines.storage={patience}")]);
        job.wait_for_rows(1);
        break_it(&disk);
        if gives_up {
            let (code, said) = said(launcher);
            assert_eq!(code, 32, "{said}");
            assert!(said.contains(sentence) && said.contains("nemotron resume r"), "{said}");
            assert!(!output(&job).exists());
            mend(&disk);
            job.expect(0, &["resume", "r"]);
        } else {
            wait_until(&job, "paused", || is_paused(&job));
            assert!(job.run(&["status", "r"]).1.contains("paused: journal or output cannot be written"));
            mend(&disk);
            let (code, said) = said(launcher);
            assert_eq!(code, 0, "{said}");
        }
        assert!(fs::read(output(&job)).unwrap() == expected);
        assert!(!is_paused(&job));
        job.expect(0, &["results", "r", "verify"]);
    }
}

#[test]
fn a_disk_that_becomes_read_only_is_borne_then_given_up_and_resumed() {
    output_breaks("size=1m", "Read-only file system", |disk| disk.remount("ro"), |disk| disk.remount("rw"));
}

#[test]
fn a_disk_without_inodes_is_borne_then_given_up_and_resumed() {
    let file = |disk: &SmallDisk, number| disk.0.join(format!("file-{number}"));
    let fill = |disk: &SmallDisk| while_ok(|number| fs::write(file(disk, number), ""));
    output_breaks(
        "nr_inodes=8",
        "No space left on device",
        |disk| _ = fill(disk),
        |disk| {
            (0..8).for_each(|number| _ = fs::remove_file(file(disk, number)));
        },
    );
}

fn while_ok(attempt: impl Fn(usize) -> std::io::Result<()>) -> usize {
    (0..).take_while(|&number| attempt(number).is_ok()).count()
}

/// Rows that make an output which the disk has no room for.
fn with_large_rows(job: &Job, rows: usize) {
    let row = |row: usize| {
        format!("{{\"id\":\"r{row}\",\"prompt\":\"Sing of {row}.\",\"pad\":\"{}\"}}\n", "x".repeat(10_000))
    };
    fs::write(job.path().join("in.jsonl"), (0..rows).map(row).collect::<String>()).unwrap();
}

fn partials(folder: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension() == Some("partial".as_ref())).collect()
}

#[test]
fn a_job_that_is_killed_while_it_writes_its_output_writes_it_again() {
    let Some((job, disk)) = job_and_disk(60, 8, "size=256k") else { return };
    with_large_rows(&job, 60);
    let whole = Job::new(60, 8);
    with_large_rows(&whole, 60);
    whole.expect(0, &["batch", "--job", "job.toml"]);
    let launcher = launch(&job, &[]);
    // It has begun the output and waits for room.
    wait_until(&job, "writing", || is_paused(&job) && !partials(&disk.0).is_empty());
    assert!(fs::metadata(&partials(&disk.0)[0]).unwrap().len() > 0);
    let rank = job.status()["ranks"][0]["process"]["pid"].as_i64().unwrap();
    kill(Pid::from_raw(rank as i32), Signal::SIGKILL).unwrap();
    assert_eq!(said(launcher).0, 25);
    assert!(!output(&job).exists());
    disk.remount("size=4m");
    let report: Value = serde_json::from_str(&job.run(&["resume", "r", "--json"]).1).unwrap();
    assert_eq!(report["rows"]["rows_kept"], 60, "{report}");
    assert!(fs::read(output(&job)).unwrap() == whole.output());
    assert!(partials(&disk.0).is_empty());
}

#[test]
fn a_replica_that_is_killed_while_it_writes_the_output_leaves_it_to_another() {
    let Some((job, disk)) = job_and_disk(60, 8, "size=256k") else { return };
    with_large_rows(&job, 60);
    let whole = Job::new(60, 8);
    with_large_rows(&whole, 60);
    whole.expect(0, &["batch", "--job", "job.toml"]);
    job.expect(0, &Job::launch(&["--replicas", "2", "--set", "deadlines.lease=2s", "--detach"]));
    wait_until(&job, "writing", || is_paused(&job) && !partials(&disk.0).is_empty());
    let writer = partials(&disk.0)[0].file_stem().unwrap().to_str().unwrap().rsplit('.').next().unwrap().to_owned();
    let writer: usize = writer.parse().unwrap();
    let supervisor = job.status()["replicas"][writer]["supervisor"]["pid"].as_i64().unwrap();
    kill(Pid::from_raw(supervisor as i32), Signal::SIGKILL).unwrap();
    disk.remount("size=4m");
    job.expect(0, &["wait", "r", "--for", "done", "--timeout", "60s"]);
    assert!(fs::read(output(&job)).unwrap() == whole.output());
    assert_eq!(job.status()["replicas"][1 - writer]["phase"], "DONE");
    assert!(partials(&disk.0).is_empty());
}
