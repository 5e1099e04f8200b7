//! `compile-kernels --nvrtc LIB [--check]`: writes `cuda/args.h`, compiles the kernels for every target into `images/`, and reports registers
//! and shared memory; a kernel that spills registers fails. With `--check` nothing is written, and what is there must be what it
//! would be. NVRTC is that of the wheel nvidia-cuda-nvrtc-cu12 12.4.127; another version gives other images.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use nemotron_kernels::image::{HEADERS, SOURCE, TARGETS};
use nemotron_kernels::nvrtc::Nvrtc;
use nemotron_kernels::{c_header, ops};

type Error = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compile-kernels: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Error> {
    let (mut library, mut check) = ("libnvrtc.so.12".to_owned(), false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--nvrtc" => library = args.next().ok_or("--nvrtc needs the path of libnvrtc.so.12")?,
            "--check" => check = true,
            _ => return Err(format!("unknown argument {arg}; usage: compile-kernels [--nvrtc LIB] [--check]").into()),
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let header = c_header();
    keep(&root.join("cuda/args.h"), header.as_bytes(), check)?;
    // The header that is compiled in may be an older one.
    let headers: Vec<_> =
        HEADERS.iter().map(|(name, text)| (*name, if *name == "args.h" { &header } else { *text })).collect();

    let nvrtc = Nvrtc::load(&library).map_err(|error| format!("{error}: {}", describe(&error)))?;
    let (major, minor) = nvrtc.version();
    let mut spilling = Vec::new();
    for (target, file) in TARGETS {
        let image = nvrtc.compile(SOURCE, &headers, target)?;
        println!("{target}: {} bytes, NVRTC {major}.{minor}", image.bytes.len());
        let usages = usages(&image.log);
        if target.starts_with("sm_") && usages.len() != ops::KERNELS.len() {
            return Err(format!("{} kernels in {target}, {} in ops::KERNELS", usages.len(), ops::KERNELS.len()).into());
        }
        for usage in usages {
            println!("  {:<22} {}, {} bytes spilled", usage.kernel, usage.resources, usage.spilled);
            if usage.spilled > 0 {
                spilling.push(format!("{} on {target}", usage.kernel));
            }
        }
        keep(&root.join("images").join(file), &image.bytes, check)?;
    }
    if spilling.is_empty() { Ok(()) } else { Err(format!("registers are spilled: {}", spilling.join(", ")).into()) }
}

/// Writes a file if it differs; with `check`, a difference is an error.
fn keep(path: &Path, bytes: &[u8], check: bool) -> Result<(), Error> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    if check {
        return Err(format!(
            "{} is not what its sources give: run `cargo run --release -p nemotron-kernels --bin compile-kernels`",
            path.display()
        )
        .into());
    }
    fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()).into())
}

fn describe(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(String::new, |source| format!("{source}{}", describe(source)))
}

/// What the assembler says of one kernel.
struct Usage {
    kernel: String,
    resources: String,
    /// Bytes of spill stores and loads.
    spilled: u32,
}

fn usages(log: &str) -> Vec<Usage> {
    let mut usages: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            usages.push(Usage { kernel, resources: String::new(), spilled: 0 });
        } else if let Some(usage) = usages.last_mut() {
            if line.contains("bytes spill") {
                let spills = line.split(',').filter(|part| part.contains("spill"));
                usage.spilled +=
                    spills.filter_map(|part| part.split_whitespace().next()?.parse::<u32>().ok()).sum::<u32>();
            } else if let Some((_, resources)) = line.split_once("Used ") {
                usage.resources = resources.to_owned();
            }
        }
    }
    usages
}
