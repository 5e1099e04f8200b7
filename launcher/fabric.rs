//! Fabric files: settings of NCCL for a kind of network, as data.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use crate::cluster::{Site, Variable};
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

/// The settings of NCCL and its transports that a job has, each with its value and whether it is the run's own or was there before.
pub(crate) fn in_force(site: &Site, environment: &Environment) -> Option<String> {
    let is_own = |name: &str, value: &str| {
        let mut own = site.set.iter().chain(&site.fabric);
        own.any(|variable| variable.name == name && variable.value == value)
    };
    let settings: Vec<String> = network_variables(environment)
        .filter(|(name, _)| !site.secrets.iter().any(|secret| secret == name))
        .map(|(name, value)| format!("{name}={value}{}", if is_own(name, value) { "" } else { " (the node's own)" }))
        .collect();
    (!settings.is_empty()).then(|| format!("network settings: {}", settings.join(" ")))
}

/// Names of such settings in the submitting shell that the job does not get.
pub(crate) fn not_passed(site: &Site, environment: &Environment) -> Vec<String> {
    let names = network_variables(environment).map(|(name, _)| name);
    names.filter(|name| !site.pass.iter().any(|passed| passed == name)).map(str::to_owned).collect()
}

fn network_variables(environment: &Environment) -> impl Iterator<Item = (&str, &str)> {
    environment.iter().filter(|(name, _)| ["NCCL_", "FI_", "UCX_"].iter().any(|prefix| name.starts_with(prefix)))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::cluster::testing::site;

    #[test]
    fn what_a_node_sets_itself_is_told_apart() {
        let variables = [("NCCL_DEBUG", "WARN"), ("NCCL_IB_HCA", "mlx5_0"), ("HOME", "/root")];
        let environment = Environment::new(variables.map(|(name, value)| (name.into(), value.into())), "/");
        let own = Variable { name: "NCCL_DEBUG".into(), value: "WARN".into(), source: "<built-in>".into() };
        let site = Site { fabric: vec![own], pass: vec!["NCCL_DEBUG".into()], ..site() };
        let expected = "network settings: NCCL_DEBUG=WARN NCCL_IB_HCA=mlx5_0 (the node's own)";
        assert_eq!(in_force(&site, &environment).unwrap(), expected);
        assert_eq!(not_passed(&site, &environment), ["NCCL_IB_HCA"]);
        assert_eq!(in_force(&site, &Environment::default()), None);
    }
}
