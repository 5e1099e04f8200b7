use crate::cli::EndpointArgs;
use crate::observe::Observer;
use crate::report::{Exit, Failure, Outcome, print_json, print_line};
use crate::rundir::find_run;
use crate::state::Endpoint;
use crate::supervise::narrate;

pub(crate) fn run(args: &EndpointArgs) -> Outcome {
    let run_dir = find_run(&args.run)?;
    let Some(endpoint) = Endpoint::of(&run_dir)? else {
        let phase = Observer::new(&run_dir)?.look()?.phase;
        let failure = Failure::msg(Exit::Internal, format!("run {} is {phase} and answers nowhere", run_dir.name()));
        return Err(failure.hint(format!("nemotron wait {} --for ready", run_dir.name())));
    };
    if args.json {
        print_json(&endpoint)?;
    } else {
        print_line(&endpoint.url)?;
        if let Some(token_file) = &endpoint.token_file {
            narrate(&format!("token in {}", token_file.display()));
        }
    }
    Ok(())
}
