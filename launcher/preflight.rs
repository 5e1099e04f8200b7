//! What must hold on a host before a run is queued, and again on every node before anything is loaded: files of the checkpoint that can be
//! read, folders that can be written. A mount that is missing on one node is then known in seconds, with host and path.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::Context as _;
use nemotron_engine::checkpoint::{self, CheckpointError};
use nemotron_engine::config::Mesh;
use nemotron_engine::rank::ModelSource;
use nix::sys::statvfs::statvfs;

use crate::model;
use crate::process::hostname;
use crate::report::{Exit, Failure, Outcome};

/// Bytes of each file of the checkpoint that are read.
const SAMPLE: usize = 4096;
/// Files that are read at the same time: a shared file system answers many as quickly as one.
const READERS: usize = 16;
/// What a folder must have room for: the logs, records and reports of a run.
const ROOM_BYTES: u64 = 64 << 20;

/// Every file of the checkpoint is there, and its beginning can be read.
///
/// # Errors
/// Which file, on which host, and why not.
pub(crate) fn model(source: &ModelSource, mesh: Mesh) -> Outcome {
    let ModelSource::Path(path) = source else { return Ok(()) };
    let checkpoint = checkpoint::open_for(source, mesh).map_err(|error| match error {
        CheckpointError::Io { .. }
        | CheckpointError::NotFound { .. }
        | CheckpointError::MissingTensor { .. }
        | CheckpointError::MissingTokenizer { .. }
        | CheckpointError::Damaged { .. } => unreadable(anyhow::Error::new(error)),
        // It is of another kind, on every host.
        error => error.into(),
    })?;
    let (folder, files) = (model::directory(path), checkpoint.files());
    let next = AtomicUsize::new(0);
    let read = || -> Outcome {
        let mut sample = [0; SAMPLE];
        while let Some((name, bytes)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            let file = folder.join(name);
            let wanted = SAMPLE.min(usize::try_from(*bytes).unwrap_or(SAMPLE));
            File::open(&file)
                .and_then(|mut file| file.read_exact(&mut sample[..wanted]))
                .with_context(|| format!("cannot read {}", file.display()))
                .map_err(unreadable)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS.min(files.len())).map(|_| scope.spawn(read)).collect();
        readers
            .into_iter()
            .try_for_each(|reader| reader.join().unwrap_or_else(|_| unreachable!("reading does not panic")))
    })
}

fn unreadable(error: anyhow::Error) -> Failure {
    let text = format!("the checkpoint is not whole on host {}", hostname());
    Failure::new(Exit::Preflight, error.context(text))
        .hint("--model must be the same readable folder on every node: on a shared file system, or a copy on each")
}

/// A folder that is there can be written, and has some room. `key` is what sets it.
///
/// # Errors
/// Which folder, on which host, and why not.
pub(crate) fn folder(path: &Path, key: &str) -> Outcome {
    let refused = |error: anyhow::Error| {
        let text = format!("cannot write to {} on host {}", path.display(), hostname());
        Failure::new(Exit::Preflight, error.context(text))
            .hint(format!("{key} must be a folder that every node sees and that you may write to"))
    };
    write_once(path).map_err(|error| refused(error.into()))?;
    let free = statvfs(path).map(|fs| fs.blocks_available().saturating_mul(fs.fragment_size()));
    match free {
        Ok(free) if free < ROOM_BYTES => Err(refused(anyhow::anyhow!("only {} MiB are free there", free >> 20))),
        // A file system that cannot tell has taken the file.
        _ => Ok(()),
    }
}

/// Writes a small file and removes it: modes and mounts do not tell about quotas.
fn write_once(folder: &Path) -> io::Result<()> {
    let file = folder.join(format!(".nemotron-{}-{}", hostname(), std::process::id()));
    let written = OpenOptions::new().write(true).create(true).truncate(true).open(&file);
    let written = written.and_then(|mut file| file.write_all(&[0; SAMPLE]).and_then(|()| file.sync_all()));
    let removed = fs::remove_file(&file);
    written.and(removed)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/golden/tiny-hf");
    const ONE_RANK: Mesh = Mesh { tp: 1, pp: 1 };

    #[test]
    fn a_file_that_is_missing_or_cut_is_named() {
        model(&ModelSource::Builtin, ONE_RANK).unwrap();
        model(&ModelSource::Path(TINY.into()), ONE_RANK).unwrap();
        let copy = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(TINY).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
        }
        let source = ModelSource::Path(copy.path().into());
        model(&source, ONE_RANK).unwrap();
        fs::remove_file(copy.path().join("model-00002-of-00002.safetensors")).unwrap();
        let failure = model(&source, ONE_RANK).unwrap_err();
        assert_eq!(failure.exit, Exit::Preflight);
        let text = failure.to_string();
        assert!(text.contains("model-00002-of-00002.safetensors") && text.contains(&hostname()), "{text}");
        let nowhere = model(&ModelSource::Path("/no/such/model".into()), ONE_RANK).unwrap_err();
        assert!(nowhere.exit == Exit::Preflight && nowhere.to_string().contains("/no/such/model"));
    }

    #[test]
    fn a_folder_must_take_a_file() {
        let home = tempfile::tempdir().unwrap();
        folder(home.path(), "login.run_root").unwrap();
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
        let failure = folder(&home.path().join("absent"), "login.run_root").unwrap_err();
        let text = failure.to_string();
        assert!(
            failure.exit == Exit::Preflight && text.contains("absent") && text.contains("login.run_root"),
            "{text}"
        );
    }
}
