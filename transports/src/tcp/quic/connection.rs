//! One connection, as its port keeps it.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn_proto::{ConnectionError, ConnectionHandle, StreamId, VarInt};
use rustls::AlertDescription;
use rustls::pki_types::CertificateDer;

use super::config;
use super::lane::News;
use crate::tcp::socket::Wake;
use crate::tcp::stream::Identity;
use crate::tcp::tls;

/// Names a connection of a port, for as long as the port lives.
pub(super) type Key = u64;

/// For how long a peer may be silent before its port is asked whether anybody listens there. Whoever is asked for
/// something answers sooner.
const UNHEARD: Duration = Duration::from_millis(300);

pub(super) struct Connection {
    pub(super) handle: ConnectionHandle,
    pub(super) quic: quinn_proto::Connection,
    /// Whom this rank has dialled; `None` if it was dialled itself.
    pub(super) dialled: Option<Identity>,
    pub(super) lanes: Vec<(Option<StreamId>, Arc<News>)>,
    pub(super) connected: bool,
    /// Why it has ended.
    pub(super) lost: Option<ConnectionError>,
    /// Whether the endpoint has forgotten it.
    pub(super) drained: bool,
    /// When something came last.
    heard: Instant,
    /// When it was last asked whether the peer is there.
    looked: Instant,
    /// Since when it has no lanes, if it has none.
    pub(super) quiet: Instant,
    /// Asks whether anybody listens at the peer's port.
    probe: Option<UdpSocket>,
    /// Whether nobody does.
    deserted: bool,
}

impl Connection {
    pub(super) fn new(handle: ConnectionHandle, quic: quinn_proto::Connection, now: Instant) -> Connection {
        Connection {
            handle,
            quic,
            dialled: None,
            lanes: Vec::new(),
            connected: false,
            lost: None,
            drained: false,
            heard: now,
            looked: now,
            quiet: now,
            probe: None,
            deserted: false,
        }
    }

    /// Whether a stream to `peer`, who listens at `to`, can be opened over it.
    pub(super) fn leads_to(&self, to: SocketAddr, peer: Identity) -> bool {
        let there = self.lost.is_none() && !self.deserted && self.quic.remote_address() == to;
        there && (self.dialled == Some(peer) || self.connected && self.is_from(peer))
    }

    /// Whether the other side's certificate, which has been checked, says that it is `who`.
    pub(super) fn is_from(&self, who: Identity) -> bool {
        let identity = self.quic.crypto_session().peer_identity();
        let chain = identity.and_then(|any| any.downcast::<Vec<CertificateDer<'static>>>().ok());
        chain.is_some_and(|chain| chain.first().is_some_and(|own| tls::names(own, who)))
    }

    pub(super) fn binding(&self) -> io::Result<[u8; 32]> {
        let mut number = [0; 32];
        let session = self.quic.crypto_session();
        session
            .export_keying_material(&mut number, tls::BINDING, &[])
            .map_err(|_| io::ErrorKind::NotConnected)?;
        Ok(number)
    }

    /// Tells a lane that it may go on.
    pub(super) fn tell(&self, id: StreamId, own: &Arc<Wake>) {
        self.lanes.iter().filter(|(lane, _)| *lane == Some(id)).for_each(|(_, news)| news.raise(own));
    }

    pub(super) fn tell_all(&self, own: &Arc<Wake>) {
        self.lanes.iter().for_each(|(_, news)| news.raise(own));
    }

    /// When something is due.
    pub(super) fn next(&mut self) -> Option<Instant> {
        self.quic.poll_timeout()
    }

    /// Whether the peer has not acknowledged all that it was told.
    pub(super) fn is_owing(&mut self) -> bool {
        self.lost.is_none() && self.connected && self.quic.streams().send_streams() > 0
    }

    pub(super) fn close(&mut self, now: Instant) {
        self.quic.close(now, VarInt::from_u32(0), bytes::Bytes::new());
        self.lost.get_or_insert(ConnectionError::LocallyClosed);
    }

    /// Looks whether a peer that is silent is still there: its host says if nobody listens at its port any more.
    pub(super) fn look(&mut self, from: SocketAddr, now: Instant) {
        if self.lost.is_some() || now - self.heard.max(self.looked) < UNHEARD {
            return;
        }
        let unanswered = self.looked > self.heard;
        self.looked = now;
        self.quic.ping();
        if self.probe.is_none() {
            self.probe = config::probe(from, self.quic.remote_address()).ok();
        }
        // A router between may refuse what its own peer would not: who is asked and answers is there.
        let refused = self.probe.as_ref().is_some_and(config::deserted);
        self.deserted |= refused && unanswered;
    }

    /// Something has come.
    pub(super) fn hear(&mut self, now: Instant) {
        (self.heard, self.probe) = (now, None);
    }

    /// How it has ended, if it has.
    pub(super) fn ended(&self) -> Option<io::Error> {
        if self.deserted {
            return Some(io::ErrorKind::ConnectionRefused.into());
        }
        self.lost.as_ref().map(why)
    }
}

/// An alert of TLS, as QUIC carries it.
fn alert(code: u64) -> Option<AlertDescription> {
    (0x100..0x200).contains(&code).then(|| AlertDescription::from(code as u8))
}

/// Why a connection has ended, as it is told of the other transports' connections.
fn why(lost: &ConnectionError) -> io::Error {
    use rustls::{CertificateError as Bad, Error};
    let tls = |e: Error| io::Error::new(io::ErrorKind::InvalidData, e);
    match lost {
        // Who verifies a certificate here says why in words, and to the other side with an alert.
        ConnectionError::TransportError(e) => match alert(e.code.into()) {
            Some(AlertDescription::UnknownCA) => tls(Bad::UnknownIssuer.into()),
            Some(AlertDescription::DecryptError) => tls(Bad::BadSignature.into()),
            Some(AlertDescription::BadCertificate) if e.reason.contains("not valid for name") => {
                tls(Bad::NotValidForName.into())
            }
            Some(_) => tls(Error::General(e.reason.clone())),
            None => io::Error::new(io::ErrorKind::InvalidData, e.to_string()),
        },
        ConnectionError::ConnectionClosed(close) => match alert(close.error_code.into()) {
            Some(alert) => tls(Error::AlertReceived(alert)),
            None => io::Error::new(io::ErrorKind::ConnectionReset, close.to_string()),
        },
        ConnectionError::ApplicationClosed(_) | ConnectionError::Reset => {
            io::Error::new(io::ErrorKind::ConnectionReset, lost.to_string())
        }
        ConnectionError::TimedOut => io::ErrorKind::TimedOut.into(),
        ConnectionError::LocallyClosed => io::ErrorKind::NotConnected.into(),
        other => io::Error::other(other.to_string()),
    }
}
