//! Whether a host is fit to run ranks. Facts are gathered first ([`host`], [`devices`]) and graded by plain functions, each finding with its
//! cure. `doctor` shows all of them; a rank on a device refuses to start on a critical one.

pub(crate) mod devices;
pub(crate) mod host;

use std::fmt;

use serde::Serialize;

use crate::process::hostname;
use crate::report::{Exit, Failure, Outcome};

/// How bad a finding is, from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub(crate) enum Grade {
    /// It was not looked at, and why is in the finding.
    Skip,
    Ok,
    /// Runs, but slowly or not for long.
    Warn,
    /// Ranks cannot run here.
    Crit,
}

impl fmt::Display for Grade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Skip => "SKIP",
            Self::Ok => "OK",
            Self::Warn => "WARN",
            Self::Crit => "CRIT",
        })
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Check {
    pub(crate) name: String,
    pub(crate) grade: Grade,
    pub(crate) found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cure: Option<String>,
}

impl Check {
    pub(crate) fn new(name: impl Into<String>, grade: Grade, found: impl Into<String>) -> Self {
        Self { name: name.into(), grade, found: found.into(), cure: None }
    }

    pub(crate) fn ok(name: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(name, Grade::Ok, found)
    }

    pub(crate) fn cure(mut self, cure: impl Into<String>) -> Self {
        self.cure = Some(cure.into());
        self
    }

    /// `found`, graded by whether it is good enough.
    pub(crate) fn graded(name: &str, good: bool, bad: Grade, found: String, cure: &str) -> Self {
        if good { Self::ok(name, found) } else { Self::new(name, bad, found).cure(cure) }
    }
}

/// What a run wants of each of its hosts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Wants {
    /// Devices that ranks use, and the memory in bytes that the plan counts on; `None` without devices.
    pub(crate) devices: Option<(usize, u64)>,
    /// Ranks that share the host.
    pub(crate) ranks: usize,
}

/// A critical finding as the failure of whoever wanted to run here.
///
/// # Errors
/// There is one.
pub(crate) fn require(checks: &[Check], exit: Exit) -> Outcome {
    let Some(worst) = checks.iter().find(|check| check.grade == Grade::Crit) else { return Ok(()) };
    let failure = Failure::msg(exit, format!("{}: {}: {}", hostname(), worst.name, worst.found));
    Err(worst.cure.iter().fold(failure, |failure, cure| failure.hint(cure.clone())))
}
