use serde_json::Value;

use crate::cli::EventsArgs;
use crate::events::Event;
use crate::observe::Observer;
use crate::replicas;
use crate::report::{Outcome, print_line};
use crate::rundir::find_run;
use crate::start::POLL;
use crate::supervise::{line, narrate};
use crate::tail::Tail;

pub(crate) fn run(args: &EventsArgs) -> Outcome {
    let run_dir = find_run(&args.run)?;
    let runs = replicas::each(&run_dir)?;
    let mut journals: Vec<_> = runs.iter().map(|run| (run.name(), Tail::new(run.events_file()))).collect();
    let several = journals.len() > 1;
    let mut observer = Observer::new(&run_dir)?;
    let mut noted = None;
    loop {
        // Looked at first: what was written before the end is then read below.
        let over = !args.follow || {
            let status = observer.look()?;
            // What the scheduler says stands in no journal.
            if status.note.is_some() && noted != status.note {
                narrate(&line(&status));
                noted = status.note;
            }
            status.phase.is_end()
        };
        let mut lines = Vec::new();
        for (run, journal) in &mut journals {
            for line in journal.lines().map_err(anyhow::Error::new)? {
                let event = serde_json::from_str::<Event>(&line).ok();
                let shown = match &event {
                    Some(event) if !args.json => event.line(),
                    _ => line,
                };
                let shown = if several { of_replica(run, shown, args.json) } else { shown };
                lines.push((event.map(|event| event.time), shown));
            }
        }
        // Those of one run are in order, and stay so.
        if several {
            lines.sort_by_key(|(time, _)| *time);
        }
        for (_, line) in lines {
            if !print_line(line)? {
                return Ok(());
            }
        }
        if over {
            return Ok(());
        }
        std::thread::sleep(POLL);
    }
}

/// A replica's event, with its name.
fn of_replica(run: &str, line: String, is_json: bool) -> String {
    match serde_json::from_str::<Value>(&line) {
        Ok(Value::Object(mut event)) if is_json => {
            event.insert("run".into(), run.into());
            Value::from(event).to_string()
        }
        _ => format!("{run} {line}"),
    }
}
