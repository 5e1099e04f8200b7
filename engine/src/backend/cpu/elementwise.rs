//! Operations on single rows: LayerNorm and rotary position embedding.

use crate::backend::HeadShape;

/// 1 + γ and β, each [hidden], in f32.
pub struct Norm {
    pub(super) scale: Vec<f32>,
    pub(super) shift: Vec<f32>,
}

/// out = (x − mean) / sqrt(var + eps) · scale + shift. Sums are taken in f64, by eight lanes.
pub(super) fn layer_norm(x: &[f32], norm: &Norm, eps: f32, out: &mut [f32]) {
    let len = x.len() as f64;
    let mean = sum(x, f64::from) / len;
    let variance = sum(x, |x| (f64::from(x) - mean) * (f64::from(x) - mean)) / len;
    let inverse = 1.0 / (variance + f64::from(eps)).sqrt();
    for (((out, x), scale), shift) in out.iter_mut().zip(x).zip(&norm.scale).zip(&norm.shift) {
        let normal = ((f64::from(*x) - mean) * inverse) as f32;
        *out = normal * scale + shift;
    }
}

fn sum(x: &[f32], term: impl Fn(f32) -> f64) -> f64 {
    let (chunks, rest) = x.as_chunks::<8>();
    let mut lanes = [0.0; 8];
    for chunk in chunks {
        for i in 0..8 {
            lanes[i] += term(chunk[i]);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += term(*x);
    }
    lanes.iter().sum()
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
    pub(super) fn rotate(&self, position: usize, head: &mut [f32]) {
        let (cos, sin) = self.values[position * self.rotary_dim..][..self.rotary_dim].split_at(self.rotary_dim / 2);
        let (first, second) = head[..self.rotary_dim].split_at_mut(self.rotary_dim / 2);
        for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}
