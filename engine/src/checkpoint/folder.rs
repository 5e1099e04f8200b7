//! Files of a checkpoint: in a directory, where they are mapped, or inside the binary.

use std::fs::{self, File};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::str;

use memmap2::Mmap;

use super::{CheckpointError, Storage};
use crate::tokenizer::Tokenizer;

/// Where the files of a checkpoint are.
pub(super) enum Folder {
    Directory(PathBuf),
    Embedded { name: &'static str, files: &'static [(&'static str, &'static [u8])] },
}

impl Folder {
    /// What an error calls a file.
    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.root().join(file)
    }

    pub(super) fn root(&self) -> &Path {
        match self {
            Self::Directory(directory) => directory,
            Self::Embedded { name, .. } => Path::new(name),
        }
    }

    /// The bytes of a file, or `None` if there is none of that name.
    pub(super) fn find(&self, file: &str) -> Result<Option<Storage>, CheckpointError> {
        match self {
            Self::Directory(directory) => match map(&directory.join(file)) {
                Ok(storage) => Ok(Some(storage)),
                Err(CheckpointError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            },
            Self::Embedded { files, .. } => {
                Ok(files.iter().find(|(name, _)| *name == file).map(|(_, bytes)| Storage::new(bytes)))
            }
        }
    }

    /// Reads the tokenizer in `file`; its kind follows from the extension.
    pub(super) fn tokenizer(&self, file: Option<&str>) -> Result<Tokenizer, CheckpointError> {
        let file = file.ok_or_else(|| CheckpointError::MissingTokenizer { path: self.root().to_owned() })?;
        let path = self.path(file);
        let storage = self.find(file)?.ok_or_else(|| CheckpointError::MissingTokenizer { path: path.clone() })?;
        let tokenizer = if file.ends_with(".json") {
            Tokenizer::from_json(storage.bytes())
        } else {
            Tokenizer::from_sentencepiece(storage.bytes())
        };
        tokenizer.map_err(|source| CheckpointError::Tokenizer { file: path, source })
    }
}

/// Maps a file.
pub(super) fn map(path: &Path) -> Result<Storage, CheckpointError> {
    let failed = |source| CheckpointError::Io { path: path.to_owned(), source };
    // Opening a pipe would wait for its writer, and a device may have any effect.
    if !fs::metadata(path).map_err(failed)?.is_file() {
        return Err(CheckpointError::damaged(path, "it is not a regular file"));
    }
    let file = File::open(path).map_err(failed)?;
    // SAFETY: the map is only read, through byte slices for which every content is valid. That nobody changes or cuts a
    // checkpoint while it is being read is what every program that maps weights relies on; a reader of a cut file is ended by SIGBUS.
    let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
    Ok(Storage::new(map))
}

/// The text of a small file.
pub(super) fn text<'a>(file: &Path, storage: &'a Storage) -> Result<&'a str, CheckpointError> {
    str::from_utf8(storage.bytes()).map_err(|_| CheckpointError::damaged(file, "it is not UTF-8 text"))
}

/// Whether a name that stands in a file can only mean a file beside it.
pub(super) fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(only)), None) if only == name)
}
