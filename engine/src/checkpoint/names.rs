//! The tensors of a model, as the model thinks of them.

use std::fmt;
use std::ops::Range;

use crate::config::{Mesh, ModelConfig, RewardHead};

/// The tensors of a Nemotron model. Shapes are those of the whole model, before any split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorName {
    /// [vocab, hidden]
    Embedding,
    /// γ of the LayerNorm before attention, [1, hidden]; the model uses 1 + γ
    AttentionNormGamma(usize),
    /// β of the LayerNorm before attention, [1, hidden]
    AttentionNormBeta(usize),
    /// [heads · head_dim, hidden], heads in order
    Query(usize),
    /// [kv_heads · head_dim, hidden]
    Key(usize),
    /// [kv_heads · head_dim, hidden]
    Value(usize),
    /// [hidden, heads · head_dim]
    Output(usize),
    /// γ of the LayerNorm before the MLP, [1, hidden]
    MlpNormGamma(usize),
    /// β of the LayerNorm before the MLP, [1, hidden]
    MlpNormBeta(usize),
    /// [ffn, hidden]
    Up(usize),
    /// [hidden, ffn]
    Down(usize),
    /// [1, hidden]
    FinalNormGamma,
    /// [1, hidden]
    FinalNormBeta,
    /// [vocab, hidden]; not of a reward model
    Head,
    /// [attributes, hidden]; of a reward model
    RewardHead,
    /// [1, attributes]; of a reward model that has one
    RewardBias,
}

impl TensorName {
    /// Every tensor of a model.
    pub fn all(config: &ModelConfig) -> impl Iterator<Item = Self> {
        let of_layer = |layer| {
            [
                Self::AttentionNormGamma(layer),
                Self::AttentionNormBeta(layer),
                Self::Query(layer),
                Self::Key(layer),
                Self::Value(layer),
                Self::Output(layer),
                Self::MlpNormGamma(layer),
                Self::MlpNormBeta(layer),
                Self::Up(layer),
                Self::Down(layer),
            ]
        };
        let head = match config.reward {
            None => &[Self::Head][..],
            Some(RewardHead { has_bias: false, .. }) => &[Self::RewardHead],
            Some(RewardHead { has_bias: true, .. }) => &[Self::RewardHead, Self::RewardBias],
        };
        std::iter::once(Self::Embedding)
            .chain((0..config.num_layers).flat_map(of_layer))
            .chain([Self::FinalNormGamma, Self::FinalNormBeta])
            .chain(head.iter().copied())
    }

    /// Whether it is γ or β of a LayerNorm.
    pub fn is_norm(self) -> bool {
        matches!(
            self,
            Self::AttentionNormGamma(_)
                | Self::AttentionNormBeta(_)
                | Self::MlpNormGamma(_)
                | Self::MlpNormBeta(_)
                | Self::FinalNormGamma
                | Self::FinalNormBeta
        )
    }

    /// Whether it has one axis where files say so.
    pub(super) fn is_vector(self) -> bool {
        self.is_norm() || self == Self::RewardBias
    }

    /// Whether every tensor-parallel rank has all of it.
    pub fn is_replicated(self) -> bool {
        self.is_norm() || matches!(self, Self::RewardHead | Self::RewardBias)
    }

    /// Whether it is γ of a LayerNorm.
    pub fn is_gamma(self) -> bool {
        matches!(self, Self::AttentionNormGamma(_) | Self::MlpNormGamma(_) | Self::FinalNormGamma)
    }

    /// The tensors of which `rank` has a part, in the order in which it needs them.
    pub fn of_rank(config: &ModelConfig, mesh: Mesh, rank: usize) -> impl Iterator<Item = Self> {
        let (stage, layers) = (mesh.stage(rank), mesh.layers(rank, config));
        Self::all(config).filter(move |name| match name.layer() {
            Some(layer) => layers.contains(&layer),
            None if *name == Self::Embedding => stage == 0,
            None => stage == mesh.pp - 1,
        })
    }

    /// Rows and columns that a tensor-parallel rank has: its heads, or its share of FFN or vocabulary; of norms and a reward model's head everything.
    pub fn shard(self, config: &ModelConfig, mesh: Mesh, rank: usize) -> [Range<usize>; 2] {
        let [rows, cols] = self.shape(config);
        let share = |size: usize| mesh.tp_rank(rank) * size / mesh.tp..(mesh.tp_rank(rank) + 1) * size / mesh.tp;
        match self {
            Self::Output(_) | Self::Down(_) => [0..rows, share(cols)],
            _ if self.is_replicated() => [0..rows, 0..cols],
            _ => [share(rows), 0..cols],
        }
    }

    fn layer(self) -> Option<usize> {
        match self {
            Self::AttentionNormGamma(layer)
            | Self::AttentionNormBeta(layer)
            | Self::Query(layer)
            | Self::Key(layer)
            | Self::Value(layer)
            | Self::Output(layer)
            | Self::MlpNormGamma(layer)
            | Self::MlpNormBeta(layer)
            | Self::Up(layer)
            | Self::Down(layer) => Some(layer),
            Self::Embedding
            | Self::FinalNormGamma
            | Self::FinalNormBeta
            | Self::Head
            | Self::RewardHead
            | Self::RewardBias => None,
        }
    }

    /// Rows and columns of the whole tensor.
    pub fn shape(self, config: &ModelConfig) -> [usize; 2] {
        let hidden = config.hidden_size;
        let attributes = config.reward.map_or(0, |reward| reward.num_attributes);
        match self {
            Self::Embedding | Self::Head => [config.vocab_size, hidden],
            Self::RewardHead => [attributes, hidden],
            Self::RewardBias => [1, attributes],
            Self::Query(_) => [config.num_heads * config.head_dim, hidden],
            Self::Key(_) | Self::Value(_) => [config.num_kv_heads * config.head_dim, hidden],
            Self::Output(_) => [hidden, config.num_heads * config.head_dim],
            Self::Up(_) => [config.ffn_size, hidden],
            Self::Down(_) => [hidden, config.ffn_size],
            Self::AttentionNormGamma(_)
            | Self::AttentionNormBeta(_)
            | Self::MlpNormGamma(_)
            | Self::MlpNormBeta(_)
            | Self::FinalNormGamma
            | Self::FinalNormBeta => [1, hidden],
        }
    }
}

impl fmt::Display for TensorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedding => f.write_str("embedding"),
            Self::AttentionNormGamma(layer) => write!(f, "layers.{layer}.attention_norm.gamma"),
            Self::AttentionNormBeta(layer) => write!(f, "layers.{layer}.attention_norm.beta"),
            Self::Query(layer) => write!(f, "layers.{layer}.query"),
            Self::Key(layer) => write!(f, "layers.{layer}.key"),
            Self::Value(layer) => write!(f, "layers.{layer}.value"),
            Self::Output(layer) => write!(f, "layers.{layer}.output"),
            Self::MlpNormGamma(layer) => write!(f, "layers.{layer}.mlp_norm.gamma"),
            Self::MlpNormBeta(layer) => write!(f, "layers.{layer}.mlp_norm.beta"),
            Self::Up(layer) => write!(f, "layers.{layer}.up"),
            Self::Down(layer) => write!(f, "layers.{layer}.down"),
            Self::FinalNormGamma => f.write_str("final_norm.gamma"),
            Self::FinalNormBeta => f.write_str("final_norm.beta"),
            Self::Head => f.write_str("head"),
            Self::RewardHead => f.write_str("reward_head"),
            Self::RewardBias => f.write_str("reward_head.bias"),
        }
    }
}
