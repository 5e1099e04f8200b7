//! Job files: read, overridden by `--set`, checked, with absolute paths.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nemotron_engine::job::{JobFile, JobSampling};
use toml::Value;

use crate::config_file::{Document, rephrase};
use crate::env::Environment;
use crate::report::{Exit, Failure, Outcome};

/// Tables of a job file that `--set` can reach; the engine reads them.
pub const TABLES: [&str; 6] = ["input", "output", "prompt", "sampling", "generation", "reward"];

/// Keys of a job file that `--set` gave, dotted.
pub type Overrides = BTreeMap<String, Value>;

/// A job file that can be run: all values are legal, all paths absolute, the input exists.
#[derive(Clone, Debug)]
pub struct LoadedJob {
    /// The job file itself, absolute.
    pub path: PathBuf,
    pub file: JobFile,
}

/// Reads and checks a job file.
///
/// # Errors
/// It is missing, is not a job file, or a value is outside its range: with file, line and column.
pub fn load_job(path: &Path, overrides: &Overrides) -> Outcome<LoadedJob> {
    load(path, overrides, &Environment::of_process())
}

pub(crate) fn load(path: &Path, overrides: &Overrides, environment: &Environment) -> Outcome<LoadedJob> {
    let document = Document::read(path, environment)?;
    let mut file: JobFile = document.parse()?;
    if !overrides.is_empty() {
        file = overridden(&file, overrides)?;
    }
    check(&file).map_err(|Fault { key, message }| match overrides.contains_key(key) {
        true => Failure::msg(Exit::Usage, format!("--set {key}: {message}")),
        false => {
            let path: Vec<&str> = key.split('.').collect();
            document.failure(document.value_span(&path).or(document.key_span(&path[..1])), message)
        }
    })?;
    let path = environment.directory.join(path);
    let folder = path.parent().unwrap_or(Path::new("/")).to_owned();
    if let Some(input) = &mut file.input.path {
        *input = folder.join(&*input);
        if !input.is_file() {
            let message = format!("there is no file {}", input.display());
            return Err(document.failure(document.value_span(&["input", "path"]), message));
        }
    }
    file.output.path = folder.join(&file.output.path);
    // A template is a built-in one's name unless it looks like a path.
    if file.prompt.template.contains(['/', '.']) {
        file.prompt.template = folder.join(&file.prompt.template).display().to_string();
    }
    if let Some(user) = &mut file.prompt.user_file {
        *user = folder.join(&*user);
    }
    Ok(LoadedJob { path, file })
}

/// `file` with single keys replaced, one after another so that an error is that of one key.
fn overridden(file: &JobFile, overrides: &Overrides) -> Outcome<JobFile> {
    let mut file = file.clone();
    for (key, value) in overrides {
        let bad = |message: &str| Failure::msg(Exit::Usage, format!("--set {key}: {message}"));
        let (section, name) = key.split_once('.').ok_or_else(|| bad("name a key of that table"))?;
        let mut table = toml::Table::try_from(&file).map_err(|error| bad(&error.to_string()))?;
        let section = table.entry(section).or_insert_with(|| Value::Table(toml::Table::new()));
        section.as_table_mut().ok_or_else(|| bad("not a table"))?.insert(name.into(), value.clone());
        file = table.try_into().map_err(|error: toml::de::Error| {
            let (message, hint) = rephrase(error.message());
            hint.into_iter().fold(bad(&message), Failure::hint)
        })?;
    }
    Ok(file)
}

/// A value outside its range.
struct Fault {
    /// Dotted.
    key: &'static str,
    message: String,
}

/// The ranges of `PUT /generate` for the sampling fields, and what the job file itself demands.
fn check(file: &JobFile) -> Result<(), Fault> {
    let (input, sampling, generation) = (&file.input, &file.sampling, &file.generation);
    let ensure =
        |holds: bool, key, message: &str| if holds { Ok(()) } else { Err(Fault { key, message: message.into() }) };
    ensure(file.schema == 1, "schema", "schema must be 1")?;
    ensure(input.path.is_some() != input.prompts.is_some(), "input", "set exactly one of `path` and `prompts`")?;
    ensure(input.prompts.as_ref().is_none_or(|prompts| !prompts.is_empty()), "input.prompts", "there is no prompt")?;
    let prompt = &file.prompt;
    ensure(prompt.user.is_none() || prompt.user_file.is_none(), "prompt.user", "set `user` or `user_file`, not both")?;
    ensure(!file.output.path.as_os_str().is_empty(), "output.path", "the path is empty")?;
    ensure(input.path.as_ref() != Some(&file.output.path), "output.path", "the output would overwrite the input")?;
    if file.reward.is_some() {
        let nothing = "a job with [reward] generates nothing: leave [sampling] out";
        ensure(*sampling == JobSampling::default(), "sampling", nothing)?;
        let once = "a job with [reward] scores each row once: leave samples_per_prompt out";
        ensure(generation.samples_per_prompt == 1, "generation.samples_per_prompt", once)?;
    }
    ensure(sampling.tokens_to_generate >= 1, "sampling.tokens_to_generate", "tokens_to_generate must be at least 1")?;
    ensure(
        sampling.temperature > 0.0 && sampling.temperature <= 100.0,
        "sampling.temperature",
        "temperature must be greater than 0 and at most 100",
    )?;
    ensure((0.0..=1.0).contains(&sampling.top_p), "sampling.top_p", "top_p must be from 0 to 1")?;
    ensure(
        sampling.repetition_penalty >= 1.0 && sampling.repetition_penalty.is_finite(),
        "sampling.repetition_penalty",
        "repetition_penalty must be at least 1",
    )?;
    ensure(
        generation.samples_per_prompt >= 1,
        "generation.samples_per_prompt",
        "samples_per_prompt must be at least 1",
    )?;
    ensure((0.0..=1.0).contains(&generation.max_failed), "generation.max_failed", "max_failed must be from 0 to 1")
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const GOOD: &str = "schema = 1\n[input]\nprompts = ['a']\n[output]\npath = 'o.jsonl'\n";

    fn load_text(text: &str, overrides: &[(&str, Value)]) -> Outcome<LoadedJob> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("job.toml"), text).unwrap();
        std::fs::write(dir.path().join("in.jsonl"), "").unwrap();
        let overrides = overrides.iter().map(|(key, value)| ((*key).into(), value.clone())).collect();
        load(Path::new("job.toml"), &overrides, &Environment::new([], dir.path()))
    }

    fn check(text: &str, expected: &str) {
        let failure = load_text(text, &[]).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        let text = failure.to_string();
        assert!(text.starts_with(&format!("error: job.toml:{expected}")), "{text}");
    }

    #[test]
    fn paths_become_absolute() {
        let job = load_text(
            "schema = 1\ninput.path = 'in.jsonl'\noutput.path = 'o.jsonl'\nprompt.template = 'my.jinja'\n",
            &[],
        );
        let job = job.unwrap();
        let folder = job.path.parent().unwrap();
        assert_eq!(job.file.input.path.unwrap(), folder.join("in.jsonl"));
        assert_eq!(job.file.output.path, folder.join("o.jsonl"));
        assert_eq!(job.file.prompt.template, folder.join("my.jinja").display().to_string());
    }

    #[test]
    fn values_out_of_range_have_a_place() {
        check("schema = 2\n[input]\nprompts = ['a']\n[output]\npath = 'o'\n", "1:10: schema must be 1");
        check("schema = 1\n[input]\n[output]\npath = 'o'\n", "2:1: set exactly one of `path` and `prompts`");
        check("schema = 1\n[input]\nprompts = []\n[output]\npath = 'o'\n", "3:11: there is no prompt");
        check("schema = 1\n[input]\npath = 'x'\n[output]\npath = 'o'\n", "3:8: there is no file ");
        for (line, message) in [
            ("temperature = 0", "temperature must be"),
            ("temperature = nan", "temperature must be"),
            ("temperature = 100.5", "temperature must be"),
            ("top_p = 1.5", "top_p must be"),
            ("top_p = -0.5", "top_p must be"),
            ("tokens_to_generate = 0", "tokens_to_generate must be"),
            ("repetition_penalty = 0.5", "repetition_penalty must be"),
        ] {
            let column = line.find('=').unwrap() + 3;
            check(&format!("{GOOD}[sampling]\n{line}\n"), &format!("7:{column}: {message}"));
        }
        check(&format!("{GOOD}[generation]\nmax_failed = 1.5\n"), "7:14: max_failed must be");
        check(&format!("{GOOD}[generation]\nsamples_per_prompt = 0\n"), "7:22: samples_per_prompt must be");
        check(&format!("{GOOD}[sampling]\ntop_k = -1\n"), "7:9: ");
        check(&format!("{GOOD}[reward]\n[sampling]\ntop_k = 1\n"), "7:1: a job with [reward] generates nothing");
        check(&format!("{GOOD}[reward]\nby = 'me'\n"), "7:1: unknown key `by`");
    }

    #[test]
    fn single_keys_are_overridden_and_blamed() {
        let job =
            load_text(GOOD, &[("sampling.top_k", Value::Integer(5)), ("prompt.system", "be brief".into())]).unwrap();
        assert_eq!((job.file.sampling.top_k, job.file.prompt.system.as_str()), (5, "be brief"));
        for (key, value, message) in [
            ("sampling.top_p", Value::Float(2.0), "error: --set sampling.top_p: top_p must be"),
            (
                "sampling.topk",
                Value::Integer(2),
                "error: --set sampling.topk: unknown key `topk`; did you mean `top_k`?",
            ),
            ("sampling.top_k", "x".into(), "error: --set sampling.top_k: invalid type"),
            ("sampling", Value::Integer(1), "error: --set sampling: name a key"),
        ] {
            let text = load_text(GOOD, &[(key, value)]).unwrap_err().to_string();
            assert!(text.starts_with(message), "{text}");
        }
    }
}
