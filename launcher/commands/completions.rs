use crate::cli::{self, CompletionsArgs};
use crate::report::{Outcome, print_line};

pub(crate) fn run(args: &CompletionsArgs) -> Outcome {
    // Written to memory first: the generator panics when its reader goes away.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut cli::command(), "nemotron", &mut script);
    print_line(String::from_utf8_lossy(&script).trim_end()).map(drop)
}
