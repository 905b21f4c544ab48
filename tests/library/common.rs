//! What the integration tests share: values whose reduction is known, and ranks as threads or processes.

use std::fmt::Debug;

use half::{bf16, f16};
use tensorwire::{Communicator, Element, Options};

/// An element type with conversions, for making and checking values.
pub(crate) trait Value: Element + PartialEq + Debug {
    fn of(x: f32) -> Self;
    fn to_f32(self) -> f32;
}

impl Value for f32 {
    fn of(x: f32) -> f32 {
        x
    }
    fn to_f32(self) -> f32 {
        self
    }
}

impl Value for f16 {
    fn of(x: f32) -> f16 {
        f16::from_f32(x)
    }
    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

impl Value for bf16 {
    fn of(x: f32) -> bf16 {
        bf16::from_f32(x)
    }
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

/// Rank `rank`'s element `i`: fractions that don't add up exactly, so that the order of the sum shows.
pub(crate) fn value(rank: usize, i: usize) -> f32 {
    let h = (i as u32).wrapping_mul(0x9E37_79B9) ^ (rank as u32 + 1).wrapping_mul(0x85EB_CA6B);
    let h = (h ^ (h >> 15)).wrapping_mul(0x2C1B_3C6D);
    (h >> 8) as f32 / (1 << 22) as f32 - 2.0
}

pub(crate) fn buffer<T: Value>(rank: usize, len: usize) -> Vec<T> {
    (0..len).map(|i| T::of(value(rank, i))).collect()
}

/// Runs `body` once a rank, each in a thread of its own.
pub(crate) fn threads(world: usize, options: &Options, body: impl Fn(Communicator) + Sync) {
    std::thread::scope(|s| {
        let body = &body;
        let ranks: Vec<_> = Communicator::in_process_with(world, options)
            .unwrap()
            .into_iter()
            .map(|comm| s.spawn(move || body(comm)))
            .collect();
        for rank in ranks {
            rank.join().unwrap();
        }
    });
}
