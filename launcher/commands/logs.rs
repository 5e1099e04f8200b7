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
    let runs = replicas::each(&run_dir)?;
    let mut all = Vec::new();
    for run in &runs {
        let name = if runs.len() > 1 { Some(run.name()) } else { None };
        all.extend(logs(run, args.rank, name)?);
    }
    let mut observer = Observer::new(&run_dir)?;
    loop {
        // Looked at first: what was written before the end is then read below.
        let over = !args.follow || observer.look()?.phase.is_end();
        for (prefix, tail) in &mut all {
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

/// The logs to show, each with what goes before its lines: of one replica of several, its name.
fn logs(run_dir: &RunDir, only: Option<usize>, name: Option<&str>) -> Outcome<Vec<(String, Tail)>> {
    let attempt = run_dir.last_attempt();
    let tail = |rank| Tail::new(run_dir.rank_log(attempt, rank));
    let ranks = run_dir.spec()?.mesh.world_size();
    if let Some(rank) = only {
        if rank >= ranks {
            let text = format!("run {} has ranks 0 to {}, not {rank}", run_dir.name(), ranks - 1);
            return Err(Failure::msg(Exit::Usage, text));
        }
        return Ok(vec![(name.map_or_else(String::new, |name| format!("[{name}] ")), tail(rank))]);
    }
    let status = Status::of(run_dir)?;
    let host = |rank: usize| Some(status.ranks.get(rank)?.process.as_ref()?.host.as_str());
    let name = name.map_or_else(String::new, |name| format!("{name} "));
    Ok((0..ranks).map(|rank| (format!("[{name}r{rank:02} {}] ", host(rank).unwrap_or("?")), tail(rank))).collect())
}
