//! Text to token ids and back.
//!
//! A `tokenizer.model` is read by our own exact SentencePiece BPE ([`sentencepiece`]), a `tokenizer.json` by the `tokenizers` crate
//! ([`json`]). Ids become text in one place for both ([`detokenize`]), so that a stream and a whole decode cannot disagree.

mod detokenize;
mod json;
mod model_writer;
mod sentencepiece;
mod symbols;
mod vocabulary;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use self::detokenize::Detokenizer;
use self::json::Json;
pub use self::model_writer::PieceTable;
use self::sentencepiece::SentencePiece;
use self::vocabulary::Vocabulary;

/// A tokenizer of a checkpoint. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer(Model);

#[derive(Clone)]
enum Model {
    SentencePiece(Arc<SentencePiece>),
    Json(Arc<Json>),
}

/// A stretch of a text to encode; see [`Tokenizer::encode_parts`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'t> {
    Text(&'t str),
    /// The symbol with this id itself, also when no text can spell it, as is so for BOS.
    Symbol(u32),
}

/// A tokenizer cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("no tokenizer.model, other *.model file or tokenizer.json in {}", dir.display())]
    Missing { dir: PathBuf },
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    /// What is wrong with the file at `path`.
    #[error("cannot use the tokenizer {}", path.display())]
    File { path: PathBuf, source: Box<Self> },
    /// `at` says where in the file.
    #[error("damaged tokenizer, {at}: {what}")]
    Damaged { at: String, what: String },
    #[error("unsupported tokenizer: {0}")]
    Unsupported(String),
}

impl Tokenizer {
    /// Reads the tokenizer of a folder: `tokenizer.model`, else the first other `*.model` by name, else `tokenizer.json`.
    ///
    /// A SentencePiece model comes first because a `tokenizer.json` made from it gives other ids around user-defined symbols.
    ///
    /// # Errors
    /// The folder has no such file or cannot be read, or the file is damaged or of an unsupported kind.
    pub fn from_dir(dir: &Path) -> Result<Self, TokenizerError> {
        let unreadable = |path: &Path| {
            let path = path.to_path_buf();
            move |source| TokenizerError::Read { path, source }
        };
        let mut models = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(unreadable(dir))? {
            let path = entry.map_err(unreadable(dir))?.path();
            if path.extension().is_some_and(|extension| extension == "model") {
                models.push(path);
            }
        }
        models.sort_by_key(|path| (!path.ends_with("tokenizer.model"), path.clone()));
        let json = dir.join("tokenizer.json");
        let (path, parse): (_, fn(&[u8]) -> _) = match models.into_iter().next() {
            Some(model) => (model, Self::from_sentencepiece),
            None if json.exists() => (json, Self::from_json),
            None => return Err(TokenizerError::Missing { dir: dir.to_path_buf() }),
        };
        let bytes = std::fs::read(&path).map_err(unreadable(&path))?;
        parse(&bytes).map_err(|source| TokenizerError::File { path, source: Box::new(source) })
    }

    /// Reads a SentencePiece model file (`tokenizer.model`).
    ///
    /// # Errors
    /// The bytes are not such a file, or the model is not BPE.
    pub fn from_sentencepiece(bytes: &[u8]) -> Result<Self, TokenizerError> {
        Ok(Self(Model::SentencePiece(Arc::new(SentencePiece::parse(bytes)?))))
    }

    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// The bytes are not such a file, or its decoder cannot work id by id.
    pub fn from_json(bytes: &[u8]) -> Result<Self, TokenizerError> {
        Ok(Self(Model::Json(Arc::new(Json::parse(bytes)?))))
    }

    /// Name of the implementation, for people.
    pub fn kind(&self) -> &'static str {
        match &self.0 {
            Model::SentencePiece(_) => "SentencePiece BPE",
            Model::Json(_) => "tokenizer.json",
        }
    }

    /// Number of ids.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary().len()
    }

    /// Ids of the whole text as one string; no BOS is added.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        match &self.0 {
            Model::SentencePiece(model) => model.encode_bytes(text.as_bytes()),
            Model::Json(model) => model.encode(text),
        }
    }

    /// Like [`Self::encode`] for bytes that may not be UTF-8: each bad byte counts as one U+FFFD.
    pub fn encode_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        match &self.0 {
            Model::SentencePiece(model) => model.encode_bytes(bytes),
            Model::Json(model) => {
                let mut text = String::with_capacity(bytes.len());
                for chunk in bytes.utf8_chunks() {
                    text.push_str(chunk.valid());
                    text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
                }
                model.encode(&text)
            }
        }
    }

    /// Ids of the parts put together as one text, in which a user-defined symbol is found only where one part spells all of it.
    ///
    /// The border between two parts has no other effect on a SentencePiece model: ordinary pieces span it. A `tokenizer.json` cannot be
    /// told where not to look, so its text gets a zero-width space (U+200B) between two neighbouring texts.
    pub fn encode_parts(&self, parts: &[Part<'_>]) -> Vec<u32> {
        match &self.0 {
            Model::SentencePiece(model) => model.encode_parts(parts),
            Model::Json(model) => model.encode_parts(parts),
        }
    }

    /// Cuts a text that is mere data such that [`Self::encode_parts`] finds no user-defined symbol in it. A symbol of a single character
    /// or of spaces alone stays what it is: it is no more than text, and maybe nothing else spells it.
    pub fn split_literal<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let mut cuts = match &self.0 {
            Model::SentencePiece(model) => model.literal_cuts(text),
            Model::Json(model) => model.literal_cuts(text),
        };
        cuts.push(text.len());
        let mut start = 0;
        cuts.into_iter().map(|end| &text[std::mem::replace(&mut start, end)..end]).collect()
    }

    /// Text of ids: control symbols vanish, user-defined symbols show, invalid bytes become U+FFFD. Ids beyond the vocabulary add nothing.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.vocabulary().surfaces.decode(ids)
    }

    /// The piece of an id as SentencePiece spells it (`▁the`, `<0x0A>`, `</s>`); empty for an id beyond the vocabulary.
    pub fn piece(&self, id: u32) -> &str {
        self.vocabulary().piece(id).unwrap_or_default()
    }

    /// The id whose [`Self::piece`] this is.
    pub fn token_id(&self, piece: &str) -> Option<u32> {
        self.vocabulary().id(piece)
    }

    /// Id of the symbol that begins a text, as the model names it; for a `tokenizer.json`, which names none, the special token `<s>`.
    pub fn bos_id(&self) -> Option<u32> {
        self.vocabulary().bos
    }

    /// Id of the symbol that ends a text, as the model names it; for a `tokenizer.json`, which names none, the special token `</s>`.
    pub fn eos_id(&self) -> Option<u32> {
        self.vocabulary().eos
    }

    /// The single id that `text` becomes when it follows other text, which NeMo's server compares instead of the text of an end string:
    /// the ids of `<extra_id_1>` with the text are those of `<extra_id_1>` alone and exactly one more. The vocabulary need not have that
    /// symbol.
    pub fn single_token_after_marker(&self, text: &str) -> Option<u32> {
        const MARKER: &str = "<extra_id_1>";
        let marker = self.encode(MARKER);
        match self.encode(&format!("{MARKER}{text}")).strip_prefix(marker.as_slice()) {
            Some(&[id]) => Some(id),
            _ => None,
        }
    }

    fn vocabulary(&self) -> &Vocabulary {
        match &self.0 {
            Model::SentencePiece(model) => &model.vocabulary,
            Model::Json(model) => &model.vocabulary,
        }
    }
}
