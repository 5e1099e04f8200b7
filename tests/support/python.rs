//! Software of others that tests are held against, from PyPI.

use std::path::PathBuf;
use std::process::Command;

use super::root;

/// The Python of an environment in `target/` that has `packages`, made if it cannot import `modules` yet.
pub(crate) fn environment(name: &str, modules: &str, packages: &[&str]) -> Option<PathBuf> {
    let home = root().join("target").join(name);
    let python = home.join("bin/python");
    let run = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
    let usable = || run(Command::new(&python).args(["-c", &format!("import {modules}")]));
    let pip = ["-m", "pip", "install", "-q", "--no-compile"];
    let make = || {
        run(Command::new("timeout").args(["120", "python3", "-m", "venv"]).arg(&home))
            && run(Command::new("timeout").arg("120").arg(&python).args(pip).args(packages))
    };
    let made = usable() || make() && usable();
    if !made {
        println!("skipped: no Python with {modules}, and it cannot be made");
    }
    made.then_some(python)
}
