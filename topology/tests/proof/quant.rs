//! Quantised weights, from nothing but what a rank has of each tensor.

use super::tensor::Tensor;

/// The `i`-th number of 4 bits of a 32-bit word.
fn nibble(word: f64, i: usize) -> f64 {
    f64::from((word as u32 >> (4 * i)) & 15)
}

/// `[output, input]` of GPTQ's words, each of eight inputs. Groups are counted from the rank's first one.
pub(crate) fn gptq(words: &Tensor, zeros: &Tensor, scales: &Tensor, group_of: &[usize]) -> Tensor {
    assert_eq!(8 * words.rows(), group_of.len(), "a group for each input");
    Tensor::matrix(words.cols(), group_of.len(), |o, i| {
        let g = group_of[i];
        let zero = nibble(zeros.at(g, o / 8), o % 8) + 1.0;
        (nibble(words.at(i / 8, o), i % 8) - zero) * scales.at(g, o)
    })
}

/// Where in its word AWQ packs each of eight outputs.
const AWQ_PLACE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// `[output, input]` of AWQ's words, each of eight outputs.
pub(crate) fn awq(words: &Tensor, zeros: &Tensor, scales: &Tensor, group: usize) -> Tensor {
    Tensor::matrix(8 * words.cols(), words.rows(), |o, i| {
        let zero = nibble(zeros.at(i / group, o / 8), AWQ_PLACE[o % 8]);
        (nibble(words.at(i, o / 8), AWQ_PLACE[o % 8]) - zero) * scales.at(i / group, o)
    })
}

/// An 8-bit float with 4 bits of exponent.
fn e4m3(code: f64) -> f64 {
    let code = code as u8;
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let size = match exponent {
        0 => mantissa / 8.0 * 2f64.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    if code & 128 == 0 { size } else { -size }
}

/// `[output, input]` of FP8 with one scale for each block.
pub(crate) fn fp8(codes: &Tensor, scales: &Tensor, block: [usize; 2]) -> Tensor {
    let blocks = [codes.rows().div_ceil(block[0]), codes.cols().div_ceil(block[1])];
    assert_eq!([scales.rows(), scales.cols()], blocks, "a scale for each block");
    Tensor::matrix(codes.rows(), codes.cols(), |o, i| {
        e4m3(codes.at(o, i)) * scales.at(o / block[0], i / block[1])
    })
}

/// `[output, input]` of MXFP4: blocks `[output, input / 32, 16]` of two 4-bit floats a byte, and for each
/// block an exponent.
pub(crate) fn mxfp4(blocks: &Tensor, exponents: &Tensor) -> Tensor {
    const VALUES: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    assert_eq!(blocks.shape[..2], exponents.shape[..], "an exponent for each block");
    Tensor::matrix(blocks.rows(), 2 * blocks.cols(), |o, i| {
        let code = (blocks.at(o, i / 2) as usize >> (4 * (i % 2))) & 15;
        let value = VALUES[code & 7] * 2f64.powi(exponents.at(o, i / 32) as i32 - 127);
        if code & 8 == 0 { value } else { -value }
    })
}
