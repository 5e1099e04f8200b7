//! What this machine offers.

use sysinfo::{MemoryRefreshKind, RefreshKind, System};

use crate::report::Outcome;

/// A snapshot; tests make their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// That this process may use.
    pub cores: usize,
    /// That this process can have without anything being swapped out.
    pub available_bytes: u64,
}

impl Host {
    /// # Errors
    /// The system does not say how much memory it has.
    pub fn probe() -> Outcome<Self> {
        let system =
            System::new_with_specifics(RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram()))
                .map_err(|error| anyhow::Error::new(error).context("cannot find out how much memory is available"))?;
        let limit = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory);
        Ok(Self {
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            available_bytes: system.available_memory().min(limit),
        })
    }
}
