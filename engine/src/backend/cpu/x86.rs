//! [`Simd`] by the intrinsics of x86-64.

use std::arch::x86_64::*;

use half::f16;

use super::simd::{Kernel, Simd};
use super::twelve_bits::{CODE, CODE_SHIFT, STEP_BYTES, TWELVE_BITS};

/// AVX-512 with the bf16 dot product.
#[derive(Clone, Copy)]
pub(super) struct Avx512Bf16;

/// AVX-512 of the first generation.
#[derive(Clone, Copy)]
pub(super) struct Avx512;

/// AVX2 with fused multiply-add; 16 lanes are two registers.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

/// Bits of the odd bf16 of a pair: those of its value as f32.
const ODD: i32 = 0xffff_0000_u32 as i32;

/// `Simd::call` by a function with the features of the instruction set.
macro_rules! call {
    ($features:literal) => {
        // Here and not on the inner function, where the compiler does not heed it.
        #[inline(never)]
        unsafe fn call<K: Kernel>(kernel: K) {
            #[target_feature(enable = $features)]
            fn call<S: Simd, K: Kernel>(kernel: K) {
                // SAFETY: this function has the features of S.
                unsafe { kernel.run::<S>() }
            }
            // SAFETY: the CPU has them, by the trait's contract.
            unsafe { call::<Self, K>(kernel) }
        }
    };
}

/// What the two AVX-512 sets share.
macro_rules! avx512_lanes {
    () => {
        const WIDE: bool = true;
        type F32 = __m512;
        type Pairs = __m512i;

        #[inline(always)]
        unsafe fn splat(value: f32) -> __m512 {
            // SAFETY: the CPU has AVX-512, by the trait's contract.
            unsafe { _mm512_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            // SAFETY: as above; valid for 16 elements.
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> __m512 {
            // SAFETY: as above; valid for 16 elements, 32 bytes.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        }

        #[inline(always)]
        unsafe fn store(to: *mut f32, value: __m512) {
            // SAFETY: as above; valid for 16 elements.
            unsafe { _mm512_storeu_ps(to, value) }
        }

        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_mul_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_max_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        unsafe fn load_pairs(from: *const u16) -> __m512i {
            // SAFETY: as above; valid for 32 elements, 64 bytes.
            unsafe { _mm512_loadu_si512(from.cast()) }
        }

        #[inline(always)]
        unsafe fn as_f32(pairs: __m512i) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_castsi512_ps(pairs) }
        }

        #[inline(always)]
        unsafe fn base(base: u16) -> __m512i {
            // SAFETY: as above.
            unsafe { _mm512_set1_epi16(base as i16) }
        }

        #[inline(always)]
        unsafe fn decode(step: *const [u8; STEP_BYTES], half: usize, base: __m512i) -> __m512i {
            // SAFETY: as above; 64 bytes, and 32 behind them, lie inside the step. What the shift brings from beside an element, and the sign's copies,
            // do not outlast the selections. Of a shift of 16 bits the compiler makes three instructions.
            unsafe {
                let from = step.cast::<u8>();
                let words = _mm512_loadu_si512(from.cast());
                let bits = match half {
                    0 => words,
                    _ => {
                        let signs = _mm512_cvtepi8_epi16(_mm256_loadu_si256(from.add(64).cast()));
                        let codes = _mm512_srli_epi64::<CODE_SHIFT>(words);
                        // a ? b : c
                        _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi16(CODE as i16), codes, signs)
                    }
                };
                _mm512_add_epi16(_mm512_and_si512(bits, _mm512_set1_epi16(TWELVE_BITS as i16)), base)
            }
        }

        #[inline(always)]
        unsafe fn splat_pair(from: *const u16) -> __m512i {
            // SAFETY: as above; valid for two elements.
            unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
        }

        #[inline(always)]
        unsafe fn widen_pairs(pairs: __m512i) -> [__m512; 2] {
            // SAFETY: as above.
            unsafe {
                [
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)),
                    _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(ODD))),
                ]
            }
        }

        #[inline(always)]
        unsafe fn prefetch(at: *const u8) {
            // SAFETY: the CPU has it, and no address is too bad for it.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
        }

        #[inline(always)]
        unsafe fn transpose(rows: [*const u32; 16], to: *mut u32) {
            // SAFETY: as above; each row has 16 words, and so has each of the places 32 · i words behind `to`.
            unsafe { transpose16(rows, to) }
        }
    };
}

impl Simd for Avx512Bf16 {
    avx512_lanes!();

    #[inline(always)]
    unsafe fn dot_pairs(a: __m512i, b: __m512i, c: __m512) -> __m512 {
        // SAFETY: the CPU has the instruction; both types are 512 bits.
        unsafe {
            _mm512_dpbf16_ps(
                c,
                std::mem::transmute::<__m512i, __m512bh>(a),
                std::mem::transmute::<__m512i, __m512bh>(b),
            )
        }
    }

    call!("avx512f,avx512bw,avx512dq,avx512bf16");
}

impl Simd for Avx512 {
    avx512_lanes!();

    #[inline(always)]
    unsafe fn dot_pairs(a: __m512i, b: __m512i, c: __m512) -> __m512 {
        // SAFETY: the CPU has AVX-512, by the trait's contract.
        unsafe {
            let odd = _mm512_set1_epi32(ODD);
            let c = _mm512_fmadd_ps(
                _mm512_castsi512_ps(_mm512_and_si512(a, odd)),
                _mm512_castsi512_ps(_mm512_and_si512(b, odd)),
                c,
            );
            _mm512_fmadd_ps(
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(a)),
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(b)),
                c,
            )
        }
    }

    call!("avx512f,avx512bw,avx512dq");
}

impl Simd for Avx2 {
    const WIDE: bool = false;
    type F32 = [__m256; 2];
    type Pairs = [__m256i; 2];

    #[inline(always)]
    unsafe fn splat(value: f32) -> [__m256; 2] {
        // SAFETY: the CPU has AVX2 and FMA, by the trait's contract.
        unsafe { [_mm256_set1_ps(value); 2] }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [__m256; 2] {
        // SAFETY: as above; valid for 16 elements.
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> [__m256; 2] {
        // SAFETY: as above, with F16C; valid for 16 elements, 32 bytes.
        unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(from.cast())), _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast()))] }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: [__m256; 2]) {
        // SAFETY: as above; valid for 16 elements.
        unsafe {
            _mm256_storeu_ps(to, value[0]);
            _mm256_storeu_ps(to.add(8), value[1]);
        }
    }

    #[inline(always)]
    unsafe fn mul(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: as above.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn max(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: as above.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn mul_add(a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: as above.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    unsafe fn load_pairs(from: *const u16) -> [__m256i; 2] {
        // SAFETY: as above; valid for 32 elements, 64 bytes.
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(16).cast())] }
    }

    #[inline(always)]
    unsafe fn as_f32(pairs: [__m256i; 2]) -> [__m256; 2] {
        // SAFETY: as above.
        unsafe { pairs.map(|pairs| _mm256_castsi256_ps(pairs)) }
    }

    #[inline(always)]
    unsafe fn base(base: u16) -> [__m256i; 2] {
        // SAFETY: as above.
        unsafe { [_mm256_set1_epi16(base as i16); 2] }
    }

    #[inline(always)]
    unsafe fn decode(step: *const [u8; STEP_BYTES], half: usize, base: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: as above; 32 bytes, and 16 from the sixty-fourth on, lie inside the step.
        unsafe {
            [0, 16].map(|at| {
                let from = step.cast::<u8>();
                let words = _mm256_loadu_si256(from.add(2 * at).cast());
                let bits = match half {
                    0 => words,
                    _ => {
                        let signs = _mm256_cvtepi8_epi16(_mm_loadu_si128(from.add(64 + at).cast()));
                        let (code, codes) =
                            (_mm256_set1_epi16(CODE as i16), _mm256_srli_epi16::<{ CODE_SHIFT as i32 }>(words));
                        _mm256_or_si256(_mm256_and_si256(code, codes), _mm256_andnot_si256(code, signs))
                    }
                };
                _mm256_add_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(TWELVE_BITS as i16)), base[0])
            })
        }
    }

    #[inline(always)]
    unsafe fn splat_pair(from: *const u16) -> [__m256i; 2] {
        // SAFETY: as above; valid for two elements.
        unsafe { [_mm256_set1_epi32(from.cast::<i32>().read_unaligned()); 2] }
    }

    #[inline(always)]
    unsafe fn widen_pairs(pairs: [__m256i; 2]) -> [[__m256; 2]; 2] {
        // SAFETY: as above.
        unsafe {
            [
                pairs.map(|pairs| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs))),
                pairs.map(|pairs| _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(ODD)))),
            ]
        }
    }

    #[inline(always)]
    unsafe fn dot_pairs(a: [__m256i; 2], b: [__m256i; 2], c: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: as above.
        unsafe { [dot_pairs8(a[0], b[0], c[0]), dot_pairs8(a[1], b[1], c[1])] }
    }

    call!("avx2,fma,f16c");
}

/// # Safety
/// The CPU has AVX2 and FMA.
#[inline(always)]
unsafe fn dot_pairs8(a: __m256i, b: __m256i, c: __m256) -> __m256 {
    // SAFETY: by this function's contract.
    unsafe {
        let odd = _mm256_set1_epi32(ODD);
        let c = _mm256_fmadd_ps(
            _mm256_castsi256_ps(_mm256_and_si256(a, odd)),
            _mm256_castsi256_ps(_mm256_and_si256(b, odd)),
            c,
        );
        _mm256_fmadd_ps(
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)),
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)),
            c,
        )
    }
}

/// [`Simd::transpose`]: pairs of rows are interleaved by words, by double words, and by quarters of a register.
///
/// # Safety
/// The CPU has AVX-512; 16 words can be read from each row, and written to each `to + 32 · i`, i < 16.
#[inline(always)]
unsafe fn transpose16(rows: [*const u32; 16], to: *mut u32) {
    // SAFETY: by this function's contract.
    unsafe {
        let mut a = [_mm512_setzero_si512(); 16];
        for i in 0..16 {
            a[i] = _mm512_loadu_si512(rows[i].cast());
        }
        let mut b = a;
        for i in (0..16).step_by(2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        // a[4 g + c]: word c of each quarter, of rows 4 g .. 4 g + 4.
        for g in (0..16).step_by(4) {
            a[g] = _mm512_unpacklo_epi64(b[g], b[g + 2]);
            a[g + 1] = _mm512_unpackhi_epi64(b[g], b[g + 2]);
            a[g + 2] = _mm512_unpacklo_epi64(b[g + 1], b[g + 3]);
            a[g + 3] = _mm512_unpackhi_epi64(b[g + 1], b[g + 3]);
        }
        for c in 0..4 {
            let low = _mm512_shuffle_i32x4::<0x88>(a[c], a[4 + c]);
            let high = _mm512_shuffle_i32x4::<0xdd>(a[c], a[4 + c]);
            let low2 = _mm512_shuffle_i32x4::<0x88>(a[8 + c], a[12 + c]);
            let high2 = _mm512_shuffle_i32x4::<0xdd>(a[8 + c], a[12 + c]);
            // low: quarters 0 and 2 of the first eight rows, high: 1 and 3; low2 and high2 of the last eight.
            _mm512_storeu_si512(to.add(32 * c).cast(), _mm512_shuffle_i32x4::<0x88>(low, low2));
            _mm512_storeu_si512(to.add(32 * (4 + c)).cast(), _mm512_shuffle_i32x4::<0x88>(high, high2));
            _mm512_storeu_si512(to.add(32 * (8 + c)).cast(), _mm512_shuffle_i32x4::<0xdd>(low, low2));
            _mm512_storeu_si512(to.add(32 * (12 + c)).cast(), _mm512_shuffle_i32x4::<0xdd>(high, high2));
        }
    }
}
