//! The parts of a SentencePiece model file that encoding and decoding need. The file is a protocol buffer, `ModelProto`.

use crate::tokenizer::TokenizerError;

/// `ModelProto` without the settings that only training uses.
pub(super) struct ModelFile {
    /// In order of ids.
    pub(super) pieces: Vec<Piece>,
    pub(super) byte_fallback: bool,
    pub(super) unk_surface: String,
    pub(super) bos_piece: String,
    pub(super) eos_piece: String,
    /// Compiled normalisation rules; empty for none.
    pub(super) charsmap: Vec<u8>,
    pub(super) add_dummy_prefix: bool,
    pub(super) remove_extra_whitespaces: bool,
    pub(super) escape_whitespaces: bool,
}

pub(super) struct Piece {
    pub(super) text: String,
    pub(super) score: f32,
    pub(super) kind: PieceKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PieceKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte(u8),
}

impl ModelFile {
    /// # Errors
    /// The bytes are no such file, or the model is none of BPE, or has rules that this encoder does not know: the error names them.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, TokenizerError> {
        const UNIGRAM: u64 = 1;
        const BPE: u64 = 2;
        let mut file = Self {
            pieces: Vec::new(),
            byte_fallback: false,
            unk_surface: " \u{2047} ".to_owned(),
            bos_piece: "<s>".to_owned(),
            eos_piece: "</s>".to_owned(),
            charsmap: Vec::new(),
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
        };
        let mut model_type = UNIGRAM;
        for field in Fields::new(bytes, 0) {
            match field? {
                (1, Value::Bytes(piece)) => file.pieces.push(Piece::parse(piece, file.pieces.len())?),
                (2, Value::Bytes(trainer)) => {
                    for field in trainer {
                        match field? {
                            (3, Value::Varint(value)) => model_type = value,
                            (24, Value::Varint(1..)) => return Err(unsupported("whitespace as a suffix")),
                            (35, Value::Varint(value)) => file.byte_fallback = value != 0,
                            (44, Value::Bytes(text)) => file.unk_surface = text.str()?.to_owned(),
                            (46, Value::Bytes(text)) => file.bos_piece = text.str()?.to_owned(),
                            (47, Value::Bytes(text)) => file.eos_piece = text.str()?.to_owned(),
                            _ => {}
                        }
                    }
                }
                (3, Value::Bytes(normalizer)) => {
                    for field in normalizer {
                        match field? {
                            (2, Value::Bytes(charsmap)) => file.charsmap = charsmap.rest.to_vec(),
                            (3, Value::Varint(value)) => file.add_dummy_prefix = value != 0,
                            (4, Value::Varint(value)) => file.remove_extra_whitespaces = value != 0,
                            (5, Value::Varint(value)) => file.escape_whitespaces = value != 0,
                            _ => {}
                        }
                    }
                }
                (5, Value::Bytes(denormalizer)) => {
                    for field in denormalizer {
                        if let (2, Value::Bytes(Fields { rest: [_, ..], .. })) = field? {
                            return Err(unsupported("rules that change decoded text"));
                        }
                    }
                }
                _ => {}
            }
        }
        match model_type {
            BPE => Ok(file),
            UNIGRAM => Err(unsupported("a unigram model; only BPE is implemented")),
            other => Err(unsupported(&format!("model type {other}; only BPE is implemented"))),
        }
    }
}

impl Piece {
    fn parse(fields: Fields<'_>, index: usize) -> Result<Self, TokenizerError> {
        let damaged = |what| TokenizerError::Damaged { at: format!("piece {index}"), what };
        let mut piece = Self { text: String::new(), score: 0.0, kind: PieceKind::Normal };
        let mut kind = 1;
        for field in fields {
            match field? {
                (1, Value::Bytes(text)) => piece.text = text.str()?.to_owned(),
                (2, Value::Fixed32(bits)) => piece.score = f32::from_bits(bits),
                (3, Value::Varint(value)) => kind = value,
                _ => {}
            }
        }
        if piece.text.is_empty() {
            return Err(damaged("the piece is empty".to_owned()));
        }
        if piece.score.is_nan() {
            return Err(damaged("the score is not a number".to_owned()));
        }
        piece.kind = match kind {
            1 => PieceKind::Normal,
            2 => PieceKind::Unknown,
            3 => PieceKind::Control,
            4 => PieceKind::UserDefined,
            5 => PieceKind::Unused,
            6 => match byte_of(&piece.text) {
                Some(byte) => PieceKind::Byte(byte),
                None => return Err(damaged(format!("{:?} does not name a byte", piece.text))),
            },
            other => return Err(damaged(format!("there is no type {other}"))),
        };
        Ok(piece)
    }
}

/// The byte that a piece spells.
fn byte_of(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(digits, 16).ok().filter(|&byte| piece == byte_piece(byte))
}

/// How a model spells a byte.
pub(super) fn byte_piece(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

fn unsupported(what: &str) -> TokenizerError {
    TokenizerError::Unsupported(what.to_owned())
}

/// The fields of a message, one after the other, with their numbers.
#[derive(Clone, Copy)]
struct Fields<'a> {
    rest: &'a [u8],
    /// Where `rest` begins in the file.
    at: usize,
}

enum Value<'a> {
    Varint(u64),
    Fixed32(u32),
    /// A string, or a message.
    Bytes(Fields<'a>),
    Fixed64,
}

impl<'a> Fields<'a> {
    fn new(bytes: &'a [u8], at: usize) -> Self {
        Self { rest: bytes, at }
    }

    /// The bytes as text.
    fn str(self) -> Result<&'a str, TokenizerError> {
        std::str::from_utf8(self.rest).map_err(|_| self.damaged("a string is not UTF-8"))
    }

    fn damaged(self, what: &str) -> TokenizerError {
        TokenizerError::Damaged { at: format!("byte {}", self.at), what: what.to_owned() }
    }

    fn take(&mut self, len: u64) -> Result<Self, TokenizerError> {
        let split = usize::try_from(len).ok().and_then(|len| self.rest.split_at_checked(len));
        let (taken, rest) = split.ok_or_else(|| self.damaged("a field goes on beyond the end"))?;
        let field = Self::new(taken, self.at);
        *self = Self::new(rest, self.at + taken.len());
        Ok(field)
    }

    fn varint(&mut self) -> Result<u64, TokenizerError> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?.rest[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(self.damaged("an integer has more than 64 bits"))
    }

    fn field(&mut self) -> Result<(u64, Value<'a>), TokenizerError> {
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => self.take(8).map(|_| Value::Fixed64)?,
            2 => {
                let len = self.varint()?;
                Value::Bytes(self.take(len)?)
            }
            5 => {
                let bytes = self.take(4)?.rest;
                Value::Fixed32(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            }
            other => return Err(self.damaged(&format!("there is no wire type {other}"))),
        };
        Ok((tag >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Value<'a>), TokenizerError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.rest = &[];
        }
        Some(field)
    }
}
