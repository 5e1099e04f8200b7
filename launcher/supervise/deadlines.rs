//! What must have happened by when: phases, signs of life, progress.

use std::time::{Duration, Instant};

use super::attempt::Supervisor;
use super::display::span;
use super::member::Member;
use super::record::later;
use super::verdict::{Fault, Wish};
use crate::events::now;
use crate::ranks::Notice;
use crate::rendezvous::NETWORK_HINT;
use crate::report::Exit;
use crate::spec::Task;
use crate::state::RunPhase;

/// A rank says that it lives twice a second, on a thread that does nothing else.
const SILENCE: Duration = Duration::from_secs(25);
/// For how long after the end of the step that held them ranks may still be heard.
const AFTER_COLLAPSE: Duration = Duration::from_secs(1);

/// The share of the time left that stays for ending the ranks and for the final record, and within which bounds.
const MARGIN: (u32, Duration, Duration) = (10, Duration::from_secs(5), Duration::from_secs(60));
/// How much earlier than asked a scheduler may warn of the time limit.
const WARNING_SLACK: Duration = Duration::from_secs(150);

impl Supervisor<'_> {
    /// The scheduler takes the nodes back after `left`.
    pub(super) fn must_end_within(&mut self, left: Duration) {
        let margin = (left / MARGIN.0).clamp(MARGIN.1, MARGIN.2);
        self.closes = Some(Instant::now() + left.saturating_sub(margin));
        self.record.status.until = later(now(), left);
        self.record.changed = true;
    }

    /// The scheduler's signal ahead of the time limit, or of something else that ends the job. Our own clock is better than the first.
    pub(super) fn warned(&mut self) {
        match self.ranks.time_left() {
            Some(left) if left <= self.spec.deadlines.drain + WARNING_SLACK => self.must_end_within(left),
            Some(_) => self.stop(Wish::Withdrawn(Notice::Preempted)),
            None => self.stop(Wish::Withdrawn(Notice::TimeOver)),
        }
    }

    /// Whether the end of the allocation has come near. A job's rows heed the deadline that rank 0 was given, and end before.
    fn is_closing(&self, now: Instant) -> bool {
        let Some(closes) = self.closes else { return false };
        let started = self.record.status.phase.is_up();
        // Of a short time not all is for draining.
        let drain = self.spec.deadlines.drain.min(closes.duration_since(self.record.phase_began) / 4);
        now >= if started && !self.is_job() { closes.checked_sub(drain).unwrap_or(closes) } else { closes }
    }

    /// A server that nobody uses.
    fn is_idle(&self, now: Instant) -> bool {
        let Task::Serve { idle_s: Some(limit), .. } = self.spec.task else { return false };
        self.record.status.phase.is_up() && now.duration_since(self.used).as_secs_f64() >= limit
    }

    pub(super) fn check_deadlines(&mut self, now: Instant) {
        if self.is_closing(now) {
            return self.stop(Wish::Withdrawn(Notice::TimeOver));
        }
        if self.is_idle(now) {
            return self.stop(Wish::Idle);
        }
        if self.record.phase_deadline.is_some_and(|deadline| now >= deadline) {
            let fault = self.late();
            return self.fail_now(fault);
        }
        if let Some(fault) = self.abandoned_node(now) {
            return self.fail_now(fault);
        }
        let limit = self.spec.deadlines.progress;
        let silence = limit.min(SILENCE);
        let silent = |member: &&Member| member.is_connected() && now.duration_since(member.heard) >= silence;
        if let Some(rank) = self.members.iter().find(silent).map(|member| member.status.rank) {
            let fault = format!("{} has said nothing for {}", self.name(rank), span(silence.as_secs_f64()));
            let mut fault = Fault::new(Some(rank), Exit::NoProgress, fault);
            fault.hints.push("it was stopped, or its host hangs or cannot be reached".into());
            return self.fail_now(fault);
        }
        let text = span(limit.as_secs_f64());
        let queued =
            self.record.status.phase.is_up() && self.record.status.stats.waiting + self.record.status.stats.running > 0;
        if queued && now.duration_since(self.moved) >= limit {
            let slowest = self.members.iter().min_by_key(|member| member.status.steps);
            let rank = slowest.map_or(0, |member| member.status.rank);
            let fault =
                format!("no step was completed for {text} although rows are queued; {} is behind", self.name(rank));
            self.fail_now(Fault::new(Some(rank), Exit::NoProgress, fault));
        }
    }

    /// A start-up phase has passed its deadline.
    fn late(&self) -> Fault {
        let phase = self.record.status.phase;
        let limit = span(self.limit(phase).unwrap_or_default().as_secs_f64());
        let is_behind = |member: &&Member| match phase {
            RunPhase::Preflight | RunPhase::Rendezvous => !member.has_joined(),
            _ => member.status.phase.is_none_or(|at| RunPhase::from(at) <= phase),
        };
        let behind: Vec<usize> = self.members.iter().filter(is_behind).map(|member| member.status.rank).collect();
        let names: Vec<_> = behind.iter().map(|&rank| self.name(rank)).collect();
        let (exit, what) = match phase {
            RunPhase::Rendezvous => (Exit::Rendezvous, "missing"),
            _ => (Exit::Deadline, "behind"),
        };
        let text = format!("{phase} was not over within {limit}; {what}: {}", names.join(", "));
        let mut fault = Fault::new(behind.first().copied(), exit, text);
        if !fault.blamed.is_empty() {
            fault.blamed = behind;
        }
        fault.hints.extend((exit == Exit::Rendezvous).then(|| NETWORK_HINT.into()));
        fault.hints.push(format!("if it only needs longer: --set deadlines.{}=…", phase.to_string().to_lowercase()));
        fault
    }

    /// Every rank that can be reached has ended after one was lost. A step waits long for a node that does not answer.
    pub(super) fn is_deserted(&self, now: Instant) -> bool {
        let lost = self.verdict.as_ref().is_some_and(|verdict| verdict.exit == Some(Exit::RankLost));
        lost && self.members.iter().all(|member| member.is_gone(now, AFTER_COLLAPSE))
    }

    /// The step that held the ranks is gone, and nothing else has explained it.
    pub(super) fn has_collapsed(&self, now: Instant) -> bool {
        self.collapsed.as_ref().is_some_and(|&(at, _)| now.duration_since(at) >= AFTER_COLLAPSE)
    }

    pub(super) fn fail_collapsed(&mut self) {
        let how = self.collapsed.as_ref().map(|(_, how)| how.clone()).unwrap_or_default();
        let absent = |member: &&Member| !member.has_joined();
        let absent: Vec<usize> = self.members.iter().filter(absent).map(|member| member.status.rank).collect();
        let fault = if absent.is_empty() {
            Fault::new(None, Exit::RankLost, "all ranks were ended at once")
        } else {
            let names: Vec<_> = absent.iter().map(|&rank| self.name(rank)).collect();
            let text = format!("Slurm could not start {}", names.join(", "));
            Fault { blamed: absent.clone(), ..Fault::new(Some(absent[0]), Exit::Rendezvous, text) }
        };
        let mut fault = fault;
        fault.error.push(how);
        self.fail_now(fault);
    }

    pub(super) fn limit(&self, phase: RunPhase) -> Option<Duration> {
        let deadlines = &self.spec.deadlines;
        match phase {
            RunPhase::Preflight => Some(deadlines.preflight),
            RunPhase::Rendezvous => Some(deadlines.rendezvous),
            RunPhase::CommInit => Some(deadlines.comm_init),
            RunPhase::Loading => Some(deadlines.loading),
            RunPhase::Warmup => Some(deadlines.warmup),
            RunPhase::Draining => Some(deadlines.drain),
            _ => None,
        }
    }
}
