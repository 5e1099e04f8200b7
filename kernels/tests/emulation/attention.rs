use nemotron_kernels::ops::{Attention, AttentionCombine, AttentionTile, NO_ROW, SPLIT_TOKENS};
use nemotron_kernels::{Bf16, Ptr};

use super::device::{Memory, Random, assert_near, in_every_order, wide};

/// Sequences of some lengths in a paged cache whose unused places hold NaN.
struct Cache {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    page_tokens: usize,
    /// A query for every position of every sequence, [positions, heads · dim], sequence after sequence.
    q: Vec<Memory<Bf16>>,
    kv: Memory<Bf16>,
    table: Memory<u32>,
    first_pages: Vec<u32>,
    lengths: Vec<usize>,
}

/// Some tokens of a sequence: (sequence, first position, tokens).
type Chunk = (usize, usize, usize);

impl Cache {
    fn new(heads: usize, kv_heads: usize, dim: usize, page_tokens: usize, lengths: &[usize]) -> Self {
        let mut random = Random((heads * dim + page_tokens) as u64);
        let pages: Vec<usize> = lengths.iter().map(|len| len.div_ceil(page_tokens)).collect();
        let num_pages = pages.iter().sum::<usize>() + 3;
        let mut order: Vec<u32> = (0..num_pages as u32).collect();
        for i in (1..order.len()).rev() {
            order.swap(i, random.below(i + 1));
        }
        let first_pages: Vec<u32> =
            pages.iter().scan(0, |sum, pages| Some(std::mem::replace(sum, *sum + *pages as u32))).collect();
        let mut cache = Self {
            heads,
            kv_heads,
            dim,
            page_tokens,
            q: lengths.iter().map(|len| random.bf16s(len * heads * dim, 1.5)).collect(),
            kv: Memory::fresh(num_pages * kv_heads * 2 * page_tokens * dim),
            table: Memory(order),
            first_pages,
            lengths: lengths.to_vec(),
        };
        for (sequence, len) in lengths.iter().enumerate() {
            for position in 0..*len {
                for kv_head in 0..kv_heads {
                    for is_value in 0..2 {
                        let at = cache.at(sequence, position, kv_head, is_value);
                        let row = random.bf16s(dim, 1.0);
                        cache.kv.0[at..at + dim].copy_from_slice(&row.0);
                    }
                }
            }
        }
        cache
    }

    fn at(&self, sequence: usize, position: usize, kv_head: usize, is_value: usize) -> usize {
        let page = self.table.0[self.first_pages[sequence] as usize + position / self.page_tokens] as usize;
        (((page * self.kv_heads + kv_head) * 2 + is_value) * self.page_tokens + position % self.page_tokens) * self.dim
    }

    fn expected(&self, sequence: usize, position: usize) -> Vec<f64> {
        let (heads, dim) = (self.heads, self.dim);
        let mut out = Vec::new();
        for head in 0..heads {
            let kv_head = head / (heads / self.kv_heads);
            let q = &self.q[sequence].0[(position * heads + head) * dim..][..dim];
            let row = |position, is_value| &self.kv.0[self.at(sequence, position, kv_head, is_value)..][..dim];
            let scores: Vec<f64> = (0..=position)
                .map(|p| q.iter().zip(row(p, 0)).map(|(q, k)| wide(*q) * wide(*k)).sum::<f64>() / (dim as f64).sqrt())
                .collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
            let total: f64 = weights.iter().sum();
            out.extend((0..dim).map(|d| {
                weights.iter().enumerate().map(|(p, weight)| weight * wide(row(p, 1)[d])).sum::<f64>() / total
            }));
        }
        out
    }

    /// Runs the chunks as one step, as decode (every token a tile of its own, then one of padding) or as prefill; gives each token's bits.
    fn run(&self, chunks: &[Chunk], decode: bool) -> Vec<Vec<Bf16>> {
        let (heads, dim) = (self.heads, self.dim);
        let width = heads * dim;
        let tile_tokens = Attention::tile_tokens(heads as u32, self.kv_heads as u32) as usize;
        let (mut q, mut positions, mut first_pages, mut tiles) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (sequence, first, count) in chunks.iter().copied() {
            assert!(first + count <= self.lengths[sequence]);
            for start in (0..count).step_by(tile_tokens) {
                tiles.push(AttentionTile {
                    first_row: (positions.len() + start) as u32,
                    num_tokens: tile_tokens.min(count - start) as u32,
                    first_position: (first + start) as u32,
                    first_page: self.first_pages[sequence],
                });
            }
            q.extend_from_slice(&self.q[sequence].0[first * width..][..count * width]);
            positions.extend((first..first + count).map(|position| position as u32));
            first_pages.extend((0..count).map(|_| self.first_pages[sequence]));
        }
        let rows = positions.len();
        let splits = positions.iter().map(|position| Attention::splits(*position)).max().unwrap();
        positions.push(NO_ROW);
        first_pages.push(0);
        tiles.push(AttentionTile { first_row: 0, num_tokens: 0, first_position: 0, first_page: 0 });
        let (q, positions, first_pages, tiles) = (Memory(q), Memory(positions), Memory(first_pages), Memory(tiles));
        let out = in_every_order(|launch| {
            let mut out = Memory::<Bf16>::fresh((rows + 1) * width);
            let (sums, stats) = Attention::workspace_bytes(rows as u32 + 1, heads as u32, dim as u32, splits);
            let (mut sums, mut stats) = (Memory::<f32>::fresh(sums / 4), Memory::<f32>::fresh(stats / 4));
            let attention = Attention {
                q: q.ptr(),
                kv: self.kv.ptr(),
                page_table: self.table.ptr(),
                tiles: if decode { Ptr::NULL } else { tiles.ptr() },
                positions: positions.ptr(),
                first_pages: first_pages.ptr(),
                out: out.ptr_mut(),
                sums: sums.ptr_mut(),
                stats: stats.ptr_mut(),
                num_tiles: if decode { rows + 1 } else { tiles.0.len() } as u32,
                heads: heads as u32,
                kv_heads: self.kv_heads as u32,
                head_dim: dim as u32,
                page_tokens: self.page_tokens as u32,
                splits,
            };
            launch(&attention.launch());
            let combine = AttentionCombine {
                sums: sums.ptr(),
                stats: stats.ptr(),
                positions: positions.ptr(),
                out: out.ptr_mut(),
                rows: rows as u32 + 1,
                heads: heads as u32,
                head_dim: dim as u32,
                splits,
            };
            launch(&combine.launch());
            out.0
        });
        assert!(out[rows * width..].iter().all(|x| x.0 == 0xffff), "padding was stored");
        out.chunks(width).take(rows).map(<[Bf16]>::to_vec).collect()
    }

    fn check(&self, chunks: &[Chunk], decode: bool) {
        let tokens =
            chunks.iter().flat_map(|(sequence, first, count)| (*first..first + count).map(move |p| (*sequence, p)));
        for ((sequence, position), out) in tokens.zip(self.run(chunks, decode)) {
            assert_near(out.iter().map(|x| wide(*x)), &self.expected(sequence, position), 5e-3);
        }
    }
}

const SPLIT: usize = SPLIT_TOKENS as usize;

#[test]
fn decode_is_softmax_attention() {
    // (heads, kv_heads, head_dim, page_tokens): the three sizes, heads that are filled up, groups from 1 to more than a tile's 16.
    for (heads, kv_heads, dim, page_tokens) in
        [(12, 1, 192, 64), (6, 2, 128, 16), (4, 4, 64, 5), (4, 1, 16, 7), (3, 1, 136, 32), (20, 1, 24, 16)]
    {
        let lengths = [1, 2, 63, 65, SPLIT, SPLIT + 1, 2 * SPLIT + 70];
        let cache = Cache::new(heads, kv_heads, dim, page_tokens, &lengths);
        let last: Vec<Chunk> = lengths.iter().enumerate().map(|(sequence, len)| (sequence, len - 1, 1)).collect();
        cache.check(&last, true);
    }
}

#[test]
fn prefill_is_softmax_attention() {
    for (heads, kv_heads, dim, page_tokens) in [(12, 1, 192, 64), (6, 2, 64, 16), (2, 2, 128, 3), (5, 1, 40, 9)] {
        let cache = Cache::new(heads, kv_heads, dim, page_tokens, &[40, SPLIT + 30, 9]);
        // A whole prompt, a chunk across the border of splits, one token, the end of a prompt.
        cache.check(&[(0, 0, 40), (1, SPLIT - 4, 11), (2, 8, 1), (1, SPLIT + 29, 1)], false);
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_chunk_and_batch() {
    for (heads, kv_heads, dim) in [(12, 1, 192), (4, 2, 64), (6, 1, 16)] {
        let cache = Cache::new(heads, kv_heads, dim, 16, &[SPLIT + 30, 12]);
        // Tokens on both sides of the border of splits, with all that stand before them in the cache.
        let start = SPLIT - 12;
        let all = cache.run(&[(0, start, 40)], false);
        for (first, count) in [(0, 1), (3, 7), (11, 2), (14, 26)] {
            let chunk = cache.run(&[(1, 5, 7), (0, start + first, count)], false);
            assert!(chunk[7..] == all[first..first + count], "{count} tokens from {}", start + first);
        }
        for row in [0, 11, 12, 39] {
            let alone = cache.run(&[(0, start + row, 1)], true);
            assert!(alone[0] == all[row], "decode at position {}", start + row);
        }
        let batch = cache.run(&[(1, 11, 1), (0, start + 20, 1), (1, 3, 1)], true);
        assert!(batch[1] == all[20], "decode in a batch");
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let mut cache = Cache::new(2, 1, 64, 16, &[SPLIT + 20]);
    for x in &mut cache.q[0].0 {
        *x = super::device::bf16(wide(*x) as f32 * 200.0);
    }
    cache.check(&[(0, SPLIT + 10, 4)], false);
}
