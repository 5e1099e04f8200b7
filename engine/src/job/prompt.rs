//! From a row's columns to the ids that the model sees.

use std::path::Path;

use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior};
use serde_json::{Map, Value, json};

use crate::chat::{ChatTemplate, Message, Role};
use crate::error_chain::error_chain;
use crate::tokenizer::Tokenizer;

use super::{JobError, JobFile};

/// Keys of an output line. An input row that carries one of them would give a line with two.
const GENERATED: [&str; 7] =
    ["sample", "response", "finish_reason", "prompt_tokens", "completion_tokens", "seed", "error"];
/// The same of a line that scores a row.
const SCORED: [&str; 2] = ["rewards", "score"];

/// Bounds the instructions that one row's template may take.
const FUEL: u64 = 2_000_000;

/// What a job file says about prompts.
#[derive(Default)]
pub(super) struct Prompting {
    /// `None`: prompts are sent as they are.
    chat: Option<ChatTemplate>,
    /// Put before conversations that have no system message.
    system: String,
    /// What the user says, made of the row's columns.
    user: Option<Environment<'static>>,
    /// Rows have a response, which belongs to the prompt.
    scores: bool,
    /// Prompts are carried to the output.
    keeps: bool,
    /// Everything of it that determines prompts.
    pub(super) source: Value,
}

const USER: &str = "prompt.user";

impl Prompting {
    /// Relative paths are relative to `dir`.
    pub(super) fn load(file: &JobFile, dir: &Path) -> Result<Self, JobError> {
        let prompt = &file.prompt;
        let read = |path: &Path| {
            let path = dir.join(path);
            std::fs::read_to_string(&path).map_err(|error| JobError::Input { path, reason: error.to_string() })
        };
        let scores = file.reward.is_some();
        let template = match prompt.template.as_str() {
            "nemotron" if scores => "annotator",
            template => template,
        };
        let (chat, source) = match template {
            "raw" => (None, String::new()),
            // A built-in template's name has neither a directory nor an extension.
            path if path.contains(['/', '.']) => {
                let source = read(Path::new(path))?;
                (Some(ChatTemplate::from_source(&source, template)), source)
            }
            name => (Some(ChatTemplate::builtin(name)), name.to_owned()),
        };
        let bad = |key: &str, reason: String| JobError::Input { path: key.into(), reason };
        let chat = chat.transpose().map_err(|error| bad("prompt.template", error_chain(&error)))?;
        let (key, user) = match (&prompt.user, &prompt.user_file) {
            (Some(_), Some(_)) => return Err(bad("prompt", "only one of `user` and `user_file` can be given".into())),
            (Some(text), None) => (USER, Some(text.clone())),
            (None, Some(path)) => ("prompt.user_file", Some(read(path)?)),
            (None, None) => (USER, None),
        };
        let source = json!([source, prompt.system, user]);
        let user = user.map(compile).transpose().map_err(|error| bad(key, error_chain(&error)))?;
        let keeps = scores || file.output.include_prompt;
        Ok(Self { chat, system: prompt.system.clone(), user, scores, keeps, source })
    }

    /// Takes the prompt out of a row's columns; what is left is carried to the output. There is none in a row to score that has no response,
    /// because an earlier job could not give one.
    pub(super) fn encode(&self, tokenizer: &Tokenizer, columns: &mut Map<String, Value>) -> Result<Vec<u32>, String> {
        let reserved = if self.scores { &SCORED[..] } else { &GENERATED };
        if let Some(key) = reserved.iter().find(|key| columns.contains_key(**key)) {
            return Err(format!("the key `{key}` is one that the output has; give it another name"));
        }
        if self.scores && columns.get("error").is_some_and(|error| !error.is_null()) {
            return Ok(Vec::new());
        }
        let is_text = self.user.is_some() || columns.get("prompt").is_some_and(|prompt| !prompt.is_null());
        let mut messages = self.messages(columns)?;
        let Some(chat) = &self.chat else {
            let text: String = messages.into_iter().map(|message| message.content).collect();
            return match is_text {
                true => Ok(tokenizer.encode(&text)),
                false => Err("`messages` needs a prompt template other than \"raw\"".into()),
            };
        };
        if !self.system.is_empty() && messages.first().is_none_or(|message| message.role != Role::System) {
            messages.insert(0, Message { role: Role::System, content: self.system.clone() });
        }
        chat.encode(&messages, tokenizer).map_err(|error| error_chain(&error))
    }

    fn messages(&self, columns: &mut Map<String, Value>) -> Result<Vec<Message>, String> {
        if let Some(user) = &self.user {
            let text = render(user, columns)?;
            if columns.get("messages").is_some_and(|messages| !messages.is_null()) {
                return Err("`messages` cannot be given beside prompt.user of the job file".into());
            }
            columns.insert("prompt".into(), text.into());
        }
        let messages = Message::of_row(columns).map_err(|reason| match columns.contains_key("response") {
            true => format!("{reason}; a job keeps them in its output with output.include_prompt = true"),
            false => reason,
        })?;
        if !self.keeps {
            columns.shift_remove("prompt");
            columns.shift_remove("messages");
        }
        Ok(messages)
    }
}

fn compile(source: String) -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(FUEL));
    // A misspelt column is an error, not an empty text.
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.add_template_owned(USER, source)?;
    Ok(environment)
}

fn render(user: &Environment<'static>, columns: &Map<String, Value>) -> Result<String, String> {
    let template = user.get_template(USER).map_err(|error| error_chain(&error))?;
    template.render(Serde(columns)).map_err(|error| {
        let mut missing: Vec<String> =
            template.undeclared_variables(false).into_iter().filter(|name| !columns.contains_key(name)).collect();
        missing.sort_unstable();
        let has = columns.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
        // The one that it stumbled over, as others may be optional.
        let at = error.range().and_then(|range| template.source().get(range)).unwrap_or_default();
        match missing.iter().find(|column| at.contains(column.as_str())).or(missing.first()) {
            Some(column) if error.kind() == minijinja::ErrorKind::UndefinedError => {
                format!("the prompt template needs the column `{column}`; the row has {has}")
            }
            _ => format!("the prompt template: {}", error_chain(&error)),
        }
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// What is said, and what is left of the row.
    fn prompt(prompting: Prompting, columns: Value) -> Result<String, String> {
        let Value::Object(mut columns) = columns else { panic!("columns") };
        let messages = prompting.messages(&mut columns)?;
        let said: Vec<String> = messages.into_iter().map(|message| message.content).collect();
        Ok(format!("{} {}", said.join("|"), Value::from(columns)))
    }

    fn user(source: &str) -> Prompting {
        Prompting { user: Some(compile(source.to_owned()).unwrap()), ..Prompting::default() }
    }

    #[test]
    fn a_template_makes_the_prompt_of_columns_that_are_carried_all_the_same() {
        let on = || user("On {{ topic }}{% if style is defined %} as {{ style.name }}{% endif %}.");
        assert_eq!(prompt(on(), json!({"topic": "sea"})).unwrap(), r#"On sea. {"topic":"sea"}"#);
        let styled = json!({"topic": "<a>", "style": {"name": "Donne"}, "prompt": "p"});
        assert!(prompt(on(), styled).unwrap().starts_with("On <a> as Donne. "));
        assert_eq!(prompt(user("{{ prompt }}!"), json!({"prompt": "p"})).unwrap(), "p! {}");
        let kept = Prompting { keeps: true, ..user("{{ n }}!") };
        assert_eq!(prompt(kept, json!({"n": 1})).unwrap(), r#"1! {"n":1,"prompt":"1!"}"#);
        let error = prompt(user("On {{ topic }}."), json!({"topics": "sea", "n": 1})).unwrap_err();
        assert_eq!(error, "the prompt template needs the column `topic`; the row has `topics`, `n`");
        assert!(prompt(user("{{ n.x() }}"), json!({"n": 1})).unwrap_err().starts_with("the prompt template: "));
        let error = prompt(user("a"), json!({"messages": []})).unwrap_err();
        assert!(error.starts_with("`messages` cannot be given beside prompt.user"), "{error}");
    }

    #[test]
    fn without_a_template_one_of_two_columns_is_the_prompt() {
        let plain = |columns| prompt(Prompting::default(), columns).unwrap();
        assert_eq!(plain(json!({"prompt": "a", "k": 1})), r#"a {"k":1}"#);
        assert_eq!(plain(json!({"messages": [{"role": "user", "content": "a"}]})), "a {}");
        let scored = Prompting { scores: true, keeps: true, ..Prompting::default() };
        let row = json!({"prompt": "a", "response": "b"});
        assert_eq!(prompt(scored, row.clone()).unwrap(), format!("a|b {row}"));
    }

    #[test]
    fn keys_of_the_output_are_refused_in_rows() {
        let tokenizer = crate::checkpoint::open(&crate::spec::ModelSource::Builtin).unwrap().tokenizer().unwrap();
        let encode = |scores, columns: Value| {
            let Value::Object(mut columns) = columns else { panic!("columns") };
            Prompting { scores, ..Prompting::default() }.encode(&tokenizer, &mut columns)
        };
        let error = encode(false, json!({"seed": 1, "prompt": "a"})).unwrap_err();
        assert!(error.starts_with("the key `seed` is one that the output has"), "{error}");
        let error = encode(true, json!({"score": 1, "prompt": "a"})).unwrap_err();
        assert!(error.starts_with("the key `score` is one that the output has"), "{error}");
        assert!(encode(true, json!({"error": {"code": "x"}, "response": ""})).unwrap().is_empty());
        let both = encode(true, json!({"seed": 1, "error": null, "prompt": "a", "response": "b"})).unwrap();
        assert_eq!(both, tokenizer.encode("ab"));
    }
}
