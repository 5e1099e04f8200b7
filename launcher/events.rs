//! The event journal: what happened to a run, one JSON object a line. Only the supervisor writes it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::rundir::RunDir;
use crate::state::RunPhase;

/// One line of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Event {
    pub(crate) schema: u32,
    pub(crate) time: Timestamp,
    pub(crate) attempt: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) rank: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) host: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) phase: Option<RunPhase>,
    /// `started`, `joined`, `phase`, `loading` (each tenth of all weights), `loaded`, `ready`, `signal`, `note`, `warning`, `recovered`, `fault`,
    /// `handed_on` (the attempt ended and the run did not), `ended`.
    pub(crate) kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) text: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) exit_code: Option<u8>,
}

impl Event {
    pub(crate) fn new(kind: &str) -> Self {
        Self {
            schema: 1,
            time: now(),
            attempt: 0,
            rank: None,
            host: None,
            phase: None,
            kind: kind.into(),
            text: None,
            exit_code: None,
        }
    }

    pub(crate) fn text(self, text: impl Into<String>) -> Self {
        Self { text: Some(text.into()), ..self }
    }

    pub(crate) fn rank(self, rank: usize, host: impl Into<String>) -> Self {
        Self { rank: Some(rank), host: Some(host.into()), ..self }
    }

    pub(crate) fn phase(self, phase: RunPhase) -> Self {
        Self { phase: Some(phase), ..self }
    }

    /// As a line for people.
    pub(crate) fn line(&self) -> String {
        let mut line = format!("{:.3} {:<8}", self.time, self.kind);
        if let Some(rank) = self.rank {
            line += &format!(" r{rank:02}");
        }
        if let Some(host) = &self.host {
            line += &format!(" {host}");
        }
        if let Some(phase) = self.phase {
            line += &format!(" {phase}");
        }
        if let Some(text) = &self.text {
            line += &format!(" {text}");
        }
        if let Some(code) = self.exit_code {
            line += &format!(" (exit code {code})");
        }
        line
    }
}

/// The present, to the millisecond.
pub(crate) fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_millisecond(now.as_millisecond()).unwrap_or(now)
}

/// Appends events.
pub(crate) struct Journal {
    file: File,
    attempt: u32,
}

impl Journal {
    pub(crate) fn open(run_dir: &RunDir, attempt: u32) -> io::Result<Self> {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(run_dir.events_file())?;
        Ok(Self { file, attempt })
    }

    /// A journal that cannot be written (a full disk) must not end a run that works, so failures go to the log only.
    pub(crate) fn write(&mut self, event: Event) {
        let event = Event { attempt: self.attempt, ..event };
        let result = serde_json::to_vec(&event).map_err(io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            // One write a line: a reader never sees lines mixed.
            self.file.write_all(&line)
        });
        if let Err(error) = result {
            tracing::warn!(%error, "cannot write the event journal");
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::spec::testing::serve_spec;

    #[test]
    fn events_are_lines_that_read_back() {
        let root = tempfile::tempdir().unwrap();
        let run_dir = RunDir::create(root.path(), &mut serve_spec("run")).unwrap();
        let mut journal = Journal::open(&run_dir, 2).unwrap();
        journal.write(Event::new("joined").rank(3, "n1"));
        drop(journal);
        Journal::open(&run_dir, 2).unwrap().write(Event::new("phase").phase(RunPhase::CommInit).text("line\nbreak"));
        let text = std::fs::read_to_string(run_dir.events_file()).unwrap();
        let events: Vec<Event> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(events.len(), 2);
        assert_eq!((events[0].attempt, events[0].rank, events[0].host.as_deref()), (2, Some(3), Some("n1")));
        assert!(text.contains(r#""phase":"COMM_INIT""#), "{text}");
        assert!(events[1].line().contains("COMM_INIT"));
    }
}
