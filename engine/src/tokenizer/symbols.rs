//! Finding user-defined symbols in text.

use std::ops::Range;

/// A set of strings that are looked for in text; the longest that matches wins.
pub(super) struct Symbols {
    /// Sorted, without duplicates and empty strings.
    sorted: Vec<Box<[u8]>>,
    /// Whether a symbol begins with this byte.
    first: [bool; 256],
}

impl Symbols {
    pub(super) fn new<'a>(symbols: impl Iterator<Item = &'a str>) -> Self {
        let mut sorted: Vec<Box<[u8]>> = symbols.filter(|s| !s.is_empty()).map(|s| s.as_bytes().into()).collect();
        sorted.sort_unstable();
        sorted.dedup();
        let mut first = [false; 256];
        for symbol in &sorted {
            first[usize::from(symbol[0])] = true;
        }
        Self { sorted, first }
    }

    /// Length in bytes of the longest symbol that `text` starts with.
    pub(super) fn longest_prefix(&self, text: &[u8]) -> Option<usize> {
        if !self.first[usize::from(*text.first()?)] {
            return None;
        }
        let mut longest = None;
        let mut candidates = &self.sorted[..];
        for (depth, byte) in text.iter().enumerate() {
            // All candidates share the bytes before `depth`, so they are sorted by the byte at `depth`; one that ends here comes first.
            let start = candidates.partition_point(|symbol| symbol.get(depth) < Some(byte));
            let end = candidates.partition_point(|symbol| symbol.get(depth) <= Some(byte));
            candidates = &candidates[start..end];
            match candidates.first() {
                Some(symbol) if symbol.len() == depth + 1 => longest = Some(depth + 1),
                Some(_) => {}
                None => break,
            }
        }
        longest
    }

    /// Where symbols stand in a text, from left to right.
    pub(super) fn find(&self, text: &str) -> Vec<Range<usize>> {
        let mut found = Vec::new();
        let mut at = 0;
        while let Some(char) = text[at..].chars().next() {
            match self.longest_prefix(&text.as_bytes()[at..]) {
                Some(len) => {
                    found.push(at..at + len);
                    at += len;
                }
                None => at += char.len_utf8(),
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_symbol_wins() {
        let symbols = Symbols::new(["<a>", "<a>b", "<", "é", ""].into_iter());
        assert_eq!(symbols.find("x<a>b<a>c<aé"), [1..5, 5..8, 9..10, 11..13]);
        assert_eq!(symbols.longest_prefix(b""), None);
        assert_eq!(symbols.longest_prefix(b"<a>"), Some(3));
    }
}
