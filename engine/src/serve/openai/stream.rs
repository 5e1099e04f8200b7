//! Server-sent events: choices as they grow.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::response::sse::{Event as Sse, KeepAlive};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream, SelectAll};
use serde_json::{Value, json};

use crate::request::{Event, RowError};
use crate::serve::rows::TrackedRow;

use super::body::Dialect;
use super::choice::Choice;
use super::{Answer, ApiError, reason};

/// Streams rows whose choices are numbered in their order. Dropping the response cancels the rows.
pub(super) fn respond(answer: Answer, rows: Vec<(TrackedRow, Choice)>, include_usage: bool) -> Response {
    let (rows, choices): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
    let rows = rows.into_iter().enumerate().map(|(index, row)| {
        stream::unfold(row, move |mut row| async move { row.next().await.map(|event| ((index, event), row)) }).boxed()
    });
    let mut state = Streaming {
        rows: stream::select_all(rows),
        choices,
        ready: VecDeque::new(),
        over: false,
        answer,
        include_usage,
    };
    if state.answer.dialect == Dialect::Chat {
        for index in 0..state.choices.len() {
            state.push_choice(index, json!({"delta": {"role": "assistant", "content": ""}}), Value::Null, Value::Null);
        }
    }
    let events =
        stream::unfold(state, |mut state| async move { Some((Ok::<_, Infallible>(state.next().await?), state)) });
    axum::response::sse::Sse::new(events).keep_alive(KeepAlive::default()).into_response()
}

struct Streaming {
    rows: SelectAll<BoxStream<'static, (usize, Event)>>,
    choices: Vec<Choice>,
    ready: VecDeque<Sse>,
    /// The closing events are in `ready`.
    over: bool,
    answer: Answer,
    include_usage: bool,
}

impl Streaming {
    async fn next(&mut self) -> Option<Sse> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.over {
                return None;
            }
            match self.rows.next().await {
                Some((_, Event::Failed(error))) => self.fail(error),
                Some((index, event)) => self.update(index, event),
                None => self.close(),
            }
        }
    }

    fn update(&mut self, index: usize, event: Event) {
        self.choices[index].update(event);
        let Some(piece) = self.choices[index].take() else { return };
        let logprobs = self.answer.logprobs(&self.choices[index], &piece);
        let reason = reason(piece.finished);
        let choice = match self.answer.dialect {
            Dialect::Completions => json!({"text": piece.text}),
            Dialect::Chat if piece.text.is_empty() => json!({"delta": {}}),
            Dialect::Chat => json!({"delta": {"content": piece.text}}),
        };
        self.push_choice(index, choice, logprobs, reason);
    }

    fn push_choice(&mut self, index: usize, mut choice: Value, logprobs: Value, reason: Value) {
        choice["index"] = index.into();
        choice["logprobs"] = logprobs;
        choice["finish_reason"] = reason;
        let usage = self.include_usage.then_some(Value::Null);
        self.push(&self.answer.object(self.answer.kind(true), vec![choice], usage));
    }

    fn close(&mut self) {
        if self.include_usage {
            let usage = self.answer.usage(self.choices.iter().map(|choice| choice.num_tokens).sum());
            self.push(&self.answer.object(self.answer.kind(true), Vec::new(), Some(usage)));
        }
        self.ready.push_back(Sse::default().data("[DONE]"));
        self.over = true;
    }

    /// The status is sent already, so the error is an event; the other rows are given up.
    fn fail(&mut self, error: RowError) {
        self.push(&ApiError::from(error).body());
        self.ready.push_back(Sse::default().data("[DONE]"));
        self.rows.clear();
        self.over = true;
    }

    fn push(&mut self, object: &Value) {
        self.ready.push_back(Sse::default().data(object.to_string()));
    }
}
