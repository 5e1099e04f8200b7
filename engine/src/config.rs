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
    /// A reward model has this head in place of the language model's.
    #[serde(default)]
    pub reward: Option<RewardHead>,
}

/// A linear regression over the final norm's output at the last token (NeMo-Aligner's `rm_head`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RewardHead {
    /// Values that it gives for a text.
    pub num_attributes: usize,
    pub has_bias: bool,
}

impl ModelConfig {
    /// A published model of the family by its name, such as `nemotron-4-340b`; `None` for any other name.
    pub fn preset(name: &str) -> Option<Self> {
        let [num_layers, hidden_size, num_heads, num_kv_heads, head_dim, ffn_size] = match name {
            "nemotron-4-340b" => [96, 18432, 96, 8, 192, 73728],
            "nemotron-4-15b" => [32, 6144, 48, 8, 128, 24576],
            "nemotron-3-22b" => [40, 6144, 48, 48, 128, 24576],
            "nemotron-3-8b" => [32, 4096, 32, 32, 128, 16384],
            "minitron-8b" => [32, 4096, 48, 8, 128, 16384],
            "nemotron-mini-4b" => [32, 3072, 24, 8, 128, 9216],
            _ => return None,
        };
        Some(Self {
            num_layers,
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
            ffn_size,
            vocab_size: 256_000,
            max_context: 4096,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rotary_fraction: 0.5,
            bos_id: Some(2),
            eos_ids: vec![3],
            reward: None,
        })
    }

    /// Whether the sizes fit together; returns the configuration unchanged if they do. Afterwards no product of sizes that the engine
    /// forms can overflow.
    ///
    /// # Errors
    /// Names the value that no model can have.
    pub fn validate(self) -> Result<Self, ConfigError> {
        let invalid = |what, value: String, demand| Err(ConfigError::Invalid { key: what, value, demand });
        let sizes = [
            ("number of layers", self.num_layers),
            ("hidden size", self.hidden_size),
            ("number of attention heads", self.num_heads),
            ("number of key-value heads", self.num_kv_heads),
            ("head size", self.head_dim),
            ("FFN size", self.ffn_size),
            ("vocabulary size", self.vocab_size),
            ("context length", self.max_context),
        ];
        for (what, size) in sizes {
            if !(1..=MAX_SIZE).contains(&size) {
                return invalid(what, size.to_string(), "must be at least 1 and at most 16777216");
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let value = format!("{} over {} key-value heads", self.num_heads, self.num_kv_heads);
            return invalid("number of attention heads", value, "must divide evenly");
        }
        // Each size is below 2^24 + 1, so that the exact sum fits 128 bits.
        let [layers, hidden, heads, kv_heads, head_dim, ffn, vocab, _] = sizes.map(|(_, size)| size as u128);
        let layer = hidden * ((2 * heads + 2 * kv_heads) * head_dim + 2 * ffn + 4);
        let parameters = layers * layer + 2 * hidden * (vocab + 1);
        if parameters > MAX_PARAMETERS {
            return invalid("number of parameters", parameters.to_string(), "must be at most 2^44");
        }
        if !(self.norm_eps.is_finite() && self.norm_eps > 0.0) {
            return invalid("LayerNorm epsilon", self.norm_eps.to_string(), "must be positive");
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return invalid("RoPE base", self.rope_theta.to_string(), "must be positive");
        }
        if !(self.rotary_fraction > 0.0 && self.rotary_fraction <= 1.0) {
            return invalid(
                "rotary share of a head",
                self.rotary_fraction.to_string(),
                "must be above 0 and at most 1",
            );
        }
        let rotary_dim = self.rotary_dim();
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            return invalid("rotary size of a head", rotary_dim.to_string(), "must be even and above 0");
        }
        match self.eos_ids.iter().chain(&self.bos_id).find(|id| **id as usize >= self.vocab_size) {
            Some(id) => invalid("BOS or EOS id", id.to_string(), "must be in the vocabulary"),
            None => Ok(self),
        }
    }

    /// Elements of a head that RoPE rotates.
    pub fn rotary_dim(&self) -> usize {
        (self.head_dim as f64 * self.rotary_fraction) as usize
    }

    /// Rows of the fused query, key and value projection.
    pub fn qkv_size(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    /// Every weight of the model: embedding, language or reward head, projections, and γ and β of each LayerNorm.
    pub fn num_parameters(&self) -> u64 {
        let [layers, hidden, ffn, vocab] =
            [self.num_layers, self.hidden_size, self.ffn_size, self.vocab_size].map(|size| size as u64);
        let qkv = self.qkv_size() as u64;
        let heads = (self.num_heads * self.head_dim) as u64;
        let layer = hidden * (qkv + heads + 2 * ffn + 4);
        let head = match self.reward {
            None => vocab * hidden,
            Some(reward) => reward.num_attributes as u64 * (hidden + u64::from(reward.has_bias)),
        };
        layers * layer + vocab * hidden + head + 2 * hidden
    }

    /// Into how many equal parts the sums of row-parallel products are cut, whatever the mesh: the largest tensor-parallel size
    /// that this model allows with parts of even width, as products take two columns at a time. The same parts on every mesh give the same bits
    /// on every mesh.
    pub fn reduction_chunks(&self) -> usize {
        (0..=3)
            .map(|power| 1 << power)
            .filter(|chunks| {
                self.num_kv_heads.is_multiple_of(*chunks)
                    && (self.num_heads * self.head_dim).is_multiple_of(2 * chunks)
                    && self.ffn_size.is_multiple_of(2 * chunks)
            })
            .max()
            .unwrap_or(1)
    }
}

/// The largest value of any size of a model.
const MAX_SIZE: usize = 1 << 24;
/// Fifty times the largest model of the family.
const MAX_PARAMETERS: u128 = 1 << 44;

/// A configuration that is damaged, impossible, or of another architecture.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("not valid JSON")]
    Json(#[from] serde_json::Error),
    #[error("not valid YAML")]
    Yaml(#[from] saphyr_parser::ScanError),
    #[error("not a configuration: {0}")]
    Structure(String),
    #[error("key {0} is missing")]
    Missing(&'static str),
    #[error("{key} is {value}, which is not {expected}")]
    Type { key: &'static str, value: String, expected: &'static str },
    #[error("{key} is {value}, but {demand}")]
    Invalid { key: &'static str, value: String, demand: &'static str },
    #[error("checkpoint is for another architecture: {key} is {value}, this engine runs {supported}")]
    Architecture { key: &'static str, value: String, supported: String },
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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn preset(name: &str) -> ModelConfig {
        ModelConfig::preset(name).unwrap()
    }

    #[test]
    fn presets_have_the_published_parameter_counts() {
        for (name, parameters, kv_bytes_per_token) in [
            ("nemotron-4-340b", 341_029_195_776, 589_824),
            ("nemotron-4-15b", 15_628_775_424, 131_072),
            ("nemotron-3-22b", 21_266_116_608, 983_040),
            ("nemotron-3-8b", 8_540_135_424, 524_288),
            ("minitron-8b", 8_271_699_968, 131_072),
            ("nemotron-mini-4b", 4_190_509_056, 131_072),
        ] {
            let config = preset(name).validate().unwrap();
            assert_eq!(config.num_parameters(), parameters, "{name}");
            assert_eq!(2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim, kv_bytes_per_token, "{name}");
            assert_eq!(config.rotary_dim(), config.head_dim / 2, "{name}");
        }
        assert_eq!(ModelConfig::preset("nemotron-4-341b"), None);
    }

    #[test]
    fn reduction_chunks_are_the_largest_tensor_parallel_size() {
        let chunks = |num_kv_heads, ffn_size| {
            ModelConfig { num_kv_heads, ffn_size, ..preset("nemotron-mini-4b") }.reduction_chunks()
        };
        assert_eq!(chunks(8, 9216), 8);
        assert_eq!(chunks(48, 9216), 8);
        assert_eq!(chunks(2, 9216), 2);
        assert_eq!(chunks(8, 9220), 2);
        assert_eq!(chunks(3, 9216), 1);
    }

    #[test]
    fn a_mesh_must_divide_the_model() {
        let config = preset("nemotron-4-340b");
        let check = |tp, pp| Mesh { tp, pp }.check(&config).map_err(|error| error.to_string());
        for (tp, pp) in [(1, 1), (8, 1), (8, 2), (4, 3), (2, 96)] {
            assert_eq!(check(tp, pp), Ok(()), "{tp} x {pp}");
        }
        assert_eq!(check(3, 1), Err("tp must be 1, 2, 4 or 8, not 3".into()));
        assert_eq!(check(0, 1), Err("tp must be 1, 2, 4 or 8, not 0".into()));
        assert_eq!(check(8, 0), Err("layers over pp: 96 cannot be split into 0 equal parts".into()));
        assert_eq!(check(8, 5), Err("layers over pp: 96 cannot be split into 5 equal parts".into()));
        let few_kv_heads = ModelConfig { num_kv_heads: 2, ..config };
        let error = Mesh { tp: 4, pp: 1 }.check(&few_kv_heads).unwrap_err();
        assert_eq!(error.to_string(), "KV heads over tp: 2 cannot be split into 4 equal parts");
    }

    #[test]
    fn a_mesh_lays_stages_out_in_rank_order() {
        let mesh = Mesh { tp: 8, pp: 2 };
        let config = preset("nemotron-4-340b");
        assert_eq!((mesh.stage(7), mesh.tp_rank(7), mesh.layers(7, &config)), (0, 7, 0..48));
        assert_eq!((mesh.stage(8), mesh.tp_rank(8), mesh.layers(8, &config)), (1, 0, 48..96));
        assert_eq!(mesh.sampling_rank(), 8);
    }

    #[test]
    fn impossible_models_are_refused_by_name() {
        let check = |change: fn(&mut ModelConfig), expected: &str| {
            let mut config = preset("nemotron-mini-4b");
            change(&mut config);
            assert_eq!(config.validate().unwrap_err().to_string(), expected);
        };
        check(|c| c.num_layers = 0, "number of layers is 0, but must be at least 1 and at most 16777216");
        check(
            |c| c.hidden_size = usize::MAX,
            &format!("hidden size is {}, but must be at least 1 and at most 16777216", usize::MAX),
        );
        check(|c| c.num_kv_heads = 5, "number of attention heads is 24 over 5 key-value heads, but must divide evenly");
        check(|c| c.head_dim = 6, "rotary size of a head is 3, but must be even and above 0");
        check(|c| c.rotary_fraction = 0.001, "rotary size of a head is 0, but must be even and above 0");
        check(|c| c.rotary_fraction = f64::NAN, "rotary share of a head is NaN, but must be above 0 and at most 1");
        check(|c| c.norm_eps = 0.0, "LayerNorm epsilon is 0, but must be positive");
        check(|c| c.rope_theta = f64::INFINITY, "RoPE base is inf, but must be positive");
        check(|c| c.eos_ids = vec![3, 256_000], "BOS or EOS id is 256000, but must be in the vocabulary");
        let huge = ModelConfig { ffn_size: MAX_SIZE, num_layers: MAX_SIZE, ..preset("nemotron-mini-4b") };
        assert!(huge.validate().unwrap_err().to_string().ends_with("must be at most 2^44"));
    }
}
