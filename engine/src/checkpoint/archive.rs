//! Members of a tar archive, read where they lie: a `.nemo` file is an uncompressed tar of a NeMo folder.

use std::collections::BTreeMap;
use std::io::Cursor;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::folder::map;
use super::{CheckpointError, DataFile};

pub(super) struct Archive {
    pub(super) file: Arc<DataFile>,
    /// Places of the regular files, by their paths without `./`.
    pub(super) members: BTreeMap<String, Range<usize>>,
}

impl Archive {
    /// # Errors
    /// It is no tar, it is cut, or a member is a link or lies outside of the archive's folder.
    pub(super) fn open(path: PathBuf) -> Result<Self, CheckpointError> {
        const GZIP: [u8; 2] = [0x1f, 0x8b];
        let storage = map(&path)?;
        if storage.bytes().starts_with(&GZIP) {
            let format = "a compressed .nemo archive";
            let hint =
                "decompress it once with `gzip -dc OLD.nemo > NEW.nemo`: an uncompressed archive is read in place";
            return Err(CheckpointError::Unsupported { path, format, hint });
        }
        let members = members(storage.bytes()).map_err(|problem| CheckpointError::damaged(&path, problem))?;
        Ok(Self { file: DataFile::in_memory(path, storage), members })
    }
}

fn members(bytes: &[u8]) -> Result<BTreeMap<String, Range<usize>>, String> {
    let mut members = BTreeMap::new();
    let not_tar = |error: std::io::Error| format!("it cannot be read as a tar archive: {error}");
    let mut archive = tar::Archive::new(Cursor::new(bytes));
    for entry in archive.entries_with_seek().map_err(not_tar)? {
        let entry = entry.map_err(not_tar)?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let kind = entry.header().entry_type();
        if kind.is_dir() || kind.is_pax_global_extensions() {
            continue;
        }
        if !(kind.is_file() || kind.is_contiguous()) {
            return Err(format!("its member {name:?} is a link or another special file"));
        }
        let plain = plain(&name).ok_or_else(|| format!("its member {name:?} would lie outside of its folder"))?;
        let start = usize::try_from(entry.raw_file_position()).ok();
        let end = start.and_then(|start| start.checked_add(usize::try_from(entry.size()).ok()?));
        let place = start.zip(end).filter(|(_, end)| *end <= bytes.len());
        let (start, end) = place.ok_or_else(|| format!("its member {name:?} goes on beyond the end"))?;
        if members.insert(plain, start..end).is_some() {
            return Err(format!("its member {name:?} is there twice"));
        }
    }
    if members.is_empty() { Err("it has no files".to_owned()) } else { Ok(members) }
}

/// A path without `./`, or `None` if it leads out of its folder.
fn plain(name: &str) -> Option<String> {
    let mut parts = Vec::new();
    for component in Path::new(name).components() {
        match component {
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::CurDir => {}
            _ => return None,
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}
