use crate::cli::LogsArgs;
use crate::observe::Observer;
use crate::replicas;
use crate::report::{Exit, Failure, Outcome, print_line};
use crate::rundir::{RunDir, find_run};
use crate::start::POLL;
use crate::state::Status;
use crate::tail::Tail;

pub(crate) fn run(args: &LogsArgs) -> Outcome {
    let run_dir = find_run(&args.run)?;
    replicas::check_single(&run_dir)?;
    let mut logs = logs(&run_dir, args.rank)?;
    let mut observer = Observer::new(&run_dir)?;
    loop {
        // Looked at first: what was written before the end is then read below.
        let over = !args.follow || observer.look()?.phase.is_end();
        for (prefix, tail) in &mut logs {
            let lines = tail.lines().map_err(anyhow::Error::new)?;
            let rest = if over { tail.rest() } else { None };
            for line in lines.into_iter().chain(rest) {
                if !print_line(format!("{prefix}{line}"))? {
                    return Ok(());
                }
            }
        }
        if over {
            return Ok(());
        }
        std::thread::sleep(POLL);
    }
}

/// The logs to show, each with what goes before its lines.
fn logs(run_dir: &RunDir, only: Option<usize>) -> Outcome<Vec<(String, Tail)>> {
    let attempt = run_dir.last_attempt();
    let tail = |rank| Tail::new(run_dir.rank_log(attempt, rank));
    let ranks = run_dir.spec()?.mesh.world_size();
    if let Some(rank) = only {
        if rank >= ranks {
            let text = format!("run {} has ranks 0 to {}, not {rank}", run_dir.name(), ranks - 1);
            return Err(Failure::msg(Exit::Usage, text));
        }
        return Ok(vec![(String::new(), tail(rank))]);
    }
    let status = Status::of(run_dir)?;
    let host = |rank: usize| Some(status.ranks.get(rank)?.process.as_ref()?.host.as_str());
    Ok((0..ranks).map(|rank| (format!("[r{rank:02} {}] ", host(rank).unwrap_or("?")), tail(rank))).collect())
}
