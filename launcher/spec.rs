//! The resolved run: everything that is needed to start it, and to start it again. Written to `run.lock.toml`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use nemotron_engine::backend::ComputeType;
use nemotron_engine::config::Mesh;
use nemotron_engine::rank::{Device, Limits, ModelSource};
use serde::{Deserialize, Serialize};

use crate::cluster::Site;

/// A run after profile, cluster file, job file, environment and flags were layered and the plan showed that it fits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSpec {
    pub schema: u32,
    pub name: String,
    pub profile: String,
    pub cluster: String,
    pub model: ModelSource,
    pub device: Device,
    pub dtype: ComputeType,
    /// Threads of one CPU rank.
    pub threads: usize,
    pub mesh: Mesh,
    pub limits: Limits,
    pub task: Task,
    pub deadlines: Deadlines,
    #[serde(default)]
    pub continuation: Continuation,
    /// Its part in a job that several runs share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<Replicas>,
    /// What Slurm is asked for; `None` without Slurm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<Site>,
}

impl RunSpec {
    /// Which rank of its host a rank is, and so which of its devices it uses.
    pub fn local_rank(&self, rank: usize) -> usize {
        let per_host = self.site.as_ref().map_or(self.mesh.world_size(), |site| site.devices_per_node);
        rank % per_host.max(1)
    }
}

/// What the run is for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Task {
    Serve {
        host: IpAddr,
        /// 0 lets the system choose.
        port: u16,
        /// No bearer token is asked for.
        no_auth: bool,
        /// Holds the bearer token; `None` uses the run's own `token` file.
        token_file: Option<PathBuf>,
        strict: bool,
        /// Seconds without a request after which it ends; `None` waits for ever.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        idle_s: Option<f64>,
    },
    Job {
        /// Absolute.
        file: PathBuf,
        /// Only the first rows.
        limit: Option<u64>,
        /// Seconds that an attempt has.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        deadline_s: Option<f64>,
        /// Keys of the job file that `--set` gave; [`crate::job_file::load_job`] applies them.
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        overrides: BTreeMap<String, toml::Value>,
    },
}

/// A job is shared by so many runs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replicas {
    pub count: u32,
    /// Which of them this run is; `None` for the one that holds them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<u32>,
    /// Seconds without a sign of life after which the others take a replica's rows over.
    pub lease_s: f64,
}

/// How far a run goes on by itself; what it may do is [`crate::report::Exit::retry`]'s to say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Continuation {
    /// Starts after failures that count. With none, no failure is answered by another start.
    pub retries: u32,
    /// Jobs of Slurm that may follow one whose time is over.
    pub chain: u32,
}

/// How long each phase may take.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deadlines {
    #[serde(with = "crate::seconds")]
    pub preflight: Duration,
    #[serde(with = "crate::seconds")]
    pub rendezvous: Duration,
    #[serde(with = "crate::seconds")]
    pub comm_init: Duration,
    #[serde(with = "crate::seconds")]
    pub loading: Duration,
    #[serde(with = "crate::seconds")]
    pub warmup: Duration,
    #[serde(with = "crate::seconds")]
    pub drain: Duration,
    /// Work is queued but no step completes for so long: the run has hung.
    #[serde(with = "crate::seconds")]
    pub progress: Duration,
    /// For how long a job bears that its journal or output cannot be written.
    #[serde(with = "crate::seconds")]
    pub storage: Duration,
    /// For how long a run goes on while the slurmd of a node is gone; else it follows from Slurm's own patience.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slurmd_s: Option<f64>,
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// Serves the built-in model with one rank, with deadlines fit for a test.
    pub(crate) fn serve_spec(name: &str) -> RunSpec {
        let seconds = Duration::from_secs;
        RunSpec {
            schema: 1,
            name: name.into(),
            profile: "cpu".into(),
            cluster: "local".into(),
            model: ModelSource::Builtin,
            device: Device::Cpu,
            dtype: ComputeType::Bf16,
            threads: 1,
            mesh: Mesh { tp: 1, pp: 1 },
            limits: Limits { page_tokens: 16, num_pages: 64, max_step_tokens: 64, max_sequences: 8 },
            task: Task::Serve {
                host: std::net::Ipv4Addr::LOCALHOST.into(),
                port: 0,
                no_auth: false,
                token_file: None,
                strict: false,
                idle_s: None,
            },
            deadlines: Deadlines {
                preflight: seconds(20),
                rendezvous: seconds(20),
                comm_init: seconds(20),
                loading: seconds(20),
                warmup: seconds(20),
                drain: seconds(20),
                progress: seconds(20),
                storage: seconds(20),
                slurmd_s: None,
            },
            continuation: Continuation::default(),
            replicas: None,
            site: None,
        }
    }
}
