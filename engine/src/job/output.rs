//! The output file: written from the journal when all rows are there, in input order, and named when it is on the disk.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use arrow_schema::SchemaRef;

use crate::error_chain::error_chain;

use super::JobError;
use super::archive::Archive;
use super::lines::create;

/// Between two tries after storage trouble.
const RETRY: Duration = Duration::from_millis(500);

/// `<path>.partial` or, of a replica, `<path>.N.partial`, in the directory of `path` so that it can be renamed.
fn partial(path: &Path, replica: Option<u32>) -> PathBuf {
    let mut partial: OsString = path.into();
    partial.push(replica.map_or_else(|| ".partial".into(), |replica| format!(".{replica}.partial")));
    partial.into()
}

/// Finds out before anything is generated whether the output can be written, and leaves what is there as it is.
///
/// # Errors
/// `path` is `input` or a directory, or its directory cannot be written.
pub(super) fn check(path: &Path, input: Option<&Path>, replica: Option<u32>) -> Result<(), JobError> {
    let check = || {
        if path.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        if let (Some(input), Ok(output)) = (input, path.canonicalize())
            && input.canonicalize()? == output
        {
            return Err(io::Error::other("it is the input"));
        }
        let partial = partial(path, replica);
        File::create(&partial)?;
        fs::remove_file(&partial)
    };
    check().map_err(|source| JobError::Output { path: path.to_owned(), source })
}

/// Removes what a replica that died at its output has left.
pub(super) fn remove_partial(path: &Path, replica: u32) {
    // If it cannot be removed, it is in nobody's way.
    _ = fs::remove_file(partial(path, Some(replica)));
}

/// Writes all rows of a complete archive; a reader of `path` sees the old file or the whole new one.
pub(super) fn write(
    path: &Path,
    columns: Option<&SchemaRef>,
    archive: &Archive,
    replica: Option<u32>,
) -> Result<(), JobError> {
    let partial = partial(path, replica);
    let write = || {
        create(&partial, path, columns, |file| lines(archive, |line| writeln!(file, "{line}")))?;
        fs::rename(&partial, path)?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    };
    write().map_err(|source| JobError::Output { path: path.to_owned(), source })
}

/// What the first failed row of the archive says about itself.
pub(super) fn first_failure(archive: &Archive) -> Option<String> {
    let rows = archive.places.iter().flatten().filter_map(|&place| archive.done(place).ok());
    let failed = rows
        .filter(|row| row.counts.failed)
        .find_map(|row| serde_json::from_str::<serde_json::Value>(&row.line).ok())?;
    failed["error"]["message"].as_str().map(String::from)
}

/// Hands out the lines of all rows that are done, in the order of the input.
pub(super) fn lines(archive: &Archive, mut take: impl FnMut(&str) -> io::Result<()>) -> io::Result<()> {
    archive.places.iter().flatten().try_for_each(|&place| take(&archive.done(place)?.line))
}

/// Writes until it works or patience is over; `paused` hears whether it does not work for now.
pub(super) async fn patiently(
    patience: Duration,
    write: impl Fn() -> Result<(), JobError>,
    paused: impl Fn(bool),
) -> Result<(), JobError> {
    let begin = Instant::now();
    loop {
        match write() {
            Err(error) if begin.elapsed() < patience => {
                tracing::warn!(error = error_chain(&error), "the output cannot be written for now");
                paused(true);
                tokio::time::sleep(RETRY.min(patience)).await;
            }
            outcome => {
                paused(false);
                return outcome;
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn places_that_cannot_be_written_are_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let input = dir.path().join("in.jsonl");
        fs::write(&input, "").unwrap();
        let link = dir.path().join("link.jsonl");
        std::os::unix::fs::symlink(&input, &link).unwrap();
        for path in [dir.path().join("missing/out.jsonl"), dir.path().to_owned(), input.clone(), link] {
            let error = check(&path, Some(&input), None).unwrap_err();
            assert!(matches!(error, JobError::Output { path: named, .. } if named == path));
        }
        assert_eq!(fs::read_to_string(&input).unwrap(), "");
        let output = dir.path().join("out.jsonl");
        fs::write(&output, "old").unwrap();
        check(&output, Some(&input), Some(1)).unwrap();
        assert_eq!(fs::read_to_string(&output).unwrap(), "old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
    }
}
