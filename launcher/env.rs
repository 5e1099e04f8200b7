//! Names of the environment variables that are not configuration keys. Every key `a.b` of [`crate::resolve`] has `NEMOTRON_A_B`, or
//! `NEMOTRON_` and its short name.

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
/// Attempt that a worker belongs to.
pub const ATTEMPT: &str = "NEMOTRON_ATTEMPT";
