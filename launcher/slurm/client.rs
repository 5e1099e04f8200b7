//! Runs Slurm's commands: each with a time limit, each answer in plain text.

use std::io::{Read, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::report::{Exit, Failure};

/// How long a question may take. A frozen munge daemon would let it hang for ever.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// The same for questions that only make an answer of ours better.
pub(crate) const BRIEF: Duration = Duration::from_secs(5);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SlurmError {
    #[error("{program} is not installed on this host")]
    Missing { program: &'static str },
    #[error("Slurm does not answer ({program}: {reason})")]
    Silent { program: &'static str, reason: String },
    #[error("{program}: {reason}")]
    Refused { program: &'static str, reason: String },
}

impl From<SlurmError> for Failure {
    fn from(error: SlurmError) -> Self {
        match error {
            SlurmError::Missing { .. } => {
                Self::new(Exit::SchedulerSilent, error).hint("run it on a login node of the cluster")
            }
            SlurmError::Silent { .. } => {
                Self::new(Exit::SchedulerSilent, error).hint("try again when `scontrol ping` says that Slurm is up")
            }
            SlurmError::Refused { .. } => Self::new(Exit::SchedulerRefused, error),
        }
    }
}

/// What a command printed.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Words of the commands when the daemons, not the request, are the trouble.
const SILENCE: [&str; 7] = [
    "Unable to contact slurm controller",
    "Socket timed out",
    "Could not establish a configuration source",
    "Protocol authentication error",
    "Zero Bytes were transmitted or received",
    "Connection refused",
    "Unable to establish controller machine",
];

/// How a command is run.
pub(crate) struct Request<'a> {
    /// Standard input.
    pub(crate) input: &'a str,
    /// All variables of the command; `None` is those of this process without what a surrounding job or shell has set for Slurm.
    pub(crate) environment: Option<&'a [(String, String)]>,
    pub(crate) limit: Duration,
}

impl Request<'_> {
    pub(crate) fn within(limit: Duration) -> Self {
        Self { input: "", environment: None, limit }
    }
}

/// Runs `program`.
pub(crate) fn ask(program: &'static str, arguments: &[String], request: &Request<'_>) -> Result<Answer, SlurmError> {
    let silent = |reason: String| SlurmError::Silent { program, reason };
    let mut command = Command::new(program);
    match request.environment {
        Some(variables) => _ = command.env_clear().envs(variables.iter().cloned()),
        None => {
            for (name, _) in std::env::vars_os() {
                let name = name.to_string_lossy();
                let of_slurm = name.starts_with("SLURM_") || name.starts_with("SQUEUE_");
                if of_slurm && !matches!(&*name, "SLURM_CONF" | "SLURM_JWT") {
                    command.env_remove(&*name);
                }
            }
        }
    }
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => SlurmError::Missing { program },
        _ => silent(error.to_string()),
    })?;
    let collect = |stream: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            // What was read before an error is all there is.
            _ = stream.map(|mut stream| stream.read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let stdout = collect(child.stdout.take().map(|stream| Box::new(stream) as _));
    let stderr = collect(child.stderr.take().map(|stream| Box::new(stream) as _));
    let deadline = Instant::now() + request.limit;
    // A command that does not read its input says why on stderr.
    _ = child.stdin.take().map(|mut stdin| stdin.write_all(request.input.as_bytes()));
    let status = loop {
        match child.try_wait().map_err(|error| silent(error.to_string()))? {
            Some(status) => break status,
            None if Instant::now() >= deadline => {
                _ = child.kill();
                _ = child.wait();
                return Err(silent(format!("no answer within {} s", request.limit.as_secs())));
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let text = |thread: std::thread::JoinHandle<String>| thread.join().unwrap_or_default();
    let answer = Answer { stdout: text(stdout), stderr: text(stderr) };
    tracing::debug!(program, ?arguments, ?answer, "asked Slurm");
    if status.success() {
        return Ok(answer);
    }
    let reason: Vec<&str> =
        answer.stderr.lines().map(|line| line.trim_start_matches(&format!("{program}: "))).collect();
    let reason = if reason.is_empty() { status.to_string() } else { reason.join("; ") };
    if SILENCE.iter().any(|words| reason.contains(words)) {
        return Err(silent(reason));
    }
    Err(SlurmError::Refused { program, reason })
}

/// The arguments of a command.
pub(crate) fn arguments<const N: usize>(arguments: [&str; N]) -> Vec<String> {
    arguments.map(str::to_owned).to_vec()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn answers_refusals_and_silence_are_told_apart() {
        let shell = |script: &str, limit| {
            ask("sh", &arguments(["-c", script]), &Request { input: "word", ..Request::within(limit) })
        };
        assert_eq!(shell("cat; echo aside >&2", PATIENCE).unwrap().stdout, "word");
        let refused = shell("echo 'sh: error: no' >&2; exit 1", PATIENCE).unwrap_err();
        assert_eq!(refused.to_string(), "sh: error: no");
        let silent = shell("echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1", PATIENCE);
        assert_eq!(Failure::from(silent.unwrap_err()).exit, Exit::SchedulerSilent);
        let start = Instant::now();
        let hung = shell("exec sleep 60", Duration::from_millis(200)).unwrap_err();
        assert!(matches!(hung, SlurmError::Silent { .. }) && start.elapsed() < Duration::from_secs(10));
        let missing = ask("no-such-program", &[], &Request::within(PATIENCE)).unwrap_err();
        assert!(matches!(missing, SlurmError::Missing { .. }));
    }
}
