//! Ranks as child processes of the supervisor, all on this machine.

use std::fs::OpenOptions;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;

use crate::env;
use crate::process::hostname;
use crate::ranks::Ranks;
use crate::rundir::RunDir;

/// Variable that tells a rank which process must be its parent.
pub(crate) const SUPERVISOR_PID: &str = "NEMOTRON_SUPERVISOR_PID";

/// The processes of a run's ranks, by rank. Dropping it kills them.
pub(crate) struct LocalRanks {
    command: Box<dyn Fn() -> Command>,
    run_dir: RunDir,
    children: Vec<Option<Child>>,
}

impl LocalRanks {
    /// Ranks are `nemotron worker RUN_DIR`, run by this executable.
    pub(crate) fn new(run_dir: &RunDir) -> Self {
        let path = run_dir.path().to_owned();
        Self::with_command(run_dir, move || {
            // The running executable itself, even if its file was replaced meanwhile.
            let mut command = Command::new("/proc/self/exe");
            command.arg0("nemotron").arg("worker").arg(&path);
            command
        })
    }

    pub(crate) fn with_command(run_dir: &RunDir, command: impl Fn() -> Command + 'static) -> Self {
        Self { command: Box::new(command), run_dir: run_dir.clone(), children: Vec::new() }
    }

    fn spawn(&self, rank: usize, supervisor: &[SocketAddr], attempt: u32, log: &Path) -> io::Result<Child> {
        let log = OpenOptions::new().append(true).create(true).mode(0o600).open(log)?;
        (self.command)()
            .env(env::RANK, rank.to_string())
            .env(env::ATTEMPT, attempt.to_string())
            .env(env::SUPERVISOR, env::join(supervisor))
            .env(SUPERVISOR_PID, std::process::id().to_string())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C on the terminal is for the supervisor, which tells the ranks what to do.
            .process_group(0)
            .spawn()
    }
}

impl Ranks for LocalRanks {
    fn meeting_points(&self) -> &[IpAddr] {
        &[IpAddr::V4(Ipv4Addr::LOCALHOST)]
    }

    fn start(&mut self, count: usize, supervisor: &[SocketAddr], attempt: u32) -> anyhow::Result<()> {
        for rank in 0..count {
            let log = self.run_dir.rank_log(attempt, rank);
            let child = self.spawn(rank, supervisor, attempt, &log);
            self.children.push(Some(child.with_context(|| format!("cannot start rank {rank}"))?));
        }
        Ok(())
    }

    fn reap(&mut self) -> Vec<(usize, ExitStatus)> {
        let ended = self.children.iter_mut().enumerate().filter_map(|(rank, child)| {
            let status = child.as_mut()?.try_wait().ok().flatten()?;
            *child = None;
            Some((rank, status))
        });
        ended.collect()
    }

    fn place(&self, rank: usize) -> Option<String> {
        let pid = self.children.get(rank)?.as_ref()?.id();
        Some(format!("host {}, pid {pid}", hostname()))
    }

    fn node(&self, _rank: usize) -> Option<String> {
        Some(hostname())
    }

    fn any_left(&self) -> bool {
        self.children.iter().any(Option::is_some)
    }

    fn kill_all(&mut self) {
        for child in self.children.iter_mut().flatten() {
            // It fails only for a process that has ended already.
            _ = child.kill();
        }
    }

    fn grace(&self) -> Duration {
        Duration::from_secs(1)
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
