//! A SentencePiece BPE model as the bytes of its file (a protocol buffer, `ModelProto`), for vocabularies that come from elsewhere.

/// A vocabulary with the settings that encoding needs.
pub struct PieceTable<'a> {
    /// In the order of ids: text, score, and SentencePiece's number of the type.
    pub pieces: Vec<(&'a str, f32, u64)>,
    /// Whether a text gets a space in front.
    pub add_dummy_prefix: bool,
    pub remove_extra_whitespaces: bool,
    pub bos_id: Option<usize>,
    pub eos_id: Option<usize>,
}

impl PieceTable<'_> {
    /// The model file. Unknown characters become bytes if there are pieces for bytes; nothing is normalized but spaces.
    pub fn to_model_file(&self) -> Vec<u8> {
        const BYTE: u64 = 6;
        const BPE: u64 = 2;
        let mut file = Vec::new();
        for &(text, score, kind) in &self.pieces {
            let mut piece = Vec::new();
            bytes(&mut piece, 1, text.as_bytes());
            varint(&mut piece, 2 << 3 | FIXED32);
            piece.extend(score.to_le_bytes());
            number(&mut piece, 3, kind);
            bytes(&mut file, 1, &piece);
        }
        let mut trainer = Vec::new();
        number(&mut trainer, 3, BPE);
        number(&mut trainer, 35, u64::from(self.pieces.iter().any(|piece| piece.2 == BYTE)));
        for (field, id) in [(46, self.bos_id), (47, self.eos_id)] {
            if let Some(piece) = id.and_then(|id| self.pieces.get(id)) {
                bytes(&mut trainer, field, piece.0.as_bytes());
            }
        }
        bytes(&mut file, 2, &trainer);
        let mut normalizer = Vec::new();
        bytes(&mut normalizer, 1, b"identity");
        number(&mut normalizer, 3, self.add_dummy_prefix.into());
        number(&mut normalizer, 4, self.remove_extra_whitespaces.into());
        number(&mut normalizer, 5, 1);
        bytes(&mut file, 3, &normalizer);
        file
    }
}

/// Wire types.
const VARINT: u64 = 0;
const LENGTH: u64 = 2;
const FIXED32: u64 = 5;

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn number(out: &mut Vec<u8>, field: u64, value: u64) {
    varint(out, field << 3 | VARINT);
    varint(out, value);
}

fn bytes(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    varint(out, field << 3 | LENGTH);
    varint(out, value.len() as u64);
    out.extend(value);
}
