//! Rendezvous: a small key-value store through which the ranks of a job find each other.

mod answer;
#[cfg(feature = "tcp")]
mod tcp;
mod unix;

use std::fmt;

use tensorwire_core::{Deadline, Result};

#[cfg(feature = "tcp")]
pub use tcp::{LOOPBACK, TcpStore, TcpStoreServer};
pub use unix::{StoreServer, UnixStore};

/// Keys and values that every rank of a job sees alike.
///
/// A key is set once and read by many; [`get`](Store::get) waits for it.
pub trait Store: Send + fmt::Debug {
    /// Sets `key`. Keys are at most 255 bytes, values at most 64 KiB.
    fn set(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()>;

    /// The value of `key`, once some rank has set it; an error if none has by the deadline.
    fn get(&self, key: &str, deadline: Deadline) -> Result<Vec<u8>>;

    /// Adds `delta` to the counter `key`, which starts at 0, and returns the sum.
    fn add(&self, key: &str, delta: i64, deadline: Deadline) -> Result<i64>;
}
