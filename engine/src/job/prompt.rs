//! From a row's columns to the ids that the model sees.

use std::path::Path;

use minijinja::value::Serde;
use minijinja::{Environment, UndefinedBehavior};
use serde_json::{Map, Value, json};

use crate::chat::{ChatTemplate, Message, Role};
use crate::error_chain::error_chain;
use crate::tokenizer::Tokenizer;

use super::{JobError, JobFile};

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
    /// Everything of it that determines prompts.
    pub(super) source: Value,
}

/// What a row gives the model.
enum Prompt {
    Text(String),
    Messages(Vec<Message>),
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
        let template = prompt.template.as_str();
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
        Ok(Self { chat, system: prompt.system.clone(), user, source })
    }

    /// Takes the prompt out of a row's columns; what is left is carried to the output.
    pub(super) fn encode(&self, tokenizer: &Tokenizer, columns: &mut Map<String, Value>) -> Result<Vec<u32>, String> {
        let prompt = self.prompt(columns)?;
        let (chat, mut messages) = match (&self.chat, prompt) {
            (None, Prompt::Text(text)) => return Ok(tokenizer.encode(&text)),
            (None, Prompt::Messages(_)) => return Err("`messages` needs a prompt template other than \"raw\"".into()),
            (Some(chat), Prompt::Text(content)) => (chat, vec![Message { role: Role::User, content }]),
            (Some(chat), Prompt::Messages(messages)) => (chat, messages),
        };
        if !self.system.is_empty() && messages.first().is_none_or(|message| message.role != Role::System) {
            messages.insert(0, Message { role: Role::System, content: self.system.clone() });
        }
        chat.encode(&messages, tokenizer).map_err(|error| error_chain(&error))
    }

    fn prompt(&self, columns: &mut Map<String, Value>) -> Result<Prompt, String> {
        if let Some(user) = &self.user {
            let text = render(user, columns)?;
            columns.shift_remove("prompt");
            if columns.contains_key("messages") {
                return Err("`messages` cannot be given beside prompt.user of the job file".into());
            }
            return Ok(Prompt::Text(text));
        }
        match (columns.shift_remove("prompt"), columns.shift_remove("messages")) {
            (Some(Value::String(text)), None) => Ok(Prompt::Text(text)),
            (Some(_), None) => Err("`prompt` must be a string".into()),
            (None, Some(messages)) => serde_json::from_value(messages).map(Prompt::Messages).map_err(|error| {
                format!("`messages` must be a list of objects with a `role` and a `content`: {error}")
            }),
            (Some(_), Some(_)) => Err("only one of `prompt` and `messages` can be given".into()),
            (None, None) => Err("one of `prompt` and `messages` is needed".into()),
        }
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

    fn prompt(user: Option<&str>, columns: Value) -> Result<String, String> {
        let user = user.map(|source| compile(source.to_owned()).unwrap());
        let Value::Object(mut columns) = columns else { panic!("columns") };
        match (Prompting { user, ..Prompting::default() }).prompt(&mut columns)? {
            Prompt::Text(text) => Ok(format!("{text} {}", Value::from(columns))),
            Prompt::Messages(messages) => Ok(format!("{} messages", messages.len())),
        }
    }

    #[test]
    fn a_template_makes_the_prompt_of_columns_that_are_carried_all_the_same() {
        let user = Some("On {{ topic }}{% if style is defined %} as {{ style.name }}{% endif %}.");
        assert_eq!(prompt(user, json!({"topic": "sea"})).unwrap(), r#"On sea. {"topic":"sea"}"#);
        let styled = json!({"topic": "<a>", "style": {"name": "Donne"}, "prompt": "p"});
        assert!(prompt(user, styled).unwrap().starts_with("On <a> as Donne. "));
        assert_eq!(prompt(Some("{{ prompt }}!"), json!({"prompt": "p"})).unwrap(), "p! {}");
        let error = prompt(Some("On {{ topic }}."), json!({"topics": "sea", "n": 1})).unwrap_err();
        assert_eq!(error, "the prompt template needs the column `topic`; the row has `topics`, `n`");
        assert!(prompt(Some("{{ n.x() }}"), json!({"n": 1})).unwrap_err().starts_with("the prompt template: "));
    }

    #[test]
    fn without_a_template_one_of_two_columns_is_the_prompt() {
        assert_eq!(prompt(None, json!({"prompt": "a", "k": 1})).unwrap(), r#"a {"k":1}"#);
        assert_eq!(prompt(None, json!({"messages": [{"role": "user", "content": "a"}]})).unwrap(), "1 messages");
        for (columns, expected) in [
            (json!({}), "one of `prompt` and `messages` is needed"),
            (json!({"prompt": 1}), "`prompt` must be a string"),
            (json!({"prompt": "a", "messages": []}), "only one of"),
            (json!({"messages": "hi"}), "`messages` must be a list of objects"),
            (json!({"messages": [{"role": "poet", "content": "a"}]}), "`messages` must be a list of objects"),
        ] {
            let error = prompt(None, columns).unwrap_err();
            assert!(error.starts_with(expected), "{error}");
        }
    }
}
