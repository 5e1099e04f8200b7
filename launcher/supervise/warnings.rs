//! What is not as it should be and does not end the run by itself: said once, shown until it is over.

use std::time::{Duration, Instant};

use super::attempt::Supervisor;
use super::display::span;
use super::verdict::Fault;
use crate::events::Event;
use crate::report::Exit;

impl Supervisor<'_> {
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
