//! Groups of ranks on any hosts, over TCP.
//!
//! A rank listens at one port, and is connected to a peer when one of the two first sends to the other. Both sides
//! of a connection prove that they know the job's [`Secret`] without sending it (see `hello`); who doesn't, or says
//! something else, or nothing, is dropped and disturbs nobody. What is sent over a connection is neither encrypted
//! nor authenticated.
//!
//! Data moves on the thread that makes the call, straight between its buffers and non-blocking sockets. Each piece
//! has a 64-byte header with the sender's call, so that ranks whose calls differ learn both. A peer that is gone is
//! noticed by the end of its connection, one whose host was cut off by its silence, one that doesn't come by the
//! timeout; whoever notices tells all others.
//!
//! A peer takes at most 1 MiB: 752 KiB that the kernel may hold for its connection ([`TcpOptions::send_buffer`],
//! [`TcpOptions::receive_buffer`]), 16 KiB that are read ahead, and two pieces of 128 KiB that wait to be reduced.
//! Messages between two ranks have a connection of their own.

mod endpoint;
mod form;
mod frame;
mod group;
mod hello;
mod interface;
mod link;
mod memory;
mod mesh;
mod negotiate;
mod options;
mod secret;
mod shared;
mod socket;

use std::net::SocketAddr;

use tensorwire_core::{Deadline, Result};

use crate::launch::{Env, Rendezvous};
use crate::store::{Store, TcpStore, UnixStore};

pub use form::join;
pub use group::{TcpGroup, TcpHandle};
pub use interface::Interface;
pub use memory::{Memory, Place, Span};
pub use options::TcpOptions;
pub use secret::{SECRET_FILE_VAR, SECRET_VAR, Secret};

/// What the store over TCP is made of.
pub(crate) mod store {
    pub(crate) use super::endpoint::Endpoint;
    pub(crate) use super::hello::{Channel, Hello, Status};
    pub(crate) use super::negotiate::{Arrival, Dial, Refusal};
    pub(crate) use super::socket::listen;
}

/// The store in which the ranks of a job meet, and where it is on a network. Where the launcher names none, rank 0 serves
/// one at `MASTER_ADDR`, as torchrun sets it, or, without that, on its own host.
///
/// # Errors
/// [`Config`](tensorwire_core::Error::Config) or [`Rendezvous`](tensorwire_core::Error::Rendezvous), as the stores say.
pub fn meet(
    env: &Env,
    secret: &Secret,
    deadline: Deadline,
) -> Result<(Box<dyn Store + Sync>, Option<SocketAddr>)> {
    let (rank, world) = (env.rank, env.world);
    let over_tcp = |store: TcpStore| {
        let at = store.peer();
        (Box::new(store) as Box<dyn Store + Sync>, Some(at))
    };
    match &env.rendezvous {
        Rendezvous::Store(address) if address.starts_with("tcp:") => {
            TcpStore::meet(address, rank, world, secret, deadline).map(over_tcp)
        }
        Rendezvous::Store(address) => Ok((Box::new(UnixStore::connect(address, deadline)?), None)),
        Rendezvous::Job(job) => match std::env::var("MASTER_ADDR") {
            Ok(host) if !host.is_empty() => {
                TcpStore::of_job(job, &host, rank, world, secret, deadline).map(over_tcp)
            }
            _ => Ok((Box::new(UnixStore::of_job(job, rank, deadline)?), None)),
        },
    }
}
