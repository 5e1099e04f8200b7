//! Rules of the tree that no compiler checks: who may use whom, where `unsafe` is allowed, which licences come in.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::support::root;

/// Rows of each package from the bottom up: a file may use modules of its own row's level or below.
const ENGINE_ROWS: &[&[&str]] = &[
    &["config", "request", "reward", "report", "wire", "error_chain"],
    &["tokenizer", "kv_cache", "step"],
    &["checkpoint", "chat", "spec", "backend"],
    &["collective", "mesh", "sequence", "sampler"],
    &["model", "memory", "runner", "scheduler", "engine", "rank", "rank_bench"],
    &["job", "serve", "end_strings"],
];

/// The only files with `unsafe`: SIMD, threads, maps, shared memory, the run-time loading of a device's libraries, and a test's allocator.
const UNSAFE_ALLOWED: &[&str] = &[
    "engine/src/backend/cpu/",
    "engine/src/backend/cuda/",
    "engine/src/checkpoint/",
    "engine/src/collective/nccl.rs",
    "engine/src/collective/shm.rs",
    "engine/tests/steady_state/",
    "kernels/src/",
    "kernels/tests/emulation/device.rs",
];

fn sources(folders: &[&str]) -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    let mut folders: Vec<PathBuf> = folders.iter().map(|folder| root().join(folder)).collect();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                files.push((path.strip_prefix(root()).unwrap().to_owned(), text));
            }
        }
    }
    files
}

/// The text before the first test module.
fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]").next().unwrap_or(text)
}

fn module(path: &Path) -> String {
    let inside = path.strip_prefix("engine/src").unwrap();
    inside.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs").to_owned()
}

#[test]
fn engine_modules_use_only_what_stands_below() {
    let row = |module: &str| ENGINE_ROWS.iter().position(|row| row.contains(&module));
    let mut wrong = BTreeSet::new();
    for (path, text) in sources(&["engine/src"]) {
        let user = module(&path);
        if user == "lib" {
            continue;
        }
        let own =
            row(&user).unwrap_or_else(|| panic!("{user} stands in no row of the engine; give it one in tests/tidy.rs"));
        for used in without_tests(&text).split("use crate::").skip(1) {
            let used: String = used.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if row(&used).is_some_and(|used| used > own) {
                wrong.insert(format!("{}: uses {used}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_engine_knows_no_slurm_no_terminal_no_environment() {
    for (path, text) in sources(&["engine/src", "kernels/src"]) {
        let text = without_tests(&text);
        for word in ["SLURM", "env::var", "home_dir", "println!", "stdin()", "is_terminal"] {
            assert!(!text.contains(word), "{}: {word}", path.display());
        }
    }
}

#[test]
fn unsafe_stands_where_it_may_and_says_why() {
    for (path, text) in sources(&["engine", "kernels", "launcher", "tests"]) {
        let allowed = UNSAFE_ALLOWED.iter().any(|allowed| path.starts_with(allowed.trim_end_matches('/')));
        let blocks = text.matches(concat!("unsafe", " {")).count();
        assert!(blocks == 0 || allowed, "{}: {blocks} unsafe blocks", path.display());
    }
}

#[test]
fn every_dependency_has_a_licence_that_suits_ours_and_is_used() {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--locked",
            "--offline",
            "--filter-platform",
            "x86_64-unknown-linux-gnu",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let allowed = [
        "MIT",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "ISC",
        "Zlib",
        "Unicode-3.0",
        "CC0-1.0",
        "0BSD",
        "Unlicense",
        "MIT-0",
        "BSL-1.0",
    ];
    for package in metadata["packages"].as_array().unwrap() {
        let licence = package["license"].as_str().unwrap_or("none");
        // Every alternative of an OR is enough; every part of an AND must do.
        let fits = licence.replace('/', " OR ").replace(['(', ')'], "").split(" OR ").any(|alternative| {
            alternative.split(" AND ").all(|part| allowed.contains(&part.split(" WITH ").next().unwrap().trim()))
        });
        assert!(fits, "{}: licence {licence}", package["name"]);
    }
    let text: String = sources(&["engine", "kernels", "launcher", "tests"]).into_iter().map(|(_, text)| text).collect();
    for package in metadata["packages"].as_array().unwrap().iter().filter(|package| package["source"].is_null()) {
        for dependency in package["dependencies"].as_array().unwrap() {
            let name = dependency["name"].as_str().unwrap().replace('-', "_");
            assert!(text.contains(&format!("{name}::")), "{} does not use its dependency {name}", package["name"]);
        }
    }
}

#[test]
fn files_are_short_enough_to_be_read() {
    for (path, text) in sources(&["engine", "kernels", "launcher"]) {
        let lines = text.lines().count();
        assert!(lines <= 700, "{}: {lines} lines; is there a second noun inside?", path.display());
    }
}
