//! Layers of configuration, merged: built-in < profile < cluster file < job file < environment < flags < `--set`.
//!
//! Each layer is a flat map of known keys; each merged value remembers where it came from.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::Duration;

use toml::Value;

use crate::cli::{ContinuationArgs, EndpointOptions, EngineArgs, SlurmArgs};
use crate::config_file::{Document, nearest, unknown};
use crate::env::Environment;
use crate::job_file::{self, Overrides};
use crate::keys::{self, KEYS, Kind};
use crate::report::{Exit, Failure, Outcome};
use crate::{cluster, profile};

/// Where a value came from; later ones go before earlier ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    Profile(String),
    Cluster(String),
    /// Chosen for what a partition offers: `--profile auto`.
    Auto,
    Job(String),
    Environment(String),
    Flag(String),
    Set,
}

impl Source {
    /// Asked for by whoever starts the run, as opposed to a description of hardware or site.
    pub fn is_request(&self) -> bool {
        !matches!(self, Self::Profile(_) | Self::Cluster(_) | Self::Auto)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Profile(file) | Self::Cluster(file) | Self::Job(file) => f.write_str(file),
            Self::Auto => f.write_str("--profile auto"),
            Self::Environment(variable) => f.write_str(variable),
            Self::Flag(flag) => write!(f, "--{flag}"),
            Self::Set => f.write_str("--set"),
        }
    }
}

/// In place of a profile's name: the one that suits what the cluster has.
pub(crate) const AUTO: &str = "auto";

type Layer = BTreeMap<String, (Value, Source)>;

/// What the command line selects.
#[derive(Clone, Copy, Debug, Default)]
pub struct Selection<'a> {
    pub engine: Option<&'a EngineArgs>,
    pub endpoint: Option<&'a EndpointOptions>,
    pub cluster: Option<&'a str>,
    pub slurm: Option<&'a SlurmArgs>,
    pub continuation: Option<&'a ContinuationArgs>,
    pub job: Option<&'a Path>,
    /// The profile when no layer names one.
    pub default_profile: Option<&'static str>,
}

/// All layers merged.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    values: Layer,
    /// `--set` keys of the job file.
    pub job_overrides: Overrides,
}

impl Settings {
    /// # Errors
    /// A file is missing; a key is unknown; a value is not of its kind; no profile is named.
    pub fn resolve(selection: &Selection<'_>, environment: &Environment) -> Outcome<Self> {
        let mut settings = Self::default();
        let mut requests = Layer::new();
        if let Some(path) = selection.job {
            let document = Document::read(path, environment)?;
            requests.extend(file_layer(&document, &["launch"], Source::Job, environment)?);
        }
        requests.extend(environment_layer(environment)?);
        requests.extend(flag_layer(selection));
        for assignment in selection.engine.into_iter().flat_map(|engine| &engine.set) {
            match parse_set(assignment)? {
                Assignment::Key(key, value) => _ = requests.insert(key, (value, Source::Set)),
                Assignment::Job(..) if selection.job.is_none() => {
                    return Err(Failure::msg(Exit::Usage, format!("--set {assignment}: there is no job file")));
                }
                Assignment::Job(key, value) => _ = settings.job_overrides.insert(key, value),
            }
        }
        let requested = |key| requests.get(key).and_then(|(value, _)| value.as_str());
        let profile = requested("profile").or(selection.default_profile).ok_or_else(|| {
            Failure::msg(Exit::Usage, "no profile is named")
                .hint(format!("give --profile, one of {}, or auto", profile::names(environment).join(", ")))
        })?;
        let cluster = requested("cluster").unwrap_or(cluster::LOCAL);
        let cluster_file = cluster::find(cluster, environment)?;
        if profile != AUTO {
            settings.values = Self::of_profile(profile, &profile::find(profile, environment)?, environment)?.values;
        }
        settings.values.insert("cluster".into(), (cluster.into(), Source::Cluster(cluster_file.label.clone())));
        let mut site = file_layer(&cluster_file, &[], Source::Cluster, environment)?;
        site.remove("description");
        settings.values.extend(site);
        settings.values.extend(requests);
        for (key, value, source) in settings.iter() {
            tracing::debug!(key, %value, %source, "setting");
        }
        Ok(settings)
    }

    /// These settings, in which the profile is not chosen yet, with `profile` below all of them and `choice` instead of what the cluster
    /// file says.
    pub(crate) fn with_profile(&self, profile: &Self, choice: &[(&str, String)]) -> Self {
        let mut values = profile.values.clone();
        for (key, value) in &self.values {
            if key != "profile" {
                values.insert(key.clone(), value.clone());
            }
        }
        for (key, value) in choice {
            if !values.get(*key).is_some_and(|(_, source)| source.is_request()) {
                values.insert((*key).into(), (value.as_str().into(), Source::Auto));
            }
        }
        Self { values, job_overrides: self.job_overrides.clone() }
    }

    /// One profile alone.
    ///
    /// # Errors
    /// A key is unknown, or a value is not of its kind.
    pub fn of_profile(name: &str, document: &Document, environment: &Environment) -> Outcome<Self> {
        let mut values = file_layer(document, &[], Source::Profile, environment)?;
        values.insert("profile".into(), (name.into(), Source::Profile(document.label.clone())));
        Ok(Self { values, job_overrides: Overrides::new() })
    }

    /// One cluster file alone.
    ///
    /// # Errors
    /// A key is unknown, or a value is not of its kind.
    pub fn of_cluster(name: &str, document: &Document, environment: &Environment) -> Outcome<Self> {
        let mut values = file_layer(document, &[], Source::Cluster, environment)?;
        values.insert("cluster".into(), (name.into(), Source::Cluster(document.label.clone())));
        Ok(Self { values, job_overrides: Overrides::new() })
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value, &Source)> {
        self.values.iter().map(|(key, (value, source))| (key.as_str(), value, source))
    }

    fn get(&self, key: &str) -> Option<&Value> {
        debug_assert!(keys::by_name(key).is_some(), "{key} is in the table of keys");
        self.values.get(key).map(|(value, _)| value)
    }

    /// Whether whoever starts the run asked for this value.
    pub fn is_requested(&self, key: &str) -> bool {
        self.values.get(key).is_some_and(|(_, source)| source.is_request())
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }

    pub fn count(&self, key: &str) -> Option<usize> {
        self.get(key).and_then(Value::as_integer).and_then(|number| usize::try_from(number).ok())
    }

    /// A list; empty when it is not set.
    pub fn texts(&self, key: &str) -> Vec<String> {
        let texts = self.get(key).and_then(Value::as_array).into_iter().flatten();
        texts.filter_map(Value::as_str).map(str::to_owned).collect()
    }

    /// The entries of a table with free names: name, value, source.
    pub fn entries<'a>(&'a self, key: &'a str) -> impl Iterator<Item = (&'a str, &'a str, &'a Source)> {
        self.values.iter().filter_map(move |(name, (value, source))| {
            Some((name.strip_prefix(key)?.strip_prefix('.')?, value.as_str()?, source))
        })
    }

    /// Where a value came from.
    pub fn source(&self, key: &str) -> Option<&Source> {
        self.values.get(key).map(|(_, source)| source)
    }

    pub fn number(&self, key: &str) -> Option<f64> {
        self.get(key).and_then(Value::as_float)
    }

    pub fn flag(&self, key: &str) -> bool {
        self.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    pub fn duration(&self, key: &str) -> Option<Duration> {
        self.number(key).and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
    }
}

/// The keys of a file, or of a table in it. Relative paths are relative to the file.
fn file_layer(
    document: &Document,
    table: &[&str],
    source: fn(String) -> Source,
    environment: &Environment,
) -> Outcome<Layer> {
    let whole: toml::Table = document.parse()?;
    let mut layer = Layer::new();
    let mut root = &whole;
    for name in table {
        match root.get(*name) {
            Some(Value::Table(table)) => root = table,
            // A job file of the wrong shape is the job file's parser's to explain.
            _ => return Ok(layer),
        }
    }
    let children = |path: &[String], table: &toml::Table| -> Vec<(Vec<String>, Value)> {
        let child = |name: &String| path.iter().chain([name]).cloned().collect();
        table.iter().map(|(name, value)| (child(name), value.clone())).collect()
    };
    let prefix: Vec<String> = table.iter().map(|name| (*name).to_owned()).collect();
    let mut pending = children(&prefix, root);
    while let Some((path, value)) = pending.pop() {
        let name = path[table.len()..].join(".");
        if name == "schema" && table.is_empty() {
            if value.as_integer() != Some(1) {
                return Err(document.failure(document.value_span(&path), "schema must be 1"));
            }
            continue;
        }
        // A file cannot choose the files that are layered over or under it.
        let misplaced = table.is_empty() && matches!(name.as_str(), "profile" | "cluster");
        match (keys::by_name(&name), &value) {
            (Some(key), _) if !misplaced => {
                let wrong = || format!("`{name}` must be {}", key.kind.expected());
                let value =
                    key.kind.check(&value).ok_or_else(|| document.failure(document.value_span(&path), wrong()))?;
                let value = match (&value, &document.folder) {
                    (Value::String(text), Some(folder)) if key.kind == Kind::Path && text.contains('/') => {
                        Value::String(environment.absolute(text, folder).display().to_string())
                    }
                    _ => value,
                };
                if layer.insert(key.full_name(&name), (value, source(document.label.clone()))).is_some() {
                    return Err(document.failure(document.key_span(&path), format!("`{name}` is set twice")));
                }
            }
            (None, Value::Table(inner)) => pending.extend(children(&path, inner)),
            _ => return Err(document.failure(document.key_span(&path), unknown("key", &name, legal_names()))),
        }
    }
    Ok(layer)
}

fn legal_names() -> impl Iterator<Item = &'static str> {
    KEYS.iter().flat_map(|key| std::iter::once(key.name).chain(key.short))
}

fn environment_layer(environment: &Environment) -> Outcome<Layer> {
    let mut layer = Layer::new();
    for key in KEYS.iter().filter(|key| key.kind != Kind::Entries) {
        let variable = key.variable();
        if let Some(text) = environment.get(&variable) {
            let value = key.kind.parse(text).ok_or_else(|| {
                Failure::msg(Exit::Usage, format!("{variable}={text}: it must be {}", key.kind.expected()))
            })?;
            layer.insert(key.name.into(), (value, Source::Environment(variable)));
        }
    }
    Ok(layer)
}

fn flag_layer(selection: &Selection<'_>) -> Layer {
    let mut layer = Layer::new();
    let mut put = |name: &str, value: Option<Value>| {
        if let (Some(key), Some(value)) = (keys::by_name(name), value) {
            layer.insert(key.name.into(), (value, Source::Flag(key.flag())));
        }
    };
    put("cluster", selection.cluster.map(Value::from));
    if let Some(engine) = selection.engine {
        put("profile", engine.profile.clone().map(Value::from));
        put("model", engine.model.clone().map(Value::from));
        put("tp", engine.tp.map(Value::from));
        put("pp", engine.pp.map(Value::from));
        put("device", engine.device.clone().map(Value::from));
        put("dtype", engine.dtype.clone().map(Value::from));
    }
    if let Some(slurm) = selection.slurm {
        put("account", slurm.account.clone().map(Value::from));
        put("partition", slurm.partition.clone().map(Value::from));
        put("qos", slurm.qos.clone().map(Value::from));
        put("time", slurm.time.map(|time| Value::from(time.as_secs_f64())));
        put("constraint", slurm.constraint.clone().map(Value::from));
        put("reservation", slurm.reservation.clone().map(Value::from));
        put("nodelist", slurm.nodelist.clone().map(Value::from));
        put("exclude", slurm.exclude.clone().map(Value::from));
    }
    if let Some(endpoint) = selection.endpoint {
        let token_file = endpoint.token_file.as_ref().map(|path| Value::from(path.display().to_string()));
        put("host", endpoint.host.clone().map(Value::from));
        put("port", endpoint.port.map(|port| Value::from(i64::from(port))));
        put("no_auth", endpoint.no_auth.then_some(Value::Boolean(true)));
        // Who names a file on the command line wants it to be asked for, whatever the surroundings say.
        put("no_auth", token_file.is_some().then_some(Value::Boolean(false)));
        put("token_file", token_file);
        put("strict", endpoint.strict.then_some(Value::Boolean(true)));
        put("idle_timeout", endpoint.idle_timeout.map(|limit| Value::from(limit.as_secs_f64())));
    }
    if let Some(continuation) = selection.continuation {
        put("retries", continuation.retries.map(Value::from));
        put("chain", continuation.chain.map(Value::from));
    }
    layer
}

enum Assignment {
    Key(String, Value),
    /// A key of the job file that the engine reads.
    Job(String, Value),
}

fn parse_set(assignment: &str) -> Outcome<Assignment> {
    let bad = |reason: String| Failure::msg(Exit::Usage, format!("--set {assignment}: {reason}"));
    let (name, text) = assignment.split_once('=').ok_or_else(|| bad("write KEY=VALUE".into()))?;
    if let Some(key) = keys::by_name(name) {
        let value = key.kind.parse(text).ok_or_else(|| bad(format!("it must be {}", key.kind.expected())))?;
        return Ok(Assignment::Key(key.full_name(name), value));
    }
    if name.split_once('.').is_some_and(|(table, _)| job_file::TABLES.contains(&table)) {
        // A value of TOML if it is one, else a text without quotes.
        let parsed = toml::from_str::<toml::Table>(&format!("value = {text}")).ok();
        let value = parsed.and_then(|mut table| table.remove("value")).unwrap_or_else(|| text.into());
        return Ok(Assignment::Job(name.into(), value));
    }
    let failure = bad(match nearest(name, legal_names()) {
        Some(near) => format!("unknown key; did you mean `{near}`?"),
        None => "unknown key".into(),
    });
    Err(failure.hint("keys are those of profiles (`nemotron profiles show cpu`) and of job files (`sampling.top_p`)"))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// A folder that is working directory and home, with variables.
    struct World {
        dir: tempfile::TempDir,
        environment: Environment,
    }

    impl World {
        fn new(files: &[(&str, &str)], variables: &[(&str, &str)]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            for (name, text) in files {
                let path = dir.path().join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            }
            let home = ("HOME".to_owned(), dir.path().join("home").display().to_string());
            let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            let environment = Environment::new(variables.chain([home]), dir.path());
            Self { dir, environment }
        }

        fn resolve(&self, job: Option<&str>, engine: &EngineArgs, endpoint: &EndpointOptions) -> Outcome<Settings> {
            let selection = Selection {
                engine: Some(engine),
                endpoint: Some(endpoint),
                job: job.map(Path::new),
                default_profile: Some("cpu"),
                ..Selection::default()
            };
            Settings::resolve(&selection, &self.environment)
        }

        fn set(&self, assignments: &[&str]) -> Outcome<Settings> {
            let set = assignments.iter().map(|text| (*text).to_owned()).collect();
            self.resolve(None, &EngineArgs { set, ..EngineArgs::default() }, &EndpointOptions::default())
        }
    }

    const JOB: &str = "schema = 1\n[input]\nprompts = ['a']\n[output]\npath = 'o'\n";

    #[test]
    fn each_layer_goes_before_the_one_below() {
        let site = "serve.port = 2\nserve.host = 'site'\n";
        let job = format!("{JOB}[launch]\nport = 3\ncluster = 'site'\nserve.strict = true\n");
        let files = [("cluster-configs/site.toml", site), ("job.toml", &job)];
        let check = |variables: &[(&str, &str)], engine: &EngineArgs, flag: Option<u16>, port: usize, source: &str| {
            let world = World::new(&files, variables);
            let endpoint = EndpointOptions { port: flag, ..EndpointOptions::default() };
            let settings = world.resolve(Some("job.toml"), engine, &endpoint).unwrap();
            assert_eq!(settings.count("serve.port"), Some(port));
            assert_eq!(settings.values["serve.port"].1.to_string(), source);
            assert_eq!(settings.text("serve.host"), Some("site"));
            assert!(settings.flag("serve.strict"));
            assert_eq!(settings.count("limits.page_tokens"), Some(16), "from the profile");
        };
        let set = EngineArgs { set: vec!["port=6".into()], ..EngineArgs::default() };
        let variables = [("NEMOTRON_PORT", "4")];
        check(&[], &EngineArgs::default(), None, 3, "job.toml");
        check(&variables, &EngineArgs::default(), None, 4, "NEMOTRON_PORT");
        check(&variables, &EngineArgs::default(), Some(5), 5, "--port");
        check(&variables, &set, Some(5), 6, "--set");
    }

    #[test]
    fn short_and_dotted_names_are_the_same_key() {
        let settings =
            World::new(&[], &[]).set(&["tp=2", "mesh.pp=3", "dtype=f32", "device=cpu", "model=x/y"]).unwrap();
        assert_eq!((settings.count("mesh.tp"), settings.count("mesh.pp")), (Some(2), Some(3)));
        assert_eq!((settings.text("dtype"), settings.text("model")), (Some("f32"), Some("x/y")));
        assert!(settings.is_requested("mesh.tp") && !settings.is_requested("limits.page_tokens"));
    }

    #[test]
    fn bad_assignments_are_refused() {
        let world = World::new(&[], &[]);
        for (assignment, expected) in [
            ("prot=1", "--set prot=1: unknown key; did you mean `port`?"),
            ("port", "--set port: write KEY=VALUE"),
            ("port=x", "--set port=x: it must be a port number from 0 to 65535"),
            ("sampling.top_p=1", "--set sampling.top_p=1: there is no job file"),
            ("zzz=1", "--set zzz=1: unknown key"),
        ] {
            let failure = world.set(&[assignment]).unwrap_err();
            assert_eq!((failure.exit, failure.error.to_string()), (Exit::Usage, expected.into()));
        }
        let world = World::new(&[], &[("NEMOTRON_TP", "two")]);
        let text = world.set(&[]).unwrap_err().to_string();
        assert_eq!(text, "error: NEMOTRON_TP=two: it must be a whole number from 1 on");
    }

    #[test]
    fn keys_of_the_job_file_are_kept_apart() {
        let world = World::new(&[("job.toml", JOB)], &[]);
        let set = ["sampling.top_p=0.5", "prompt.template=raw", "sampling.end_strings=['a', 'b']"];
        let engine = EngineArgs { set: set.map(str::to_owned).to_vec(), ..EngineArgs::default() };
        let overrides = world.resolve(Some("job.toml"), &engine, &EndpointOptions::default()).unwrap().job_overrides;
        assert_eq!(overrides["sampling.top_p"], Value::Float(0.5));
        assert_eq!(overrides["prompt.template"], Value::String("raw".into()));
        assert_eq!(overrides["sampling.end_strings"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn files_are_checked_key_by_key() {
        for (text, expected) in [
            (
                "[limits]\nmax_sequence = 5\n",
                "p.toml:2:1: unknown key `limits.max_sequence`; did you mean `limits.max_sequences`?",
            ),
            ("[limits]\nmax_sequences = 0\n", "p.toml:2:17: `limits.max_sequences` must be a whole number from 1 on"),
            ("device = 'tpu'\n", "p.toml:1:10: `device` must be one of cpu, cuda"),
            ("schema = 2\n", "p.toml:1:10: schema must be 1"),
            ("profile = 'cpu'\n", "p.toml:1:1: unknown key `profile`"),
            ("tp = 1\n[mesh]\ntp = 2\n", "is set twice"),
            ("tp = \n", "p.toml:1:"),
        ] {
            let world = World::new(&[("p.toml", text)], &[]);
            let text = world.set(&["profile=p.toml"]).unwrap_err().to_string();
            assert!(text.contains(expected), "{text}");
        }
    }

    #[test]
    fn files_are_searched_in_order() {
        let files = [
            ("own/profiles/a.toml", "description = 'own'"),
            ("cluster-configs/profiles/a.toml", "description = 'here'"),
            ("cluster-configs/profiles/b.toml", "description = 'here'"),
            ("home/.config/nemotron/profiles/b.toml", "description = 'home'"),
            ("home/.config/nemotron/profiles/c.toml", "description = 'home'"),
            ("home/.config/nemotron/profiles/cpu.toml", "description = 'home'"),
        ];
        let world = World::new(&files, &[("NEMOTRON_CONFIG_DIR", "own")]);
        for (name, place) in [("a", "own"), ("b", "here"), ("c", "home"), ("cpu", "home")] {
            let settings = world.set(&[&format!("profile={name}")]).unwrap();
            assert_eq!(settings.text("description"), Some(place), "{name}");
        }
        assert_eq!(profile::names(&world.environment)[..3], ["a", "a100x1", "a100x16"]);
        let failure = world.set(&["profile=h200x80"]).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert_eq!(failure.hints[0], "did you mean `h200x8`?");
    }

    #[test]
    fn paths_in_a_file_are_relative_to_it() {
        let job = format!("{JOB}[launch]\nmodel = './weights'\nrun_root = '~/runs'\n");
        let world = World::new(&[("sub/job.toml", &job)], &[("NEMOTRON_TOKEN_FILE", "t")]);
        let settings =
            world.resolve(Some("sub/job.toml"), &EngineArgs::default(), &EndpointOptions::default()).unwrap();
        let dir = world.dir.path();
        assert_eq!(Path::new(settings.text("model").unwrap()), dir.join("sub/./weights"));
        assert_eq!(Path::new(settings.text("login.run_root").unwrap()), dir.join("home/runs"));
        assert_eq!(settings.text("serve.token_file"), Some("t"));
    }
}
