//! How much memory a rank needs, by arithmetic alone: what a planner asks before anything is started.

use crate::backend::cuda::peers::PeerArea;
use crate::backend::cuda::sizes;
use crate::backend::{ComputeType, HeadShape};
use crate::collective::nccl::NcclCollective;
use crate::config::{Mesh, ModelConfig};
use crate::spec::{Device, LOGIT_ROWS, Limits};

const MIB: u64 = 1 << 20;

/// Bytes that one rank allocates: on a CUDA device exactly these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankMemory {
    pub weights: u64,
    /// Buffers that hold the tokens of the largest step.
    pub activations: u64,
    /// Logits of [`LOGIT_ROWS`] rows and what they are made of; 0 before the last stage.
    pub logits: u64,
    /// What the device's kernels, libraries and collectives work in.
    pub workspace: u64,
    /// Keys and values of one token in the layers and KV heads of this rank.
    pub kv_bytes_per_token: u64,
}

impl RankMemory {
    /// Everything but the KV cache.
    pub fn fixed(&self) -> u64 {
        self.weights + self.activations + self.logits + self.workspace
    }

    /// Tokens whose keys and values fit beside the rest into `budget` bytes.
    pub fn kv_tokens(&self, budget: u64) -> u64 {
        budget.saturating_sub(self.fixed()) / self.kv_bytes_per_token
    }
}

/// The memory of `rank` of a mesh that [`Mesh::check`] accepted; of the limits, the number of pages does not matter.
///
/// With [`ComputeType::F32`] every weight counts four bytes; a backend that keeps the stored bf16 needs less.
pub fn rank_memory(
    config: &ModelConfig,
    mesh: Mesh,
    rank: usize,
    dtype: ComputeType,
    device: Device,
    limits: &Limits,
) -> RankMemory {
    const F32_BYTES: usize = 4;
    let tp = mesh.tp;
    let layers = mesh.layers(rank, config).len();
    let hidden = config.hidden_size;
    let shape = HeadShape::of_rank(config, tp);
    let (qkv, heads, ffn) = (shape.qkv_width(), shape.heads * shape.head_dim, config.ffn_size / tp);
    let (is_first, is_last) = (mesh.stage(rank) == 0, mesh.stage(rank) + 1 == mesh.pp);
    // Rows of the head's matrix, and elements of a row of logits before and after they are gathered.
    let (head, part, whole) = match config.reward {
        None => (config.vocab_size / tp, if tp > 1 { config.vocab_size / tp } else { 0 }, config.vocab_size),
        Some(reward) => (reward.num_attributes, 0, reward.num_attributes),
    };
    // [rows, columns] of the rank's matrices.
    let of_a_layer = [(qkv, hidden), (hidden, heads), (ffn, hidden), (hidden, ffn)];
    let embedding = is_first.then_some((config.vocab_size / tp, hidden));
    let head = is_last.then_some((head, hidden));
    let elements = |(rows, cols): (usize, usize)| rows * cols;
    let matrices = layers * of_a_layer.into_iter().map(elements).sum::<usize>()
        + embedding.into_iter().chain(head).map(elements).sum::<usize>();
    // The γ and β of a LayerNorm are on every rank of the stage.
    let norms = (2 * layers + usize::from(is_last)) * 2 * hidden;

    let element_bytes = dtype.kv_bytes();
    let (activations, logits, workspace) = match device {
        Device::Cpu => {
            // The residual stream, its norm and the two sums of a layer; q, k and v; attention's output; the inner activations of the MLP.
            let width = 4 * hidden + qkv + heads + ffn;
            let logits = part + if rank == mesh.sampling_rank() { whole } else { 0 };
            let rows = LOGIT_ROWS.min(limits.max_step_tokens);
            (limits.max_step_tokens * width * F32_BYTES, rows * logits * F32_BYTES, 0)
        }
        Device::Cuda => {
            let activations = sizes::buffers(limits.max_step_tokens, 2 * hidden + qkv, hidden + heads + ffn);
            let logits = sizes::buffers(LOGIT_ROWS, hidden + part + whole, hidden);
            let matrices = of_a_layer.into_iter().chain(embedding).chain(head);
            let mut workspace = sizes::workspace(limits, config.max_context, &shape, matrices);
            // Norms are f32 there.
            workspace += norms * (F32_BYTES - element_bytes.min(F32_BYTES));
            if mesh.world_size() > 1 {
                workspace += NcclCollective::received_bytes(config, mesh, limits.max_step_tokens);
            }
            if tp > 1 {
                workspace += PeerArea::bytes(hidden);
            }
            (activations, logits, workspace)
        }
    };
    RankMemory {
        weights: ((matrices + norms) * element_bytes) as u64,
        activations: activations as u64,
        logits: if is_last { logits as u64 } else { 0 },
        workspace: workspace as u64,
        kv_bytes_per_token: (2 * layers * shape.kv_heads * shape.head_dim * element_bytes) as u64,
    }
}

/// What CUDA and its libraries take from a device besides the engine's own allocations: the context and what else the driver keeps
/// (1.2 GiB), and with several ranks NCCL's buffers (0.4 GiB).
pub fn cuda_overhead(world_size: usize) -> u64 {
    let nccl = if world_size > 1 { 410 * MIB } else { 0 };
    1229 * MIB + nccl
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const GIB: f64 = (1_u64 << 30) as f64;
    const LIMITS: Limits = Limits { page_tokens: 16, num_pages: 0, max_step_tokens: 2048, max_sequences: 256 };

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
                let memory = rank_memory(&config, mesh, rank, ComputeType::Bf16, Device::Cuda, &LIMITS);
                assert!((memory.weights as f64 / GIB - weights_gib).abs() < 5e-4, "rank {rank}: {}", memory.weights);
                assert_eq!(memory.kv_bytes_per_token, kv_bytes);
            }
            let budget = (hbm_gib * GIB) as u64 - cuda_overhead(mesh.world_size());
            let memory = |rank| rank_memory(&config, mesh, rank, ComputeType::Bf16, Device::Cuda, &LIMITS);
            let tokens = (0..mesh.world_size()).map(|rank| memory(rank).kv_tokens(budget)).min().unwrap() as f64;
            assert!((tokens / kv_tokens_expected - 1.0).abs() < 0.02, "{tokens} instead of {kv_tokens_expected}");
        }
    }

    #[test]
    fn ranks_hold_the_model_once_but_for_replicated_norms() {
        for (name, mesh) in [("nemotron-4-340b", Mesh { tp: 8, pp: 2 }), ("nemotron-mini-4b", Mesh { tp: 4, pp: 4 })] {
            let config = ModelConfig::preset(name).unwrap();
            let elements: u64 = (0..mesh.world_size())
                .map(|rank| rank_memory(&config, mesh, rank, ComputeType::Bf16, Device::Cpu, &LIMITS).weights / 2)
                .sum();
            let norms = ((4 * config.num_layers + 2) * config.hidden_size) as u64;
            assert_eq!(elements, config.num_parameters() + (mesh.tp as u64 - 1) * norms, "{name}");
        }
    }

    #[test]
    fn only_the_sampling_rank_holds_whole_logits() {
        let logits = |tp, pp, rank| {
            rank_memory(&nemotron_340b(), Mesh { tp, pp }, rank, ComputeType::Bf16, Device::Cpu, &LIMITS).logits
        };
        let row = 4 * LOGIT_ROWS as u64;
        assert_eq!((logits(8, 2, 0), logits(8, 2, 8), logits(8, 2, 9)), (0, 288_000 * row, 32_000 * row));
        assert_eq!(logits(1, 1, 0), 256_000 * row);
    }

    #[test]
    fn a_budget_below_the_weights_holds_no_tokens() {
        let memory = rank_memory(&nemotron_340b(), Mesh { tp: 8, pp: 1 }, 0, ComputeType::F32, Device::Cpu, &LIMITS);
        assert_eq!(memory.kv_tokens(memory.fixed()), 0);
        assert_eq!(memory.kv_tokens(memory.fixed() + 2 * 73_728 * 3), 3);
        assert_eq!(memory.kv_tokens(0), 0);
    }
}
