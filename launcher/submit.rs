//! Giving a resolved run to Slurm.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::Context as _;

use crate::attempts;
use crate::cluster::Site;
use crate::env::Environment;
use crate::events::{Event, Journal};
use crate::job_file::load_job;
use crate::observe::Observer;
use crate::preflight;
use crate::render::{SECRETS_FILE, binary, job_script, secrets_file, submission_environment};
use crate::report::{Exit, Failure, Outcome};
use crate::resolve::Resolved;
use crate::rundir::{RunDir, write_atomic};
use crate::slurm::inventory::{self, Nodes};
use crate::slurm::job::{self, Job};
use crate::slurm::parse::{self, format_time};
use crate::spec::{RunSpec, Task};
use crate::state::Status;
use crate::supervise::narrate;

/// Refuses a job whose output another run, which has not ended, writes too.
///
/// # Errors
/// Which run that is.
pub(crate) fn check_only_writer(resolved: &Resolved) -> Outcome {
    let Some(job) = &resolved.job else { return Ok(()) };
    let output = &job.file.output.path;
    for run_dir in RunDir::list(&resolved.run_root) {
        let Ok(Task::Job { file, overrides, .. }) = run_dir.spec().map(|spec| spec.task) else { continue };
        let writes_it = || load_job(&file, &overrides).is_ok_and(|other| other.file.output.path == *output);
        let has_ended = || -> Outcome<bool> {
            Ok(Status::of(&run_dir)?.phase.is_end() || Observer::new(&run_dir)?.look()?.phase.is_end())
        };
        if writes_it() && !has_ended()? {
            let name = run_dir.name();
            let text = format!("run {name} writes to {} already", output.display());
            return Err(Failure::msg(Exit::Preflight, text)
                .hint(format!("wait for it (nemotron wait {name} --for done), or end it (nemotron cancel {name})")));
        }
    }
    Ok(())
}

/// What can be known on this host about the nodes' chances: they see the same file systems as a rule.
fn check_paths(resolved: &Resolved) -> Outcome {
    preflight::model(&resolved.spec.model, resolved.spec.mesh)?;
    let output = resolved.job.as_ref().and_then(|job| job.file.output.path.parent());
    output.map_or(Ok(()), |folder| preflight::folder(folder, "output.path of the job file"))
}

/// Whether Slurm would take the run, in its own words. Nothing is left behind.
pub(crate) fn test(resolved: &Resolved, site: &Site, environment: &Environment) -> Outcome<String> {
    check_paths(resolved)?;
    check_time(site)?;
    let mut spec = resolved.spec.clone();
    if spec.name.is_empty() {
        spec.name = "nemotron-test".into();
    }
    let script = job_script(&spec, site, &resolved.run_root.join(&spec.name), &binary(site)?)?;
    job::test(&script, &submission_environment(site, environment))
}

/// Makes the run's directory and submits its script. A run that Slurm refuses leaves no directory.
pub(crate) fn submit(resolved: &mut Resolved, site: &Site, environment: &Environment) -> Outcome<(RunDir, Job)> {
    let secrets = secrets_file(site, environment)?;
    check_paths(resolved)?;
    let run_dir = RunDir::create(&resolved.run_root, &mut resolved.spec)?;
    let submitted = fill(&run_dir, resolved, site, secrets.as_deref(), environment);
    if let Err(failure) = &submitted
        && failure.exit != Exit::SchedulerSilent
    {
        // The name can be used again.
        _ = fs::remove_dir_all(run_dir.path());
    }
    let job = submitted?;
    let text = format!("job {}", job.id);
    // Without its first line the journal still serves.
    _ = Journal::open(&run_dir, 0).map(|mut journal| journal.write(Event::new("submitted").text(text)));
    Ok((run_dir, job))
}

/// Submits a run of which no attempt goes on once more; `changed` is what it is from now on, if that is not what it was.
pub(crate) fn resume(run_dir: &RunDir, changed: Option<&RunSpec>, environment: &Environment) -> Outcome<Job> {
    let spec = run_dir.spec()?;
    let site = changed.unwrap_or(&spec).site.as_ref();
    let site = site.ok_or_else(|| Failure::msg(Exit::Usage, "this run is not for Slurm"))?;
    if let Some(changed) = changed {
        let script = job_script(changed, site, run_dir.path(), &binary(site)?)?;
        job::test(&script, &submission_environment(site, environment))?;
        run_dir.write_spec(changed).context("cannot write run.lock.toml")?;
        write_atomic(&run_dir.script_file(), script.as_bytes()).context("cannot write job.sbatch")?;
    }
    let avoid = attempts::avoided(&attempts::read(run_dir)?);
    if !avoid.is_empty() {
        narrate(&format!("not on {}, which earlier attempts blame", avoid.join(", ")));
    }
    job::submit_again(run_dir, site, Vec::new(), &avoid, environment)
}

fn fill(
    run_dir: &RunDir,
    resolved: &Resolved,
    site: &Site,
    secrets: Option<&str>,
    environment: &Environment,
) -> Outcome<Job> {
    let script = job_script(&resolved.spec, site, run_dir.path(), &binary(site)?)?;
    let variables = submission_environment(site, environment);
    preflight::folder(run_dir.path(), "login.run_root")?;
    check_time(site)?;
    let doubt = match job::test(&script, &variables) {
        Ok(words) => {
            if let Some((start, nodes)) = parse::estimate(&words) {
                narrate(&format!("Slurm expects to start it at {start} on {nodes}"));
            }
            None
        }
        // So it says too when the nodes are only drained or down for now.
        Err(failure) if failure.error.root_cause().to_string().contains(job::NO_NODES) => Some(failure),
        Err(failure) => return Err(failure),
    };
    write_atomic(&run_dir.script_file(), script.as_bytes()).context("cannot write job.sbatch")?;
    if let Some(secrets) = secrets {
        write_private(&run_dir.path().join(SECRETS_FILE), secrets).context("cannot write the secrets")?;
    }
    let job = job::submit(run_dir, &script, &[], &variables)?;
    job.check_can_start(doubt)?;
    Ok(job)
}

/// Slurm takes a job that asks for more time than the partition gives, and never starts it.
fn check_time(site: &Site) -> Outcome {
    let Some(time) = site.time() else { return Ok(()) };
    // Whoever cannot be asked now will say it later.
    let Ok(nodes) = inventory::ask() else { return Ok(()) };
    let of_job = |nodes: &&Nodes| site.partition.as_ref().map_or(nodes.is_default, |name| nodes.partition == *name);
    match nodes.iter().find(of_job) {
        Some(Nodes { partition, max_time: Some(most), .. }) if time > *most => {
            let (time, most) = (format_time(time), format_time(*most));
            let text =
                format!("Slurm would never start it: partition {partition} gives {most}, the time limit is {time}");
            Err(Failure::msg(Exit::SchedulerRefused, text).hint(format!(
                "--time {most} (slurm.time), or another partition; `sinfo -o '%P %l'` shows their limits"
            )))
        }
        _ => Ok(()),
    }
}

fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?.write_all(text.as_bytes())
}
