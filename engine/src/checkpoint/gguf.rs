//! GGUF files as llama.cpp's converter writes them for the architecture `nemotron`, with weights in F32, F16 or BF16.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::fields::{Fields, unsupported};
use super::folder::map;
use super::gguf_file::{GgufHeader, TensorInfo};
use super::grid::Values;
use super::{CheckpointError, CheckpointSource, DataFile, Dtype, Grid, StoredDtype, StoredTensor, TensorName};
use crate::config::{ConfigError, ModelConfig};
use crate::tokenizer::{PieceTable, Tokenizer};

const TOKENS: &str = "tokenizer.ggml.tokens";

pub(super) struct GgufCheckpoint {
    config: ModelConfig,
    file: Arc<DataFile>,
    header: GgufHeader,
    /// Index into the header's tensors.
    places: HashMap<String, usize>,
}

impl GgufCheckpoint {
    pub(super) fn open(path: PathBuf) -> Result<Self, CheckpointError> {
        let storage = map(&path)?;
        let damaged = |problem| CheckpointError::damaged(&path, problem);
        let header = GgufHeader::read(storage.bytes()).map_err(damaged)?;
        let mut places = HashMap::new();
        for (i, tensor) in header.tensors.iter().enumerate() {
            if places.insert(tensor.name.clone(), i).is_some() {
                return Err(damaged(format!("tensor {} appears twice", tensor.name)));
            }
        }
        let query_rows = places.get("blk.0.attn_q.weight").and_then(|i| header.tensors[*i].axes.get(1));
        let config = config(&header.scalars, query_rows.copied())
            .map_err(|source| CheckpointError::Config { file: path.clone(), source })?;
        let checkpoint = Self { config, file: DataFile::in_memory(path, storage), header, places };
        let mut ends = Vec::new();
        for name in TensorName::all(&checkpoint.config) {
            let (tensor, dtype) = checkpoint.find(name)?;
            let [rows, cols] = name.shape(&checkpoint.config);
            ends.push((tensor.offset, tensor.offset + rows * cols * dtype.size(), &tensor.name));
        }
        ends.sort_unstable();
        for pair in ends.windows(2) {
            if pair[0].1 > pair[1].0 {
                let problem = format!("tensor {} overlaps tensor {}", pair[1].2, pair[0].2);
                return Err(CheckpointError::damaged(checkpoint.file.path(), problem));
            }
        }
        Ok(checkpoint)
    }

    fn find(&self, name: TensorName) -> Result<(&TensorInfo, Dtype), CheckpointError> {
        let file = || self.file.path().to_owned();
        let tensor = stored_name(name);
        let Some(&i) = self.places.get(&tensor) else {
            return Err(CheckpointError::MissingTensor { tensor, path: file() });
        };
        let info = &self.header.tensors[i];
        let [rows, cols] = name.shape(&self.config);
        let expected = if name.is_norm() { vec![cols] } else { vec![cols, rows] };
        if info.axes != expected {
            return Err(CheckpointError::Shape { tensor, file: file(), found: info.axes.clone(), expected });
        }
        let Some(dtype) = dtype(info.kind) else {
            let kind = KINDS.get(info.kind as usize).filter(|kind| !kind.is_empty());
            let dtype = kind.map_or_else(|| format!("ggml type {}", info.kind), |kind| (*kind).to_owned());
            return Err(CheckpointError::Dtype { tensor, file: file(), dtype });
        };
        // The shape is that of a validated configuration: no product overflows.
        if info.offset as u64 + (rows * cols * dtype.size()) as u64 > self.file.num_bytes() {
            return Err(CheckpointError::damaged(file(), format!("tensor {tensor} goes on beyond its end")));
        }
        Ok((info, dtype))
    }
}

impl GgufCheckpoint {
    /// The SentencePiece model: the original where it lies beside the file, which alone knows whether a text gets a space in front, else
    /// what the metadata has of it.
    fn tokenizer_model(&self) -> Result<Vec<u8>, CheckpointError> {
        let path = self.file.path();
        let original = path.with_file_name("tokenizer.model");
        if original.is_file() {
            return fs::read(&original).map_err(|source| CheckpointError::Io { path: original, source });
        }
        let scalars = &self.header.scalars;
        let config_error = |source| CheckpointError::Config { file: path.to_owned(), source };
        Fields(scalars).demand("tokenizer.ggml.model", "llama", Value::Null).map_err(config_error)?;
        let storage = self.file.storage()?;
        let absent = |key| move || CheckpointError::damaged(path, format!("array {key} is missing"));
        let pieces = self.header.strings(storage.bytes(), TOKENS).ok_or_else(absent(TOKENS))?;
        let numbers = |key| self.header.numbers(storage.bytes(), key).ok_or_else(absent(key));
        let (scores, kinds) = (numbers("tokenizer.ggml.scores")?, numbers("tokenizer.ggml.token_type")?);
        if scores.len() != pieces.len() || kinds.len() != pieces.len() {
            return Err(CheckpointError::damaged(path, "its tokens, scores and token types differ in number"));
        }
        let flag = |key| scalars.get(key).and_then(Value::as_bool).unwrap_or(false);
        let id = |key| scalars.get(key).and_then(Value::as_u64).and_then(|id| usize::try_from(id).ok());
        let mut kinds: Vec<u64> = pieces.iter().zip(kinds).map(|(text, kind)| piece_kind(text, kind as u64)).collect();
        let unknown = id("tokenizer.ggml.unknown_token_id").filter(|_| !kinds.contains(&UNKNOWN));
        if let Some(kind) = unknown.and_then(|id| kinds.get_mut(id)) {
            *kind = UNKNOWN;
        }
        let pieces = pieces.into_iter().zip(scores).zip(kinds);
        let table = PieceTable {
            pieces: pieces.map(|((text, score), kind)| (text, score as f32, kind)).collect(),
            // The converter for Nemotron writes neither key, and the tokenizers of the family need neither.
            add_dummy_prefix: flag("tokenizer.ggml.add_space_prefix"),
            remove_extra_whitespaces: flag("tokenizer.ggml.remove_extra_whitespaces"),
            bos_id: id("tokenizer.ggml.bos_token_id"),
            eos_id: id("tokenizer.ggml.eos_token_id"),
        };
        Ok(table.to_model_file())
    }
}

impl CheckpointSource for GgufCheckpoint {
    fn format(&self) -> &'static str {
        "GGUF"
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tokenizer(&self) -> Result<Tokenizer, CheckpointError> {
        let path = self.file.path().to_owned();
        Tokenizer::from_sentencepiece(&self.tokenizer_model()?)
            .map_err(|source| CheckpointError::Tokenizer { file: path, source })
    }

    fn chat_template(&self) -> Option<String> {
        Some(self.header.scalars.get("tokenizer.chat_template")?.as_str()?.to_owned())
    }

    fn companions(&self) -> Result<Vec<(String, Vec<u8>)>, CheckpointError> {
        let mut files = vec![("tokenizer.model".to_owned(), self.tokenizer_model()?)];
        files.extend(self.chat_template().map(|text| ("chat_template.jinja".to_owned(), text.into_bytes())));
        Ok(files)
    }

    fn grid(&self, name: TensorName) -> Result<Grid, CheckpointError> {
        let (tensor, dtype) = self.find(name)?;
        let (file, shape) = (Arc::clone(&self.file), name.shape(&self.config));
        let grid = Grid::contiguous(StoredDtype::Plain(dtype), file, tensor.offset, shape);
        Ok(if name.is_gamma() { grid.with(Values::OnePlus) } else { grid })
    }

    fn stored_tensors(&self) -> Vec<StoredTensor> {
        let tensors = self.header.tensors.iter();
        tensors
            .filter_map(|tensor| {
                let shape = tensor.axes.iter().rev().copied().collect();
                Some(StoredTensor { name: tensor.name.clone(), dtype: StoredDtype::Plain(dtype(tensor.kind)?), shape })
            })
            .collect()
    }

    fn files(&self) -> Vec<(String, u64)> {
        vec![(self.file.name(), self.file.num_bytes())]
    }
}

/// SentencePiece's type of the piece for what is unknown.
const UNKNOWN: u64 = 2;

/// SentencePiece's type of a piece. The converter writes user-defined symbols, which those of the family are `<extra_id_…>`, as normal
/// pieces, and as control pieces where a `tokenizer_config.json` calls them special; there it forgets the type of the unknown piece, too.
fn piece_kind(text: &str, kind: u64) -> u64 {
    const NORMAL: u64 = 1;
    const CONTROL: u64 = 3;
    const USER_DEFINED: u64 = 4;
    let number = text.strip_prefix("<extra_id_").and_then(|rest| rest.strip_suffix('>'));
    let is_symbol = number.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()));
    if matches!(kind, NORMAL | CONTROL) && is_symbol { USER_DEFINED } else { kind }
}

/// Names of `ggml_type`s, for messages.
const KINDS: [&str; 16] = [
    "F32", "F16", "Q4_0", "Q4_1", "", "", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "Q8_K",
];

fn dtype(kind: u32) -> Option<Dtype> {
    match kind {
        0 => Some(Dtype::F32),
        1 => Some(Dtype::F16),
        30 => Some(Dtype::Bf16),
        _ => None,
    }
}

/// `query_rows` is heads · head_dim as the weights have it.
fn config(scalars: &Map<String, Value>, query_rows: Option<usize>) -> Result<ModelConfig, ConfigError> {
    let fields = Fields(scalars);
    fields.demand("general.architecture", "nemotron", Value::Null)?;
    if let Some((key, value)) = fields.find(&["nemotron.rope.scaling.type"])
        && value != "none"
    {
        return Err(unsupported(key, value, &"none".into()));
    }
    let hidden_size = fields.required_size(&["nemotron.embedding_length"])?;
    let num_heads = fields.required_size(&["nemotron.attention.head_count"])?;
    let by_weights = query_rows.filter(|rows| rows.is_multiple_of(num_heads)).map(|rows| rows / num_heads);
    let stated = fields.size(&["nemotron.attention.key_length"])?;
    let head_dim = stated.or(by_weights).ok_or(ConfigError::Missing("nemotron.attention.key_length"))?;
    // The converter derives the rotated size from hidden / heads, which is wrong where heads have another size; the family's models
    // rotate half of each head.
    let rotated = fields.size(&["nemotron.rope.dimension_count"])?;
    let rotary_fraction = match rotated {
        Some(rotated) if head_dim * num_heads == hidden_size => rotated as f64 / head_dim as f64,
        _ => 0.5,
    };
    let mut eos_ids = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        eos_ids.extend(fields.ids(key)?.unwrap_or_default());
    }
    eos_ids.sort_unstable();
    eos_ids.dedup();
    let bos_id = fields.ids("tokenizer.ggml.bos_token_id")?;
    ModelConfig {
        num_layers: fields.required_size(&["nemotron.block_count"])?,
        hidden_size,
        num_heads,
        num_kv_heads: fields.size(&["nemotron.attention.head_count_kv"])?.unwrap_or(num_heads),
        head_dim,
        ffn_size: fields.required_size(&["nemotron.feed_forward_length"])?,
        vocab_size: fields.required_size(&["nemotron.vocab_size"])?,
        max_context: fields.size(&["nemotron.context_length"])?.unwrap_or(4096),
        norm_eps: fields.number(&["nemotron.attention.layer_norm_epsilon"])?.unwrap_or(1e-5) as f32,
        rope_theta: fields.number(&["nemotron.rope.freq_base"])?.unwrap_or(10_000.0),
        rotary_fraction,
        bos_id: bos_id.and_then(|ids| ids.first().copied()),
        eos_ids: if eos_ids.is_empty() { vec![3] } else { eos_ids },
        reward: None,
    }
    .validate()
}

fn stored_name(name: TensorName) -> String {
    use TensorName as T;
    let (layer, tail) = match name {
        T::Embedding => return "token_embd.weight".to_owned(),
        T::FinalNormGamma => return "output_norm.weight".to_owned(),
        T::FinalNormBeta => return "output_norm.bias".to_owned(),
        T::Head => return "output.weight".to_owned(),
        // A file of this format is never of a reward model.
        T::RewardHead => return "reward_head.weight".to_owned(),
        T::RewardBias => return "reward_head.bias".to_owned(),
        T::AttentionNormGamma(layer) => (layer, "attn_norm.weight"),
        T::AttentionNormBeta(layer) => (layer, "attn_norm.bias"),
        T::Query(layer) => (layer, "attn_q.weight"),
        T::Key(layer) => (layer, "attn_k.weight"),
        T::Value(layer) => (layer, "attn_v.weight"),
        T::Output(layer) => (layer, "attn_output.weight"),
        T::MlpNormGamma(layer) => (layer, "ffn_norm.weight"),
        T::MlpNormBeta(layer) => (layer, "ffn_norm.bias"),
        T::Up(layer) => (layer, "ffn_up.weight"),
        T::Down(layer) => (layer, "ffn_down.weight"),
    };
    format!("blk.{layer}.{tail}")
}
