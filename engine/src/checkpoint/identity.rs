//! A name for what a checkpoint computes, wherever it lies and in whichever format.

use sha2::{Digest, Sha256};

use super::{CheckpointError, CheckpointSource, TensorName};

/// Bytes of a sampled row of a tensor that count.
const SAMPLE: usize = 256;

/// Digest of the architecture, the vocabulary, and the first and last row of each tensor: another training gives another one, at the price
/// of a few reads a tensor instead of the whole file.
///
/// # Errors
/// The tokenizer or a tensor cannot be read.
pub fn identity(checkpoint: &dyn CheckpointSource) -> Result<String, CheckpointError> {
    let config = checkpoint.config();
    let mut hash = Sha256::new().chain_update(format!("{config:?}"));
    let tokenizer = checkpoint.tokenizer()?;
    for id in 0..tokenizer.vocab_size() as u32 {
        hash.update(tokenizer.piece(id));
        hash.update([0]);
    }
    for name in TensorName::all(config) {
        let [rows, cols] = name.shape(config);
        for row in [0, rows - 1] {
            let tensor = checkpoint.part(name, row..row + 1, 0..cols)?;
            for block in &tensor.blocks {
                let row = block.row(0);
                hash.update(&row[..row.len().min(SAMPLE)]);
            }
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
