//! The answer of `PUT /generate`: rows of equal length, keys in alphabetical order, written piece by piece.

use std::sync::Arc;

use axum::body::Bytes;
use serde::Serialize;

use crate::tokenizer::Tokenizer;

/// What stands for a log-probability of minus infinity: JSON has none, and `exp` of this is 0 all the same.
const IMPOSSIBLE: f32 = -1e30;

/// A finished row.
pub(super) struct Generated {
    /// The prompt's text, if it was given as text.
    pub(super) text: Option<String>,
    pub(super) prompt_len: usize,
    /// Prompt and completion.
    pub(super) ids: Vec<u32>,
    /// Of ids 1.., if asked for.
    pub(super) logprobs: Vec<f32>,
}

/// All rows of a request.
pub(super) struct Reply {
    pub(super) rows: Vec<Generated>,
    /// Fills rows that end before the longest.
    pub(super) filler: u32,
    pub(super) compute_logprob: bool,
}

impl Reply {
    /// Brings all rows to the length of the longest: NeMo's loop ends when its last row does, and a finished row takes EOS until then.
    ///
    /// The filler's log-probability is 0: it stands there with certainty, and adds nothing to a sum over the row.
    fn pad(&mut self) {
        let length = self.length();
        for row in &mut self.rows {
            row.ids.resize(length, self.filler);
            if self.compute_logprob {
                row.logprobs.resize(length - 1, 0.0);
            }
        }
    }

    /// Of every row in the answer.
    pub(super) fn length(&self) -> usize {
        self.rows.iter().map(|row| row.ids.len()).max().unwrap_or(0)
    }

    /// The JSON text without the brace that opens it, a row at a time.
    pub(super) fn into_chunks(mut self, tokenizer: Tokenizer) -> impl Iterator<Item = Bytes> + Send {
        self.pad();
        let rows = Arc::new(self.rows);
        let (asked, logprob_end) = match self.compute_logprob {
            true => (Some("\"logprob\":["), "],"),
            false => (None, "\"logprob\":null,"),
        };
        let list = |head, item| list(head, rows.clone(), tokenizer.clone(), item);
        let logprob = asked.map(|head| list(head, |out, row, _| floats(out, &row.logprobs)));
        let offsets = list("\"offsets\":[", |out, row, tokenizer| {
            json(out, &offsets(row.ids.iter().map(|&id| tokenizer.piece(id))));
        });
        let sentences = list("],\"sentences\":[", |out, row, tokenizer| json(out, &sentence(row, tokenizer)));
        let token_ids = list("],\"token_ids\":[", |out, row, _| json(out, &row.ids));
        let tokens = list("],\"tokens\":[", |out, row, tokenizer| {
            json(out, &row.ids.iter().map(|&id| tokenizer.piece(id)).collect::<Vec<_>>());
        });
        logprob
            .into_iter()
            .flatten()
            .chain(once(logprob_end))
            .chain(offsets.chain(sentences).chain(token_ids).chain(tokens))
            .chain(once("]}\n"))
    }
}

fn once(text: &'static str) -> impl Iterator<Item = Bytes> + Send {
    std::iter::once(Bytes::from_static(text.as_bytes()))
}

/// `head`, then an item of each row, a chunk each, with commas between.
fn list(
    head: &'static str,
    rows: Arc<Vec<Generated>>,
    tokenizer: Tokenizer,
    item: fn(&mut Vec<u8>, &Generated, &Tokenizer),
) -> impl Iterator<Item = Bytes> + Send {
    let items = (0..rows.len()).map(move |index| {
        let mut out = Vec::new();
        if index > 0 {
            out.push(b',');
        }
        item(&mut out, &rows[index], &tokenizer);
        Bytes::from(out)
    });
    once(head).chain(items)
}

fn json(out: &mut Vec<u8>, value: &impl Serialize) {
    serde_json::to_writer(out, value).expect("numbers and strings have a JSON form, and memory takes every byte");
}

/// A list of numbers in which everything is finite.
pub(super) fn floats(out: &mut Vec<u8>, values: &[f32]) {
    out.push(b'[');
    for (index, value) in values.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        json(out, if value.is_finite() { value } else { &IMPOSSIBLE });
    }
    out.push(b']');
}

/// The distribution at a filler position: the filler with certainty.
pub(super) fn full_filler(vocab_size: usize, filler: u32) -> Vec<f32> {
    let mut values = vec![IMPOSSIBLE; vocab_size];
    if let Some(value) = values.get_mut(filler as usize) {
        *value = 0.0;
    }
    values
}

/// Where each piece starts in the concatenation of the pieces, in code points.
fn offsets<'a>(pieces: impl Iterator<Item = &'a str>) -> Vec<usize> {
    pieces
        .scan(0, |offset, piece| {
            let start = *offset;
            *offset += piece.chars().count();
            Some(start)
        })
        .collect()
}

/// The text of prompt and completion. Clients cut the prompt off by its length, so it must stand there as it was sent.
pub(super) fn sentence(row: &Generated, tokenizer: &Tokenizer) -> String {
    let whole = tokenizer.decode(&row.ids);
    let Some(prompt) = &row.text else { return whole };
    let shown = tokenizer.decode(&row.ids[..row.prompt_len]);
    if shown.chars().count() == prompt.chars().count() {
        return whole;
    }
    // The tokenizer normalises (collapses spaces, say).
    match whole.strip_prefix(&shown) {
        Some(new) => format!("{prompt}{new}"),
        None => whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(prompt_len: usize, ids: &[u32]) -> Generated {
        let logprobs = vec![-0.5; ids.len() - 1];
        Generated { text: None, prompt_len, ids: ids.to_vec(), logprobs }
    }

    fn reply(rows: Vec<Generated>) -> Reply {
        Reply { rows, filler: 3, compute_logprob: true }
    }

    #[test]
    fn rows_are_filled_up_to_the_last_one_to_stop() {
        // Prompts of 3 and 5, four tokens to generate: both rows may grow to 9, so the short prompt gets two more.
        let mut reply = reply(vec![row(3, &[7, 7, 7, 8, 5]), row(5, &[7, 7, 7, 7, 7, 8, 8, 8, 8])]);
        reply.pad();
        assert_eq!(reply.length(), 9);
        assert_eq!(reply.rows[0].ids, [7, 7, 7, 8, 5, 3, 3, 3, 3]);
        assert_eq!(reply.rows[0].logprobs, [-0.5, -0.5, -0.5, -0.5, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(reply.rows[1].ids.len(), 9);
    }

    #[test]
    fn rows_end_where_the_last_one_stops_early() {
        let mut reply = reply(vec![row(3, &[7, 7, 7, 5]), row(5, &[7, 7, 7, 7, 7, 5])]);
        reply.pad();
        assert_eq!(reply.length(), 6);
        assert_eq!(reply.rows[0].ids, [7, 7, 7, 5, 3, 3]);
    }

    #[test]
    fn offsets_count_code_points_of_pieces() {
        assert_eq!(offsets(["▁", "<extra_id_1>", "<0x0A>", "▁né", "x"].into_iter()), [0, 1, 13, 19, 22]);
        assert_eq!(offsets([].into_iter()), [0; 0]);
    }

    #[test]
    fn numbers_that_json_lacks_become_finite() {
        let mut out = Vec::new();
        floats(&mut out, &[f32::NEG_INFINITY, -0.5, f32::NAN, 0.0]);
        assert_eq!(String::from_utf8_lossy(&out), "[-1e+30,-0.5,-1e+30,0.0]");
    }

    #[test]
    fn filler_distributions_sum_to_one() {
        let sum: f32 = full_filler(8, 3).iter().map(|value| value.exp()).sum();
        assert_eq!(sum, 1.0);
    }
}
