//! Room that superseded records give back: after a change of input or settings those of the rows that are not the job's any more.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use crate::job::archive::{self, Archive, Place};
use crate::job::frame;
use crate::job::record::{Key, Record};

/// Fewer superseded bytes are not worth the writing.
const MIN_SUPERSEDED: u64 = 1 << 20;

/// Where a file is written anew before it takes the old one's name.
pub(super) const TEMPORARY: &str = "compacted.tmp";

/// The larger part of the journal's bytes is superseded.
pub(super) fn is_due(archive: &Archive) -> bool {
    let superseded = archive.bytes.saturating_sub(archive.bytes_needed);
    superseded > archive.bytes_needed && superseded >= MIN_SUPERSEDED
}

/// Writes each of the journal's files anew, with the records that `archive` counts as done, the marks of rows that are not, and the header. A
/// file has its new content as a whole or not at all, so whoever is killed leaves a journal that says the same.
pub(super) fn compact(dir: &Path, keys: &[Key], archive: &Archive) -> io::Result<()> {
    let rows: HashMap<&Key, usize> = keys.iter().zip(0..).collect();
    let temporary = dir.join(TEMPORARY);
    for (file, (_, path)) in archive::list(dir).map_err(io::Error::other)?.into_iter().enumerate() {
        let mut options = OpenOptions::new();
        let mut new = BufWriter::new(options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?);
        let mut written = Ok(());
        frame::scan(File::open(&path)?, |offset, frame| {
            let Some(record) = Record::decode(frame) else { return };
            let needed = match &record {
                Record::Header(_) => true,
                Record::Begun(key) => rows.get(key).is_some_and(|&row| archive.places[row].is_none()),
                Record::Done(done) => {
                    let place = Place { file: file as u32, offset };
                    rows.get(&done.key).is_some_and(|&row| archive.places[row] == Some(place))
                }
            };
            if needed && written.is_ok() {
                let mut bytes = Vec::new();
                record.encode(&mut bytes);
                written = new.write_all(&bytes);
            }
        })?;
        written?;
        new.into_inner()?.sync_all()?;
        fs::rename(&temporary, &path)?;
        File::open(dir)?.sync_all()?;
    }
    Ok(())
}
