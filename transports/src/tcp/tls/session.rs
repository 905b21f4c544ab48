//! One end of a TLS connection over a socket that never blocks.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::ops::Range;

use rustls::{AlertDescription, ClientConnection, Connection, ServerConnection};

use super::{BINDING, Tls, names, server_name};
use crate::tcp::stream::{self, Identity};

/// Bytes that are read at once: a system call brings several of TLS's records of 16 KiB.
const READ: usize = 64 << 10;
/// Bytes that are encrypted ahead of what the socket has taken.
const WRITE: usize = 64 << 10;
/// Bytes that are read at once while the other side hasn't proved who it is.
const HANDSHAKE_READ: usize = 4 << 10;

pub(crate) struct Session {
    connection: Connection,
    /// What was read from the socket, and which of it TLS hasn't taken yet.
    inbox: Box<[u8]>,
    ahead: Range<usize>,
    /// Bytes that are decrypted and wait for their reader.
    plain: usize,
    /// Bytes of the caller's that are encrypted, and not all out.
    accepted: usize,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").finish_non_exhaustive()
    }
}

/// The socket, as TLS writes to it.
struct Out<'a>(&'a TcpStream);

impl Write for Out<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        stream::send(self.0, parts)?.ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn broken(e: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, e)
}

/// What TLS says is wrong, if it is TLS that says so: for a person.
pub(in crate::tcp) fn complaint(e: &io::Error) -> Option<String> {
    use rustls::{CertificateError as Bad, Error};
    let e = e.get_ref()?.downcast_ref::<Error>()?;
    Some(match e {
        Error::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature) => {
            "its certificate is not of this rank's authority: all ranks of a job need the same TENSORWIRE_TLS_CA"
                .to_owned()
        }
        Error::InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. }) => {
            "its certificate names somebody else".to_owned()
        }
        Error::InvalidCertificate(why) => format!("its certificate doesn't hold: {why}"),
        Error::AlertReceived(
            alert @ (AlertDescription::UnknownCA
            | AlertDescription::DecryptError
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRequired
            | AlertDescription::UnsupportedCertificate),
        ) => format!(
            "it refuses this rank's certificate ({alert:?}): all ranks of a job need certificates of one authority"
        ),
        Error::InvalidMessage(_) => {
            "it doesn't speak TLS: give all ranks of a job the same TENSORWIRE_TRANSPORT".to_owned()
        }
        other => format!("TLS fails: {other}"),
    })
}

impl Session {
    pub(in crate::tcp) fn client(tls: &Tls, to: Identity) -> io::Result<Session> {
        let connection = ClientConnection::new(tls.client.clone(), server_name(to)).map_err(broken)?;
        Ok(Session::new(connection.into()))
    }

    pub(in crate::tcp) fn server(tls: &Tls) -> io::Result<Session> {
        Ok(Session::new(ServerConnection::new(tls.server.clone()).map_err(broken)?.into()))
    }

    fn new(mut connection: Connection) -> Session {
        connection.set_buffer_limit(Some(WRITE));
        let inbox = vec![0; HANDSHAKE_READ].into();
        Session { connection, inbox, ahead: 0..0, plain: 0, accepted: 0 }
    }

    /// Goes on as far as the socket allows: whether the handshake is done.
    pub(in crate::tcp) fn handshake(&mut self, socket: &TcpStream) -> io::Result<bool> {
        loop {
            // Where nothing can be written any more, the other side may have said why.
            let written = self.flush(socket);
            if !self.connection.is_handshaking() {
                let done = written?;
                if done && self.inbox.len() < READ {
                    let mut inbox = vec![0; READ];
                    inbox[self.ahead.clone()].copy_from_slice(&self.inbox[self.ahead.clone()]);
                    self.inbox = inbox.into();
                }
                return Ok(done);
            }
            match self.take_in(socket)? {
                Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(_) => {}
                None => {
                    written?;
                    return Ok(false);
                }
            }
        }
    }

    pub(in crate::tcp) fn wants_write(&self) -> bool {
        self.connection.wants_write()
    }

    /// A number that this connection has and no other: what is proved together with it holds for this connection alone.
    pub(in crate::tcp) fn binding(&self) -> io::Result<[u8; 32]> {
        self.connection.export_keying_material([0; 32], BINDING, Some(&[])).map_err(broken)
    }

    /// Whether the other side's certificate, which has been checked, says that it is `who`.
    pub(in crate::tcp) fn is_from(&self, who: Identity) -> bool {
        let Some([certificate, ..]) = self.connection.peer_certificates() else { return false };
        names(certificate, who)
    }

    /// Writes what is encrypted: whether all of it is out.
    fn flush(&mut self, socket: &TcpStream) -> io::Result<bool> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut Out(socket)) {
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    /// See [`Stream::send`](stream::Stream::send).
    pub(in crate::tcp) fn send(
        &mut self,
        socket: &TcpStream,
        parts: &[IoSlice<'_>],
    ) -> io::Result<Option<usize>> {
        if self.accepted == 0 {
            self.accepted = self.connection.writer().write_vectored(parts)?;
        }
        // Counted when the kernel has all of it, as without TLS: who waits for it polls the socket.
        Ok(self.flush(socket)?.then(|| std::mem::take(&mut self.accepted)))
    }

    /// Decrypts what has come: how many bytes of it TLS has taken, 0 at the end, `None` if nothing has come.
    fn take_in(&mut self, socket: &TcpStream) -> io::Result<Option<usize>> {
        if self.ahead.is_empty() {
            let Some(n) = stream::receive(socket, &mut self.inbox)? else { return Ok(None) };
            self.ahead = 0..n;
        }
        let n = self.connection.read_tls(&mut &self.inbox[self.ahead.clone()])?;
        self.ahead.start += n;
        match self.connection.process_new_packets() {
            Ok(state) => self.plain = state.plaintext_bytes_to_read(),
            Err(e) => {
                // The other side learns why, if it still listens.
                let _ = self.flush(socket);
                return Err(broken(e));
            }
        }
        Ok(Some(n))
    }

    /// How many bytes have come, 0 if the other side has said that no more will; `None` where nothing has come.
    ///
    /// # Errors
    /// `UnexpectedEof` if the connection has ended, and the other side hasn't said that it would.
    pub(in crate::tcp) fn receive(
        &mut self,
        socket: &TcpStream,
        into: &mut [u8],
    ) -> io::Result<Option<usize>> {
        loop {
            match self.connection.reader().read(into) {
                Ok(n) => {
                    self.plain -= n;
                    return Ok(Some(n));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
            if self.take_in(socket)?.is_none() {
                return Ok(None);
            }
        }
    }

    pub(in crate::tcp) fn has_more(&self) -> bool {
        self.plain > 0 || !self.ahead.is_empty()
    }

    pub(in crate::tcp) fn is_midway(&self) -> bool {
        self.accepted > 0
    }

    /// Says that nothing more will be sent, as far as the socket takes it.
    pub(in crate::tcp) fn close(&mut self, socket: &TcpStream) {
        if !self.connection.is_handshaking() {
            self.connection.send_close_notify();
            let _ = self.flush(socket);
        }
    }
}
