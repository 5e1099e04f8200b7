//! TOML files that people write: where they are looked for, and errors that name file, line, column and the nearest legal key.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

use crate::env::Environment;
use crate::report::{Exit, Failure, Outcome};

/// The text of a configuration file.
#[derive(Clone, Debug)]
pub struct Document {
    /// The path as the user would write it; for embedded ones a name in angle brackets.
    pub label: String,
    /// What relative paths inside the file are relative to; embedded files have no folder.
    pub folder: Option<PathBuf>,
    pub text: String,
}

impl Document {
    /// # Errors
    /// The file is missing or cannot be read.
    pub fn read(path: &Path, environment: &Environment) -> Outcome<Self> {
        let absolute = environment.directory.join(path);
        let text = std::fs::read_to_string(&absolute).map_err(|error| {
            Failure::new(Exit::Usage, anyhow::Error::new(error).context(format!("cannot read {}", path.display())))
        })?;
        tracing::info!(file = %absolute.display(), "configuration read");
        let folder = absolute.parent().map(Path::to_owned);
        Ok(Self { label: path.display().to_string(), folder, text })
    }

    /// A profile or cluster file by name or path: `name.toml` in `subfolder` of the folders that are searched, else an embedded one.
    ///
    /// # Errors
    /// There is none of that name, or it cannot be read.
    pub fn find(
        what: &str,
        name: &str,
        subfolder: &str,
        embedded: &[(&'static str, &'static str)],
        environment: &Environment,
    ) -> Outcome<Self> {
        if name.ends_with(".toml") || name.contains('/') {
            return Self::read(&environment.absolute(name, Path::new("")), environment);
        }
        for dir in environment.config_dirs() {
            let path = dir.join(subfolder).join(format!("{name}.toml"));
            if path.is_file() {
                return Self::read(&path, environment);
            }
        }
        if let Some((name, text)) = embedded.iter().find(|(embedded, _)| *embedded == name) {
            return Ok(Self { label: format!("<built-in {what} {name}>"), folder: None, text: (*text).into() });
        }
        let names = names(subfolder, embedded, environment);
        let mut failure = Failure::msg(Exit::Usage, format!("there is no {what} `{name}`"));
        if let Some(near) = nearest(name, names.iter().map(String::as_str)) {
            failure = failure.hint(format!("did you mean `{near}`?"));
        }
        Err(failure.hint(format!("known are {}; a path to a .toml file works too", names.join(", "))))
    }

    /// # Errors
    /// The text is not TOML or not a `T`: with position, the line, and the nearest legal key.
    pub fn parse<T: DeserializeOwned>(&self) -> Outcome<T> {
        toml::from_str(&self.text).map_err(|error| self.explain(&error))
    }

    fn explain(&self, error: &toml::de::Error) -> Failure {
        let (message, hint) = rephrase(error.message());
        let failure = self.failure(error.span(), message);
        hint.into_iter().fold(failure, Failure::hint)
    }

    /// A failure at a place in this file.
    pub fn failure(&self, span: Option<Range<usize>>, message: impl AsRef<str>) -> Failure {
        let (label, message) = (&self.label, message.as_ref());
        let text = match span.and_then(|span| Excerpt::new(&self.text, span)) {
            Some(Excerpt { line, column, text, width }) => {
                let (margin, marks) = (" ".repeat(column - 1), "^".repeat(width));
                format!("{label}:{line}:{column}: {message}\n{line:>5} | {text}\n      | {margin}{marks}")
            }
            None => format!("{label}: {message}"),
        };
        Failure::msg(Exit::Usage, text)
    }

    /// Where the key at `path` stands.
    pub fn key_span(&self, path: &[impl AsRef<str>]) -> Option<Range<usize>> {
        self.locate(path).map(|(key, _)| key)
    }

    /// Where the value at `path` stands.
    pub fn value_span(&self, path: &[impl AsRef<str>]) -> Option<Range<usize>> {
        self.locate(path).map(|(_, value)| value)
    }

    fn locate(&self, path: &[impl AsRef<str>]) -> Option<(Range<usize>, Range<usize>)> {
        let document = DeTable::parse(&self.text).ok()?;
        let (last, parents) = path.split_last()?;
        let mut table = document.get_ref();
        for name in parents {
            table = table.get(name.as_ref()).map(toml::Spanned::get_ref).and_then(DeValue::as_table)?;
        }
        let (key, value) = table.get_key_value(last.as_ref())?;
        Some((key.span(), value.span()))
    }
}

/// Names of the embedded files and of those in the folders that are searched, sorted.
pub fn names(subfolder: &str, embedded: &[(&'static str, &'static str)], environment: &Environment) -> Vec<String> {
    let mut names: Vec<String> = embedded.iter().map(|(name, _)| (*name).to_owned()).collect();
    for dir in environment.config_dirs() {
        let entries = std::fs::read_dir(dir.join(subfolder)).into_iter().flatten().flatten();
        names.extend(entries.filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".toml")?.to_owned())));
    }
    names.sort();
    names.dedup();
    names
}

/// The candidate that `word` most likely was meant to be.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(word, candidate), candidate))
        .filter(|(similarity, _)| *similarity > 0.8)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate)
}

/// What serde says about a file, in our words; with a hint when it names what is legal.
pub fn rephrase(message: &str) -> (String, Option<String>) {
    match UnknownName::parse(message) {
        Some(unknown) => (unknown.message(), unknown.hint()),
        None => (message.replace("missing field", "missing key").replace('\n', ", "), None),
    }
}

/// What serde says about a name that a type does not have, taken apart.
struct UnknownName<'a> {
    what: &'static str,
    name: &'a str,
    legal: Vec<&'a str>,
}

impl<'a> UnknownName<'a> {
    fn parse(message: &'a str) -> Option<Self> {
        let (what, rest) = if let Some(rest) = message.strip_prefix("unknown field `") {
            ("key", rest)
        } else {
            ("value", message.strip_prefix("unknown variant `")?)
        };
        let (name, rest) = rest.split_once('`')?;
        // The odd pieces between backticks are the names; what separates them is prose.
        Some(Self { what, name, legal: rest.split('`').skip(1).step_by(2).collect() })
    }

    fn message(&self) -> String {
        unknown(self.what, self.name, self.legal.iter().copied())
    }

    fn hint(&self) -> Option<String> {
        (!self.legal.is_empty()).then(|| format!("legal here: {}", self.legal.join(", ")))
    }
}

/// "unknown key `x`; did you mean `y`?"
pub fn unknown<'a>(what: &str, name: &str, legal: impl IntoIterator<Item = &'a str>) -> String {
    match nearest(name, legal) {
        Some(near) => format!("unknown {what} `{name}`; did you mean `{near}`?"),
        None => format!("unknown {what} `{name}`"),
    }
}

/// The line that a span begins in.
struct Excerpt<'a> {
    /// From 1.
    line: usize,
    /// In characters, from 1.
    column: usize,
    text: &'a str,
    /// Characters of the span that are on this line, at least 1.
    width: usize,
}

impl<'a> Excerpt<'a> {
    fn new(text: &'a str, span: Range<usize>) -> Option<Self> {
        let before = text.get(..span.start)?;
        let start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line_text = text[start..].lines().next().unwrap_or_default();
        let end = span.end.min(start + line_text.len());
        Some(Self {
            line: before.matches('\n').count() + 1,
            column: before[start..].chars().count() + 1,
            text: line_text,
            width: text.get(span.start..end).map_or(1, |marked| marked.chars().count().max(1)),
        })
    }
}

#[cfg(test)]
mod tests {
    use nemotron_engine::job::JobFile;

    use super::*;

    fn document(text: &str) -> Document {
        Document { label: "job.toml".into(), folder: None, text: text.into() }
    }

    fn check(text: &str, expected: &str) {
        let failure = document(text).parse::<JobFile>().expect_err("a bad file");
        assert_eq!(failure.exit, Exit::Usage);
        assert_eq!(failure.to_string(), expected);
    }

    #[test]
    fn an_unknown_key_has_a_place_and_a_suggestion() {
        check(
            "schema = 1\n[input]\nprompts = ['a']\n[output]\npath = 'o'\n[sampling]\n  tokens_to_genrate = 5\n",
            "error: job.toml:7:3: unknown key `tokens_to_genrate`; did you mean `tokens_to_generate`?
    7 |   tokens_to_genrate = 5
      |   ^^^^^^^^^^^^^^^^^
  help: legal here: tokens_to_generate, min_tokens_to_generate, greedy, temperature, top_k, top_p, repetition_penalty, random_seed, end_strings",
        );
    }

    #[test]
    fn an_unknown_value_has_a_suggestion() {
        check(
            "schema = 1\n[input]\n[output]\npath = 'o'\n[generation]\ncontext_overflow = 'rejekt'\n",
            "error: job.toml:6:20: unknown value `rejekt`; did you mean `reject`?
    6 | context_overflow = 'rejekt'
      |                    ^^^^^^^^
  help: legal here: reject, truncate_left, shorten_generation",
        );
    }

    #[test]
    fn a_wrong_type_has_a_place() {
        check(
            "schema = 1\n[input]\n[output]\npath = 5\n",
            "error: job.toml:4:8: invalid type: integer `5`, expected path string
    4 | path = 5
      |        ^",
        );
    }

    #[test]
    fn broken_syntax_has_a_place() {
        let failure = document("schema = 1\ninput = [\n").parse::<JobFile>().expect_err("a bad file").to_string();
        assert!(failure.starts_with("error: job.toml:2:"), "{failure}");
    }

    #[test]
    fn columns_count_characters_and_any_span_is_survived() {
        let document = document("a = 'é' # é\n");
        for start in 0..20 {
            for end in 0..20 {
                let _ = document.failure(Some(start..end), "x");
            }
        }
        assert!(document.failure(Some(9..10), "x").to_string().contains("job.toml:1:9"));
    }

    #[test]
    fn a_missing_file_is_named() {
        let failure = Document::read(Path::new("no/such.toml"), &Environment::default()).expect_err("missing");
        assert_eq!(failure.exit, Exit::Usage);
        assert!(
            failure.to_string().starts_with("error: cannot read no/such.toml\n  caused by: No such file"),
            "{failure}"
        );
    }
}
