//! Errors for those who get them as one text: a client, a line of an output file.

use std::error::Error;

/// The error and its causes, outermost first.
pub(crate) fn error_chain(error: &(dyn Error + 'static)) -> String {
    let errors = std::iter::successors(Some(error), |&error| error.source());
    errors.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
