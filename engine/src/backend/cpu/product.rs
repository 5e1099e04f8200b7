//! The two ways in which operands of matrix products are stored and multiplied.

use std::marker::PhantomData;

use super::simd::{Simd, round_bf16, widen_bf16};

/// A stored number whose value is exact in f32: f32 itself, or a bf16 as its bits.
pub(super) trait Element: bytemuck::Pod + Send + Sync {
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
    /// 16 elements as f32.
    ///
    /// # Safety
    /// As [`Simd`].
    unsafe fn load<S: Simd>(from: *const Self) -> S::F32;
}

impl Element for f32 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::F32 {
        // SAFETY: by this method's contract.
        unsafe { S::load(from) }
    }
}

impl Element for u16 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        round_bf16(value)
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        widen_bf16(self)
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::F32 {
        // SAFETY: by this method's contract.
        unsafe { S::load_bf16(from) }
    }
}

/// A vector of activations times a vector of weights.
pub(super) trait Product: Send + Sync {
    type X: Element;
    type W: Element;
    type Vector<S: Simd>: Copy;
    /// Elements of a vector: 16 or 32.
    const STEP: usize;

    /// # Safety
    /// As [`Simd`], for `STEP` elements.
    unsafe fn load_x<S: Simd>(from: *const Self::X) -> Self::Vector<S>;
    /// # Safety
    /// As [`Simd`], for `STEP` elements.
    unsafe fn load_w<S: Simd>(from: *const Self::W) -> Self::Vector<S>;
    /// # Safety
    /// As [`Simd`].
    unsafe fn mul_add<S: Simd>(x: Self::Vector<S>, w: Self::Vector<S>, sum: S::F32) -> S::F32;
}

/// bf16 times bf16.
pub(super) struct Bf16;

impl Product for Bf16 {
    type X = u16;
    type W = u16;
    type Vector<S: Simd> = S::Pairs;
    const STEP: usize = 32;

    #[inline(always)]
    unsafe fn load_x<S: Simd>(from: *const u16) -> S::Pairs {
        // SAFETY: by this method's contract.
        unsafe { S::load_pairs(from) }
    }

    #[inline(always)]
    unsafe fn load_w<S: Simd>(from: *const u16) -> S::Pairs {
        // SAFETY: by this method's contract.
        unsafe { S::load_pairs(from) }
    }

    #[inline(always)]
    unsafe fn mul_add<S: Simd>(x: S::Pairs, w: S::Pairs, sum: S::F32) -> S::F32 {
        // SAFETY: by this method's contract.
        unsafe { S::dot_pairs(x, w, sum) }
    }
}

/// f32 times weights that are f32, or bf16 and widened.
pub(super) struct F32<W>(PhantomData<W>);

impl<W: Element> Product for F32<W> {
    type X = f32;
    type W = W;
    type Vector<S: Simd> = S::F32;
    const STEP: usize = 16;

    #[inline(always)]
    unsafe fn load_x<S: Simd>(from: *const f32) -> S::F32 {
        // SAFETY: by this method's contract.
        unsafe { S::load(from) }
    }

    #[inline(always)]
    unsafe fn load_w<S: Simd>(from: *const W) -> S::F32 {
        // SAFETY: by this method's contract.
        unsafe { W::load::<S>(from) }
    }

    #[inline(always)]
    unsafe fn mul_add<S: Simd>(x: S::F32, w: S::F32, sum: S::F32) -> S::F32 {
        // SAFETY: by this method's contract.
        unsafe { S::mul_add(x, w, sum) }
    }
}
