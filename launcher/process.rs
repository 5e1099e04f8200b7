//! Processes by an identity that outlives the reuse of their number.

use std::io;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// A process of one host. The start time tells it from a later process that got the same number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    pub(crate) host: String,
    pub(crate) pid: i32,
    /// Clock ticks after boot.
    pub(crate) start_time: u64,
}

impl ProcessId {
    pub(crate) fn current() -> Self {
        let pid = Pid::this().as_raw();
        Self { host: hostname(), pid, start_time: start_time(pid).unwrap_or(0) }
    }

    /// Whether it still runs; `None` when it is another host's and cannot be seen from here.
    pub(crate) fn is_running(&self) -> Option<bool> {
        (self.host == hostname()).then(|| start_time(self.pid) == Some(self.start_time))
    }

    /// Sends a signal, unless the process has ended or is another host's.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        match self.is_running() {
            Some(true) => Ok(kill(Pid::from_raw(self.pid), signal)?),
            Some(false) => Ok(()),
            None => Err(io::Error::other(format!("process {} runs on {}", self.pid, self.host))),
        }
    }

    /// Waits until it has ended; false when it still runs after `limit`.
    pub(crate) fn wait_gone(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.is_running() == Some(true) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        true
    }
}

/// When the process started, in clock ticks after boot; `None` when there is no such process or it only waits to be reaped.
fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name stands in parentheses and may hold anything, so fields are counted after the last one.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

pub(crate) fn hostname() -> String {
    nix::unistd::gethostname().map_or_else(|_| "localhost".into(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn a_process_is_known_until_it_ends() {
        assert_eq!(ProcessId::current().is_running(), Some(true));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id() as i32;
        let process = ProcessId { pid, start_time: start_time(pid).unwrap(), ..ProcessId::current() };
        process.signal(Signal::SIGKILL).unwrap();
        assert!(process.wait_gone(Duration::from_secs(5)), "a zombie has ended");
        child.wait().unwrap();
        process.signal(Signal::SIGKILL).unwrap();
    }

    #[test]
    fn a_reused_number_is_another_process() {
        let mut process = ProcessId::current();
        process.start_time += 1;
        assert_eq!(process.is_running(), Some(false));
        process.host.push_str("-other");
        assert_eq!(process.is_running(), None);
        assert!(process.signal(Signal::SIGTERM).is_err());
    }
}
