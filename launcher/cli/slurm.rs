//! What a run on a cluster asks for, and the command that shows it.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::{EndpointOptions, EngineArgs, TaskArgs};

/// How far a run goes on by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "Going on")]
pub struct ContinuationArgs {
    /// Start again after a failure that another start may cure; those that the run is not to blame for are not counted
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub retries: Option<u32>,
    /// Jobs of Slurm that may follow one whose time is over, until the rows are done
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub chain: Option<u32>,
}

/// What to ask Slurm for; the letters are those of sbatch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "Slurm")]
pub struct SlurmArgs {
    /// Account that is charged
    #[arg(short = 'A', long, value_name = "ACCOUNT")]
    pub account: Option<String>,
    /// Partition
    #[arg(short, long, value_name = "PARTITION")]
    pub partition: Option<String>,
    /// Quality of service
    #[arg(long, value_name = "QOS")]
    pub qos: Option<String>,
    /// Time limit: minutes, HH:MM:SS or D-HH:MM:SS
    #[arg(short, long, value_name = "TIME", value_parser = crate::slurm::parse::time_limit_flag)]
    pub time: Option<Duration>,
    /// Features that the nodes must have
    #[arg(short = 'C', long, value_name = "LIST")]
    pub constraint: Option<String>,
    /// Reservation
    #[arg(long, value_name = "NAME")]
    pub reservation: Option<String>,
    /// Nodes that must be among the job's
    #[arg(short = 'w', long, value_name = "HOSTS")]
    pub nodelist: Option<String>,
    /// Nodes that must not be
    #[arg(short = 'x', long, value_name = "HOSTS")]
    pub exclude: Option<String>,
}

#[derive(Clone, Debug, Default, Args)]
#[command(after_help = "Examples:
  nemotron render --profile h100x16 --cluster dgx-h100-ib --serve
  nemotron render --profile h100x16 --cluster dgx-h100-ib --serve --explain")]
pub struct RenderArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub task: TaskArgs,
    #[command(flatten)]
    pub endpoint: EndpointOptions,
    #[command(flatten)]
    pub slurm: SlurmArgs,
    /// Cluster: a name or a .toml file
    #[arg(long, value_name = "CLUSTER", help_heading = "Rendering")]
    pub cluster: Option<String>,
    /// Name of the run; that of the profile when not given
    #[arg(long, value_name = "NAME", help_heading = "Rendering")]
    pub name: Option<String>,
    /// Write job.sbatch and run.lock.toml into this folder instead
    #[arg(short, long, value_name = "DIR", help_heading = "Rendering")]
    pub output: Option<PathBuf>,
    /// Show each value and where it came from instead
    #[arg(long, conflicts_with_all = ["output", "diff"], help_heading = "Rendering")]
    pub explain: bool,
    /// Show what differs from the script of an earlier run instead
    #[arg(long, value_name = "RUN", conflicts_with = "output", help_heading = "Rendering")]
    pub diff: Option<String>,
}
