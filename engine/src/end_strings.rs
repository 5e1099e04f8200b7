//! When a row ends by NeMo's rules, which `PUT /generate` and job files share.

use crate::engine::EngineInfo;
use crate::request::{StopMatch, Stopping};
use crate::tokenizer::Tokenizer;

/// NeMo's name for the end-of-sequence id, whatever the tokenizer calls it. It is never matched as text.
pub(crate) const EOS_ALIAS: &str = "<|endoftext|>";

/// The id that ends a row whatever its end strings are, and fills finished rows: the tokenizer's own. A checkpoint may list end-of-turn
/// symbols among its end ids as well; NeMo does not know them.
pub(crate) fn eos_id(info: &EngineInfo, tokenizer: &Tokenizer) -> Option<u32> {
    tokenizer.eos_id().or(info.config.eos_ids.first().copied())
}

/// When a row with these `end_strings` ends: those that are a single token are compared by id, the others as text.
pub(crate) fn stopping(
    tokenizer: &Tokenizer,
    eos: Option<u32>,
    end_strings: &[String],
    max_new_tokens: u32,
    min_new_tokens: u32,
) -> Stopping {
    let (mut stop_ids, mut stop_strings) = (Vec::new(), Vec::new());
    for end in end_strings.iter().filter(|end| *end != EOS_ALIAS) {
        match tokenizer.single_token_after_marker(end) {
            Some(id) => stop_ids.push(id),
            None => stop_strings.push(end.clone()),
        }
    }
    Stopping {
        max_new_tokens,
        min_new_tokens,
        eos_ids: eos.into_iter().collect(),
        stop_ids,
        stop_strings,
        stop_match: StopMatch::RowEndsWith,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn the_recipes_end_strings_are_ids_but_for_the_last() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden/tok/ident_nodummy.model");
        let tokenizer = Tokenizer::from_sentencepiece(&std::fs::read(path).unwrap()).unwrap();
        let end_strings = ["<|endoftext|>", "<extra_id_1>", "\u{11}", "<extra_id_1>User", ""].map(String::from);
        let stopping = stopping(&tokenizer, tokenizer.eos_id(), &end_strings, 8, 1);
        assert_eq!(stopping.eos_ids, [3]);
        assert_eq!(stopping.stop_ids, [5, tokenizer.token_id("<0x11>").unwrap()]);
        assert_eq!(stopping.stop_strings, ["<extra_id_1>User", ""]);
    }
}
