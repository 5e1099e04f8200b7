//! Our own shards: one safetensors file a rank of a mesh, with exactly its part of each tensor in the order of use, so that a rank reads
//! one file from beginning to end.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::folder::{Folder, Member};
use super::hf::TOKENIZERS;
use super::safetensors_file::{Entry, read_header};
use super::{CheckpointError, CheckpointSource, Grid, StoredDtype, StoredTensor, TensorName, Tile};
use crate::config::{Mesh, ModelConfig};
use crate::tokenizer::Tokenizer;

pub(super) const DESCRIPTION: &str = "nemotron.shards.json";

/// `nemotron.shards.json`
#[derive(Serialize, Deserialize)]
pub(super) struct Description {
    pub(super) schema: u32,
    pub(super) mesh: Mesh,
    pub(super) config: ModelConfig,
}

pub(super) struct ShardedCheckpoint {
    folder: Folder,
    description: Description,
    ranks: Vec<RankFile>,
}

struct RankFile {
    name: String,
    member: Member,
    tensors: Vec<Entry>,
}

/// Name of a rank's file.
pub(super) fn rank_file(rank: usize) -> String {
    format!("rank-{rank:03}.safetensors")
}

impl ShardedCheckpoint {
    pub(super) fn open(folder: Folder) -> Result<Self, CheckpointError> {
        let path = folder.path(DESCRIPTION);
        let damaged = |problem: String| CheckpointError::damaged(&path, problem);
        let description: Description =
            serde_json::from_str(&folder.text(DESCRIPTION)?).map_err(|error| damaged(error.to_string()))?;
        let Description { schema, mesh, config } = description;
        if schema != 1 {
            return Err(damaged(format!("it has schema {schema}, this version reads 1")));
        }
        let bad_config = |source| CheckpointError::Config { file: path.clone(), source };
        let config = config.validate().map_err(bad_config)?;
        mesh.check(&config).map_err(|error| damaged(error.to_string()))?;
        let mut ranks = Vec::new();
        for rank in 0..mesh.world_size() {
            let name = rank_file(rank);
            let member = folder.require(&name)?;
            let path = folder.path(&name);
            let tensors = member.read(|bytes| read_header(&path, bytes))??;
            ranks.push(RankFile { name, member, tensors });
        }
        let checkpoint = Self { folder, description: Description { schema, mesh, config }, ranks };
        for name in TensorName::all(checkpoint.config()) {
            checkpoint.grid(name)?;
        }
        Ok(checkpoint)
    }

    /// A rank's part of a tensor.
    fn part(&self, rank: usize, name: TensorName) -> Result<(StoredDtype, Tile), CheckpointError> {
        let Description { mesh, config, .. } = &self.description;
        let file = &self.ranks[rank];
        let path = || self.folder.path(&file.name);
        let tensor = name.to_string();
        let Some(entry) = file.tensors.iter().find(|entry| entry.name == tensor) else {
            return Err(CheckpointError::MissingTensor { tensor, path: path() });
        };
        let expected: Vec<usize> = name.shard(config, *mesh, rank).iter().map(|range| range.len()).collect();
        if entry.shape != expected {
            return Err(CheckpointError::Shape { tensor, file: path(), found: entry.shape.clone(), expected });
        }
        match entry.dtype() {
            Some(dtype @ StoredDtype::Plain(_)) => {
                let offset = file.member.offset + entry.bytes.start;
                let tile = Tile { file: Arc::clone(&file.member.file), offset, cols: expected[1], stride: expected[1] };
                Ok((dtype, tile))
            }
            _ => Err(CheckpointError::Dtype { tensor, file: path(), dtype: entry.dtype.clone() }),
        }
    }
}

impl CheckpointSource for ShardedCheckpoint {
    fn format(&self) -> &'static str {
        "nemotron shards"
    }

    fn config(&self) -> &ModelConfig {
        &self.description.config
    }

    fn tokenizer(&self) -> Result<Tokenizer, CheckpointError> {
        let names = self.folder.names("")?;
        self.folder.tokenizer(TOKENIZERS.into_iter().find(|name| names.contains(*name)))
    }

    fn companions(&self) -> Result<Vec<(String, Vec<u8>)>, CheckpointError> {
        self.folder.read_all(TOKENIZERS.iter().chain(&super::hf::COMPANIONS).map(|name| (*name, *name)))
    }

    fn grid(&self, name: TensorName) -> Result<Grid, CheckpointError> {
        let Description { mesh, config, .. } = &self.description;
        let holders: Vec<usize> = (0..mesh.world_size())
            .filter(|rank| TensorName::of_rank(config, *mesh, *rank).any(|it| it == name))
            .collect();
        // Every rank has all of a norm.
        let holders = if name.is_replicated() { &holders[..1] } else { &holders };
        let parts = holders.iter().map(|rank| self.part(*rank, name)).collect::<Result<Vec<_>, _>>()?;
        let dtype = parts[0].0;
        if parts.iter().any(|part| part.0 != dtype) {
            let problem = format!("tensor {name} has different element types on different ranks");
            return Err(CheckpointError::damaged(self.folder.path(DESCRIPTION), problem));
        }
        let mut grid = Grid::new(dtype);
        let [rows, _] = name.shard(config, *mesh, holders[0]);
        let tiles = parts.into_iter().map(|(_, tile)| tile);
        if matches!(name, TensorName::Output(_) | TensorName::Down(_)) {
            grid.push(rows.len(), tiles.collect());
        } else {
            tiles.for_each(|tile| grid.push(rows.len(), vec![tile]));
        }
        Ok(grid)
    }

    fn stored_tensors(&self) -> Vec<StoredTensor> {
        let of_file = |file: &RankFile| {
            let name = |entry: &Entry| format!("{}: {}", file.name, entry.name);
            let entries = file.tensors.iter();
            let stored = entries.filter_map(|entry| {
                Some(StoredTensor { name: name(entry), dtype: entry.dtype()?, shape: entry.shape.clone() })
            });
            stored.collect::<Vec<_>>()
        };
        self.ranks.iter().flat_map(of_file).collect()
    }

    fn files(&self) -> Vec<(String, u64)> {
        let small =
            TOKENIZERS.iter().chain(&[DESCRIPTION]).filter_map(|name| Some((*name, self.folder.find(name).ok()??)));
        let small = small.map(|(name, member)| (name.to_owned(), member.len as u64));
        small.chain(self.ranks.iter().map(|file| (file.name.clone(), file.member.len as u64))).collect()
    }

    fn mesh(&self) -> Option<Mesh> {
        Some(self.description.mesh)
    }
}
