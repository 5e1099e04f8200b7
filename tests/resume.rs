//! Jobs that are stopped, killed and resumed: the output is that of an undisturbed run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tempfile::TempDir;

use super::support::{finish, nemotron, root};

/// Nothing here takes that long unless it hangs.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// A job in a folder of its own.
pub(super) struct Job(TempDir);

impl Job {
    pub(super) fn new(rows: usize, tokens: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let lines: String =
            (0..rows).map(|row| format!("{{\"id\":\"r{row}\",\"prompt\":\"Sing of {row}.\"}}\n")).collect();
        fs::write(dir.path().join("in.jsonl"), lines).unwrap();
        let job = format!(
            "schema = 1\n[input]\npath = \"in.jsonl\"\n[output]\npath = \"out.jsonl\"\n[prompt]\ntemplate = \"raw\"\n[sampling]\n\
             tokens_to_generate = {tokens}\nmin_tokens_to_generate = {tokens}\ngreedy = false\nend_strings = []\n"
        );
        fs::write(dir.path().join("job.toml"), job).unwrap();
        Self(dir)
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(super) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = nemotron(self.path());
        // A small cache starts fast, and few rows at a time end one after another.
        command.env("NEMOTRON_KV_TOKENS", "8192").env("NEMOTRON_MAX_SEQUENCES", "8");
        command.args(arguments).stdin(Stdio::null());
        command
    }

    pub(super) fn start(&self, arguments: &[&str]) -> Child {
        self.command(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    pub(super) fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        finish(&mut self.command(arguments))
    }

    pub(super) fn launch<'a>(more: &[&'a str]) -> Vec<&'a str> {
        [&["launch", "--profile", "cpu", "--job", "job.toml", "--name", "r"][..], more].concat()
    }

    #[track_caller]
    pub(super) fn expect(&self, code: i32, arguments: &[&str]) -> String {
        let (found, stdout, stderr) = self.run(arguments);
        assert_eq!(found, code, "{arguments:?}\n{stdout}{stderr}");
        stdout + &stderr
    }

    pub(super) fn output(&self) -> Vec<u8> {
        fs::read(self.path().join("out.jsonl")).unwrap()
    }

    pub(super) fn journal(&self, attempt: u32) -> PathBuf {
        self.path().join(format!("runs/r/journal/attempt-{attempt:03}"))
    }

    pub(super) fn status(&self) -> Value {
        serde_json::from_str(&self.run(&["status", "r", "--json"]).1).unwrap_or_default()
    }

    pub(super) fn rows_done(&self) -> u64 {
        self.status()["job"]["rows_done"].as_u64().unwrap_or(0)
    }

    /// Waits until some rows of this attempt are done.
    pub(super) fn wait_for_rows(&self, rows: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.rows_done() < rows {
            assert!(Instant::now() < deadline, "{}", self.status());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

pub(super) fn undisturbed(rows: usize, tokens: usize) -> Vec<u8> {
    let job = Job::new(rows, tokens);
    job.expect(0, &["batch", "--job", "job.toml"]);
    job.output()
}

/// Numbers that differ from call to call and are the same in each run of the test.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// `scripts/soak` runs the long version: 100 kills, 2,000 rows.
#[test]
fn a_job_killed_at_random_moments_gives_the_output_of_an_undisturbed_one() {
    let kills: u64 = std::env::var("NEMOTRON_TEST_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(10);
    let is_long = kills > 20;
    let (rows, tokens) = if is_long { (2000, 400) } else { (300, 24) };
    let expected = undisturbed(rows, tokens);
    let job = Job::new(rows, tokens);
    let mut random = Random(7);
    let mut attempts = 0;
    let mut killed = 0;
    while !job.path().join("out.jsonl").exists() {
        let arguments = if attempts == 0 { Job::launch(&["--tp", "2"]) } else { vec!["resume", "r"] };
        let mut launcher = job.start(&arguments);
        attempts += 1;
        assert!(attempts < 3 * kills + 3, "{}", job.status());
        if killed < kills {
            // From before the ranks start to deep in the rows.
            std::thread::sleep(Duration::from_millis(50 + random.below(if is_long { 2000 } else { 1200 })));
            let ranks = job.status()["ranks"].as_array().cloned().unwrap_or_default();
            let pids = ranks.iter().filter_map(|rank| rank["process"]["pid"].as_i64());
            let mut victims: Vec<i32> = pids.filter_map(|pid| pid.try_into().ok()).collect();
            victims.push(launcher.id() as i32);
            let victim = victims[random.below(victims.len() as u64) as usize];
            if launcher.try_wait().unwrap().is_none() {
                killed += u64::from(kill(Pid::from_raw(victim), Signal::SIGKILL).is_ok());
            }
        }
        launcher.wait().unwrap();
    }
    assert!(job.output() == expected, "the output differs");
    job.expect(0, &["results", "r", "verify"]);
    assert!(!is_long || killed == kills, "it was done after {killed} kills");
    let stats: Value = serde_json::from_str(&job.run(&["results", "r", "stats", "--json"]).1).unwrap();
    eprintln!("{killed} kills, {attempts} attempts: {stats}");
    assert_eq!(stats["stats"]["records_damaged"], 0);
}

#[test]
fn a_stopped_job_is_resumed_and_what_is_done_is_kept() {
    let expected = undisturbed(120, 80);
    let job = Job::new(120, 80);
    let mut launcher = job.start(&Job::launch(&[]));
    job.wait_for_rows(1);
    kill(Pid::from_raw(launcher.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(launcher.wait().unwrap().code(), Some(143));
    job.expect(30, &["results", "r", "verify"]);
    let kept = job.rows_done();
    assert!((1..120).contains(&kept), "{kept}");
    assert!(!job.path().join("out.jsonl").exists());
    let said = job.expect(2, &Job::launch(&[]));
    assert!(said.contains("nemotron resume r"), "{said}");

    // Other ranks give the same bytes.
    let report: Value = serde_json::from_str(&job.run(&["resume", "r", "--tp", "2", "--pp", "2", "--json"]).1).unwrap();
    assert_eq!(job.status()["ranks"].as_array().unwrap().len(), 4);
    assert_eq!((report["rows"]["rows_done"].as_u64(), report["rows"]["rows_failed"].as_u64()), (Some(120), Some(0)));
    assert!(report["rows"]["rows_kept"].as_u64() >= Some(kept), "{report}");
    assert!(job.output() == expected);
    let said = job.expect(0, &["results", "r", "verify"]);
    assert!(said.contains("120 of 120"), "{said}");
    assert!(job.expect(2, &["resume", "r"]).contains("run r is done"));
    let metrics = job.expect(0, &["status", "r", "--metrics"]);
    let rows = "nemotron_job_rows{run=\"r\",state=\"done\"} 120\nnemotron_job_rows{run=\"r\",state=\"failed\"} 0\n";
    assert!(metrics.contains(rows) && metrics.contains("# TYPE nemotron_job_eta_seconds gauge"), "{metrics}");

    let mut output = job.output();
    output[10] ^= 1;
    fs::write(job.path().join("out.jsonl"), output).unwrap();
    assert!(job.expect(32, &["results", "r", "verify"]).contains("line 1 is not"));
}

#[test]
fn a_damaged_record_and_a_torn_tail_cost_their_rows_alone() {
    let job = Job::new(40, 8);
    job.expect(0, &Job::launch(&[]));
    let expected = job.output();
    // As if the last record had been cut off and one in the middle damaged, before the supervisor could say how it ended.
    let mut bytes = fs::read(job.journal(0)).unwrap();
    bytes.truncate(bytes.len() - 3);
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(job.journal(0), bytes).unwrap();
    fs::remove_file(job.path().join("out.jsonl")).unwrap();
    fs::remove_file(job.path().join("runs/r/status.json")).unwrap();
    let report: Value = serde_json::from_str(&job.run(&["resume", "r", "--json"]).1).unwrap();
    let kept = report["rows"]["rows_kept"].as_u64().unwrap();
    assert!((38..=39).contains(&kept), "{report}");
    assert!(job.output() == expected);
}

#[test]
fn a_changed_input_is_refused_unless_it_is_meant() {
    let job = Job::new(100, 80);
    let mut launcher = job.start(&Job::launch(&[]));
    job.wait_for_rows(1);
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    let input = fs::read_to_string(job.path().join("in.jsonl")).unwrap();
    let changed = input.replace("Sing of 7.", "Weep for 7.");
    fs::write(job.path().join("in.jsonl"), &changed).unwrap();
    let said = job.expect(2, &["resume", "r"]);
    assert!(said.contains("the input changed") && said.contains("--allow-changed"), "{said}");
    let report: Value = serde_json::from_str(&job.run(&["resume", "r", "--allow-changed", "--json"]).1).unwrap();
    assert!(report["rows"]["rows_kept"].as_u64() >= Some(1), "{report}");

    let fresh = Job::new(100, 80);
    fs::write(fresh.path().join("in.jsonl"), changed).unwrap();
    fresh.expect(0, &["batch", "--job", "job.toml"]);
    assert!(job.output() == fresh.output());
}

#[test]
fn rows_of_an_earlier_input_leave_the_journal() {
    let job = Job::new(0, 4);
    let input = |word: &str| {
        let row = |row| format!("{{\"id\":{row},\"prompt\":\"{word} {row}.\",\"pad\":\"{}\"}}\n", word.repeat(4000));
        fs::write(job.path().join("in.jsonl"), (0..80).map(row).collect::<String>()).unwrap();
    };
    input("Sing of");
    job.expect(0, &Job::launch(&[]));
    // As if the supervisor had been killed before it could say that the run is done.
    let unfinish = || {
        fs::remove_file(job.path().join("out.jsonl")).unwrap();
        fs::remove_file(job.path().join("runs/r/status.json")).unwrap();
    };
    let size = |attempt| fs::metadata(job.journal(attempt)).unwrap().len();
    unfinish();
    let before = size(0);
    assert!(before > 80 * 4000);
    job.expect(0, &["resume", "r"]);
    assert_eq!(size(0), before, "nothing was superseded");
    unfinish();
    input("Weep for");
    job.expect(2, &["resume", "r"]);
    assert_eq!(size(0), before, "a change that is not meant costs nothing");
    job.expect(0, &["resume", "r", "--allow-changed"]);
    assert!(size(0) < 4000, "{}", size(0));
    job.expect(0, &["results", "r", "verify"]);
}

#[test]
fn a_row_that_breaks_the_engine_twice_is_quarantined() {
    let job = Job::new(1, 900);
    for attempt in 0..2 {
        let arguments = if attempt == 0 { Job::launch(&[]) } else { vec!["resume", "r"] };
        let mut launcher = job.start(&arguments);
        let deadline = Instant::now() + PATIENCE;
        // The header is there before the model is loaded; what comes next is the mark of the row that begins.
        let size = || fs::metadata(job.journal(attempt)).map_or(0, |journal| journal.len());
        let mut wait_beyond = |bytes| {
            while size() <= bytes {
                assert!(Instant::now() < deadline && launcher.try_wait().unwrap().is_none(), "{}", job.status());
                std::thread::sleep(Duration::from_millis(1));
            }
            size()
        };
        let header = wait_beyond(0);
        wait_beyond(header);
        let status = job.status();
        assert_eq!(status["attempt"], attempt, "{status}");
        let rank = status["ranks"][0]["process"]["pid"].as_i64().unwrap_or_else(|| panic!("{status}"));
        kill(Pid::from_raw(rank as i32), Signal::SIGABRT).unwrap();
        assert_eq!(launcher.wait().unwrap().code(), Some(25));
    }
    job.expect(31, &["resume", "r"]);
    let failed = job.run(&["results", "r", "failed"]).1;
    let line: Value = serde_json::from_str(&failed).unwrap();
    assert_eq!((line["id"].as_str(), line["error"]["code"].as_str()), (Some("r0"), Some("poison")));
}

#[test]
fn a_job_ends_before_its_deadline_and_its_successors_finish_it() {
    let expected = undisturbed(600, 100);
    let job = Job::new(600, 100);
    let began = Instant::now();
    let said = job.expect(30, &Job::launch(&["--set", "job.deadline=4s", "--set", "limits.max_sequences=2"]));
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    assert!(said.contains("of 600 rows are done") && said.contains("nemotron resume r"), "{said}");
    let mut code = 30;
    for _ in 0..40 {
        code = job.run(&["resume", "r"]).0;
        if code != 30 {
            break;
        }
    }
    assert_eq!(code, 0);
    assert!(job.output() == expected);
}

#[test]
fn the_commands_and_the_job_file_of_the_documentation_work() {
    let text = fs::read_to_string(root().join("docs/jobs.md")).unwrap();
    let home = tempfile::tempdir().unwrap();
    fs::create_dir(home.path().join("examples")).unwrap();
    fs::copy(root().join("examples/poem.toml"), home.path().join("examples/poem.toml")).unwrap();
    let commands = text.lines().filter_map(|line| line.strip_prefix("$ nemotron "));
    assert!(commands.clone().count() >= 3);
    for command in commands {
        let (code, stdout, stderr) = finish(nemotron(home.path()).args(command.split(' ')));
        assert_eq!(code, 0, "{command}\n{stdout}{stderr}");
    }
    let job = text.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    fs::write(home.path().join("job.toml"), job).unwrap();
    fs::write(home.path().join("prompts.jsonl"), "{\"prompt\":\"Sing.\"}\n").unwrap();
    // The built-in model has a context of 1024 tokens, so the one row of this job would not fit.
    let (code, stdout, stderr) = finish(nemotron(home.path()).args(["batch", "--job", "job.toml", "--dry-run"]));
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(stderr.contains("1 rows do not fit"), "{stderr}");
}
