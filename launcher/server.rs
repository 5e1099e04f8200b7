//! Which server a client's command means, and a connection to it.

use std::path::PathBuf;

use crate::cli::ServerArgs;
use crate::client::Client;
use crate::observe::Observer;
use crate::report::{Exit, Failure, Outcome};
use crate::rundir::{RunDir, find_run, read_token, run_root};
use crate::state::Endpoint;

/// # Errors
/// The run is unknown or does not serve, no run does, or the token cannot be read.
pub(crate) fn connect(args: &ServerArgs) -> Outcome<Client> {
    let (url, token_file) = target(args)?;
    let token = token_file.map(|file| read_token(&file)).transpose();
    let token = token.map_err(|error| Failure::new(Exit::Usage, error))?;
    Client::new(&url, token, args.timeout)
}

/// The server to ask, and where its token is.
fn target(args: &ServerArgs) -> Outcome<(String, Option<PathBuf>)> {
    if let (None, Some(url)) = (&args.run, &args.url) {
        return Ok((url.clone(), args.token_file.clone()));
    }
    let endpoint = match &args.run {
        Some(selector) => {
            let run_dir = find_run(selector)?;
            Endpoint::of(&run_dir)?.ok_or_else(|| not_serving(&run_dir))?
        }
        None => latest_endpoint()?,
    };
    Ok((endpoint.url, args.token_file.clone().or(endpoint.token_file)))
}

fn not_serving(run_dir: &RunDir) -> Failure {
    let name = run_dir.name();
    let phase = Observer::new(run_dir)
        .and_then(|mut observer| observer.look())
        .map_or_else(|_| "in an unknown state".into(), |status| status.phase.to_string());
    Failure::msg(Exit::Internal, format!("run {name} is {phase} and answers nowhere"))
        .hint(format!("nemotron wait {name} --for ready"))
}

/// Of the newest run that serves.
fn latest_endpoint() -> Outcome<Endpoint> {
    for run_dir in RunDir::list(&run_root()?).iter().rev() {
        // A damaged run directory must not hide an older run that works.
        if let Ok(Some(endpoint)) = Endpoint::of(run_dir) {
            return Ok(endpoint);
        }
    }
    Err(Failure::msg(Exit::Internal, "no run is serving").hint("start one with `nemotron serve`, or give --url"))
}
