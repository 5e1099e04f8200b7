//! Ranks as the tasks of one Slurm step, started by `srun` in the batch script's allocation.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use nemotron_engine::rank::{Device, ModelSource};

use crate::cluster::{GpuRequest, Site};
use crate::env;
use crate::ranks::Ranks;
use crate::rendezvous::local_ip;
use crate::report::{Exit, Failure, Outcome};
use crate::rundir::RunDir;
use crate::slurm::env::Allocation;
use crate::spec::RunSpec;
use crate::tail::last_lines;

/// Lines of srun's own words that are looked at.
const REPORT_LINES: usize = 100;

/// The step that holds all ranks. Dropping it ends them.
pub(crate) struct Step {
    run_dir: RunDir,
    allocation: Allocation,
    per_node: usize,
    options: Vec<String>,
    /// What each task runs.
    command: Vec<String>,
    ip: IpAddr,
    attempt: u32,
    srun: Option<Child>,
    collapse: Option<String>,
}

impl Step {
    /// # Errors
    /// The allocation is not the one that was asked for, or this node has no address that others can reach.
    pub(crate) fn new(run_dir: &RunDir, spec: &RunSpec, site: &Site, allocation: Allocation) -> Outcome<Self> {
        let world_size = spec.mesh.world_size();
        if allocation.nodes.len() != site.nodes || world_size != site.nodes * site.devices_per_node {
            let text = format!(
                "job {} has {} nodes ({}), but {world_size} ranks need {} with {} on each",
                allocation.job_id,
                allocation.nodes.len(),
                allocation.nodes.join(", "),
                site.nodes,
                site.devices_per_node
            );
            return Err(Failure::msg(Exit::Rendezvous, text));
        }
        let ip = own_address(&allocation.nodes)?;
        let binary = std::env::current_exe().context("cannot find this executable")?;
        let mut needed = vec![run_dir.path(), &binary];
        if let ModelSource::Path(path) = &spec.model {
            needed.push(path);
        }
        let mut options = options(spec, site);
        options.extend(site.container.srun_options(&needed));
        let mut command = site.container.command_prefix(&needed, spec.device);
        command.extend([binary.as_path(), Path::new("worker"), run_dir.path()].map(|word| word.display().to_string()));
        let (run_dir, per_node) = (run_dir.clone(), site.devices_per_node);
        Ok(Self { run_dir, allocation, per_node, options, command, ip, attempt: 0, srun: None, collapse: None })
    }

    fn node(&self, rank: usize) -> &str {
        // The distribution is by blocks, see `options`.
        self.allocation.nodes.get(rank / self.per_node).map_or("?", String::as_str)
    }

    fn words(&self) -> Vec<String> {
        last_lines(&self.run_dir.step_log(self.attempt), REPORT_LINES)
    }
}

/// What `srun` is asked for, all but where output goes and what is run.
fn options(spec: &RunSpec, site: &Site) -> Vec<String> {
    let mut options = vec![
        format!("--nodes={}", site.nodes),
        format!("--ntasks={}", spec.mesh.world_size()),
        format!("--ntasks-per-node={}", site.devices_per_node),
        // It is not inherited from the job in every version.
        format!("--cpus-per-task={}", site.cpus_per_task.unwrap_or(1)),
        "--distribution=block".into(),
        "--kill-on-bad-exit=1".into(),
        "--wait=30".into(),
        "--mpi=none".into(),
        "--export=ALL".into(),
        "--input=none".into(),
        "--open-mode=append".into(),
    ];
    options.extend(site.mem.as_ref().map(|mem| format!("--mem={mem}")));
    if spec.device == Device::Cuda {
        let kind = site.gres_type.as_ref().map(|kind| format!("{kind}:")).unwrap_or_default();
        options.extend(match site.gpu_request {
            GpuRequest::GpusPerNode => Some(format!("--gpus-per-node={kind}{}", site.devices_per_node)),
            GpuRequest::Gres => Some(format!("--gres=gpu:{kind}{}", site.devices_per_node)),
            GpuRequest::GpusPerTask => Some(format!("--gpus-per-task={kind}1")),
            GpuRequest::None => None,
        });
        // Every rank sees all devices of its node, which NCCL needs for their direct links.
        options.push("--gpu-bind=none".into());
    }
    options
}

/// A path as `srun --output` takes it, where `%` and `\` are special.
fn pattern(path: &Path) -> String {
    path.display().to_string().replace('\\', "\\\\").replace('%', "%%")
}

/// The address of this node that other nodes of the allocation reach: the one from which it reaches them.
fn own_address(nodes: &[String]) -> Outcome<IpAddr> {
    // A node's own name may stand for its loopback address.
    let others_first = nodes.iter().skip(1).chain(nodes.first());
    for node in others_first {
        for address in (node.as_str(), 1).to_socket_addrs().into_iter().flatten() {
            if let Ok(ip) = local_ip(address)
                && !ip.is_loopback()
            {
                return Ok(ip);
            }
        }
    }
    if nodes.len() == 1 {
        return Ok(Ipv4Addr::LOCALHOST.into());
    }
    let text = format!("no address of {} is known on {}", nodes[1..].join(", "), nodes[0]);
    Err(Failure::msg(Exit::Rendezvous, text).hint("the nodes' names must resolve on the nodes, by DNS or /etc/hosts"))
}

impl Ranks for Step {
    fn meeting_point(&self) -> IpAddr {
        self.ip
    }

    fn start(&mut self, _count: usize, supervisor: SocketAddr, attempt: u32) -> anyhow::Result<()> {
        self.attempt = attempt;
        let directory = self.run_dir.attempt(attempt);
        let words = std::fs::File::create(self.run_dir.step_log(attempt)).context("cannot make srun's log")?;
        let child = Command::new("srun")
            .args(&self.options)
            .arg(format!("--output={}/rank-%3t.log", pattern(&directory)))
            .args(&self.command)
            .env(env::ATTEMPT, attempt.to_string())
            .env(env::SUPERVISOR, supervisor.to_string())
            .env_remove(env::RANK)
            .stdin(Stdio::null())
            .stdout(words.try_clone().context("cannot share srun's log")?)
            .stderr(words)
            .spawn()
            .context("cannot start srun")?;
        self.srun = Some(child);
        Ok(())
    }

    /// Single ranks are seen to end by their connections; only the step's end is seen here.
    fn reap(&mut self) -> Vec<(usize, ExitStatus)> {
        if let Some(status) = self.srun.as_mut().and_then(|srun| srun.try_wait().ok().flatten()) {
            self.srun = None;
            let errors = self.words().into_iter().filter(|line| line.contains("error"));
            let words: Vec<String> = std::iter::once(format!("srun ended ({status})")).chain(errors.take(5)).collect();
            self.collapse = Some(words.join("; "));
        }
        Vec::new()
    }

    fn place(&self, rank: usize) -> Option<String> {
        Some(format!("host {}", self.node(rank)))
    }

    fn any_left(&self) -> bool {
        self.srun.is_some()
    }

    fn kill_all(&mut self) {
        if let Some(srun) = &mut self.srun {
            // Slurm ends the tasks of an srun that was killed.
            _ = srun.kill();
        }
    }

    fn grace(&self) -> Duration {
        // Slurm itself needs a moment to see that all tasks have ended.
        Duration::from_secs(5)
    }

    fn report_on(&self, rank: usize) -> Option<String> {
        let about = format!("srun: error: {}: task", self.node(rank));
        self.words().into_iter().find(|line| {
            let tasks = line.strip_prefix(&about).and_then(|rest| rest.trim_start_matches('s').split_once(':'));
            tasks.is_some_and(|(tasks, _)| holds(tasks.trim(), rank))
        })
    }

    fn collapse(&mut self) -> Option<String> {
        self.collapse.take()
    }

    fn are_scheduled(&self) -> bool {
        true
    }
}

/// Whether `2-3,7` holds a number.
fn holds(list: &str, number: usize) -> bool {
    list.split(',').any(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        matches!((first.parse::<usize>(), last.parse::<usize>()), (Ok(first), Ok(last)) if (first..=last).contains(&number))
    })
}

impl Drop for Step {
    fn drop(&mut self) {
        self.kill_all();
        if let Some(srun) = &mut self.srun {
            _ = srun.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_are_found_in_lists() {
        assert!(holds("2-3,7", 3) && holds("2-3,7", 7) && holds("5", 5));
        assert!(!holds("2-3,7", 4) && !holds("", 0) && !holds("x", 0));
    }

    #[test]
    fn file_names_are_no_patterns() {
        assert_eq!(pattern(Path::new("/a%b\\c")), "/a%%b\\\\c");
    }
}
