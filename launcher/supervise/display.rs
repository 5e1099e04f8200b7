//! What a person sees on stderr while a run goes on: one moving line on a terminal, a line a change elsewhere.

use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use tracing::level_filters::LevelFilter;

use crate::state::{RunPhase, Status};

/// How often a job says how far it is when stderr is no terminal.
const INTERVAL: Duration = Duration::from_secs(5);

pub(crate) struct Display {
    mode: Mode,
    /// What was shown: phase, and what the scheduler said.
    shown: Option<(RunPhase, Option<String>)>,
    warned: Vec<String>,
    spoke: Instant,
}

enum Mode {
    Quiet,
    Lines,
    Bar(ProgressBar),
}

impl Display {
    /// For whoever looks at stderr.
    pub(crate) fn stderr(quiet: bool) -> Self {
        let mode = if quiet {
            Mode::Quiet
        } else if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("{spinner} {elapsed} {wide_msg}");
            let bar = ProgressBar::new_spinner().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar.enable_steady_tick(Duration::from_millis(200));
            Mode::Bar(bar)
        } else {
            Mode::Lines
        };
        Self { mode, shown: None, warned: Vec::new(), spoke: Instant::now() }
    }

    /// Shows the present state. How a run ended is for its command to say.
    pub(crate) fn show(&mut self, status: &Status) {
        if status.phase.is_end() {
            return;
        }
        // READY and BUSY alternate with every request; only the moving line follows them.
        let phase = if status.phase == RunPhase::Busy { RunPhase::Ready } else { status.phase };
        for warning in status.warnings.iter().filter(|warning| !self.warned.contains(warning)) {
            self.say(&format!("warning: {warning}"));
        }
        self.warned.clone_from(&status.warnings);
        let news = Some((phase, status.note.clone()));
        let changed = self.shown != news;
        self.shown = news;
        match &self.mode {
            Mode::Quiet => {}
            Mode::Bar(bar) => bar.set_message(line(status)),
            Mode::Lines => {
                let due = status.job.is_some() && status.phase.is_up() && self.spoke.elapsed() >= INTERVAL;
                if changed || due {
                    self.spoke = Instant::now();
                    print(&line(status));
                }
            }
        }
    }

    /// Says something that stays.
    pub(crate) fn say(&self, text: &str) {
        match &self.mode {
            Mode::Quiet => {}
            Mode::Lines => print(text),
            Mode::Bar(bar) => bar.suspend(|| print(text)),
        }
    }

    /// Leaves the terminal clean.
    pub(crate) fn finish(&self) {
        if let Mode::Bar(bar) = &self.mode {
            bar.finish_and_clear();
        }
    }
}

/// Whether `-q` was given.
pub(crate) fn is_quiet() -> bool {
    LevelFilter::current() < LevelFilter::WARN
}

/// Tells whoever looks at stderr, unless they do not want to hear.
pub(crate) fn narrate(text: &str) {
    if !is_quiet() {
        print(text);
    }
}

/// A reader of stderr that has gone must not end the run.
fn print(text: &str) {
    _ = writeln!(std::io::stderr(), "{text}");
}

/// A run in one line.
pub(crate) fn line(status: &Status) -> String {
    let mut line = format!("{:<10}", status.phase);
    if status.phase.is_up() || status.phase == RunPhase::Draining {
        if let Some(job) = status.job {
            _ = write!(line, " rows {}/{}", job.rows_done, job.rows_total);
            if job.rows_failed > 0 {
                _ = write!(line, ", {} failed", job.rows_failed);
            }
            if job.paused {
                line += ", paused: journal or output cannot be written";
            }
        } else {
            _ = write!(line, " {} running, {} waiting", status.stats.running, status.stats.waiting);
        }
        _ = write!(line, ", {:.1} tokens/s", status.tokens_per_second);
        if let Some(eta) = status.eta_s {
            _ = write!(line, ", {} left", span(eta));
        }
        if let Some(url) = &status.url {
            _ = write!(line, "  {url}");
        }
    } else if !status.phase.is_end() && status.phase != RunPhase::Pending {
        _ = write!(line, " {:3.0} %", status.progress() * 100.0);
        if let (RunPhase::Loading, Some(loading)) = (status.phase, status.loading()) {
            _ = write!(line, ", {loading}");
        }
    }
    if let Some(until) = status.until.filter(|_| status.phase.is_up()) {
        let left = until.duration_since(Timestamp::now()).as_secs_f64();
        _ = write!(line, "  (allocation ends in {}{})", span(left.max(0.0)), part_by(status, left));
    }
    if let Some(deadline) = status.deadline {
        let left = deadline.duration_since(Timestamp::now()).as_secs_f64();
        _ = write!(line, "  (deadline in {})", span(left.max(0.0)));
    }
    if let Some(cause) = status.end.as_ref().and_then(|end| end.cause.as_ref()) {
        _ = write!(line, " {cause}");
    }
    if let Some(note) = &status.note {
        _ = write!(line, "  {note}");
    }
    line.truncate(line.trim_end().len());
    line
}

/// Which part of a job's rows will be done in so many seconds, if that is not all of them.
fn part_by(status: &Status, seconds: f64) -> String {
    let (Some(job), Some(eta)) = (status.job, status.eta_s.filter(|&eta| eta > seconds)) else { return String::new() };
    let rows_left = job.rows_total.saturating_sub(job.rows_done) as f64;
    let done = job.rows_done as f64 + rows_left * (seconds.max(0.0) / eta);
    format!(", about {:.0} % of the rows will be done", 100.0 * done / job.rows_total.max(1) as f64)
}

/// `1h02m`, `3m20s` or `12s`.
pub(crate) fn span(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use nemotron_engine::job::JobProgress;

    use super::*;
    use crate::spec::testing::serve_spec;

    #[test]
    fn the_part_that_the_time_is_enough_for_is_said() {
        let mut status = Status::pending(&serve_spec("run"), 0);
        status.job = Some(JobProgress { rows_total: 1000, rows_done: 200, ..JobProgress::default() });
        status.eta_s = Some(400.0);
        assert_eq!(part_by(&status, 100.0), ", about 40 % of the rows will be done");
        assert_eq!(part_by(&status, -1.0), ", about 20 % of the rows will be done");
        assert_eq!(part_by(&status, 500.0), "");
    }
}
