//! A manifest: sizes and checksums of the files of a checkpoint, in `nemotron.manifest.json` in its folder, or beside a file as
//! `FILE.manifest.json`. CRC32C of each block is what loading compares, SHA-256 of each file what tells people that a copy is the original.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{CheckpointError, CheckpointSource, TensorName};
use crate::spec::ModelSource;

/// Bytes that have one CRC.
pub const BLOCK_BYTES: usize = 1 << 20;
const NAME: &str = "nemotron.manifest.json";

#[derive(Debug, Serialize, Deserialize)]
pub struct Manifest {
    schema: u32,
    /// By path within the checkpoint's folder.
    pub files: BTreeMap<String, FileHashes>,
    #[serde(skip)]
    root: PathBuf,
}

/// What a file must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHashes {
    pub bytes: u64,
    pub sha256: String,
    /// CRC32C of each block of [`BLOCK_BYTES`], eight hexadecimal digits each.
    crc32c: String,
}

impl Manifest {
    /// A manifest of files in `root`.
    pub fn new(root: PathBuf, files: BTreeMap<String, FileHashes>) -> Self {
        Self { schema: 1, files, root }
    }

    /// The manifest of a checkpoint, if it has one.
    ///
    /// # Errors
    /// It is damaged.
    pub fn of(source: &ModelSource) -> Result<Option<Self>, CheckpointError> {
        let ModelSource::Path(path) = source else { return Ok(None) };
        // One file of a folder stands for the folder.
        let path = &if path.extension().is_some_and(|it| it == "safetensors") { folder(path) } else { path.clone() };
        let file = Self::path(path);
        let text = match fs::read(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(CheckpointError::Io { path: file, source }),
        };
        let damaged = |problem: String| CheckpointError::damaged(&file, problem);
        let mut manifest: Self = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if manifest.schema != 1 {
            return Err(damaged(format!("it has schema {}, this version reads 1", manifest.schema)));
        }
        manifest.root = folder(path);
        for (name, hashes) in &manifest.files {
            let blocks = hashes.bytes.div_ceil(BLOCK_BYTES as u64);
            if hashes.crc32c.len() as u64 != blocks * 8 || !hashes.crc32c.is_ascii() {
                return Err(damaged(format!("{name} does not have {blocks} checksums")));
            }
        }
        Ok(Some(manifest))
    }

    /// Where the manifest of the checkpoint at `path` is.
    pub fn path(path: &Path) -> PathBuf {
        if path.is_dir() {
            return path.join(NAME);
        }
        let mut name = path.as_os_str().to_owned();
        name.push(".manifest.json");
        name.into()
    }

    /// Writes the manifest of the checkpoint at `path`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(io::Error::other)?;
        fs::write(Self::path(path), text + "\n")
    }

    /// Compares the sizes of all files, the contents of those without weights, and the headers of those with weights.
    ///
    /// # Errors
    /// Names the first file that is another.
    pub(super) fn check_without_weights(&self, source: &dyn CheckpointSource) -> Result<(), CheckpointError> {
        let mut with_weights = std::collections::HashSet::new();
        for name in TensorName::all(source.config()) {
            with_weights.extend(source.grid(name)?.files().map(|file| file.path().to_owned()));
        }
        for (name, hashes) in &self.files {
            let path = self.root.join(name);
            let io = |source| CheckpointError::Io { path: path.clone(), source };
            let bytes = fs::metadata(&path).map_err(io)?.len();
            if bytes != hashes.bytes {
                let problem = format!("it has {bytes} bytes, its manifest says {}", hashes.bytes);
                return Err(CheckpointError::damaged(path, problem));
            }
            let mut file = fs::File::open(&path).map_err(io)?.take(match with_weights.contains(&path) {
                true => BLOCK_BYTES as u64,
                false => bytes,
            });
            let mut block = Vec::new();
            for index in 0.. {
                block.clear();
                if file.by_ref().take(BLOCK_BYTES as u64).read_to_end(&mut block).map_err(io)? == 0 {
                    break;
                }
                hashes.check(&path, index, &block)?;
            }
        }
        Ok(())
    }

    /// Compares a block of a mapped file. A file that the manifest does not know is not its matter.
    pub(super) fn check_block(&self, path: &Path, file: &[u8], index: usize) -> Result<(), CheckpointError> {
        let name = path.strip_prefix(&self.root).ok().and_then(Path::to_str);
        let Some(hashes) = name.and_then(|name| self.files.get(name)) else { return Ok(()) };
        let start = index * BLOCK_BYTES;
        hashes.check(path, index, &file[start..file.len().min(start + BLOCK_BYTES)])
    }
}

impl FileHashes {
    fn check(&self, path: &Path, index: usize, block: &[u8]) -> Result<(), CheckpointError> {
        if self.crc32c.get(index * 8..index * 8 + 8) == Some(&*format!("{:08x}", crc32c::crc32c(block))) {
            return Ok(());
        }
        let start = (index * BLOCK_BYTES) as u64;
        Err(CheckpointError::Corrupt { file: path.to_owned(), start, end: start + block.len() as u64 })
    }
}

fn folder(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !path.is_dir() => parent.to_owned(),
        _ => path.to_owned(),
    }
}

/// Takes the checksums of bytes as they come.
#[derive(Default)]
pub(super) struct Hasher {
    sha256: Sha256,
    crc32c: String,
    /// CRC of the block that is not complete yet.
    block: u32,
    bytes: u64,
}

impl Hasher {
    pub(super) fn update(&mut self, mut bytes: &[u8]) {
        self.sha256.update(bytes);
        while !bytes.is_empty() {
            let room = BLOCK_BYTES - self.bytes as usize % BLOCK_BYTES;
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.block = crc32c::crc32c_append(self.block, now);
            self.bytes += now.len() as u64;
            if now.len() == room {
                self.end_block();
            }
            bytes = later;
        }
    }

    pub(super) fn finish(mut self) -> FileHashes {
        if !self.bytes.is_multiple_of(BLOCK_BYTES as u64) {
            self.end_block();
        }
        let sha256 = self.sha256.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        FileHashes { bytes: self.bytes, sha256, crc32c: self.crc32c }
    }

    fn end_block(&mut self) {
        _ = write!(self.crc32c, "{:08x}", self.block);
        self.block = 0;
    }
}

/// Reads a file and takes its checksums; `seen` is shown the bytes.
///
/// # Errors
/// It cannot be read.
pub fn hash(path: &Path, mut seen: impl FnMut(&[u8])) -> io::Result<FileHashes> {
    let mut file = fs::File::open(path)?;
    let mut hasher = Hasher::default();
    let mut block = vec![0; BLOCK_BYTES];
    loop {
        let len = file.read(&mut block)?;
        if len == 0 {
            return Ok(hasher.finish());
        }
        hasher.update(&block[..len]);
        seen(&block[..len]);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn checksums_do_not_depend_on_how_bytes_come() {
        let bytes: Vec<u8> = (0..2 * BLOCK_BYTES + 5).map(|i| ((i * 7) >> 3) as u8).collect();
        let hashes = |step: usize| {
            let mut hasher = Hasher::default();
            bytes.chunks(step).for_each(|chunk| hasher.update(chunk));
            hasher.finish()
        };
        let whole = hashes(bytes.len());
        assert_eq!((whole.bytes, whole.crc32c.len(), whole.sha256.len()), (bytes.len() as u64, 24, 64));
        assert_eq!(
            [hashes(1000), hashes(BLOCK_BYTES), hashes(BLOCK_BYTES + 1)],
            [whole.clone(), whole.clone(), whole.clone()]
        );
        let mut other = bytes.clone();
        other[BLOCK_BYTES] ^= 1;
        assert!(whole.check(Path::new("f"), 0, &other[..BLOCK_BYTES]).is_ok());
        let error = whole.check(Path::new("f"), 1, &other[BLOCK_BYTES..2 * BLOCK_BYTES]).unwrap_err();
        assert_eq!(error.to_string(), "f is damaged: bytes 1048576 to 2097152 are not those of its manifest");
        assert!(whole.check(Path::new("f"), 3, &[]).is_err());
    }
}
