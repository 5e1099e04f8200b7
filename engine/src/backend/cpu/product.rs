//! How operands are stored and multiplied.

use half::f16;

use super::simd::{Simd, round_bf16};

/// A stored activation: f32, a bf16 as its bits, or f16.
pub(super) trait Element: bytemuck::Pod + Send + Sync {
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for u16 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        round_bf16(value)
    }
}

impl Element for f16 {
    /// What is too large becomes the largest number. Free of branches, as loops over it are to be vectorised: numbers whose f16 is normal are rounded
    /// as integers, smaller ones by an addition that leaves them in the low bits.
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        const LARGEST: u32 = 0x477f_e000;
        const SMALLEST_NORMAL: u32 = 0x3880_0000;
        let sign = (value.to_bits() >> 16) as u16 & 0x8000;
        let magnitude = value.abs();
        let bits = magnitude.to_bits();
        let normal = (bits.min(LARGEST).wrapping_add(0xfff + (bits >> 13 & 1)) >> 13).wrapping_sub(112 << 10);
        let subnormal = (magnitude + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
        let rounded = if bits < SMALLEST_NORMAL { subnormal } else { normal };
        Self::from_bits(sign | (if value.is_nan() { 0x7e00 } else { rounded as u16 }))
    }
}

/// An element of the KV cache.
pub(super) trait Cached: Element {
    /// 16 elements as f32.
    ///
    /// # Safety
    /// As [`Simd`].
    unsafe fn load<S: Simd>(from: *const Self) -> S::F32;
}

impl Cached for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::F32 {
        // SAFETY: by this method's contract.
        unsafe { S::load(from) }
    }
}

impl Cached for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::F32 {
        // SAFETY: by this method's contract.
        unsafe { S::load_f16(from) }
    }
}

/// One step of sixteen sums: a word of each of 16 weight rows, times what it meets of a row of x.
pub(super) trait Product: Send + Sync {
    type X: Element;
    /// Elements of x in a step.
    const STEP: usize;
    type Weights<S: Simd>: Copy;

    /// Of sixteen words.
    ///
    /// # Safety
    /// As [`Simd`].
    unsafe fn weights<S: Simd>(words: S::Pairs) -> Self::Weights<S>;
    /// # Safety
    /// As [`Simd`]; `STEP` elements can be read from `x`.
    unsafe fn mul_add<S: Simd>(x: *const Self::X, w: Self::Weights<S>, sum: S::F32) -> S::F32;
}

/// bf16 times bf16, two to a word.
pub(super) struct Bf16;

impl Product for Bf16 {
    type X = u16;
    const STEP: usize = 2;
    type Weights<S: Simd> = S::Pairs;

    #[inline(always)]
    unsafe fn weights<S: Simd>(words: S::Pairs) -> S::Pairs {
        words
    }

    #[inline(always)]
    unsafe fn mul_add<S: Simd>(x: *const u16, w: S::Pairs, sum: S::F32) -> S::F32 {
        // SAFETY: by this method's contract.
        unsafe { S::dot_pairs(S::splat_pair(x), w, sum) }
    }
}

/// f32 times bf16, two to a word.
pub(super) struct Widened;

impl Product for Widened {
    type X = f32;
    const STEP: usize = 2;
    type Weights<S: Simd> = [S::F32; 2];

    #[inline(always)]
    unsafe fn weights<S: Simd>(words: S::Pairs) -> [S::F32; 2] {
        // SAFETY: by this method's contract.
        unsafe { S::widen_pairs(words) }
    }

    #[inline(always)]
    unsafe fn mul_add<S: Simd>(x: *const f32, [even, odd]: [S::F32; 2], sum: S::F32) -> S::F32 {
        // SAFETY: by this method's contract.
        unsafe { S::mul_add(S::splat(*x.add(1)), odd, S::mul_add(S::splat(*x), even, sum)) }
    }
}

/// f32 times f32.
pub(super) struct F32;

impl Product for F32 {
    type X = f32;
    const STEP: usize = 1;
    type Weights<S: Simd> = S::F32;

    #[inline(always)]
    unsafe fn weights<S: Simd>(words: S::Pairs) -> S::F32 {
        // SAFETY: by this method's contract.
        unsafe { S::as_f32(words) }
    }

    #[inline(always)]
    unsafe fn mul_add<S: Simd>(x: *const f32, w: S::F32, sum: S::F32) -> S::F32 {
        // SAFETY: by this method's contract.
        unsafe { S::mul_add(S::splat(*x), w, sum) }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::Element;

    #[test]
    fn f16_is_rounded_to_nearest_even() {
        for bits in (0..=u32::MAX).step_by(997) {
            let value = f32::from_bits(bits);
            let expected = f16::from_f32(value.clamp(-65504.0, 65504.0));
            let actual = <f16 as Element>::from_f32(value);
            assert!(actual == expected || value.is_nan() && actual.is_nan(), "{value}: {actual} for {expected}");
        }
    }
}
