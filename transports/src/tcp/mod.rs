//! Groups of ranks on any hosts, over TCP.
//!
//! A rank listens at one port, and is connected to a peer when one of the two first sends to the other. Both sides
//! of a connection prove that they know the job's [`Secret`] without sending it (see `hello`); who doesn't, or says
//! something else, or nothing, is dropped and disturbs nobody. What is sent over a connection is encrypted and
//! authenticated only over TLS ([`Secret::with_tls`](Secret#method.with_tls), with the feature `tls`) and over QUIC
//! ([`TcpOptions::quic`], with the feature `quic`), where streams of QUIC take the place of TCP's connections.
//!
//! Data moves on the thread that makes the call, straight between its buffers and non-blocking sockets. Each piece
//! has a 64-byte header with the sender's call, so that ranks whose calls differ learn both. A peer that is gone is
//! noticed by the end of its connection, one whose host was cut off by its silence, one that doesn't come by the
//! timeout; whoever notices tells all others.
//!
//! A peer takes at most 1 MiB in a job of more than [`TcpOptions::FEW`] ranks: 752 KiB that the kernel may hold for its
//! connection ([`TcpOptions::send_buffer`], [`TcpOptions::receive_buffer`]), 16 KiB that are read ahead, and two pieces of
//! 128 KiB that wait to be reduced. With few ranks it may take 2.5 MiB of the kernel's, and two larger pieces. TLS takes up
//! to 160 KiB more: 64 KiB read ahead, 64 KiB encrypted ahead, and what it decrypts at once.
//! Messages between two ranks have a connection of their own. Over QUIC, a peer takes less, and the port some: see `quic`.

mod endpoint;
mod form;
mod frame;
mod group;
mod hello;
mod interface;
mod link;
mod listener;
mod memory;
mod mesh;
mod negotiate;
mod options;
#[cfg_attr(not(feature = "quic"), path = "no_quic.rs")]
mod quic;
mod secret;
mod shared;
mod socket;
mod stream;
mod survivors;
#[cfg_attr(not(feature = "tls"), path = "no_tls.rs")]
mod tls;

use std::net::SocketAddr;

use tensorwire_core::{Deadline, Error, Result};

use crate::launch::{Env, Master, Rendezvous};
use crate::store::{Store, TcpStore, UnixStore};

pub use form::join;
#[cfg(feature = "mpi")]
pub(crate) use frame::{HEADER, Header, Kind};
pub use group::{TcpGroup, TcpHandle, UNDER_WAY};
pub use interface::{Interface, address_towards};
pub use memory::{Calls, Memory, Place, Span};
pub use options::{Congestion, TcpOptions};
pub use secret::{SECRET_FILE_VAR, SECRET_VAR, Secret};
#[cfg(feature = "tls")]
pub use tls::{Authority, Certificate, TLS_CA_VAR, TLS_CERT_VAR, TLS_KEY_VAR, Tls};

/// The address at which to serve other hosts, of which nothing is known.
#[cfg(feature = "mpi")]
pub(crate) fn address_outward(wanted: Option<&Interface>) -> Result<std::net::IpAddr> {
    interface::choose(wanted, interface::outward()).map(|chosen| chosen.ip)
}

/// What the store over TCP is made of.
pub(crate) mod store {
    pub(crate) use super::endpoint::Endpoint;
    pub(crate) use super::hello::{Channel, Hello, Status};
    pub(crate) use super::interface::outward;
    pub(crate) use super::negotiate::{Arrival, Dial, Refusal};
    pub(crate) use super::socket::listen;
    pub(crate) use super::stream::{Identity, Stream};
}

/// The store in which the ranks of a job meet, and what leads to the other ranks, if they may be on other hosts. Where the
/// environment names no store, rank 0 serves one on the host that the launcher says it is on, or, without that, for ranks
/// on its own host.
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
    let over_unix = |store: UnixStore| {
        store.enter(rank, world, deadline)?;
        Ok((Box::new(store) as Box<dyn Store + Sync>, None))
    };
    match (&env.rendezvous, &env.master) {
        (Rendezvous::Store(address), _) if address.starts_with("tcp:") => {
            TcpStore::meet(address, rank, world, secret, deadline).map(over_tcp)
        }
        (Rendezvous::Store(address), _) if address.starts_with("file:") => {
            Ok((crate::store::meet(env, deadline)?, interface::outward()))
        }
        (Rendezvous::Store(address), _) => over_unix(UnixStore::connect(address, deadline)?),
        (Rendezvous::Job(job), Some(Master { host, port })) => {
            TcpStore::of_job(job, host, *port, rank, world, secret, deadline).map(over_tcp)
        }
        (Rendezvous::Job(_), None) if env.local_world.is_some_and(|here| here < world) => {
            Err(Error::Config(format!(
                "{} started {} of {world} ranks on this host and doesn't say where rank 0 is: give all ranks MASTER_ADDR, \
                 the name of the first host (mpirun -x MASTER_ADDR=...)",
                env.source,
                env.local_world.unwrap_or_default()
            )))
        }
        (Rendezvous::Job(job), None) => over_unix(UnixStore::of_job(job, rank, deadline)?),
    }
}

/// For fuzzing: any bytes are a message of the handshake or refused, and none is a proof by chance.
pub(crate) fn fuzz_handshake(bytes: &[u8]) {
    if let Ok(hello) = hello::Hello::parse(bytes) {
        assert_eq!(hello.bytes(), bytes);
    }
    let _ = (hello::check_challenge(bytes), hello::may_be_hello(bytes));
    let (secret, ours) = (Secret::generate().expect("the system has random numbers"), [0; hello::HELLO]);
    assert!(!hello::check_proof(&secret, &ours, &[], bytes));
    assert_eq!(hello::check_answer(&secret, &ours, &[], bytes), None);
}

/// For fuzzing: any bytes are a header, which says the same when it is written again, or none.
pub(crate) fn fuzz_frame(bytes: &[u8]) {
    if let Some(header) = frame::Header::parse(bytes) {
        assert_eq!(header.bytes(), bytes[..frame::HEADER]);
        let _ = header.call();
    }
    for checksum in [false, true] {
        let _ = frame::parted(bytes, checksum);
    }
}
