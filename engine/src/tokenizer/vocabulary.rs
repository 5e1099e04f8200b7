//! Ids, their pieces, and what they add to a text: what both kinds of tokenizer have in common.

use std::collections::HashMap;
use std::sync::Arc;

use super::detokenize::Surfaces;

pub(super) struct Vocabulary {
    /// Piece of each id; empty where the vocabulary has a hole.
    pieces: Vec<Arc<str>>,
    ids: HashMap<Arc<str>, u32>,
    pub(super) surfaces: Surfaces,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
}

impl Vocabulary {
    pub(super) fn new(surfaces: Surfaces) -> Self {
        Self { pieces: Vec::new(), ids: HashMap::new(), surfaces, bos: None, eos: None }
    }

    /// Gives the next id to `piece`; false if the piece has an id already.
    pub(super) fn push(&mut self, piece: &str) -> bool {
        let piece: Arc<str> = piece.into();
        let id = u32::try_from(self.pieces.len()).expect("each piece takes bytes of a file far below 2^32 pieces");
        self.pieces.push(Arc::clone(&piece));
        self.ids.insert(piece, id).is_none()
    }

    /// Leaves the next id without a piece.
    pub(super) fn push_hole(&mut self) {
        self.pieces.push(Arc::default());
    }

    pub(super) fn len(&self) -> usize {
        self.pieces.len()
    }

    pub(super) fn piece(&self, id: u32) -> Option<&str> {
        self.pieces.get(id as usize).map(|piece| &**piece)
    }

    pub(super) fn id(&self, piece: &str) -> Option<u32> {
        self.ids.get(piece).copied()
    }
}
