//! What a model looks like ([`ModelConfig`]) and how it is split over ranks ([`Mesh`]).

use serde::{Deserialize, Serialize};

/// Sizes and constants of a Nemotron model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    pub num_layers: usize,
    pub hidden_size: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    /// Never derived from hidden_size / num_heads when the checkpoint states it.
    pub head_dim: usize,
    pub ffn_size: usize,
    pub vocab_size: usize,
    /// Tokens that prompt and completion may have together.
    pub max_context: usize,
    pub norm_eps: f32,
    pub rope_theta: f64,
    /// Share of each head that is rotated.
    pub rotary_fraction: f64,
    pub bos_id: Option<u32>,
    /// Ids that always end a row.
    pub eos_ids: Vec<u32>,
}

impl ModelConfig {
    /// Elements of a head that RoPE rotates.
    pub fn rotary_dim(&self) -> usize {
        (self.head_dim as f64 * self.rotary_fraction) as usize
    }

    /// Rows of the fused query, key and value projection.
    pub fn qkv_size(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    /// Every weight of the model: embedding, head, projections, and γ and β of each LayerNorm.
    pub fn num_parameters(&self) -> u64 {
        let [layers, hidden, ffn, vocab] =
            [self.num_layers, self.hidden_size, self.ffn_size, self.vocab_size].map(|size| size as u64);
        let qkv = self.qkv_size() as u64;
        let heads = (self.num_heads * self.head_dim) as u64;
        let layer = hidden * (qkv + heads + 2 * ffn + 4);
        layers * layer + 2 * vocab * hidden + 2 * hidden
    }

    /// Into how many equal parts the sums of row-parallel products are cut, whatever the mesh: the largest tensor-parallel size
    /// that this model allows. The same parts on every mesh give the same bits on every mesh.
    pub fn reduction_chunks(&self) -> usize {
        (0..=3)
            .map(|power| 1 << power)
            .filter(|chunks| self.num_kv_heads % chunks == 0 && self.ffn_size % chunks == 0)
            .max()
            .unwrap_or(1)
    }
}

/// A tensor-parallel × pipeline-parallel arrangement of ranks; rank = stage · tp + tensor-parallel rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mesh {
    pub tp: usize,
    pub pp: usize,
}

impl Mesh {
    pub fn world_size(self) -> usize {
        self.tp * self.pp
    }

    pub fn stage(self, rank: usize) -> usize {
        rank / self.tp
    }

    pub fn tp_rank(self, rank: usize) -> usize {
        rank % self.tp
    }

    /// Where tokens are sampled: tensor-parallel rank 0 of the last stage.
    pub fn sampling_rank(self) -> usize {
        (self.pp - 1) * self.tp
    }

    /// Layers of a stage: contiguous equal blocks.
    pub fn layers(self, rank: usize, config: &ModelConfig) -> std::ops::Range<usize> {
        let per_stage = config.num_layers / self.pp;
        let stage = self.stage(rank);
        stage * per_stage..(stage + 1) * per_stage
    }

    /// Whether `config` can be split this way.
    ///
    /// # Errors
    /// Names the size that does not divide.
    pub fn check(self, config: &ModelConfig) -> Result<(), MeshError> {
        if !matches!(self.tp, 1 | 2 | 4 | 8) {
            return Err(MeshError::TensorParallel(self.tp));
        }
        let uneven = |what, size: usize, parts: usize| {
            if parts == 0 || !size.is_multiple_of(parts) {
                Err(MeshError::Uneven { what, size, parts })
            } else {
                Ok(())
            }
        };
        uneven("layers over pp", config.num_layers, self.pp)?;
        uneven("KV heads over tp", config.num_kv_heads, self.tp)?;
        uneven("attention heads over tp", config.num_heads, self.tp)?;
        uneven("FFN size over tp", config.ffn_size, self.tp)?;
        uneven("vocabulary over tp", config.vocab_size, self.tp)
    }
}

/// A mesh that the model cannot be split over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MeshError {
    #[error("tp must be 1, 2, 4 or 8, not {0}")]
    TensorParallel(usize),
    #[error("{what}: {size} cannot be split into {parts} equal parts")]
    Uneven { what: &'static str, size: usize, parts: usize },
}
