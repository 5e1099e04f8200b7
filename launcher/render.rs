//! From a resolved run to the batch script: prepared values, one template, two quoting routines. Equal input gives equal bytes.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, UndefinedBehavior, context};
use sha2::{Digest as _, Sha256};

use crate::cluster::{GpuRequest, Runtime, Site, Variable};
use crate::env::Environment;
use crate::report::{Exit, Failure, Outcome};
use crate::slurm::parse::format_time;
use crate::spec::{RunSpec, Task};

/// The template of the batch script.
pub const TEMPLATE: &str = include_str!("../templates/job.sbatch.jinja");

/// Slurm may send the warning signal up to this much early, because it looks at limits now and then only.
const SIGNAL_SLACK_S: u64 = 60;

/// Variables of the submitting shell without which a job cannot find home, commands or Slurm.
const ALWAYS_PASSED: [&str; 8] = ["HOME", "LANG", "LD_LIBRARY_PATH", "LOGNAME", "PATH", "SHELL", "SLURM_CONF", "USER"];

/// Names of `secrets.env`, in the run directory.
pub const SECRETS_FILE: &str = "secrets.env";

/// The batch script of a run.
///
/// # Errors
/// A value cannot stand in a directive (it has a line end, a quote or a backslash), or the template is wrong.
pub fn job_script(run: &RunSpec, site: &Site, run_dir: &Path, binary: &Path) -> Outcome<String> {
    let text = |path: &Path| {
        let text = path.to_str().map(str::to_owned);
        text.ok_or_else(|| Failure::msg(Exit::Usage, format!("{} is not Unicode", path.display())))
    };
    let (run_dir, binary) = (text(run_dir)?, text(binary)?);
    let template = match &site.template {
        Some(path) => std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the template {}", path.display()))
            .map_err(|error| Failure::new(Exit::Usage, error))?,
        None => TEMPLATE.to_owned(),
    };
    let assignment = |variable: &Variable| format!("{}={}", variable.name, shell_quote(&variable.value));
    let fabric = |variable: &Variable| (variable.name.clone(), assignment(variable));
    let source = site.source.iter().map(|file| Ok(shell_quote(&text(file)?))).collect::<Outcome<Vec<_>>>()?;
    let values = context! {
        run => one_line(&run.name),
        profile => one_line(&run.profile),
        cluster => one_line(&run.cluster),
        task => match &run.task { Task::Serve { .. } => "serve", Task::Job { .. } => "job" },
        layout => format!("TP{} x PP{} on {} x {}", run.mesh.tp, run.mesh.pp, site.nodes, site.devices_per_node),
        version => env!("CARGO_PKG_VERSION"),
        container => match site.container.runtime {
            Runtime::None => None,
            Runtime::Pyxis => Some(format!("pyxis, {}", one_line(&site.container.image))),
            Runtime::Apptainer => Some(format!("apptainer, {}", one_line(&site.container.image))),
        },
        directives => directives(run, site, &run_dir)?,
        source => source,
        secrets => (!site.secrets.is_empty()).then(|| shell_quote(&format!("{run_dir}/{SECRETS_FILE}"))),
        set => site.set.iter().map(assignment).collect::<Vec<_>>(),
        fabric => site.fabric.iter().map(fabric).collect::<Vec<_>>(),
        binary => shell_quote(&binary),
        run_dir => shell_quote(&run_dir),
    };
    let mut jinja = minijinja::Environment::new();
    jinja.set_undefined_behavior(UndefinedBehavior::Strict);
    jinja.set_auto_escape_callback(|_| AutoEscape::None);
    jinja.set_fuel(Some(1_000_000));
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).keep_trailing_newline(true).build();
    let rendered = syntax.and_then(|syntax| {
        jinja.set_syntax(syntax);
        jinja.render_str(&template, values)
    });
    rendered.map_err(|error| {
        Failure::new(Exit::Usage, anyhow::Error::new(error).context("the template of the batch script is wrong"))
    })
}

/// What a job is found by when `sbatch` did not answer: it stands in the job's comment.
pub fn submission_token(run_name: &str, run_dir: &Path) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    let digest = Sha256::digest(run_dir.as_os_str().as_bytes());
    let hash: String = digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    format!("nemotron:{run_name}:{hash}")
}

/// Nemotron as the nodes see it.
///
/// # Errors
/// The running executable has no path.
pub fn binary(site: &Site) -> Outcome<PathBuf> {
    match &site.binary {
        Some(path) => Ok(path.clone()),
        None => Ok(std::env::current_exe().context("cannot tell where this executable is")?),
    }
}

/// The environment to run `sbatch` in. The script says `--export=ALL`, so this is also what the job gets: nothing of the shell but
/// what a job cannot do without and what the cluster file names. No `SBATCH_*` or `SLURM_*` option of the user's can change the job.
pub fn submission_environment(site: &Site, environment: &Environment) -> Vec<(String, String)> {
    let names = ALWAYS_PASSED.into_iter().chain(site.pass.iter().map(String::as_str));
    names.filter_map(|name| Some((name.to_owned(), environment.get(name)?.to_owned()))).collect()
}

/// What the run's `secrets.env` (to be made with mode 0600) holds; `None` if the run has no secrets.
///
/// # Errors
/// A secret is not set.
pub fn secrets_file(site: &Site, environment: &Environment) -> Outcome<Option<String>> {
    let mut text = String::new();
    for name in &site.secrets {
        let value = environment.get(name).ok_or_else(|| {
            Failure::msg(Exit::Usage, format!("the secret {name} is not set"))
                .hint("export it, or take it out of secrets.names")
        })?;
        text += &format!("{name}={}\n", shell_quote(value));
    }
    Ok((!text.is_empty()).then_some(text))
}

fn directives(run: &RunSpec, site: &Site, run_dir: &str) -> Outcome<Vec<String>> {
    let mut options: Vec<(&str, String)> = vec![
        ("job-name", run.name.clone()),
        ("comment", submission_token(&run.name, Path::new(run_dir))),
        ("nodes", site.nodes.to_string()),
        ("ntasks-per-node", site.devices_per_node.to_string()),
    ];
    let gpus = match &site.gres_type {
        Some(kind) => format!("{kind}:{}", site.devices_per_node),
        None => site.devices_per_node.to_string(),
    };
    match site.gpu_request {
        GpuRequest::GpusPerNode => options.push(("gpus-per-node", gpus)),
        GpuRequest::Gres => options.push(("gres", format!("gpu:{gpus}"))),
        GpuRequest::GpusPerTask => {
            let one = site.gres_type.as_ref().map_or_else(|| "1".into(), |kind| format!("{kind}:1"));
            options.push(("gpus-per-task", one));
        }
        GpuRequest::None => {}
    }
    let optional = [
        ("cpus-per-task", site.cpus_per_task.map(|count| count.to_string())),
        ("mem", site.mem.clone()),
        ("time", site.time().map(format_time)),
        ("account", site.account.clone()),
        ("partition", site.partition.clone()),
        ("qos", site.qos.clone()),
        ("constraint", site.constraint.clone()),
        ("reservation", site.reservation.clone()),
        ("nodelist", site.nodelist.clone()),
        ("exclude", site.exclude.clone()),
        ("switches", site.switches.map(|count| count.to_string())),
    ];
    options.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value?))));
    let warning_s = (run.deadlines.drain.as_secs() + SIGNAL_SLACK_S).clamp(120, 65_535);
    options.extend([
        ("signal", format!("B:USR1@{warning_s}")),
        ("open-mode", "append".into()),
        // In a file name of sbatch's, a percent sign begins a pattern.
        ("output", format!("{}/slurm-%j.log", run_dir.replace('%', "%%"))),
        ("export", "ALL".into()),
    ]);
    let mut lines = options
        .into_iter()
        .map(|(name, value)| Ok(format!("--{name}={}", directive_quote(name, &value)?)))
        .collect::<Outcome<Vec<_>>>()?;
    lines.push((if site.requeue { "--requeue" } else { "--no-requeue" }).into());
    lines.extend(site.exclusive.then(|| "--exclusive".into()));
    for option in &site.extra {
        lines.push(match option.split_once('=') {
            Some((name, value)) => format!("{}={}", directive_name(name)?, directive_quote(name, value)?),
            None => directive_name(option)?.to_owned(),
        });
    }
    Ok(lines)
}

/// The value for bash, which changes nothing in it.
pub fn shell_quote(value: &str) -> String {
    if is_plain(value) { value.into() } else { format!("'{}'", value.replace('\'', r"'\''")) }
}

/// The value for an `#SBATCH` line, where double quotes keep spaces and `#`.
///
/// # Errors
/// It has a character that no quoting carries through all versions of sbatch.
pub fn directive_quote(option: &str, value: &str) -> Outcome<String> {
    if let Some(bad) = value.chars().find(|char| char.is_control() || matches!(char, '"' | '\\')) {
        return Err(Failure::msg(
            Exit::Usage,
            format!("{option}: {value:?} has {bad:?}, which cannot stand in a directive of sbatch"),
        ));
    }
    Ok(if is_plain(value) { value.into() } else { format!("\"{value}\"") })
}

fn directive_name(option: &str) -> Outcome<&str> {
    let name = option.strip_prefix("--").unwrap_or_default();
    if !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        return Ok(option);
    }
    Err(Failure::msg(Exit::Usage, format!("slurm.extra: `{}` is no option of sbatch", one_line(option))))
}

fn is_plain(value: &str) -> bool {
    !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_./:,@%+-".contains(&byte))
}

/// A text in a comment of the script.
fn one_line(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { ' ' } else { char }).collect()
}

#[cfg(test)]
mod tests;
