//! Rendezvous: a small key-value store through which the ranks of a job find each other.

mod answer;
mod file;
#[cfg(feature = "tcp")]
mod tcp;
mod unix;

use std::fmt;

use tensorwire_core::{Deadline, Error, Result};

use crate::launch::{Env, Rendezvous};

pub(crate) use answer::fuzz_requests;
pub use file::FileStore;
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

/// The store in which the ranks of a job on one host meet, or on several that share a directory.
///
/// # Errors
/// [`Error::Config`] for an address that isn't `unix:NAME` or `file:DIR`; as the stores say.
pub fn meet(env: &Env, deadline: Deadline) -> Result<Box<dyn Store + Sync>> {
    let (rank, world) = (env.rank, env.world);
    Ok(match &env.rendezvous {
        Rendezvous::Store(address) if address.starts_with("file:") => {
            Box::new(FileStore::meet(address, env.job.as_deref(), rank, world, deadline)?)
        }
        Rendezvous::Store(address) if address.starts_with("tcp:") => {
            return Err(Error::Config(format!(
                "the store address '{address}' is for ranks over TCP: set TENSORWIRE_TRANSPORT=tcp, or use unix:NAME"
            )));
        }
        Rendezvous::Store(address) => Box::new(UnixStore::connect(address, deadline)?),
        Rendezvous::Job(job) => Box::new(UnixStore::of_job(job, rank, deadline)?),
    })
}
