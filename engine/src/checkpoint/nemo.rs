//! NeMo folders and `.nemo` archives: `model_config.yaml`, the tokenizer, and `model_weights` with one array for each kind of tensor, as
//! zarr or as torch_dist.

use std::collections::{BTreeMap, HashMap};

use serde_json::Value;

use super::array::{Array, Axes, MATRIX, STACKED_MATRICES, STACKED_VECTORS, VECTOR, check_shape};
use super::folder::{Folder, is_plain_name};
use super::torch_dist::TorchDist;
use super::zarr::{ZarrHeader, has_chunks};
use super::{CheckpointError, CheckpointSource, Grid, StoredTensor, TensorName};
use crate::config::ModelConfig;
use crate::tokenizer::Tokenizer;

pub(super) const CONFIG: &str = "model_config.yaml";
const WEIGHTS: &str = "model_weights";

const EMBEDDING: &str = "model.embedding.word_embeddings.weight";
const QKV: &str = "model.decoder.layers.self_attention.linear_qkv.weight";

pub(super) struct NemoCheckpoint {
    format: &'static str,
    config: ModelConfig,
    /// By the names that [`stored_place`] gives.
    arrays: HashMap<&'static str, Array>,
    folder: Folder,
    tokenizer: Option<String>,
    files: Vec<(String, u64)>,
}

/// Where the arrays come from.
enum Backend {
    Zarr,
    TorchDist(TorchDist),
}

impl NemoCheckpoint {
    /// Unless `require_data`, the zarr arrays may all be metadata alone.
    pub(super) fn open(folder: Folder, require_data: bool) -> Result<Self, CheckpointError> {
        let names = folder.names("")?;
        if names.iter().any(|name| name == "model_weights.ckpt" || rank_folder(name)) {
            let format = "a NeMo folder with torch weights";
            let hint = "convert it to Hugging Face safetensors first";
            return Err(CheckpointError::Unsupported { path: folder.root().to_owned(), format, hint });
        }
        let mut backend = backend(&folder)?;
        let stored_names: BTreeMap<String, String> = match &backend {
            Backend::Zarr => folder.names(WEIGHTS)?.into_iter().map(|name| (logical(&name).to_owned(), name)).collect(),
            Backend::TorchDist(file) => file.names().map(|name| (logical(name).to_owned(), name.to_owned())).collect(),
        };
        let weights = folder.path(WEIGHTS);
        let stored_name = |name: &str| {
            let missing = || CheckpointError::MissingTensor { tensor: name.to_owned(), path: weights.clone() };
            stored_names.get(logical(name)).ok_or_else(missing)
        };
        let zarr = |name: &str, axes| ZarrHeader::open(&folder, format!("{WEIGHTS}/{}", stored_name(name)?), axes);

        let config_path = folder.path(CONFIG);
        let config_text = folder.text(CONFIG)?;
        let bad_config = |source| CheckpointError::Config { file: config_path.clone(), source };
        let vocab_size = match &backend {
            Backend::Zarr => zarr(EMBEDDING, MATRIX)?.shape[1],
            Backend::TorchDist(file) => file.shape(stored_name(EMBEDDING)?, MATRIX)?[1],
        };
        let config = ModelConfig::from_nemo_yaml(&config_text, vocab_size).map_err(bad_config)?;
        let tokenizer = super::nemo_config::tokenizer_file(&config_text).map_err(bad_config)?;
        let tokenizer = tokenizer.filter(|name| is_plain_name(name) && names.contains(name));
        // A path may be that of the machine that trained.
        let tokenizer = tokenizer.or_else(|| names.iter().find(|name| name.ends_with(".model")).cloned());

        let mut files = vec![(CONFIG.to_owned(), config_text.len() as u64)];
        if let Some(name) = &tokenizer {
            files.push((name.clone(), folder.require(name)?.len as u64));
        }
        let mut has_data = require_data;
        if !require_data && matches!(backend, Backend::Zarr) {
            for name in TensorName::all(&ModelConfig { num_layers: 1, ..config.clone() }) {
                has_data |= has_chunks(&folder, &format!("{WEIGHTS}/{}", stored_name(stored_place(name).0)?))?;
            }
        }
        let mut arrays = HashMap::new();
        // The tensors of one layer name every array.
        let one_layer = ModelConfig { num_layers: 1, ..config.clone() };
        for name in TensorName::all(&one_layer) {
            let (stored, axes, _) = stored_place(name);
            if arrays.contains_key(stored) {
                continue;
            }
            let [rows, cols] =
                if stored == QKV { [config.qkv_size(), config.hidden_size] } else { name.shape(&config) };
            let layers = if axes.contains(&0) { config.num_layers } else { 1 };
            let expected = [layers, rows, cols];
            let array = match &mut backend {
                Backend::Zarr => {
                    let header = zarr(stored, axes)?;
                    let stored_name = stored_name(stored)?;
                    let directory = weights.join(stored_name);
                    check_shape(stored_name, axes, header.shape, expected, &directory)?;
                    let (array, chunks) = header.find_chunks(&folder, has_data)?;
                    files.extend(chunks);
                    array
                }
                Backend::TorchDist(file) => file.array(&folder, stored_name(stored)?, axes, expected)?,
            };
            arrays.insert(stored, array);
        }
        let format = match (backend, &folder) {
            (Backend::Zarr, Folder::Archive(_)) => "NeMo archive (zarr)",
            (Backend::Zarr, _) => "NeMo folder (zarr)",
            (Backend::TorchDist(file), folder) => {
                files.extend(file.files().map(|(name, bytes)| (format!("{WEIGHTS}/{name}"), bytes)));
                if matches!(folder, Folder::Archive(_)) {
                    "NeMo archive (torch_dist)"
                } else {
                    "NeMo folder (torch_dist)"
                }
            }
        };
        Ok(Self { format, config, arrays, folder, tokenizer, files })
    }
}

impl CheckpointSource for NemoCheckpoint {
    fn format(&self) -> &'static str {
        self.format
    }

    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn tokenizer(&self) -> Result<Tokenizer, CheckpointError> {
        self.folder.tokenizer(self.tokenizer.as_deref())
    }

    fn companions(&self) -> Result<Vec<(String, Vec<u8>)>, CheckpointError> {
        self.folder.read_all(self.tokenizer.iter().map(|name| (name.as_str(), "tokenizer.model")))
    }

    fn grid(&self, name: TensorName) -> Result<Grid, CheckpointError> {
        let (stored, _, layer) = stored_place(name);
        let matrix = self.arrays[stored].layer(layer);
        // The rows of each KV head lie together: its query heads, its key, its value.
        let config = &self.config;
        let head = config.head_dim;
        let query = config.num_heads / config.num_kv_heads * head;
        let rows = match name {
            TensorName::Query(_) => 0..query,
            TensorName::Key(_) => query..query + head,
            TensorName::Value(_) => query + head..query + 2 * head,
            _ => return Ok(matrix),
        };
        let first_rows = (0..config.num_kv_heads).map(|group| group * (query + 2 * head));
        Ok(matrix.select_rows(first_rows.map(|first| first + rows.start..first + rows.end)))
    }

    fn stored_tensors(&self) -> Vec<StoredTensor> {
        let mut tensors: Vec<_> = self
            .arrays
            .values()
            .map(|array| StoredTensor { name: array.name.clone(), dtype: array.dtype, shape: array.stored_shape() })
            .collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        tensors
    }

    fn files(&self) -> Vec<(String, u64)> {
        if let Folder::Archive(archive) = &self.folder {
            return vec![(archive.file.name(), archive.file.num_bytes())];
        }
        self.files.clone()
    }
}

/// The array that has a tensor, the array's axes, and the tensor's layer in it.
fn stored_place(name: TensorName) -> (&'static str, Axes, usize) {
    use TensorName as T;
    match name {
        T::Embedding => (EMBEDDING, MATRIX, 0),
        T::AttentionNormGamma(layer) => {
            ("model.decoder.layers.self_attention.linear_qkv.layer_norm_weight", STACKED_VECTORS, layer)
        }
        T::AttentionNormBeta(layer) => {
            ("model.decoder.layers.self_attention.linear_qkv.layer_norm_bias", STACKED_VECTORS, layer)
        }
        T::Query(layer) | T::Key(layer) | T::Value(layer) => (QKV, STACKED_MATRICES, layer),
        T::Output(layer) => ("model.decoder.layers.self_attention.linear_proj.weight", STACKED_MATRICES, layer),
        T::MlpNormGamma(layer) => ("model.decoder.layers.mlp.linear_fc1.layer_norm_weight", STACKED_VECTORS, layer),
        T::MlpNormBeta(layer) => ("model.decoder.layers.mlp.linear_fc1.layer_norm_bias", STACKED_VECTORS, layer),
        T::Up(layer) => ("model.decoder.layers.mlp.linear_fc1.weight", STACKED_MATRICES, layer),
        T::Down(layer) => ("model.decoder.layers.mlp.linear_fc2.weight", STACKED_MATRICES, layer),
        T::FinalNormGamma => ("model.decoder.final_layernorm.weight", VECTOR, 0),
        T::FinalNormBeta => ("model.decoder.final_layernorm.bias", VECTOR, 0),
        T::Head => ("model.output_layer.weight", MATRIX, 0),
        T::RewardHead => ("model.rm_head.weight", MATRIX, 0),
        T::RewardBias => ("model.rm_head.bias", VECTOR, 0),
    }
}

/// A name without the modules that wrap the model, of which writers have put more or fewer around it.
fn logical(name: &str) -> &str {
    let mut rest = name;
    while let Some((module, inner)) = rest.split_once('.')
        && matches!(module, "model" | "module" | "decoder")
    {
        rest = inner;
    }
    rest
}

/// Whether a folder is that of one rank, as Megatron's checkpoints of before its distributed formats have them.
fn rank_folder(name: &str) -> bool {
    name.starts_with("mp_rank_") || name.starts_with("tp_rank_")
}

fn backend(folder: &Folder) -> Result<Backend, CheckpointError> {
    let name = format!("{WEIGHTS}/metadata.json");
    let path = folder.path(&name);
    let metadata: Value = serde_json::from_slice(&folder.require(&name)?.to_vec()?)
        .map_err(|error| CheckpointError::damaged(&path, error.to_string()))?;
    match metadata.get("sharded_backend").and_then(Value::as_str) {
        Some("zarr") => Ok(Backend::Zarr),
        Some("torch_dist") => Ok(Backend::TorchDist(TorchDist::open(folder, WEIGHTS)?)),
        _ => Err(CheckpointError::damaged(path, "its sharded_backend is neither zarr nor torch_dist")),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use tempfile::TempDir;

    use super::*;
    use crate::checkpoint::{Dtype, StoredDtype, Tensor, open};
    use crate::spec::ModelSource;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden").join(name)
    }

    fn copy_tree(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            let target = to.join(entry.file_name());
            if entry.path().is_dir() {
                copy_tree(&entry.path(), &target);
            } else {
                fs::copy(entry.path(), target).unwrap();
            }
        }
    }

    fn copy() -> TempDir {
        let directory = TempDir::new().unwrap();
        copy_tree(&fixture("tiny-nemo"), directory.path());
        directory
    }

    fn error(directory: &TempDir) -> String {
        let folder = Folder::Directory(directory.path().to_owned());
        let text = NemoCheckpoint::open(folder, true).err().unwrap().to_string();
        text.replace(&directory.path().display().to_string(), "DIR")
    }

    fn bytes(tensor: &Tensor) -> Vec<u8> {
        tensor.blocks.iter().flat_map(|block| (0..block.rows).flat_map(|row| block.row(row).to_vec())).collect()
    }

    fn assert_equals_tiny_hf(directory: &Path) {
        let [hf, nemo] = [fixture("tiny-hf"), directory.to_owned()].map(|path| open(&ModelSource::Path(path)).unwrap());
        for name in TensorName::all(hf.config()) {
            let [hf, nemo] = [&hf, &nemo].map(|checkpoint| checkpoint.tensor(name).unwrap());
            assert_eq!((hf.rows(), hf.cols()), (nemo.rows(), nemo.cols()), "{name:?}");
            assert!(bytes(&hf) == bytes(&nemo), "{name:?}");
        }
    }

    /// Writes an array of the fixture anew with chunks of another shape.
    fn rechunk(directory: &TempDir, name: &str, axes: Axes, chunks: &[usize]) {
        let path = directory.path().join(WEIGHTS).join(name);
        let folder = Folder::Directory(directory.path().to_owned());
        let header = ZarrHeader::open(&folder, format!("{WEIGHTS}/{name}"), axes).unwrap();
        let [num_layers, rows, cols] = header.shape;
        let (array, _) = header.find_chunks(&folder, true).unwrap();
        let layer_bytes = |layer| bytes(&array.layer(layer).part(0..rows, 0..cols).unwrap());
        let layers: Vec<_> = (0..num_layers).map(layer_bytes).collect();
        let mut chunk = [1; 3];
        for (&axis, &size) in axes.iter().zip(chunks) {
            chunk[axis] = size;
        }
        for entry in fs::read_dir(&path).unwrap() {
            let file = entry.unwrap().path();
            if !file.ends_with(".zarray") {
                fs::remove_file(file).unwrap();
            }
        }
        for i in 0..num_layers / chunk[0] {
            for j in 0..rows / chunk[1] {
                for k in 0..cols / chunk[2] {
                    let mut content = Vec::new();
                    for layer in &layers[i * chunk[0]..(i + 1) * chunk[0]] {
                        for row in j * chunk[1]..(j + 1) * chunk[1] {
                            let start = (row * cols + k * chunk[2]) * 2;
                            content.extend_from_slice(&layer[start..start + chunk[2] * 2]);
                        }
                    }
                    let coordinates: Vec<_> = axes.iter().map(|&axis| [i, j, k][axis].to_string()).collect();
                    fs::write(path.join(coordinates.join(".")), content).unwrap();
                }
            }
        }
        let metadata = fs::read(path.join(".zarray")).unwrap();
        let mut metadata: Value = serde_json::from_slice(&metadata).unwrap();
        metadata["chunks"] = chunks.into();
        fs::write(path.join(".zarray"), metadata.to_string()).unwrap();
    }

    const FC1: &str = "model.decoder.layers.mlp.linear_fc1.weight";
    const FC2: &str = "model.decoder.layers.mlp.linear_fc2.weight";
    const NORM: &str = "model.decoder.layers.mlp.linear_fc1.layer_norm_bias";

    #[test]
    fn the_same_weights_give_the_same_tensors_as_hugging_face_files() {
        assert_equals_tiny_hf(&fixture("tiny-nemo"));
        let checkpoint = open(&ModelSource::Path(fixture("tiny-nemo"))).unwrap();
        assert_eq!(checkpoint.format(), "NeMo folder (zarr)");
        let stored = checkpoint.stored_tensors();
        assert_eq!(stored.len(), 12);
        let parameters: usize = stored.iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
        assert_eq!(parameters as u64, checkpoint.config().num_parameters());
        let expected =
            StoredTensor { name: FC1.to_owned(), dtype: StoredDtype::Plain(Dtype::Bf16), shape: vec![4, 512, 128] };
        assert!(stored.contains(&expected));
        // The configuration, the tokenizer, and the chunks of 2 vectors, 4 stacked vectors, 4 stacked and 2 other matrices.
        assert_eq!(checkpoint.files().len(), 2 + 2 + 4 * 4 + 4 * 4 * 2 + 2 * 2);
    }

    #[test]
    fn any_even_division_into_chunks_gives_the_same_tensors() {
        let directory = copy();
        rechunk(&directory, EMBEDDING, MATRIX, &[1024, 128]);
        rechunk(&directory, QKV, STACKED_MATRICES, &[1, 24, 128]);
        rechunk(&directory, FC1, STACKED_MATRICES, &[2, 128, 64]);
        rechunk(&directory, FC2, STACKED_MATRICES, &[4, 128, 512]);
        rechunk(&directory, NORM, STACKED_VECTORS, &[2, 32]);
        assert_equals_tiny_hf(directory.path());
    }

    #[test]
    fn rows_in_whole_chunks_are_not_copied() {
        let checkpoint = NemoCheckpoint::open(Folder::Directory(fixture("tiny-nemo")), true).unwrap();
        assert_eq!(checkpoint.tensor(TensorName::Up(0)).unwrap().blocks.len(), 2);
        assert_eq!(checkpoint.tensor(TensorName::Query(0)).unwrap().blocks.len(), 2);
        assert_eq!(checkpoint.tensor(TensorName::Down(0)).unwrap().blocks.len(), 1);
    }

    #[test]
    fn modules_around_the_model_do_not_matter() {
        let directory = copy();
        let weights = directory.path().join(WEIGHTS);
        fs::rename(weights.join(FC1), weights.join("model.module.decoder.layers.mlp.linear_fc1.weight")).unwrap();
        fs::rename(weights.join(EMBEDDING), weights.join("embedding.word_embeddings.weight")).unwrap();
        assert_equals_tiny_hf(directory.path());
    }

    #[test]
    fn the_tokenizer_may_have_been_renamed() {
        let directory = copy();
        let old = directory.path().join("d60cadf1a41c651e1f0ade50136bad43_tiny.model");
        fs::rename(old, directory.path().join("other.model")).unwrap();
        let checkpoint = NemoCheckpoint::open(Folder::Directory(directory.path().to_owned()), true).unwrap();
        assert_eq!(checkpoint.tokenizer.as_deref(), Some("other.model"));
    }

    #[test]
    fn damaged_arrays_are_named() {
        let change = |key: &str, value: Value, expected: &str| {
            let directory = copy();
            let file = directory.path().join(WEIGHTS).join(FC1).join(".zarray");
            let mut metadata: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
            metadata[key] = value;
            fs::write(file, metadata.to_string()).unwrap();
            assert_eq!(error(&directory), expected);
        };
        let array = format!("DIR/{WEIGHTS}/{FC1}");
        let damaged = |problem: &str| format!("{array}/.zarray is damaged: {problem}");
        let compressed = damaged("its chunks are compressed or filtered, and only raw chunks can be read");
        change("compressor", serde_json::json!({ "id": "blosc" }), &compressed);
        change("zarr_format", 3.into(), &damaged("it is not zarr version 2 in C order"));
        change("dimension_separator", "/".into(), &damaged("its dimension_separator is not a dot"));
        for chunks in [[0, 256, 128], [1, 200, 128], [1, 1024, 128]] {
            change("chunks", chunks.as_slice().into(), &damaged("its chunks do not divide its shape"));
        }
        change("shape", [512, 128].as_slice().into(), &damaged("it has 2 axes instead of 3"));
        change(
            "shape",
            [usize::MAX - usize::MAX % 256, 512, 128].as_slice().into(),
            &format!(
                "tensor {FC1} has shape [{}, 512, 128], the configuration demands [4, 512, 128] (in {array})",
                usize::MAX - usize::MAX % 256
            ),
        );
        let types = "this engine reads bf16, f16, f32 and f8_e4m3";
        change("dtype", "<i2".into(), &format!("tensor {FC1} has element type <i2, {types} (in {array}/.zarray)"));
        // The chunks are those of another type.
        let size = "is damaged: it has 65536 bytes instead of 131072";
        change("dtype", "<f4".into(), &format!("{array}/0.0.0 {size}"));
    }

    #[test]
    fn missing_and_cut_chunks_are_named() {
        let directory = copy();
        let weights = directory.path().join(WEIGHTS);
        fs::write(weights.join(FC2).join("3.0.1"), [0; 10]).unwrap();
        let expected = format!("DIR/{WEIGHTS}/{FC2}/3.0.1 is damaged: it has 10 bytes instead of 65536");
        assert_eq!(error(&directory), expected);
        fs::remove_file(weights.join(FC2).join("3.0.1")).unwrap();
        assert_eq!(error(&directory), format!("cannot read DIR/{WEIGHTS}/{FC2}/3.0.1"));
        fs::remove_dir_all(weights.join(FC2)).unwrap();
        assert_eq!(error(&directory), format!("missing tensor {FC2} in DIR/{WEIGHTS}"));
    }

    #[test]
    fn torch_weights_are_refused_by_name() {
        let directory = copy();
        fs::write(directory.path().join("model_weights.ckpt"), "").unwrap();
        let hint = "which this version does not read; convert it to Hugging Face safetensors first";
        assert_eq!(error(&directory), format!("DIR is a NeMo folder with torch weights, {hint}"));
    }
}
