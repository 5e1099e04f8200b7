//! A host without its devices: processors, memory, limits, folders, Slurm.

use std::path::Path;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use nix::sys::statvfs::statvfs;

use super::{Check, Grade, Wants};
use crate::hardware::GIB;
use crate::host::Host;
use crate::preflight;
use crate::report::Failure;
use crate::slurm::client::{BRIEF, Request, SlurmError, arguments, ask};

/// Ranks exchange small messages through shared memory; NCCL takes some tens of MB a rank.
const SHM_BYTES_PER_RANK: u64 = 128 << 20;
/// A rank holds its checkpoint's shards, its peers and its clients open.
const OPEN_FILES: u64 = 4096;
/// RDMA registers its buffers as locked memory: below this it falls back to sockets or fails.
const LOCKED_BYTES: u64 = 1 << 30;

/// All findings on this host.
pub(crate) fn checks(host: &Host, wants: &Wants, run_root: &Path) -> Vec<Check> {
    vec![
        cores(host.cores, wants.ranks),
        Check::ok("memory", format!("{:.1} GiB available", host.available_bytes as f64 / GIB)),
        shared_memory(wants.ranks),
        locked_memory(limit(Resource::RLIMIT_MEMLOCK), wants.devices.is_some()),
        open_files(limit(Resource::RLIMIT_NOFILE)),
        folder(run_root),
        slurm(),
    ]
}

/// The soft limit; `None` when there is none, or it is not told.
fn limit(resource: Resource) -> Option<u64> {
    getrlimit(resource).ok().map(|(soft, _)| soft).filter(|soft| *soft != RLIM_INFINITY)
}

fn cores(cores: usize, ranks: usize) -> Check {
    let found = format!("{cores} cores for {ranks} ranks");
    let cure = "ask Slurm for more: slurm.cpus_per_task (its own default is one core a task)";
    Check::graded("cores", cores >= ranks, Grade::Warn, found, cure)
}

fn shared_memory(ranks: usize) -> Check {
    let wanted = SHM_BYTES_PER_RANK * ranks as u64;
    match statvfs("/dev/shm") {
        Ok(shm) => {
            let free = shm.blocks_available() * shm.fragment_size();
            let found = format!("/dev/shm has {} MiB free, {ranks} ranks want {} MiB", free >> 20, wanted >> 20);
            let cure = "in a container, mount the host's /dev/shm or give it a larger one (--shm-size)";
            Check::graded("shared memory", free >= wanted, Grade::Crit, found, cure)
        }
        Err(error) => Check::new("shared memory", Grade::Crit, format!("/dev/shm cannot be used: {error}"))
            .cure("mount a tmpfs at /dev/shm"),
    }
}

fn locked_memory(limit: Option<u64>, has_devices: bool) -> Check {
    let found = limit.map_or("unlimited".into(), |limit| format!("at most {} MiB", limit >> 20));
    if !has_devices {
        return Check::ok("locked memory", found);
    }
    let cure = "InfiniBand and EFA need `ulimit -l unlimited`: LimitMEMLOCK=infinity for slurmd, and no propagation of the \
                login node's limit (PropagateResourceLimitsExcept=MEMLOCK in slurm.conf)";
    Check::graded("locked memory", limit.is_none_or(|limit| limit >= LOCKED_BYTES), Grade::Warn, found, cure)
}

fn open_files(limit: Option<u64>) -> Check {
    let found = limit.map_or("unlimited".into(), |limit| format!("at most {limit}"));
    let good = limit.is_none_or(|limit| limit >= OPEN_FILES);
    Check::graded("open files", good, Grade::Warn, found, "raise it: ulimit -n 65536")
}

/// The folder of the runs, or where it would be made.
fn folder(run_root: &Path) -> Check {
    let existing = run_root.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
    match preflight::folder(existing, "login.run_root (or NEMOTRON_RUN_ROOT)") {
        Ok(()) => Check::ok("run folder", run_root.display().to_string()),
        Err(Failure { error, hints, .. }) => {
            let found = error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ");
            hints.into_iter().fold(Check::new("run folder", Grade::Crit, found), Check::cure)
        }
    }
}

fn slurm() -> Check {
    match ask("scontrol", &arguments(["ping"]), &Request::within(BRIEF)) {
        Ok(answer) if answer.stdout.contains("is UP") => Check::ok("slurm", first_line(&answer.stdout)),
        Ok(answer) => Check::new("slurm", Grade::Warn, first_line(&answer.stdout))
            .cure("jobs that run go on; new ones must wait until slurmctld is back"),
        Err(SlurmError::Missing { .. }) => {
            Check::new("slurm", Grade::Skip, "not installed here: runs stay on this machine")
        }
        Err(error) => Check::new("slurm", Grade::Warn, error.to_string())
            .cure("jobs that run go on; new ones must wait until Slurm answers"),
    }
}

fn first_line(text: &str) -> String {
    text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default().trim().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_graded_by_what_a_run_needs() {
        assert_eq!(cores(8, 8).grade, Grade::Ok);
        assert_eq!(cores(1, 8).grade, Grade::Warn);
        assert_eq!(locked_memory(Some(64 << 10), false).grade, Grade::Ok);
        assert_eq!(locked_memory(Some(64 << 10), true).grade, Grade::Warn);
        assert_eq!(locked_memory(None, true).grade, Grade::Ok);
        assert_eq!(open_files(Some(1024)).grade, Grade::Warn);
        assert_eq!(shared_memory(1 << 30).grade, Grade::Crit);
        assert!(cores(1, 8).cure.is_some());
    }

    #[test]
    fn a_run_folder_that_cannot_be_is_critical() {
        assert_eq!(folder(Path::new("/proc/nemotron")).grade, Grade::Crit);
        assert_eq!(folder(&std::env::temp_dir().join("is/made/later")).grade, Grade::Ok);
    }
}
