use std::io::{ErrorKind, Read as _};
use std::path::PathBuf;

use anyhow::Context as _;
use nemotron_engine::chat::{ChatTemplate, Message, Role};

use crate::cli::{GenerateArgs, SamplingArgs};
use crate::client::{Client, GenerateRequest, completion};
use crate::observe::Observer;
use crate::report::{Exit, Failure, Outcome, print_line};
use crate::rundir::{RunDir, find_run, read_token, run_root};
use crate::state::Endpoint;

pub(crate) fn run(args: &GenerateArgs) -> Outcome {
    let text = read_prompt(&args.prompt)?;
    let prompt = if args.raw { text } else { as_chat(text)? };
    let (url, token_file) = target(args)?;
    let token = token_file.map(|file| read_token(&file)).transpose();
    let token = token.map_err(|error| Failure::new(Exit::Usage, error))?;
    let client = Client::new(&url, token, args.timeout)?;
    let end_strings = args.sampling.end_strings();
    let sentences = client.generate(&request(&prompt, &args.sampling, end_strings.clone()))?;
    let [sentence] = sentences.as_slice() else {
        return Err(Failure::msg(Exit::Internal, format!("{} answers for one prompt", sentences.len())));
    };
    print_line(completion(sentence, &prompt, &end_strings)).map(drop)
}

fn read_prompt(argument: &str) -> Outcome<String> {
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).map_err(|error| {
        let exit = if error.kind() == ErrorKind::InvalidData { Exit::Usage } else { Exit::Internal };
        Failure::new(exit, anyhow::Error::new(error).context("cannot read the prompt from stdin"))
    })?;
    // The line end of `echo` and of files is not part of the prompt.
    Ok(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}

fn as_chat(text: String) -> Outcome<String> {
    let message = Message { role: Role::User, content: text };
    let prompt = ChatTemplate::builtin("nemotron").and_then(|template| template.render(&[message], "", ""));
    Ok(prompt.context("cannot put the prompt into the chat template")?)
}

/// The server to ask, and where its token is.
fn target(args: &GenerateArgs) -> Outcome<(String, Option<PathBuf>)> {
    if let (None, Some(url)) = (&args.run, &args.url) {
        return Ok((url.clone(), args.token_file.clone()));
    }
    let endpoint = match &args.run {
        Some(selector) => {
            let run_dir = find_run(selector)?;
            Endpoint::of(&run_dir)?.ok_or_else(|| not_serving(&run_dir))?
        }
        None => latest_endpoint()?,
    };
    Ok((endpoint.url, args.token_file.clone().or(endpoint.token_file)))
}

fn not_serving(run_dir: &RunDir) -> Failure {
    let name = run_dir.name();
    let phase = Observer::new(run_dir)
        .and_then(|mut observer| observer.look())
        .map_or_else(|_| "in an unknown state".into(), |status| status.phase.to_string());
    Failure::msg(Exit::Internal, format!("run {name} is {phase} and answers nowhere"))
        .hint(format!("nemotron wait {name} --for ready"))
}

/// Of the newest run that serves.
fn latest_endpoint() -> Outcome<Endpoint> {
    for run_dir in RunDir::list(&run_root()?).iter().rev() {
        // A damaged run directory must not hide an older run that works.
        if let Ok(Some(endpoint)) = Endpoint::of(run_dir) {
            return Ok(endpoint);
        }
    }
    Err(Failure::msg(Exit::Internal, "no run is serving").hint("start one with `nemotron serve`, or give --url"))
}

fn request(prompt: &str, sampling: &SamplingArgs, end_strings: Vec<String>) -> GenerateRequest {
    GenerateRequest {
        sentences: vec![prompt.to_owned()],
        tokens_to_generate: sampling.tokens_to_generate,
        min_tokens_to_generate: sampling.min_tokens_to_generate,
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        greedy: sampling.greedy,
        repetition_penalty: sampling.repetition_penalty,
        add_bos: sampling.add_bos,
        all_probs: false,
        random_seed: sampling.random_seed,
        end_strings,
    }
}
