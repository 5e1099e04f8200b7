use std::io::{ErrorKind, Read as _};

use anyhow::Context as _;
use nemotron_engine::chat::{ChatTemplate, Message, Role};
use serde_json::json;

use crate::cli::{GenerateArgs, SamplingArgs};
use crate::client::{Completion, GenerateRequest, completion};
use crate::report::{Exit, Failure, Outcome, print, print_json, print_line};
use crate::server;

pub(crate) fn run(args: &GenerateArgs) -> Outcome {
    let texts = read_prompts(args)?;
    let prompts = texts.iter().map(|text| as_prompt(args, text)).collect::<Outcome<Vec<String>>>()?;
    let client = server::connect(&args.server)?;
    let end_strings = args.sampling.end_strings();
    let requests = prompts.iter().map(|prompt| request(prompt, &args.sampling, end_strings.clone()));
    if args.stream {
        for request in requests {
            if !client.stream(&request, |text| print(text))? || !print("\n")? {
                break;
            }
        }
        return Ok(());
    }
    let mut answered = texts.iter().zip(&prompts);
    client.generate(requests, args.concurrency.get(), |answer| {
        let (text, prompt) = answered.next().expect("an answer is to a prompt");
        let Completion { text: response, finish_reason } = completion(&answer, prompt, &end_strings);
        match args.json {
            true => {
                print_json(&json!({"schema": 1, "prompt": text, "response": response, "finish_reason": finish_reason}))
            }
            false => print_line(response),
        }
    })
}

/// The prompts as they were given, in order.
fn read_prompts(args: &GenerateArgs) -> Outcome<Vec<String>> {
    let mut prompts = Vec::new();
    for prompt in &args.prompts {
        match prompt.as_str() {
            "-" if !args.lines => prompts.push(read_stdin()?),
            "-" => prompts.extend(read_stdin()?.lines().map(String::from)),
            _ => prompts.push(prompt.clone()),
        }
    }
    if args.lines && !args.prompts.iter().any(|prompt| prompt == "-") {
        prompts.extend(read_stdin()?.lines().map(String::from));
    } else if args.prompts.is_empty() {
        prompts.push(read_stdin()?);
    }
    Ok(prompts)
}

fn read_stdin() -> Outcome<String> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).map_err(|error| {
        let exit = if error.kind() == ErrorKind::InvalidData { Exit::Usage } else { Exit::Internal };
        Failure::new(exit, anyhow::Error::new(error).context("cannot read the prompt from stdin"))
    })?;
    // The line end of `echo` and of files is not part of the prompt.
    Ok(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}

/// The text that is sent for a prompt.
fn as_prompt(args: &GenerateArgs, text: &str) -> Outcome<String> {
    if args.raw {
        return Ok(text.to_owned());
    }
    let template = match args.template.as_str() {
        "nemotron" => ChatTemplate::builtin("nemotron").map_err(anyhow::Error::new),
        file => std::fs::read_to_string(file)
            .with_context(|| format!("cannot read the template {file}"))
            .and_then(|source| Ok(ChatTemplate::from_source(&source, file)?)),
    };
    let message = |role, content: &str| Message { role, content: content.to_owned() };
    let mut messages = vec![message(Role::User, text)];
    if !args.system.is_empty() {
        messages.insert(0, message(Role::System, &args.system));
    }
    let prompt = template.and_then(|template| Ok(template.render(&messages, "", "")?));
    prompt.map_err(|error| Failure::new(Exit::Usage, error.context("cannot put the prompt into the chat template")))
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
