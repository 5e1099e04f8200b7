//! Text to token ids and back.
//!
//! A `tokenizer.model` is read by our own exact SentencePiece BPE; a `tokenizer.json` by the `tokenizers` crate.

/// A tokenizer of a checkpoint. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer {}

/// A tokenizer file is damaged or of an unsupported kind.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {}

impl Tokenizer {
    /// Reads a SentencePiece model file (`tokenizer.model`).
    pub fn from_sentencepiece(_bytes: &[u8]) -> Result<Self, TokenizerError> {
        unimplemented!()
    }

    /// Reads a `tokenizer.json`.
    pub fn from_json(_bytes: &[u8]) -> Result<Self, TokenizerError> {
        unimplemented!()
    }

    /// Number of ids.
    pub fn vocab_size(&self) -> usize {
        unimplemented!()
    }

    /// Ids of the whole text as one string; no BOS is added.
    pub fn encode(&self, _text: &str) -> Vec<u32> {
        unimplemented!()
    }

    /// Text of ids: control symbols vanish, user-defined symbols show, invalid bytes become U+FFFD.
    pub fn decode(&self, _ids: &[u32]) -> String {
        unimplemented!()
    }

    /// The piece of an id as SentencePiece spells it (`▁the`, `<0x0A>`, `</s>`).
    pub fn piece(&self, _id: u32) -> &str {
        unimplemented!()
    }
}

/// Turns ids into text as they come: the concatenation of everything returned equals `decode` of prompt and new ids less `decode` of the
/// prompt, and no part of a UTF-8 character is ever returned alone.
pub struct Detokenizer {}

impl Detokenizer {
    /// Starts after `prompt`.
    pub fn new(_tokenizer: &Tokenizer, _prompt: &[u32]) -> Self {
        unimplemented!()
    }

    /// Takes one more id; the text that is now certain is appended to `out`.
    pub fn push(&mut self, _id: u32, _out: &mut String) {
        unimplemented!()
    }

    /// The text that was held back as an incomplete character, as `decode` would show it.
    pub fn finish(&mut self, _out: &mut String) {
        unimplemented!()
    }
}
