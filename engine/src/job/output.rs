//! The output file: lines in input order, however they come, and nothing under the final name until all are there.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::JobError;

/// Collects numbered lines. Dropping it leaves the partial file behind.
pub(super) struct OrderedOutput {
    path: PathBuf,
    partial: PathBuf,
    file: BufWriter<File>,
    next: usize,
    /// Lines whose predecessors are missing.
    waiting: BTreeMap<usize, String>,
}

impl OrderedOutput {
    /// Starts `<path>.partial`, in the directory of `path` so that it can be renamed.
    ///
    /// # Errors
    /// `path` is `input` or a directory, or its directory cannot be written.
    pub(super) fn create(path: PathBuf, input: Option<&Path>) -> Result<Self, JobError> {
        let mut partial: OsString = path.clone().into();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let open = || {
            if path.is_dir() {
                return Err(io::ErrorKind::IsADirectory.into());
            }
            if let (Some(input), Ok(output)) = (input, path.canonicalize())
                && input.canonicalize()? == output
            {
                return Err(io::Error::other("it is the input"));
            }
            File::create(&partial)
        };
        match open() {
            Ok(file) => Ok(Self { path, partial, file: BufWriter::new(file), next: 0, waiting: BTreeMap::new() }),
            Err(source) => Err(JobError::Output { path, source }),
        }
    }

    /// Lines that are written, which are the first ones.
    pub(super) fn num_written(&self) -> usize {
        self.next
    }

    /// Takes line `index`, without a line break.
    pub(super) fn put(&mut self, index: usize, line: String) -> Result<(), JobError> {
        self.waiting.insert(index, line);
        let written = self.write_ready();
        written.map_err(|source| JobError::Output { path: self.partial.clone(), source })
    }

    fn write_ready(&mut self) -> io::Result<()> {
        while let Some(line) = self.waiting.remove(&self.next) {
            writeln!(self.file, "{line}")?;
            self.next += 1;
        }
        self.file.flush()
    }

    /// Gives the file its name, once it is on the disk.
    pub(super) fn finish(mut self) -> Result<(), JobError> {
        let mut rename = || {
            self.file.flush()?;
            self.file.get_ref().sync_all()?;
            fs::rename(&self.partial, &self.path)?;
            let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
            File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
        };
        rename().map_err(|source| JobError::Output { path: self.path, source })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn lines_come_in_order_and_the_name_comes_last() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.jsonl");
        fs::write(&path, "old").unwrap();
        let mut output = OrderedOutput::create(path.clone(), None).unwrap();
        output.put(2, "c".into()).unwrap();
        output.put(0, "a".into()).unwrap();
        assert_eq!(output.num_written(), 1);
        assert_eq!(fs::read_to_string(dir.path().join("out.jsonl.partial")).unwrap(), "a\n");
        output.put(1, "b".into()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        output.finish().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "a\nb\nc\n");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn places_that_cannot_be_written_are_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let input = dir.path().join("in.jsonl");
        fs::write(&input, "").unwrap();
        let link = dir.path().join("link.jsonl");
        std::os::unix::fs::symlink(&input, &link).unwrap();
        for path in [dir.path().join("missing/out.jsonl"), dir.path().to_owned(), input.clone(), link] {
            let error = OrderedOutput::create(path.clone(), Some(&input)).err().unwrap();
            assert!(matches!(error, JobError::Output { path: named, .. } if named == path));
        }
        assert_eq!(fs::read_to_string(&input).unwrap(), "");
    }

    #[test]
    fn a_full_disk_is_an_output_error() {
        let full = PathBuf::from("/dev/full");
        let file = BufWriter::new(File::options().write(true).open(&full).unwrap());
        let mut output =
            OrderedOutput { path: full.clone(), partial: full.clone(), file, next: 0, waiting: BTreeMap::new() };
        assert!(matches!(output.put(0, "a".into()), Err(JobError::Output { path, .. }) if path == full));
    }
}
