//! Which format a checkpoint has.

use std::fs;
use std::path::{Path, PathBuf};

use super::archive::Archive;
use super::folder::Folder;
use super::gguf::GgufCheckpoint;
use super::hf::HfCheckpoint;
use super::nemo::NemoCheckpoint;
use super::sharded::{self, ShardedCheckpoint};
use super::{CheckpointError, CheckpointSource, Manifest, builtin};
use crate::config::Mesh;
use crate::spec::ModelSource;

/// Opens a checkpoint and checks that it has every tensor of its model, without reading any weight: headers are read, and the sizes of
/// files compared with what the headers promise. A checkpoint that is half copied is found here, in milliseconds.
///
/// A path is a directory, a `.nemo` or `.gguf` file, or a `.safetensors` file, which stands for its directory.
///
/// # Errors
/// There is no checkpoint, its format or architecture is another, or it is incomplete or damaged.
pub fn open(source: &ModelSource) -> Result<Box<dyn CheckpointSource>, CheckpointError> {
    open_with(source, true)
}

/// Like [`open`], but a NeMo folder may have the metadata of its arrays without any data: enough to describe it and to plan for it.
///
/// # Errors
/// Those of [`open`].
pub fn open_headers(source: &ModelSource) -> Result<Box<dyn CheckpointSource>, CheckpointError> {
    open_with(source, false)
}

/// Opens a checkpoint for the ranks of a mesh.
///
/// # Errors
/// Those of [`open`], or the files are cut for another mesh.
pub fn open_for(source: &ModelSource, mesh: Mesh) -> Result<Box<dyn CheckpointSource>, CheckpointError> {
    let checkpoint = open(source)?;
    if let (Some(found), ModelSource::Path(path)) = (checkpoint.mesh().filter(|found| *found != mesh), source) {
        return Err(CheckpointError::Mesh { path: path.clone(), found, wanted: mesh });
    }
    Ok(checkpoint)
}

/// What must hold before ranks are started: the checkpoint is complete, suits the mesh, and has a tokenizer.
///
/// It reads headers and sizes, so that it may run on a login node and again on every node of a job.
///
/// # Errors
/// Those of [`open_for`], and the tokenizer's.
pub fn preflight(source: &ModelSource, mesh: Mesh) -> Result<(), CheckpointError> {
    open_for(source, mesh)?.tokenizer()?;
    Ok(())
}

fn open_with(source: &ModelSource, require_data: bool) -> Result<Box<dyn CheckpointSource>, CheckpointError> {
    let checkpoint = match source {
        ModelSource::Builtin => return Ok(Box::new(builtin::open()?)),
        ModelSource::Path(path) => open_path(path, require_data)?,
    };
    if let Some(manifest) = Manifest::of(source)? {
        manifest.check_without_weights(&*checkpoint)?;
    }
    Ok(checkpoint)
}

fn open_path(path: &Path, require_data: bool) -> Result<Box<dyn CheckpointSource>, CheckpointError> {
    let metadata = fs::metadata(path).map_err(|source| CheckpointError::Io { path: path.to_owned(), source })?;
    if !metadata.is_dir() {
        return open_file(path, require_data);
    }
    let folder = Folder::Directory(path.to_owned());
    let has = |name: &str| path.join(name).exists();
    if has("model_config.yaml") {
        return Ok(Box::new(NemoCheckpoint::open(folder, require_data)?));
    }
    if has(sharded::DESCRIPTION) {
        return Ok(Box::new(ShardedCheckpoint::open(folder)?));
    }
    if has("config.json") {
        return Ok(Box::new(HfCheckpoint::open(folder)?));
    }
    if has("weights") && has("context") {
        let hint = "convert it to Hugging Face safetensors first";
        return Err(CheckpointError::Unsupported { path: path.to_owned(), format: "a NeMo 2 checkpoint", hint });
    }
    // A directory with one file in it stands for that file.
    let mut files: Vec<PathBuf> = folder.names("")?.iter().map(|name| path.join(name)).collect();
    files.retain(|file| matches!(extension(file), "nemo" | "gguf"));
    match &*files {
        [file] => open_file(file, require_data),
        [] => {
            let expected =
                "it has neither config.json (Hugging Face) nor model_config.yaml (NeMo), and no .nemo or .gguf file";
            Err(CheckpointError::NotFound { path: path.to_owned(), expected })
        }
        _ => {
            let expected = "it has several .nemo or .gguf files; name one of them";
            Err(CheckpointError::NotFound { path: path.to_owned(), expected })
        }
    }
}

fn open_file(path: &Path, require_data: bool) -> Result<Box<dyn CheckpointSource>, CheckpointError> {
    match extension(path) {
        "nemo" => {
            let folder = Folder::Archive(Archive::open(path.to_owned())?);
            Ok(Box::new(NemoCheckpoint::open(folder, require_data)?))
        }
        "gguf" => Ok(Box::new(GgufCheckpoint::open(path.to_owned())?)),
        "safetensors" => {
            // The parent of a bare file name is empty and means the current directory.
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            open_path(parent.unwrap_or(Path::new(".")), require_data)
        }
        _ => {
            let expected = "it is neither a directory nor a .safetensors, .nemo or .gguf file";
            Err(CheckpointError::NotFound { path: path.to_owned(), expected })
        }
    }
}

fn extension(path: &Path) -> &str {
    path.extension().and_then(|extension| extension.to_str()).unwrap_or_default()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use tempfile::TempDir;

    use super::*;

    /// What opening a directory with the given empty files says, with the directory's name taken out.
    fn error(files: &[&str], path: &str) -> String {
        let directory = TempDir::new().unwrap();
        for file in files {
            let file = directory.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "").unwrap();
        }
        let text = open(&ModelSource::Path(directory.path().join(path))).err().unwrap().to_string();
        text.replace(&directory.path().display().to_string(), "DIR")
    }

    #[test]
    fn formats_that_cannot_be_read_are_named() {
        let nemo_2 = error(&["weights/metadata.json", "context/model.yaml"], ".");
        assert!(nemo_2.contains("is a NeMo 2 checkpoint, which this version does not read"), "{nemo_2}");
    }

    #[test]
    fn what_is_no_checkpoint_is_told_what_is_missing() {
        assert_eq!(error(&[], "none"), "cannot read DIR/none");
        let expected =
            "it has neither config.json (Hugging Face) nor model_config.yaml (NeMo), and no .nemo or .gguf file";
        assert_eq!(error(&["model.safetensors"], ""), format!("no checkpoint in DIR/: {expected}"));
        assert_eq!(error(&["model.safetensors"], "model.safetensors"), format!("no checkpoint in DIR: {expected}"));
        let expected = "it is neither a directory nor a .safetensors, .nemo or .gguf file";
        assert_eq!(error(&["config.json"], "config.json"), format!("no checkpoint in DIR/config.json: {expected}"));
    }
}
