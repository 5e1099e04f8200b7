//! What the tests of the binary share.

pub(crate) mod python;
pub(crate) mod reward_model;
pub(crate) mod standin;
pub(crate) mod zero_model;

use std::path::Path;
use std::process::{Command, Output};

/// The binary in a world of its own: `home` is home, working directory and place of runs; nothing of the caller's settings leaks in.
pub(crate) fn nemotron(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nemotron"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("NEMOTRON_") {
            command.env_remove(name);
        }
    }
    command.current_dir(home).env("HOME", home).env("NEMOTRON_RUN_ROOT", home.join("runs"));
    command
}

/// Exit code, stdout and stderr of a command that is not expected to die from a signal.
pub(crate) fn finish(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().expect("the binary starts");
    let text = |bytes| String::from_utf8(bytes).expect("output is UTF-8");
    (status.code().expect("an exit code"), text(stdout), text(stderr))
}

/// The repository's root.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
