//! Which model `--model` means.

use std::path::{Path, PathBuf};

use nemotron_engine::checkpoint::{self, BUILTIN_NAME};
use nemotron_engine::config::ModelConfig;
use nemotron_engine::rank::ModelSource;

use crate::env::Environment;
use crate::report::{Exit, Failure, Outcome};
use crate::settings::Settings;

/// A model that settings name.
#[derive(Clone, Debug, PartialEq)]
pub enum Model {
    /// One with weights.
    Source(ModelSource),
    /// A published architecture, to plan for.
    Architecture(String),
}

impl Model {
    /// `builtin`, else a directory or file that exists, else a published architecture.
    ///
    /// # Errors
    /// It is none of them.
    pub fn find(text: &str, environment: &Environment) -> Outcome<Self> {
        if text == "builtin" || text == BUILTIN_NAME {
            return Ok(Self::Source(ModelSource::Builtin));
        }
        let path = environment.absolute(text, &environment.directory);
        // One that may not be looked at is there, and opening it says why it cannot be read.
        if path.try_exists().unwrap_or(true) {
            return Ok(Self::Source(ModelSource::Path(path)));
        }
        if ModelConfig::preset(text).is_some() {
            return Ok(Self::Architecture(text.into()));
        }
        Err(Failure::msg(Exit::Checkpoint, format!("there is no checkpoint {}", path.display()))
            .hint("--model is the directory of a checkpoint, or `builtin`"))
    }

    /// The model of these settings.
    ///
    /// # Errors
    /// None is set, or there is none of that name.
    pub fn of_settings(settings: &Settings, environment: &Environment) -> Outcome<Self> {
        match settings.text("model") {
            Some(text) => Self::find(text, environment),
            None => Err(Failure::msg(Exit::Usage, "no model is named").hint("give --model")),
        }
    }

    /// Name and sizes, for which the metadata of a checkpoint is enough.
    ///
    /// # Errors
    /// The checkpoint is bad.
    pub fn describe(&self) -> Outcome<(String, ModelConfig)> {
        match self {
            Self::Architecture(name) => {
                let config = ModelConfig::preset(name);
                let config = config.ok_or_else(|| Failure::msg(Exit::Internal, format!("unknown model {name}")))?;
                Ok((name.clone(), config))
            }
            Self::Source(source) => Ok((name(source), checkpoint::open_headers(source)?.config().clone())),
        }
    }

    /// Where the weights are.
    ///
    /// # Errors
    /// It has none.
    pub fn weights(self) -> Outcome<ModelSource> {
        match self {
            Self::Source(source) => Ok(source),
            Self::Architecture(name) => Err(Failure::msg(Exit::Usage, format!("{name} has no weights here"))
                .hint("give --model with the directory of its checkpoint")),
        }
    }
}

/// What people call a checkpoint: the name of its directory.
pub fn name(source: &ModelSource) -> String {
    let of_path = |path: &Path| path.canonicalize().ok()?.file_name().map(|name| name.to_string_lossy().into_owned());
    match source {
        ModelSource::Builtin => BUILTIN_NAME.into(),
        ModelSource::Path(path) => of_path(path).unwrap_or_else(|| path.display().to_string()),
    }
}

/// Where the files of a checkpoint are.
pub fn directory(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if path.is_file() => parent.to_owned(),
        _ => path.to_owned(),
    }
}
