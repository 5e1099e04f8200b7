//! How a run stands, for those who ask from outside: what its supervisor wrote, and what the scheduler says when that is not enough.

use std::time::{Duration, Instant};

use crate::events::now;
use crate::replicas;
use crate::report::{Exit, Outcome};
use crate::rundir::RunDir;
use crate::slurm::client::{BRIEF, SlurmError};
use crate::slurm::job::Job;
use crate::slurm::parse::{self, Queued, State};
use crate::spec::RunSpec;
use crate::state::{End, RunPhase, Status};

/// A supervisor that lives writes twice a second; the clocks of two hosts may differ by a little.
const FRESH: Duration = Duration::from_secs(5);
/// How long to wait before Slurm is asked again, at first and at most.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));

/// Looks at a run again and again, and asks the scheduler only now and then.
pub(crate) struct Observer {
    run_dir: RunDir,
    spec: RunSpec,
    /// Of its replicas, if it has some.
    parts: Vec<Self>,
    scheduled: bool,
    job: Option<Job>,
    asked: Option<Instant>,
    pause: Duration,
    answer: Answer,
}

#[derive(Clone, Debug, Default)]
enum Answer {
    #[default]
    Nothing,
    Known(Queued),
    /// The job has ended, and this is how, if anybody knows.
    Gone(Option<State>),
    Silent(String),
}

impl Observer {
    pub(crate) fn new(run_dir: &RunDir) -> Outcome<Self> {
        let spec = run_dir.spec()?;
        let parts = replicas::of(run_dir, &spec).iter().map(Self::new).collect::<Outcome<_>>()?;
        let scheduled = spec.site.is_some();
        let run_dir = run_dir.clone();
        Ok(Self { run_dir, spec, parts, scheduled, job: None, asked: None, pause: PAUSES.0, answer: Answer::Nothing })
    }

    pub(crate) fn look(&mut self) -> Outcome<Status> {
        if !self.parts.is_empty() {
            let parts = self.parts.iter_mut().map(Self::look).collect::<Outcome<_>>()?;
            return Ok(replicas::whole(&self.spec, parts));
        }
        let status = Status::of(&self.run_dir)?;
        let age = now().duration_since(status.updated).unsigned_abs();
        if !self.scheduled || status.phase.is_end() || (status.supervisor.is_some() && age < FRESH) {
            return Ok(status);
        }
        if self.asked.is_none_or(|asked| asked.elapsed() >= self.pause) {
            self.pause = if self.asked.is_some() { (self.pause * 2).min(PAUSES.1) } else { self.pause };
            self.answer = self.ask()?;
            self.asked = Some(Instant::now());
        }
        // Its supervisor may have written its last words meanwhile.
        let mut status = Status::of(&self.run_dir)?;
        if !status.phase.is_end() {
            self.complete(&mut status);
        }
        Ok(status)
    }

    fn ask(&mut self) -> Outcome<Answer> {
        // The run may have gone on with another job.
        self.job = match Job::of(&self.run_dir) {
            Ok(job) => job,
            Err(failure) if failure.exit == Exit::SchedulerSilent => {
                return Ok(Answer::Silent(failure.error.to_string()));
            }
            Err(failure) => return Err(failure),
        };
        let Some(job) = &self.job else { return Ok(Answer::Gone(None)) };
        Ok(match job.look(BRIEF) {
            Ok(Some(queued)) if queued.state.is_end() => Answer::Gone(Some(queued.state)),
            Ok(Some(queued)) => Answer::Known(queued),
            Ok(None) => Answer::Gone(job.accounted().filter(State::is_end)),
            Err(error @ (SlurmError::Silent { .. } | SlurmError::Missing { .. })) => Answer::Silent(error.to_string()),
            Err(error) => return Err(error.into()),
        })
    }

    fn complete(&self, status: &mut Status) {
        let job = self.job.as_ref().map_or_else(|| "its job".into(), |job| format!("job {}", job.id));
        match &self.answer {
            Answer::Nothing => {}
            Answer::Silent(error) => {
                status.note = Some(format!("scheduler unreachable, last seen {}: {error}", status.updated));
            }
            Answer::Known(queued) => {
                let mut note = format!("{job} {}", queued.state.words());
                if queued.state.is_waiting() {
                    status.phase = RunPhase::Pending;
                    let reason = parse::reason(&queued.reason);
                    note += &format!(": {} ({})", reason.words, queued.reason);
                    if reason.stuck {
                        note += "; it will not start by itself";
                    } else if let Some(start) = &queued.start {
                        note += &format!("; expected to start {start}");
                    }
                } else if status.supervisor.is_some() {
                    note += &format!(" on {}, but its supervisor was last heard at {}", queued.nodes, status.updated);
                } else {
                    note += &format!(" on {}", queued.nodes);
                }
                status.note = Some(note);
            }
            Answer::Gone(state) => {
                let (phase, exit) = match state {
                    Some(State::Cancelled) => (RunPhase::Cancelled, Exit::Terminated),
                    Some(State::Timeout | State::Preempted | State::Deadline) => (RunPhase::Failed, Exit::Resumable),
                    _ => (RunPhase::Failed, Exit::RankLost),
                };
                let how = state.as_ref().map_or("is unknown to Slurm", State::words);
                let silence = if status.supervisor.is_some() {
                    "its supervisor did not say how it ended"
                } else {
                    "its supervisor never started"
                };
                status.phase = phase;
                status.url = None;
                status.deadline = None;
                status.eta_s = None;
                status.end = Some(End::because(exit, &format!("{job} {how}; {silence}")));
            }
        }
    }
}
