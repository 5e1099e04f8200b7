//! SentencePiece BPE, exactly as the reference implementation encodes and decodes.

mod model_file;
mod normalizer;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use self::model_file::{ModelFile, PieceKind, byte_piece};
use self::normalizer::{Normalized, Normalizer, RawPart, SPACE_MARK};
use super::detokenize::{Leading, Surface, Surfaces};
use super::vocabulary::Vocabulary;
use super::{Part, TokenizerError};

pub(super) struct SentencePiece {
    pub(super) vocabulary: Vocabulary,
    normalizer: Normalizer,
    /// Score and kind of each id.
    pieces: Vec<(f32, PieceKind)>,
    unk: u32,
    /// The ids of all bytes, if unknown characters become bytes.
    byte_ids: Option<Vec<u32>>,
    /// Bytes of the longest piece.
    longest_piece: usize,
}

impl SentencePiece {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, TokenizerError> {
        let file = ModelFile::parse(bytes)?;
        let normalizer = Normalizer::new(&file)?;
        let leading = match (file.add_dummy_prefix, file.remove_extra_whitespaces) {
            (_, true) => Leading::DropAll,
            (true, false) => Leading::DropOne,
            (false, false) => Leading::Keep,
        };
        let mut vocabulary = Vocabulary::new(Surfaces::new(leading, true));
        let mut unk = None;
        for (index, piece) in file.pieces.iter().enumerate() {
            let damaged = |what| Err(TokenizerError::Damaged { at: format!("piece {index}"), what });
            if !vocabulary.push(&piece.text) {
                return damaged(format!("{:?} is there twice", piece.text));
            }
            if piece.kind == PieceKind::Unknown && unk.replace(index as u32).is_some() {
                return damaged("a second piece for what is unknown".to_owned());
            }
            let text = piece.text.replace(SPACE_MARK, " ");
            vocabulary.surfaces.push(match piece.kind {
                PieceKind::Byte(ref byte) => Surface::Bytes(std::slice::from_ref(byte)),
                PieceKind::Control => Surface::Break,
                PieceKind::Unknown if file.unk_surface.is_empty() => Surface::Break,
                PieceKind::Unknown => Surface::Bytes(file.unk_surface.as_bytes()),
                _ if piece.text.starts_with(SPACE_MARK) => Surface::Spaced(text.as_bytes()),
                _ => Surface::Bytes(text.as_bytes()),
            });
        }
        let damaged = |what: &str| TokenizerError::Damaged { at: "pieces".to_owned(), what: what.to_owned() };
        let pieces: Vec<_> = file.pieces.iter().map(|piece| (piece.score, piece.kind)).collect();
        let id_of_kind = |piece: &str, kind| vocabulary.id(piece).filter(|&id| pieces[id as usize].1 == kind);
        let byte_ids = (0..=u8::MAX).map(|byte| id_of_kind(&byte_piece(byte), PieceKind::Byte(byte))).collect();
        let byte_ids = match (file.byte_fallback, byte_ids) {
            (false, _) => None,
            (true, Some(ids)) => Some(ids),
            (true, None) => return Err(damaged("not every byte has one, yet unknown characters become bytes")),
        };
        let bos = id_of_kind(&file.bos_piece, PieceKind::Control);
        let eos = id_of_kind(&file.eos_piece, PieceKind::Control);
        (vocabulary.bos, vocabulary.eos) = (bos, eos);
        Ok(Self {
            vocabulary,
            normalizer,
            unk: unk.ok_or_else(|| damaged("none stands for what is unknown"))?,
            byte_ids,
            longest_piece: file.pieces.iter().map(|piece| piece.text.len()).max().unwrap_or(0),
            pieces,
        })
    }

    pub(super) fn encode_bytes(&self, text: &[u8]) -> Vec<u32> {
        self.encode_raw(&[RawPart::Text(text)])
    }

    pub(super) fn encode_parts(&self, parts: &[Part<'_>]) -> Vec<u32> {
        self.encode_raw(&parts.iter().map(|&part| part.into()).collect::<Vec<_>>())
    }

    pub(super) fn literal_cuts(&self, text: &str) -> Vec<usize> {
        self.normalizer.literal_cuts(text)
    }

    fn encode_raw(&self, parts: &[RawPart<'_>]) -> Vec<u32> {
        let normalized = self.normalizer.normalize(parts, |id| self.vocabulary.piece(id));
        let mut merger = Merger::new(self, &normalized);
        merger.run();
        merger.ids()
    }
}

/// A stretch of the text that is or may become a piece. Those not merged away form a list from left to right.
struct Span {
    start: usize,
    /// Equal to `start` after a merge into the span before.
    end: usize,
    previous: Option<usize>,
    next: Option<usize>,
    /// A user-defined symbol, never merged.
    frozen: bool,
}

/// Two neighbouring spans that form a piece together. The largest is merged first: the highest score, then the leftmost.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Merge {
    /// The score as an integer of the same order.
    score: i32,
    left: Reverse<usize>,
    right: usize,
    /// Bytes of both spans. If they have another length by the time of the merge, one of them has changed.
    len: usize,
}

/// The work on one text.
struct Merger<'a> {
    model: &'a SentencePiece,
    text: &'a str,
    spans: Vec<Span>,
    heap: BinaryHeap<Merge>,
    /// For unused pieces that came up in this text: the length of the left one of the two spans that made them up last.
    splits: HashMap<u32, usize>,
}

impl<'a> Merger<'a> {
    fn new(model: &'a SentencePiece, normalized: &'a Normalized) -> Self {
        let text = normalized.text.as_str();
        let mut spans = Vec::with_capacity(text.len());
        let mut symbols = normalized.symbols.iter().peekable();
        let mut start = 0;
        while let Some(char) = text[start..].chars().next() {
            let symbol = symbols.next_if(|symbol| symbol.start == start);
            let end = symbol.map_or(start + char.len_utf8(), |symbol| symbol.end);
            let index = spans.len();
            spans.push(Span {
                start,
                end,
                previous: index.checked_sub(1),
                next: Some(index + 1),
                frozen: symbol.is_some(),
            });
            start = end;
        }
        if let Some(last) = spans.last_mut() {
            last.next = None;
        }
        let mut merger = Self { model, text, spans, heap: BinaryHeap::new(), splits: HashMap::new() };
        merger.heap = (1..merger.spans.len()).filter_map(|right| merger.candidate(right - 1, right)).collect();
        merger
    }

    /// The merge of two neighbours, if they make up a piece.
    fn candidate(&mut self, left: usize, right: usize) -> Option<Merge> {
        let (start, end) = (self.spans[left].start, self.spans[right].end);
        if self.spans[left].frozen || self.spans[right].frozen || end - start > self.model.longest_piece {
            return None;
        }
        let id = self.model.vocabulary.id(&self.text[start..end])?;
        let (score, kind) = self.model.pieces[id as usize];
        match kind {
            PieceKind::Normal => {}
            PieceKind::Unused => {
                self.splits.insert(id, self.spans[left].end - start);
            }
            // A symbol that is to be found is frozen already. What is left has been cut apart in order not to be one.
            PieceKind::UserDefined | PieceKind::Unknown | PieceKind::Control | PieceKind::Byte(_) => return None,
        }
        Some(Merge { score: ordered(score), left: Reverse(left), right, len: end - start })
    }

    fn run(&mut self) {
        while let Some(Merge { left: Reverse(left), right, len, .. }) = self.heap.pop() {
            let (span, merged) = (&self.spans[left], &self.spans[right]);
            let (start, end, previous, next) = (span.start, merged.end, span.previous, merged.next);
            let is_empty = |span: &Span| span.start == span.end;
            if is_empty(span) || is_empty(merged) || end - start != len {
                continue;
            }
            self.spans[left].end = end;
            self.spans[left].next = next;
            self.spans[right].start = end;
            if let Some(next) = next {
                self.spans[next].previous = Some(left);
            }
            let before = previous.and_then(|previous| self.candidate(previous, left));
            let after = next.and_then(|next| self.candidate(left, next));
            self.heap.extend(before.into_iter().chain(after));
        }
    }

    fn ids(&self) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut after_unknown = false;
        let mut stack = Vec::new();
        for span in self.spans.iter().filter(|span| span.start < span.end) {
            stack.push(&self.text[span.start..span.end]);
            while let Some(piece) = stack.pop() {
                let id = self.model.vocabulary.id(piece).filter(|&id| id != self.model.unk);
                match (id, id.and_then(|id| self.splits.get(&id))) {
                    (Some(_), Some(&left_len)) => {
                        let (left, right) = piece.split_at(left_len);
                        stack.extend([right, left]);
                        continue;
                    }
                    (Some(id), None) => ids.push(id),
                    (None, _) => match &self.model.byte_ids {
                        Some(byte_ids) => ids.extend(piece.bytes().map(|byte| byte_ids[usize::from(byte)])),
                        None if after_unknown => {}
                        None => ids.push(self.model.unk),
                    },
                }
                after_unknown = id.is_none();
            }
        }
        ids
    }
}

/// An integer that compares as the number does, which is not a NaN.
fn ordered(score: f32) -> i32 {
    // Adding zero makes the two zeros one. The bits of negative numbers count away from zero.
    let bits = (score + 0.0).to_bits() as i32;
    bits ^ ((bits >> 31) & i32::MAX)
}

#[cfg(test)]
mod tests;
