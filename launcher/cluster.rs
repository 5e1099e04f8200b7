//! Cluster files: what is particular to a site, and what a run on it asks Slurm for.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nemotron_engine::rank::Device;
use serde::{Deserialize, Serialize};

use crate::config_file::{self, Document};
use crate::env::Environment;
use crate::fabric;
use crate::plan::Plan;
use crate::report::{Exit, Failure, Outcome};
use crate::settings::Settings;
use crate::slurm::parse::format_time;

/// The cluster that is this machine, without a scheduler.
pub const LOCAL: &str = "local";

macro_rules! built_in {
    ($($name:literal),* $(,)?) => { &[$(($name, include_str!(concat!("../cluster-configs/", $name, ".toml")))),*] };
}

/// Name and text of the cluster files in the binary.
pub const BUILT_IN: &[(&str, &str)] = built_in![
    "local",
    "generic",
    "dgx-a100-ib",
    "dgx-h100-ib",
    "dgx-h200-ib",
    "aws-p4de-efa",
    "aws-p5-efa",
    "aws-p5en-efa",
    "gcp-a3-highgpu",
    "gcp-a3-megagpu",
    "gcp-a3-ultragpu",
    "azure-nda100v4",
    "azure-ndh100v5",
    "azure-ndh200v5",
    "oci-h100-roce",
    "roce",
    "ethernet",
    "pyxis",
    "apptainer",
    "four-gpu-nodes",
];

/// A cluster file by name or path.
///
/// # Errors
/// There is none, or it cannot be read.
pub fn find(name: &str, environment: &Environment) -> Outcome<Document> {
    Document::find("cluster", name, "", BUILT_IN, environment)
}

/// Names of all cluster files, sorted.
pub fn names(environment: &Environment) -> Vec<String> {
    config_file::names("", BUILT_IN, environment)
}

/// What a run on a cluster with Slurm asks for and gets. Part of `run.lock.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Site {
    pub nodes: usize,
    /// Devices, and ranks, of one node.
    pub devices_per_node: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partition: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qos: Option<String>,
    /// `None` leaves it to the partition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_s: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub constraint: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reservation: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodelist: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exclude: Option<String>,
    pub exclusive: bool,
    pub requeue: bool,
    /// Options of sbatch, each beginning with `--`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extra: Vec<String>,
    pub gpu_request: GpuRequest,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gres_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus_per_task: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switches: Option<usize>,
    /// Whether sacct may be asked.
    pub sacct: bool,
    /// Nemotron as the nodes see it; `None` is the executable that launches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub binary: Option<PathBuf>,
    /// Template of the batch script in place of the one in the binary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<PathBuf>,
    /// Interface on which ranks and supervisor talk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// Variables of the submitting shell that the job gets, by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pass: Vec<String>,
    /// The same for those whose values are written only to the run's `secrets.env`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
    /// Shell files that the batch script reads.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source: Vec<PathBuf>,
    pub container: Container,
    /// Set in any case.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<Variable>,
    /// Set where the job's environment does not have them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fabric: Vec<Variable>,
}

/// How devices are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GpuRequest {
    GpusPerNode,
    Gres,
    GpusPerTask,
    None,
}

/// A variable of the job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variable {
    pub name: String,
    pub value: String,
    /// File, flag or preset, for people.
    pub source: String,
}

/// What ranks run in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Container {
    pub runtime: Runtime,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub image: String,
    /// `SOURCE:TARGET[:OPTIONS]`
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<String>,
    pub mount_home: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Runtime {
    None,
    Pyxis,
    Apptainer,
}

impl Container {
    /// Options of `srun` that put the ranks into the container; `needed` are the folders that they must see.
    pub fn srun_options(&self, needed: &[&Path]) -> Vec<String> {
        match self.runtime {
            Runtime::Pyxis => vec![
                format!("--container-image={}", self.image),
                format!("--container-mounts={}", self.binds(needed).join(",")),
                (if self.mount_home { "--container-mount-home" } else { "--no-container-mount-home" }).into(),
            ],
            Runtime::None | Runtime::Apptainer => Vec::new(),
        }
    }

    /// What stands before the rank's own command.
    pub fn command_prefix(&self, needed: &[&Path], device: Device) -> Vec<String> {
        if self.runtime != Runtime::Apptainer {
            return Vec::new();
        }
        let mut words = vec!["apptainer".to_owned(), "exec".into()];
        words.extend((device == Device::Cuda).then(|| "--nv".into()));
        words.extend((!self.mount_home).then(|| "--no-home".into()));
        words.extend(self.binds(needed).into_iter().map(|mount| format!("--bind={mount}")));
        words.push(self.image.clone());
        words
    }

    fn binds(&self, needed: &[&Path]) -> Vec<String> {
        let needed = needed.iter().map(|path| format!("{0}:{0}", path.display()));
        self.mounts.iter().cloned().chain(needed).collect()
    }
}

impl Site {
    /// What settings ask of the cluster that they name; `None` is no Slurm.
    ///
    /// # Errors
    /// The profile is for other devices than the cluster's, a limit of the cluster file is passed, or a value cannot be written down.
    pub fn of_settings(settings: &Settings, plan: &Plan, environment: &Environment) -> Outcome<Option<Self>> {
        if settings.text("cluster").unwrap_or(LOCAL) == LOCAL {
            return Ok(None);
        }
        let text = |key| settings.text(key).filter(|text| !text.is_empty()).map(str::to_owned);
        let path = |key| text(key).map(|file| environment.absolute(&file, &environment.directory));
        let cuda = plan.hardware.device == Device::Cuda;
        let preset = match text("fabric.preset").filter(|_| cuda && plan.hardware.nodes > 1) {
            Some(name) => Some(fabric::find(&name, environment)?),
            None => None,
        };
        let mut source = preset.iter().flat_map(|preset| preset.source.clone()).collect::<Vec<_>>();
        source.extend(settings.texts("env.source").into_iter().map(PathBuf::from));
        let site = Self {
            nodes: plan.hardware.nodes,
            devices_per_node: plan.hardware.devices_per_node,
            account: text("slurm.account"),
            partition: text("slurm.partition"),
            qos: text("slurm.qos"),
            time_s: settings.duration("slurm.time").map(|limit| limit.as_secs()),
            constraint: text("slurm.constraint"),
            reservation: text("slurm.reservation"),
            nodelist: text("slurm.nodelist"),
            exclude: text("slurm.exclude"),
            exclusive: settings.flag("slurm.exclusive"),
            requeue: settings.flag("slurm.requeue"),
            extra: settings.texts("slurm.extra"),
            gpu_request: match text("slurm.quirks.gpu_request").as_deref() {
                _ if !cuda && !settings.is_requested("slurm.quirks.gpu_request") => GpuRequest::None,
                Some("gres") => GpuRequest::Gres,
                Some("gpus-per-task") => GpuRequest::GpusPerTask,
                Some("none") => GpuRequest::None,
                _ => GpuRequest::GpusPerNode,
            },
            gres_type: text("slurm.quirks.gres_type"),
            mem: text("slurm.quirks.mem"),
            cpus_per_task: settings.count("slurm.quirks.cpus_per_task"),
            switches: settings.count("slurm.quirks.switches"),
            sacct: settings.source("slurm.quirks.sacct").is_none() || settings.flag("slurm.quirks.sacct"),
            binary: path("slurm.binary"),
            template: path("slurm.template"),
            interface: text("fabric.interface"),
            pass: settings.texts("env.pass"),
            secrets: settings.texts("secrets.names"),
            source,
            container: Container {
                runtime: match settings.text("container.runtime") {
                    Some("pyxis") => Runtime::Pyxis,
                    Some("apptainer") => Runtime::Apptainer,
                    _ => Runtime::None,
                },
                image: text("container.image").unwrap_or_default(),
                mounts: settings.texts("container.mounts"),
                mount_home: settings.flag("container.mount_home"),
            },
            set: variables(settings, "env.set"),
            fabric: fabric::variables(preset.as_ref(), settings, cuda),
        };
        site.check(settings, plan)?;
        Ok(Some(site))
    }

    /// The time limit.
    pub fn time(&self) -> Option<Duration> {
        self.time_s.map(Duration::from_secs)
    }

    fn check(&self, settings: &Settings, plan: &Plan) -> Outcome {
        let cluster = settings.text("cluster").unwrap_or_default();
        let usage = |message: String| Err(Failure::msg(Exit::Usage, message));
        let refused = |message: String| Err(Failure::msg(Exit::Preflight, message));
        if let Some(gpu) = settings.text("hardware.gpu").filter(|gpu| *gpu != plan.hardware.name)
            && plan.hardware.device == Device::Cuda
        {
            return refused(format!(
                "profile {} is for {}, cluster {cluster} has {gpu}",
                plan.profile, plan.hardware.name
            ));
        }
        if let Some(most) = settings.count("limits.max_nodes").filter(|most| self.nodes > *most) {
            return refused(format!(
                "the run needs {} nodes, cluster {cluster} gives {most} (limits.max_nodes)",
                self.nodes
            ));
        }
        match (self.time(), settings.duration("limits.max_time")) {
            (Some(time), Some(most)) if time > most => {
                let (time, most) = (format_time(time), format_time(most));
                return refused(format!(
                    "the time limit {time} is above the {most} that cluster {cluster} gives (limits.max_time)"
                ));
            }
            _ => {}
        }
        let partitions = settings.texts("limits.partitions");
        if let Some(partition) =
            self.partition.as_ref().filter(|name| !partitions.is_empty() && !partitions.contains(*name))
        {
            return Err(Failure::msg(
                Exit::Preflight,
                format!("partition {partition} is none for this on cluster {cluster}"),
            )
            .hint(format!("use one of {} (limits.partitions)", partitions.join(", "))));
        }
        if self.container.runtime != Runtime::None && self.container.image.is_empty() {
            return usage("container.runtime is set, but container.image is not".into());
        }
        let named = self.set.iter().chain(&self.fabric).map(|variable| &variable.name);
        if let Some(name) = named.chain(&self.pass).chain(&self.secrets).find(|name| !is_variable_name(name)) {
            return usage(format!("`{name}` is no name of a variable"));
        }
        if let Some(option) = self.extra.iter().find(|option| !option.starts_with("--")) {
            return usage(format!("slurm.extra: `{option}` must begin with --"));
        }
        Ok(())
    }
}

fn variables(settings: &Settings, key: &str) -> Vec<Variable> {
    let entries = settings.entries(key);
    let variable =
        |name: &str, value: &str, source: String| Variable { name: name.into(), value: value.into(), source };
    entries.map(|(name, value, source)| variable(name, value, source.to_string())).collect()
}

fn is_variable_name(name: &str) -> bool {
    !name.starts_with(|char: char| char.is_ascii_digit())
        && !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// Two nodes with 8 devices each, in a partition, for two hours.
    pub(crate) fn site() -> Site {
        Site {
            nodes: 2,
            devices_per_node: 8,
            account: None,
            partition: Some("gpu".into()),
            qos: None,
            time_s: Some(7200),
            constraint: None,
            reservation: None,
            nodelist: None,
            exclude: None,
            exclusive: true,
            requeue: false,
            extra: Vec::new(),
            gpu_request: GpuRequest::GpusPerNode,
            gres_type: None,
            mem: Some("0".into()),
            cpus_per_task: None,
            switches: None,
            sacct: true,
            binary: None,
            template: None,
            interface: None,
            pass: Vec::new(),
            secrets: Vec::new(),
            source: Vec::new(),
            container: Container {
                runtime: Runtime::None,
                image: String::new(),
                mounts: Vec::new(),
                mount_home: false,
            },
            set: Vec::new(),
            fabric: Vec::new(),
        }
    }
}
