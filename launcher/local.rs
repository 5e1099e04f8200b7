//! Ranks as child processes of the supervisor, all on this machine.

use std::fs::OpenOptions;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use crate::env;
use crate::rundir::RunDir;

/// Variable that tells a rank which process must be its parent.
pub(crate) const SUPERVISOR_PID: &str = "NEMOTRON_SUPERVISOR_PID";

/// The processes of a run's ranks, by rank. Dropping it kills them.
pub(crate) struct LocalRanks {
    command: Box<dyn Fn() -> Command>,
    children: Vec<Option<Child>>,
}

impl LocalRanks {
    /// Ranks are `nemotron worker RUN_DIR`, run by this executable.
    pub(crate) fn new(run_dir: &RunDir) -> Self {
        let path = run_dir.path().to_owned();
        Self::with_command(move || {
            // The running executable itself, even if its file was replaced meanwhile.
            let mut command = Command::new("/proc/self/exe");
            command.arg0("nemotron").arg("worker").arg(&path);
            command
        })
    }

    pub(crate) fn with_command(command: impl Fn() -> Command + 'static) -> Self {
        Self { command: Box::new(command), children: Vec::new() }
    }

    /// Starts the next rank. It must be called from a thread that lives as long as the ranks, because they die with it.
    pub(crate) fn start(&mut self, supervisor: SocketAddr, attempt: u32, log: &Path) -> io::Result<()> {
        let log = OpenOptions::new().append(true).create(true).mode(0o600).open(log)?;
        let child = (self.command)()
            .env(env::RANK, self.children.len().to_string())
            .env(env::ATTEMPT, attempt.to_string())
            .env(env::SUPERVISOR, supervisor.to_string())
            .env(SUPERVISOR_PID, std::process::id().to_string())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C on the terminal is for the supervisor, which tells the ranks what to do.
            .process_group(0)
            .spawn()?;
        self.children.push(Some(child));
        Ok(())
    }

    /// Ranks whose process has ended since the last call, and how.
    pub(crate) fn reap(&mut self) -> Vec<(usize, ExitStatus)> {
        let ended = self.children.iter_mut().enumerate().filter_map(|(rank, child)| {
            let status = child.as_mut()?.try_wait().ok().flatten()?;
            *child = None;
            Some((rank, status))
        });
        ended.collect()
    }

    pub(crate) fn pid(&self, rank: usize) -> Option<u32> {
        Some(self.children.get(rank)?.as_ref()?.id())
    }

    pub(crate) fn any_left(&self) -> bool {
        self.children.iter().any(Option::is_some)
    }

    pub(crate) fn kill_all(&mut self) {
        for child in self.children.iter_mut().flatten() {
            // It fails only for a process that has ended already.
            _ = child.kill();
        }
    }
}

impl Drop for LocalRanks {
    fn drop(&mut self) {
        self.kill_all();
        for child in self.children.iter_mut().flatten() {
            _ = child.wait();
        }
    }
}
