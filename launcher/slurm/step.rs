//! Ranks as the tasks of one Slurm step, started by `srun` in the batch script's allocation.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nemotron_engine::rank::{Device, ModelSource};

use crate::cluster::{GpuRequest, Site};
use crate::env;
use crate::ranks::{Notice, Ranks};
use crate::rendezvous::{NETWORK_HINT, local_ip, own_addresses};
use crate::report::{Exit, Failure, Outcome};
use crate::rundir::RunDir;
use crate::slurm::again::{OwnJob, URGENT};
use crate::slurm::daemon::Daemons;
use crate::slurm::env::Allocation;
use crate::spec::RunSpec;
use crate::tail::Tail;

/// Lines of srun's that are looked at.
const MOST_LINES: usize = 10_000;

/// Lines that a rank which never joined said, and that are shown.
const OWN_LINES: usize = 4;

/// What srun says of a rank whose own lines tell why: a plugin or the system did not let it start.
const NOT_STARTED: &str = "could not execve job";

/// How long those lines may take longer than srun's: they come another way.
const OWN_LINES_PATIENCE: Duration = Duration::from_secs(1);

/// The step that holds all ranks. Dropping it ends them.
pub(crate) struct Step {
    run_dir: RunDir,
    allocation: Allocation,
    job: OwnJob,
    daemons: Daemons,
    per_node: usize,
    options: Vec<String>,
    /// What each task runs.
    command: Vec<String>,
    addresses: Vec<IpAddr>,
    attempt: u32,
    srun: Option<Child>,
    /// What srun says, read so far.
    words: Vec<String>,
    tail: Option<Tail>,
    /// How many of those lines [`Ranks::refused`] has looked at.
    known: usize,
    refused: BTreeSet<usize>,
    /// Refused ranks that have not said why themselves, with srun's reason and until when they may.
    silent: Vec<(usize, String, Instant)>,
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
        let addresses = supervisor_addresses(&allocation.nodes, site.interface.as_deref())?;
        let binary = std::env::current_exe().context("cannot find this executable")?;
        let mut needed = vec![run_dir.path(), &binary];
        if let ModelSource::Path(path) = &spec.model {
            needed.push(path);
        }
        let mut options = options(spec, site);
        options.extend(site.container.srun_options(&needed));
        let mut command = site.container.command_prefix(&needed, spec.device);
        command.extend([binary.as_path(), Path::new("worker"), run_dir.path()].map(|word| word.display().to_string()));
        let job = OwnJob::new(run_dir, site, &allocation);
        let daemons = Daemons::ask(&allocation.nodes, URGENT);
        let (run_dir, per_node) = (run_dir.clone(), site.devices_per_node);
        Ok(Self {
            run_dir,
            allocation,
            job,
            daemons,
            per_node,
            options,
            command,
            addresses,
            attempt: 0,
            srun: None,
            words: Vec::new(),
            known: 0,
            tail: None,
            refused: BTreeSet::new(),
            silent: Vec::new(),
            collapse: None,
        })
    }

    fn node_of(&self, rank: usize) -> &str {
        // The distribution is by blocks, see `options`.
        self.allocation.nodes.get(rank / self.per_node).map_or("?", String::as_str)
    }

    /// Reads what srun has said since the last look.
    fn listen(&mut self) {
        let news = self.tail.as_mut().and_then(|tail| tail.lines().ok()).unwrap_or_default();
        // Ranks write to logs of their own, so this is little; but a container may be talkative.
        self.words.extend(news.into_iter().take(MOST_LINES.saturating_sub(self.words.len())));
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
        // What a task says before it writes to its own log stands behind its number.
        "--label".into(),
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

/// Addresses of this node at which the other nodes of the allocation may reach it.
fn supervisor_addresses(nodes: &[String], interface: Option<&str>) -> Outcome<Vec<IpAddr>> {
    // A node's own name may stand for its loopback address.
    let others_first = nodes.iter().skip(1).chain(nodes.first());
    let resolved = others_first.flat_map(|node| (node.as_str(), 1).to_socket_addrs().into_iter().flatten());
    let towards = resolved.into_iter().find(|address| local_ip(*address).is_ok_and(|ip| !ip.is_loopback()));
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
    match towards {
        None if nodes.len() > 1 && interface.is_none() => {
            let text = format!("no address of {} is known on {}", nodes[1..].join(", "), nodes[0]);
            Err(Failure::msg(Exit::Rendezvous, text)
                .hint("the nodes' names must resolve on the nodes, by DNS or /etc/hosts; or set fabric.interface"))
        }
        towards => own_addresses(interface, towards.unwrap_or(loopback))
            .map_err(|error| Failure::new(Exit::Rendezvous, error).hint(NETWORK_HINT)),
    }
}

impl Ranks for Step {
    fn meeting_points(&self) -> &[IpAddr] {
        &self.addresses
    }

    fn start(&mut self, _count: usize, supervisor: &[SocketAddr], attempt: u32) -> anyhow::Result<()> {
        self.attempt = attempt;
        let words = std::fs::File::create(self.run_dir.step_log(attempt)).context("cannot make srun's log")?;
        let child = Command::new("srun")
            .args(&self.options)
            .args(&self.command)
            .env(env::ATTEMPT, attempt.to_string())
            .env(env::SUPERVISOR, env::join(supervisor))
            .env_remove(env::RANK)
            .stdin(Stdio::null())
            .stdout(words.try_clone().context("cannot share srun's log")?)
            .stderr(words)
            .spawn()
            .context("cannot start srun")?;
        self.srun = Some(child);
        self.words.clear();
        self.known = 0;
        self.refused.clear();
        self.silent.clear();
        self.tail = Some(Tail::new(self.run_dir.step_log(attempt)));
        Ok(())
    }

    /// Single ranks are seen to end by their connections; only the step's end is seen here.
    fn reap(&mut self) -> Vec<(usize, ExitStatus)> {
        if let Some(status) = self.srun.as_mut().and_then(|srun| srun.try_wait().ok().flatten()) {
            self.srun = None;
            self.listen();
            let errors = self.words.iter().filter(|line| line.contains("error")).cloned();
            let words: Vec<String> = std::iter::once(format!("srun ended ({status})")).chain(errors.take(5)).collect();
            self.collapse = Some(words.join("; "));
        }
        Vec::new()
    }

    fn place(&self, rank: usize) -> Option<String> {
        Some(format!("host {}", self.node_of(rank)))
    }

    fn node(&self, rank: usize) -> Option<String> {
        Some(self.node_of(rank).to_owned())
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

    fn refused(&mut self) -> Vec<(usize, Exit, String)> {
        self.listen();
        let known = std::mem::replace(&mut self.known, self.words.len());
        for line in &self.words[known..] {
            let all = 0..self.allocation.nodes.len() * self.per_node;
            let (ranks, how): (Vec<usize>, &str) = match (ended_tasks(line), failed_node(line)) {
                (Some((tasks, how)), _) => (all.filter(|&rank| holds(tasks, rank)).collect(), how),
                (_, Some((node, how))) => (all.filter(|&rank| self.node_of(rank) == node).collect(), how),
                _ => continue,
            };
            let patience = if how.contains(NOT_STARTED) { OWN_LINES_PATIENCE } else { Duration::ZERO };
            let news = ranks.into_iter().filter(|rank| self.refused.insert(*rank));
            self.silent.extend(news.map(|rank| (rank, how.to_owned(), Instant::now() + patience)));
        }
        let mut refused = Vec::new();
        let (words, all_said) = (&self.words, self.srun.is_none());
        self.silent.retain(|(rank, how, until)| {
            let label = format!("{rank}: ");
            let own = words.iter().filter_map(|line| line.trim_start().strip_prefix(&label));
            let own: Vec<&str> = own.map(str::trim).filter(|line| !line.is_empty()).take(OWN_LINES).collect();
            if own.is_empty() && !all_said && Instant::now() < *until {
                return true;
            }
            let mut own = own.join("; ").trim_start_matches("error: ").to_owned();
            // Slurm gives what is not there or may not be run these codes, as a shell does; ours says it itself.
            let of_node = how.ends_with(&format!("exit code {}", Exit::Preflight as u8)) || own.contains("execve()");
            if own.contains("execve()") {
                own += "; slurm.binary and container.runtime must name what every node has";
            }
            let exit = if of_node { Exit::Preflight } else { Exit::Rendezvous };
            refused.push((*rank, exit, if own.is_empty() { how.clone() } else { own }));
            false
        });
        refused
    }

    fn report_on(&self, rank: usize) -> Option<String> {
        self.words.iter().find(|line| ended_tasks(line).is_some_and(|(tasks, _)| holds(tasks, rank))).cloned()
    }

    fn collapse(&mut self) -> Option<String> {
        self.collapse.take()
    }

    fn are_scheduled(&self) -> bool {
        true
    }

    fn daemon_port(&self, rank: usize) -> Option<u16> {
        self.daemons.port(rank / self.per_node)
    }

    fn daemon_patience(&self) -> Option<Duration> {
        self.daemons.patience()
    }

    fn time_left(&self) -> Option<Duration> {
        self.job.time_left()
    }

    fn notice(&self) -> Option<Notice> {
        self.job.notice()
    }

    fn is_requeued(&self) -> bool {
        self.job.is_requeued()
    }

    fn are_nodes_up(&self) -> bool {
        self.job.are_nodes_up()
    }

    fn submit_successor(&self, avoid: &[String]) -> Outcome<u64> {
        self.job.submit_successor(avoid)
    }

    fn requeue(&self) -> Outcome {
        Ok(self.job.requeue()?)
    }
}

/// Which tasks a line of srun's says have ended, and how: `srun: error: h100-02: tasks 2-3: Exited with exit code 2`,
/// `srun: error: task 2 launch failed: Slurmd could not connect IO`, `srun: error: h100-02: task 5: Killed`.
fn ended_tasks(line: &str) -> Option<(&str, &str)> {
    // A job step of a task reports in the task's own output, behind its label.
    let about = line.strip_prefix("srun: error: ")?;
    let (_, tasks) = about.split_once("task")?;
    let tasks = tasks.trim_start_matches('s').trim_start();
    let (tasks, how) = tasks.split_at(tasks.find(|char: char| !matches!(char, '0'..='9' | ',' | '-'))?);
    let how = how.trim_start_matches(':').trim();
    (!tasks.is_empty() && !how.is_empty()).then_some((tasks, how))
}

/// Which node a line of srun's says could not launch its tasks, and why:
/// `srun: error: Task launch for StepId=2.0 failed on node n042: Job prolog failed`.
fn failed_node(line: &str) -> Option<(&str, &str)> {
    let about = line.strip_prefix("srun: error: Task launch for ")?;
    let (_, about) = about.split_once(" failed on node ")?;
    // So it says of a job that was cancelled meanwhile.
    about.split_once(": ").filter(|(_, how)| *how != "Job credential revoked")
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
    fn srun_says_which_tasks_ended() {
        for (line, expected) in [
            ("srun: error: h100-02: tasks 2-3,7: Exited with exit code 2", Some(("2-3,7", "Exited with exit code 2"))),
            ("srun: error: h100-02: task 5: Killed", Some(("5", "Killed"))),
            (
                "srun: error: task 2 launch failed: Slurmd could not connect IO",
                Some(("2", "launch failed: Slurmd could not connect IO")),
            ),
            ("srun: error: Node failure on h100-02", None),
            ("3: srun: error: h100-02: task 5: Killed", None),
            ("srun: launch/slurm: _step_signal: Terminating StepId=8.0", None),
        ] {
            assert_eq!(ended_tasks(line), expected, "{line}");
        }
        let line = "srun: error: Task launch for StepId=2.0 failed on node n042: Job prolog failed";
        assert_eq!((failed_node(line), ended_tasks(line)), (Some(("n042", "Job prolog failed")), None));
    }
}
