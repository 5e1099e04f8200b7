// From logits to a token, one block a row, with the same result as the engine's sampler on the CPU.
//
// Probabilities are whole numbers of 2^-44 or so of the largest one: whole numbers have the same sum in any order, so atomics may add
// them, and the drawn token does not depend on how threads share out the vocabulary. Sums agree with those in f64 to about 1e-11.
#include "device.h"

static constexpr u32 SAMPLE_THREADS = 1024, BINS = 2048;

// What threads share; the counters of a bin are in two halves, as devices add no 64-bit numbers in shared memory at once.
struct SampleShared {
    u32 low[BINS], high[BINS];
    u64 scan[32];
    u64 found_above, found_at;
    u32 found_bin;
};

// Numbers in the order of floats, −0 below +0.
DEVICE u32 order_key(float v) {
    const u32 bits = __float_as_uint(v);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE float from_key(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

DEVICE u64 mix(u64 value) {
    u64 z = value + 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// floor(u · total) of the row's random number u in [0, 1), a multiple of 2^-53.
DEVICE u64 share_of(const SampleRow& row, u64 total) {
    const u64 key = mix(mix(row.seed) ^ (static_cast<u64>(row.sample) << 32 | row.position));
    return __umul64hi(key >> 11 << 11, total);
}

// Sum of the values of all threads before this one; `total` is that of all.
DEVICE u64 block_scan(u64 value, u64& total, u64* scratch) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 sum = value;
    for (u32 step = 1; step < 32; step *= 2) {
        const u64 before = __shfl_up_sync(ALL_LANES, sum, step);
        if (lane >= step) sum += before;
    }
    __syncthreads();  // the last use of `scratch` is over
    if (lane == 31) scratch[warp] = sum;
    __syncthreads();
    u64 warps = scratch[lane];
    for (u32 step = 1; step < 32; step *= 2) {
        const u64 before = __shfl_up_sync(ALL_LANES, warps, step);
        if (lane >= step) warps += before;
    }
    total = __shfl_sync(ALL_LANES, warps, 31);
    const u64 before = __shfl_sync(ALL_LANES, warps, warp == 0 ? 0 : warp - 1);
    return (warp == 0 ? 0 : before) + sum - value;
}

// The lowest id among those with the largest logit, packed so that more is better; 0 if a logit is NaN or +inf.
DEVICE u64 best(const float* logits, u32 vocab, u64* scratch) {
    u64 most = 0;
    u32 sane = 1;
    for (u32 id = threadIdx.x; id < vocab; id += SAMPLE_THREADS) {
        const float logit = logits[id] + 0.0f;  // −0 is no less than 0 here
        if (!(logit < infinity())) sane = 0;
        const u64 packed = static_cast<u64>(order_key(logit)) << 32 | (0xffffffffu - id);
        if (packed > most) most = packed;
    }
    for (u32 step = 16; step > 0; step /= 2) {
        const u64 other = __shfl_xor_sync(ALL_LANES, most, step);
        if (other > most) most = other;
        sane &= __shfl_xor_sync(ALL_LANES, sane, step);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sane ? most : ~0ull;
    __syncthreads();
    most = scratch[threadIdx.x % 32];
    for (u32 step = 16; step > 0; step /= 2) {
        const u64 other = __shfl_xor_sync(ALL_LANES, most, step);
        if (other > most) most = other;
    }
    return most == ~0ull || most >> 32 <= order_key(-infinity()) ? 0 : most;
}

// Puts each id that occurs in the row down or up once, by all its occurrences.
DEVICE void penalise(const SampleRow& row, const u32* seen, float* logits, u32 vocab, float shift) {
    for (u32 i = threadIdx.x; i < row.num_seen; i += SAMPLE_THREADS) {
        const u32 id = seen[i];
        bool is_first = id < vocab;
        for (u32 j = 0; j < i && is_first; ++j) is_first = seen[j] != id;
        if (!is_first) continue;
        u32 new_ones = 0;
        for (u32 j = max(i, row.num_prompt); j < row.num_seen; ++j) new_ones += seen[j] == id;
        // Rounded after every operation, as on the CPU.
        const float scaled = __fadd_rn(logits[id], shift);
        const float penalised = scaled > 0.0f ? scaled / row.repetition_penalty : __fmul_rn(scaled, row.repetition_penalty);
        float logit = __fadd_rn(penalised, -shift);
        if (new_ones > 0)
            logit = __fadd_rn(logit, -__fadd_rn(row.presence_penalty, __fmul_rn(row.frequency_penalty, static_cast<float>(new_ones))));
        logits[id] = logit;
    }
}

struct Distribution {
    const float* logits;
    u32 vocab;
    float most;
    double unit;

    DEVICE u64 weight(float logit) const { return __double2ull_rn(exp(static_cast<double>(logit - most)) * unit); }

    DEVICE u32 bin(float logit) const {
        const float distance = (most - logit) * 64.0f;
        return distance < static_cast<float>(BINS - 1) ? static_cast<u32>(distance) : BINS - 1;
    }
};

DEVICE void clear_bins(SampleShared& shared) {
    __syncthreads();
    for (u32 i = threadIdx.x; i < BINS; i += SAMPLE_THREADS) shared.low[i] = shared.high[i] = 0;
    __syncthreads();
}

DEVICE void add_to_bin(SampleShared& shared, u32 bin, u64 value) {
    if (value == 0) return;
    const u32 low = static_cast<u32>(value), old = atomicAdd(&shared.low[bin], low);
    const u32 high = static_cast<u32>(value >> 32) + (old + low < old ? 1u : 0u);
    if (high) atomicAdd(&shared.high[bin], high);
}

DEVICE u64 in_bin(const SampleShared& shared, u32 bin) { return static_cast<u64>(shared.high[bin]) << 32 | shared.low[bin]; }

// Finds the first bin at which the sum over bins passes `target`, which is less than the sum of all; returns that.
DEVICE u64 find_bin(SampleShared& shared, u64 target) {
    __syncthreads();
    const u32 bin = threadIdx.x * (BINS / SAMPLE_THREADS);
    const u64 first = in_bin(shared, bin), second = in_bin(shared, bin + 1);
    u64 total;
    const u64 before = block_scan(first + second, total, shared.scan);
    if (before <= target && target < before + first + second) {
        const bool is_second = target >= before + first;
        shared.found_bin = bin + is_second;
        shared.found_above = is_second ? before + first : before;
        shared.found_at = is_second ? second : first;
    }
    __syncthreads();
    return total;
}

// A logit of the vocabulary, and the weight of all that are larger.
struct Found {
    u32 key;
    u64 above;
};

// Coarse bins of all candidates, those with at least `least`: their weights, or how many they are.
DEVICE void fill_bins(SampleShared& shared, const Distribution& d, float least, bool count) {
    clear_bins(shared);
    // Whole warps go round together. Most of a vocabulary may be in the last bin, so a warp counts those as one.
    for (u32 start = threadIdx.x / 32 * 32; start < d.vocab; start += SAMPLE_THREADS) {
        const u32 id = start + threadIdx.x % 32;
        const float logit = id < d.vocab ? d.logits[id] : -infinity();
        const bool is_candidate = logit > -infinity() && logit >= least;
        const u32 bin = is_candidate ? d.bin(logit) : 0;
        const u32 far = __ballot_sync(ALL_LANES, is_candidate && count && bin == BINS - 1);
        if (far && threadIdx.x % 32 == 0) add_to_bin(shared, BINS - 1, static_cast<u64>(__popc(far)));
        if (is_candidate && !(count && bin == BINS - 1)) add_to_bin(shared, bin, count ? 1 : d.weight(logit));
    }
}

// With `bins` filled: the logit of the candidate at which the sum, from the largest logit down, passes `target`. Overwrites the bins with
// finer and finer ones.
DEVICE Found descend(SampleShared& shared, const Distribution& d, float least, bool count, u64 target) {
    find_bin(shared, target);
    const u32 coarse = shared.found_bin;
    Found found = {0, shared.found_above};
    for (int digit = 24; digit >= 0; digit -= 8) {
        clear_bins(shared);
        for (u32 id = threadIdx.x; id < d.vocab; id += SAMPLE_THREADS) {
            const float logit = d.logits[id];
            if (!(logit > -infinity() && logit >= least) || d.bin(logit) != coarse) continue;
            const u32 key = order_key(logit);
            // Digits that are known already agree; shifts by 32 are none.
            if (digit < 24 && key >> (digit + 8) != found.key) continue;
            add_to_bin(shared, 255 - (key >> digit & 255), count ? 1 : d.weight(logit));
        }
        find_bin(shared, target - found.above);
        found.above += shared.found_above;
        found.key = found.key << 8 | (255 - shared.found_bin);
        __syncthreads();  // all have read what was found
    }
    return found;
}

// The first id at which the sum of weights over ids passes a target that is less than the sum of all.
template <class Target, class Weight>
DEVICE void pick(SampleShared& shared, u32 vocab, Target target_of, Weight weight, u32* token) {
    const u32 length = ceil_div(vocab, SAMPLE_THREADS);
    const u32 begin = min(threadIdx.x * length, vocab), end = min(begin + length, vocab);
    u64 sum = 0, total;
    for (u32 id = begin; id < end; ++id) sum += weight(id);
    u64 before = block_scan(sum, total, shared.scan);
    const u64 target = target_of(total);
    if (before > target || target >= before + sum) return;
    for (u32 id = begin; id < end; ++id) {
        before += weight(id);
        if (before > target) {
            *token = id;
            return;
        }
    }
}

KERNEL(sample, Sample, 1024) {
    SHARED(SampleShared, shared_memory, 1);
    SampleShared& shared = *shared_memory;
    const SampleRow row = args.rows[blockIdx.x];
    float* logits = args.logits + static_cast<u64>(row.logits_row) * args.stride;
    u32* token = args.tokens + row.slot;
    const u32 vocab = args.vocab;

    for (u32 i = threadIdx.x; i < row.num_masked; i += SAMPLE_THREADS) {
        const u32 id = args.ids[row.first_masked + i];
        if (id < vocab) logits[id] = -infinity();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        // An id may have several, so one after the other.
        for (u32 i = row.first_biased; i < row.first_biased + row.num_biased; ++i)
            if (args.ids[i] < vocab) logits[args.ids[i]] += args.biases[i];
    }
    __syncthreads();
    u64 first = best(logits, vocab, shared.scan);
    if (first == 0 || row.greedy) {
        if (threadIdx.x == 0) *token = first == 0 ? NOT_FINITE : 0xffffffffu - static_cast<u32>(first);
        return;
    }

    const float unscaled = logits[0xffffffffu - static_cast<u32>(first)];
    __syncthreads();  // all have read it
    for (u32 id = threadIdx.x; id < vocab; id += SAMPLE_THREADS) logits[id] = (logits[id] - unscaled) / row.temperature;
    __syncthreads();
    penalise(row, args.ids + row.first_seen, logits, vocab, unscaled / row.temperature);
    __syncthreads();
    first = best(logits, vocab, shared.scan);
    if (first == 0) {
        if (threadIdx.x == 0) *token = NOT_FINITE;
        return;
    }

    u32 bits = 44;
    while (bits > 20 && vocab > 1u << (62 - bits)) --bits;
    const Distribution d = {logits, vocab, logits[0xffffffffu - static_cast<u32>(first)], static_cast<double>(1ull << bits)};
    const bool limit_k = row.top_k > 0 && row.top_k < vocab, limit_p = row.top_p > 0.0f && row.top_p < 1.0f;
    if (!limit_k && !limit_p) {
        pick(shared, vocab, [&](u64 total) { return share_of(row, total); }, [&](u32 id) { return d.weight(logits[id]); }, token);
        return;
    }

    // The k-th largest and all that equal it, as numbers, stay; fewer than k candidates all stay.
    float least = -infinity();
    if (limit_k) {
        fill_bins(shared, d, least, true);
        if (find_bin(shared, row.top_k - 1) >= row.top_k) {
            least = from_key(descend(shared, d, least, true, row.top_k - 1).key);
        }
    }
    fill_bins(shared, d, least, false);
    u64 kept = find_bin(shared, 0);
    if (limit_p) {
        // A candidate stays while the weight before it has not passed top_p of all.
        const u64 mass = __double2ull_rz(static_cast<double>(kept) * static_cast<double>(row.top_p));
        const Found last = descend(shared, d, least, false, mass);
        const u64 weight = d.weight(from_key(last.key));
        kept = last.above + ((mass - last.above) / weight + 1) * weight;
        fill_bins(shared, d, least, false);
    }
    const u64 target = share_of(row, kept);
    const Found drawn = descend(shared, d, least, false, target);
    // Among equals, ids in ascending order.
    const u64 index = (target - drawn.above) / d.weight(from_key(drawn.key));
    pick(shared, vocab, [&](u64) { return index; }, [&](u32 id) -> u64 { return order_key(logits[id]) == drawn.key; }, token);
}
