//! Ids to text, all at once or as they come.

use super::Tokenizer;

/// What an id adds to the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Surface<'a> {
    /// Bytes, maybe only part of a character.
    Bytes(&'a [u8]),
    /// The same, and the first byte is a space that goes when the text begins with it and the tokenizer puts one in front of each text.
    Spaced(&'a [u8]),
    /// No text, but bytes before and after it cannot make up a character together.
    Break,
    /// Nothing at all.
    Nothing,
}

/// Which [`Surface::Spaced`] spaces are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leading {
    Keep,
    /// That of the first id that adds text.
    DropOne,
    /// Those of all ids as long as there is no text.
    DropAll,
}

/// What every id adds to a text.
pub(super) struct Surfaces {
    leading: Leading,
    /// Bytes that are not UTF-8 become one U+FFFD each, else one for as many as could begin a character.
    replace_each_byte: bool,
    /// The surfaces one after the other.
    bytes: Vec<u8>,
    /// By id: where the surface ends in `bytes`, and what it is.
    entries: Vec<(usize, Entry)>,
}

#[derive(Clone, Copy)]
enum Entry {
    Bytes,
    Spaced,
    Break,
    Nothing,
}

impl Surfaces {
    pub(super) fn new(leading: Leading, replace_each_byte: bool) -> Self {
        Self { leading, replace_each_byte, bytes: Vec::new(), entries: Vec::new() }
    }

    /// Sets the surface of the next id.
    pub(super) fn push(&mut self, surface: Surface<'_>) {
        let (bytes, entry): (&[u8], _) = match surface {
            Surface::Bytes(bytes) => (bytes, Entry::Bytes),
            Surface::Spaced(bytes) => (bytes, Entry::Spaced),
            Surface::Break => (&[], Entry::Break),
            Surface::Nothing => (&[], Entry::Nothing),
        };
        self.bytes.extend_from_slice(bytes);
        self.entries.push((self.bytes.len(), entry));
    }

    fn get(&self, id: u32) -> Surface<'_> {
        let index = id as usize;
        let Some(&(end, entry)) = self.entries.get(index) else { return Surface::Nothing };
        let start = index.checked_sub(1).map_or(0, |previous| self.entries[previous].0);
        let bytes = &self.bytes[start..end];
        match entry {
            Entry::Bytes => Surface::Bytes(bytes),
            Entry::Spaced => Surface::Spaced(bytes),
            Entry::Break => Surface::Break,
            Entry::Nothing => Surface::Nothing,
        }
    }

    pub(super) fn decode(&self, ids: &[u32]) -> String {
        let mut text = String::with_capacity(4 * ids.len());
        let mut state = State::new(self);
        for &id in ids {
            state.push(self, id, &mut text);
        }
        state.flush(self, &mut text);
        text
    }
}

/// What decides, after some ids, which text the next ones add.
struct State {
    /// `Keep` once there is text.
    leading: Leading,
    /// The beginning of a character, at most 3 bytes.
    pending: Vec<u8>,
}

impl State {
    fn new(surfaces: &Surfaces) -> Self {
        Self { leading: surfaces.leading, pending: Vec::with_capacity(64) }
    }

    fn push(&mut self, surfaces: &Surfaces, id: u32, out: &mut String) {
        let bytes = match (surfaces.get(id), self.leading) {
            (Surface::Nothing, _) => return,
            (Surface::Break, _) => return self.flush(surfaces, out),
            (Surface::Spaced([_, rest @ ..]), Leading::DropOne) => {
                self.leading = Leading::Keep;
                rest
            }
            (Surface::Spaced([_, rest @ ..]), Leading::DropAll) => rest,
            (Surface::Bytes(bytes) | Surface::Spaced(bytes), _) => bytes,
        };
        if !bytes.is_empty() {
            self.leading = Leading::Keep;
        }
        self.pending.extend_from_slice(bytes);
        let mut seen = 0;
        let mut unfinished = 0;
        for chunk in self.pending.utf8_chunks() {
            out.push_str(chunk.valid());
            let bad = chunk.invalid();
            seen += chunk.valid().len() + bad.len();
            let may_go_on = std::str::from_utf8(bad).is_err_and(|error| error.error_len().is_none());
            if may_go_on && seen == self.pending.len() {
                unfinished = bad.len();
            } else {
                replace(surfaces, bad.len(), out);
            }
        }
        self.pending.drain(..seen - unfinished);
    }

    /// No byte that comes can complete the pending ones.
    fn flush(&mut self, surfaces: &Surfaces, out: &mut String) {
        replace(surfaces, self.pending.len(), out);
        self.pending.clear();
    }
}

/// Appends what stands for `bad` bytes that began a character and did not end it.
fn replace(surfaces: &Surfaces, bad: usize, out: &mut String) {
    let count = if surfaces.replace_each_byte { bad } else { bad.min(1) };
    out.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, count));
}

/// Turns ids into text as they come: the concatenation of everything returned equals `decode` of prompt and new ids less `decode` of the
/// prompt, and no part of a UTF-8 character is ever returned alone.
///
/// A prompt may end within a character, whose bytes `decode` of the prompt shows as U+FFFD. They are held back here like those of new ids:
/// the text returned begins with the whole character if the new ids complete it, else with their U+FFFD. So what is returned is always
/// `decode` of all ids less `decode` of the prompt without those trailing U+FFFD, and nothing of the completion is lost.
pub struct Detokenizer {
    tokenizer: Tokenizer,
    state: State,
}

impl Detokenizer {
    /// Starts after `prompt`, of which only the ends are looked at.
    pub fn new(tokenizer: &Tokenizer, prompt: &[u32]) -> Self {
        let surfaces = &tokenizer.vocabulary().surfaces;
        let mut state = State::new(surfaces);
        let mut scratch = String::new();
        // The beginning of a character has at most three bytes, so the ids that make up the last four tell what is pending.
        let mut bytes = 0;
        let ends_the_search = |&id: &u32| match surfaces.get(id) {
            Surface::Bytes(surface) | Surface::Spaced(surface) => {
                bytes += surface.len();
                bytes >= 4
            }
            Surface::Break => true,
            Surface::Nothing => false,
        };
        let tail = prompt.iter().rposition(ends_the_search).unwrap_or(0);
        for &id in &prompt[..tail] {
            if state.leading == Leading::Keep {
                break;
            }
            state.push(surfaces, id, &mut scratch);
        }
        state.pending.clear();
        for &id in &prompt[tail..] {
            state.push(surfaces, id, &mut scratch);
        }
        Self { tokenizer: tokenizer.clone(), state }
    }

    /// Takes one more id; the text that is now certain is appended to `out`. Bytes that can no longer become a character are certain.
    pub fn push(&mut self, id: u32, out: &mut String) {
        self.state.push(&self.tokenizer.vocabulary().surfaces, id, out);
    }

    /// Whether bytes are held back.
    pub fn pending(&self) -> bool {
        !self.state.pending.is_empty()
    }

    /// The text that was held back as an incomplete character, as `decode` would show it.
    pub fn finish(&mut self, out: &mut String) {
        self.state.flush(&self.tokenizer.vocabulary().surfaces, out);
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    static MODELS: LazyLock<[Tokenizer; 3]> =
        LazyLock::new(|| ["ident_nodummy", "ident_dummy", "nfkc_dummy"].map(load));

    fn load(model: &str) -> Tokenizer {
        let path = format!("{}/../tests/fixtures/golden/tok/{model}.model", env!("CARGO_MANIFEST_DIR"));
        Tokenizer::from_sentencepiece(&std::fs::read(path).unwrap()).unwrap()
    }

    /// The id of a byte in the models of the tests.
    fn byte(byte: u8) -> u32 {
        24 + u32::from(byte)
    }

    fn outputs(tokenizer: &Tokenizer, prompt: &[u32], ids: &[u32]) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(tokenizer, prompt);
        let mut outputs = Vec::new();
        for &id in ids {
            outputs.push(String::new());
            detokenizer.push(id, outputs.last_mut().unwrap());
        }
        outputs.push(String::new());
        detokenizer.finish(outputs.last_mut().unwrap());
        assert!(!detokenizer.pending());
        outputs
    }

    #[test]
    fn bytes_wait_until_they_are_a_character_or_never_will_be() {
        let tokenizer = load("ident_nodummy");
        let check = |ids: &[u8], expected: &[&str]| {
            let ids: Vec<_> = ids.iter().copied().map(byte).collect();
            assert_eq!(outputs(&tokenizer, &[], &ids), expected);
        };
        check("€".as_bytes(), &["", "", "€", ""]);
        check(b"\xe2\x82a", &["", "", "\u{fffd}\u{fffd}a", ""]);
        check(b"\xe2\xe2\x82\xac", &["", "\u{fffd}", "", "€", ""]);
        check(b"\x80\xf0\x9f\x98", &["\u{fffd}", "", "", "", "\u{fffd}\u{fffd}\u{fffd}"]);
        // A control symbol keeps apart what it stands between.
        let (half, rest) = (byte(0xc3), byte(0xa9));
        assert_eq!(outputs(&tokenizer, &[], &[half, 3, rest]), ["", "\u{fffd}", "\u{fffd}", ""]);
    }

    #[test]
    fn a_prompt_that_ends_within_a_character_is_completed() {
        let tokenizer = load("ident_nodummy");
        let prompt = [byte(b'x'), byte(0xe2), byte(0x82)];
        assert!(Detokenizer::new(&tokenizer, &prompt).pending());
        assert_eq!(outputs(&tokenizer, &prompt, &[byte(0xac)]), ["€", ""]);
        assert_eq!(outputs(&tokenizer, &prompt, &[byte(b'y')]), ["\u{fffd}\u{fffd}y", ""]);
        assert_eq!(outputs(&tokenizer, &prompt, &[]), ["\u{fffd}\u{fffd}"]);
    }

    #[test]
    fn only_the_first_visible_id_loses_its_space() {
        let tokenizer = load("ident_dummy");
        let the = tokenizer.token_id("\u{2581}the").unwrap();
        for invisible in [&[][..], &[2], &[2, 3, 0]] {
            assert_eq!(outputs(&tokenizer, invisible, &[the, the]), ["the", " the", ""]);
        }
        assert_eq!(outputs(&tokenizer, &[the], &[the]), [" the", ""]);
        assert_eq!(outputs(&tokenizer, &[byte(b'a')], &[the]), [" the", ""]);
    }

    /// Ids of all kinds, bytes above all.
    fn ids() -> impl Strategy<Value = Vec<u32>> {
        let id = prop_oneof![
            4 => 0..1030u32,
            2 => 0..6u32,
            1 => Just(867u32),
            4 => prop::sample::select(&"aé€😀".as_bytes()[1..]).prop_map(byte),
        ];
        prop::collection::vec(id, 0..24)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]

        #[test]
        fn a_stream_is_the_rest_of_the_whole(ids in ids(), split in any::<prop::sample::Index>()) {
            for tokenizer in &*MODELS {
                let (prompt, new) = ids.split_at(split.index(ids.len() + 1));
                let pending = Detokenizer::new(tokenizer, prompt).state.pending.len();
                let shown = tokenizer.decode(prompt);
                let certain = shown.strip_suffix("\u{fffd}".repeat(pending).as_str()).unwrap();
                let streamed = outputs(tokenizer, prompt, new).concat();
                prop_assert_eq!(format!("{certain}{streamed}"), tokenizer.decode(&ids));
            }
        }
    }
}
