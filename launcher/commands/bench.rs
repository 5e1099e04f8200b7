//! `nemotron bench`: the engine alone, without HTTP, beside the machine's own limits measured in the same run.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use nemotron_engine::backend::ComputeType;
use nemotron_engine::backend::cpu::CpuBackend;
use nemotron_engine::config::{Mesh, ModelConfig};
use nemotron_engine::engine::{Engine, Row};
use nemotron_engine::rank::{self, Device, EngineError, Limits, Rank, RankSpec};
use nemotron_engine::report::{Phase, Reporter};
use nemotron_engine::request::{Event, LogprobSpec, Request, RowError, Sampling, Stopping};
use nemotron_engine::scheduler::PROMPT_SHARE_BESIDE_DECODES;
use nix::sys::resource::{UsageWho, getrusage};
use serde::Serialize;

use crate::cli::BenchArgs;
use crate::env::Environment;
use crate::host::Host;
use crate::model::Model;
use crate::report::{Exit, Failure, Outcome, print_json, print_line};

/// Prompt of every row whose decoding is measured.
const DECODE_PROMPT: u32 = 128;
const MAX_STEP_TOKENS: usize = 512;
/// Tokens of prompts in a step while other rows decode.
const PROMPT_CHUNK: u32 = (MAX_STEP_TOKENS / PROMPT_SHARE_BESIDE_DECODES) as u32;
const PAGE_TOKENS: usize = 16;
/// The best of this many runs is taken.
const RUNS: usize = 3;

#[derive(Serialize)]
struct Measurement {
    schema: u32,
    model: String,
    dtype: ComputeType,
    threads: usize,
    /// From the start of this command until a token was decoded.
    start_to_ready_s: f64,
    /// Of that, from opening the checkpoint on.
    load_s: f64,
    /// Tokens/s of one prompt, by its length.
    prefill: BTreeMap<u32, f64>,
    /// Tokens/s of all rows together, by their number.
    decode: BTreeMap<u32, f64>,
    /// Largest resident memory before the ceilings were measured, mapped weights included.
    rss_mb: f64,
    ceilings: Ceilings,
}

#[derive(Serialize)]
struct Ceilings {
    read_gb_s: f64,
    peak_gflop_s: f64,
    /// Share of the read bandwidth that decoding one row reaches, counting two bytes a weight once. In memory most take a byte and a half, so it
    /// may be more than all.
    decode_b1_of_read: Option<f64>,
    /// Share of the arithmetic peak of each prefill, counting products with weights.
    prefill_of_peak: BTreeMap<u32, f64>,
}

struct Silent;

impl Reporter for Silent {
    fn phase(&self, _: Phase) {}
    fn progress(&self, _: f64) {}
    fn steps(&self, _: u64) {}
}

pub(crate) fn run(args: &BenchArgs) -> Outcome {
    let start = Instant::now();
    let name = args.model.as_ref().or(args.model_argument.as_ref()).map_or("builtin", String::as_str);
    let Model::Source(model) = Model::find(name, &Environment::of_process())? else {
        return Err(Failure::msg(Exit::Checkpoint, format!("{name} is an architecture, not a checkpoint")));
    };
    let dtype = if args.dtype == "f32" { ComputeType::F32 } else { ComputeType::Bf16 };
    let threads = match args.threads {
        Some(threads) => threads.get(),
        None => Host::probe()?.cores,
    };
    let rows = args.batches.iter().copied().max().unwrap_or(1) as usize;
    let longest_prompt = args.prompt_tokens.iter().copied().max().unwrap_or(1) as usize;
    // The first rows decode while the others' prompts come in; half of that on average.
    let early_steps = rows * DECODE_PROMPT as usize / PROMPT_CHUNK as usize;
    let row_tokens = (DECODE_PROMPT + args.new_tokens) as usize + early_steps + 2;
    let kv_tokens = (rows * (row_tokens - early_steps / 2 + PAGE_TOKENS)).max(longest_prompt + PAGE_TOKENS);
    let limits = Limits {
        page_tokens: PAGE_TOKENS,
        num_pages: kv_tokens.div_ceil(PAGE_TOKENS),
        max_step_tokens: MAX_STEP_TOKENS,
        max_sequences: rows,
    };
    let mesh = Mesh { tp: 1, pp: 1 };
    let spec = RankSpec {
        rank: 0,
        mesh,
        model,
        device: Device::Cpu,
        dtype,
        threads,
        limits,
        device_ordinal: 0,
        library_folders: Vec::new(),
    };
    let loading = Instant::now();
    let Rank::Leader(engine) = rank::start(&spec, None, Arc::new(Silent))? else {
        return Err(Failure::msg(Exit::Internal, "rank 0 leads"));
    };
    let (start_to_ready_s, load_s) = (start.elapsed().as_secs_f64(), loading.elapsed().as_secs_f64());
    let bench = Bench { engine: &engine, num_prompts: Cell::new(0) };

    let mut prefill = BTreeMap::new();
    for tokens in args.prompt_tokens.iter().copied().filter(|tokens| bench.fits(*tokens + 1)) {
        prefill.insert(tokens, best(|| bench.prefill(tokens))?);
    }
    let mut decode = BTreeMap::new();
    for rows in args.batches.iter().copied().filter(|_| bench.fits(row_tokens as u32)) {
        decode.insert(rows, best(|| bench.decode(rows, args.new_tokens))?);
    }
    let usage = getrusage(UsageWho::RUSAGE_SELF).map_err(anyhow::Error::new)?;
    let rss_mb = usage.max_rss() as f64 / 1024.0;

    let config = &engine.info().config;
    let backend = CpuBackend::new(threads, dtype).map_err(EngineError::from)?;
    let (read, peak) = (backend.read_bandwidth().map_err(EngineError::from)?, backend.peak_flops());
    let step_bytes = 2.0 * product_parameters(config);
    let ceilings = Ceilings {
        read_gb_s: read / 1e9,
        peak_gflop_s: peak / 1e9,
        decode_b1_of_read: decode.get(&1).map(|rate| rate * step_bytes / read),
        prefill_of_peak: prefill.iter().map(|(n, rate)| (*n, rate * prefill_flops(config) / peak)).collect(),
    };
    let model = engine.info().model_name.clone();
    let measured =
        Measurement { schema: 1, model, dtype, threads, start_to_ready_s, load_s, prefill, decode, rss_mb, ceilings };
    if args.json {
        print_json(&measured)?;
    } else {
        print(&measured)?;
    }
    Ok(())
}

/// Weights that a decode step multiplies with: all but the embedding's rows and the norms.
fn product_parameters(config: &ModelConfig) -> f64 {
    let vocab = (config.vocab_size * config.hidden_size) as f64;
    config.num_parameters() as f64 - vocab - ((4 * config.num_layers + 2) * config.hidden_size) as f64
}

/// Operations with weights per prompt token; the head is computed for the last one alone.
fn prefill_flops(config: &ModelConfig) -> f64 {
    2.0 * (product_parameters(config) - (config.vocab_size * config.hidden_size) as f64)
}

fn best(mut measure: impl FnMut() -> Outcome<f64>) -> Outcome<f64> {
    let mut best: f64 = 0.0;
    for _ in 0..RUNS {
        best = best.max(measure()?);
    }
    Ok(best)
}

struct Bench<'a> {
    engine: &'a Engine,
    /// No prompt begins like an earlier one, whose keys and values may still be there.
    num_prompts: Cell<u64>,
}

impl Bench<'_> {
    fn fits(&self, tokens: u32) -> bool {
        tokens as usize <= self.engine.info().max_context
    }

    /// A row of arbitrary ids that nothing but its length ends.
    fn submit(&self, prompt_tokens: u32, max_new_tokens: u32) -> Outcome<Row> {
        let ids = self.engine.info().vocab_size as u64 - 20;
        let prompt = self.num_prompts.replace(self.num_prompts.get() + 1);
        let id = |i| 20 + ((prompt * 7919 + u64::from(i) * 104_729) % ids) as u32;
        let request = Request {
            prompt: (0..prompt_tokens).map(id).collect(),
            sampling: Sampling::default(),
            stopping: Stopping { max_new_tokens, ..Stopping::default() },
            logprobs: LogprobSpec::default(),
        };
        self.engine.submit(request).map_err(failed)
    }

    /// Tokens/s of one prompt, until its first token is there.
    fn prefill(&self, tokens: u32) -> Outcome<f64> {
        let start = Instant::now();
        next(&mut self.submit(tokens, 1)?)?;
        Ok(f64::from(tokens) / start.elapsed().as_secs_f64())
    }

    /// Tokens/s of `rows` rows together over `steps` steps, from the last one's first token on.
    fn decode(&self, rows: u32, steps: u32) -> Outcome<f64> {
        let new_tokens = steps + rows * DECODE_PROMPT / PROMPT_CHUNK + 1;
        let rows: Outcome<Vec<Row>> = (0..rows).map(|_| self.submit(DECODE_PROMPT, new_tokens)).collect();
        let mut rows = rows?;
        for row in &mut rows {
            next(row)?;
        }
        let (start, before) = (Instant::now(), self.engine.stats().generated_tokens);
        let last = rows.len() - 1;
        for _ in 0..steps {
            next(&mut rows[last])?;
        }
        Ok((self.engine.stats().generated_tokens - before) as f64 / start.elapsed().as_secs_f64())
    }
}

/// Waits for the row's next event; false when it was the last one.
fn next(row: &mut Row) -> Outcome<bool> {
    match row.events.blocking_recv() {
        Some(Event::Failed(error)) => Err(failed(error)),
        Some(Event::Finished(_)) | None => Ok(false),
        Some(_) => Ok(true),
    }
}

fn failed(error: RowError) -> Failure {
    Failure::new(Exit::Internal, anyhow::Error::new(error).context("a measured row failed"))
}

fn print(measured: &Measurement) -> Outcome {
    let Measurement { model, dtype, threads, start_to_ready_s, load_s, prefill, decode, rss_mb, ceilings, .. } =
        measured;
    let dtype = if *dtype == ComputeType::F32 { "f32" } else { "bf16" };
    let mut lines = vec![format!("{model}, {dtype}, {threads} threads")];
    lines.push(format!("ready in {start_to_ready_s:.3} s (load {load_s:.3} s), {rss_mb:.0} MB resident"));
    for (tokens, rate) in prefill {
        let share = ceilings.prefill_of_peak.get(tokens).copied().unwrap_or_default();
        lines.push(format!("prefill {tokens:5} {rate:10.1} tokens/s, {:3.0} % of the arithmetic peak", 100.0 * share));
    }
    for (rows, rate) in decode {
        lines.push(format!("decode  {rows:5} {rate:10.1} tokens/s"));
    }
    if let Some(share) = ceilings.decode_b1_of_read {
        lines.push(format!(
            "one row decodes at {:.0} % of the memory's read bandwidth, at two bytes a weight",
            100.0 * share
        ));
    }
    lines.push(format!("this machine: {:.1} GB/s read, {:.0} GFLOP/s", ceilings.read_gb_s, ceilings.peak_gflop_s));
    for line in lines {
        if !print_line(line)? {
            break;
        }
    }
    Ok(())
}
