//! Fabric files: settings of NCCL for a kind of network, as data.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use crate::cluster::Variable;
use crate::config_file::Document;
use crate::env::Environment;
use crate::report::{Exit, Failure, Outcome};
use crate::settings::Settings;

macro_rules! built_in {
    ($($name:literal),* $(,)?) => { &[$(($name, include_str!(concat!("../cluster-configs/fabrics/", $name, ".toml")))),*] };
}

/// Name and text of the fabric files in the binary.
pub const BUILT_IN: &[(&str, &str)] =
    built_in!["ib", "roce", "oci-roce", "efa", "azure-ib", "gcp-tcpx", "gcp-tcpxo", "gcp-rdma", "socket"];

/// A kind of network.
#[derive(Clone, Debug)]
pub struct Fabric {
    label: String,
    /// Shell files of the vendor that the job reads first.
    pub source: Vec<PathBuf>,
    env: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    schema: u32,
    #[serde(rename = "description")]
    _description: String,
    #[serde(default)]
    source: Vec<PathBuf>,
    #[serde(default)]
    env: BTreeMap<String, String>,
}

/// A fabric file by name or path.
///
/// # Errors
/// There is none, or it is not one.
pub fn find(name: &str, environment: &Environment) -> Outcome<Fabric> {
    let document = Document::find("fabric", name, "fabrics", BUILT_IN, environment)?;
    let File { schema, source, env, .. } = document.parse()?;
    if schema != 1 {
        return Err(Failure::msg(Exit::Usage, format!("{}: schema must be 1", document.label)));
    }
    Ok(Fabric { label: document.label, source, env })
}

/// What the job's environment gets where it has nothing: the preset, then the interface, then `fabric.env`, the last word.
pub(crate) fn variables(preset: Option<&Fabric>, settings: &Settings, cuda: bool) -> Vec<Variable> {
    let mut merged: BTreeMap<String, (String, String)> = BTreeMap::new();
    if cuda {
        merged.insert("NCCL_DEBUG".into(), ("WARN".into(), "<built-in>".into()));
    }
    if let Some(Fabric { label, env, .. }) = preset {
        merged.extend(env.iter().map(|(name, value)| (name.clone(), (value.clone(), label.clone()))));
    }
    if let (Some(name), Some(source), true) =
        (settings.text("fabric.interface"), settings.source("fabric.interface"), cuda)
    {
        merged.insert("NCCL_SOCKET_IFNAME".into(), (format!("={name}"), source.to_string()));
    }
    let own = settings.entries("fabric.env");
    merged.extend(own.map(|(name, value, source)| (name.into(), (value.into(), source.to_string()))));
    merged.into_iter().map(|(name, (value, source))| Variable { name, value, source }).collect()
}
