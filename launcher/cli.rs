//! The command line. What is said here is what `--help` shows; nothing is decided here.
//!
//! A flag that names a configuration key stays `None` until it is given: [`crate::resolve`] layers it over the environment, the
//! job file, the cluster file and the profile. [`command`] writes the variable and the default of those flags into their help.

use std::net::SocketAddr;
use std::num::NonZero;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{NonEmptyStringValueParser, PossibleValuesParser};
use clap::{Args, ColorChoice, CommandFactory, Parser, Subcommand, ValueEnum};
use nemotron_engine::job::JobSampling;

mod bench;
mod checkpoints;
mod client;
mod runs;
mod slurm;

pub use self::bench::*;
pub use self::checkpoints::*;
pub use self::client::*;
pub use self::runs::*;
pub use self::slurm::*;
use crate::keys;

/// Run Nemotron-4-340B and its smaller relatives: launcher, engine and client in one binary
#[derive(Debug, Parser)]
#[command(name = "nemotron", version, max_term_width = 120, subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: GlobalArgs,
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every command.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Global options")]
pub struct GlobalArgs {
    /// Say more on stderr; twice for debugging
    #[arg(short, long, global = true, action = clap::ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,
    /// Say nothing on stderr but errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// When to use colours; NO_COLOR is respected
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto", env = crate::env::COLOR)]
    pub color: ColorChoice,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a run: serve the model, or work through a job file
    Launch(LaunchArgs),
    /// Print the batch script that launch would submit
    Render(RenderArgs),
    /// Say whether a model fits a profile, how much KV cache is left, and how fast it can be
    Plan(PlanArgs),
    /// List or show the built-in and your own profiles
    #[command(subcommand)]
    Profiles(ProfilesCommand),
    /// List or show the built-in and your own cluster files
    #[command(subcommand)]
    Clusters(ClustersCommand),
    /// Describe a checkpoint: format, architecture, tensors, tokenizer, files
    Inspect(InspectArgs),
    /// Write a checkpoint in another format: Hugging Face safetensors, or one file for each rank
    Convert(ConvertArgs),
    /// Show runs, or the phase, ranks and progress of one
    Status(StatusArgs),
    /// Show the logs of a run, merged or of one rank
    Logs(LogsArgs),
    /// Show the event journal of a run
    Events(EventsArgs),
    /// Block until a run is ready or done
    Wait(WaitArgs),
    /// Print the URL of a serving run
    Endpoint(EndpointArgs),
    /// End runs: drain, stop, verify that nothing is left
    Cancel(CancelArgs),
    /// Go on with a job that was stopped, from its journal
    Resume(ResumeArgs),
    /// Check, count or filter the rows of a job, done or not
    Results(ResultsArgs),
    /// Send a prompt to a serving run and print the completion
    Generate(GenerateArgs),
    /// Say what a serving reward model thinks of conversations
    Score(ScoreArgs),
    /// Serve a model in the foreground on this host
    Serve(ServeArgs),
    /// Work through a job file in the foreground on this host
    Batch(BatchArgs),
    /// Measure the engine alone on this host: prefill and decode, beside what the machine can do at most
    Bench(BenchArgs),
    /// Check this host and its devices, and say how to cure what is wrong
    Doctor(DoctorArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
    /// Print the version and what this build can do
    Version(VersionArgs),
    /// Start the ranks of a run and watch them
    #[command(hide = true)]
    Supervise(SuperviseArgs),
    /// Be one rank of a run
    #[command(hide = true)]
    Worker(WorkerArgs),
}

/// What runs, on what: shared by `launch`, `plan`, `serve` and `batch`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
#[command(next_help_heading = "Model and devices")]
pub struct EngineArgs {
    /// Hardware profile: a name (see `nemotron profiles list`) or a .toml file
    #[arg(long, value_name = "PROFILE")]
    pub profile: Option<String>,
    /// Directory of the checkpoint, or `builtin`
    #[arg(long, value_name = "DIR", value_parser = NonEmptyStringValueParser::new())]
    pub model: Option<String>,
    /// Ranks that split every layer (tensor parallelism): 1, 2, 4 or 8
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub tp: Option<u32>,
    /// Stages of layers (pipeline parallelism)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub pp: Option<u32>,
    /// What computes
    #[arg(long, value_name = "DEVICE", value_parser = PossibleValuesParser::new(["cpu", "cuda"]))]
    pub device: Option<String>,
    /// Precision: bf16 operands with f32 sums, or all f32
    #[arg(long, value_name = "DTYPE", value_parser = PossibleValuesParser::new(["bf16", "f32"]))]
    pub dtype: Option<String>,
    /// Override any key of profile, cluster or job file, dotted (`serve.port=0`); repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// How to serve: shared by `launch` and `serve`.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Serving")]
pub struct EndpointOptions {
    /// Address to listen on
    #[arg(long, value_name = "ADDRESS")]
    pub host: Option<String>,
    /// Port to listen on; 0 lets the system choose
    #[arg(long, value_name = "PORT")]
    pub port: Option<u16>,
    /// Ask clients for no token
    #[arg(long, conflicts_with = "token_file")]
    pub no_auth: bool,
    /// File that holds the token that clients must send; made anew when not given
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Answer invalid requests with status 400 instead of NeMo's 200
    #[arg(long)]
    pub strict: bool,
    /// End after so long without a request (`90`, `90s`, `5m`, `2h`); 0 never
    #[arg(long, value_name = "DURATION", value_parser = crate::seconds::parse)]
    pub idle_timeout: Option<Duration>,
}

#[derive(Clone, Debug, Default, Args)]
#[command(after_help = "Examples:
  nemotron launch --profile cpu --serve
  nemotron launch --profile cpu --job examples/poem.toml")]
pub struct LaunchArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub task: TaskArgs,
    #[command(flatten)]
    pub endpoint: EndpointOptions,
    #[command(flatten)]
    pub slurm: SlurmArgs,
    #[command(flatten)]
    pub continuation: ContinuationArgs,
    /// Cluster: a name or a .toml file
    #[arg(long, value_name = "CLUSTER", help_heading = "Launching")]
    pub cluster: Option<String>,
    /// Name of the run; made up when not given
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new(), help_heading = "Launching")]
    pub name: Option<String>,
    /// So many runs share the job, row by row; each has its own job of Slurm's, or its own process here
    #[arg(long, value_name = "N", requires = "job", help_heading = "Launching")]
    pub replicas: Option<u32>,
    /// Resolve, plan and check, then stop before anything is started
    #[arg(long, help_heading = "Launching")]
    pub dry_run: bool,
    /// Ask the scheduler whether it would accept the run, without submitting it
    #[arg(long, help_heading = "Launching")]
    pub test_only: bool,
    /// Return when the run has come so far
    #[arg(long, value_name = "PHASE", help_heading = "Launching")]
    pub wait: Option<WaitFor>,
    /// Stay and show the run's events
    #[arg(long, conflicts_with = "detach", help_heading = "Launching")]
    pub follow: bool,
    /// Return as soon as the run has been started
    #[arg(long, help_heading = "Launching")]
    pub detach: bool,
    /// Print one JSON object on stdout
    #[arg(long, conflicts_with = "parsable", help_heading = "Launching")]
    pub json: bool,
    /// Print only the run's name on stdout
    #[arg(long, help_heading = "Launching")]
    pub parsable: bool,
}

/// What the run is for.
#[derive(Clone, Debug, Default, Args)]
#[group(required = true, multiple = false)]
pub struct TaskArgs {
    /// Serve the model until the run is cancelled
    #[arg(long, help_heading = "Launching")]
    pub serve: bool,
    /// Work through a job file and end
    #[arg(long, value_name = "FILE", help_heading = "Launching")]
    pub job: Option<PathBuf>,
}

/// How far `launch --wait` and `wait --for` go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WaitFor {
    Ready,
    Done,
}

#[derive(Clone, Debug, Default, Args)]
#[command(
    after_help = "Without --model it plans for Nemotron-4-340B (the built-in model for profile cpu). --model also takes the name of a
known architecture, such as nemotron-4-340b or nemotron-mini-4b. The exit code is 10 if the model does not fit."
)]
pub struct PlanArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Job file: its input is checked and measured, and its `[launch]` table takes part
    #[arg(long, value_name = "FILE")]
    pub job: Option<PathBuf>,
    /// Print one JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum ProfilesCommand {
    /// All profiles, one a line
    List {
        /// Print one JSON object on stdout
        #[arg(long)]
        json: bool,
    },
    /// One profile's keys
    Show {
        /// A name or a .toml file
        name: String,
        /// Print one JSON object on stdout
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum ClustersCommand {
    /// All cluster files, one a line
    List {
        /// Print one JSON object on stdout
        #[arg(long)]
        json: bool,
    },
    /// Write a cluster file from what sinfo reports here
    Init {
        /// Partition to write it for; the one with devices when not given
        #[arg(short, long, value_name = "PARTITION")]
        partition: Option<String>,
        /// File to write; stdout when not given. An existing one is not touched
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// One cluster file
    Show {
        /// A name or a .toml file
        name: String,
        /// Print one JSON object on stdout
        #[arg(long)]
        json: bool,
    },
}

#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  nemotron generate --run latest --prompt \"Write a poem on NVIDIA in the style of Shakespeare\"
  echo \"Shall I compare thee\" | nemotron generate --url http://127.0.0.1:1424 --raw --prompt -")]
pub struct GenerateArgs {
    /// A prompt; repeatable; `-` reads it from stdin [default: -]
    #[arg(long = "prompt", value_name = "TEXT", allow_hyphen_values = true)]
    pub prompts: Vec<String>,
    /// Every line of stdin is a prompt of its own
    #[arg(long)]
    pub lines: bool,
    /// Send prompts as they are, without a chat template
    #[arg(long)]
    pub raw: bool,
    /// Chat template that prompts are put into: the built-in `nemotron`, or a file
    #[arg(long, value_name = "NAME|FILE", default_value = "nemotron", conflicts_with = "raw")]
    pub template: String,
    /// System text of the chat template
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        default_value = "",
        hide_default_value = true,
        conflicts_with = "raw"
    )]
    pub system: String,
    /// Show the text as it grows, one prompt after the other
    #[arg(long, conflicts_with_all = ["json", "concurrency"])]
    pub stream: bool,
    /// Requests at a time when there are several prompts
    #[arg(long, value_name = "N", default_value = "16")]
    pub concurrency: NonZero<usize>,
    /// One JSON object a prompt
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub server: ServerArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// The request fields of `PUT /generate`; the server checks their ranges.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// New tokens at most
    #[arg(long, value_name = "N", default_value_t = JobSampling::default().tokens_to_generate)]
    pub tokens_to_generate: u32,
    /// New tokens before which the model cannot end the text
    #[arg(long, value_name = "N", default_value_t = JobSampling::default().min_tokens_to_generate)]
    pub min_tokens_to_generate: u32,
    /// Divide the logits by it
    #[arg(long, value_name = "X", default_value_t = JobSampling::default().temperature)]
    pub temperature: f32,
    /// Choose among this many most likely tokens; 0 is off
    #[arg(long, value_name = "N", default_value_t = JobSampling::default().top_k)]
    pub top_k: u32,
    /// Choose among the most likely tokens that have this probability together; 0 and 1 are off
    #[arg(long, value_name = "P", default_value_t = JobSampling::default().top_p)]
    pub top_p: f32,
    /// Always take the most likely token
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub greedy: bool,
    /// Make tokens that occurred less likely; 1 is off
    #[arg(long, value_name = "X", default_value_t = JobSampling::default().repetition_penalty)]
    pub repetition_penalty: f32,
    /// String that ends the text; repeatable [default: <|endoftext|>, <extra_id_1>, \x11, <extra_id_1>User]
    #[arg(long = "end-string", value_name = "TEXT", allow_hyphen_values = true)]
    pub end_strings: Vec<String>,
    /// Put the beginning-of-sequence token before the prompt
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub add_bos: bool,
    /// Seed of the random numbers; the server chooses one when not given
    #[arg(long, value_name = "N")]
    pub random_seed: Option<u64>,
}

impl SamplingArgs {
    /// The strings that end the text: those given, else the recipe's.
    pub fn end_strings(&self) -> Vec<String> {
        if self.end_strings.is_empty() { JobSampling::default().end_strings } else { self.end_strings.clone() }
    }
}

#[derive(Clone, Debug, Default, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub endpoint: EndpointOptions,
}

#[derive(Clone, Debug, Default, Args)]
pub struct BatchArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    /// The job file
    #[arg(long, value_name = "FILE")]
    pub job: PathBuf,
    /// Only the first N rows
    #[arg(long, value_name = "N")]
    pub limit: Option<u64>,
    /// Check the job file, the input and the plan, then stop
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Clone, Debug, Args)]
pub struct CompletionsArgs {
    pub shell: clap_complete::Shell,
}

#[derive(Clone, Debug, Args)]
#[command(
    after_help = "Run it on a login node, or on a compute node with srun. The exit code is 0 without a critical finding, 23 if a
device has one, 11 if only the host has."
)]
pub struct DoctorArgs {
    /// Profile of the runs that this host shall take part in; without one, devices are shown but not asked for
    #[arg(long, value_name = "PROFILE")]
    pub profile: Option<String>,
    /// Cluster file that says where runs live
    #[arg(long, value_name = "CLUSTER")]
    pub cluster: Option<String>,
    /// Print one JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
pub struct VersionArgs {
    /// Print one JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
pub struct SuperviseArgs {
    pub run_dir: PathBuf,
}

#[derive(Clone, Debug, Args)]
pub struct WorkerArgs {
    pub run_dir: PathBuf,
    /// Which rank to be; in a step of Slurm's the task's number
    #[arg(long, value_name = "N", env = crate::env::RANK)]
    pub rank: Option<usize>,
    /// Which attempt of the run this is
    #[arg(long, value_name = "N", default_value_t = 0, env = crate::env::ATTEMPT)]
    pub attempt: u32,
    /// Where the supervisor may be reached
    #[arg(long, value_name = "ADDRESSES", env = crate::env::SUPERVISOR, value_delimiter = ',', required = true)]
    pub supervisor: Vec<SocketAddr>,
}

/// Commands that read no settings, though flags of theirs are called like some.
const OWN_DEFAULTS: [&str; 2] = ["bench", "convert"];

/// The command line with the environment variable and the default of each configuration key in the help of its flag, where settings are read.
pub fn command() -> clap::Command {
    Cli::command().mut_subcommands(|subcommand| {
        if OWN_DEFAULTS.contains(&subcommand.get_name()) {
            return subcommand;
        }
        subcommand.mut_args(|argument| match argument.get_long().and_then(keys::by_flag) {
            Some(key) if argument.get_env().is_none() => {
                let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
                argument.help(format!("{help} [env: {}=] [default: {}]", key.variable(), key.default))
            }
            _ => argument,
        })
    })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn parse(line: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(line.split(' ')).map(|cli| cli.command)
    }

    #[test]
    fn the_declarations_are_consistent() {
        command().debug_assert();
    }

    #[test]
    fn help_names_variable_and_default_of_each_key() {
        let mut command = command();
        for name in ["launch", "serve"] {
            let help = command.find_subcommand_mut(name).unwrap().render_long_help().to_string();
            let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
            for expected in [
                "[env: NEMOTRON_PORT=] [default: 1424]",
                "[env: NEMOTRON_HOST=] [default: 127.0.0.1]",
                "[env: NEMOTRON_TP=] [default: from the profile]",
                "[env: NEMOTRON_MODEL=]",
                "[env: NEMOTRON_PROFILE=]",
                "[env: NEMOTRON_DTYPE=] [default: bf16]",
            ] {
                assert!(help.contains(expected), "{name}: {expected}\n{help}");
            }
        }
        for name in OWN_DEFAULTS {
            let help = command.find_subcommand_mut(name).unwrap().render_long_help().to_string();
            assert!(!help.contains("[env: NEMOTRON_TP=]") && !help.contains("from the profile"), "{name}: {help}");
        }
    }

    #[test]
    fn launch_wants_exactly_one_task() {
        assert!(parse("nemotron launch --profile cpu").is_err());
        assert!(parse("nemotron launch --profile cpu --serve --job j.toml").is_err());
        assert!(parse("nemotron launch --profile cpu --serve --detach --wait ready").is_ok());
    }

    #[test]
    fn generate_defaults_are_those_of_the_recipe() {
        let Ok(Command::Generate(args)) = parse("nemotron generate") else { panic!("generate") };
        let (sampling, recipe) = (&args.sampling, JobSampling::default());
        assert_eq!(sampling.tokens_to_generate, recipe.tokens_to_generate);
        assert_eq!(sampling.end_strings(), recipe.end_strings);
        assert!(sampling.greedy && !sampling.add_bos && args.prompts.is_empty());
        let line =
            "nemotron generate --greedy=false --add-bos --end-string a --end-string --b --timeout 2m --prompt --x";
        let Ok(Command::Generate(args)) = parse(line) else { panic!("generate") };
        assert!(!args.sampling.greedy && args.sampling.add_bos);
        assert_eq!(args.sampling.end_strings(), ["a", "--b"]);
        assert_eq!(
            (args.server.timeout, args.prompts.as_slice()),
            (Some(Duration::from_secs(120)), &["--x".to_owned()][..])
        );
    }
}
