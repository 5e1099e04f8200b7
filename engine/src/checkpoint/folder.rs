//! Files of a checkpoint: in a directory, in an archive, or inside the binary.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::str;
use std::sync::Arc;

use memmap2::Mmap;

use super::archive::Archive;
use super::{CheckpointError, DataFile, Storage};
use crate::tokenizer::Tokenizer;

/// Where the files of a checkpoint are.
pub(super) enum Folder {
    Directory(PathBuf),
    Archive(Archive),
    Embedded { name: &'static str, files: &'static [(&'static str, &'static [u8])] },
}

/// A file of a folder: all of a [`DataFile`], or the part of an archive that is this member.
#[derive(Clone)]
pub(super) struct Member {
    pub(super) file: Arc<DataFile>,
    pub(super) offset: usize,
    pub(super) len: usize,
}

impl Member {
    /// The file's bytes.
    pub(super) fn read<T>(&self, read: impl FnOnce(&[u8]) -> T) -> Result<T, CheckpointError> {
        Ok(read(&self.file.storage()?.bytes()[self.offset..self.offset + self.len]))
    }

    pub(super) fn to_vec(&self) -> Result<Vec<u8>, CheckpointError> {
        self.read(<[u8]>::to_vec)
    }
}

impl Folder {
    /// What an error calls a file.
    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.root().join(file)
    }

    pub(super) fn root(&self) -> &Path {
        match self {
            Self::Directory(directory) => directory,
            Self::Archive(archive) => archive.file.path(),
            Self::Embedded { name, .. } => Path::new(name),
        }
    }

    /// A file, or `None` if there is none of that name. It is not opened yet.
    pub(super) fn find(&self, file: &str) -> Result<Option<Member>, CheckpointError> {
        match self {
            Self::Directory(directory) => {
                let path = directory.join(file);
                match stat(directory, &path) {
                    Ok(bytes) => {
                        let too_large = |_| CheckpointError::damaged(&path, "it is larger than memory can be");
                        let len = usize::try_from(bytes).map_err(too_large)?;
                        Ok(Some(Member { file: DataFile::on_disk(path, bytes), offset: 0, len }))
                    }
                    Err(CheckpointError::Io { source, .. }) if is_absence(&source) => Ok(None),
                    Err(error) => Err(error),
                }
            }
            Self::Archive(archive) => Ok(archive.members.get(file).map(|place| Member {
                file: Arc::clone(&archive.file),
                offset: place.start,
                len: place.len(),
            })),
            Self::Embedded { files, .. } => {
                let found = files.iter().find(|(name, _)| *name == file);
                Ok(found.map(|(_, bytes)| Member {
                    file: DataFile::in_memory(self.path(file), Storage::new(bytes)),
                    offset: 0,
                    len: bytes.len(),
                }))
            }
        }
    }

    /// A file that must be there.
    pub(super) fn require(&self, file: &str) -> Result<Member, CheckpointError> {
        let absent = || io::Error::from_raw_os_error(libc::ENOENT);
        self.find(file)?.ok_or_else(|| CheckpointError::Io { path: self.path(file), source: absent() })
    }

    /// The text of a file that must be there.
    pub(super) fn text(&self, file: &str) -> Result<String, CheckpointError> {
        String::from_utf8(self.require(file)?.to_vec()?)
            .map_err(|_| CheckpointError::damaged(self.path(file), "it is not UTF-8 text"))
    }

    /// The contents of those files that are there, under other names.
    pub(super) fn read_all<'a>(
        &self,
        files: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Vec<(String, Vec<u8>)>, CheckpointError> {
        let mut contents = Vec::new();
        for (file, name) in files {
            if let Some(member) = self.find(file)? {
                contents.push((name.to_owned(), member.to_vec()?));
            }
        }
        Ok(contents)
    }

    /// Names of the files and folders in a folder; `""` is the root.
    pub(super) fn names(&self, folder: &str) -> Result<BTreeSet<String>, CheckpointError> {
        match self {
            Self::Directory(directory) => {
                let path = directory.join(folder);
                let failed = |source| CheckpointError::Io { path: path.clone(), source };
                contained(directory, &path)?;
                let mut names = BTreeSet::new();
                for entry in fs::read_dir(&path).map_err(failed)? {
                    names.extend(entry.map_err(failed)?.file_name().into_string());
                }
                Ok(names)
            }
            Self::Archive(archive) => {
                let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
                let inside = archive.members.keys().filter_map(|name| name.strip_prefix(&prefix));
                Ok(inside.filter_map(|name| name.split('/').next()).map(str::to_owned).collect())
            }
            Self::Embedded { files, .. } => Ok(files.iter().map(|(name, _)| (*name).to_owned()).collect()),
        }
    }

    /// Reads the tokenizer in `file`; its kind follows from the extension.
    pub(super) fn tokenizer(&self, file: Option<&str>) -> Result<Tokenizer, CheckpointError> {
        let file = file.ok_or_else(|| CheckpointError::MissingTokenizer { path: self.root().to_owned() })?;
        let path = self.path(file);
        let member = self.find(file)?.ok_or_else(|| CheckpointError::MissingTokenizer { path: path.clone() })?;
        let tokenizer =
            member.read(if file.ends_with(".json") { Tokenizer::from_json } else { Tokenizer::from_sentencepiece })?;
        tokenizer.map_err(|source| CheckpointError::Tokenizer { file: path, source })
    }
}

fn is_absence(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// The size of a regular file of the folder `root`.
fn stat(root: &Path, path: &Path) -> Result<u64, CheckpointError> {
    let failed = |source| CheckpointError::Io { path: path.to_owned(), source };
    let mut metadata = fs::symlink_metadata(path).map_err(failed)?;
    if metadata.is_symlink() {
        contained(root, path)?;
        metadata = fs::metadata(path).map_err(failed)?;
    }
    if metadata.is_file() {
        Ok(metadata.len())
    } else {
        Err(CheckpointError::damaged(path, "it is not a regular file"))
    }
}

/// Refuses a link that leads out of the folder, as a hostile checkpoint may have. The cache of Hugging Face, where the files of
/// `snapshots/REVISION` are links into `blobs`, is one folder in this sense.
fn contained(root: &Path, path: &Path) -> Result<(), CheckpointError> {
    let canonical =
        |path: &Path| fs::canonicalize(path).map_err(|source| CheckpointError::Io { path: path.to_owned(), source });
    let (root, target) = (canonical(root)?, canonical(path)?);
    let snapshots = root.parent().filter(|parent| parent.ends_with("snapshots"));
    let blobs = snapshots.and_then(Path::parent).map(|cache| cache.join("blobs"));
    if target.starts_with(&root) || blobs.is_some_and(|blobs| target.starts_with(blobs)) {
        return Ok(());
    }
    Err(CheckpointError::Link { file: path.to_owned(), target })
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
    Ok(Storage::of_file(map))
}

/// Whether a name that stands in a file can only mean a file beside it.
pub(super) fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(only)), None) if only == name)
}
