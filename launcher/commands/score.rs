//! `nemotron score`: what a serving reward model says of conversations.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use anyhow::Context as _;
use nemotron_engine::chat::Message;
use nemotron_engine::reward;
use serde_json::{Map, Value, json};

use crate::cli::ScoreArgs;
use crate::client::Scores;
use crate::report::{Exit, Failure, Outcome, print_json, print_line};
use crate::server;

type Row = Map<String, Value>;

pub(crate) fn run(args: &ScoreArgs) -> Outcome {
    let rows = read_rows(args)?;
    let client = server::connect(&args.server)?;
    let mut scored = rows.iter();
    let conversations = rows.iter().map(|(_, messages)| messages.as_slice());
    client.score(conversations, args.concurrency.get(), |scores| {
        let (row, _) = scored.next().expect("an answer is to a conversation");
        let Scores { attributes, rewards, scores, exceeded } = scores;
        let rewards = rewards.into_iter().next().unwrap_or_default().into_iter().map(reward::number);
        let score = scores.first().copied().flatten().map_or(Value::Null, reward::number);
        let exceeded = exceeded.first() == Some(&true);
        let rewards = attributes.into_iter().zip(rewards);
        if args.json {
            let mut line = Row::from_iter([("schema".to_owned(), json!(1))]);
            line.extend(row.clone());
            line.insert("rewards".into(), Value::Object(rewards.collect()));
            line.insert("score".into(), score);
            line.insert("exceeded".into(), exceeded.into());
            return print_json(&line);
        }
        let mut text = if score.is_null() { String::new() } else { format!("score={score}") };
        for (attribute, value) in rewards {
            text += &format!(" {attribute}={value}");
        }
        print_line(text.trim_start().to_owned() + if exceeded { " (cut at the context's end)" } else { "" })
    })
}

fn read_rows(args: &ScoreArgs) -> Outcome<Vec<(Row, Vec<Message>)>> {
    if let (Some(prompt), Some(response)) = (&args.prompt, &args.response) {
        let row = json!({"prompt": prompt, "response": response});
        let row = parse(row).map_err(|reason| Failure::msg(Exit::Usage, reason))?;
        return Ok(vec![row]);
    }
    let stdin = [Path::new("-").to_owned()];
    let files = if args.files.is_empty() { &stdin[..] } else { &args.files };
    let mut rows = Vec::new();
    for file in files {
        let (name, reader): (String, Box<dyn BufRead>) = match file.as_os_str() == "-" {
            true => ("stdin".into(), Box::new(io::stdin().lock())),
            false => {
                let name = file.display().to_string();
                let file = File::open(file).with_context(|| format!("cannot read {name}"));
                let file = file.map_err(|error| Failure::new(Exit::Usage, error))?;
                (name, Box::new(BufReader::new(file)))
            }
        };
        for (index, line) in reader.lines().enumerate() {
            let at = |reason: String| Failure::msg(Exit::Usage, format!("{name}: line {}: {reason}", index + 1));
            let line = line.map_err(|error| at(error.to_string()))?;
            if line.trim().is_empty() {
                continue;
            }
            let row = serde_json::from_str(&line).map_err(|error| error.to_string()).and_then(parse);
            rows.push(row.map_err(at)?);
        }
    }
    Ok(rows)
}

fn parse(row: Value) -> Result<(Row, Vec<Message>), String> {
    let row = match row {
        Value::Object(row) => row,
        messages @ Value::Array(_) => Row::from_iter([("messages".to_owned(), messages)]),
        _ => return Err("a conversation is a JSON object, or a list of messages".into()),
    };
    let messages = Message::of_row(&row)?;
    Ok((row, messages))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_row_or_a_conversation() {
        let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
        let (row, said) = parse(messages.clone()).expect("messages");
        assert_eq!((&row["messages"], said.len()), (&messages, 2));
        let (row, said) = parse(json!({"id": 7, "prompt": "a", "response": "b"})).expect("a row");
        assert_eq!((&row["id"], said.len(), said[1].content.as_str()), (&json!(7), 2, "b"));
        parse(json!("text")).expect_err("a text alone");
        parse(json!({"response": "b"})).expect_err("no prompt");
    }
}
