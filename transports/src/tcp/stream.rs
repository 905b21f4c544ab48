//! A connection's bytes, as they are, over TLS or over QUIC. Nothing here blocks.

use std::io::{self, IoSlice};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};

use super::TcpOptions;
use super::quic::Lane;
use super::secret::Secret;
use super::socket::{self, Wake};
use super::tls::Session;

/// Who a certificate says that its holder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Identity {
    /// This rank of the job, not of a group of some of its ranks.
    Rank(usize),
    /// Who serves the job's store.
    Store,
    /// Whoever is of the job: for certificates alone.
    #[cfg(feature = "tls")]
    Any,
}

#[derive(Debug)]
pub(crate) enum Stream {
    Tcp(TcpStream),
    Tls(TcpStream, Box<Session>),
    Quic(Lane),
}

impl Stream {
    /// The side that dials, of a job whose secret is `secret`; over TLS, the other side must be `to`.
    pub(crate) fn dialled(socket: TcpStream, secret: &Secret, to: Identity) -> io::Result<Stream> {
        Stream::new(socket, secret.tls().map(|tls| Session::client(tls, to)))
    }

    /// The side that is dialled.
    pub(crate) fn accepted(socket: TcpStream, secret: &Secret) -> io::Result<Stream> {
        socket.set_nonblocking(true)?;
        Stream::new(socket, secret.tls().map(Session::server))
    }

    fn new(socket: TcpStream, tls: Option<io::Result<Session>>) -> io::Result<Stream> {
        Ok(match tls {
            None => Stream::Tcp(socket),
            Some(tls) => Stream::Tls(socket, Box::new(tls?)),
        })
    }

    /// The socket that is this stream's alone, if one is.
    pub(crate) fn socket(&self) -> Option<&TcpStream> {
        match self {
            Stream::Tcp(socket) | Stream::Tls(socket, _) => Some(socket),
            Stream::Quic(_) => None,
        }
    }

    pub(crate) fn is_encrypted(&self) -> bool {
        !matches!(self, Stream::Tcp(_))
    }

    /// Whether a connection that was begun has come about: asked once it is ready.
    pub(super) fn connected(&mut self) -> io::Result<bool> {
        match self {
            Stream::Tcp(socket) | Stream::Tls(socket, _) => socket::connected(socket).map(|()| true),
            Stream::Quic(lane) => lane.connected(),
        }
    }

    /// Sets what a connection between ranks needs.
    pub(super) fn tune(&self, options: &TcpOptions) -> io::Result<()> {
        self.socket().map_or(Ok(()), |socket| socket::tune(socket, options))
    }

    /// Goes on with the TLS handshake: whether there is none, or it is done.
    pub(crate) fn handshake(&mut self) -> io::Result<bool> {
        match self {
            Stream::Tls(socket, tls) => tls.handshake(socket),
            Stream::Tcp(_) | Stream::Quic(_) => Ok(true),
        }
    }

    /// What to poll for during the handshake.
    pub(crate) fn interest(&self) -> PollFlags {
        match self {
            Stream::Tls(_, tls) if tls.wants_write() => PollFlags::IN | PollFlags::OUT,
            Stream::Tcp(_) | Stream::Tls(..) => PollFlags::IN,
            // Its port is polled.
            Stream::Quic(_) => PollFlags::empty(),
        }
    }

    /// What to poll for by who waits for what `flags` say: over QUIC, the peer's datagrams make room for one's own too.
    pub(super) fn awaits(&self, flags: PollFlags) -> PollFlags {
        match self {
            Stream::Quic(_) if !flags.is_empty() => PollFlags::IN,
            _ => flags,
        }
    }

    /// What both ends of this connection know and nobody else: nothing without TLS.
    pub(crate) fn binding(&self) -> io::Result<Vec<u8>> {
        match self {
            Stream::Tcp(_) => Ok(Vec::new()),
            Stream::Tls(_, tls) => tls.binding().map(Vec::from),
            Stream::Quic(lane) => lane.binding().map(Vec::from),
        }
    }

    /// Whether the other side's certificate says that it is `who`; without TLS there is none that could.
    pub(crate) fn is_from(&self, who: Identity) -> bool {
        match self {
            Stream::Tcp(_) => true,
            Stream::Tls(_, tls) => tls.is_from(who),
            Stream::Quic(lane) => lane.is_from(who),
        }
    }

    /// How many bytes are out; `None` where the socket takes nothing now. The next call must give the same bytes again
    /// then: over TLS, some of them may be half out.
    #[inline]
    pub(crate) fn send(&mut self, parts: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        match self {
            Stream::Tcp(socket) => send(socket, parts),
            Stream::Tls(socket, tls) => tls.send(socket, parts),
            Stream::Quic(lane) => lane.send(parts),
        }
    }

    /// Sends a short message, for which a fresh connection has room.
    pub(crate) fn say(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self.send(&[IoSlice::new(bytes)])? {
            Some(n) if n == bytes.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// How many bytes have come, 0 if no more will; `None` where nothing has come.
    #[inline]
    pub(crate) fn receive(&mut self, into: &mut [u8]) -> io::Result<Option<usize>> {
        match self {
            Stream::Tcp(socket) => receive(socket, into),
            Stream::Tls(socket, tls) => tls.receive(socket, into),
            Stream::Quic(lane) => lane.receive(into),
        }
    }

    /// Whether something is here already, of which the kernel doesn't tell any more.
    #[inline]
    pub(crate) fn has_more(&self) -> bool {
        match self {
            Stream::Tcp(_) => false,
            Stream::Tls(_, tls) => tls.has_more(),
            Stream::Quic(lane) => lane.is_readable(),
        }
    }

    /// Whether it takes something, of which the kernel doesn't tell.
    pub(super) fn has_room(&self) -> bool {
        matches!(self, Stream::Quic(lane) if lane.is_writable())
    }

    /// Whether bytes that [`send`](Stream::send) has not reported are half out.
    pub(crate) fn is_midway(&self) -> bool {
        matches!(self, Stream::Tls(_, tls) if tls.is_midway())
    }

    /// Whether all that was sent is on its way, and a close takes nothing of it back.
    pub(super) fn is_out(&self) -> bool {
        match self {
            Stream::Tcp(socket) => socket::held_back(socket) == 0,
            Stream::Tls(socket, tls) => !tls.wants_write() && socket::held_back(socket) == 0,
            // Its port sends on when the stream is closed.
            Stream::Quic(_) => true,
        }
    }

    /// For how long the peer's host has answered nothing although it was asked to; over QUIC, its silence ends the
    /// connection.
    pub(super) fn silent(&self) -> Duration {
        match self {
            Stream::Tcp(socket) | Stream::Tls(socket, _) => socket::silent(socket),
            Stream::Quic(lane) => {
                lane.look();
                Duration::ZERO
            }
        }
    }

    /// How long a thread that waits for this stream may sleep before it looks again.
    pub(super) fn patience(&self) -> Duration {
        match self {
            Stream::Tcp(_) | Stream::Tls(..) => Duration::MAX,
            Stream::Quic(lane) => lane.patience(),
        }
    }

    /// Whose wake is rung where another thread finds something for this stream.
    pub(super) fn belongs_to(&mut self, wake: &Arc<Wake>) {
        if let Stream::Quic(lane) = self {
            lane.belongs_to(wake);
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Tcp(socket) | Stream::Tls(socket, _) => socket.as_fd(),
            Stream::Quic(lane) => lane.as_fd(),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Stream::Tls(socket, tls) = self {
            tls.close(socket);
        }
    }
}

#[cfg(test)]
impl From<TcpStream> for Stream {
    fn from(socket: TcpStream) -> Stream {
        Stream::Tcp(socket)
    }
}

/// `None` where the socket takes nothing now.
#[inline]
pub(super) fn send(socket: &TcpStream, parts: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    loop {
        match rustix::net::sendmsg(socket, parts, &mut SendAncillaryBuffer::default(), flags) {
            Ok(n) => return Ok(Some(n)),
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// `None` where nothing has come.
#[inline]
pub(super) fn receive(socket: &TcpStream, into: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        match rustix::net::recv(socket, &mut *into, RecvFlags::DONTWAIT) {
            Ok((_, n)) => return Ok(Some(n)),
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}
