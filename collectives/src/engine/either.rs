//! The engine of a communicator, whichever carries it.

use super::Engine;
#[cfg(feature = "tcp")]
use super::net::NetEngine;

/// A group's engine.
#[derive(Debug)]
#[cfg_attr(
    feature = "tcp",
    expect(clippy::large_enum_variant, reason = "a call in shared memory is too short for an indirection")
)]
pub(crate) enum Either {
    /// Over shared memory.
    Shm(Engine),
    /// Over TCP.
    #[cfg(feature = "tcp")]
    Tcp(Box<NetEngine>),
}

/// Evaluates an expression for whichever engine there is: both have the same collectives. The expression is compiled
/// for each, so that shared memory pays one branch a call.
macro_rules! with_engine {
    ($either:expr, |$engine:ident| $body:expr) => {
        match &mut $either {
            $crate::engine::Either::Shm($engine) => $body,
            #[cfg(feature = "tcp")]
            $crate::engine::Either::Tcp($engine) => $body,
        }
    };
}
pub(crate) use with_engine;
