//! Whether and how a run goes on after an attempt has ended: by cause, within what its user allows, and only while it gets on.

use std::time::Duration;

use crate::attempts::Attempt;
use crate::report::{Exit, Retry};
use crate::spec::Continuation;
use crate::state::RunPhase;

/// Attempts in a row without a new row, or of a server that were never ready, after which another one is pointless.
const FRUITLESS: usize = 2;
/// An attempt that lived no longer than this was no more than a try.
const BRIEF_S: f64 = 60.0;
/// The pause after the first of such tries, which doubles with each further one, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));

/// What the situation allows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Situation {
    pub(super) continuation: Continuation,
    /// A job has rows, of which each is done once; a server could break over the same request for ever.
    pub(super) is_job: bool,
    /// The phase that the verdict puts the run into.
    pub(super) phase: RunPhase,
    /// The scheduler has put the job back into the queue, or would if it is asked to (its user allows that).
    pub(super) requeued: bool,
    pub(super) may_requeue: bool,
    /// There is a scheduler, which could give other nodes and more time.
    pub(super) scheduled: bool,
    /// The nodes work as far as is known, and there is time for another start.
    pub(super) can_stay: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Next {
    /// The run ends as the attempt did.
    Over,
    /// It ends because it does not get on.
    Stuck,
    /// The ranks start again where they were.
    Restart { pause: Duration },
    /// Another job goes on.
    Successor,
    /// The same job goes on, later.
    Requeue,
}

/// `attempts` are all of the run; the last has just ended.
pub(super) fn next(attempts: &[Attempt], situation: &Situation) -> Next {
    let Situation { continuation: Continuation { retries, chain }, .. } = *situation;
    let Some(exit) = attempts.last().and_then(Attempt::exit) else { return Next::Over };
    if situation.phase == RunPhase::Cancelled {
        return Next::Over;
    }
    if situation.requeued {
        return Next::Requeue;
    }
    // What its user began anew is judged anew.
    let begun = attempts.iter().rposition(|attempt| attempt.by_user).unwrap_or(0);
    let own = &attempts[begun..];
    let goes_on = match (exit, exit.retry()) {
        (Exit::Resumable, _) => situation.may_requeue || situation.scheduled && jobs_after_time(own) <= chain as usize,
        (_, Retry::Never) => false,
        _ if retries == 0 => false,
        (_, Retry::Once) => own.iter().filter(|attempt| attempt.exit() == Some(exit)).count() < 2,
        (_, Retry::Counted) => counted(own, situation.is_job) <= retries as usize,
        (_, Retry::Free) => situation.is_job || counted(own, false) <= retries as usize,
    };
    if !goes_on {
        return Next::Over;
    }
    let is_fruitless = |attempt: &Attempt| if situation.is_job { attempt.rows == 0 } else { attempt.ready.is_none() };
    let fruitless = own.iter().rev().take_while(|attempt| is_fruitless(attempt)).count();
    if fruitless >= FRUITLESS && !situation.may_requeue {
        return Next::Stuck;
    }
    match exit {
        Exit::Resumable if situation.may_requeue => Next::Requeue,
        Exit::Resumable => Next::Successor,
        _ if situation.scheduled && (!situation.can_stay || is_about_nodes(own)) => Next::Successor,
        _ => Next::Restart { pause: pause(own) },
    }
}

/// Ends by time; the jobs of the chain are those that follow them.
fn jobs_after_time(attempts: &[Attempt]) -> usize {
    attempts.iter().filter(|attempt| attempt.exit() == Some(Exit::Resumable)).count()
}

/// Ends that use up a retry. Of a job, those that it is not to blame for do not.
fn counted(attempts: &[Attempt], is_job: bool) -> usize {
    let counts = |exit: Exit| match exit.retry() {
        Retry::Counted | Retry::Once => true,
        Retry::Free => !is_job && exit != Exit::Resumable,
        Retry::Never => false,
    };
    attempts.iter().filter_map(Attempt::exit).filter(|&exit| counts(exit)).count()
}

/// On the same nodes it would end the same way: one of them is bad, did not start its ranks, or has been blamed before.
fn is_about_nodes(attempts: &[Attempt]) -> bool {
    let Some((last, earlier)) = attempts.split_last() else { return false };
    let blamed = |attempt: &Attempt| attempt.end.iter().flat_map(|end| end.nodes.clone()).collect::<Vec<_>>();
    let now = blamed(last);
    let again = earlier.iter().flat_map(blamed).any(|node| now.contains(&node));
    !now.is_empty() && (again || matches!(last.exit(), Some(Exit::DeviceUnhealthy | Exit::Rendezvous)))
}

fn pause(attempts: &[Attempt]) -> Duration {
    let tries = attempts.iter().rev().take_while(|attempt| attempt.seconds() < BRIEF_S).count();
    let doubled = tries.checked_sub(1).map(|exponent| PAUSE.0.saturating_mul(1 << exponent.min(20)));
    doubled.unwrap_or_default().min(PAUSE.1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attempts::testing::ended;

    const JOB: Situation = Situation {
        continuation: Continuation { retries: 2, chain: 1 },
        is_job: true,
        phase: RunPhase::Failed,
        requeued: false,
        may_requeue: false,
        scheduled: true,
        can_stay: true,
    };

    /// Attempts that ended so, each after `rows` rows, on nodes that nobody blames.
    fn history(exits: &[Exit], rows: u64) -> Vec<Attempt> {
        (0..).zip(exits).map(|(attempt, &exit)| ended(attempt, Some(exit), rows, &[])).collect()
    }

    fn after(exits: &[Exit], situation: Situation) -> Next {
        next(&history(exits, 1), &situation)
    }

    fn is_restart(next: &Next) -> bool {
        matches!(next, Next::Restart { .. })
    }

    #[test]
    fn the_cause_decides() {
        for never in [Exit::Usage, Exit::Checkpoint, Exit::OutOfMemory, Exit::TooManyFailedRows, Exit::Terminated] {
            assert_eq!(after(&[never], JOB), Next::Over, "{never:?}");
        }
        // Counted: twice, and no more.
        assert!(is_restart(&after(&[Exit::NoProgress; 2], JOB)));
        assert_eq!(after(&[Exit::NoProgress; 3], JOB), Next::Over);
        // Free: as long as rows are done.
        assert!(is_restart(&after(&[Exit::RankLost; 9], JOB)));
        assert_eq!(
            after(&[Exit::RankLost; 3], Situation { is_job: false, ..JOB }),
            Next::Over,
            "of a server all count"
        );
        // Once.
        assert!(is_restart(&after(&[Exit::Numerical], JOB)));
        assert_eq!(after(&[Exit::Numerical; 2], JOB), Next::Over);
        // Nothing is done unasked.
        let unasked = Situation { continuation: Continuation::default(), ..JOB };
        for exit in [Exit::RankLost, Exit::NoProgress, Exit::Resumable] {
            assert_eq!(after(&[exit], unasked), Next::Over);
        }
        assert_eq!(next(&[ended(0, None, 3, &[])], &JOB), Next::Over);
    }

    #[test]
    fn a_chain_has_as_many_jobs_as_were_allowed() {
        assert_eq!(after(&[Exit::Resumable], JOB), Next::Successor);
        assert_eq!(after(&[Exit::Resumable; 2], JOB), Next::Over);
        assert_eq!(after(&[Exit::Resumable], Situation { phase: RunPhase::Cancelled, ..JOB }), Next::Over);
        assert_eq!(after(&[Exit::Resumable], Situation { scheduled: false, ..JOB }), Next::Over);
        assert_eq!(after(&[Exit::Resumable; 5], Situation { may_requeue: true, ..JOB }), Next::Requeue);
        assert_eq!(after(&[Exit::RankLost], Situation { requeued: true, ..JOB }), Next::Requeue);
    }

    #[test]
    fn without_a_new_row_twice_it_ends() {
        assert!(is_restart(&next(&history(&[Exit::RankLost], 0), &JOB)));
        assert_eq!(next(&history(&[Exit::RankLost; 2], 0), &JOB), Next::Stuck);
        // A server without requests has got on when it was ready.
        let server = Situation { is_job: false, ..JOB };
        let mut idle = history(&[Exit::RankLost; 2], 0);
        assert_eq!(next(&idle, &server), Next::Stuck);
        idle[1].ready = idle[1].ended;
        assert!(is_restart(&next(&idle, &server)));
        let mut resumed = history(&[Exit::RankLost; 3], 0);
        resumed[2].by_user = true;
        assert!(is_restart(&next(&resumed, &JOB)), "whoever resumes it begins anew");
    }

    #[test]
    fn other_nodes_are_sought_when_these_are_to_blame() {
        let blamed = |attempt, exit, node: &str| ended(attempt, Some(exit), 1, &[node]);
        let lost = blamed(0, Exit::RankLost, "n1");
        assert!(is_restart(&next(std::slice::from_ref(&lost), &JOB)));
        assert_eq!(next(&[blamed(0, Exit::DeviceUnhealthy, "n1")], &JOB), Next::Successor);
        assert_eq!(next(&[lost.clone(), blamed(1, Exit::RankLost, "n1")], &JOB), Next::Successor);
        assert!(is_restart(&next(&[lost, blamed(1, Exit::RankLost, "n2")], &JOB)));
        assert_eq!(after(&[Exit::RankLost], Situation { can_stay: false, ..JOB }), Next::Successor);
        let local = Situation { scheduled: false, can_stay: false, ..JOB };
        assert!(is_restart(&after(&[Exit::DeviceUnhealthy], local)));
    }

    #[test]
    fn tries_that_fail_at_once_are_made_ever_more_rarely() {
        let pauses = [1, 2, 4, 40].map(|tries| pause(&history(&vec![Exit::RankLost; tries], 1)).as_secs());
        assert_eq!(pauses, [1, 2, 8, 300]);
    }
}
