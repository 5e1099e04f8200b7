//! What the process inherits: variables, home and working directory. Nothing else in the launcher's resolution reads them.
//!
//! The constants are the variables that are no configuration keys; each key has its own, see [`crate::keys::Key::variable`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// When to use colours.
pub const COLOR: &str = "NEMOTRON_COLOR";
/// Filter of the log on stderr, such as `nemotron=debug`; overrides `-v` and `-q`.
pub const LOG: &str = "NEMOTRON_LOG";
/// Folder with profiles and cluster files, searched first.
pub const CONFIG_DIR: &str = "NEMOTRON_CONFIG_DIR";
/// Folder that holds the runs.
pub const RUN_ROOT: &str = "NEMOTRON_RUN_ROOT";
/// Server that `generate` asks.
pub const URL: &str = "NEMOTRON_URL";
/// File that holds the token of a server.
pub const TOKEN_FILE: &str = "NEMOTRON_TOKEN_FILE";
/// How long `generate` waits.
pub const TIMEOUT: &str = "NEMOTRON_TIMEOUT";
/// Rank of a worker.
pub const RANK: &str = "NEMOTRON_RANK";
/// Which devices CUDA shows to a process, and in which order.
pub const VISIBLE_DEVICES: &str = "CUDA_VISIBLE_DEVICES";
/// Attempt that a worker belongs to.
pub const ATTEMPT: &str = "NEMOTRON_ATTEMPT";
/// Addresses at which the supervisor of a worker may be reached, separated by commas.
pub const SUPERVISOR: &str = "NEMOTRON_SUPERVISOR";

/// Folders with cuBLASLt and NCCL, separated by colons; searched first.
pub const CUDA_LIBS: &str = "NEMOTRON_CUDA_LIBS";

/// Where CUDA's libraries are looked for before the loader's own places: where the user says, and where modules and containers say.
pub(crate) fn library_folders(environment: &Environment) -> Vec<PathBuf> {
    let told = environment.get(CUDA_LIBS).into_iter().flat_map(std::env::split_paths);
    let homes = ["NCCL_HOME", "CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(|name| environment.get(name));
    let homes = homes.chain(["/usr/local/cuda"]).flat_map(|home| ["lib64", "lib"].map(|lib| Path::new(home).join(lib)));
    told.chain(homes).chain([PathBuf::from("/usr/local/nvidia/lib64")]).collect()
}

/// A list as the value of a variable.
pub(crate) fn join<T: ToString>(items: &[T]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// A snapshot of the surroundings; tests make their own.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    variables: BTreeMap<String, String>,
    /// Relative paths start here.
    pub directory: PathBuf,
}

impl Environment {
    pub fn new(variables: impl IntoIterator<Item = (String, String)>, directory: impl Into<PathBuf>) -> Self {
        Self { variables: variables.into_iter().collect(), directory: directory.into() }
    }

    /// Of this process. Variables that are not Unicode count as absent.
    pub fn of_process() -> Self {
        let variables =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Self::new(variables, std::env::current_dir().unwrap_or_default())
    }

    /// A variable; an empty one counts as absent.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// All variables, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.variables.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// An absolute path for `path`, which may start with `~/` and else is relative to `base`.
    pub fn absolute(&self, path: &str, base: &Path) -> PathBuf {
        match (path.strip_prefix("~/"), self.get("HOME")) {
            (Some(rest), Some(home)) => Path::new(home).join(rest),
            _ => base.join(path),
        }
    }

    /// Folders with profiles and cluster files, first come first served.
    pub fn config_dirs(&self) -> Vec<PathBuf> {
        let own = self.get(CONFIG_DIR).map(|dir| self.absolute(dir, &self.directory));
        let here = self.directory.join("cluster-configs");
        let home = self.get("HOME").map(|home| Path::new(home).join(".config/nemotron"));
        own.into_iter().chain([here]).chain(home).collect()
    }
}
