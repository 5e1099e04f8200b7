//! Profiles: the hardware a run is planned for, and how the model is laid out on it.

use crate::config_file::{self, Document};
use crate::env::Environment;
use crate::report::Outcome;

/// Name and text of the profiles in the binary.
pub const BUILT_IN: [(&str, &str); 7] = [
    ("h200x8", include_str!("../cluster-configs/profiles/h200x8.toml")),
    ("h100x16", include_str!("../cluster-configs/profiles/h100x16.toml")),
    ("a100x16", include_str!("../cluster-configs/profiles/a100x16.toml")),
    ("h200x1", include_str!("../cluster-configs/profiles/h200x1.toml")),
    ("h100x1", include_str!("../cluster-configs/profiles/h100x1.toml")),
    ("a100x1", include_str!("../cluster-configs/profiles/a100x1.toml")),
    ("cpu", include_str!("../cluster-configs/profiles/cpu.toml")),
];

/// A profile by name or path.
///
/// # Errors
/// There is none, or it cannot be read.
pub fn find(name: &str, environment: &Environment) -> Outcome<Document> {
    Document::find("profile", name, "profiles", &BUILT_IN, environment)
}

/// Names of all profiles, sorted.
pub fn names(environment: &Environment) -> Vec<String> {
    config_file::names("profiles", &BUILT_IN, environment)
}
