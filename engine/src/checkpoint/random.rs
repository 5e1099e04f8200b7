//! A model of random weights, for measurements: as fast as a real one, and of any size without a file.

use std::ops::Range;

use super::{Block, CheckpointError, CheckpointSource, Dtype, Grid, Storage, StoredTensor, Tensor, TensorName};
use crate::config::ModelConfig;
use crate::tokenizer::Tokenizer;

/// Elements from one row to the next: rows overlap, so that the whole model takes a few megabytes of the host.
const STRIDE: usize = 8;
/// Of the weights; small enough that no activation overflows.
const SCALE: f32 = 0.02;

/// Weights that are uniform in ±0.02; norms that change nothing.
pub struct RandomWeights {
    config: ModelConfig,
    weights: Storage,
    zeros: Storage,
}

impl RandomWeights {
    pub fn new(config: ModelConfig) -> Self {
        let shapes = || TensorName::all(&config).map(|name| name.shape(&config));
        let elements = shapes().map(|[rows, cols]| rows * STRIDE + cols).max().unwrap_or(0);
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let random = (0..elements).flat_map(|_| {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let uniform = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
            half::bf16::from_f32(SCALE * uniform).to_le_bytes()
        });
        let weights = Storage::new(random.collect::<Vec<u8>>());
        let zeros = Storage::new(vec![0_u8; 2 * config.hidden_size]);
        Self { config, weights, zeros }
    }
}

impl CheckpointSource for RandomWeights {
    fn format(&self) -> &'static str {
        "random weights"
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tokenizer(&self) -> Result<Tokenizer, CheckpointError> {
        Err(CheckpointError::MissingTokenizer { path: "random weights".into() })
    }

    fn companions(&self) -> Result<Vec<(String, Vec<u8>)>, CheckpointError> {
        Ok(Vec::new())
    }

    fn grid(&self, _: TensorName) -> Result<Grid, CheckpointError> {
        let hint = "it has no files";
        Err(CheckpointError::Unsupported { path: "random weights".into(), format: "made up", hint })
    }

    fn part(&self, name: TensorName, rows: Range<usize>, cols: Range<usize>) -> Result<Tensor, CheckpointError> {
        let [whole, width] = name.shape(&self.config);
        let (storage, stride) = if whole == 1 { (&self.zeros, width) } else { (&self.weights, STRIDE) };
        let offset = 2 * (rows.start * stride + cols.start);
        let (rows, cols) = (rows.len(), cols.len());
        let block = Block { storage: storage.clone(), dtype: Dtype::Bf16, offset, rows, cols, stride };
        Ok(Tensor { blocks: vec![block] })
    }

    fn stored_tensors(&self) -> Vec<StoredTensor> {
        Vec::new()
    }

    fn files(&self) -> Vec<(String, u64)> {
        Vec::new()
    }
}
