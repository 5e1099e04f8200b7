//! What SentencePiece does to a text before it looks for pieces.

use std::ops::Range;

use super::model_file::{ModelFile, PieceKind};
use crate::tokenizer::symbols::Symbols;
use crate::tokenizer::{Part, TokenizerError};

/// U+2581, which stands for a space within pieces.
pub(super) const SPACE_MARK: &str = "\u{2581}";

pub(super) struct Normalizer {
    rules: Option<Rules>,
    /// User-defined symbols, which no rule changes.
    symbols: Symbols,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    /// What stands for a space in normalised text.
    space: &'static str,
}

/// A normalised text.
#[derive(Default)]
pub(super) struct Normalized {
    pub(super) text: String,
    /// The symbols in it, from left to right.
    pub(super) symbols: Vec<Range<usize>>,
}

impl Normalizer {
    pub(super) fn new(file: &ModelFile) -> Result<Self, TokenizerError> {
        let user_defined = file.pieces.iter().filter(|piece| piece.kind == PieceKind::UserDefined);
        Ok(Self {
            rules: if file.charsmap.is_empty() { None } else { Some(Rules::parse(&file.charsmap)?) },
            symbols: Symbols::new(user_defined.map(|piece| piece.text.as_str())),
            add_dummy_prefix: file.add_dummy_prefix,
            remove_extra_whitespaces: file.remove_extra_whitespaces,
            space: if file.escape_whitespaces { SPACE_MARK } else { " " },
        })
    }

    /// Normalises the parts as one text. `piece` gives the pieces of [`Part::Symbol`]s.
    pub(super) fn normalize<'v>(&self, parts: &[RawPart<'_>], piece: impl Fn(u32) -> Option<&'v str>) -> Normalized {
        let mut out = Normalized::default();
        let mut prefix = if self.add_dummy_prefix { self.space } else { "" };
        let mut after_space = self.remove_extra_whitespaces;
        for part in parts {
            let start = out.text.len();
            match *part {
                RawPart::Symbol(id) => {
                    if let Some(piece) = piece(id).filter(|piece| !piece.is_empty()) {
                        out.text.push_str(piece);
                        out.symbols.push(start..out.text.len());
                        after_space = false;
                    }
                }
                RawPart::Text([]) => {}
                RawPart::Text(mut rest) => {
                    out.text.push_str(std::mem::take(&mut prefix));
                    while !rest.is_empty() {
                        let (unit, consumed) = self.first_unit(rest);
                        rest = &rest[consumed..];
                        let unit = if after_space { unit.trim_start_matches(' ') } else { unit };
                        for (index, between_spaces) in unit.split(' ').enumerate() {
                            out.text.push_str(if index == 0 { "" } else { self.space });
                            out.text.push_str(between_spaces);
                        }
                        if self.remove_extra_whitespaces && !unit.is_empty() {
                            after_space = unit.ends_with(' ');
                        }
                    }
                    let found = self.symbols.find(&out.text[start..]);
                    out.symbols.extend(found.into_iter().map(|symbol| start + symbol.start..start + symbol.end));
                }
            }
        }
        if self.remove_extra_whitespaces {
            out.text.truncate(out.text.trim_end_matches(self.space).len());
            out.symbols.retain(|symbol| symbol.end <= out.text.len());
        }
        out
    }

    /// Where to cut `text` into parts such that [`Self::normalize`] finds no symbol of several characters in them.
    pub(super) fn literal_cuts(&self, text: &str) -> Vec<usize> {
        let mut cuts = Vec::new();
        let mut at = 0;
        while let Some(char) = text[at..].chars().next() {
            let rest = &text.as_bytes()[at..];
            if self.symbols.longest_prefix(rest).is_some() {
                at += char.len_utf8();
                cuts.push(at);
                continue;
            }
            // What a rule changes might become part of a symbol, so it is cut out of its surroundings.
            let (unit, consumed) = self.first_unit(rest);
            let end = text.ceil_char_boundary(at + consumed);
            if unit != &text[at..end] {
                cuts.extend([at, end]);
            }
            at = end;
        }
        cuts
    }

    /// What the beginning of `text`, which is not empty, becomes, and how many bytes that beginning has: a symbol, what the longest
    /// matching rule matches, a character, or a byte that is no part of any.
    fn first_unit<'a>(&'a self, text: &'a [u8]) -> (&'a str, usize) {
        if let Some(len) = self.symbols.longest_prefix(text)
            && let Ok(symbol) = std::str::from_utf8(&text[..len])
        {
            return (symbol, len);
        }
        if let Some(unit) = self.rules.as_ref().and_then(|rules| rules.longest(text)) {
            return unit;
        }
        let len = match text[0] {
            0xc0..0xe0 => 2,
            0xe0..0xf0 => 3,
            0xf0.. => 4,
            _ => 1,
        };
        match text.get(..len).and_then(|char| std::str::from_utf8(char).ok()) {
            Some(char) => (char, len),
            None => ("\u{fffd}", 1),
        }
    }
}

/// A [`Part`] whose text need not be UTF-8.
#[derive(Clone, Copy)]
pub(super) enum RawPart<'a> {
    Text(&'a [u8]),
    Symbol(u32),
}

impl<'a> From<Part<'a>> for RawPart<'a> {
    fn from(part: Part<'a>) -> Self {
        match part {
            Part::Text(text) => Self::Text(text.as_bytes()),
            Part::Symbol(id) => Self::Symbol(id),
        }
    }
}

/// Rules that replace strings, from a model's `precompiled_charsmap`: the size of a trie in bytes as u32, the trie, and the replacements,
/// each ended by a NUL. All integers are little endian.
struct Rules {
    /// A double array as the Darts-clone library lays it out. Each unit has in bits 0–7 the byte that leads to it, in bit 8 whether a key
    /// ends here, in bits 10–30 an offset to its children, which bit 9 shifts by eight. Units with bit 31 are values.
    trie: Vec<u32>,
    replacements: String,
}

impl Rules {
    fn parse(charsmap: &[u8]) -> Result<Self, TokenizerError> {
        let damaged =
            |what: &str| TokenizerError::Damaged { at: "normalisation rules".to_owned(), what: what.to_owned() };
        let (size, rest) = charsmap.split_first_chunk().ok_or_else(|| damaged("they have no size"))?;
        let size = u32::from_le_bytes(*size) as usize;
        let (trie, replacements) =
            rest.split_at_checked(size).ok_or_else(|| damaged("the trie goes on beyond their end"))?;
        let (units, []) = trie.as_chunks() else { return Err(damaged("the trie ends within a unit")) };
        let replacements = std::str::from_utf8(replacements).map_err(|_| damaged("a replacement is not UTF-8"))?;
        Ok(Self {
            trie: units.iter().map(|unit| u32::from_le_bytes(*unit)).collect(),
            replacements: replacements.to_owned(),
        })
    }

    /// The replacement of the longest key that `text` starts with, and the length of that key in bytes.
    fn longest(&self, text: &[u8]) -> Option<(&str, usize)> {
        // Keys have a few characters. A damaged trie can have circles, which must not lead through the whole text.
        const LONGEST_KEY: usize = 256;
        let offset = |unit: u32| ((unit >> 10) << ((unit & (1 << 9)) >> 6)) as usize;
        let mut longest = None;
        let mut node = offset(*self.trie.first()?);
        for (index, &byte) in text.iter().take(LONGEST_KEY).enumerate() {
            node ^= usize::from(byte);
            match self.trie.get(node) {
                Some(&unit) if byte != 0 && unit & (1 << 31 | 0xff) == u32::from(byte) => {
                    node ^= offset(unit);
                    if unit & (1 << 8) != 0 {
                        longest = self.trie.get(node).map(|value| ((value & !(1 << 31)) as usize, index + 1));
                    }
                }
                _ => break,
            }
        }
        let (start, consumed) = longest?;
        let replacement = self.replacements.get(start..)?;
        Some((replacement.split('\0').next().unwrap_or_default(), consumed))
    }
}
