//! Measurements of this machine that a prediction is fitted to or compared with.

pub(crate) mod calls;
mod distance;
pub(crate) mod layers;
mod memory;

use tensorwire::topology::table::one_distance;

use crate::failure::Failure;

pub(crate) use distance::distance;
pub(crate) use memory::{Neighbour, readings};

/// What was measured while the processors stayed where they were.
pub(crate) struct Stint<T> {
    /// Their distance in nanoseconds; nothing where there is one processor.
    pub(crate) distance_ns: Option<u32>,
    pub(crate) found: T,
}

/// Measures between two looks at the distance of the processors; nothing where it changed meanwhile: what was measured is
/// then neither of one distance nor of the other.
pub(crate) fn stint<T>(measure: impl FnOnce() -> Result<T, Failure>) -> Result<Option<Stint<T>>, Failure> {
    let before = distance();
    let found = measure()?;
    let agreed = one_distance(&[before, distance()]);
    Ok(agreed.map(|distance_ns| Stint { distance_ns, found }))
}
