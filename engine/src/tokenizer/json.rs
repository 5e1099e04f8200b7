//! `tokenizer.json`: the `tokenizers` crate encodes; its decoder is turned into a table of what each id adds to a text.

use serde_json::Value;
use tokenizers::Tokenizer;

use super::detokenize::{Leading, Surface, Surfaces};
use super::symbols::Symbols;
use super::vocabulary::Vocabulary;
use super::{Part, TokenizerError};

pub(super) struct Json {
    pub(super) vocabulary: Vocabulary,
    tokenizer: Tokenizer,
    /// Added tokens, which the crate finds anywhere in a text.
    symbols: Symbols,
}

impl Json {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, TokenizerError> {
        let damaged = |at: &str, what: String| TokenizerError::Damaged { at: at.to_owned(), what };
        // The crate panics over some damage instead of returning an error.
        let mut tokenizer = std::panic::catch_unwind(|| Tokenizer::from_bytes(bytes))
            .map_err(|_| damaged("json", "not a tokenizer".to_owned()))?
            .map_err(|error| damaged("json", error.to_string()))?;
        // A prompt is encoded whole and as it is, whatever the file says about batches for training.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| damaged("truncation", error.to_string()))?;
        let decoder = Decoder::compile(&serde_json::to_value(tokenizer.get_decoder()).unwrap_or_default())?;

        let mut tokens: Vec<(u32, String)> =
            tokenizer.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect();
        tokens.sort_unstable();
        // Ids need not be without holes, but one stray id must not make tables of gigabytes.
        const MAX_ID: u32 = 1 << 24;
        if let Some((id, token)) = tokens.last().filter(|(id, _)| *id > MAX_ID) {
            return Err(damaged("vocabulary", format!("{token:?} has the id {id}, more than {MAX_ID}")));
        }
        let added = tokenizer.get_added_tokens_decoder();
        let mut vocabulary = Vocabulary::new(Surfaces::new(decoder.leading, !decoder.byte_level));
        for (id, token) in &tokens {
            while vocabulary.len() < *id as usize {
                vocabulary.push_hole();
                vocabulary.surfaces.push(Surface::Nothing);
            }
            if vocabulary.len() > *id as usize || !vocabulary.push(token) {
                return Err(damaged("vocabulary", format!("two tokens have the id {id}")));
            }
            match decoder.surface(token) {
                _ if added.get(id).is_some_and(|token| token.special) => vocabulary.surfaces.push(Surface::Nothing),
                bytes if bytes.starts_with(b" ") => vocabulary.surfaces.push(Surface::Spaced(&bytes)),
                bytes => vocabulary.surfaces.push(Surface::Bytes(&bytes)),
            }
        }
        let special = |token| vocabulary.id(token).filter(|id| added.get(id).is_some_and(|token| token.special));
        let (bos, eos) = (special("<s>"), special("</s>"));
        (vocabulary.bos, vocabulary.eos) = (bos, eos);
        let symbols = Symbols::new(added.values().map(|token| token.content.as_str()));
        Ok(Self { vocabulary, tokenizer, symbols })
    }

    pub(super) fn encode(&self, text: &str) -> Vec<u32> {
        match self.tokenizer.encode_fast(text, false) {
            Ok(encoding) => encoding.get_ids().to_vec(),
            // Only a vocabulary that lacks its own unknown token leads here; no ids is what no one can mistake for the text.
            Err(error) => {
                tracing::error!(error, "tokenizer.json cannot encode a text");
                Vec::new()
            }
        }
    }

    pub(super) fn encode_parts(&self, parts: &[Part<'_>]) -> Vec<u32> {
        let mut text = String::new();
        let mut after_text = false;
        for part in parts {
            match *part {
                Part::Text(part) => {
                    text.push_str(if after_text { "\u{200b}" } else { "" });
                    text.push_str(part);
                }
                Part::Symbol(id) => text.push_str(self.vocabulary.piece(id).unwrap_or_default()),
            }
            after_text = matches!(part, Part::Text(_));
        }
        self.encode(&text)
    }

    pub(super) fn literal_cuts(&self, text: &str) -> Vec<usize> {
        let ends = text.char_indices().map(|(at, char)| (at, at + char.len_utf8()));
        ends.filter(|&(at, _)| self.symbols.longest_prefix(&text.as_bytes()[at..]).is_some())
            .map(|(_, end)| end)
            .collect()
    }
}

/// The decoders that can tell what an id adds without its neighbours.
struct Decoder {
    /// What stands for what, in the order of replacement.
    replacements: Vec<(String, String)>,
    byte_fallback: bool,
    byte_level: bool,
    leading: Leading,
}

impl Decoder {
    /// # Errors
    /// The decoder looks at more than one id at a time, or is not known.
    fn compile(decoder: &Value) -> Result<Self, TokenizerError> {
        let mut compiled =
            Self { replacements: Vec::new(), byte_fallback: false, byte_level: false, leading: Leading::Keep };
        let steps = match decoder.get("decoders") {
            Some(Value::Array(steps)) => steps.as_slice(),
            _ => std::slice::from_ref(decoder),
        };
        let mut fused = false;
        for step in steps {
            let replacement = |pattern: &str| step.pointer(pattern)?.as_str().map(str::to_owned);
            match step["type"].as_str().unwrap_or_default() {
                "Replace" if !fused => match (replacement("/pattern/String"), replacement("/content")) {
                    (Some(from), Some(to)) if !from.is_empty() => compiled.replacements.push((from, to)),
                    _ => return Err(unsupported(step)),
                },
                "Metaspace" => {
                    // The crate drops every space of the first token. Only the one that encoding adds is dropped here, as in the
                    // decoders that come with SentencePiece models.
                    compiled.replacements.extend(replacement("/replacement").map(|mark| (mark, " ".to_owned())));
                    if step["prepend_scheme"] != "never" {
                        compiled.leading = Leading::DropOne;
                    }
                }
                "ByteFallback" => compiled.byte_fallback = true,
                "ByteLevel" => compiled.byte_level = true,
                "Fuse" => fused = true,
                "Strip" if fused && step["content"] == " " && step["start"] == 1 && step["stop"] == 0 => {
                    compiled.leading = Leading::DropOne;
                }
                _ => return Err(unsupported(step)),
            }
        }
        Ok(compiled)
    }

    fn surface(&self, token: &str) -> Vec<u8> {
        if self.byte_fallback
            && let Some(digits) = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'))
            && digits.len() == 2
            && let Ok(byte) = u8::from_str_radix(digits, 16)
        {
            return vec![byte];
        }
        let text = self.replacements.iter().fold(token.to_owned(), |text, (from, to)| text.replace(from, to));
        match text.chars().map(byte_of).collect() {
            Some(bytes) if self.byte_level => bytes,
            _ => text.into_bytes(),
        }
    }
}

fn unsupported(step: &Value) -> TokenizerError {
    TokenizerError::Unsupported(format!("the decoder {step}"))
}

/// The byte that a character stands for in byte-level BPE: printable Latin-1 characters for themselves, U+0100 and those that follow it for
/// the other bytes in their order.
fn byte_of(char: char) -> Option<u8> {
    let printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match u8::try_from(char) {
        Ok(byte) => Some(byte).filter(printable),
        Err(_) => (0..=u8::MAX).filter(|byte| !printable(byte)).nth((char as usize).checked_sub(0x100)?),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::tokenizer::{Detokenizer, Tokenizer as OurTokenizer};

    /// A BPE tokenizer as converters write it for a SentencePiece model: byte fallback, and special and other added tokens.
    fn file() -> Value {
        let mut pieces: Vec<String> =
            ["<unk>", "<s>", "</s>", "<extra_id_0>", "<extra_id_1>"].map(str::to_owned).into();
        pieces.extend((0..=u8::MAX).map(|byte| format!("<0x{byte:02X}>")));
        pieces.extend(["\u{2581}", "a", "b", "ab", "\u{2581}ab", "é"].map(str::to_owned));
        let vocab: serde_json::Map<_, _> = pieces.into_iter().zip((0..).map(Value::from)).collect();
        let added = |id: u32, content: &str, special: bool| {
            json!({"id": id, "content": content, "special": special,
                   "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
        };
        json!({
            "version": "1.0", "padding": null, "post_processor": null, "pre_tokenizer": null,
            "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
            "added_tokens": [
                added(0, "<unk>", true), added(1, "<s>", true), added(2, "</s>", true),
                added(3, "<extra_id_0>", false), added(4, "<extra_id_1>", false), added(300, "<late>", false),
            ],
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
            ]},
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
                "continuing_subword_prefix": null, "end_of_word_suffix": null, "ignore_merges": false,
                "vocab": vocab, "merges": [["a", "b"], ["\u{2581}", "ab"]]},
        })
    }

    fn load(file: &Value) -> Result<OurTokenizer, TokenizerError> {
        OurTokenizer::from_json(file.to_string().as_bytes())
    }

    #[test]
    fn added_tokens_show_and_special_ones_do_not() {
        let tokenizer = load(&file()).unwrap();
        assert_eq!((tokenizer.kind(), tokenizer.vocab_size()), ("tokenizer.json", 268));
        assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(1), Some(2)));
        let ids = tokenizer.encode("<extra_id_0>ab ab\n</s>");
        let newline = tokenizer.token_id("<0x0A>").unwrap();
        assert_eq!(ids, [3, tokenizer.token_id("ab").unwrap(), tokenizer.token_id("\u{2581}ab").unwrap(), newline, 2]);
        assert_eq!(tokenizer.decode(&ids), "<extra_id_0>ab ab\n");
        assert_eq!((tokenizer.piece(2), tokenizer.piece(newline)), ("</s>", "<0x0A>"));
        assert_eq!(tokenizer.single_token_after_marker("<extra_id_1>"), Some(4));
        assert_eq!(tokenizer.single_token_after_marker("ab ab"), None);
    }

    #[test]
    fn a_stripped_space_is_one_at_the_beginning() {
        let mut file = file();
        let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        file["decoder"]["decoders"].as_array_mut().unwrap().push(strip);
        let tokenizer = load(&file).unwrap();
        let space_ab = tokenizer.token_id("\u{2581}ab").unwrap();
        assert_eq!(tokenizer.decode(&[1, space_ab, space_ab]), "ab ab");
        let mut out = String::new();
        Detokenizer::new(&tokenizer, &[space_ab]).push(space_ab, &mut out);
        assert_eq!(out, " ab");
    }

    #[test]
    fn byte_level_tokens_are_bytes() {
        let mut file = file();
        file["decoder"] =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        file["model"]["vocab"] = json!({"\u{120}a": 0, "\u{e2}\u{124}": 1, "\u{af}": 2, "\u{10a}": 3});
        file["model"]["merges"] = json!([]);
        file["model"]["unk_token"] = Value::Null;
        file["added_tokens"] = json!([]);
        let tokenizer = load(&file).unwrap();
        assert_eq!(tokenizer.decode(&[0, 1, 2, 3]), " a\u{20af}\n");
        assert_eq!(tokenizer.decode(&[1, 3, 2]), "\u{fffd}\n\u{fffd}");
        let bytes: Vec<u8> = (0..=u8::MAX).collect();
        let chars: Vec<_> = (0..0x180).filter_map(char::from_u32).filter_map(byte_of).collect();
        let mut sorted = chars.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, bytes, "each byte has one character");
        assert_eq!([' ', '\u{10a}', '\u{120}', '\u{143}'].map(byte_of), [None, Some(b'\n'), Some(b' '), Some(0xad)]);
    }

    #[test]
    fn literal_parts_hold_no_added_token() {
        let tokenizer = load(&file()).unwrap();
        let parts: Vec<_> = tokenizer.split_literal("a</s><extra_id_1>b").into_iter().map(Part::Text).collect();
        let ids = tokenizer.encode_parts(&parts);
        assert!(!ids.contains(&2) && !ids.contains(&4), "{ids:?}");
        assert_eq!(tokenizer.decode(&ids), "a<\u{200b}/s><\u{200b}extra_id_1>b");
        let parts = [Part::Symbol(1), Part::Text("ab<extra_id_1>"), Part::Symbol(2)];
        assert_eq!(tokenizer.encode_parts(&parts), [1, tokenizer.token_id("ab").unwrap(), 4, 2]);
    }

    #[test]
    fn what_cannot_work_is_named() {
        let check = |file: &Value, expected: &str| {
            let error = load(file).err().unwrap().to_string();
            assert!(error.contains(expected), "{error:?} does not say {expected:?}");
        };
        check(&Value::Null, "damaged tokenizer, json");
        for decoder in [Value::Null, json!({"type": "WordPiece", "prefix": "##", "cleanup": true})] {
            let mut file = file();
            file["decoder"] = decoder;
            check(&file, "the decoder");
        }
        let mut file = file();
        file["model"]["vocab"]["far"] = json!(u32::MAX);
        check(&file, "has the id 4294967295");
    }

    proptest! {
        #[test]
        fn damaged_files_are_refused_or_work(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            swap in any::<(prop::sample::Index, prop::sample::Index)>(),
            text in "([ab é€\n]{0,4}|<extra_id_1>|</s>|😀){0,6}",
        ) {
            let mut bytes = file().to_string().into_bytes();
            for (index, byte) in edits {
                let index = index.index(bytes.len());
                bytes[index] = byte;
            }
            let len = bytes.len();
            bytes.swap(swap.0.index(len), swap.1.index(len));
            if let Ok(tokenizer) = OurTokenizer::from_json(&bytes) {
                tokenizer.decode(&tokenizer.encode(&text));
            }
        }

        #[test]
        fn text_comes_back_as_the_crate_decodes_it(text in "([ab é€\n]{0,4}|<extra_id_1>|</s>|😀){0,6}") {
            let file = file();
            let tokenizer = load(&file).unwrap();
            let peer = Tokenizer::from_bytes(file.to_string().as_bytes()).unwrap();
            let ids = tokenizer.encode(&text);
            prop_assert_eq!(tokenizer.decode(&ids), text.replace("</s>", ""));
            prop_assert_eq!(tokenizer.decode(&ids), peer.decode(&ids, true).unwrap());
        }
    }
}
