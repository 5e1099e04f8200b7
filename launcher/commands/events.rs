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
    replicas::check_single(&run_dir)?;
    let mut journal = Tail::new(run_dir.events_file());
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
        for line in journal.lines().map_err(anyhow::Error::new)? {
            let event = serde_json::from_str::<Event>(&line);
            let shown = match event {
                Ok(event) if !args.json => event.line(),
                _ => line,
            };
            if !print_line(shown)? {
                return Ok(());
            }
        }
        if over {
            return Ok(());
        }
        std::thread::sleep(POLL);
    }
}
