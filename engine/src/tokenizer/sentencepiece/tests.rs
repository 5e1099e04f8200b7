#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::Value;

use super::ordered;
use crate::tokenizer::{Part, Tokenizer, TokenizerError};

const MODELS: [&str; 3] = ["ident_nodummy", "ident_dummy", "nfkc_dummy"];

static TOKENIZERS: LazyLock<[Tokenizer; 3]> = LazyLock::new(|| MODELS.map(load));

fn fixture(file: &str) -> Vec<u8> {
    std::fs::read(format!("{}/../tests/fixtures/golden/tok/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn load(model: &str) -> Tokenizer {
    Tokenizer::from_sentencepiece(&fixture(&format!("{model}.model"))).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn unhex(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn equals_the_reference_implementation() {
    let vectors: Value = serde_json::from_slice(&fixture("vectors.json")).unwrap();
    for model in MODELS {
        let tokenizer = load(model);
        let cases = |kind: &str| vectors[model][kind].as_array().unwrap().iter();
        for case in cases("encode") {
            let text = case["text"].as_str().unwrap();
            assert_eq!(tokenizer.encode(text), ids(&case["ids"]), "{model}: {text:?}");
            assert_eq!(tokenizer.decode(&ids(&case["ids"])), case["decoded"], "{model}: {text:?}");
        }
        for case in cases("decode") {
            assert_eq!(tokenizer.decode(&ids(&case["ids"])), case["decoded"], "{model}: {}", case["ids"]);
        }
        for case in cases("raw_bytes") {
            let bytes = unhex(case["hex"].as_str().unwrap());
            assert_eq!(tokenizer.encode_bytes(&bytes), ids(&case["ids"]), "{model}: {}", case["hex"]);
        }
    }
}

#[test]
fn names_pieces_and_symbols() {
    let tokenizer = load("ident_nodummy");
    assert_eq!(tokenizer.kind(), "SentencePiece BPE");
    assert_eq!(tokenizer.vocab_size(), 1024);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (Some(2), Some(3)));
    assert_eq!((tokenizer.piece(5), tokenizer.piece(34)), ("<extra_id_1>", "<0x0A>"));
    assert_eq!(tokenizer.token_id("<extra_id_1>"), Some(5));
    assert_eq!((tokenizer.token_id("no such piece"), tokenizer.piece(1024)), (None, ""));
    assert_eq!(tokenizer.decode(&[1024, u32::MAX]), "");
}

#[test]
fn finds_what_a_text_is_after_a_marker() {
    for model in ["ident_nodummy", "ident_dummy"] {
        let tokenizer = load(model);
        assert_eq!(tokenizer.single_token_after_marker("<extra_id_1>"), Some(5));
        assert_eq!(tokenizer.single_token_after_marker("\x11"), tokenizer.token_id("<0x11>"));
        assert_eq!(tokenizer.single_token_after_marker("<extra_id_1>User"), None);
        assert_eq!(tokenizer.single_token_after_marker(""), None);
    }
}

#[test]
fn symbols_are_found_within_one_part_only() {
    for model in MODELS {
        let tokenizer = load(model);
        let content = "a <extra_id_1>\u{ff1c}extra_id_1> <<extra_id_10>";
        let literal: Vec<_> = tokenizer.split_literal(content).into_iter().map(Part::Text).collect();
        let encoded = tokenizer.encode_parts(&literal);
        assert!(encoded.iter().all(|id| !(4..24).contains(id)), "{model}: {encoded:?}");
        assert_eq!(tokenizer.decode(&encoded), tokenizer.decode(&tokenizer.encode(content)));

        let parts = [Part::Symbol(2), Part::Text("<extra_id_1>a"), Part::Symbol(3), Part::Symbol(u32::MAX)];
        let encoded = tokenizer.encode_parts(&parts);
        assert_eq!((encoded[0], *encoded.last().unwrap()), (2, 3), "{model}");
        assert_eq!(encoded[1..encoded.len() - 1], tokenizer.encode("<extra_id_1>a"), "{model}");
    }
}

#[test]
fn long_texts_take_no_more_than_their_share() {
    for model in MODELS {
        let tokenizer = load(model);
        for unit in [" ", "a", "<extra_id_", "<", "\u{1f600}", "\u{3000}", "e\u{301}"] {
            let text = unit.repeat(100_000 / unit.len());
            let start = Instant::now();
            let encoded = tokenizer.encode(&text);
            assert!(start.elapsed() < Duration::from_secs(1), "{model}, {unit:?}: {:?}", start.elapsed());
            assert!(encoded.len() <= text.len() + 3);
        }
    }
}

#[test]
fn scores_keep_their_order_as_integers() {
    let scores = [f32::NEG_INFINITY, -2.0, -1.0, -f32::MIN_POSITIVE, 0.0, 1e-30, 1.0, f32::INFINITY];
    assert!(scores.windows(2).all(|pair| ordered(pair[0]) < ordered(pair[1])));
    assert_eq!(ordered(-0.0), ordered(0.0));
}

/// A field of a protocol buffer whose value is a string or a message.
fn field(number: u8, value: &[u8]) -> Vec<u8> {
    let len = value.len();
    [&[number << 3 | 2, 0x80 | (len & 0x7f) as u8, (len >> 7) as u8][..], value].concat()
}

fn piece(text: &str, score: f32, kind: u8) -> Vec<u8> {
    let score = [&[2 << 3 | 5][..], &score.to_le_bytes()].concat();
    field(1, &[field(1, text.as_bytes()), score, vec![3 << 3, kind]].concat())
}

/// A BPE model without normalisation.
fn model(pieces: &[Vec<u8>]) -> Vec<u8> {
    let trainer = field(2, &[3 << 3, 2]);
    let normalizer = field(3, &[3 << 3, 0, 4 << 3, 0, 5 << 3, 1]);
    [pieces.concat(), trainer, normalizer].concat()
}

#[test]
fn unused_pieces_are_split_and_unknown_runs_are_one_id() {
    const UNUSED: u8 = 5;
    let bytes = model(&[
        piece("<unk>", 0.0, 2),
        piece("a", -9.0, 1),
        piece("b", -9.0, 1),
        piece("ab", -1.0, UNUSED),
        piece("abb", -2.0, 1),
        piece("aba", -3.0, UNUSED),
    ]);
    let tokenizer = Tokenizer::from_sentencepiece(&bytes).unwrap();
    assert_eq!(tokenizer.encode("ab"), [1, 2]);
    assert_eq!(tokenizer.encode("abb"), [4]);
    assert_eq!(tokenizer.encode("aba"), [1, 2, 1]);
    assert_eq!(tokenizer.encode("xyaz"), [0, 1, 0]);
    assert_eq!(tokenizer.decode(&[0, 1]), " \u{2047} a");
}

#[test]
fn damaged_and_foreign_files_are_named() {
    let check = |bytes: &[u8], expected: &str| {
        let error = Tokenizer::from_sentencepiece(bytes).err().unwrap().to_string();
        assert!(error.contains(expected), "{error:?} does not say {expected:?}");
    };
    let unk = piece("<unk>", 0.0, 2);
    check(b"", "unigram");
    check(b"hello", "byte");
    check(&model(&[]), "none stands for what is unknown");
    check(&model(&[unk.clone(), unk.clone()]), "piece 1: \"<unk>\" is there twice");
    check(&model(&[unk.clone(), piece("", 0.0, 1)]), "piece 1: the piece is empty");
    check(&model(&[unk.clone(), piece("a", f32::NAN, 1)]), "not a number");
    check(&model(&[unk.clone(), piece("<0xZZ>", 0.0, 6)]), "does not name a byte");
    check(&model(&[unk.clone(), piece("a", 0.0, 7)]), "no type 7");
    check(&[model(std::slice::from_ref(&unk)), field(2, &[0x98, 2, 1])].concat(), "not every byte");
    check(&[model(std::slice::from_ref(&unk)), field(3, &field(2, &[9, 0, 0, 0, 1]))].concat(), "the trie goes on");
    check(&[model(std::slice::from_ref(&unk)), field(5, &field(2, b"rules"))].concat(), "change decoded text");
    check(&[model(std::slice::from_ref(&unk)), field(2, &[24 << 3 & 0x7f | 0x80, 1, 1])].concat(), "suffix");
}

#[test]
fn folders_prefer_tokenizer_model() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Tokenizer::from_dir(dir.path());
    assert!(matches!(open(), Err(TokenizerError::Missing { .. })));
    std::fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
    assert!(matches!(open(), Err(TokenizerError::File { path, .. }) if path.ends_with("tokenizer.json")));
    std::fs::write(dir.path().join("0123_tiny.model"), fixture("ident_dummy.model")).unwrap();
    assert_eq!(open().unwrap().encode("<extra_id_1>").len(), 2);
    std::fs::write(dir.path().join("tokenizer.model"), fixture("ident_nodummy.model")).unwrap();
    assert_eq!(open().unwrap().encode("<extra_id_1>").len(), 1);
    assert!(matches!(Tokenizer::from_dir(&dir.path().join("none")), Err(TokenizerError::Read { .. })));
}

/// Text with much of what the models treat specially.
fn text() -> impl Strategy<Value = String> {
    let unit = prop_oneof![
        3 => "[ -~]{1,8}",
        2 => Just("<extra_id_1>".to_owned()),
        1 => Just("<extra_id_".to_owned()),
        2 => " {1,4}",
        1 => "\\PC{1,4}",
        1 => any::<char>().prop_map(String::from),
    ];
    prop::collection::vec(unit, 0..12).prop_map(|units| units.concat())
}

proptest! {
    #[test]
    fn text_comes_back(text in text()) {
        for tokenizer in &TOKENIZERS[..2] {
            prop_assert_eq!(tokenizer.decode(&tokenizer.encode(&text)), text.replace('\u{2581}', " "));
        }
    }

    #[test]
    fn parts_without_symbols_encode_as_one_text(texts in prop::collection::vec("[a-z <>_.\u{e9}\u{2581}]{0,9}", 0..5)) {
        let parts: Vec<_> = texts.iter().map(|text| Part::Text(text)).collect();
        for tokenizer in &*TOKENIZERS {
            prop_assert_eq!(tokenizer.encode_parts(&parts), tokenizer.encode(&texts.concat()));
        }
    }

    #[test]
    fn any_bytes_encode(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        for tokenizer in &*TOKENIZERS {
            prop_assert_eq!(tokenizer.encode_bytes(&bytes), tokenizer.encode_bytes(&bytes));
        }
    }

    #[test]
    fn damaged_files_are_refused_or_work(
        model in prop::sample::select(&MODELS),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
        rules_too in any::<bool>(),
        len in prop::option::of(any::<prop::sample::Index>()),
        text in text(),
    ) {
        let mut bytes = fixture(&format!("{model}.model"));
        // Most of a file is rules if it has some, so edits go into the head as often as anywhere.
        let range = if rules_too { bytes.len() } else { bytes.len().min(15_000) };
        for (index, byte) in edits {
            bytes[index.index(range)] = byte;
        }
        if let Some(len) = len {
            bytes.truncate(len.index(bytes.len()));
        }
        if let Ok(tokenizer) = Tokenizer::from_sentencepiece(&bytes) {
            let encoded = tokenizer.encode(&text);
            tokenizer.decode(&encoded);
        }
    }
}
