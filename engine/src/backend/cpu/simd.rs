//! Sixteen f32 lanes on every instruction set, with the same bits on each.
//!
//! A [`Kernel`] is written once over [`Simd`]; [`Isa::run`] compiles it for each instruction set and enters the one the CPU has. All
//! products are fused multiply-adds and all sums have one order, so the sets differ in speed only. The exception is numbers below
//! 2⁻¹²⁶: the bf16 dot product of AVX-512 takes and returns them as zero, the others compute with them.

use half::f16;

use super::twelve_bits::{self, STEP_BYTES};
#[cfg(target_arch = "x86_64")]
use super::x86;

/// Vector operations. Those on pointers read or write 16 (or 32) elements, at any alignment.
///
/// # Safety
/// Callers make sure that the CPU has the instruction set and that pointers are valid for that many elements.
pub(super) trait Simd: Copy {
    /// There are 32 registers that hold 16 lanes each, so that 24 sums fit.
    const WIDE: bool;
    /// 16 f32 lanes.
    type F32: Copy;
    /// 32 bf16; lane i holds elements 2i and 2i + 1.
    type Pairs: Copy;

    unsafe fn splat(value: f32) -> Self::F32;
    unsafe fn load(from: *const f32) -> Self::F32;
    /// 16 f16 widened.
    unsafe fn load_f16(from: *const f16) -> Self::F32;
    unsafe fn store(to: *mut f32, value: Self::F32);
    unsafe fn mul(a: Self::F32, b: Self::F32) -> Self::F32;
    /// a where it is above b, else b.
    unsafe fn max(a: Self::F32, b: Self::F32) -> Self::F32;
    /// a · b + c, rounded once.
    unsafe fn mul_add(a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;

    unsafe fn load_pairs(from: *const u16) -> Self::Pairs;
    /// The sixteen words as f32.
    unsafe fn as_f32(pairs: Self::Pairs) -> Self::F32;
    /// A half, 0 or 1, of the encoded step of a panel (`twelve_bits.rs`), with the exponents' base in every element.
    unsafe fn decode(step: *const [u8; STEP_BYTES], half: usize, base: Self::Pairs) -> Self::Pairs;
    unsafe fn base(base: u16) -> Self::Pairs;
    /// The pair of bf16 at `from` in every lane.
    unsafe fn splat_pair(from: *const u16) -> Self::Pairs;
    /// The even elements and the odd ones, widened.
    unsafe fn widen_pairs(pairs: Self::Pairs) -> [Self::F32; 2];
    /// Adds the product of the odd elements and then that of the even ones to each lane of `c`, rounding after each: the order of
    /// `vdpbf16ps`. A product of two bf16 is exact in f32.
    unsafe fn dot_pairs(a: Self::Pairs, b: Self::Pairs, c: Self::F32) -> Self::F32;

    /// Asks for the cache line at an address, which may be any.
    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}

    /// Writes column i of the 16 × 16 words at `rows` to `to + 32 · i`.
    #[inline(always)]
    unsafe fn transpose(rows: [*const u32; 16], to: *mut u32) {
        for i in 0..16 {
            for (j, row) in rows.into_iter().enumerate() {
                // SAFETY: by this method's contract; a file's words need not be aligned.
                unsafe { to.add(32 * i + j).write(row.add(i).read_unaligned()) }
            }
        }
    }

    /// Runs `kernel` as a function of its own, compiled for this instruction set. For the hottest loops: the compiler finds registers for
    /// all their sums only if nothing else is around.
    unsafe fn call<K: Kernel>(kernel: K);
}

/// Work that is compiled for each instruction set.
pub(super) trait Kernel {
    /// Must be `#[inline(always)]`, as everything it calls in a hot loop, to be compiled with the features of its caller.
    ///
    /// # Safety
    /// The CPU has the instruction set.
    unsafe fn run<S: Simd>(self);
}

/// An instruction set that this CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// Those of this CPU, fastest first.
    pub(super) fn available() -> Vec<Self> {
        let mut available = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512bw");
            if avx512 && is_x86_feature_detected!("avx512bf16") {
                available.push(Self::Avx512Bf16);
            }
            if avx512 {
                available.push(Self::Avx512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
                available.push(Self::Avx2);
            }
        }
        available.push(Self::Portable);
        available
    }

    pub(super) fn run<K: Kernel>(self, kernel: K) {
        // SAFETY: an `Isa` names an instruction set that `available` found.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Self::Avx512Bf16 => x86::Avx512Bf16::call(kernel),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 => x86::Avx512::call(kernel),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 => x86::Avx2::call(kernel),
                Self::Portable => Portable::call(kernel),
            }
        }
    }
}

/// Plain Rust, for CPUs without any of the others.
#[derive(Clone, Copy)]
pub(super) struct Portable;

// Every method reads or writes only what its pointer is valid for by the trait's contract.
impl Simd for Portable {
    const WIDE: bool = false;
    type F32 = [f32; 16];
    type Pairs = [u16; 32];

    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; 16] {
        [value; 16]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 16] {
        // SAFETY: valid for 16 elements.
        unsafe { from.cast::<[f32; 16]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> [f32; 16] {
        // SAFETY: valid for 16 elements.
        unsafe { from.cast::<[f16; 16]>().read_unaligned() }.map(f16::to_f32)
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: [f32; 16]) {
        // SAFETY: valid for 16 elements.
        unsafe { to.cast::<[f32; 16]>().write_unaligned(value) }
    }

    #[inline(always)]
    unsafe fn mul(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn max(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    unsafe fn mul_add(a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    unsafe fn load_pairs(from: *const u16) -> [u16; 32] {
        // SAFETY: valid for 32 elements.
        unsafe { from.cast::<[u16; 32]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn as_f32(pairs: [u16; 32]) -> [f32; 16] {
        std::array::from_fn(|i| f32::from_bits(u32::from(pairs[2 * i]) | u32::from(pairs[2 * i + 1]) << 16))
    }

    #[inline(always)]
    unsafe fn base(base: u16) -> [u16; 32] {
        [base; 32]
    }

    #[inline(always)]
    unsafe fn decode(step: *const [u8; STEP_BYTES], half: usize, base: [u16; 32]) -> [u16; 32] {
        // SAFETY: valid for a step.
        let step = unsafe { &*step };
        std::array::from_fn(|i| twelve_bits::decode(step, half, i, base[i]))
    }

    #[inline(always)]
    unsafe fn splat_pair(from: *const u16) -> [u16; 32] {
        // SAFETY: valid for two elements.
        let pair = unsafe { from.cast::<[u16; 2]>().read_unaligned() };
        std::array::from_fn(|i| pair[i % 2])
    }

    #[inline(always)]
    unsafe fn widen_pairs(pairs: [u16; 32]) -> [[f32; 16]; 2] {
        [0, 1].map(|odd| std::array::from_fn(|i| widen_bf16(pairs[2 * i + odd])))
    }

    #[inline(always)]
    unsafe fn dot_pairs(a: [u16; 32], b: [u16; 32], c: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| {
            let odd = widen_bf16(a[2 * i + 1]).mul_add(widen_bf16(b[2 * i + 1]), c[i]);
            widen_bf16(a[2 * i]).mul_add(widen_bf16(b[2 * i]), odd)
        })
    }

    #[inline(never)]
    unsafe fn call<K: Kernel>(kernel: K) {
        // SAFETY: portable code needs no feature.
        unsafe { kernel.run::<Self>() }
    }
}

/// The value of a bf16.
#[inline(always)]
pub(super) fn widen_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The bf16 nearest to `value`, ties to even; NaN stays NaN. Free of branches, so that loops over it are vectorised.
#[inline(always)]
pub(super) fn round_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet_nan = (bits >> 16) | 0x40;
    (if value.is_nan() { quiet_nan } else { rounded }) as u16
}
