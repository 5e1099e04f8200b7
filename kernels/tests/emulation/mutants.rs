//! Do the tests see anything? Each of these bugs is put into a copy of the kernels, and a test must fail.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::device::{LIBRARY, build, sources};

struct Mutant {
    bug: &'static str,
    /// The source that holds the kernel, the only one that is compiled; the bug is in it or in `device.h`.
    kernel: &'static str,
    from: &'static str,
    to: &'static str,
    test: &'static str,
}

const fn mutant(
    bug: &'static str,
    kernel: &'static str,
    from: &'static str,
    to: &'static str,
    test: &'static str,
) -> Mutant {
    Mutant { bug, kernel, from, to, test }
}

const DECODE: &str = "attention::decode_is_softmax_attention";
const PREFILL: &str = "attention::prefill_is_softmax_attention";
const GEMM: &str = "gemm::products_are_those_of_f64";
const NORM: &str = "norm::add_norm_adds_in_f32_and_normalises";
const ALL_REDUCE: &str = "norm::all_ranks_get_the_sum_of_the_tree";
const ROPE: &str = "rope::heads_are_rotated_and_stored_at_their_positions";
const EMBED: &str = "rows::embed_takes_rows_of_its_own_part_of_the_vocabulary_and_of_what_was_chosen";
const SAMPLE: &str = "sample::tokens_are_those_of_the_host";
const TIES: &str = "sample::equal_logits_and_hopeless_ones";

const MUTANTS: &[Mutant] = &[
    mutant("a row does not see itself", "attention.cu", "key <= position ?", "key < position ?", DECODE),
    mutant("a row sees its successor", "attention.cu", "key <= position ?", "key <= position + 1 ?", PREFILL),
    mutant("heads of another group", "attention.cu", "kv_head * group + r % group", "kv_head + r % group", DECODE),
    mutant(
        "another page",
        "attention.cu",
        "first_page + position / args",
        "first_page + (position + 1) / args",
        DECODE,
    ),
    mutant(
        "splits joined without their maxima",
        "attention.cu",
        "exp2f(stats[s].x - top) * stats[s].y",
        "stats[s].y",
        DECODE,
    ),
    mutant("the sum of weights does not shrink", "attention.cu", "total[m][h * 2] *= shrink;", "", DECODE),
    mutant(
        "unwritten values are multiplied by zero",
        "attention.cu",
        "copy_async(keys + KEYS * DIM + place<DIM>(r, g), valid ? key + to_value : key, valid);",
        "copy_async(keys + KEYS * DIM + place<DIM>(r, g), key + (valid ? to_value : 0), true);",
        DECODE,
    ),
    mutant(
        "values are multiplied before all weights are there",
        "attention.cu",
        "        __syncthreads();\n\n        // Weighted sums",
        "\n        // Weighted sums",
        DECODE,
    ),
    mutant("a missing barrier in the product's pipeline", "gemm.cu", "        __syncthreads();\n", "", GEMM),
    mutant("copies are not waited for", "gemm.cu", "wait_copies<STAGES - 2>", "wait_copies<STAGES - 1>", GEMM),
    mutant("operands lie elsewhere than they are read", "gemm.cu", "(g ^ r % 8) * 8, from", "g * 8, from", GEMM),
    mutant("a part reads into the next", "gemm.cu", "col + g * 8 < end", "col + g * 8 < cols", GEMM),
    mutant(
        "scratch memory is used again too early",
        "norm.cu",
        "    __syncthreads();  // the last use",
        "    // the last use",
        NORM,
    ),
    mutant("a row is normed before it is whole", "norm.cu", "!= REDUCE_SLICES - 1", "!= 0", ALL_REDUCE),
    mutant("ranks are added out of order", "norm.cu", "parts[rank + step]", "parts[(rank + step) % 3]", ALL_REDUCE),
    mutant("the sine has the wrong sign", "rope.cu", "+ from[at - half] * sines", "- from[at - half] * sines", ROPE),
    mutant("values are rotated", "rope.cu", "head < heads + args.kv_heads && at", "at", ROPE),
    mutant("the token of another slot", "rows.cu", "args.chosen[token & ~CHOSEN]", "args.chosen[0]", EMBED),
    mutant("top-k keeps one too many", "sample.cu", "true, row.top_k - 1).key", "true, row.top_k).key", SAMPLE),
    mutant(
        "the nucleus ends one too early",
        "sample.cu",
        "(mass - last.above) / weight + 1",
        "(mass - last.above) / weight",
        TIES,
    ),
    mutant("the prompt counts as new text", "sample.cu", "j = max(i, row.num_prompt)", "j = i", SAMPLE),
    mutant("of equals the highest id wins", "sample.cu", "(0xffffffffu - id)", "id", TIES),
];

#[test]
fn every_bug_is_noticed() {
    if std::env::var_os(LIBRARY).is_some() {
        return;
    }
    // What passes on the unchanged file fails because of the bug.
    let mut tests: Vec<_> = MUTANTS.iter().map(|mutant| (mutant.kernel, mutant.test)).collect();
    tests.dedup();
    let unchanged = tests.iter().map(|(kernel, test)| mutant("none", kernel, "", "", test));
    let all: Vec<_> = unchanged.chain(MUTANTS.iter().map(|m| Mutant { ..*m })).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(mutant) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let index = all.iter().position(|other| std::ptr::eq(other, mutant)).unwrap();
                    let library = compile(index, mutant);
                    let status = Command::new(std::env::current_exe().unwrap())
                        .args(["--exact", mutant.test])
                        .env(LIBRARY, &library)
                        .output()
                        .unwrap()
                        .status;
                    std::fs::remove_file(library).unwrap();
                    assert_eq!(status.success(), mutant.bug == "none", "{} with the bug: {}", mutant.test, mutant.bug);
                }
            });
        }
    });
}

/// The library of one source with the bug in it.
fn compile(index: usize, mutant: &Mutant) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("mutant-{}-{index}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let mut found = 0;
    for file in ["device.h", "args.h", mutant.kernel] {
        let text = std::fs::read_to_string(sources().join(file)).unwrap();
        if !mutant.from.is_empty() {
            found += text.matches(mutant.from).count();
        }
        let text = if mutant.from.is_empty() { text } else { text.replace(mutant.from, mutant.to) };
        std::fs::write(folder.join(file), text).unwrap();
    }
    assert!(mutant.bug == "none" || found == 1, "{}: its place is found {found} times", mutant.bug);
    std::fs::write(folder.join("kernels.cu"), format!("#include \"{}\"\n", mutant.kernel)).unwrap();
    let library = build(&format!("mutant-{index}"), &folder, &["-O1", "-w"]);
    std::fs::remove_dir_all(folder).unwrap();
    library
}
