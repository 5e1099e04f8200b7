//! Operations on single rows, which the compiler vectorises by itself: LayerNorm, sums, rounding, and rotary position embedding.

use super::attention::Layout;
use super::gemm::Output;
use super::product::{Cached, Element};
use super::simd::{Kernel, Simd};
use crate::backend::HeadShape;

/// 1 + γ and β, each [hidden], in f32.
pub struct Norm {
    pub(super) scale: Vec<f32>,
    pub(super) shift: Vec<f32>,
}

/// out = (x − mean) / sqrt(var + eps) · scale + shift. Sums are taken in f64, by eight lanes.
pub(super) struct LayerNorm<'a> {
    pub(super) x: &'a [f32],
    pub(super) norm: &'a Norm,
    pub(super) eps: f32,
    pub(super) out: &'a mut [f32],
}

impl Kernel for LayerNorm<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, norm, eps, out } = self;
        let len = x.len() as f64;
        let mean = sum(x, 0.0, false) / len;
        let variance = sum(x, mean, true) / len;
        let inverse = 1.0 / (variance + f64::from(eps)).sqrt();
        for (((out, x), scale), shift) in out.iter_mut().zip(x).zip(&norm.scale).zip(&norm.shift) {
            let normal = ((f64::from(*x) - mean) * inverse) as f32;
            *out = normal * scale + shift;
        }
    }
}

/// The sum of x − mean, or of its squares.
#[inline(always)]
fn sum(x: &[f32], mean: f64, squares: bool) -> f64 {
    let (chunks, rest) = x.as_chunks::<8>();
    let mut lanes = [0.0; 8];
    for chunk in chunks {
        for i in 0..8 {
            let distance = f64::from(chunk[i]) - mean;
            lanes[i] += if squares { distance * distance } else { distance };
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        let distance = f64::from(*x) - mean;
        *lane += if squares { distance * distance } else { distance };
    }
    lanes.iter().sum()
}

/// x += y.
pub(super) struct Add<'a> {
    pub(super) x: &'a mut [f32],
    pub(super) y: &'a [f32],
}

impl Kernel for Add<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (x, y) in self.x.iter_mut().zip(self.y) {
            *x += y;
        }
    }
}

/// Copies a row into operands of a product, and zeros behind it.
pub(super) struct Round<'a, X> {
    pub(super) x: &'a [f32],
    pub(super) out: &'a mut [X],
}

impl<X: Element> Kernel for Round<'_, X> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (out, padding) = self.out.split_at_mut(self.x.len());
        for (out, x) in out.iter_mut().zip(self.x) {
            *out = X::from_f32(*x);
        }
        padding.fill(X::from_f32(0.0));
    }
}

/// Turns a token's q and k and stores its k and v in the cache.
pub(super) struct Append<'a, E> {
    pub(super) table: &'a RopeTable,
    pub(super) shape: &'a HeadShape,
    pub(super) position: usize,
    /// q, k and v.
    pub(super) qkv: &'a mut [f32],
    pub(super) layout: Layout,
    pub(super) page: usize,
    pub(super) slot: usize,
    /// See `attention::Cache`; nobody else uses this position.
    pub(super) keys: Output<'a, E>,
    pub(super) values: Output<'a, E>,
}

impl<E: Cached> Kernel for Append<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let HeadShape { heads, kv_heads, head_dim, .. } = *self.shape;
        let (qk, v) = self.qkv.split_at_mut((heads + kv_heads) * head_dim);
        for head in qk.chunks_exact_mut(head_dim) {
            self.table.rotate(self.position, head);
        }
        for (head, k) in qk[heads * head_dim..].chunks_exact(head_dim).enumerate() {
            let first = self.layout.key(self.page, head, self.slot);
            for (d, k) in k.iter().enumerate() {
                // SAFETY: nobody else uses this position.
                unsafe { self.keys.write(first + d * self.layout.slots(), E::from_f32(*k)) }
            }
        }
        for (head, v) in v.chunks_exact(head_dim).enumerate() {
            // SAFETY: as above.
            let to = unsafe { self.values.slice(self.layout.value(self.page, head, self.slot), head_dim) };
            for (to, v) in to.iter_mut().zip(v) {
                *to = E::from_f32(*v);
            }
        }
    }
}

/// Cosines and sines of all angles up to some position.
#[derive(Default)]
pub(super) struct RopeTable {
    rotary_dim: usize,
    theta: f64,
    /// [positions, rotary_dim]: rotary_dim/2 cosines, then as many sines.
    values: Vec<f32>,
}

impl RopeTable {
    /// Makes the table hold the first `positions` positions. It grows by doubling, so that decoding seldom waits for it.
    pub(super) fn grow(&mut self, positions: usize, shape: &HeadShape) {
        if (self.rotary_dim, self.theta) != (shape.rotary_dim, shape.rope_theta) {
            *self = Self { rotary_dim: shape.rotary_dim, theta: shape.rope_theta, values: Vec::new() };
        }
        let dim = self.rotary_dim;
        if positions * dim <= self.values.len() {
            return;
        }
        for position in self.values.len() / dim..positions.next_power_of_two() {
            let angle = |i: usize| position as f64 * self.theta.powf(-2.0 * i as f64 / dim as f64);
            self.values.extend((0..dim / 2).map(|i| angle(i).cos() as f32));
            self.values.extend((0..dim / 2).map(|i| angle(i).sin() as f32));
        }
    }

    /// Turns the first elements of a head at `position`, which the table reaches.
    #[inline(always)]
    pub(super) fn rotate(&self, position: usize, head: &mut [f32]) {
        let (cos, sin) = self.values[position * self.rotary_dim..][..self.rotary_dim].split_at(self.rotary_dim / 2);
        let (first, second) = head[..self.rotary_dim].split_at_mut(self.rotary_dim / 2);
        for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}
