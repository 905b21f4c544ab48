//! The conversions of every instruction set beside the portable ones, bit for bit.

use float8::{F8E4M3, F8E5M2};
use half::{bf16, f16};

use super::super::Kernels;
use super::super::convert::BLOCK;
use super::super::number::Number;
use super::*;

/// `$check::<Set, Type>()` for every type that has conversions, of every instruction set that this processor has.
macro_rules! every_conversion {
    ($check:ident) => {
        for kernels in Kernels::available() {
            match kernels.name() {
                "avx2" => every_conversion!($check, Avx2),
                "avx512" => every_conversion!($check, Avx512),
                _ => {}
            }
        }
    };
    ($check:ident, $set:ty) => {{
        $check::<$set, f16>();
        $check::<$set, bf16>();
        $check::<$set, F8E4M3>();
        $check::<$set, F8E5M2>();
    }};
}

fn load<S: Convert<T>, T: Number<Wide = f32>>(x: &[T; BLOCK]) -> [f32; BLOCK] {
    // SAFETY: (1) the array is a block; (2) `every_conversion` takes sets that are available.
    let lanes = unsafe { S::load(x.as_ptr()) };
    std::array::from_fn(|j| lanes[S::LANES[j]])
}

fn store<S: Convert<T>, T: Number<Wide = f32>>(x: &[f32; BLOCK]) -> [T; BLOCK] {
    let (mut lanes, mut narrow) = ([0.0; BLOCK], [T::zeroed(); BLOCK]);
    for (x, lane) in x.iter().zip(S::LANES) {
        lanes[lane] = *x;
    }
    // SAFETY: as above.
    unsafe { S::store(narrow.as_mut_ptr(), lanes) };
    narrow
}

fn bits<T: Number>(x: T) -> u32 {
    let mut word = [0; 4];
    word[..size_of::<T>()].copy_from_slice(bytemuck::bytes_of(&x));
    u32::from_le_bytes(word)
}

fn of_bits<T: Number>(bits: u32) -> T {
    bytemuck::pod_read_unaligned(&bits.to_le_bytes()[..size_of::<T>()])
}

fn widens_every_element<S: Convert<T>, T: Number<Wide = f32>>() {
    for first in (0..1u32 << (8 * size_of::<T>())).step_by(BLOCK) {
        let block: [T; BLOCK] = std::array::from_fn(|j| of_bits(first + j as u32));
        for (x, wide) in block.into_iter().zip(load::<S, T>(&block)) {
            let right = x.widen();
            assert!(
                wide.to_bits() == right.to_bits() || wide.is_nan() && right.is_nan(),
                "{:#x}: {wide} is not {right}",
                bits(x)
            );
        }
    }
}

#[test]
fn every_element_is_widened_alike() {
    every_conversion!(widens_every_element);
}

fn narrows<S: Convert<T>, T: Number<Wide = f32>>(x: &[f32]) {
    for chunk in x.chunks(BLOCK) {
        let mut block = [0.0; BLOCK];
        block[..chunk.len()].copy_from_slice(chunk);
        for (x, narrow) in block.into_iter().zip(store::<S, T>(&block)) {
            let right = bits(T::narrow(x));
            assert_eq!(bits(narrow), right, "{x} ({:#x})", x.to_bits());
        }
    }
}

/// Every element's value, the middle between it and the next, and what lies a little beside each, in steps of one place.
fn narrows_around_every_element<S: Convert<T>, T: Number<Wide = f32>>() {
    let mut x = Vec::new();
    for element in 0..1u32 << (8 * size_of::<T>()) {
        let (this, next) =
            (of_bits::<T>(element).widen().to_bits(), of_bits::<T>(element + 1).widen().to_bits());
        let middle = this.wrapping_add(next.wrapping_sub(this) / 2);
        for bits in [this, middle] {
            x.extend((0..5).map(|i| f32::from_bits(bits.wrapping_add(i).wrapping_sub(2))));
        }
    }
    narrows::<S, T>(&x);
}

#[test]
fn what_is_near_an_element_or_between_two_is_narrowed_alike() {
    every_conversion!(narrows_around_every_element);
}

/// Both signs, all exponents, and mantissas that are dense in the places that decide and sparse in the others.
fn narrows_a_sample_of_everything<S: Convert<T>, T: Number<Wide = f32>>() {
    let mut x = Vec::new();
    for upper in 0..1u32 << 14 {
        for lower in [0, 1, 0x1_0000, 0x1_ffff, 0x2_0000, 0x2_0001, 0x3_0f0f, 0x3_ffff] {
            x.push(f32::from_bits(upper << 18 | lower));
        }
    }
    narrows::<S, T>(&x);
}

#[test]
fn a_sample_of_everything_is_narrowed_alike() {
    every_conversion!(narrows_a_sample_of_everything);
}
