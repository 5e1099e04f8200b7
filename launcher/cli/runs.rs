//! Commands about runs that exist.

use std::time::Duration;

use clap::{Args, ValueEnum};

use super::{ContinuationArgs, EngineArgs, SlurmArgs, WaitFor};

#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// Name of a run, a unique prefix of it, or `latest`; all runs when not given
    pub run: Option<String>,
    /// Show it again whenever it changes
    #[arg(long)]
    pub watch: bool,
    /// Print one JSON object on stdout (with --watch, one a line)
    #[arg(long)]
    pub json: bool,
    /// Print rows, tokens, rates and times of jobs in Prometheus' text format
    #[arg(long, conflicts_with = "json")]
    pub metrics: bool,
}

#[derive(Clone, Debug, Args)]
pub struct LogsArgs {
    /// Name of a run, a unique prefix of it, or `latest`
    pub run: String,
    /// Wait for more until the run ends
    #[arg(short, long)]
    pub follow: bool,
    /// Only this rank, without the prefix
    #[arg(long, value_name = "N")]
    pub rank: Option<usize>,
}

#[derive(Clone, Debug, Args)]
pub struct EventsArgs {
    /// Name of a run, a unique prefix of it, or `latest`
    pub run: String,
    /// Wait for more until the run ends
    #[arg(short, long)]
    pub follow: bool,
    /// Print the JSON objects, one a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = "Exit code: 0 when the run has come so far, 124 when the time is over, else that of the run.")]
pub struct WaitArgs {
    /// Name of a run, a unique prefix of it, or `latest`
    pub run: String,
    /// How far the run must come
    #[arg(long = "for", value_name = "PHASE")]
    pub target: WaitFor,
    /// Give up after so long (`90`, `90s`, `5m`, `2h`)
    #[arg(long, value_name = "DURATION", value_parser = crate::seconds::parse)]
    pub timeout: Option<Duration>,
}

#[derive(Clone, Debug, Args)]
pub struct EndpointArgs {
    /// Name of a run, a unique prefix of it, or `latest`
    pub run: String,
    /// Print one JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
pub struct CancelArgs {
    /// Names of runs, unique prefixes of them, or `latest`
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<String>,
    /// Do not let running requests finish
    #[arg(long)]
    pub now: bool,
}

#[derive(Clone, Debug, Default, Args)]
#[command(
    after_help = "Rows that are done are not generated again, and the output is byte for byte what an undisturbed run gives, also with other
devices, ranks or nodes. Flags replace what the run was launched with. Exit codes are those of `launch --job`."
)]
pub struct ResumeArgs {
    /// Name of a run, a unique prefix of it, or `latest`
    pub run: String,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub slurm: SlurmArgs,
    #[command(flatten)]
    pub continuation: ContinuationArgs,
    /// Return when the run has come so far; on Slurm only
    #[arg(long, value_name = "PHASE")]
    pub wait: Option<WaitFor>,
    /// Go on although input, job file or model have changed: rows that would now be others are generated again
    #[arg(long)]
    pub allow_changed: bool,
    /// Return as soon as the attempt has been started
    #[arg(long)]
    pub detach: bool,
    /// Print one JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Exit code of verify: 0 when the output is there and right, 30 when rows are missing, 32 when the output is
missing or not what the journal says."
)]
pub struct ResultsArgs {
    /// Name of a run, a unique prefix of it, or `latest`
    pub run: String,
    /// What to do with its rows
    #[arg(value_name = "VIEW")]
    pub view: ResultsView,
    /// Print one JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// What `results` shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ResultsView {
    /// Compare the output with the journal and the input: each row once, in order, byte for byte
    Verify,
    /// Count rows, tokens, endings and attempts
    Stats,
    /// Print the lines of rows that failed
    Failed,
}
