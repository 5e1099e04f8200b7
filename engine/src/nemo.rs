//! NeMo's rules for the end of a row, which `PUT /generate` and job files share.

use crate::engine::EngineInfo;
use crate::request::{StopMatch, Stopping};
use crate::tokenizer::Tokenizer;

/// NeMo's name for the end-of-sequence id, whatever the tokenizer calls it. It is never matched as text.
const EOS_ALIAS: &str = "<|endoftext|>";

/// Stands in front of an end string to find out whether it is one id: whatever a tokenizer does to the start of a text happens
/// to this symbol, not to the end string.
const PROBE: &str = "<extra_id_1>";

/// The id that ends a row whatever its end strings are, and fills finished rows.
///
/// A checkpoint may list end-of-turn symbols among its end ids; NeMo knows only the tokenizer's own `</s>`.
pub(crate) fn eos_id(info: &EngineInfo, tokenizer: &Tokenizer) -> Option<u32> {
    let spelled = info.eos_ids.iter().find(|&&id| tokenizer.piece(id) == "</s>");
    spelled.or(info.eos_ids.first()).copied()
}

/// When a row with these `end_strings` ends.
pub(crate) fn stopping(
    tokenizer: &Tokenizer,
    eos: Option<u32>,
    end_strings: &[String],
    max_new_tokens: u32,
    min_new_tokens: u32,
) -> Stopping {
    let (stop_ids, stop_strings) = split_end_strings(end_strings, |text| tokenizer.encode(text));
    Stopping {
        max_new_tokens,
        min_new_tokens,
        eos_ids: eos.into_iter().collect(),
        stop_ids,
        stop_strings,
        stop_match: StopMatch::RowEndsWith,
    }
}

/// End strings that are a single id, as ids, and the others, as strings.
fn split_end_strings(end_strings: &[String], encode: impl Fn(&str) -> Vec<u32>) -> (Vec<u32>, Vec<String>) {
    let probe = encode(PROBE);
    let (mut ids, mut strings) = (Vec::new(), Vec::new());
    for end in end_strings.iter().filter(|end| *end != EOS_ALIAS) {
        match encode(&format!("{PROBE}{end}")).strip_prefix(probe.as_slice()) {
            Some(&[id]) => ids.push(id),
            _ => strings.push(end.clone()),
        }
    }
    (ids, strings)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Knows `<extra_id_1>` (5) and `▁User` (7) as symbols; any other character is an id of its own, after a dummy prefix (9).
    fn encode(mut text: &str) -> Vec<u32> {
        let mut ids = vec![9];
        while let Some(first) = text.chars().next() {
            let (id, len) = [("<extra_id_1>", 5), (" User", 7)]
                .iter()
                .find(|(symbol, _)| text.starts_with(symbol))
                .map_or((100 + first as u32, first.len_utf8()), |(symbol, id)| (*id, symbol.len()));
            ids.push(id);
            text = &text[len..];
        }
        ids
    }

    #[test]
    fn a_single_token_stops_by_id_and_anything_else_as_text() {
        let strings = ["<|endoftext|>", "<extra_id_1>", "\u{11}", "<extra_id_1>User", "", " User", "User"];
        let (ids, texts) = split_end_strings(&strings.map(String::from), encode);
        assert_eq!(ids, [5, 100 + 0x11, 7]);
        assert_eq!(texts, ["<extra_id_1>User", "", "User"]);
    }
}
