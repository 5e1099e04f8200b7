//! Files of lines, compressed or not, by the extension of their name.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::Path;

/// Level of compression: that of the `zstd` program.
const LEVEL: i32 = 3;
const BUFFER: usize = 1 << 20;

fn is_compressed(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "zst")
}

/// Reads a file; what is compressed is decompressed on the way.
pub(super) fn open(path: &Path) -> io::Result<Box<dyn BufRead + Send>> {
    let file = File::open(path)?;
    Ok(match is_compressed(path) {
        true => Box::new(BufReader::with_capacity(BUFFER, zstd::Decoder::new(file)?)),
        false => Box::new(BufReader::with_capacity(BUFFER, file)),
    })
}

/// Makes `file`, which will have the name `path`, of what `fill` writes, down to the disk. Equal lines give equal bytes.
pub(super) fn create(file: &Path, path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut file = BufWriter::with_capacity(BUFFER, File::create(file)?);
    if is_compressed(path) {
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
            create(&path, &path, |file| file.write_all(text.as_bytes())).unwrap();
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
