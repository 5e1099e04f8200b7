//! Nemotron models with pseudo-random weights of named sizes, for tests that compare with recorded outputs of another implementation.
//!
//! Element i of a tensor is a hash of seed, tensor name and i, scaled to the tensor's standard deviation and rounded to bf16: the same
//! bytes in every language and on every machine. The head also carries a share of the embedding, permuted, which plants one likely
//! successor for each token; whether it wins is up to attention and MLP, so that greedy text depends on all of the context.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::thread;

use serde_json::json;

const SEED: u64 = 340;
/// Standard deviation of the hash's integers.
const UNIT_STD: f64 = 37_837.226_8;
const LOGIT_STD: f64 = 2.5;
/// Variance that all layers together add to the residual stream; the embedding adds 1.
const RESIDUAL_VARIANCE: f64 = 2.0;
/// Standard deviation of an element of a query or key.
const QUERY_KEY_STD: f64 = 1.3;

/// Sizes of a model.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    pub(crate) layers: usize,
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) ffn: usize,
    pub(crate) vocab: usize,
}

/// 1.8 M parameters.
pub(crate) const TINY: Size =
    Size { layers: 4, hidden: 128, heads: 4, kv_heads: 2, head_dim: 32, ffn: 512, vocab: 4096 };
/// 50 M parameters.
pub(crate) const SMALL: Size =
    Size { layers: 12, hidden: 512, heads: 8, kv_heads: 2, head_dim: 64, ffn: 2048, vocab: 16_384 };

/// Writes `config.json` and the weights into an existing directory, as one file or as `shards` files with an index. There is no tokenizer.
pub(crate) fn write(size: &Size, shards: usize, directory: &Path) -> io::Result<()> {
    let tensors = tensors(size);
    let mut weight_map = BTreeMap::new();
    for (i, shard) in tensors.chunks(tensors.len().div_ceil(shards)).enumerate() {
        let file = if shards == 1 {
            "model.safetensors".to_owned()
        } else {
            format!("model-{:05}-of-{shards:05}.safetensors", i + 1)
        };
        fs::write(directory.join(&file), safetensors(size, shard))?;
        weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), file.clone())));
    }
    if shards > 1 {
        let total_size: usize = tensors.iter().map(Tensor::num_bytes).sum();
        let index = json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
        fs::write(directory.join("model.safetensors.index.json"), index.to_string())?;
    }
    fs::write(directory.join("config.json"), config(size).to_string())
}

fn config(size: &Size) -> serde_json::Value {
    json!({
        "architectures": ["NemotronForCausalLM"],
        "model_type": "nemotron",
        "attention_bias": false,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "head_dim": size.head_dim,
        "hidden_act": "relu2",
        "hidden_size": size.hidden,
        "intermediate_size": size.ffn,
        "max_position_embeddings": 4096,
        "mlp_bias": false,
        "norm_eps": 1e-05,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
        "vocab_size": size.vocab,
    })
}

struct Tensor {
    name: String,
    /// [rows, columns]; a vector has no rows
    shape: Vec<usize>,
    std: f64,
}

impl Tensor {
    fn num_bytes(&self) -> usize {
        2 * self.shape.iter().product::<usize>()
    }
}

/// All tensors in the order of their bytes.
fn tensors(size: &Size) -> Vec<Tensor> {
    let Size { layers, hidden, ffn, vocab, .. } = *size;
    let (query, key) = (size.heads * size.head_dim, size.kv_heads * size.head_dim);
    let root = |n: usize| (n as f64).sqrt();
    let sublayer = (RESIDUAL_VARIANCE / (2 * layers) as f64).sqrt();
    let tensor = |name: &str, shape: &[usize], std| Tensor { name: name.to_owned(), shape: shape.to_vec(), std };
    let mut tensors = vec![tensor("model.embed_tokens.weight", &[vocab, hidden], 1.0)];
    for i in 0..layers {
        let tensor = |tail: &str, shape: &[usize], std| tensor(&format!("model.layers.{i}.{tail}"), shape, std);
        tensors.extend([
            tensor("input_layernorm.bias", &[hidden], 0.02),
            tensor("input_layernorm.weight", &[hidden], 0.05),
            tensor("mlp.down_proj.weight", &[hidden, ffn], sublayer / (1.2247 * root(ffn))),
            tensor("mlp.up_proj.weight", &[ffn, hidden], 1.0 / root(hidden)),
            tensor("post_attention_layernorm.bias", &[hidden], 0.02),
            tensor("post_attention_layernorm.weight", &[hidden], 0.05),
            tensor("self_attn.k_proj.weight", &[key, hidden], QUERY_KEY_STD / root(hidden)),
            tensor("self_attn.o_proj.weight", &[hidden, query], 2.0 * sublayer / root(query)),
            tensor("self_attn.q_proj.weight", &[query, hidden], QUERY_KEY_STD / root(hidden)),
            tensor("self_attn.v_proj.weight", &[key, hidden], 1.0 / root(hidden)),
        ]);
    }
    tensors.extend([
        tensor("model.norm.bias", &[hidden], 0.02),
        tensor("model.norm.weight", &[hidden], 0.05),
        tensor("lm_head.weight", &[vocab, hidden], LOGIT_STD / root(hidden)),
    ]);
    tensors
}

/// The bytes of a safetensors file.
fn safetensors(size: &Size, tensors: &[Tensor]) -> Vec<u8> {
    let mut header = r#"{"__metadata__":{"format":"pt"}"#.to_owned();
    let mut end = 0;
    for tensor in tensors {
        let start = end;
        end += tensor.num_bytes();
        let (name, shape) = (&tensor.name, json!(tensor.shape));
        header += &format!(r#","{name}":{{"dtype":"BF16","shape":{shape},"data_offsets":[{start},{end}]}}"#);
    }
    header.push('}');
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());

    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    let data_start = file.len();
    file.resize(data_start + end, 0);
    let mut rest = &mut file[data_start..];
    for tensor in tensors {
        let (bytes, after) = rest.split_at_mut(tensor.num_bytes());
        fill(size, tensor, bytes);
        rest = after;
    }
    file
}

/// Computes the elements of a tensor, in parallel where that pays.
fn fill(size: &Size, tensor: &Tensor, bytes: &mut [u8]) {
    const ELEMENTS_PER_THREAD: usize = 1 << 16;
    let row = tensor.shape[tensor.shape.len() - 1];
    let threads = thread::available_parallelism().map_or(1, usize::from).min(bytes.len() / 2 / ELEMENTS_PER_THREAD + 1);
    let rows_per_thread = (bytes.len() / 2 / row).div_ceil(threads);
    let key = key(&tensor.name);
    let head = (tensor.name == "lm_head.weight").then(|| Successors::new(size));
    thread::scope(|scope| {
        for (part, bytes) in bytes.chunks_mut(2 * row * rows_per_thread).enumerate() {
            let head = &head;
            scope.spawn(move || {
                for (i, bytes) in bytes.chunks_exact_mut(2 * row).enumerate() {
                    let i = part * rows_per_thread + i;
                    for (col, bytes) in bytes.chunks_exact_mut(2).enumerate() {
                        let mut x = element(key, i * row + col, tensor.std);
                        if let Some(head) = head {
                            x += head.planted(i, col);
                        }
                        bytes.copy_from_slice(&bf16(x).to_le_bytes());
                    }
                }
            });
        }
    });
}

/// The map t → a·t + c mod V, one cycle through the vocabulary, that the head plants.
struct Successors {
    vocab: usize,
    hidden: usize,
    inverse: usize,
    gain: f32,
    embedding: u64,
}

impl Successors {
    const OFFSET: usize = 12_345;

    fn new(size: &Size) -> Self {
        let Size { vocab, hidden, .. } = *size;
        let step = if vocab.is_multiple_of(5) { 20 } else { 4 };
        let factor = 1 + step * ((0.618 * vocab as f64 / step as f64) as usize);
        let inverse = (1..vocab).find(|inverse| factor * inverse % vocab == 1).expect("the map is one cycle");
        let gain = (2.0 * (vocab as f64).ln()).sqrt() * LOGIT_STD * (1.0 + RESIDUAL_VARIANCE).sqrt() / hidden as f64;
        Self { vocab, hidden, inverse, gain: gain as f32, embedding: key("model.embed_tokens.weight") }
    }

    /// What is added to an element of the head: the gain times the embedding of the token that `row` succeeds.
    fn planted(&self, row: usize, col: usize) -> f32 {
        let token = (row + self.vocab - Self::OFFSET % self.vocab) * self.inverse % self.vocab;
        let embedding = bf16(element(self.embedding, token * self.hidden + col, 1.0));
        self.gain * f32::from_bits(u32::from(embedding) << 16)
    }
}

/// FNV-1a of seed and name.
fn key(tensor: &str) -> u64 {
    format!("{SEED}:{tensor}")
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

fn element(key: u64, i: usize, std: f64) -> f32 {
    // The finaliser of SplitMix64; its four 16-bit lanes add up to about a normal distribution.
    let mut z = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(key);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    let sum: i32 = [0, 16, 32, 48].iter().map(|shift| (z >> shift & 0xffff) as i32).sum();
    (sum - 131_070) as f32 * (std / UNIT_STD) as f32
}

/// Rounds to nearest, ties to even.
fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}
