//! Does a model fit, how large can the KV cache be, how fast can it be at best. Arithmetic only.

use std::cmp::Reverse;

use nemotron_engine::backend::ComputeType;
use nemotron_engine::config::{Mesh, ModelConfig};
use nemotron_engine::memory::{RankMemory, cuda_overhead, rank_memory};
use nemotron_engine::rank::{Device, Limits};
use serde::Serialize;

use crate::config_file::Document;
use crate::env::Environment;
use crate::hardware::{GIB, Hardware, hardware};
use crate::host::Host;
use crate::profile;
use crate::report::{Exit, Failure, Outcome};
use crate::settings::Settings;

/// Share of a CPU rank's memory that its KV cache may take: the machine is not ours alone.
const CPU_KV_SHARE: f64 = 0.4;
/// Batches that decoding is estimated for.
const BATCHES: [usize; 4] = [1, 8, 32, 128];

/// A model to plan for.
#[derive(Clone, Copy, Debug)]
pub struct Model<'a> {
    pub name: &'a str,
    pub config: &'a ModelConfig,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RankPlan {
    pub rank: usize,
    pub stage: usize,
    pub memory_bytes: u64,
    pub weights_bytes: u64,
    pub activations_bytes: u64,
    pub logits_bytes: u64,
    /// What kernels, libraries, collectives and the driver work in.
    pub overhead_bytes: u64,
    pub kv_bytes_per_token: u64,
    /// Left for the KV cache.
    pub kv_bytes: u64,
    /// Tokens whose keys and values fit into that.
    pub kv_tokens: usize,
}

/// The most tokens/s that memory bandwidth and arithmetic allow, communication not counted.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Roofline {
    pub batch: usize,
    /// Tokens before the decoded one.
    pub context: usize,
    /// Of all sequences together.
    pub tokens_per_second: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    pub schema: u32,
    pub profile: String,
    pub model: String,
    pub parameters: u64,
    pub mesh: Mesh,
    pub device: Device,
    pub hardware: Hardware,
    pub dtype: ComputeType,
    pub limits: Limits,
    pub ranks: Vec<RankPlan>,
    /// Tokens that the KV cache holds: whole pages of the rank with the least room.
    pub kv_tokens: usize,
    /// Tokens that prompt and completion may have together.
    pub context: usize,
    /// Sequences of that length that fit at the same time.
    pub sequences_at_context: usize,
    /// Bytes of weights that the host with the most reads.
    pub load_bytes_per_node: u64,
    pub load_seconds: f64,
    pub decode: Vec<Roofline>,
    pub fits: bool,
    /// Why not.
    pub shortfall: Option<String>,
}

impl Plan {
    /// # Errors
    /// The model cannot be split like that. That it does not fit is no error here but [`Plan::fits`].
    pub fn new(model: Model<'_>, settings: &Settings, host: &Host) -> Outcome<Self> {
        let config = model.config;
        let (mesh, hardware) = hardware(settings, host)?;
        mesh.check(config)?;
        let dtype = match settings.text("dtype") {
            Some("f32") => ComputeType::F32,
            _ => ComputeType::Bf16,
        };
        if (hardware.device, dtype) == (Device::Cuda, ComputeType::F32) {
            let message = "dtype f32: CUDA devices compute in bf16 only";
            return Err(Failure::msg(Exit::Usage, message).hint("--dtype bf16, or a profile of cpu"));
        }
        let page_tokens = settings.count("limits.page_tokens").unwrap_or(16);
        let max_step_tokens = settings.count("limits.max_step_tokens").unwrap_or(512);
        let max_sequences = settings.count("limits.max_sequences").unwrap_or(256);
        let limits = Limits { page_tokens, num_pages: 0, max_step_tokens, max_sequences };
        let ranks: Vec<RankPlan> = (0..mesh.world_size())
            .map(|rank| {
                let memory = rank_memory(config, mesh, rank, dtype, hardware.device, &limits);
                rank_plan(rank, mesh, &memory, &hardware)
            })
            .collect();
        let context = config.max_context;
        let room = ranks.iter().map(|rank| rank.kv_tokens).min().unwrap_or(0);
        let wanted = settings.count("limits.kv_tokens");
        // A device is ours alone and filled; a CPU cache that holds more than this is never used.
        let useful = if hardware.device == Device::Cpu { (64 * context).max(128 * 4096) } else { usize::MAX };
        let num_pages = wanted.map_or(room.min(useful) / page_tokens, |wanted| wanted.div_ceil(page_tokens));
        let kv_tokens = num_pages * page_tokens;
        let needed = if wanted.is_some() { kv_tokens } else { context };
        let shortfall = shortfall(&ranks, &hardware, room, needed);
        let load_bytes_per_node = ranks
            .chunks(hardware.devices_per_node.max(1))
            .map(|node| node.iter().map(|rank| rank.weights_bytes).sum())
            .max()
            .unwrap_or(0);
        let mut plan = Self {
            schema: 1,
            profile: settings.text("profile").unwrap_or_default().into(),
            model: model.name.into(),
            parameters: config.num_parameters(),
            mesh,
            load_seconds: load_bytes_per_node as f64 / hardware.read_rate,
            device: hardware.device,
            hardware,
            dtype,
            limits: Limits { num_pages, ..limits },
            ranks,
            kv_tokens,
            context,
            sequences_at_context: kv_tokens / context,
            load_bytes_per_node,
            decode: Vec::new(),
            fits: shortfall.is_none(),
            shortfall,
        };
        plan.decode = plan.rooflines(config);
        Ok(plan)
    }

    fn rooflines(&self, config: &ModelConfig) -> Vec<Roofline> {
        let (Some(bandwidth), Some(flops), true) = (self.hardware.bandwidth, self.hardware.flops, self.fits) else {
            return Vec::new();
        };
        let context = self.context / 2;
        // Of the embedding only the rows of the step's tokens are read.
        let embedding = (config.vocab_size / self.mesh.tp * config.hidden_size * 2) as u64;
        let step_seconds = |batch: usize| {
            let rows = batch.div_ceil(self.mesh.pp) as f64;
            let stages = self.ranks.iter().step_by(self.mesh.tp);
            let seconds = stages.map(|rank| {
                let weights = (rank.weights_bytes - if rank.stage == 0 { embedding } else { 0 }) as f64;
                let kv = rows * context as f64 * rank.kv_bytes_per_token as f64;
                // Two bytes a weight, two operations a weight and row.
                f64::max((weights + kv) / bandwidth, rows * weights / flops)
            });
            seconds.sum::<f64>()
        };
        let possible = BATCHES
            .into_iter()
            .filter(|batch| *batch <= self.limits.max_sequences && batch * context <= self.kv_tokens);
        possible
            .map(|batch| Roofline { batch, context, tokens_per_second: batch as f64 / step_seconds(batch) })
            .collect()
    }

    /// The plan if it fits.
    ///
    /// # Errors
    /// It does not: with what is short, and the smallest change that would help.
    pub fn check(self, config: &ModelConfig, host: &Host) -> Outcome<Self> {
        let Some(shortfall) = &self.shortfall else { return Ok(self) };
        let error = anyhow::Error::msg(shortfall.clone()).context(format!(
            "{} in {} does not fit {}",
            self.model,
            self.dtype_name(),
            self.devices()
        ));
        Err(Failure::new(Exit::DoesNotFit, error).hint(self.remedy(config, host)))
    }

    fn remedy(&self, config: &ModelConfig, host: &Host) -> String {
        if self.device == Device::Cpu {
            return "free memory on this machine, lower kv_tokens or max_step_tokens, or take a smaller model".into();
        }
        let fitting: Vec<String> = alternatives(&self.model, config, &self.hardware.name, host)
            .iter()
            .map(|plan| format!("--profile {} ({}, {})", plan.profile, plan.layout(), plan.devices()))
            .collect();
        match fitting.is_empty() {
            true => "no built-in profile holds it; write one with more devices".into(),
            false => format!("would fit: {}", fitting.join(", or ")),
        }
    }

    pub fn dtype_name(&self) -> &'static str {
        match self.dtype {
            ComputeType::Bf16 => "bf16",
            ComputeType::F32 => "f32",
        }
    }

    /// `TP8 x PP2`.
    pub fn layout(&self) -> String {
        format!("TP{} x PP{}", self.mesh.tp, self.mesh.pp)
    }

    /// `2 x 8 H100-80GB`.
    pub fn devices(&self) -> String {
        let Hardware { device, nodes, devices_per_node, name, .. } = &self.hardware;
        match (device, nodes) {
            (Device::Cpu, _) => "this machine".into(),
            (Device::Cuda, 1) => format!("{devices_per_node} x {name}"),
            (Device::Cuda, _) => format!("{nodes} x {devices_per_node} x {name}"),
        }
    }
}

fn rank_plan(rank: usize, mesh: Mesh, memory: &RankMemory, hardware: &Hardware) -> RankPlan {
    let driver = match hardware.device {
        Device::Cpu => 0,
        Device::Cuda => cuda_overhead(mesh.world_size()),
    };
    let left = hardware.memory_bytes.saturating_sub(memory.fixed() + driver);
    let kv_bytes = match hardware.device {
        Device::Cpu => left.min((hardware.memory_bytes as f64 * CPU_KV_SHARE) as u64),
        Device::Cuda => left,
    };
    RankPlan {
        rank,
        stage: mesh.stage(rank),
        memory_bytes: hardware.memory_bytes,
        weights_bytes: memory.weights,
        activations_bytes: memory.activations,
        logits_bytes: memory.logits,
        overhead_bytes: memory.workspace + driver,
        kv_bytes_per_token: memory.kv_bytes_per_token,
        kv_bytes,
        kv_tokens: usize::try_from(kv_bytes / memory.kv_bytes_per_token.max(1)).unwrap_or(usize::MAX),
    }
}

/// Why `needed` tokens of KV cache do not fit beside everything else, if they do not.
fn shortfall(ranks: &[RankPlan], hardware: &Hardware, room: usize, needed: usize) -> Option<String> {
    if room >= needed {
        return None;
    }
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / GIB);
    let weights = ranks.iter().map(|rank| rank.weights_bytes).sum::<u64>();
    let memory = hardware.memory_bytes.saturating_mul(ranks.len() as u64);
    if weights > memory {
        return Some(format!("the weights need {}, all memory together is {}", gib(weights), gib(memory)));
    }
    let rank = ranks.iter().min_by_key(|rank| rank.kv_tokens)?;
    Some(format!(
        "rank {} has {}: weights take {}, activations and runtime {}, and {needed} tokens of KV cache {} of the {} left for it",
        rank.rank,
        gib(rank.memory_bytes),
        gib(rank.weights_bytes),
        gib(rank.activations_bytes + rank.logits_bytes + rank.overhead_bytes),
        gib(needed as u64 * rank.kv_bytes_per_token),
        gib(rank.kv_bytes),
    ))
}

/// Built-in device profiles that the model fits: same device first, fewest devices first.
fn alternatives(model: &str, config: &ModelConfig, device_name: &str, host: &Host) -> Vec<Plan> {
    let mut fitting: Vec<Plan> = profile::BUILT_IN
        .iter()
        .filter_map(|(name, text)| {
            let document = Document { label: (*name).into(), folder: None, text: (*text).into() };
            let settings = Settings::of_profile(name, &document, &Environment::default()).ok()?;
            Plan::new(Model { name: model, config }, &settings, host).ok()
        })
        .filter(|plan| plan.fits && plan.hardware.device == Device::Cuda)
        .collect();
    fitting.sort_by_key(|plan| (Reverse(plan.hardware.name == device_name), plan.mesh.world_size()));
    fitting.dedup_by_key(|plan| plan.hardware.name.clone());
    fitting
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::cli::EngineArgs;
    use crate::settings::Selection;

    const HOST: Host = Host { cores: 8, available_bytes: 16 << 30 };

    fn preset(name: &str) -> ModelConfig {
        ModelConfig::preset(name).unwrap()
    }

    fn plan(model: &str, profile: &str, set: &[&str]) -> Outcome<Plan> {
        let set = set.iter().map(|text| (*text).to_owned()).collect();
        let engine = EngineArgs { profile: Some(profile.into()), set, ..EngineArgs::default() };
        let selection = Selection { engine: Some(&engine), ..Selection::default() };
        let settings = Settings::resolve(&selection, &Environment::new([], "/nonexistent"))?;
        let config = preset(model);
        Plan::new(Model { name: model, config: &config }, &settings, &HOST)
    }

    fn large(profile: &str, set: &[&str]) -> Outcome<Plan> {
        plan("nemotron-4-340b", profile, set)
    }

    #[test]
    fn a_device_is_not_asked_to_compute_in_f32() {
        let error = large("h100x16", &["dtype=f32"]).unwrap_err();
        assert_eq!(error.exit, Exit::Usage);
        assert!(plan("nemotron-4-340b", "cpu", &["dtype=f32"]).is_ok());
    }

    #[test]
    fn the_large_model_on_its_profiles() {
        for (profile, world, weights_gib, kv_per_token, kv_tokens, sequences) in [
            ("h200x8", 8, 79.414, 73_728, 846_214.0, 206),
            ("h100x16", 16, 39.707, 36_864, 1_080_957.0, 263),
            ("a100x16", 16, 39.707, 36_864, 1_082_414.0, 264),
        ] {
            let plan = large(profile, &[]).unwrap();
            assert!(plan.fits, "{profile}");
            assert_eq!(plan.parameters, 341_029_195_776);
            assert_eq!(plan.ranks.len(), world);
            assert_eq!(plan.ranks.last().unwrap().stage, plan.mesh.pp - 1);
            for rank in &plan.ranks {
                assert!((rank.weights_bytes as f64 / GIB - weights_gib).abs() < 1e-3);
                assert_eq!(rank.kv_bytes_per_token, kv_per_token);
            }
            assert!((plan.kv_tokens as f64 / kv_tokens - 1.0).abs() < 0.02, "{profile}: {}", plan.kv_tokens);
            assert!(plan.sequences_at_context.abs_diff(sequences) <= 4);
            assert_eq!(plan.limits.num_pages * plan.limits.page_tokens, plan.kv_tokens);
        }
    }

    #[test]
    fn decoding_is_bound_by_reading_the_weights() {
        // 84.1 GB a device at 4.8 TB/s, and twice 42 GB at 3.35 TB/s, take 17.5 and 25.1 ms.
        for (profile, milliseconds) in [("h200x8", 17.55), ("h100x16", 25.15)] {
            let decode = &large(profile, &[]).unwrap().decode[0];
            assert_eq!(decode.batch, 1);
            assert!((1000.0 / decode.tokens_per_second - milliseconds).abs() < 0.1, "{decode:?}");
        }
    }

    #[test]
    fn eight_h100_are_too_small_however_it_is_said() {
        for set in [&["pp=1"], &["nodes=1"]] {
            let plan = large("h100x16", set).unwrap();
            assert_eq!((plan.mesh, plan.devices().as_str()), (Mesh { tp: 8, pp: 1 }, "8 x H100-80GB"));
            let failure = plan.check(&preset("nemotron-4-340b"), &HOST).unwrap_err();
            assert_eq!(failure.exit, Exit::DoesNotFit);
            let text = failure.to_string();
            assert!(text.contains("the weights need 635.3 GiB, all memory together is 632.8 GiB"), "{text}");
            assert!(
                text.contains("would fit: --profile h100x16 (TP8 x PP2, 2 x 8 x H100-80GB), or --profile h200x8"),
                "{text}"
            );
        }
    }

    #[test]
    fn devices_and_mesh_agree_or_are_refused() {
        let layout = |profile, set: &[&str]| large(profile, set).map(|plan| (plan.mesh, plan.hardware.nodes));
        assert_eq!(layout("h200x8", &["tp=4"]).unwrap(), (Mesh { tp: 4, pp: 1 }, 1));
        assert_eq!(layout("h100x16", &["pp=4", "nodes=4"]).unwrap(), (Mesh { tp: 8, pp: 4 }, 4));
        assert_eq!(layout("h100x16", &["nodes=4"]).unwrap(), (Mesh { tp: 8, pp: 4 }, 4));
        assert_eq!(layout("h100x16", &["devices_per_node=4"]).unwrap(), (Mesh { tp: 8, pp: 1 }, 2));
        assert_eq!(layout("h100x16", &["pp=4", "nodes=2"]).unwrap(), (Mesh { tp: 4, pp: 4 }, 2));
        for set in [&["pp=4"][..], &["tp=3"], &["tp=8", "pp=3", "nodes=2"], &["nodes=5"]] {
            assert_eq!(layout("h100x16", set).unwrap_err().exit, Exit::DoesNotFit, "{set:?}");
        }
        assert_eq!(large("cpu", &["nodes=2"]).unwrap_err().exit, Exit::Usage);
        assert_eq!(large("cpu", &["device=cuda"]).unwrap_err().exit, Exit::Usage);
    }

    #[test]
    fn every_built_in_profile_holds_a_small_model() {
        for (name, _) in profile::BUILT_IN {
            let set = if name == "cpu" { &[][..] } else { &["tp=1", "pp=1"] };
            let plan = plan("nemotron-mini-4b", name, set).unwrap();
            assert!(plan.fits, "{name}: {:?}", plan.shortfall);
            assert_eq!(plan.decode.is_empty(), name == "cpu", "{name}");
        }
    }

    #[test]
    fn a_processors_cache_is_bounded_by_use_and_by_memory() {
        let tokens = |set: &[&str]| plan("nemotron-mini-4b", "cpu", set).unwrap().kv_tokens;
        // 40 % of 16 GiB at 131,072 bytes a token.
        assert_eq!(tokens(&[]), 52_416);
        assert_eq!(tokens(&["kv_tokens=100"]), 112);
        let too_many = plan("nemotron-mini-4b", "cpu", &["kv_tokens=60000"]).unwrap();
        assert!(!too_many.fits);
        let failure = too_many.check(&preset("nemotron-mini-4b"), &HOST).unwrap_err();
        assert_eq!(failure.exit, Exit::DoesNotFit);
        assert!(
            failure.to_string().contains("60000 tokens of KV cache 7.3 GiB of the 6.4 GiB left for it"),
            "{failure}"
        );
        let small = Host { available_bytes: 4 << 30, ..HOST };
        let config = preset("nemotron-mini-4b");
        let settings = Settings::resolve(
            &Selection { default_profile: Some("cpu"), ..Selection::default() },
            &Environment::default(),
        );
        assert!(!Plan::new(Model { name: "m", config: &config }, &settings.unwrap(), &small).unwrap().fits);
    }

    #[test]
    fn extreme_values_do_not_panic() {
        for set in [
            &["hardware.memory_gib=1e300", "storage.read_gib_s=1e-300"][..],
            &["nodes=4294967295", "devices_per_node=4294967295"],
            &["max_step_tokens=4294967295"],
            &["page_tokens=4294967295"],
            &["kv_tokens=4294967295", "page_tokens=4294967295"],
            &["hardware.bandwidth_gb_s=1e-300", "hardware.tflops=1e300"],
        ] {
            _ = large("h100x16", set).map(|plan| plan.check(&preset("nemotron-4-340b"), &HOST));
        }
    }
}
