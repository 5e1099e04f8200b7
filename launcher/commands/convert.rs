//! `nemotron convert`: a checkpoint in another format.

use std::io::IsTerminal as _;
use std::sync::Mutex;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use nemotron_engine::checkpoint::{self, ConvertError, Target};
use nemotron_engine::config::Mesh;
use serde::Serialize;

use crate::cli::{ConvertArgs, ConvertTo};
use crate::env::Environment;
use crate::model::Model;
use crate::report::{Exit, Failure, Outcome, print_json, print_line};

const GB: u64 = 1_000_000_000;

#[derive(Serialize)]
struct Report {
    schema: u32,
    output: std::path::PathBuf,
    files: usize,
    /// Files that an earlier call had completed.
    kept: usize,
    bytes: u64,
    seconds: f64,
}

pub(crate) fn run(args: &ConvertArgs) -> Outcome {
    let environment = Environment::of_process();
    let source = Model::find(&args.model, &environment)?.weights()?;
    let target = match args.to {
        ConvertTo::Hf => Target::HuggingFace { shard_bytes: args.shard_gb.get() * GB },
        ConvertTo::Shards => Target::Shards(Mesh { tp: args.tp.get(), pp: args.pp.get() }),
    };
    let checkpoint = checkpoint::open(&source)?;
    let start = Instant::now();
    let bar = Mutex::new(bar());
    let progress = |done, total| {
        if let Ok(Some(bar)) = bar.lock().as_deref() {
            bar.set_length(total);
            bar.set_position(done);
        }
    };
    let done = checkpoint::convert(&*checkpoint, target, &args.output, &progress).map_err(failure)?;
    if let Ok(Some(bar)) = bar.lock().as_deref() {
        bar.finish_and_clear();
    }
    let seconds = start.elapsed().as_secs_f64();
    let checkpoint::Conversion { files, kept, bytes } = done;
    if args.json {
        let output = args.output.clone();
        return print_json(&Report { schema: 1, output, files, kept, bytes, seconds }).map(drop);
    }
    let kept = if kept > 0 { format!(", {kept} of an earlier call kept") } else { String::new() };
    let rate = bytes as f64 / 1e9 / seconds;
    print_line(format!(
        "{}: {files} files{kept}, {bytes} bytes in {seconds:.1} s ({rate:.2} GB/s), verified",
        args.output.display()
    ))
    .map(drop)
}

fn bar() -> Option<ProgressBar> {
    if !std::io::stderr().is_terminal() {
        return None;
    }
    let style = ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    Some(ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
}

fn failure(error: ConvertError) -> Failure {
    match error {
        ConvertError::Source(error) => error.into(),
        ConvertError::Mesh(error) => error.into(),
        ConvertError::Occupied { .. } => {
            Failure::new(Exit::Preflight, error).hint("name a directory that is empty or not there yet")
        }
        ConvertError::Write { .. } | ConvertError::ReadBack { .. } => {
            Failure::new(Exit::OutputStorage, error).hint("the same command goes on with the files that are complete")
        }
    }
}
