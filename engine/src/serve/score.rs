//! `full_logprob`: distributions over the vocabulary, computed while they are sent.
//!
//! One distribution of a large vocabulary is megabytes of text, and the first row's must all be written before the second's. So the rows are
//! generated first, then computed once more as prompts, one after the other and only as fast as the client reads: memory stays flat.

use std::io;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use futures_util::stream;
use tokio::sync::mpsc::{Sender, channel};

use crate::engine::Engine;
use crate::request::{Event, LogprobSpec, Logprobs, Request, RowError, Sampling, Stopping};

use super::Server;
use super::shape::{Reply, floats, full_filler};

type Chunks = Sender<io::Result<Bytes>>;

/// The answer with `full_logprob`. A failure on the way breaks the connection off, as the status is sent already.
pub(super) fn stream(server: Arc<Server>, reply: Reply) -> Body {
    let (chunks, receiver) = channel(2);
    tokio::spawn(async move {
        // Whether the client has gone is seen even while the rows wait for their turn.
        let written = tokio::select! {
            () = chunks.closed() => return,
            written = write(&server, reply, &chunks) => written,
        };
        if let Err(error) = written {
            tracing::error!(%error, "a request failed");
            let _ = chunks.send(Err(error)).await;
        }
    });
    Body::from_stream(stream::unfold(receiver, |mut receiver| async move { Some((receiver.recv().await?, receiver)) }))
}

async fn write(server: &Server, mut reply: Reply, chunks: &Chunks) -> io::Result<()> {
    let group = server.engine.new_group();
    let positions = reply.length().saturating_sub(1);
    let filler = full_filler(server.engine.info().vocab_size, reply.filler);
    send(chunks, "{\"full_logprob\":[").await?;
    for (index, row) in reply.rows.iter_mut().enumerate() {
        send(chunks, if index == 0 { "[" } else { ",[" }).await?;
        row.logprobs.clear();
        let mut scored = Scored::submit(&server.engine, group, &row.ids).map_err(io::Error::other)?;
        while let Some(distributions) = scored.next().await.map_err(io::Error::other)? {
            for position in distributions {
                let Some(&id) = row.ids.get(row.logprobs.len() + 1) else { break };
                send_distribution(chunks, row.logprobs.is_empty(), &position.full).await?;
                // The same numbers here as there, on any device.
                row.logprobs.push(position.full.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY));
            }
        }
        for position in row.logprobs.len()..positions {
            send_distribution(chunks, position == 0, &filler).await?;
        }
        send(chunks, "]").await?;
    }
    send(chunks, "],").await?;
    for chunk in reply.into_chunks(server.tokenizer.clone()) {
        send(chunks, chunk).await?;
    }
    Ok(())
}

async fn send_distribution(chunks: &Chunks, first: bool, values: &[f32]) -> io::Result<()> {
    let mut out = Vec::new();
    if !first {
        out.push(b',');
    }
    floats(&mut out, values);
    send(chunks, out).await
}

async fn send(chunks: &Chunks, chunk: impl Into<Bytes>) -> io::Result<()> {
    let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
    chunks.send(Ok(chunk.into())).await.map_err(gone)
}

/// A finished row whose distributions are computed.
struct Scored {
    row: crate::engine::Row,
}

impl Scored {
    /// All but the last id are the prompt; the distribution of the last one is that of the token that is generated.
    fn submit(engine: &Engine, group: u64, ids: &[u32]) -> Result<Self, RowError> {
        let request = Request {
            prompt: ids.split_last().map_or_else(Vec::new, |(_, prompt)| prompt.to_vec()),
            sampling: Sampling::default(),
            stopping: Stopping { max_new_tokens: 1, ..Stopping::default() },
            logprobs: LogprobSpec { tokens: true, prompt: true, full: true, ..LogprobSpec::default() },
        };
        Ok(Self { row: engine.submit_in(group, request)? })
    }

    async fn next(&mut self) -> Result<Option<Vec<Logprobs>>, RowError> {
        match self.row.events.recv().await {
            Some(Event::Prompt(positions)) => Ok(Some(positions)),
            Some(Event::Token { logprobs, .. }) => Ok(Some(logprobs.map(|logprobs| *logprobs).into_iter().collect())),
            Some(Event::Finished(_)) => Ok(None),
            Some(Event::Failed(error)) => Err(error),
            None => Err(RowError::EngineFailed("it dropped the row".into())),
        }
    }
}
