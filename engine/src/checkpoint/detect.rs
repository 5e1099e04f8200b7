//! Which format a checkpoint has.

use std::fs;
use std::path::{Path, PathBuf};

use super::folder::Folder;
use super::hf::HfCheckpoint;
use super::nemo::NemoCheckpoint;
use super::{CheckpointError, CheckpointSource, builtin};
use crate::spec::ModelSource;

/// Opens a checkpoint and checks that it has every tensor of its model, without reading any weight.
///
/// A path is a directory, or a `.safetensors` file, which stands for its directory.
///
/// # Errors
/// There is no checkpoint, its format or architecture is another, or it is incomplete or damaged.
pub fn open(source: &ModelSource) -> Result<Box<dyn CheckpointSource>, CheckpointError> {
    let path = match source {
        ModelSource::Builtin => return Ok(Box::new(builtin::open()?)),
        ModelSource::Path(path) => path,
    };
    let metadata = fs::metadata(path).map_err(|source| CheckpointError::Io { path: path.clone(), source })?;
    let directory = if metadata.is_dir() { path.clone() } else { directory_of(path)? };
    let has = |name: &str| directory.join(name).exists();
    if has("model_config.yaml") {
        return Ok(Box::new(NemoCheckpoint::open(directory)?));
    }
    if has("config.json") {
        return Ok(Box::new(HfCheckpoint::open(Folder::Directory(directory))?));
    }
    if has("weights") && has("context") {
        return Err(unsupported(&directory, NEMO_2));
    }
    let entries = fs::read_dir(&directory).map_err(|source| CheckpointError::Io { path: directory.clone(), source })?;
    for entry in entries {
        let entry = entry.map_err(|source| CheckpointError::Io { path: directory.clone(), source })?.path();
        if let Some(format) = unsupported_file(&entry) {
            return Err(unsupported(&entry, format));
        }
    }
    let expected = "it has neither config.json (Hugging Face) nor model_config.yaml (NeMo)";
    Err(CheckpointError::NotFound { path: directory, expected })
}

/// Name and remedy of a format that is recognised only to say so.
type Unsupported = (&'static str, &'static str);

const NEMO_2: Unsupported = ("a NeMo 2 checkpoint", "convert it to Hugging Face safetensors first");
const NEMO_ARCHIVE: Unsupported = ("a .nemo archive", "extract it with tar into a directory first");
const GGUF: Unsupported = ("a GGUF file", "use the Hugging Face safetensors that it was made from");

fn unsupported(path: &Path, (format, hint): Unsupported) -> CheckpointError {
    CheckpointError::Unsupported { path: path.to_owned(), format, hint }
}

fn unsupported_file(path: &Path) -> Option<Unsupported> {
    match path.extension()?.to_str()? {
        "nemo" => Some(NEMO_ARCHIVE),
        "gguf" => Some(GGUF),
        _ => None,
    }
}

fn directory_of(file: &Path) -> Result<PathBuf, CheckpointError> {
    if let Some(format) = unsupported_file(file) {
        return Err(unsupported(file, format));
    }
    match file.parent() {
        Some(parent) if file.extension().is_some_and(|extension| extension == "safetensors") => {
            // The parent of a bare file name is empty and means the current directory.
            Ok(if parent.as_os_str().is_empty() { PathBuf::from(".") } else { parent.to_owned() })
        }
        _ => {
            let expected = "it is neither a directory nor a .safetensors file";
            Err(CheckpointError::NotFound { path: file.to_owned(), expected })
        }
    }
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
        let archive =
            "is a .nemo archive, which this version does not read; extract it with tar into a directory first";
        assert_eq!(error(&["m.nemo"], "m.nemo"), format!("DIR/m.nemo {archive}"));
        assert_eq!(error(&["m.nemo"], "."), format!("DIR/./m.nemo {archive}"));
        assert!(error(&["m-q8.gguf"], "m-q8.gguf").contains("is a GGUF file, which this version does not read"));
        let nemo_2 = error(&["weights/metadata.json", "context/model.yaml"], ".");
        assert!(nemo_2.contains("is a NeMo 2 checkpoint, which this version does not read"), "{nemo_2}");
    }

    #[test]
    fn what_is_no_checkpoint_is_told_what_is_missing() {
        assert_eq!(error(&[], "none"), "cannot read DIR/none");
        let expected = "it has neither config.json (Hugging Face) nor model_config.yaml (NeMo)";
        assert_eq!(error(&["model.safetensors"], ""), format!("no checkpoint in DIR/: {expected}"));
        assert_eq!(error(&["model.safetensors"], "model.safetensors"), format!("no checkpoint in DIR: {expected}"));
        let expected = "it is neither a directory nor a .safetensors file";
        assert_eq!(error(&["config.json"], "config.json"), format!("no checkpoint in DIR/config.json: {expected}"));
    }
}
