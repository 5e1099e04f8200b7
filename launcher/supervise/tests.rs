#![expect(clippy::unwrap_used, reason = "tests")]

use std::net::SocketAddr;
use std::process::Command;
use std::thread::sleep;

use nemotron_engine::engine::EngineStats;
use nemotron_engine::report::{Load, Phase};
use tempfile::TempDir;

use super::*;
use crate::env::{ATTEMPT, RANK, SUPERVISOR};
use crate::local::LocalRanks;
use crate::process::ProcessId;
use crate::rendezvous::{Down, Hello, Identity, RankEnd, Up, connect, listen, run_key};
use crate::report::Failure;
use crate::rundir::read_json;
use crate::spec::testing::serve_spec;

/// Variables that make [`fake_rank`] a rank: what it does, and the run's directory.
const PART: &str = "FAKE_RANK_PART";
const RUN_DIR: &str = "FAKE_RANK_RUN_DIR";

/// A rank without an engine: the test executable starts itself with only this "test", which plays the part that the environment names.
#[test]
fn fake_rank() {
    let variable = |name| std::env::var(name).ok();
    let (Some(part), Some(run_dir)) = (variable(PART), variable(RUN_DIR)) else { return };
    let rank: usize = variable(RANK).unwrap().parse().unwrap();
    println!("rank {rank} plays {part}");
    let only_one = |which: &str| part == which && rank == 1;
    if only_one("absent") {
        sleep(Duration::from_secs(60));
    }
    let run_dir = RunDir::open(run_dir.as_ref()).unwrap();
    let supervisor: SocketAddr = variable(SUPERVISOR).unwrap().parse().unwrap();
    let (_listener, addresses) = listen(&[supervisor.ip()]).unwrap();
    let mut identity = Identity::current(&run_dir, variable(ATTEMPT).unwrap().parse().unwrap()).unwrap();
    if only_one("another config") {
        identity.config = "another".into();
    }
    let hello = Hello { rank, process: ProcessId::current(), identity, addresses };
    let key = run_key(&run_dir.token().unwrap());
    let (link, mut messages) = connect(&[supervisor], &key, &hello, Duration::from_secs(10)).unwrap();
    let say = |message| link.send(&message).unwrap();
    let end = |exit, text: &str| {
        let error = if exit == Exit::Internal { Vec::new() } else { vec![text.to_owned()] };
        link.send(&Up::End(RankEnd { exit: Some(exit), error, hints: vec!["a hint".into()] })).unwrap();
        std::process::exit(exit as i32)
    };
    say(Up::Phase { phase: Phase::Rendezvous });
    assert!(matches!(messages.next::<Down>().unwrap(), Down::Peers { addresses, .. } if addresses.len() == 2));
    say(Up::Phase { phase: Phase::Loading });
    match (part.as_str(), rank) {
        ("killed", 1) => ProcessId::current().signal(Signal::SIGKILL).unwrap(),
        // It notices the loss before the supervisor can have heard of the cause.
        ("killed", 0) => end(Exit::Communication, "lost the connection to rank 1"),
        ("bad checkpoint", 1) => end(Exit::Checkpoint, "no tensor named x"),
        ("crashes", 1) => std::process::exit(101),
        ("slow", 1) => sleep(Duration::from_secs(60)),
        ("loads", _) => {
            for tenth in 1..=10 {
                let load = Load {
                    bytes_read: tenth * 100_000_000,
                    bytes_total: 1_000_000_000,
                    read_seconds: tenth as f64,
                    seconds: tenth as f64,
                };
                // Rank 1 is half as far.
                let progress = tenth as f64 / if rank == 1 { 20.0 } else { 10.0 };
                say(Up::Heartbeat { progress, steps: 0, busy_s: 0.0, load });
                sleep(Duration::from_millis(150));
            }
        }
        _ => {}
    }
    say(Up::Phase { phase: Phase::Ready });
    if rank == 0 {
        say(Up::Ready { url: Some("http://127.0.0.1:9".into()) });
        let queued = usize::from(part == "hangs");
        say(Up::Stats {
            stats: EngineStats { running: queued, generated_tokens: 7, ..EngineStats::default() },
            job: None,
        });
    }
    if only_one("dies at work") {
        ProcessId::current().signal(Signal::SIGKILL).unwrap();
    }
    if part == "hangs" {
        let link = link.clone();
        std::thread::spawn(move || {
            while link.send(&Up::Heartbeat { progress: 0.0, steps: 3, busy_s: 0.0, load: Load::default() }).is_ok() {
                sleep(Duration::from_millis(100));
            }
        });
    }
    loop {
        match messages.next::<Down>() {
            Ok(Down::Steps { .. }) => {}
            Ok(Down::Drain) if part == "never drains" => {}
            Ok(Down::Drain) => say(Up::End(RankEnd { exit: None, error: Vec::new(), hints: Vec::new() })),
            Ok(Down::Stop) if part == "deaf" => {}
            _ => std::process::exit(0),
        }
    }
}

/// What is left of a run of two ranks.
struct Ending {
    run_dir: RunDir,
    _root: TempDir,
    outcome: Outcome<Status>,
    took: Duration,
}

impl Ending {
    fn failure(&self) -> &Failure {
        self.outcome.as_ref().unwrap_err()
    }

    fn report(&self) -> serde_json::Value {
        read_json(&self.run_dir.report_file()).unwrap().unwrap()
    }
}

/// Runs two ranks that play `part`. When the run is ready, these signals arrive.
fn run_with(part: &'static str, signals: &'static [Signal], adapt: impl FnOnce(&mut RunSpec)) -> Ending {
    let root = tempfile::tempdir().unwrap();
    let mut spec = serve_spec("run");
    spec.mesh.tp = 2;
    adapt(&mut spec);
    let run_dir = RunDir::create(root.path(), &mut spec).unwrap();
    let path = run_dir.path().to_owned();
    let ranks = LocalRanks::with_command(&run_dir, move || {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "supervise::tests::fake_rank", "--nocapture"]);
        command.env(PART, part).env(RUN_DIR, &path);
        command
    });
    let (sender, inputs) = channel();
    let signaller = sender.clone();
    let endpoint_file = run_dir.endpoint_file();
    let on_ready = move |endpoint: &Endpoint| {
        assert_eq!(read_json::<Endpoint>(&endpoint_file).unwrap().as_ref(), Some(endpoint));
        signals.iter().for_each(|&signal| signaller.send(Input::Signal(signal)).unwrap());
    };
    let start = Instant::now();
    let attempts = attempts::begin(&run_dir, 2, None).unwrap();
    let record = Record::open(&run_dir, &spec, attempts, Display::stderr(true)).unwrap();
    let supervisor =
        Supervisor::new(&run_dir, &spec, record, Box::new(ranks), (sender, inputs), Some(Box::new(on_ready)));
    let Ended { record, members, verdict, .. } = supervisor.unwrap().run();
    let outcome = record.conclude(&verdict, &members);
    let ended = Ending { run_dir, _root: root, outcome, took: start.elapsed() };

    // Whatever the end was.
    assert!(!ended.run_dir.endpoint_file().exists());
    let status = Status::of(&ended.run_dir).unwrap();
    assert!(status.phase.is_end());
    let left =
        status.ranks.iter().filter_map(|rank| rank.process.as_ref()).find(|rank| rank.is_running() == Some(true));
    assert_eq!(left, None);
    let code = ended.outcome.as_ref().map_or_else(|failure| failure.exit as u8, |_| 0);
    assert_eq!(ended.report()["exit_code"], code);
    let events = fs::read_to_string(ended.run_dir.events_file()).unwrap();
    assert!(events.lines().last().unwrap().contains(r#""kind":"ended""#), "{events}");
    ended
}

fn run(part: &'static str, signals: &'static [Signal]) -> Ending {
    run_with(part, signals, |_| ())
}

#[test]
fn a_drained_server_has_succeeded() {
    for signal in [&[Signal::SIGTERM], &[Signal::SIGINT]] {
        let ended = run("works", signal);
        let status = ended.outcome.as_ref().unwrap();
        assert_eq!((status.phase, status.stats.generated_tokens), (RunPhase::Done, 7));
        let report = ended.report();
        let phases: Vec<_> = report["phases"].as_array().unwrap().iter().map(|span| span["phase"].clone()).collect();
        assert_eq!(phases.first().unwrap(), "PREFLIGHT");
        assert_eq!(phases[phases.len() - 2..], ["READY", "DRAINING"]);
        assert!(fs::read_to_string(ended.run_dir.rank_log(0, 1)).unwrap().contains("rank 1 plays works"));
    }
}

#[test]
fn the_journal_tells_how_loading_goes() {
    let ended = run("loads", &[Signal::SIGTERM]);
    let events = fs::read_to_string(ended.run_dir.events_file()).unwrap();
    let of =
        |kind: &str| events.lines().filter(|line| line.contains(&format!(r#""kind":"{kind}""#))).collect::<Vec<_>>();
    let (loading, loaded) = (of("loading"), of("loaded"));
    assert!((1..=10).contains(&loading.len()), "{events}");
    assert!(loading[0].contains("GB/s") && loading[0].contains(" s left, rank 1 is slowest at "), "{events}");
    assert!(loaded.len() == 2 && loaded[0].contains("1000000000 bytes read in 10.000 s, 0.10 GB/s"), "{events}");
}

#[test]
fn a_warning_of_the_time_limit_ends_a_server_resumably() {
    let ended = run("works", &[Signal::SIGUSR1]);
    assert_eq!(ended.failure().exit, Exit::Resumable);
    assert!(ended.failure().to_string().contains("the time of the allocation is over"), "{}", ended.failure());
}

#[test]
fn a_second_signal_or_the_deadline_cuts_the_drain() {
    let ended = run("never drains", &[Signal::SIGTERM, Signal::SIGINT]);
    assert_eq!(ended.failure().exit, Exit::Interrupted);
    assert_eq!(ended.report()["outcome"], "CANCELLED");

    let ended = run_with("never drains", &[Signal::SIGTERM], |spec| spec.deadlines.drain = Duration::from_millis(300));
    assert_eq!(ended.failure().exit, Exit::Terminated);
    assert!(ended.failure().to_string().contains("was not finished"), "{}", ended.failure());
}

#[test]
fn ranks_that_do_not_stop_are_killed() {
    let ended = run("deaf", &[Signal::SIGQUIT]);
    assert_eq!(ended.failure().exit, Exit::Terminated);
    assert!(ended.took < Duration::from_secs(10));
}

#[test]
fn a_killed_rank_is_the_cause_and_not_who_missed_it() {
    let ended = run("killed", &[]);
    let text = ended.failure().to_string();
    assert_eq!(ended.failure().exit, Exit::RankLost, "{text}");
    let rank = &Status::of(&ended.run_dir).unwrap().ranks[1];
    let process = rank.process.as_ref().unwrap();
    let expected = format!("rank 1 (host {}, pid {}) was killed by SIGKILL", process.host, process.pid);
    assert!(text.contains(&expected), "{text}");
    assert_eq!(run("dies at work", &[]).failure().exit, Exit::RankLost);
}

#[test]
fn a_rank_fails_with_its_own_code_and_words() {
    let ended = run("bad checkpoint", &[]);
    assert_eq!(ended.failure().exit, Exit::Checkpoint);
    let text = ended.failure().to_string();
    assert!(text.contains("caused by: no tensor named x") && text.contains("help: a hint"), "{text}");
    assert_eq!(run("crashes", &[]).failure().exit, Exit::Internal);
}

#[test]
fn missing_and_mismatched_ranks_fail_the_rendezvous() {
    let ended = run_with("absent", &[], |spec| spec.deadlines.rendezvous = Duration::from_secs(2));
    let text = ended.failure().to_string();
    assert_eq!(ended.failure().exit, Exit::Rendezvous, "{text}");
    assert!(text.contains("missing: rank 1 (host "), "{text}");

    let ended = run("another config", &[]);
    let text = ended.failure().to_string();
    assert_eq!(ended.failure().exit, Exit::Rendezvous, "{text}");
    assert!(text.contains("config is another there"), "{text}");
}

#[test]
fn a_late_phase_names_who_is_behind() {
    let ended = run_with("slow", &[], |spec| spec.deadlines.loading = Duration::from_millis(500));
    let text = ended.failure().to_string();
    assert_eq!(ended.failure().exit, Exit::Deadline, "{text}");
    assert!(text.contains("LOADING was not over") && text.contains("rank 1 (") && !text.contains("rank 0"), "{text}");
}

#[test]
fn work_without_progress_is_a_hang() {
    for (part, text) in [("hangs", "no step was completed for 1s"), ("silent", "has said nothing for 1s")] {
        let ended = run_with(part, &[], |spec| spec.deadlines.progress = Duration::from_secs(1));
        assert_eq!(ended.failure().exit, Exit::NoProgress);
        assert!(ended.failure().to_string().contains(text), "{}", ended.failure());
    }
}
