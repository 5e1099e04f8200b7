//! Hugging Face checkpoints: `config.json` beside `model.safetensors`, or beside shards and their index.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::Deserialize;

use super::folder::{Folder, Member, is_plain_name};
use super::grid::Values;
use super::safetensors_file::{Entry, read_header};
use super::{CheckpointError, CheckpointSource, Grid, StoredDtype, StoredTensor, TensorName};
use crate::config::ModelConfig;
use crate::tokenizer::Tokenizer;

const CONFIG: &str = "config.json";
const GENERATION_CONFIG: &str = "generation_config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The SentencePiece model is the original; `tokenizer.json` is derived from it and does not always give the same ids.
pub(super) const TOKENIZERS: [&str; 2] = ["tokenizer.model", "tokenizer.json"];
/// Files that go with a tokenizer.
pub(super) const COMPANIONS: [&str; 3] = ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];

pub(super) struct HfCheckpoint {
    folder: Folder,
    config: ModelConfig,
    weights: Vec<WeightFile>,
    /// Index into `weights` and into that file's `tensors`.
    places: HashMap<String, (usize, usize)>,
    files: Vec<(String, u64)>,
}

struct WeightFile {
    name: String,
    member: Member,
    tensors: Vec<Entry>,
}

impl HfCheckpoint {
    pub(super) fn open(folder: Folder) -> Result<Self, CheckpointError> {
        let mut files = Vec::new();
        let mut find = |name: &str| {
            let member = folder.find(name)?;
            files.extend(member.iter().map(|member| (name.to_owned(), member.len as u64)));
            Ok::<_, CheckpointError>(member)
        };

        find(CONFIG)?.ok_or_else(|| missing(&folder, "it has no config.json"))?;
        let generation_config = find(GENERATION_CONFIG)?.map(|_| folder.text(GENERATION_CONFIG)).transpose()?;
        let config = ModelConfig::from_hf_json(&folder.text(CONFIG)?, generation_config.as_deref())
            .map_err(|source| CheckpointError::Config { file: folder.path(CONFIG), source })?;

        let mut weights = Vec::new();
        let mut places = HashMap::new();
        let mut add = |name: &str, member: Member| {
            let path = folder.path(name);
            let tensors = member.read(|bytes| read_header(&path, bytes))??;
            for (i, tensor) in tensors.iter().enumerate() {
                if places.insert(tensor.name.clone(), (weights.len(), i)).is_some() {
                    return Err(CheckpointError::damaged(
                        path,
                        format!("tensor {} is in another file too", tensor.name),
                    ));
                }
            }
            weights.push(WeightFile { name: name.to_owned(), member, tensors });
            Ok(())
        };
        if let Some(member) = find(WEIGHTS)? {
            add(WEIGHTS, member)?;
        } else {
            let index = find(INDEX)?
                .ok_or_else(|| missing(&folder, "it has neither model.safetensors nor model.safetensors.index.json"))?;
            let index_path = folder.path(INDEX);
            let damaged = |problem| CheckpointError::damaged(&index_path, problem);
            let Index { weight_map } =
                serde_json::from_slice(&index.to_vec()?).map_err(|error| damaged(error.to_string()))?;
            let mut shards: Vec<_> = weight_map.values().collect();
            shards.sort_unstable();
            shards.dedup();
            for shard in shards {
                if !is_plain_name(shard) {
                    return Err(damaged(format!("{shard:?} is not the name of a file beside it")));
                }
                let member = find(shard)?.ok_or_else(|| damaged(format!("its file {shard} is missing")))?;
                add(shard, member)?;
            }
            for (tensor, shard) in &weight_map {
                if places.get(tensor).is_none_or(|(file, _)| weights[*file].name != *shard) {
                    return Err(damaged(format!("tensor {tensor} is not in {shard}")));
                }
            }
        }
        for name in TOKENIZERS {
            find(name)?;
        }

        let checkpoint = Self { folder, config, weights, places, files };
        for name in TensorName::all(&checkpoint.config) {
            checkpoint.grid(name)?;
        }
        Ok(checkpoint)
    }
}

impl CheckpointSource for HfCheckpoint {
    fn format(&self) -> &'static str {
        "Hugging Face safetensors"
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tokenizer(&self) -> Result<Tokenizer, CheckpointError> {
        let found = TOKENIZERS.into_iter().find(|name| self.files.iter().any(|(file, _)| file == name));
        self.folder.tokenizer(found)
    }

    fn companions(&self) -> Result<Vec<(String, Vec<u8>)>, CheckpointError> {
        self.folder.read_all(TOKENIZERS.iter().chain(&COMPANIONS).map(|name| (*name, *name)))
    }

    fn grid(&self, name: TensorName) -> Result<Grid, CheckpointError> {
        let tensor = stored_name(name);
        let (file, entry) = self.entry(&tensor)?;
        let path = || self.folder.path(&file.name);

        let [rows, cols] = name.shape(&self.config);
        let expected = if name.is_vector() { vec![cols] } else { vec![rows, cols] };
        if entry.shape != expected {
            return Err(CheckpointError::Shape { tensor, file: path(), found: entry.shape.clone(), expected });
        }
        let unread = || CheckpointError::Dtype { tensor: tensor.clone(), file: path(), dtype: entry.dtype.clone() };
        let dtype = entry.dtype().ok_or_else(unread)?;
        let offset = file.member.offset + entry.bytes.start;
        let grid = Grid::contiguous(dtype, Arc::clone(&file.member.file), offset, [rows, cols]);
        match dtype {
            StoredDtype::F8E4M3 => Ok(grid.with(Values::Scaled(self.scales(&format!("{tensor}_scale"), rows)?))),
            StoredDtype::Plain(_) => Ok(grid),
        }
    }

    fn stored_tensors(&self) -> Vec<StoredTensor> {
        let entries = self.weights.iter().flat_map(|file| &file.tensors);
        entries
            .filter_map(|entry| {
                Some(StoredTensor { name: entry.name.clone(), dtype: entry.dtype()?, shape: entry.shape.clone() })
            })
            .collect()
    }

    fn files(&self) -> Vec<(String, u64)> {
        self.files.clone()
    }
}

impl HfCheckpoint {
    fn entry(&self, tensor: &str) -> Result<(&WeightFile, &Entry), CheckpointError> {
        let Some(&(file, i)) = self.places.get(tensor) else {
            let path = self.folder.root().to_owned();
            return Err(CheckpointError::MissingTensor { tensor: tensor.to_owned(), path });
        };
        Ok((&self.weights[file], &self.weights[file].tensors[i]))
    }

    /// What the elements of an FP8 matrix are multiplied with: one number, or one a row.
    fn scales(&self, tensor: &str, rows: usize) -> Result<Arc<[f32]>, CheckpointError> {
        let (file, entry) = self.entry(tensor)?;
        let path = self.folder.path(&file.name);
        let Some(StoredDtype::Plain(dtype)) = entry.dtype() else {
            let dtype = entry.dtype.clone();
            return Err(CheckpointError::Dtype { tensor: tensor.to_owned(), file: path, dtype });
        };
        let count: usize = entry.shape.iter().product();
        if count != 1 && count != rows {
            let (tensor, found) = (tensor.to_owned(), entry.shape.clone());
            return Err(CheckpointError::Shape { tensor, file: path, found, expected: vec![rows, 1] });
        }
        let scales: Arc<[f32]> = file.member.read(|bytes| dtype.values(&bytes[entry.bytes.clone()]).collect())?;
        if scales.iter().all(|scale| scale.is_finite()) {
            return Ok(scales);
        }
        Err(CheckpointError::damaged(path, format!("tensor {tensor} is not finite")))
    }
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    /// File of each tensor.
    weight_map: BTreeMap<String, String>,
}

fn missing(folder: &Folder, expected: &'static str) -> CheckpointError {
    CheckpointError::NotFound { path: folder.root().to_owned(), expected }
}

pub(super) fn stored_name(name: TensorName) -> String {
    use TensorName as T;
    let (layer, tail) = match name {
        T::Embedding => return "model.embed_tokens.weight".to_owned(),
        T::FinalNormGamma => return "model.norm.weight".to_owned(),
        T::FinalNormBeta => return "model.norm.bias".to_owned(),
        T::Head => return "lm_head.weight".to_owned(),
        T::RewardHead => return "score.weight".to_owned(),
        T::RewardBias => return "score.bias".to_owned(),
        T::AttentionNormGamma(layer) => (layer, "input_layernorm.weight"),
        T::AttentionNormBeta(layer) => (layer, "input_layernorm.bias"),
        T::Query(layer) => (layer, "self_attn.q_proj.weight"),
        T::Key(layer) => (layer, "self_attn.k_proj.weight"),
        T::Value(layer) => (layer, "self_attn.v_proj.weight"),
        T::Output(layer) => (layer, "self_attn.o_proj.weight"),
        T::MlpNormGamma(layer) => (layer, "post_attention_layernorm.weight"),
        T::MlpNormBeta(layer) => (layer, "post_attention_layernorm.bias"),
        T::Up(layer) => (layer, "mlp.up_proj.weight"),
        T::Down(layer) => (layer, "mlp.down_proj.weight"),
    };
    format!("model.layers.{layer}.{tail}")
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use sha2::{Digest, Sha256};
    use tempfile::TempDir;

    use super::*;
    use crate::checkpoint::{BUILTIN_NAME, Dtype, open};
    use crate::parity_model::{self, SMALL, TINY};
    use crate::spec::ModelSource;

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden/tiny-hf")
    }

    /// A copy of the two-shard fixture.
    fn copy() -> TempDir {
        let directory = TempDir::new().unwrap();
        for entry in fs::read_dir(fixture()).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, directory.path().join(path.file_name().unwrap())).unwrap();
        }
        directory
    }

    fn open_directory(directory: &Path) -> Result<HfCheckpoint, CheckpointError> {
        HfCheckpoint::open(Folder::Directory(directory.to_owned()))
    }

    /// What opening says, with the directory's name taken out.
    fn error(directory: &TempDir) -> String {
        let text = open_directory(directory.path()).err().unwrap().to_string();
        text.replace(&directory.path().display().to_string(), "DIR")
    }

    /// Replaces text of the same length in a file.
    fn edit(directory: &TempDir, file: &str, from: &str, to: &str) {
        assert_eq!(from.len(), to.len());
        let path = directory.path().join(file);
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        fs::write(path, bytes).unwrap();
    }

    const SHARD_1: &str = "model-00001-of-00002.safetensors";
    const SHARD_2: &str = "model-00002-of-00002.safetensors";

    /// The language model's head under the name and the architecture that transformers give to a head of sequence classification.
    #[test]
    fn a_head_of_sequence_classification_is_a_reward_head() {
        let directory = copy();
        for file in [SHARD_1, INDEX] {
            edit(&directory, file, "\"lm_head.weight\":", "\"score.weight\"  :");
        }
        let path = directory.path().join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["architectures"] = serde_json::json!(["NemotronForSequenceClassification"]);
        config["num_labels"] = 1024.into();
        fs::write(&path, config.to_string()).unwrap();
        let checkpoint = open_directory(directory.path()).unwrap();
        let reward = checkpoint.config().reward.unwrap();
        assert_eq!((reward.num_attributes, reward.has_bias), (1024, false));
        assert_eq!(checkpoint.tensor(TensorName::RewardHead).unwrap().rows(), 1024);
        config["id2label"] = serde_json::json!({"0": "LABEL_0", "1": "LABEL_1"});
        fs::write(&path, config.to_string()).unwrap();
        assert!(error(&directory).starts_with("tensor score.weight has shape [1024, 128]"), "{}", error(&directory));
    }

    #[test]
    fn shards_make_one_model() {
        let checkpoint = open(&ModelSource::Path(fixture())).unwrap();
        assert_eq!(checkpoint.format(), "Hugging Face safetensors");
        assert_eq!(checkpoint.config().eos_ids, [3, 5]);
        let stored = checkpoint.stored_tensors();
        assert_eq!(stored.len(), 44);
        let parameters: usize = stored.iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
        assert_eq!(parameters as u64, checkpoint.config().num_parameters());
        let (files, sizes): (Vec<_>, Vec<_>) = checkpoint.files().into_iter().unzip();
        let index = "model.safetensors.index.json";
        assert_eq!(files, ["config.json", "generation_config.json", index, SHARD_1, SHARD_2, "tokenizer.model"]);
        assert_eq!(sizes[3], fs::metadata(fixture().join(SHARD_1)).unwrap().len());

        let down = checkpoint.tensor(TensorName::Down(3)).unwrap();
        assert_eq!((down.rows(), down.cols(), down.blocks[0].dtype), (128, 512, Dtype::Bf16));
        let file = fs::read(fixture().join(SHARD_2)).unwrap();
        let other = safetensors::SafeTensors::deserialize(&file).unwrap();
        let other = other.tensor("model.layers.3.mlp.down_proj.weight").unwrap();
        assert_eq!(down.blocks[0].row(127), &other.data()[127 * 1024..]);
    }

    #[test]
    fn a_weight_file_stands_for_its_directory() {
        let by_file = open(&ModelSource::Path(fixture().join(SHARD_2))).unwrap();
        assert_eq!(by_file.stored_tensors(), open(&ModelSource::Path(fixture())).unwrap().stored_tensors());
    }

    #[test]
    fn the_builtin_model_opens() {
        let checkpoint = open(&ModelSource::Builtin).unwrap();
        assert_eq!(checkpoint.config().num_parameters(), 6_429_184);
        assert_eq!(checkpoint.config().max_context, 1024);
        assert_eq!(checkpoint.files().len(), 4);
        assert_eq!(BUILTIN_NAME, "nemotron-shakespeare");
    }

    #[test]
    fn a_parity_model_has_the_bytes_of_its_reference() {
        let references = [
            (TINY, "b539313cda20a3c48d7dbb6e32ef7700598b6b6ff6fc0315859fd82c0ba972ee"),
            (SMALL, "cd990a48e1fbacce3135a5a4e639b51491c529b5753bbeb87d784b255d0edb51"),
        ];
        for (size, expected) in references {
            let directory = TempDir::new().unwrap();
            parity_model::write(&size, 1, directory.path()).unwrap();
            let hash = Sha256::digest(fs::read(directory.path().join(WEIGHTS)).unwrap());
            assert_eq!(format!("{hash:x}"), expected);
            open_directory(directory.path()).unwrap();
        }
    }

    #[test]
    fn how_tensors_are_spread_over_shards_does_not_matter() {
        let (one, three) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        parity_model::write(&TINY, 1, one.path()).unwrap();
        parity_model::write(&TINY, 3, three.path()).unwrap();
        let [one, three] = [one, three].map(|directory| open_directory(directory.path()).unwrap());
        assert_eq!(three.weights.len(), 3);
        for name in TensorName::all(&one.config) {
            let bytes = |checkpoint: &HfCheckpoint| {
                let tensor = checkpoint.tensor(name).unwrap();
                (0..tensor.rows()).flat_map(|row| tensor.blocks[0].row(row).to_vec()).collect::<Vec<_>>()
            };
            assert!(bytes(&one) == bytes(&three), "{name:?}");
        }
    }

    #[test]
    fn a_checkpoint_without_tokenizer_opens_and_says_so_when_asked() {
        let directory = copy();
        fs::remove_file(directory.path().join("tokenizer.model")).unwrap();
        let checkpoint = open_directory(directory.path()).unwrap();
        assert!(matches!(checkpoint.tokenizer(), Err(CheckpointError::MissingTokenizer { .. })));
    }

    #[test]
    fn tensors_that_do_not_suit_the_configuration_are_named() {
        let directory = copy();
        edit(&directory, "config.json", r#""num_hidden_layers": 4"#, r#""num_hidden_layers": 5"#);
        assert_eq!(error(&directory), "missing tensor model.layers.4.input_layernorm.weight in DIR");

        let directory = copy();
        edit(&directory, "config.json", r#""intermediate_size": 512"#, r#""intermediate_size": 256"#);
        let expected =
            "tensor model.layers.0.mlp.up_proj.weight has shape [512, 128], the configuration demands [256, 128]";
        assert_eq!(error(&directory), format!("{expected} (in DIR/{SHARD_1})"));

        let directory = copy();
        let up = r#""model.layers.3.mlp.up_proj.weight":{"dtype":"#;
        edit(&directory, SHARD_2, &format!(r#"{up}"BF16""#), &format!(r#"{up}"I16" "#));
        let expected = "tensor model.layers.3.mlp.up_proj.weight has element type I16, this engine reads bf16, f16, f32 and f8_e4m3";
        assert_eq!(error(&directory), format!("{expected} (in DIR/{SHARD_2})"));

        let directory = copy();
        edit(&directory, "config.json", r#""model_type": "nemotron""#, r#""model_type": "llama"   "#);
        assert_eq!(error(&directory), "cannot use DIR/config.json");
    }

    #[test]
    fn damaged_files_are_named() {
        let directory = copy();
        let shard = fs::OpenOptions::new().write(true).open(directory.path().join(SHARD_1)).unwrap();
        shard.set_len(100_000).unwrap();
        assert!(error(&directory).starts_with(&format!("DIR/{SHARD_1} is damaged: tensor ")), "{}", error(&directory));

        let directory = copy();
        fs::remove_file(directory.path().join(SHARD_2)).unwrap();
        assert_eq!(error(&directory), format!("DIR/{INDEX} is damaged: its file {SHARD_2} is missing"));
        std::os::unix::fs::symlink("/dev/zero", directory.path().join(SHARD_2)).unwrap();
        assert_eq!(error(&directory), format!("DIR/{SHARD_2} is a link to /dev/zero, outside of the checkpoint"));

        let directory = copy();
        fs::copy(directory.path().join(SHARD_1), directory.path().join(SHARD_2)).unwrap();
        assert!(error(&directory).ends_with("is in another file too"), "{}", error(&directory));

        let directory = copy();
        fs::write(directory.path().join("config.json"), [0xff]).unwrap();
        assert_eq!(error(&directory), "DIR/config.json is damaged: it is not UTF-8 text");
        fs::remove_file(directory.path().join("config.json")).unwrap();
        assert_eq!(error(&directory), "no checkpoint in DIR: it has no config.json");
    }

    #[test]
    fn an_index_names_only_files_beside_it() {
        for name in ["../a.safetensors", "/a.safetensors", "b/a.safetensors", "./a.safetensors", "..", "."] {
            let directory = copy();
            let index = serde_json::json!({ "weight_map": { "lm_head.weight": name } });
            fs::write(directory.path().join(INDEX), index.to_string()).unwrap();
            let expected = format!("DIR/{INDEX} is damaged: {name:?} is not the name of a file beside it");
            assert_eq!(error(&directory), expected);
        }
        let directory = copy();
        let index = serde_json::json!({ "weight_map": { "no.such.tensor": SHARD_1 } });
        fs::write(directory.path().join(INDEX), index.to_string()).unwrap();
        assert_eq!(error(&directory), format!("DIR/{INDEX} is damaged: tensor no.such.tensor is not in {SHARD_1}"));
    }

    #[test]
    fn weights_may_be_links_within_a_cache_but_not_out_of_the_folder() {
        let cache = TempDir::new().unwrap();
        let (blobs, snapshot) = (cache.path().join("blobs"), cache.path().join("snapshots/0123"));
        fs::create_dir_all(&snapshot).unwrap();
        fs::rename(copy().keep(), &blobs).unwrap();
        for entry in fs::read_dir(&blobs).unwrap() {
            let name = entry.unwrap().file_name();
            std::os::unix::fs::symlink(Path::new("../../blobs").join(&name), snapshot.join(&name)).unwrap();
        }
        open_directory(&snapshot).unwrap();

        let directory = copy();
        fs::remove_file(directory.path().join(SHARD_1)).unwrap();
        std::os::unix::fs::symlink(blobs.join(SHARD_1), directory.path().join(SHARD_1)).unwrap();
        let text = error(&directory);
        assert!(text.starts_with(&format!("DIR/{SHARD_1} is a link to ")), "{text}");
    }
}
