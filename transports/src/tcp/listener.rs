//! Where peers come in, and the way out to theirs: a TCP port, or a UDP port for QUIC.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::PollFlags;
use tensorwire_core::Result;

use super::TcpOptions;
use super::interface::Chosen;
use super::quic::Port;
use super::secret::Secret;
use super::socket::{self, Wake};
use super::stream::{Identity, Stream};

#[derive(Clone, Debug)]
pub(crate) enum Listener {
    Tcp(Arc<TcpListener>),
    Quic(Arc<Port>),
}

impl Listener {
    /// Listens as the options say; the inner result is the system's.
    pub(super) fn open(
        chosen: &Chosen,
        secret: &Secret,
        options: &TcpOptions,
    ) -> Result<io::Result<Listener>> {
        Ok(match options.quic {
            None => socket::listen(chosen.ip, options.ports.clone(), options).map(Listener::from),
            Some(congestion) => {
                Port::open(chosen.ip, secret, congestion, options)?.map(|p| Listener::Quic(p.into()))
            }
        })
    }

    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        match self {
            Listener::Tcp(listener) => listener.local_addr(),
            Listener::Quic(port) => Ok(port.address()),
        }
    }

    /// What wakes the thread that makes connections.
    pub(super) fn wake(&self) -> io::Result<Arc<Wake>> {
        match self {
            Listener::Tcp(_) => Ok(Arc::new(Wake::new()?)),
            Listener::Quic(port) => Ok(port.wake().clone()),
        }
    }

    /// What that thread polls for here, and until when at most; `seen` is kept for the next time.
    pub(super) fn watch(&self, seen: &mut u64) -> (PollFlags, Option<Instant>) {
        match self {
            Listener::Tcp(_) => (PollFlags::IN, None),
            Listener::Quic(port) => port.watch(seen),
        }
    }

    /// What there is to do between two polls, whatever has come.
    pub(super) fn turn(&self) {
        if let Listener::Quic(port) = self {
            port.turn();
        }
    }

    /// What somebody has opened; `WouldBlock` if nobody has.
    pub(super) fn accept(&self, secret: &Secret) -> io::Result<Stream> {
        match self {
            Listener::Tcp(listener) => {
                let (socket, _) = listener.accept()?;
                Stream::accepted(socket, secret).map_err(|_| io::ErrorKind::ConnectionAborted.into())
            }
            Listener::Quic(port) => {
                port.accept().map(Stream::Quic).ok_or_else(|| io::ErrorKind::WouldBlock.into())
            }
        }
    }

    /// Begins to connect to `peer` at `to`.
    pub(super) fn dial(
        &self,
        to: SocketAddr,
        peer: Identity,
        secret: &Secret,
        options: &TcpOptions,
    ) -> io::Result<Stream> {
        match self {
            Listener::Tcp(_) => Stream::dialled(socket::begin_connect(to, options)?, secret, peer),
            Listener::Quic(port) => port.dial(to, peer).map(Stream::Quic),
        }
    }

    /// The last that is done with it.
    pub(super) fn close(&self) {
        if let Listener::Quic(port) = self {
            port.close();
        }
    }
}

impl From<TcpListener> for Listener {
    fn from(listener: TcpListener) -> Listener {
        Listener::Tcp(Arc::new(listener))
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Tcp(listener) => listener.as_fd(),
            Listener::Quic(port) => port.as_fd(),
        }
    }
}
