//! Which pages of the KV cache belong to whom. Bookkeeping only: the memory itself is the backend's.
//!
//! A page that is full of prompt tokens is remembered by what it holds and what came before it, so that rows which begin alike share it. Keys and
//! values depend on nothing but the tokens up to their own, bit for bit, so sharing cannot be seen. A remembered page that nobody uses stays until
//! its memory is needed; the one that was longest without use goes first.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// Hands out page numbers 0..num_pages.
pub struct PagePool {
    page_tokens: usize,
    /// Indexed by page.
    pages: Vec<Page>,
    /// Pages that are neither used nor remembered.
    free: Vec<u32>,
    /// Pages that are remembered and not used, by the time of their last use.
    idle: BTreeSet<(u64, u32)>,
    remembered: HashMap<Arc<Content>, u32>,
    /// Counts uses and contents.
    clock: u64,
}

#[derive(Clone, Default)]
struct Page {
    /// Rows that use it.
    users: u32,
    /// When it was last given back.
    last_use: u64,
    /// Number of its content; never that of another one.
    content_id: u64,
    content: Option<Arc<Content>>,
}

/// Tokens of a page and all before it.
#[derive(PartialEq, Eq, Hash)]
struct Content {
    /// Content of the page before; 0 if this one is the first.
    before: u64,
    tokens: Box<[u32]>,
}

impl PagePool {
    pub fn new(num_pages: usize, page_tokens: usize) -> Self {
        Self {
            page_tokens,
            pages: vec![Page::default(); num_pages],
            free: (0..num_pages as u32).rev().collect(),
            idle: BTreeSet::new(),
            remembered: HashMap::new(),
            clock: 0,
        }
    }

    pub fn num_pages(&self) -> usize {
        self.pages.len()
    }

    pub fn page_tokens(&self) -> usize {
        self.page_tokens
    }

    /// Pages that nobody uses.
    pub fn num_free(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Pages that hold `tokens` positions.
    pub fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }

    /// A page for one row alone.
    pub fn allocate(&mut self) -> Option<u32> {
        let page = match self.free.pop() {
            Some(page) => page,
            None => {
                let (_, page) = self.idle.pop_first()?;
                if let Some(content) = self.pages[page as usize].content.take() {
                    self.remembered.remove(&content);
                }
                page
            }
        };
        self.pages[page as usize].users = 1;
        Some(page)
    }

    /// Appends the remembered pages that `tokens` begin with to `pages`, for one more row to use; returns the last one's content, 0 if there is none.
    pub fn share(&mut self, tokens: &[u32], pages: &mut Vec<u32>) -> u64 {
        let mut before = 0;
        for tokens in tokens.chunks_exact(self.page_tokens) {
            let Some(page) = self.remembered.get(&Content { before, tokens: tokens.into() }).copied() else { break };
            let state = &mut self.pages[page as usize];
            if state.users == 0 {
                self.idle.remove(&(state.last_use, page));
            }
            state.users += 1;
            before = state.content_id;
            pages.push(page);
        }
        before
    }

    /// Remembers a page in use as full of `tokens`, which follow the content `before`; returns its content.
    pub fn remember(&mut self, before: u64, tokens: &[u32], page: u32) -> u64 {
        let content = Arc::new(Content { before, tokens: tokens.into() });
        if let Some(same) = self.remembered.get(&content) {
            return self.pages[*same as usize].content_id;
        }
        self.clock += 1;
        let state = &mut self.pages[page as usize];
        state.content_id = self.clock;
        state.content = Some(Arc::clone(&content));
        self.remembered.insert(content, page);
        self.clock
    }

    /// Takes a row's pages back; `pages` is empty afterwards.
    pub fn release(&mut self, pages: &mut Vec<u32>) {
        // The end of a prefix is worth less than its beginning.
        for page in pages.drain(..).rev() {
            let state = &mut self.pages[page as usize];
            debug_assert!(state.users > 0, "a page was freed twice");
            state.users -= 1;
            if state.users > 0 {
                continue;
            }
            if state.content.is_some() {
                self.clock += 1;
                state.last_use = self.clock;
                self.idle.insert((self.clock, page));
            } else {
                self.free.push(page);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pages_are_shared_by_equal_beginnings_alone(rows in prop::collection::vec((0_u32..3, 1_usize..40, any::<bool>()), 1..60)) {
            let mut pool = PagePool::new(24, 4);
            // What each row wrote, and what every page holds.
            let mut owners: Vec<(Vec<u32>, Vec<u32>)> = Vec::new();
            let mut held: Vec<Vec<u32>> = vec![Vec::new(); 24];
            for (kind, len, ends) in rows {
                if ends && !owners.is_empty() {
                    let (_, mut pages) = owners.swap_remove(0);
                    pool.release(&mut pages);
                }
                let tokens: Vec<u32> = (0..len as u32).map(|i| if i < 8 { i } else { i * kind }).collect();
                let mut pages = Vec::new();
                let mut content = pool.share(&tokens, &mut pages);
                for (page, tokens) in pages.iter().zip(tokens.chunks_exact(4)) {
                    prop_assert_eq!(&held[*page as usize], tokens);
                }
                let shared = pages.len();
                if pool.num_free() < pool.pages_for(len) - shared {
                    pool.release(&mut pages);
                    continue;
                }
                for part in tokens.chunks(4).skip(shared) {
                    let page = pool.allocate().expect("there are enough");
                    prop_assert!(owners.iter().all(|(_, pages)| !pages.contains(&page)) && !pages.contains(&page));
                    held[page as usize] = part.to_vec();
                    pages.push(page);
                    if part.len() == 4 {
                        content = pool.remember(content, part, page);
                    }
                }
                for (tokens, pages) in &owners {
                    for (page, tokens) in pages.iter().zip(tokens.chunks(4)) {
                        prop_assert_eq!(&held[*page as usize], tokens, "a page in use was written");
                    }
                }
                owners.push((tokens, pages));
                let used: HashSet<u32> = owners.iter().flat_map(|(_, pages)| pages).copied().collect();
                prop_assert_eq!(pool.num_free() + used.len(), 24);
            }
        }
    }

    #[test]
    fn what_was_longest_without_use_is_forgotten_first() {
        let mut pool = PagePool::new(2, 2);
        let mut rows: Vec<Vec<u32>> = Vec::new();
        for tokens in [[1, 2], [3, 4]] {
            let page = pool.allocate().into_iter().collect::<Vec<u32>>();
            pool.remember(0, &tokens, page[0]);
            rows.push(page);
        }
        for mut row in rows {
            pool.release(&mut row);
        }
        assert!(pool.allocate().is_some());
        let mut pages = Vec::new();
        assert_eq!(pool.share(&[1, 2], &mut pages), 0);
        assert_ne!(pool.share(&[3, 4], &mut pages), 0);
        assert_eq!((pages.len(), pool.num_free()), (1, 0));
    }
}
