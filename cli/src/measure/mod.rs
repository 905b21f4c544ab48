//! Measurements of this machine that a prediction is fitted to or compared with.

pub(crate) mod calls;
mod distance;
pub(crate) mod layers;
mod memory;

use tensorwire::topology::table::one_distance;

use crate::failure::Failure;

pub(crate) use distance::distance;
pub(crate) use memory::{Neighbour, readings};

/// What was measured, and how far apart the processors were.
pub(crate) struct Stint<T> {
    /// In nanoseconds; nothing where there is one processor, or where they were moved.
    pub(crate) distance_ns: Option<u32>,
    /// Whether the distance changed meanwhile: then this is neither of one distance nor of the other.
    pub(crate) moved: bool,
    pub(crate) found: T,
}

/// Measures between two looks at the distance of the processors.
pub(crate) fn stint<T>(measure: impl FnOnce() -> Result<T, Failure>) -> Result<Stint<T>, Failure> {
    let before = distance();
    let found = measure()?;
    let agreed = one_distance(&[before, distance()]);
    Ok(Stint { distance_ns: agreed.flatten(), moved: agreed.is_none(), found })
}
