//! The one error type of the communication layer.

use std::io;
use std::time::Duration;

use crate::Call;

/// The result of anything that talks to peers.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, on which rank, with whom, in which call, and what to do about it.
///
/// After [`PeerLost`](Error::PeerLost), [`Timeout`](Error::Timeout), [`Mismatch`](Error::Mismatch),
/// [`Corrupted`](Error::Corrupted), [`Engine`](Error::Engine) or [`Aborted`](Error::Aborted) the communicator is poisoned: the
/// ranks no longer agree on what was done, so each further call returns [`Poisoned`](Error::Poisoned) and no result can be mistaken for data.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A peer's process died, or it left the group while this rank still needed it.
    #[error("rank {rank}: lost rank {peer} in {call} (call {seq}): {how}")]
    PeerLost {
        /// The rank that reports.
        rank: usize,
        /// The rank that is gone.
        peer: usize,
        /// The call that could not finish.
        call: Call,
        /// Its number on this communicator, from 1.
        seq: u64,
        /// How it went, for a person.
        how: String,
    },

    /// Peers are alive but did not come to this call in time.
    #[error(
        "rank {rank}: {call} (call {seq}) timed out after {after:?} waiting for rank(s) {waiting_for:?}, which are \
         stopped, slow or elsewhere (the limit is TENSORWIRE_TIMEOUT): {instead}"
    )]
    Timeout {
        /// The rank that reports.
        rank: usize,
        /// The call that could not finish.
        call: Call,
        /// Its number on this communicator, from 1.
        seq: u64,
        /// The ranks that kept it from going on: not those that waited themselves.
        waiting_for: Vec<usize>,
        /// The time allowed.
        after: Duration,
        /// What the ranks are doing, for a person.
        instead: Box<str>,
    },

    /// Two ranks made different calls at the same place in the program.
    #[error(
        "rank {rank}: call {seq} differs between ranks: rank {a} called {a_call}, rank {b} called {b_call}: \
         every rank must make the same calls in the same order"
    )]
    Mismatch {
        /// The rank that reports.
        rank: usize,
        /// The call's number on this communicator, from 1.
        seq: u64,
        /// One of the two ranks.
        a: usize,
        /// What it called.
        a_call: Box<Call>,
        /// The other rank.
        b: usize,
        /// What that one called.
        b_call: Box<Call>,
    },

    /// What one rank sent to another arrived otherwise, as its checksum shows (`TENSORWIRE_CHECKSUM`).
    #[error(
        "rank {rank}: {what} from rank {from} to rank {to} was damaged on the way, in {call} (call {seq}): look for \
         what carries or rewrites their packets"
    )]
    Corrupted {
        /// The rank that reports.
        rank: usize,
        /// The rank that sent it.
        from: usize,
        /// The rank that received it, and found out.
        to: usize,
        /// The call that could not finish.
        call: Call,
        /// Its number on this communicator, from 1.
        seq: u64,
        /// What was damaged, for a person.
        what: String,
    },

    /// A peer gave the group up and said so.
    #[error("rank {rank}: rank {by} ended the group during {call} (call {seq}): {why}")]
    Aborted {
        /// The rank that reports.
        rank: usize,
        /// The rank that ended the group.
        by: usize,
        /// The call that could not finish.
        call: Call,
        /// Its number on this communicator, from 1.
        seq: u64,
        /// Why it did.
        why: String,
    },

    /// An earlier error on this communicator makes further calls meaningless.
    #[error("rank {rank}: this communicator failed earlier and can't be used: {cause}")]
    Poisoned {
        /// The rank that reports.
        rank: usize,
        /// The first error, in words.
        cause: String,
    },

    /// Two threads of one rank called the same communicator at once.
    #[error(
        "rank {rank}: two threads called one communicator at once: give each thread its own communicator"
    )]
    ConcurrentUse {
        /// The rank that reports.
        rank: usize,
    },

    /// The caller's arguments can't be right. Nothing was sent; the communicator can still be used.
    #[error("{0}")]
    InvalidArgument(String),

    /// Rank, world or rendezvous are missing from the environment or make no sense.
    #[error("{0}")]
    Config(String),

    /// What carries out the calls (NCCL) met an error of its own. The communicator can't be used further.
    #[error("rank {rank}: {engine} failed in {call} (call {seq}): {what}")]
    Engine {
        /// The rank that reports.
        rank: usize,
        /// Whose error it is, such as `NCCL 2.27.3`.
        engine: String,
        /// The call that could not finish.
        call: Call,
        /// Its number on this communicator, from 1.
        seq: u64,
        /// The error in its own words, and what to do.
        what: String,
    },

    /// A library or a driver that is loaded at run time can't be had, or not for what was asked.
    #[error("{what} can't be used: {why}")]
    Unavailable {
        /// Such as `NCCL`.
        what: &'static str,
        /// What was looked for, where, and what came of it.
        why: String,
    },

    /// A device's driver refused.
    #[error("{device}: {what}: {why}")]
    Device {
        /// Which device.
        device: String,
        /// What was tried.
        what: &'static str,
        /// What the driver answered.
        why: String,
    },

    /// The ranks could not find each other.
    #[error("rank {rank} of {world}: {what}")]
    Rendezvous {
        /// The rank that reports.
        rank: usize,
        /// The number of ranks it expected.
        world: usize,
        /// What happened and what to do.
        what: String,
    },

    /// The operating system refused.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: String,
        /// What it answered.
        source: io::Error,
    },
}

impl Error {
    /// Whether the communicator that it came from can't be used any more.
    pub fn ends_group(&self) -> bool {
        use Error::{Aborted, Corrupted, Engine, Mismatch, PeerLost, Poisoned, Timeout};
        matches!(
            self,
            PeerLost { .. }
                | Timeout { .. }
                | Mismatch { .. }
                | Corrupted { .. }
                | Engine { .. }
                | Aborted { .. }
                | Poisoned { .. }
        )
    }

    /// An [`Error::InvalidArgument`].
    pub fn invalid(what: impl Into<String>) -> Error {
        Error::InvalidArgument(what.into())
    }

    /// An [`Error::Os`] from anything that converts to an [`io::Error`].
    pub fn os(what: impl Into<String>, source: impl Into<io::Error>) -> Error {
        Error::Os { what: what.into(), source: source.into() }
    }
}
