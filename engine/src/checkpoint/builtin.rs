//! The small model inside the binary.

use super::CheckpointError;
use super::folder::Folder;
use super::hf::HfCheckpoint;

/// Name of the model that is part of the binary.
pub const BUILTIN_NAME: &str = "nemotron-shakespeare";

const FILES: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../../assets/nemotron-shakespeare/config.json")),
    ("generation_config.json", include_bytes!("../../assets/nemotron-shakespeare/generation_config.json")),
    ("model.safetensors", include_bytes!("../../assets/nemotron-shakespeare/model.safetensors")),
    ("tokenizer.model", include_bytes!("../../assets/nemotron-shakespeare/tokenizer.model")),
];

pub(super) fn open() -> Result<HfCheckpoint, CheckpointError> {
    HfCheckpoint::open(Folder::Embedded { name: BUILTIN_NAME, files: FILES })
}
