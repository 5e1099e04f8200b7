//! Typed reads of configuration keys, whatever file they came from. Every failure names key and value.

use serde_json::{Map, Value};

use crate::config::ConfigError;

/// The keys of one configuration object. A key whose value is null counts as absent.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// The first of several names of a key that is present.
    pub(super) fn find(self, names: &[&'static str]) -> Option<(&'static str, &'a Value)> {
        names.iter().find_map(|name| Some((*name, self.0.get(*name).filter(|value| !value.is_null())?)))
    }

    pub(super) fn size(self, names: &[&'static str]) -> Result<Option<usize>, ConfigError> {
        let Some((key, value)) = self.find(names) else { return Ok(None) };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok()).filter(|size| *size > 0);
        size.map(Some).ok_or_else(|| wrong_type(key, value, "a size above 0"))
    }

    /// A size without which there is no model; the first name is the one that an error tells.
    pub(super) fn required_size(self, names: &[&'static str]) -> Result<usize, ConfigError> {
        self.size(names)?.ok_or(ConfigError::Missing(names[0]))
    }

    pub(super) fn number(self, names: &[&'static str]) -> Result<Option<f64>, ConfigError> {
        let Some((key, value)) = self.find(names) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| wrong_type(key, value, "a number"))
    }

    /// One token id or a list of them.
    pub(super) fn ids(self, key: &'static str) -> Result<Option<Vec<u32>>, ConfigError> {
        let Some((_, value)) = self.find(&[key]) else { return Ok(None) };
        let values = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        let ids = values.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect::<Option<_>>();
        ids.map(Some).ok_or_else(|| wrong_type(key, value, "a token id or a list of token ids"))
    }

    /// Demands the one value that this engine runs; `default` is what an absent key means.
    pub(super) fn demand(
        self,
        key: &'static str,
        supported: impl Into<Value>,
        default: impl Into<Value>,
    ) -> Result<(), ConfigError> {
        let (supported, default) = (supported.into(), default.into());
        let value = self.find(&[key]).map_or(&default, |(_, value)| value);
        if *value == supported {
            return Ok(());
        }
        Err(unsupported(key, value, &supported))
    }
}

pub(super) fn wrong_type(key: &'static str, value: &Value, expected: &'static str) -> ConfigError {
    ConfigError::Type { key, value: show(value), expected }
}

pub(super) fn unsupported(key: &'static str, value: &Value, supported: &Value) -> ConfigError {
    ConfigError::Architecture { key, value: show(value), supported: show(supported) }
}

/// A value for an error message: strings bare, and cut to a length that fits a line.
fn show(value: &Value) -> String {
    const MAX_CHARS: usize = 80;
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match text.char_indices().nth(MAX_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
