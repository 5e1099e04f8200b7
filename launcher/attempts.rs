//! The attempts of a run, as they are on the disk.
//!
//! Each start of the ranks is an attempt with a directory and a record of its own, whoever started it. A supervisor begins an attempt
//! by making its record, which only one can; it completes the record at the end. Where a supervisor was killed, the next one does it.

use std::fs;
use std::io;

use anyhow::Context as _;
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::events::now;
use crate::process::ProcessId;
use crate::report::{Blame, Exit, Outcome};
use crate::rundir::{RunDir, read_json, write_json};
use crate::state::{End, Status};

/// For how long a node is avoided that is suspect, and one that is known to be bad.
const AVOIDED: (SignedDuration, SignedDuration) = (SignedDuration::from_hours(1), SignedDuration::from_hours(24));

/// What `attempt.json` holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Attempt {
    pub(crate) schema: u32,
    pub(crate) attempt: u32,
    /// Somebody launched or resumed it; else the run went on by itself.
    pub(crate) by_user: bool,
    pub(crate) supervisor: ProcessId,
    /// The job of Slurm that it ran in.
    pub(crate) job: Option<u64>,
    pub(crate) ranks: usize,
    pub(crate) started: Timestamp,
    /// When the ranks were ready.
    pub(crate) ready: Option<Timestamp>,
    pub(crate) ended: Option<Timestamp>,
    pub(crate) end: Option<End>,
    /// Rows that this attempt completed: those of its job, or of requests.
    pub(crate) rows: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) generated_tokens: u64,
}

impl Attempt {
    /// Seconds from its start to its end; to the present while it goes on.
    pub(crate) fn seconds(&self) -> f64 {
        self.ended.unwrap_or_else(now).duration_since(self.started).as_secs_f64().max(0.0)
    }

    /// The seconds of these in which its ranks worked.
    pub(crate) fn worked(&self) -> f64 {
        self.ready.map_or(0.0, |ready| self.ended.unwrap_or_else(now).duration_since(ready).as_secs_f64().max(0.0))
    }

    pub(crate) fn exit(&self) -> Option<Exit> {
        self.end.as_ref().and_then(|end| end.exit)
    }

    pub(crate) fn write(&self, run_dir: &RunDir) -> io::Result<()> {
        write_json(&run_dir.attempt_file(self.attempt), self)
    }

    /// What a snapshot of the run knows about it.
    pub(crate) fn count(&mut self, status: &Status) {
        self.rows = status.job.map_or(status.stats.finished_rows, |job| job.rows_done.saturating_sub(job.rows_kept));
        self.prompt_tokens = status.stats.prompt_tokens;
        self.generated_tokens = status.stats.generated_tokens;
    }
}

/// Begins the newest attempt, or the one after it if that has begun. The last of the list is the new one.
///
/// # Errors
/// The run directory cannot be written, or holds a damaged record.
pub(crate) fn begin(run_dir: &RunDir, ranks: usize, job: Option<u64>) -> Outcome<Vec<Attempt>> {
    loop {
        let mut attempts = read(run_dir)?;
        if let Some(last) = attempts.last_mut().filter(|last| last.ended.is_none()) {
            close(run_dir, last)?;
        }
        let number = attempts.last().map_or(0, |last| last.attempt + 1).max(run_dir.last_attempt());
        let attempt = Attempt {
            schema: 1,
            attempt: number,
            by_user: number == 0 || run_dir.resumed_file(number).exists(),
            supervisor: ProcessId::current(),
            job,
            ranks,
            started: now(),
            ready: None,
            ended: None,
            end: None,
            rows: 0,
            prompt_tokens: 0,
            generated_tokens: 0,
        };
        let claim = || -> io::Result<bool> {
            run_dir.make_attempt(number)?;
            let own = run_dir.attempt(number).join(format!("attempt.{}.tmp", std::process::id()));
            write_json(&own, &attempt)?;
            // A link is made whole or not at all, and never over another one.
            let linked = fs::hard_link(&own, run_dir.attempt_file(number));
            fs::remove_file(&own)?;
            match linked {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
                linked => linked.map(|()| true),
            }
        };
        if claim().with_context(|| format!("cannot begin attempt {number} in {}", run_dir.path().display()))? {
            attempts.push(attempt);
            return Ok(attempts);
        }
    }
}

/// The attempts that have begun, the oldest first.
pub(crate) fn read(run_dir: &RunDir) -> Outcome<Vec<Attempt>> {
    let mut attempts = Vec::new();
    for number in 0..=run_dir.last_attempt() {
        attempts.extend(read_json::<Attempt>(&run_dir.attempt_file(number))?);
    }
    Ok(attempts)
}

/// Completes the record of an attempt whose supervisor was killed, from its last snapshot.
fn close(run_dir: &RunDir, attempt: &mut Attempt) -> Outcome {
    let snapshot = read_json::<Status>(&run_dir.status_file())?.filter(|status| status.attempt == attempt.attempt);
    attempt.ended = Some(snapshot.as_ref().map_or(attempt.started, |status| status.updated));
    if let Some(status) = &snapshot {
        attempt.count(status);
    }
    let known = snapshot.and_then(|status| status.end);
    attempt.end = Some(known.unwrap_or_else(|| End::lost("its supervisor was killed")));
    Ok(attempt.write(run_dir).context("cannot complete the record of the attempt before")?)
}

/// A node that a new job should avoid, and why.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Suspect {
    pub(crate) node: String,
    pub(crate) until: Timestamp,
    /// The last attempt that blames it.
    pub(crate) attempt: u32,
    pub(crate) exit_code: u8,
    pub(crate) evidence: String,
}

/// The nodes that attempts have blamed, each by its last evidence, whether it has expired or not.
pub(crate) fn suspects(attempts: &[Attempt]) -> Vec<Suspect> {
    let mut suspects: Vec<Suspect> = Vec::new();
    for attempt in attempts {
        let (Some(end), Some(ended)) = (&attempt.end, attempt.ended) else { continue };
        let avoided = match end.exit.map_or(Blame::Nothing, Exit::blame) {
            Blame::Nothing => continue,
            Blame::Suspect => AVOIDED.0,
            Blame::Unhealthy => AVOIDED.1,
        };
        for node in &end.nodes {
            suspects.retain(|suspect| suspect.node != *node);
            suspects.push(Suspect {
                node: node.clone(),
                until: ended.saturating_add(avoided).unwrap_or(Timestamp::MAX),
                attempt: attempt.attempt,
                exit_code: end.exit_code,
                evidence: end.cause.clone().unwrap_or_default(),
            });
        }
    }
    suspects
}

/// The nodes that a job should avoid now.
pub(crate) fn avoided(attempts: &[Attempt]) -> Vec<String> {
    suspects(attempts).into_iter().filter(|suspect| suspect.until > now()).map(|suspect| suspect.node).collect()
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// An attempt that has just ended so, after `rows` rows.
    pub(crate) fn ended(attempt: u32, exit: Option<Exit>, rows: u64, nodes: &[&str]) -> Attempt {
        let nodes = nodes.iter().map(|&node| node.to_owned()).collect();
        let end = End {
            exit,
            exit_code: exit.map_or(0, |exit| exit as u8),
            cause: Some("the evidence".into()),
            hints: Vec::new(),
            rank: None,
            nodes,
            crashed: false,
        };
        Attempt {
            schema: 1,
            attempt,
            by_user: attempt == 0,
            supervisor: ProcessId::current(),
            job: Some(7),
            ranks: 2,
            started: now(),
            ready: None,
            ended: Some(now()),
            end: Some(end),
            rows,
            prompt_tokens: 0,
            generated_tokens: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::spec::testing::serve_spec;

    #[test]
    fn an_attempt_is_begun_once() {
        let root = tempfile::tempdir().unwrap();
        let run_dir = RunDir::create(root.path(), &mut serve_spec("run")).unwrap();
        let mut numbers: Vec<u32> = std::thread::scope(|scope| {
            // As processes would, each with a name of its own for the file that it links.
            let begin = || begin(&run_dir, 1, None).unwrap().last().unwrap().attempt;
            let first = begin();
            let rest: Vec<_> = (0..2).map(|_| scope.spawn(begin).join().unwrap()).collect();
            std::iter::once(first).chain(rest).collect()
        });
        numbers.sort_unstable();
        assert_eq!(numbers, [0, 1, 2]);
        let attempts = read(&run_dir).unwrap();
        assert!(attempts[0].by_user && !attempts[1].by_user);
        // Those that did not end were completed by the next.
        assert_eq!(attempts[1].exit(), Some(Exit::RankLost));
        assert!(attempts[2].ended.is_none());
    }

    #[test]
    fn nodes_are_blamed_with_evidence_and_for_a_time() {
        let attempts = [
            testing::ended(0, Some(Exit::RankLost), 0, &["n1"]),
            testing::ended(1, Some(Exit::NoProgress), 0, &["n2"]),
            testing::ended(2, Some(Exit::DeviceUnhealthy), 0, &["n3", "n1"]),
        ];
        let suspects = suspects(&attempts);
        assert_eq!(suspects.iter().map(|suspect| suspect.node.as_str()).collect::<Vec<_>>(), ["n3", "n1"]);
        assert_eq!((suspects[1].attempt, suspects[1].exit_code), (2, 23));
        let hours = suspects[0].until.duration_since(now()).as_hours();
        assert!((23..=24).contains(&hours), "{hours}");
    }
}
