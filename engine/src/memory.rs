//! How much memory a rank needs, by arithmetic alone: what a planner asks before anything is started.

use crate::backend::ComputeType;
use crate::config::{Mesh, ModelConfig};

const MIB: u64 = 1 << 20;

/// Rows of logits that a step computes at most at a time.
pub const LOGIT_ROWS: usize = 256;

/// Bytes that one rank allocates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankMemory {
    pub weights: u64,
    /// Buffers that hold the tokens of the largest step.
    pub activations: u64,
    /// Logits of [`LOGIT_ROWS`] rows: this rank's part, and on the sampling rank the whole; 0 before the last stage.
    pub logits: u64,
    /// Keys and values of one token in the layers and KV heads of this rank.
    pub kv_bytes_per_token: u64,
}

impl RankMemory {
    /// Everything but the KV cache.
    pub fn fixed(&self) -> u64 {
        self.weights + self.activations + self.logits
    }

    /// Tokens whose keys and values fit beside the rest into `budget` bytes.
    pub fn kv_tokens(&self, budget: u64) -> u64 {
        budget.saturating_sub(self.fixed()) / self.kv_bytes_per_token
    }
}

/// The memory of `rank` of a mesh that [`Mesh::check`] accepted.
///
/// With [`ComputeType::F32`] every weight counts four bytes; a backend that keeps the stored bf16 needs less.
pub fn rank_memory(
    config: &ModelConfig,
    mesh: Mesh,
    rank: usize,
    dtype: ComputeType,
    max_step_tokens: usize,
) -> RankMemory {
    const F32_BYTES: u64 = 4;
    let tp = mesh.tp as u64;
    let layers = mesh.layers(rank, config).len() as u64;
    let [hidden, ffn, vocab, head_dim] =
        [config.hidden_size, config.ffn_size, config.vocab_size, config.head_dim].map(|size| size as u64);
    // Widths of this rank's part of a token's activations.
    let qkv = config.qkv_size() as u64 / tp;
    let heads = config.num_heads as u64 * head_dim / tp;
    let ffn = ffn / tp;
    let vocab_part = vocab / tp;

    // The γ and β of a LayerNorm are on every rank of the stage.
    let mut elements = layers * hidden * (qkv + heads + 2 * ffn + 4);
    if mesh.stage(rank) == 0 {
        elements += vocab_part * hidden;
    }
    let is_last = mesh.stage(rank) + 1 == mesh.pp;
    if is_last {
        elements += vocab_part * hidden + 2 * hidden;
    }
    let logit_width = match rank == mesh.sampling_rank() {
        _ if !is_last => 0,
        true if tp > 1 => vocab_part + vocab,
        _ => vocab_part,
    };
    let element_bytes = dtype.kv_bytes() as u64;
    RankMemory {
        weights: elements * element_bytes,
        // The residual stream, its norm and the two sums of a layer; q, k and v; attention's output; the inner activations of the MLP.
        activations: max_step_tokens as u64 * (4 * hidden + qkv + heads + ffn) * F32_BYTES,
        logits: LOGIT_ROWS.min(max_step_tokens) as u64 * logit_width * F32_BYTES,
        kv_bytes_per_token: 2 * layers * (config.num_kv_heads as u64 / tp) * head_dim * element_bytes,
    }
}

/// The KV tokens that fit on every rank of a mesh when each has `budget` bytes.
pub fn kv_tokens(config: &ModelConfig, mesh: Mesh, dtype: ComputeType, max_step_tokens: usize, budget: u64) -> u64 {
    (0..mesh.world_size())
        .map(|rank| rank_memory(config, mesh, rank, dtype, max_step_tokens).kv_tokens(budget))
        .min()
        .unwrap_or(0)
}

/// What CUDA and its libraries take from a device besides the engine's own buffers: the context and what else the driver keeps
/// (1.2 GiB), the workspace of cuBLASLt (64 MiB), and with several ranks NCCL's buffers (0.4 GiB).
pub fn cuda_overhead(world_size: usize) -> u64 {
    let nccl = if world_size > 1 { 410 * MIB } else { 0 };
    1229 * MIB + 64 * MIB + nccl
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const GIB: f64 = (1_u64 << 30) as f64;

    fn nemotron_340b() -> ModelConfig {
        ModelConfig::preset("nemotron-4-340b").unwrap()
    }

    #[test]
    fn the_large_model_fits_the_published_machines_as_computed_by_hand() {
        let config = nemotron_340b();
        for (mesh, hbm_gib, weights_gib, kv_bytes, kv_tokens_expected) in [
            (Mesh { tp: 8, pp: 1 }, 139.80, 79.414, 73_728, 846_214.0),
            (Mesh { tp: 8, pp: 2 }, 79.10, 39.707, 36_864, 1_080_957.0),
            (Mesh { tp: 8, pp: 2 }, 79.15, 39.707, 36_864, 1_082_414.0),
        ] {
            for rank in 0..mesh.world_size() {
                let memory = rank_memory(&config, mesh, rank, ComputeType::Bf16, 2048);
                assert!((memory.weights as f64 / GIB - weights_gib).abs() < 5e-4, "rank {rank}: {}", memory.weights);
                assert_eq!(memory.kv_bytes_per_token, kv_bytes);
            }
            let budget = (hbm_gib * GIB) as u64 - cuda_overhead(mesh.world_size());
            let tokens = kv_tokens(&config, mesh, ComputeType::Bf16, 2048, budget) as f64;
            assert!((tokens / kv_tokens_expected - 1.0).abs() < 0.02, "{tokens} instead of {kv_tokens_expected}");
        }
    }

    #[test]
    fn ranks_hold_the_model_once_but_for_replicated_norms() {
        for (name, mesh) in [("nemotron-4-340b", Mesh { tp: 8, pp: 2 }), ("nemotron-mini-4b", Mesh { tp: 4, pp: 4 })] {
            let config = ModelConfig::preset(name).unwrap();
            let elements: u64 = (0..mesh.world_size())
                .map(|rank| rank_memory(&config, mesh, rank, ComputeType::Bf16, 1).weights / 2)
                .sum();
            let norms = ((4 * config.num_layers + 2) * config.hidden_size) as u64;
            assert_eq!(elements, config.num_parameters() + (mesh.tp as u64 - 1) * norms, "{name}");
        }
    }

    #[test]
    fn only_the_sampling_rank_holds_whole_logits() {
        let logits =
            |tp, pp, rank| rank_memory(&nemotron_340b(), Mesh { tp, pp }, rank, ComputeType::Bf16, 2048).logits / 1024;
        assert_eq!((logits(8, 2, 0), logits(8, 2, 8), logits(8, 2, 9)), (0, 288_000, 32_000));
        assert_eq!(logits(1, 1, 0), 256_000);
    }

    #[test]
    fn a_budget_below_the_weights_holds_no_tokens() {
        let memory = rank_memory(&nemotron_340b(), Mesh { tp: 8, pp: 1 }, 0, ComputeType::F32, 512);
        assert_eq!(memory.kv_tokens(memory.fixed()), 0);
        assert_eq!(memory.kv_tokens(memory.fixed() + 2 * 73_728 * 3), 3);
        assert_eq!(memory.kv_tokens(0), 0);
    }
}
