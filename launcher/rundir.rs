//! A run is a directory: where each file is, how a run gets its name, and how it is found again.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Context as _;
use rand::Rng as _;
use rand::seq::IndexedRandom as _;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::env::Environment;
use crate::report::{Exit, Failure, Outcome};
use crate::resolve;
use crate::settings::{Selection, Settings};
use crate::spec::RunSpec;

/// The directory of one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// Makes the directory with its token and `run.lock.toml`. An empty `spec.name` is replaced by a generated one.
    pub(crate) fn create(root: &Path, spec: &mut RunSpec) -> Outcome<Self> {
        let internal = |error: io::Error| {
            Failure::new(
                Exit::Preflight,
                anyhow::Error::new(error).context(format!("cannot make a run directory in {}", root.display())),
            )
            .hint("set NEMOTRON_RUN_ROOT to a directory that you may write to")
        };
        DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(internal)?;
        let given = !spec.name.is_empty();
        if given {
            check_name(&spec.name)?;
        }
        let run_dir = loop {
            if !given {
                spec.name = generate_name();
            }
            let path = root.join(&spec.name);
            // Making the directory is what claims the name: of two launches with one name, one fails here.
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => break Self { path },
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && !given => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(Failure::msg(Exit::Usage, format!("a run named {} exists already", spec.name))
                        .hint(format!("choose another --name, or remove {}", path.display()))
                        .hint(format!("if it is a job that has not ended: nemotron resume {}", spec.name)));
                }
                Err(error) => return Err(internal(error)),
            }
        };
        let fill = || -> anyhow::Result<()> {
            let token = hex(&rand::rng().random::<[u8; 32]>());
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(run_dir.token_file())?;
            file.write_all(token.as_bytes())?;
            run_dir.make_attempt(0)?;
            // Last, because a directory without it is no run yet.
            run_dir.write_spec(spec)
        };
        fill().with_context(|| format!("cannot fill the run directory {}", run_dir.path.display()))?;
        Ok(run_dir)
    }

    pub(crate) fn open(path: &Path) -> Outcome<Self> {
        let path = std::path::absolute(path).context("the current directory is gone")?;
        let run_dir = Self { path };
        if run_dir.lock_file().is_file() {
            Ok(run_dir)
        } else {
            Err(Failure::msg(Exit::Usage, format!("{} is not a run directory", run_dir.path.display())))
        }
    }

    /// The run that `selector` means: a name, a prefix that only one run has, or `latest`.
    pub(crate) fn find(root: &Path, selector: &str) -> Outcome<Self> {
        let mut runs = Self::list(root);
        if selector == "latest" {
            return runs
                .pop()
                .ok_or_else(|| Failure::msg(Exit::Usage, format!("there are no runs in {}", root.display())));
        }
        if let Some(exact) = runs.iter().find(|run| run.name() == selector) {
            return Ok(exact.clone());
        }
        runs.retain(|run| run.name().starts_with(selector));
        match runs.as_slice() {
            [run] => Ok(run.clone()),
            [] if let Some(replica) =
                Self::list(root).iter().find_map(|run| Self::open(&run.path.join(selector)).ok()) =>
            {
                Ok(replica)
            }
            [] => Err(Failure::msg(Exit::Usage, format!("no run named {selector} in {}", root.display()))
                .hint("`nemotron status` lists the runs")),
            several => {
                let names: Vec<_> = several.iter().map(Self::name).collect();
                Err(Failure::msg(Exit::Usage, format!("{selector} could be any of {}", names.join(", "))))
            }
        }
    }

    /// Every run in `root`, the oldest first.
    pub(crate) fn list(root: &Path) -> Vec<Self> {
        let entries = fs::read_dir(root).into_iter().flatten().filter_map(Result::ok);
        let mut runs: Vec<(SystemTime, Self)> =
            entries.map(|entry| Self { path: entry.path() }).filter_map(|run| Some((run.created()?, run))).collect();
        runs.sort_by(|(a, run_a), (b, run_b)| a.cmp(b).then_with(|| run_a.path.cmp(&run_b.path)));
        runs.into_iter().map(|(_, run)| run).collect()
    }

    /// The token is written once, when the run is made.
    fn created(&self) -> Option<SystemTime> {
        self.lock_file().is_file().then_some(())?;
        fs::metadata(self.token_file()).and_then(|metadata| metadata.modified()).ok()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn name(&self) -> &str {
        self.path.file_name().and_then(|name| name.to_str()).unwrap_or("?")
    }

    pub(crate) fn lock_file(&self) -> PathBuf {
        self.path.join("run.lock.toml")
    }

    pub(crate) fn token_file(&self) -> PathBuf {
        self.path.join("token")
    }

    pub(crate) fn endpoint_file(&self) -> PathBuf {
        self.path.join("endpoint.json")
    }

    pub(crate) fn events_file(&self) -> PathBuf {
        self.path.join("events.jsonl")
    }

    pub(crate) fn status_file(&self) -> PathBuf {
        self.path.join("status.json")
    }

    pub(crate) fn report_file(&self) -> PathBuf {
        self.path.join("report.json")
    }

    pub(crate) fn script_file(&self) -> PathBuf {
        self.path.join("job.sbatch")
    }

    /// What the scheduler knows the run by.
    pub(crate) fn job_file(&self) -> PathBuf {
        self.path.join("job.json")
    }

    pub(crate) fn attempt(&self, attempt: u32) -> PathBuf {
        self.path.join(format!("attempt-{attempt:03}"))
    }

    pub(crate) fn rank_log(&self, attempt: u32, rank: usize) -> PathBuf {
        self.attempt(attempt).join(format!("rank-{rank:03}.log"))
    }

    pub(crate) fn supervise_log(&self, attempt: u32) -> PathBuf {
        self.attempt(attempt).join("supervise.log")
    }

    /// What `srun` says.
    pub(crate) fn step_log(&self, attempt: u32) -> PathBuf {
        self.attempt(attempt).join("srun.log")
    }

    pub(crate) fn make_attempt(&self, attempt: u32) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(self.attempt(attempt))
    }

    /// What is done of a job.
    pub(crate) fn journal(&self) -> PathBuf {
        self.path.join("journal")
    }

    /// When and how an attempt began and ended: [`crate::attempts::Attempt`].
    pub(crate) fn attempt_file(&self, attempt: u32) -> PathBuf {
        self.attempt(attempt).join("attempt.json")
    }

    /// There when somebody asked for the attempt.
    pub(crate) fn resumed_file(&self, attempt: u32) -> PathBuf {
        self.attempt(attempt).join("resumed")
    }

    /// [`Self::report_file`] for people.
    pub(crate) fn report_text_file(&self) -> PathBuf {
        self.path.join("REPORT.md")
    }

    /// There when the attempt may go on although the job has changed.
    pub(crate) fn allow_changed_file(&self, attempt: u32) -> PathBuf {
        self.attempt(attempt).join("allow-changed")
    }

    /// Begins another attempt; of two that try at the same time, one fails.
    pub(crate) fn next_attempt(&self) -> Outcome<u32> {
        let attempt = self.last_attempt() + 1;
        match DirBuilder::new().mode(0o700).create(self.attempt(attempt)) {
            Ok(()) => Ok(attempt),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(Failure::msg(Exit::Usage, format!("run {} is being resumed by someone else", self.name())))
            }
            Err(error) => Err(Failure::new(
                Exit::OutputStorage,
                anyhow::Error::new(error).context("cannot make the attempt's directory"),
            )),
        }
    }

    /// The number of the newest attempt.
    pub(crate) fn last_attempt(&self) -> u32 {
        (0..).take_while(|&attempt| self.attempt(attempt).is_dir()).last().unwrap_or(0)
    }

    /// Replaces what the run is; no attempt of it may be going on.
    pub(crate) fn write_spec(&self, spec: &RunSpec) -> anyhow::Result<()> {
        Ok(write_atomic(&self.lock_file(), toml::to_string(spec)?.as_bytes())?)
    }

    pub(crate) fn spec(&self) -> Outcome<RunSpec> {
        let path = self.lock_file();
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        toml::from_str(&text).map_err(|error| {
            Failure::new(Exit::Usage, anyhow::Error::new(error).context(format!("{} is not valid", path.display())))
        })
    }

    /// The run's own secret.
    pub(crate) fn token(&self) -> Outcome<String> {
        Ok(read_token(&self.token_file())?)
    }
}

/// The token in a file, without the line end that editors add.
pub(crate) fn read_token(path: &Path) -> anyhow::Result<String> {
    let token = fs::read_to_string(path).with_context(|| format!("cannot read the token file {}", path.display()))?;
    let token = token.trim();
    anyhow::ensure!(!token.is_empty(), "the token file {} is empty", path.display());
    Ok(token.to_owned())
}

/// The run that `selector` means, among those where this user's runs are.
pub(crate) fn find_run(selector: &str) -> Outcome<RunDir> {
    RunDir::find(&run_root()?, selector)
}

/// Where this user's runs are.
pub(crate) fn run_root() -> Outcome<PathBuf> {
    let environment = Environment::of_process();
    let selection = Selection { default_profile: Some("cpu"), ..Selection::default() };
    resolve::run_root(&Settings::resolve(&selection, &environment)?, &environment)
}

/// Replaces a file in one step: a reader sees the old content or the new, also after a crash.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(name);
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().inspect_err(|_| _ = fs::remove_file(&temporary))
}

pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let mut bytes = serde_json::to_vec_pretty(value)?;
    bytes.push(b'\n');
    write_atomic(path, &bytes)
}

/// `None` when there is no such file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> anyhow::Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => {
            Ok(Some(serde_json::from_slice(&bytes).with_context(|| format!("{} is not valid", path.display()))?))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        _ = write!(text, "{byte:02x}");
        text
    })
}

pub(crate) fn check_name(name: &str) -> Outcome {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    if starts_well && name.len() <= 64 && name.chars().all(legal) && name != "latest" {
        return Ok(());
    }
    Err(Failure::msg(Exit::Usage, format!("{name:?} cannot name a run")).hint(
        "a name has up to 64 letters, digits, '-', '_' and '.', starts with a letter or digit, and is not `latest`",
    ))
}

/// A name that is easy to say and to tell from others, such as `amber-otter-3f2a`.
fn generate_name() -> String {
    const COLOURS: [&str; 16] = [
        "amber", "azure", "bronze", "coral", "copper", "crimson", "golden", "indigo", "ivory", "jade", "olive",
        "pearl", "russet", "scarlet", "silver", "teal",
    ];
    const ANIMALS: [&str; 16] = [
        "badger", "crane", "falcon", "gecko", "heron", "ibex", "lynx", "marten", "newt", "osprey", "otter", "puffin",
        "raven", "stoat", "tern", "walrus",
    ];
    let mut random = rand::rng();
    let colour = COLOURS.choose(&mut random).unwrap_or(&"amber");
    let animal = ANIMALS.choose(&mut random).unwrap_or(&"otter");
    format!("{colour}-{animal}-{:04x}", random.random::<u16>())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::spec::testing::serve_spec;

    fn create(root: &Path, name: &str) -> Outcome<RunDir> {
        RunDir::create(root, &mut serve_spec(name))
    }

    #[test]
    fn a_run_is_private_and_complete() {
        let root = tempfile::tempdir().unwrap();
        let run = create(root.path(), "first").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(run.path()), 0o700);
        assert_eq!(mode(&run.token_file()), 0o600);
        assert_eq!(run.token().unwrap().len(), 64);
        assert_eq!(run.spec().unwrap(), serve_spec("first"));
        assert_eq!(RunDir::open(run.path()).unwrap(), run);
        assert_eq!(run.last_attempt(), 0);
        assert_eq!(RunDir::open(root.path()).unwrap_err().exit, Exit::Usage);
    }

    #[test]
    fn a_name_is_given_once() {
        let root = tempfile::tempdir().unwrap();
        let outcomes: Vec<_> = std::thread::scope(|scope| {
            let launches: Vec<_> = (0..8).map(|_| scope.spawn(|| create(root.path(), "same"))).collect();
            launches.into_iter().map(|launch| launch.join().unwrap()).collect()
        });
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
        assert!(outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).all(|error| error.exit == Exit::Usage));
    }

    #[test]
    fn a_run_without_a_name_gets_one() {
        let root = tempfile::tempdir().unwrap();
        let mut spec = serve_spec("");
        let run = RunDir::create(root.path(), &mut spec).unwrap();
        assert_eq!(run.name(), spec.name);
        assert_eq!(spec.name.split('-').count(), 3);
    }

    #[test]
    fn names_that_are_no_file_names_are_refused() {
        let root = tempfile::tempdir().unwrap();
        for name in ["../up", "a/b", ".hidden", "latest", "-x", &"n".repeat(65)] {
            assert_eq!(create(root.path(), name).unwrap_err().exit, Exit::Usage, "{name}");
        }
    }

    #[test]
    fn runs_are_found_by_prefix_and_by_age() {
        let root = tempfile::tempdir().unwrap();
        let missing = root.path().join("missing");
        assert_eq!(RunDir::find(&missing, "latest").unwrap_err().exit, Exit::Usage);
        for name in ["alpha", "beta-1", "beta-10"] {
            create(root.path(), name).unwrap();
        }
        fs::create_dir(root.path().join("half-made")).unwrap();
        let find = |selector: &str| RunDir::find(root.path(), selector).map(|run| run.name().to_owned());
        assert_eq!(find("al").unwrap(), "alpha");
        assert_eq!(find("beta-1").unwrap(), "beta-1");
        assert_eq!(find("latest").unwrap(), "beta-10");
        assert!(find("beta").unwrap_err().to_string().contains("beta-1, beta-10"));
        assert_eq!(find("half").unwrap_err().exit, Exit::Usage);
    }
}
