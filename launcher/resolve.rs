//! From arguments to a [`RunSpec`] that fits: layers are merged, the model is opened, the plan is made.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use nemotron_engine::checkpoint;
use nemotron_engine::config::ModelConfig;
use nemotron_engine::rank::ModelSource;

use crate::auto;
use crate::cli::{BatchArgs, ContinuationArgs, LaunchArgs, RenderArgs, ResumeArgs, ServeArgs, SlurmArgs};
use crate::cluster::{self, Site};
use crate::env::Environment;
use crate::host::Host;
use crate::job_file::{self, LoadedJob};
use crate::model::Model;
use crate::plan::{self, Plan};
use crate::report::{Exit, Failure, Outcome};
use crate::rundir::check_name;
use crate::seconds;
use crate::settings::{Selection, Settings};
use crate::spec::{Continuation, Deadlines, RunSpec, Task};

/// A run that can be started.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// Its name is empty when none was given.
    pub spec: RunSpec,
    /// Folder that holds the runs.
    pub run_root: PathBuf,
    pub plan: Plan,
    /// Of a run that works through one; read and checked.
    pub job: Option<LoadedJob>,
    pub settings: Settings,
}

/// What `launch` would start.
///
/// # Errors
/// Bad configuration, a bad checkpoint or job file, a model that does not fit, a cluster that this version cannot launch on.
pub fn launch(args: &LaunchArgs, environment: &Environment, host: &Host) -> Outcome<Resolved> {
    let selection = Selection {
        engine: Some(&args.engine),
        endpoint: Some(&args.endpoint),
        cluster: args.cluster.as_deref(),
        slurm: Some(&args.slurm),
        continuation: Some(&args.continuation),
        job: args.task.job.as_deref(),
        default_profile: None,
    };
    // What would be done can be said without the weights.
    let weights = if args.dry_run { named } else { Model::weights };
    let mut resolved = resolve_with(&selection, None, weights, environment, host)?;
    resolved.spec.name = args.name.clone().unwrap_or_default();
    Ok(resolved)
}

/// What `resume` starts: the run as it was, but for what the arguments name; `None` if they name nothing.
///
/// # Errors
/// As for [`launch`].
pub fn resume(args: &ResumeArgs, spec: &RunSpec, environment: &Environment, host: &Host) -> Outcome<Option<RunSpec>> {
    let none = ResumeArgs::default();
    if (&args.engine, &args.slurm, &args.continuation) == (&none.engine, &none.slurm, &none.continuation) {
        return Ok(None);
    }
    let Task::Job { file, limit, overrides, deadline_s } = &spec.task else { return Ok(None) };
    let mut engine = args.engine.clone();
    let mut before = overrides.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>();
    before.extend(deadline_s.map(|seconds| format!("job.deadline={seconds}")));
    let limits = &spec.limits;
    // Another profile has its own sizes.
    if engine.profile.is_none() {
        let kv_tokens = limits.num_pages * limits.page_tokens;
        before.push(format!("limits.kv_tokens={kv_tokens}"));
        engine.tp = engine.tp.or(engine.pp.is_none().then(|| u32::try_from(spec.mesh.tp).ok()).flatten());
        engine.pp = engine.pp.or(args.engine.tp.is_none().then(|| u32::try_from(spec.mesh.pp).ok()).flatten());
    }
    before.push(format!("limits.max_sequences={}", limits.max_sequences));
    engine.set = before.into_iter().chain(args.engine.set.iter().cloned()).collect();
    engine.profile = engine.profile.or_else(|| Some(spec.profile.clone()));
    engine.model = engine.model.or_else(|| match &spec.model {
        ModelSource::Builtin => Some("builtin".into()),
        ModelSource::Path(path) => Some(path.display().to_string()),
    });
    // Rows depend on these two.
    engine.device = engine.device.or_else(|| Some(format!("{:?}", spec.device).to_lowercase()));
    engine.dtype = engine.dtype.or_else(|| Some(format!("{:?}", spec.dtype).to_lowercase()));
    let mut slurm = args.slurm.clone();
    if let Some(site) = &spec.site {
        let keep = |given: Option<String>, before: &Option<String>| given.or_else(|| before.clone());
        slurm = SlurmArgs {
            account: keep(slurm.account, &site.account),
            partition: keep(slurm.partition, &site.partition),
            qos: keep(slurm.qos, &site.qos),
            time: slurm.time.or(site.time()),
            constraint: keep(slurm.constraint, &site.constraint),
            reservation: keep(slurm.reservation, &site.reservation),
            nodelist: keep(slurm.nodelist, &site.nodelist),
            exclude: keep(slurm.exclude, &site.exclude),
        };
    }
    let continuation = ContinuationArgs {
        retries: args.continuation.retries.or(Some(spec.continuation.retries).filter(|&count| count > 0)),
        chain: args.continuation.chain.or(Some(spec.continuation.chain).filter(|&count| count > 0)),
    };
    let selection = Selection {
        engine: Some(&engine),
        cluster: Some(&spec.cluster),
        slurm: Some(&slurm),
        continuation: Some(&continuation),
        job: Some(file),
        ..Selection::default()
    };
    let mut resumed = resolve(&selection, *limit, environment, host)?.spec;
    resumed.name = spec.name.clone();
    resumed.replicas = spec.replicas;
    Ok(Some(resumed))
}

/// What `serve` would start.
///
/// # Errors
/// As for [`launch`].
pub fn serve(args: &ServeArgs, environment: &Environment, host: &Host) -> Outcome<Resolved> {
    let selection = Selection {
        engine: Some(&args.engine),
        endpoint: Some(&args.endpoint),
        cluster: Some(cluster::LOCAL),
        default_profile: Some("cpu"),
        ..Selection::default()
    };
    resolve(&selection, None, environment, host)
}

/// What `batch` would start.
///
/// # Errors
/// As for [`launch`].
pub fn batch(args: &BatchArgs, environment: &Environment, host: &Host) -> Outcome<Resolved> {
    let selection = Selection {
        engine: Some(&args.engine),
        cluster: Some(cluster::LOCAL),
        job: Some(&args.job),
        default_profile: Some("cpu"),
        ..Selection::default()
    };
    resolve(&selection, args.limit, environment, host)
}

/// What `render` would write. The model may be a mere architecture: its weights need not be visible here.
///
/// # Errors
/// As for [`launch`]; the cluster has no Slurm.
pub fn render(args: &RenderArgs, environment: &Environment, host: &Host) -> Outcome<Resolved> {
    let selection = Selection {
        engine: Some(&args.engine),
        endpoint: Some(&args.endpoint),
        cluster: args.cluster.as_deref(),
        slurm: Some(&args.slurm),
        job: args.task.job.as_deref(),
        ..Selection::default()
    };
    let mut resolved = resolve_with(&selection, None, named, environment, host)?;
    if resolved.spec.site.is_none() {
        return Err(Failure::msg(Exit::Usage, format!("cluster {} has no batch script", resolved.spec.cluster))
            .hint("name a cluster with Slurm: --cluster generic, or one of `nemotron clusters list`"));
    }
    resolved.spec.name = args.name.clone().unwrap_or_else(|| resolved.spec.profile.clone());
    check_name(&resolved.spec.name)?;
    Ok(resolved)
}

/// Where the weights would be; an architecture stands for a checkpoint of its name.
fn named(model: Model) -> Outcome<ModelSource> {
    match model {
        Model::Source(source) => Ok(source),
        Model::Architecture(name) => Ok(ModelSource::Path(name.into())),
    }
}

fn resolve(selection: &Selection<'_>, limit: Option<u64>, environment: &Environment, host: &Host) -> Outcome<Resolved> {
    resolve_with(selection, limit, Model::weights, environment, host)
}

fn resolve_with(
    selection: &Selection<'_>,
    limit: Option<u64>,
    weights: impl Fn(Model) -> Outcome<ModelSource>,
    environment: &Environment,
    host: &Host,
) -> Outcome<Resolved> {
    let settings = auto::settings(selection, environment, host)?;
    let cluster = settings.text("cluster").unwrap_or(cluster::LOCAL).to_owned();
    let job = match selection.job {
        Some(path) => Some(job_file::load(path, &settings.job_overrides, environment)?),
        None => None,
    };
    let task = match &job {
        Some(job) => Task::Job {
            file: job.path.clone(),
            limit,
            deadline_s: settings.duration("job.deadline").map(|deadline| deadline.as_secs_f64()),
            overrides: settings.job_overrides.clone(),
        },
        None => serve_task(&settings, environment)?,
    };
    let model = Model::of_settings(&settings, environment)?;
    let (model_name, config) = model.describe()?;
    let has_weights = matches!(model, Model::Source(_));
    if let Some(job) = job.as_ref().filter(|_| has_weights) {
        check_kind(job, &model_name, &config)?;
    }
    let model = weights(model)?;
    let plan = Plan::new(plan::Model { name: &model_name, config: &config }, &settings, host)?.check(&config, host)?;
    if has_weights {
        checkpoint::preflight(&model, plan.mesh)?;
    }
    let ranks_here = plan.hardware.devices_per_node;
    let site = Site::of_settings(&settings, &plan, environment)?;
    let threads = settings.count("threads").or(site.as_ref().and_then(|site| site.cpus_per_task));
    let spec = RunSpec {
        schema: 1,
        name: String::new(),
        profile: plan.profile.clone(),
        cluster,
        model,
        device: plan.hardware.device,
        dtype: plan.dtype,
        threads: threads.unwrap_or((host.cores / ranks_here).max(1)),
        mesh: plan.mesh,
        limits: plan.limits,
        task,
        deadlines: deadlines(&settings, &plan),
        continuation: continuation(&settings),
        replicas: None,
        site,
    };
    Ok(Resolved { spec, run_root: run_root(&settings, environment)?, plan, job, settings })
}

/// Reward models score, the others write.
fn check_kind(job: &LoadedJob, model: &str, config: &ModelConfig) -> Outcome {
    let file = job.path.display();
    match (&job.file.reward, &config.reward) {
        (Some(_), None) => Err(Failure::msg(Exit::Usage, format!("{file} has [reward], but {model} writes texts"))
            .hint("name a reward model with --model")),
        (None, Some(_)) => Err(Failure::msg(Exit::Usage, format!("{model} is a reward model and writes no texts"))
            .hint(format!("to score the rows' responses, put the table [reward] into {file}"))),
        _ => Ok(()),
    }
}

fn serve_task(settings: &Settings, environment: &Environment) -> Outcome<Task> {
    // Rank 0 of a job is on another machine than whoever asks.
    let local = settings.text("cluster").is_none_or(|cluster| cluster == cluster::LOCAL);
    let host = settings.text("serve.host").unwrap_or(if local { "127.0.0.1" } else { "0.0.0.0" });
    let no_auth = settings.flag("serve.no_auth");
    let token_file = settings.text("serve.token_file").map(|file| environment.absolute(file, &environment.directory));
    let task = Task::Serve {
        host: parse_host(host)?,
        port: settings.count("serve.port").and_then(|port| u16::try_from(port).ok()).unwrap_or(1424),
        no_auth,
        token_file: token_file.filter(|_| !no_auth),
        strict: settings.flag("serve.strict"),
        idle_s: match settings.duration("serve.idle_timeout").map(|limit| limit.as_secs_f64()) {
            // Devices of a cluster are not to be held over night for nobody.
            None => (!local).then_some(1800.0),
            given => given.filter(|&limit| limit > 0.0),
        },
    };
    match &task {
        Task::Serve { token_file: Some(file), .. } if !file.is_file() => {
            Err(Failure::msg(Exit::Usage, format!("there is no token file {}", file.display()))
                .hint("make it, or leave --token-file out: a token is made for the run"))
        }
        _ => Ok(task),
    }
}

fn parse_host(text: &str) -> Outcome<IpAddr> {
    match text {
        "localhost" => Ok(IpAddr::from([127, 0, 0, 1])),
        _ => text.parse().map_err(|_| {
            Failure::msg(Exit::Usage, format!("{text} is not an IP address"))
                .hint("listen on 127.0.0.1 for this machine alone, on 0.0.0.0 for all that can reach it")
        }),
    }
}

fn continuation(settings: &Settings) -> Continuation {
    let count = |key| settings.count(key).map_or(0, |count| u32::try_from(count).unwrap_or(u32::MAX));
    Continuation { retries: count("continue.retries"), chain: count("continue.chain") }
}

fn deadlines(settings: &Settings, plan: &Plan) -> Deadlines {
    let or = |key, default| settings.duration(key).unwrap_or(Duration::from_secs(default));
    let loading = Duration::try_from_secs_f64(4.0 * plan.load_seconds).unwrap_or(seconds::MAX);
    Deadlines {
        preflight: or("deadlines.preflight", 60),
        rendezvous: or("deadlines.rendezvous", 180),
        comm_init: or("deadlines.comm_init", 120),
        loading: settings
            .duration("deadlines.loading")
            .unwrap_or(loading.clamp(Duration::from_secs(600), seconds::MAX)),
        warmup: or("deadlines.warmup", 300),
        drain: or("deadlines.drain", 120),
        progress: or("deadlines.progress", 300),
        storage: or("deadlines.storage", 300),
        slurmd_s: settings.duration("deadlines.slurmd").map(|limit| limit.as_secs_f64()),
    }
}

/// Folder that holds the runs.
///
/// # Errors
/// There is no home directory to put it into.
pub fn run_root(settings: &Settings, environment: &Environment) -> Outcome<PathBuf> {
    let root = settings.text("login.run_root").unwrap_or("~/.local/share/nemotron/runs");
    if root.starts_with("~/") && environment.get("HOME").is_none() {
        return Err(
            Failure::msg(Exit::Usage, "there is no place for runs: HOME is not set").hint("set NEMOTRON_RUN_ROOT")
        );
    }
    Ok(environment.absolute(root, &environment.directory))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use clap::Parser as _;
    use nemotron_engine::rank::Device;

    use super::*;
    use crate::cli::{Cli, Command};

    const HOST: Host = Host { cores: 8, available_bytes: 16 << 30 };

    fn resolve(line: &str, variables: &[(&str, &str)], dir: &std::path::Path) -> Outcome<Resolved> {
        let home = ("HOME", dir.to_str().unwrap());
        let variables = variables.iter().chain([&home]).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let environment = Environment::new(variables, dir);
        match Cli::try_parse_from(line.split(' ')).unwrap().command {
            Command::Launch(args) => launch(&args, &environment, &HOST),
            Command::Serve(args) => serve(&args, &environment, &HOST),
            Command::Batch(args) => batch(&args, &environment, &HOST),
            other => panic!("{other:?}"),
        }
    }

    fn dir_with_job() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let job = "schema = 1\n[input]\nprompts = ['a']\n[output]\npath = 'o'\n[launch]\nprofile = 'cpu'\ntp = 2\n";
        std::fs::write(dir.path().join("job.toml"), job).unwrap();
        std::fs::write(dir.path().join("token"), "secret").unwrap();
        dir
    }

    #[test]
    fn serving_the_built_in_model_needs_no_flags() {
        let dir = dir_with_job();
        let Resolved { spec, run_root, job, .. } = resolve("nemotron serve", &[], dir.path()).unwrap();
        assert_eq!((spec.profile.as_str(), spec.cluster.as_str(), spec.name.as_str()), ("cpu", "local", ""));
        assert_eq!((spec.model.clone(), spec.device, spec.threads), (ModelSource::Builtin, Device::Cpu, 8));
        assert_eq!((spec.limits.max_step_tokens, spec.limits.page_tokens, spec.limits.max_sequences), (512, 16, 256));
        let task = Task::Serve {
            host: [127, 0, 0, 1].into(),
            port: 1424,
            no_auth: false,
            token_file: None,
            strict: false,
            idle_s: None,
        };
        assert_eq!(spec.task, task);
        assert_eq!(run_root, dir.path().join(".local/share/nemotron/runs"));
        assert!(job.is_none());
        let text = toml::to_string(&spec).unwrap();
        assert_eq!(toml::from_str::<RunSpec>(&text).unwrap(), spec);
    }

    #[test]
    fn serve_flags_arrive() {
        let dir = dir_with_job();
        let line = "nemotron launch --profile cpu --serve --host 0.0.0.0 --port 0 --tp 2 --pp 2 --token-file token --strict --name n";
        let Resolved { spec, run_root, .. } = resolve(line, &[("NEMOTRON_RUN_ROOT", "runs")], dir.path()).unwrap();
        let token_file = Some(dir.path().join("token"));
        let task =
            Task::Serve { host: [0, 0, 0, 0].into(), port: 0, no_auth: false, token_file, strict: true, idle_s: None };
        assert_eq!((spec.task, spec.name.as_str(), spec.threads), (task, "n", 2));
        assert_eq!(run_root, dir.path().join("runs"));
    }

    #[test]
    fn no_auth_goes_before_a_token_file_of_the_environment() {
        let dir = dir_with_job();
        let variables = [("NEMOTRON_TOKEN_FILE", "token")];
        let no_auth = resolve("nemotron serve --no-auth", &variables, dir.path()).unwrap().spec.task;
        assert!(matches!(no_auth, Task::Serve { no_auth: true, token_file: None, .. }), "{no_auth:?}");
        let variables = [("NEMOTRON_NO_AUTH", "1")];
        let token = resolve("nemotron serve --token-file token", &variables, dir.path()).unwrap().spec.task;
        assert!(matches!(token, Task::Serve { no_auth: false, token_file: Some(_), .. }), "{token:?}");
    }

    #[test]
    fn a_job_brings_its_launch_table() {
        let dir = dir_with_job();
        let line = "nemotron batch --job job.toml --limit 3 --set sampling.top_k=4";
        let Resolved { spec, job, .. } = resolve(line, &[], dir.path()).unwrap();
        assert_eq!((spec.mesh.tp, spec.threads), (2, 4));
        assert_eq!(job.unwrap().file.sampling.top_k, 4);
        let text = toml::to_string(&spec).unwrap();
        assert_eq!(toml::from_str::<RunSpec>(&text).unwrap(), spec);
        let Task::Job { file, limit, overrides, deadline_s: None } = spec.task else { panic!("{:?}", spec.task) };
        assert_eq!((file.clone(), limit), (dir.path().join("job.toml"), Some(3)));
        assert_eq!(job_file::load_job(&file, &overrides).unwrap().file.sampling.top_k, 4);
        assert!(resolve("nemotron launch --job job.toml", &[], dir.path()).is_ok(), "the profile is the job's");
    }

    #[test]
    fn failures_have_their_codes() {
        let dir = dir_with_job();
        std::fs::write(dir.path().join("site.toml"), "").unwrap();
        for (line, exit, text) in [
            ("launch --serve", Exit::Usage, "no profile is named"),
            ("launch --serve --profile cpu --cluster eos", Exit::Usage, "there is no cluster `eos`"),
            ("serve --model /no/such", Exit::Checkpoint, "there is no checkpoint /no/such"),
            ("serve --profile h200x8", Exit::Usage, "nemotron-4-340b has no weights here"),
            ("serve --tp 3", Exit::DoesNotFit, "the model cannot be split this way"),
            ("serve --host example.org", Exit::Usage, "example.org is not an IP address"),
            ("serve --token-file nothing", Exit::Usage, "there is no token file"),
            ("batch --job nothing.toml", Exit::Usage, "cannot read nothing.toml"),
            ("batch --job job.toml --set sampling.top_p=2", Exit::Usage, "--set sampling.top_p: top_p must be"),
        ] {
            let failure = resolve(&format!("nemotron {line}"), &[], dir.path()).unwrap_err();
            assert_eq!(failure.exit, exit, "{line}");
            assert!(failure.to_string().contains(text), "{line}: {failure}");
        }
        let failure = resolve("nemotron serve --model .", &[], dir.path()).unwrap_err();
        assert_eq!(failure.exit, Exit::Checkpoint, "a directory without a checkpoint");
    }
}
