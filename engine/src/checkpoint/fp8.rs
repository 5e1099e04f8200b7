//! Eight-bit floats E4M3 as PyTorch's `float8_e4m3fn` and NVIDIA's hardware have them: bias 7, no infinities, one NaN of each sign.
//! Source: Micikevicius et al., "FP8 formats for deep learning", 2022, table 1.

const MANTISSA_BITS: u32 = 3;
const BIAS: i32 = 7;

/// The values of all 256 codes times `scale`.
pub(super) fn scaled(scale: f32) -> [f32; 256] {
    std::array::from_fn(|code| decode(code as u8) * scale)
}

fn decode(code: u8) -> f32 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from(code >> MANTISSA_BITS & 0xf);
    let mantissa = f32::from(code & 0x7);
    sign * match (exponent, code & 0x7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 8.0 * 2.0_f32.powi(1 - BIAS),
        _ => (1.0 + mantissa / 8.0) * 2.0_f32.powi(exponent - BIAS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_the_paper() {
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 0.001_953_125),
            (0x07, 0.013_671_875),
            (0x08, 0.015_625),
            (0x38, 1.0),
            (0x39, 1.125),
            (0x7e, 448.0),
            (0xfe, -448.0),
            (0xb8, -1.0),
        ] {
            assert_eq!(decode(code), value, "{code:#x}");
        }
        assert!(decode(0x7f).is_nan() && decode(0xff).is_nan());
        assert!((0..=255).filter(|code| decode(*code).is_nan()).count() == 2);
        assert_eq!(scaled(2.0)[0x38], 2.0);
    }
}
