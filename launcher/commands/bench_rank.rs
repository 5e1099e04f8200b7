//! `nemotron bench rank`: one rank's part of a large model alone on one device, beside the device's own limits measured in the same run.

use std::collections::BTreeMap;
use std::time::Duration;

use nemotron_engine::collective::alone::NcclAlone;
use nemotron_engine::config::{Mesh, ModelConfig};
use nemotron_engine::rank::Device;
use nemotron_engine::rank_bench::{BenchSpec, Ceilings, RankBench};
use serde::Serialize;

use crate::cli::BenchRankArgs;
use crate::env::{Environment, library_folders};
use crate::hardware::hardware;
use crate::host::Host;
use crate::model::Model;
use crate::report::{Exit, Failure, Outcome, print_json, print_line};
use crate::settings::{Selection, Settings};

#[derive(Serialize)]
struct Measurement {
    schema: u32,
    model: String,
    mesh: Mesh,
    stage: usize,
    /// Layers that were measured; all of the stage if none were left out.
    layers: usize,
    context: usize,
    /// Measured on this device.
    ceilings: Ceilings,
    nccl: Nccl,
    /// By the number of rows.
    decode: BTreeMap<usize, Step>,
    /// By the length of the prompt.
    prefill: BTreeMap<usize, Step>,
}

/// NCCL with one rank.
#[derive(Serialize)]
#[serde(untagged)]
enum Nccl {
    Works(NcclAlone),
    Fails { error: String },
}

#[derive(Serialize)]
struct Step {
    ms: f64,
    tokens_per_s: f64,
    /// Weights and keys and values read, in GB; of a prompt, operations with weights, in TFLOP.
    work: f64,
    /// Of the measured copy bandwidth, or of the measured product.
    share: f64,
    /// What the step would take at that ceiling.
    roofline_ms: f64,
}

impl Step {
    fn new(time: Duration, tokens: usize, work: f64, ceiling: f64) -> Self {
        let seconds = time.as_secs_f64();
        let share = work / ceiling / seconds;
        Self {
            ms: seconds * 1e3,
            tokens_per_s: tokens as f64 / seconds,
            work,
            share,
            roofline_ms: work / ceiling * 1e3,
        }
    }
}

pub(crate) fn run(args: &BenchRankArgs) -> Outcome {
    let environment = Environment::of_process();
    let selection = Selection { engine: Some(&args.engine), ..Selection::default() };
    let settings = Settings::resolve(&selection, &environment)?;
    let (model, mut config) = Model::of_settings(&settings, &environment)?.describe()?;
    let (mesh, hardware) = hardware(&settings, &Host::probe()?)?;
    mesh.check(&config)?;
    if hardware.device != Device::Cuda {
        return Err(Failure::msg(Exit::Usage, "bench rank measures a CUDA device").hint("--profile h100x16"));
    }
    if args.stage >= mesh.pp {
        let message = format!("there is no stage {}: the layout has {}", args.stage, mesh.pp);
        return Err(Failure::msg(Exit::Usage, message));
    }
    let rank = args.stage * mesh.tp;
    if let Some(layers) = args.layers {
        // A shorter stage of the same shapes; the first and the last keep their embedding and head.
        let layers = layers.get().min(config.num_layers / mesh.pp);
        config.num_layers = layers * mesh.pp;
        mesh.check(&config)?;
    }
    let layers = mesh.layers(rank, &config).len();
    let spec = BenchSpec {
        config: config.clone(),
        mesh,
        rank,
        ordinal: 0,
        library_folders: library_folders(&environment),
        context: args.context,
        max_batch: args.batches.iter().copied().max().unwrap_or(1),
        max_prompt: args.prompt_tokens.iter().copied().max().unwrap_or(1),
    };
    let mut bench = RankBench::load(spec)?;
    let ceilings = bench.ceilings();
    let fails = |error| Nccl::Fails { error: format!("{:#}", anyhow::Error::from(error)) };
    let nccl = bench.nccl().map_or_else(fails, Nccl::Works);
    let sizes = Sizes::new(&config, mesh, rank, layers);
    let mut decode = BTreeMap::new();
    for &rows in &args.batches {
        let gigabytes = (sizes.weight_bytes + sizes.kv_bytes * (rows * args.context) as f64) / 1e9;
        decode.insert(rows, Step::new(bench.decode(rows)?, rows, gigabytes, ceilings.copy_gb_s));
    }
    let mut prefill = BTreeMap::new();
    for &tokens in &args.prompt_tokens {
        let teraflop = 2.0 * sizes.layer_parameters * tokens as f64 / 1e12;
        prefill.insert(tokens, Step::new(bench.prefill(tokens)?, tokens, teraflop, ceilings.matmul_tflops));
    }
    let (stage, context) = (args.stage, args.context);
    let measured = Measurement { schema: 1, model, mesh, stage, layers, context, ceilings, nccl, decode, prefill };
    if args.json {
        print_json(&measured)?
    } else {
        print(&measured)?
    };
    Ok(())
}

/// What a step reads and computes on this rank.
struct Sizes {
    /// Weights of products, head included where the rank has it.
    weight_bytes: f64,
    /// Of one position, all layers.
    kv_bytes: f64,
    layer_parameters: f64,
}

impl Sizes {
    fn new(config: &ModelConfig, mesh: Mesh, rank: usize, layers: usize) -> Self {
        let [hidden, ffn, vocab] = [config.hidden_size, config.ffn_size, config.vocab_size].map(|size| size as f64);
        let heads = (config.num_heads * config.head_dim) as f64;
        let tp = mesh.tp as f64;
        let layer_parameters = layers as f64 * hidden * (config.qkv_size() as f64 + heads + 2.0 * ffn) / tp;
        let head = if mesh.stage(rank) + 1 == mesh.pp { hidden * vocab / tp } else { 0.0 };
        let kv_bytes = 2.0 * 2.0 * (layers * config.num_kv_heads * config.head_dim) as f64 / tp;
        Self { weight_bytes: 2.0 * (layer_parameters + head), kv_bytes, layer_parameters }
    }
}

/// Whether somebody still reads.
fn print(measured: &Measurement) -> Outcome<bool> {
    let Measurement { model, mesh, stage, layers, context, ceilings, nccl, decode, prefill, .. } = measured;
    let mut lines =
        vec![format!("{model}, TP{} x PP{}, stage {stage}, {layers} layers, context {context}", mesh.tp, mesh.pp)];
    let Ceilings { copy_gb_s, matmul_tflops } = ceilings;
    lines.push(format!("this device: {copy_gb_s:.0} GB/s copied, {matmul_tflops:.0} TFLOP/s in a large product"));
    lines.push(match nccl {
        Nccl::Works(NcclAlone { version, recorded_us }) => {
            format!("NCCL {version} works with one rank: {recorded_us:.0} µs a gather and a transfer")
        }
        Nccl::Fails { error } => format!("NCCL does not work with one rank: {error}"),
    });
    for (kind, unit, steps) in [("decode", "of the copy", decode), ("prefill", "of the product", prefill)] {
        for (size, step) in steps {
            let Step { ms, tokens_per_s, share, roofline_ms, .. } = step;
            let share = 100.0 * share;
            lines.push(format!(
                "{kind:8} {size:5} {ms:9.2} ms {tokens_per_s:9.0} tokens/s, {share:3.0} % {unit} (roofline {roofline_ms:.2} ms)"
            ));
        }
    }
    print_line(lines.join("\n"))
}
