//! A connection's bytes, as they are or over TLS. Nothing here blocks.

use std::io::{self, IoSlice};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};

use super::secret::Secret;
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
pub(crate) struct Stream {
    socket: TcpStream,
    tls: Option<Box<Session>>,
}

impl Stream {
    /// The side that dials, of a job whose secret is `secret`; over TLS, the other side must be `to`.
    pub(crate) fn dialled(socket: TcpStream, secret: &Secret, to: Identity) -> io::Result<Stream> {
        let tls = secret.tls().map(|tls| Session::client(tls, to)).transpose()?.map(Box::new);
        Ok(Stream { socket, tls })
    }

    /// The side that is dialled.
    pub(crate) fn accepted(socket: TcpStream, secret: &Secret) -> io::Result<Stream> {
        let tls = secret.tls().map(Session::server).transpose()?.map(Box::new);
        Ok(Stream { socket, tls })
    }

    pub(crate) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    pub(crate) fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Goes on with the TLS handshake: whether there is none, or it is done.
    pub(crate) fn handshake(&mut self) -> io::Result<bool> {
        match &mut self.tls {
            None => Ok(true),
            Some(tls) => tls.handshake(&self.socket),
        }
    }

    /// What to poll for during the handshake.
    pub(crate) fn interest(&self) -> PollFlags {
        let writes = self.tls.as_ref().is_some_and(|tls| tls.wants_write());
        if writes { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN }
    }

    /// What both ends of this connection know and nobody else: nothing without TLS.
    pub(crate) fn binding(&self) -> io::Result<Vec<u8>> {
        self.tls.as_ref().map_or(Ok(Vec::new()), |tls| tls.binding().map(Vec::from))
    }

    /// Whether the other side's certificate says that it is `who`; without TLS there is none that could.
    pub(crate) fn is_from(&self, who: Identity) -> bool {
        self.tls.as_ref().is_none_or(|tls| tls.is_from(who))
    }

    /// How many bytes are out; `None` where the socket takes nothing now. The next call must give the same bytes again
    /// then: over TLS, some of them may be half out.
    #[inline]
    pub(crate) fn send(&mut self, parts: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        match &mut self.tls {
            None => send(&self.socket, parts),
            Some(tls) => tls.send(&self.socket, parts),
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
        match &mut self.tls {
            None => receive(&self.socket, into),
            Some(tls) => tls.receive(&self.socket, into),
        }
    }

    /// Whether something is here already, of which the kernel doesn't tell any more.
    #[inline]
    pub(crate) fn has_more(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.has_more())
    }

    /// Whether bytes that [`send`](Stream::send) has not reported are half out.
    pub(crate) fn is_midway(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.is_midway())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.close(&self.socket);
        }
    }
}

#[cfg(test)]
impl From<TcpStream> for Stream {
    fn from(socket: TcpStream) -> Stream {
        Stream { socket, tls: None }
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
