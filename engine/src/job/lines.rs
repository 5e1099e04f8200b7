//! Files of rows by the extension of their name: lines of JSON, compressed or not, and Parquet, which is read and written as such lines.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::Path;

use arrow_schema::SchemaRef;

use super::parquet_file;

/// Level of compression: that of the `zstd` program.
const LEVEL: i32 = 3;
const BUFFER: usize = 1 << 20;

fn is_compressed(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "zst")
}

pub(super) fn is_parquet(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "parquet")
}

/// Reads a file as lines.
pub(super) fn open(path: &Path) -> io::Result<Box<dyn BufRead + Send>> {
    if is_parquet(path) {
        return Ok(Box::new(parquet_file::Lines::open(path)?));
    }
    let file = File::open(path)?;
    Ok(match is_compressed(path) {
        true => Box::new(BufReader::with_capacity(BUFFER, zstd::Decoder::new(file)?)),
        false => Box::new(BufReader::with_capacity(BUFFER, file)),
    })
}

/// Makes `file`, which will have the name `path`, of the lines that `fill` writes, down to the disk. Equal lines give equal bytes. Parquet has
/// these `columns`.
pub(super) fn create(
    file: &Path,
    path: &Path,
    columns: Option<&SchemaRef>,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let mut file = BufWriter::with_capacity(BUFFER, File::create(file)?);
    if let Some(columns) = columns {
        parquet_file::write(&mut file, columns, fill)?;
    } else if is_compressed(path) {
        let mut encoder = zstd::Encoder::new(&mut file, LEVEL)?;
        encoder.include_checksum(true)?;
        fill(&mut encoder)?;
        encoder.finish()?;
    } else {
        fill(&mut file)?;
    }
    file.flush()?;
    file.get_ref().sync_all()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn what_was_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let text = "line\n".repeat(10_000);
        for (name, at_most) in [("a.jsonl", usize::MAX), ("a.jsonl.zst", 1000)] {
            let path = dir.path().join(name);
            create(&path, &path, None, |file| file.write_all(text.as_bytes())).unwrap();
            assert!(std::fs::metadata(&path).unwrap().len() <= at_most as u64);
            let mut read = String::new();
            open(&path).unwrap().read_to_string(&mut read).unwrap();
            assert!(read == text);
        }
        // One that was cut off is an error, not a shorter input.
        let path = dir.path().join("a.jsonl.zst");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
        assert!(open(&path).unwrap().read_to_end(&mut Vec::new()).is_err());
    }
}
