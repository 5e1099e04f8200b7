//! bf16 weights in twelve bits, without loss.
//!
//! The exponents of a weight matrix are few: sixteen neighbouring ones cover all but about one in ten thousand weights. So a weight is stored as
//! a byte with its sign and mantissa and as four bits that say which of the matrix's sixteen exponents it has. A step of a panel (64 weights) in
//! which any has another exponent is kept as it is, beside the others. One row then reads three quarters of the memory, for some eight
//! instructions a step, and multiplies the very same numbers.

use super::matrix::PANEL;

/// Bytes of an encoded step of a panel: sign and mantissa of each of the first sixteen rows' pairs, those of the last sixteen's, and a byte for each
/// of these positions with the code of the first half's exponent in its low bits and of the second's in its high ones.
pub(super) const STEP_BYTES: usize = 96;
/// Weights of one half of a step.
const HALF: usize = PANEL;
/// Of a bf16.
pub(super) const SIGN_AND_MANTISSA: u16 = 0x807f;
const MANTISSA_BITS: u32 = 7;

/// The sixteen exponents of a matrix.
#[derive(Clone)]
#[repr(align(64))]
pub(super) struct Exponents {
    /// By code, in their place in a bf16; twice, for look-ups with five bits.
    pub(super) by_code: [u16; 32],
    /// Code c stands for `lowest + c`, but 0 for `first`: `lowest`, or 0 where zeros are more frequent.
    lowest: u16,
    first: u16,
}

impl Exponents {
    /// Those that cover most of a sample of bf16, and the share that they do not cover.
    pub(super) fn choose(sample: impl Iterator<Item = u16>) -> (Self, f64) {
        let mut counts = [0_u32; 256];
        for bits in sample {
            counts[usize::from(exponent(bits))] += 1;
        }
        let total: u32 = counts.iter().sum();
        let (mut best, mut lowest) = (0, 0);
        for candidate in 0..=240 {
            let sum: u32 = counts[candidate + 1..candidate + 16].iter().sum::<u32>() + counts[candidate].max(counts[0]);
            if sum > best {
                (best, lowest) = (sum, candidate);
            }
        }
        let first = if counts[0] > counts[lowest] { 0 } else { lowest as u16 };
        let by_code = std::array::from_fn(|i| if i % 16 == 0 { first } else { (lowest + i % 16) as u16 });
        let by_code = by_code.map(|exponent| exponent << MANTISSA_BITS);
        let missing = if total == 0 { 0.0 } else { f64::from(total - best) / f64::from(total) };
        (Self { by_code, lowest: lowest as u16, first }, missing)
    }

    /// Encodes a step, [PANEL] words of two bf16 each; false, and nothing of worth in `to`, if it has other exponents.
    #[inline(always)]
    pub(super) fn encode(&self, words: &[u32; PANEL], to: &mut [u8; STEP_BYTES]) -> bool {
        let (low, high) = bytemuck::cast_slice::<u32, u16>(words).split_at(HALF);
        let mut is_other = 0;
        for i in 0..HALF {
            to[i] = sign_and_mantissa(low[i]);
            to[HALF + i] = sign_and_mantissa(high[i]);
            let (a, b) = (self.code(low[i]), self.code(high[i]));
            is_other |= self.is_other(low[i], a) | self.is_other(high[i], b);
            to[2 * HALF + i] = (a | b << 4) as u8;
        }
        is_other == 0
    }

    /// The word of one row of an encoded step.
    pub(super) fn word(&self, step: &[u8; STEP_BYTES], row: usize) -> u32 {
        let [even, odd] = [0, 1].map(|i| decode(step, row / 16, row % 16 * 2 + i, &self.by_code));
        u32::from(even) | u32::from(odd) << 16
    }

    #[inline(always)]
    fn code(&self, bits: u16) -> u16 {
        let exponent = exponent(bits);
        if exponent == self.first { 0 } else { exponent.wrapping_sub(self.lowest) }
    }

    /// Whether the code does not stand for the exponent.
    #[inline(always)]
    fn is_other(&self, bits: u16, code: u16) -> u16 {
        u16::from(code > 15) | (u16::from(code == 0) & u16::from(exponent(bits) != self.first))
    }
}

#[inline(always)]
fn exponent(bits: u16) -> u16 {
    bits >> MANTISSA_BITS & 0xff
}

#[inline(always)]
fn sign_and_mantissa(bits: u16) -> u8 {
    (bits >> 8 & 0x80 | bits & 0x7f) as u8
}

/// Weight `i` of a half of an encoded step.
#[inline(always)]
pub(super) fn decode(step: &[u8; STEP_BYTES], half: usize, i: usize, by_code: &[u16; 32]) -> u16 {
    let code = step[2 * HALF + i] >> (4 * half) & 15;
    step[HALF * half + i] as i8 as u16 & SIGN_AND_MANTISSA | by_code[usize::from(code)]
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::backend::ComputeType;
    use crate::backend::cpu::matrix::{Matrix, Panel};
    use crate::backend::cpu::simd::{Isa, Kernel, Simd};
    use crate::backend::cpu::threads::Pool;
    use crate::checkpoint::{Block, Dtype, Storage, Tensor};

    const ROWS: usize = 70;
    const COLS: usize = 2050;

    struct Decode<'a> {
        panel: Panel<'a>,
        /// [steps], those that are encoded.
        to: &'a mut [[u32; PANEL]],
    }

    impl Kernel for Decode<'_> {
        #[inline(always)]
        unsafe fn run<S: Simd>(self) {
            // SAFETY: the CPU has S, and both halves have 16 words.
            unsafe {
                let exponents = S::exponents(&self.panel.exponents.by_code);
                for (to, step) in self.to.iter_mut().zip(self.panel.codes) {
                    for half in [0, 1] {
                        S::store(to[16 * half..].as_mut_ptr().cast(), S::as_f32(S::decode(step, half, exponents)));
                    }
                }
            }
        }
    }

    /// Packs bf16, [ROWS, COLS], on every instruction set and compares what comes out of it; returns whether all panels were encoded.
    fn is_encoded_without_loss(values: &[u16]) -> bool {
        let storage = Storage::new(bytemuck::cast_slice::<u16, u8>(values).to_vec());
        let block = Block { storage, dtype: Dtype::Bf16, offset: 0, rows: ROWS, cols: COLS, stride: COLS };
        let (tensor, pool) = (Tensor { blocks: vec![block] }, Pool::new(2).unwrap());
        let word = |row: usize, step: usize| {
            let pair = &values[row.min(ROWS - 1) * COLS + 2 * step..][..2];
            u32::from(pair[0]) | u32::from(pair[1]) << 16
        };
        let mut encoded = Vec::new();
        for isa in Isa::available() {
            let matrix = Matrix::new(&tensor, ComputeType::F32, isa, &pool).unwrap();
            for index in 0..matrix.num_panels() {
                let panel = matrix.panel(index);
                let mut words = panel.words.to_vec();
                if !panel.codes.is_empty() {
                    words = vec![[0; PANEL]; panel.steps];
                    isa.run(Decode { panel, to: &mut words });
                    for (step, other) in panel.others.iter().zip(panel.words) {
                        words[*step as usize] = *other;
                    }
                }
                for (step, words) in words.iter().enumerate() {
                    let expected = std::array::from_fn(|row| word(index * PANEL + row, step));
                    assert_eq!(*words, expected, "{isa:?}, panel {index}, step {step}");
                }
                encoded.push(!panel.codes.is_empty());
            }
            let mut row = vec![0.0; COLS];
            for index in [0, ROWS - 1] {
                matrix.widen_row(index, &mut row);
                let bits = row.iter().map(|value| (value.to_bits() >> 16) as u16);
                assert!(bits.eq(values[index * COLS..][..COLS].iter().copied()), "{isa:?}, row {index}");
            }
        }
        assert!(encoded.iter().all(|is| *is == encoded[0]));
        encoded[0]
    }

    fn about_normal(rng: &mut StdRng) -> u16 {
        let sum: f32 = (0..4).map(|_| rng.random_range(-0.02_f32..0.02)).sum();
        (sum.to_bits() >> 16) as u16
    }

    #[test]
    fn weights_come_back_bit_for_bit() {
        let rng = &mut StdRng::seed_from_u64(12);
        let usual: Vec<u16> = (0..ROWS * COLS).map(|_| about_normal(rng)).collect();
        assert!(is_encoded_without_loss(&usual));

        let mut hostile = usual.clone();
        // NaN, infinities, subnormals, both zeros, the largest.
        for bits in [0x7fc1, 0xff81, 0x7f80, 0xff80, 0x0001, 0x807f, 0x0000, 0x8000, 0x7f7f, 0xff7f, 0x0080] {
            for _ in 0..5 {
                hostile[rng.random_range(0..ROWS * COLS)] = bits;
            }
        }
        assert!(is_encoded_without_loss(&hostile));

        let pruned: Vec<u16> =
            usual.iter().map(|bits| if rng.random_bool(0.5) { bits & 0x8000 } else { *bits }).collect();
        assert!(is_encoded_without_loss(&pruned));
        assert!(is_encoded_without_loss(&[0; ROWS * COLS]));
    }

    #[test]
    fn what_has_too_many_exponents_is_kept_as_it_is() {
        let rng = &mut StdRng::seed_from_u64(13);
        let any: Vec<u16> = (0..ROWS * COLS).map(|_| rng.random()).collect();
        assert!(!is_encoded_without_loss(&any));
        // Rows that the sample does not see.
        let mut uneven: Vec<u16> = (0..ROWS * COLS).map(|_| about_normal(rng)).collect();
        for row in (0..ROWS).filter(|row| row % 5 != 0) {
            uneven[row * COLS..][..COLS].fill_with(|| rng.random());
        }
        assert!(!is_encoded_without_loss(&uneven));
    }

    #[test]
    fn every_exponent_can_be_encoded() {
        for lowest in (0..=240_u16).step_by(40) {
            let values: Vec<u16> =
                (0..ROWS * COLS).map(|i| (lowest + i as u16 % 16) << 7 | i as u16 & SIGN_AND_MANTISSA).collect();
            assert!(is_encoded_without_loss(&values), "exponents from {lowest} on");
        }
    }
}
