//! Stand-ins for NVIDIA's libraries: the whole engine runs through its CUDA backend on a machine without devices.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::{finish, root};

/// The folder with the libraries, compiled once for all tests of this process.
pub(crate) fn libraries() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("standin-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let run = |command: &mut Command| {
            let (code, _, stderr) = finish(command);
            assert_eq!(code, 0, "{stderr}");
        };
        let library = |name: &str| folder.join(name);
        let source = |name: &str| root().join("tests/standin").join(name);
        run(Command::new(root().join("kernels/emulation/build")).arg(library("libemulation.so")));
        for (name, from, needs) in [
            ("libcuda.so.1", "cuda.cpp", "libemulation.so"),
            ("libcublasLt.so.12", "cublaslt.cpp", "libcuda.so.1"),
            ("libnccl.so.2", "nccl.cpp", "libcuda.so.1"),
        ] {
            let mut compile = Command::new("g++");
            compile.args(["-std=c++20", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-pthread"]);
            compile.args(["-Wl,-rpath,$ORIGIN".into(), format!("-Wl,-soname,{name}")]).arg(source(from));
            run(compile.arg(library(needs)).arg("-o").arg(library(name)));
        }
        run(Command::new("cc")
            .args(["-shared", "-fPIC", "-w", "-o"])
            .arg(library("libnvidia-ml.so.1"))
            .arg(source("nvml.c")));
        folder
    })
}
