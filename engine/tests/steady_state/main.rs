//! What is allocated, counted over the whole process: nothing per token when every slot of the engine decodes, and nothing that a damaged
//! checkpoint only claims.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nemotron_engine::backend::ComputeType;
use nemotron_engine::config::Mesh;
use nemotron_engine::rank::{Limits, ModelSource};

#[path = "../engine/support.rs"]
#[expect(dead_code, reason = "shared with the tests of the engine")]
mod support;

mod forge;
mod mutations;

use mutations::Random;

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
/// Bytes of the largest allocation.
static LARGEST: AtomicU64 = AtomicU64::new(0);
/// Bytes that are allocated now, and the most that were since it was set.
static LIVE: AtomicU64 = AtomicU64::new(0);
static PEAK: AtomicU64 = AtomicU64::new(0);

fn count(freed: usize, allocated: usize) {
    if allocated > 0 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        LARGEST.fetch_max(allocated as u64, Relaxed);
    }
    let change = (allocated as u64).wrapping_sub(freed as u64);
    let live = LIVE.fetch_add(change, Relaxed).wrapping_add(change);
    PEAK.fetch_max(live, Relaxed);
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(0, layout.size());
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(layout.size(), 0);
        // SAFETY: `pointer` came from `System`, as all pointers of this allocator do.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(layout.size(), size);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const ROWS: usize = 64;
const STEPS: u64 = 128;

/// Allocations per step while `ROWS` greedy rows decode.
fn allocations_per_step(mesh: Mesh) -> f64 {
    let limits = Limits { page_tokens: 16, num_pages: 4096, max_step_tokens: 256, max_sequences: ROWS };
    let engine = support::engine(&ModelSource::Builtin, ComputeType::Bf16, mesh, limits);
    let mut rows: Vec<_> =
        (0..ROWS).map(|row| engine.submit(support::greedy(vec![300 + row as u32; 8], 600)).unwrap()).collect();
    for row in &mut rows {
        row.events.blocking_recv().unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(120);
    let wait_for = |tokens| {
        while engine.stats().generated_tokens < tokens {
            assert!(Instant::now() < deadline, "the engine stands still");
            std::thread::sleep(Duration::from_millis(5));
        }
        (engine.stats().generated_tokens, ALLOCATIONS.load(Relaxed))
    };
    // Buffers grow in the first steps.
    let (first, before) = wait_for(engine.stats().generated_tokens + 32 * ROWS as u64);
    let (last, after) = wait_for(first + STEPS * ROWS as u64);
    assert_eq!(engine.stats().running, ROWS, "all rows were decoding");
    (after - before) as f64 / ((last - first) as f64 / ROWS as f64)
}

/// One test, since both count what the process does.
#[test]
fn allocations_are_bounded() {
    decoding_allocates_only_the_blocks_of_the_event_channels();
    mutations::run();
}

fn decoding_allocates_only_the_blocks_of_the_event_channels() {
    // A channel takes a block for 32 events, so 64 rows take two a step. One more would be one allocation a step somewhere.
    for mesh in [Mesh { tp: 1, pp: 1 }, Mesh { tp: 2, pp: 2 }] {
        let allocations = allocations_per_step(mesh);
        println!("{mesh:?}: {allocations:.2} allocations a step of {ROWS} rows");
        assert!(allocations < 2.9, "{mesh:?}: {allocations} allocations a step");
    }
}
