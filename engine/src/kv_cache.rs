//! Which pages of the KV cache belong to whom. Bookkeeping only: the memory itself is the backend's.

/// Hands out page numbers 0..num_pages, lowest free one first come, last freed first out.
pub struct PagePool {
    page_tokens: usize,
    num_pages: usize,
    free: Vec<u32>,
}

impl PagePool {
    pub fn new(num_pages: usize, page_tokens: usize) -> Self {
        let free = (0..num_pages as u32).rev().collect();
        Self { page_tokens, num_pages, free }
    }

    pub fn num_pages(&self) -> usize {
        self.num_pages
    }

    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Pages that hold `tokens` positions.
    pub fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }

    /// Whether that many positions could be stored if nothing else was.
    pub fn could_ever_hold(&self, tokens: usize) -> bool {
        self.pages_for(tokens) <= self.num_pages
    }

    pub fn can_allocate(&self, tokens: usize) -> bool {
        self.pages_for(tokens) <= self.free.len()
    }

    /// Pages for `tokens` positions, into the empty `pages`. The caller has asked [`Self::can_allocate`].
    pub fn allocate(&mut self, tokens: usize, pages: &mut Vec<u32>) {
        let left = self.free.len() - self.pages_for(tokens);
        pages.extend(self.free.drain(left..).rev());
    }

    /// Takes pages back; `pages` is empty afterwards.
    pub fn release(&mut self, pages: &mut Vec<u32>) {
        self.free.extend(pages.drain(..).rev());
        debug_assert!(self.free.len() <= self.num_pages, "a page was freed twice");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_page_has_one_owner(sizes in prop::collection::vec(1_usize..200, 1..40), frees in prop::collection::vec(any::<prop::sample::Index>(), 0..40)) {
            let mut pool = PagePool::new(64, 16);
            let mut owners: Vec<Vec<u32>> = Vec::new();
            for (turn, tokens) in sizes.into_iter().enumerate() {
                if pool.can_allocate(tokens) {
                    let mut pages = Vec::new();
                    pool.allocate(tokens, &mut pages);
                    prop_assert_eq!(pages.len(), tokens.div_ceil(16));
                    owners.push(pages);
                } else if let (Some(index), false) = (frees.get(turn), owners.is_empty()) {
                    let mut pages = owners.swap_remove(index.index(owners.len()));
                    pool.release(&mut pages);
                }
                let held: usize = owners.iter().map(Vec::len).sum();
                let distinct: HashSet<u32> = owners.iter().flatten().copied().collect();
                prop_assert_eq!(distinct.len(), held);
                prop_assert_eq!(pool.num_free() + held, 64);
                prop_assert!(distinct.iter().all(|page| *page < 64));
            }
        }
    }
}
