//! Cluster files: what is particular to a site.

use crate::config_file::Document;
use crate::env::Environment;
use crate::report::Outcome;

/// The cluster that is this machine, without a scheduler.
pub const LOCAL: &str = "local";

/// Name and text of the cluster files in the binary.
pub const BUILT_IN: [(&str, &str); 1] = [(LOCAL, include_str!("../cluster-configs/local.toml"))];

/// A cluster file by name or path.
///
/// # Errors
/// There is none, or it cannot be read.
pub fn find(name: &str, environment: &Environment) -> Outcome<Document> {
    Document::find("cluster", name, "", &BUILT_IN, environment)
}
