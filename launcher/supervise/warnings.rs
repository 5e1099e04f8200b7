//! What is not as it should be and does not end the run by itself: said once, shown until it is over.

use std::time::{Duration, Instant};

use super::attempt::Supervisor;
use super::display::span;
use super::verdict::Fault;
use crate::events::Event;
use crate::report::Exit;

/// For how long ranks are compared at a time, over how many steps at least, and for how many times in a row one must be slow.
const WINDOW: (Duration, u64, u32) = (Duration::from_secs(5), 10, 2);
/// How many times as long as the others it must compute.
const SLOW: f64 = 2.0;

/// How fast ranks compute beside each other.
pub(super) struct Pace {
    since: Instant,
    /// Steps and seconds of each rank at that time.
    marks: Vec<(u64, f64)>,
    /// The rank that is slow, and in how many windows it was.
    slow: Option<(usize, u32)>,
    warning: Option<(usize, String)>,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self { since: Instant::now(), marks: Vec::new(), slow: None, warning: None }
    }
}

/// The rank that holds its stage up, and by what factor: the ranks of a stage do equal work, so one that computes much longer than the median
/// of the others is on a slower or a busier host. `seconds` are those of a step, by rank; `tp` ranks are a stage.
fn straggler(seconds: &[f64], tp: usize) -> Option<(usize, f64)> {
    let factor = |rank: usize| {
        let stage = rank / tp * tp..(rank / tp + 1) * tp;
        let mut others: Vec<f64> = stage.filter(|&other| other != rank).map(|other| seconds[other]).collect();
        others.sort_by(f64::total_cmp);
        let median = others.get(others.len() / 2).copied().filter(|&median| median > 0.0)?;
        Some((rank, seconds[rank] / median))
    };
    (0..seconds.len()).filter_map(factor).filter(|&(_, factor)| factor > SLOW).max_by(|a, b| a.1.total_cmp(&b.1))
}

impl Supervisor<'_> {
    /// Compares the ranks now and then, while there is work.
    pub(super) fn follow_pace(&mut self, now: Instant) {
        if now.duration_since(self.pace.since) < WINDOW.0 || !self.record.status.phase.is_up() {
            return;
        }
        let marks: Vec<(u64, f64)> =
            self.members.iter().map(|member| (member.status.steps, member.status.busy_s)).collect();
        let pairs = || self.pace.marks.iter().zip(&marks);
        // The first time there is nothing to compare with.
        if pairs().any(|(before, after)| after.0 < before.0 + WINDOW.1) {
            return;
        }
        let seconds: Vec<f64> =
            pairs().map(|(before, after)| (after.1 - before.1) / (after.0 - before.0) as f64).collect();
        (self.pace.since, self.pace.marks) = (now, marks);
        let found = straggler(&seconds, self.spec.mesh.tp);
        let before = self.pace.slow;
        self.pace.slow = found.map(|(rank, _)| match before {
            Some((same, times)) if same == rank => (rank, times + 1),
            _ => (rank, 1),
        });
        let warned = self.pace.warning.as_ref().map(|(rank, _)| *rank);
        if let Some((rank, subject)) = self.pace.warning.take_if(|(rank, _)| Some(*rank) != found.map(|(rank, _)| rank))
        {
            let host = self.members[rank].host();
            self.record.withdraw(
                &subject,
                Event::new("recovered").rank(rank, host).text(format!("{} keeps up", self.name(rank))),
            );
        }
        if let (Some((rank, factor)), Some((_, times))) = (found, self.pace.slow)
            && times >= WINDOW.2
            && warned != Some(rank)
        {
            let subject = format!("{} is slow", self.name(rank));
            let text = format!(
                "{subject}: it computes {factor:.1} times as long as the other ranks of its stage, and all wait for it; look for what else \
                 its host does"
            );
            self.record.warn(Event::new("warning").rank(rank, self.members[rank].host()).text(text));
            self.pace.warning = Some((rank, subject));
        }
    }

    /// The scheduler's daemon on a rank's node has gone or is back. The ranks do without it: restarts and upgrades of it are common, and jobs
    /// survive them.
    pub(super) fn daemon_changed(&mut self, rank: usize, there: bool) {
        let node = self.ranks.node(rank).unwrap_or_default();
        let subject = format!("slurmd on {node} is gone");
        if there {
            self.members[rank].daemon_gone = None;
            return self.record.withdraw(
                &subject,
                Event::new("recovered").rank(rank, &node).text(format!("slurmd on {node} is back")),
            );
        }
        let until = match self.daemon_patience() {
            Some(limit) => format!(
                ", and ends with code {} if it is not back within {}",
                Exit::RankLost as u8,
                span(limit.as_secs_f64())
            ),
            None => String::new(),
        };
        self.members[rank].daemon_gone = Some(Instant::now());
        let text = format!("{subject}: Slurm can neither signal nor end the ranks there; the run goes on{until}");
        self.record.warn(Event::new("warning").rank(rank, node).text(text));
    }

    fn daemon_patience(&self) -> Option<Duration> {
        let own = self.spec.deadlines.slurmd_s.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        own.or_else(|| self.ranks.daemon_patience())
    }

    /// A node whose daemon has been gone for too long. Better an end of ours, with rows kept and a cause, than Slurm's.
    pub(super) fn abandoned_node(&self, now: Instant) -> Option<Fault> {
        let limit = self.daemon_patience()?;
        let gone = |since: Instant| now.duration_since(since) >= limit;
        let member = self.members.iter().find(|member| member.daemon_gone.is_some_and(gone))?;
        let rank = member.status.rank;
        let node = self.ranks.node(rank).unwrap_or_default();
        let text = format!("slurmd on {node} has been gone for {}", span(limit.as_secs_f64()));
        let mut fault = Fault::new(Some(rank), Exit::RankLost, text);
        fault.error.push("Slurm no longer controls that node, and would end the job".into());
        fault
            .hints
            .push(format!("see why slurmd ended on {node} (`systemctl status slurmd`, its log), and start it again"));
        fault.hints.push("if it only needs longer: --set deadlines.slurmd=…".into());
        Some(fault)
    }
}

#[cfg(test)]
mod tests {
    use super::straggler;

    #[test]
    fn a_straggler_is_slower_than_the_others_of_its_stage() {
        assert_eq!(straggler(&[1.0, 1.1, 0.9, 3.3], 4), Some((3, 3.3)));
        assert_eq!(straggler(&[1.0, 1.1, 1.9, 1.2], 4), None);
        // Stages need not do equal work.
        assert_eq!(straggler(&[1.0, 1.0, 5.0, 5.0], 2), None);
        assert_eq!(straggler(&[1.0, 1.0, 5.0, 11.0], 2), Some((3, 2.2)));
        for silent in [&[][..], &[4.0, 0.0], &[1.0]] {
            assert_eq!(straggler(silent, 2.min(silent.len().max(1))), None);
        }
    }
}
