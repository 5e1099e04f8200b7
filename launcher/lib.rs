//! From a command line to running ranks, and what watches them.

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::{ColorChoice, FromArgMatches};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

use crate::cli::{BenchArgs, BenchCommand, Cli, Command, GlobalArgs};
use crate::env::Environment;
use crate::report::Outcome;

mod attempts;
mod auto;
pub mod cli;
mod client;
pub mod cluster;
mod commands;
pub mod config_file;
pub mod env;
mod events;
pub mod fabric;
pub mod hardware;
mod health;
pub mod host;
pub mod job_file;
pub mod keys;
mod local;
pub mod model;
mod observe;
pub mod plan;
mod port;
mod preflight;
mod preview;
mod process;
pub mod profile;
mod ranks;
pub mod render;
mod rendezvous;
mod replicas;
pub mod report;
pub mod resolve;
mod rundir;
pub(crate) mod seconds;
mod server;
pub mod settings;
pub mod slurm;
pub mod spec;
mod start;
mod state;
mod submit;
mod summary;
mod supervise;
mod tail;
mod worker;

/// Parses the command line, runs the command, says why it failed, and ends with the documented code.
pub fn main() -> ExitCode {
    let parsed = cli::command().try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to stdout; whoever closed it does not want to hear about it.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { report::Exit::Usage as u8 } else { 0 });
        }
    };
    let color = wants_color(cli.global.color);
    start_log(&cli, color);
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.print(color);
            ExitCode::from(failure.exit as u8)
        }
    }
}

fn run(command: Command) -> Outcome {
    match command {
        Command::Launch(args) => commands::launch::run(&args),
        Command::Render(args) => commands::render::run(&args),
        Command::Plan(args) => commands::plan::run(&args),
        Command::Profiles(command) => commands::profiles::run(&command),
        Command::Clusters(command) => commands::clusters::run(&command),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Convert(args) => commands::convert::run(&args),
        Command::Status(args) => commands::status::run(&args),
        Command::Logs(args) => commands::logs::run(&args),
        Command::Events(args) => commands::events::run(&args),
        Command::Wait(args) => commands::wait::run(&args),
        Command::Endpoint(args) => commands::endpoint::run(&args),
        Command::Cancel(args) => commands::cancel::run(&args),
        Command::Resume(args) => commands::resume::run(&args),
        Command::Results(args) => commands::results::run(&args),
        Command::Generate(args) => commands::generate::run(&args),
        Command::Score(args) => commands::score::run(&args),
        Command::Serve(args) => commands::serve::run(&args),
        Command::Batch(args) => commands::batch::run(&args),
        Command::Bench(BenchArgs { command: Some(BenchCommand::Rank(args)), .. }) => commands::bench_rank::run(&args),
        Command::Bench(args) => commands::bench::run(&args),
        Command::Doctor(args) => commands::doctor::run(&args),
        Command::Completions(args) => commands::completions::run(&args),
        Command::Version(args) => commands::version::run(&args),
        Command::Supervise(args) => commands::supervise::run(&args),
        Command::Worker(args) => commands::worker::run(&args),
    }
}

/// Whether stderr shall be coloured.
fn wants_color(choice: ColorChoice) -> bool {
    match choice {
        ColorChoice::Auto => std::io::stderr().is_terminal() && Environment::of_process().get("NO_COLOR").is_none(),
        ColorChoice::Always => true,
        ColorChoice::Never => false,
    }
}

/// The log goes to stderr. Ranks and supervisors, whose stderr is a file, say what they do without being asked.
fn start_log(cli: &Cli, color: bool) {
    let GlobalArgs { verbose, quiet, .. } = cli.global;
    let talkative = matches!(cli.command, Command::Supervise(_) | Command::Worker(_));
    let level = match (quiet, verbose.saturating_add(u8::from(talkative))) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => LevelFilter::WARN,
        (false, 1) => LevelFilter::INFO,
        (false, _) => LevelFilter::DEBUG,
    };
    let filter = EnvFilter::builder().with_default_directive(level.into()).with_env_var(env::LOG).from_env_lossy();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_env_filter(filter).with_ansi(color).init();
}
