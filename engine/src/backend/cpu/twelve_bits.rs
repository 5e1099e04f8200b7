//! bf16 weights in twelve bits, without loss.
//!
//! The exponents of a weight matrix are few: sixteen neighbouring ones cover all but about one in ten thousand weights. So a weight is stored as
//! its sign and mantissa and as four bits that say how far its exponent is above the matrix's lowest. A step of a panel (64 weights) in which any has
//! another exponent is kept as it is, beside the others. One row then reads three quarters of the memory, for some seven instructions
//! a step, most of which any unit can do beside the products, and multiplies the very same numbers.

use super::matrix::PANEL;

/// Bytes of an encoded step of a panel. First 16 bits for each weight of the first half, which is the first sixteen rows' pairs, in their places in a
/// bf16: sign, four bits of another, exponent, mantissa. Then a byte for each weight of the second half: sign and mantissa. The other bits are
/// the second half's exponents.
pub(super) const STEP_BYTES: usize = 96;
/// Weights of one half of a step.
const HALF: usize = PANEL;
const SIGN_AND_MANTISSA: u16 = 0x807f;
const MANTISSA_BITS: u32 = 7;
/// Places of a code: as the exponent's lowest bits.
pub(super) const CODE: u16 = 0x0780;
/// All bits of an encoded weight.
pub(super) const TWELVE_BITS: u16 = SIGN_AND_MANTISSA | CODE;
/// By so many bits the second half's codes are above their places.
pub(super) const CODE_SHIFT: u32 = 4;

/// The sixteen exponents of a matrix, by the lowest.
#[derive(Clone, Copy)]
pub(super) struct Exponents {
    lowest: u16,
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
        for (candidate, counts) in counts.windows(16).enumerate() {
            let sum: u32 = counts.iter().sum();
            if sum > best {
                (best, lowest) = (sum, candidate as u16);
            }
        }
        let missing = if total == 0 { 0.0 } else { f64::from(total - best) / f64::from(total) };
        (Self { lowest }, missing)
    }

    /// What makes a bf16 of a weight's twelve bits when it is added.
    pub(super) fn base(self) -> u16 {
        self.lowest << MANTISSA_BITS
    }

    /// Encodes a step, [PANEL] words of two bf16 each; false, and nothing of worth in `to`, if it has other exponents.
    #[inline(always)]
    pub(super) fn encode(self, words: &[u32; PANEL], to: &mut [u8; STEP_BYTES]) -> bool {
        let (first, second) = bytemuck::cast_slice::<u32, u16>(words).split_at(HALF);
        let (firsts, seconds) = to.split_at_mut(2 * HALF);
        let mut is_other = 0;
        for i in 0..HALF {
            let (a, b) = (first[i].wrapping_sub(self.base()), second[i].wrapping_sub(self.base()));
            is_other |=
                (exponent(first[i]).wrapping_sub(self.lowest) | exponent(second[i]).wrapping_sub(self.lowest)) & !15;
            let word = a & TWELVE_BITS | (b & CODE) << CODE_SHIFT;
            firsts[2 * i..2 * i + 2].copy_from_slice(&word.to_le_bytes());
            seconds[i] = (second[i] >> 8 & 0x80 | second[i] & 0x7f) as u8;
        }
        is_other == 0
    }

    /// The word of one row of an encoded step.
    pub(super) fn word(self, step: &[u8; STEP_BYTES], row: usize) -> u32 {
        let [even, odd] = [0, 1].map(|i| decode(step, row / 16, row % 16 * 2 + i, self.base()));
        u32::from(even) | u32::from(odd) << 16
    }
}

#[inline(always)]
fn exponent(bits: u16) -> u16 {
    bits >> MANTISSA_BITS & 0xff
}

/// Weight `i` of a half of an encoded step.
#[inline(always)]
pub(super) fn decode(step: &[u8; STEP_BYTES], half: usize, i: usize, base: u16) -> u16 {
    let word = u16::from_le_bytes([step[2 * i], step[2 * i + 1]]);
    let bits = match half {
        0 => word & TWELVE_BITS,
        _ => step[2 * HALF + i] as i8 as u16 & SIGN_AND_MANTISSA | word >> CODE_SHIFT & CODE,
    };
    bits.wrapping_add(base)
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
                let base = S::base(self.panel.exponents.base());
                for (to, step) in self.to.iter_mut().zip(self.panel.codes) {
                    for half in [0, 1] {
                        S::store(to[16 * half..].as_mut_ptr().cast(), S::as_f32(S::decode(step, half, base)));
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

        assert!(is_encoded_without_loss(&[0; ROWS * COLS]));
    }

    #[test]
    fn what_has_too_many_exponents_is_kept_as_it_is() {
        let rng = &mut StdRng::seed_from_u64(13);
        let any: Vec<u16> = (0..ROWS * COLS).map(|_| rng.random()).collect();
        assert!(!is_encoded_without_loss(&any));
        let pruned: Vec<u16> = (0..ROWS * COLS).map(|i| if i % 2 == 0 { 0 } else { about_normal(rng) }).collect();
        assert!(!is_encoded_without_loss(&pruned));
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
