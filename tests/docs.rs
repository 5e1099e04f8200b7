//! What the documentation shows is run, and what it links to is there.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::support::{nemotron, root};

/// All Markdown files that users and contributors read.
fn documents() -> Vec<PathBuf> {
    ["", "docs", "cluster-configs", "examples"]
        .iter()
        .filter_map(|folder| std::fs::read_dir(root().join(folder)).ok())
        .flatten()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect()
}

/// The commands of a document's `console` blocks: the lines that begin with a prompt.
fn commands(text: &str) -> Vec<String> {
    let blocks = text.split("```console\n").skip(1).map(|block| block.split("```").next().unwrap());
    blocks.flat_map(str::lines).filter_map(|line| line.strip_prefix("$ ")).map(String::from).collect()
}

/// Ends what a test leaves running, also when it fails.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_commands_of_the_readme_work() {
    let home = tempfile::tempdir().unwrap();
    for folder in ["examples", "tests"] {
        std::os::unix::fs::symlink(root().join(folder), home.path().join(folder)).unwrap();
    }
    let binary = nemotron(home.path()).get_program().to_owned();
    let text = std::fs::read_to_string(root().join("README.md")).unwrap();
    let commands = commands(&text);
    assert!(commands.len() > 10, "{commands:?}");
    for command in commands {
        if command == "scripts/test" {
            // This is what runs.
            continue;
        }
        let command = command.replace("cargo run --release -- ", "nemotron ");
        // `exec` makes the shell the command itself, so that ending it ends the command.
        let script = format!("nemotron() {{ exec \"$NEMOTRON\" \"$@\"; }}; {command}");
        let mut shell = Command::new("bash");
        let world = nemotron(home.path());
        shell.args(["-c", &script]).current_dir(home.path()).env("NEMOTRON", &binary);
        for (name, value) in world.get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        if command.contains(" serve ") {
            // Serves until it is ended: the line with its address is all that is waited for.
            let mut server = Running(shell.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
            let mut line = String::new();
            std::io::BufRead::read_line(&mut std::io::BufReader::new(server.0.stdout.take().unwrap()), &mut line)
                .unwrap();
            assert!(line.starts_with("http://"), "{command}: {line:?}");
            continue;
        }
        let output = shell.output().unwrap();
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{command}: {}\n{stdout}\n{stderr}", output.status);
    }
}

#[test]
fn links_lead_somewhere() {
    for document in documents() {
        let text = std::fs::read_to_string(&document).unwrap();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = target.split('#').next().unwrap();
            if path.is_empty() || path.contains("://") {
                continue;
            }
            let file = document.parent().unwrap_or(Path::new(".")).join(path);
            assert!(file.exists(), "{}: {target}", document.display());
        }
    }
}
