//! How connections over QUIC are set up: for bulk, within the memory that a peer may take.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn_proto::congestion::{BbrConfig, ControllerFactory, CubicConfig, NewRenoConfig};
use quinn_proto::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn_proto::{
    ClientConfig, EndpointConfig, MtuDiscoveryConfig, ServerConfig, TransportConfig, ValidationTokenConfig,
    VarInt,
};
use rustix::net::sockopt;
use tensorwire_core::{Error, Result};

use crate::tcp::options::Congestion;
use crate::tcp::{TcpOptions, Tls};

/// What the two ends say that they speak: nobody else's QUIC.
const PROTOCOL: &[u8] = b"tensorwire";

/// Bytes that a peer may have sent and this rank hasn't read, on all streams of a connection.
const RECEIVE_WINDOW: u32 = 512 << 10;

/// Bytes that wait, or are under way, until the peer has acknowledged them.
const SEND_WINDOW: u64 = 384 << 10;

/// Streams that a peer may have open at once: one a group and purpose.
const STREAMS: u32 = 1024;

/// The largest datagram over any path.
pub(super) const MAX_DATAGRAM: usize = 65_527;

/// What a path is taken to carry at least, where it isn't this host's own.
const SMALLEST: u16 = 1200;

/// What connections are made with.
pub(super) struct Configs {
    client: Arc<QuicClientConfig>,
    server: Arc<QuicServerConfig>,
    congestion: Congestion,
    peer_timeout: Duration,
}

fn unfit(e: impl std::fmt::Display) -> Error {
    Error::Config(format!("QUIC can't be set up: {e}"))
}

impl Configs {
    pub(super) fn new(tls: &Tls, congestion: Congestion, options: &TcpOptions) -> Result<Configs> {
        let (mut client, mut server) = tls.configs();
        client.alpn_protocols = vec![PROTOCOL.to_vec()];
        server.alpn_protocols = vec![PROTOCOL.to_vec()];
        Ok(Configs {
            client: Arc::new(client.try_into().map_err(unfit)?),
            server: Arc::new(server.try_into().map_err(unfit)?),
            congestion,
            peer_timeout: options.peer_timeout,
        })
    }

    pub(super) fn endpoint(&self) -> Result<Arc<EndpointConfig>> {
        let mut config = EndpointConfig::default();
        config.max_udp_payload_size(MAX_DATAGRAM as u16).map_err(unfit)?;
        Ok(Arc::new(config))
    }

    /// For connections over a path that carries datagrams of `path`.
    pub(super) fn client(&self, path: Path) -> ClientConfig {
        let mut config = ClientConfig::new(self.client.clone());
        config.transport_config(Arc::new(self.transport(path)));
        config
    }

    pub(super) fn server(&self, path: Path) -> Arc<ServerConfig> {
        let mut config = ServerConfig::with_crypto(self.server.clone());
        // Nobody comes back to resume anything.
        let mut tokens = ValidationTokenConfig::default();
        tokens.sent(0);
        config.transport_config(Arc::new(self.transport(path))).validation_token_config(tokens);
        Arc::new(config)
    }

    fn transport(&self, path: Path) -> TransportConfig {
        // Quinn's own is for datagrams of 1200 bytes.
        let window = (10 * u64::from(path.first)).clamp(14_720, SEND_WINDOW);
        let congestion: Arc<dyn ControllerFactory + Send + Sync> = match self.congestion {
            Congestion::Cubic => {
                let mut config = CubicConfig::default();
                config.initial_window(window);
                Arc::new(config)
            }
            Congestion::NewReno => {
                let mut config = NewRenoConfig::default();
                config.initial_window(window);
                Arc::new(config)
            }
            Congestion::Bbr => {
                let mut config = BbrConfig::default();
                config.initial_window(window);
                Arc::new(config)
            }
        };
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(path.most);
        let mut config = TransportConfig::default();
        config
            .congestion_controller_factory(congestion)
            .initial_mtu(path.first)
            .mtu_discovery_config(Some(discovery))
            // A silent peer is one that has gone: each side asks five times before it believes so.
            .max_idle_timeout(self.peer_timeout.try_into().ok())
            .keep_alive_interval(Some(self.peer_timeout / 5))
            .initial_rtt(Duration::from_millis(100))
            .stream_receive_window(VarInt::from_u32(RECEIVE_WINDOW))
            .receive_window(VarInt::from_u32(RECEIVE_WINDOW))
            .send_window(SEND_WINDOW)
            .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS))
            .max_concurrent_uni_streams(VarInt::from_u32(0))
            .datagram_receive_buffer_size(None);
        config
    }
}

/// Bytes of the datagrams that the path to a peer carries: what it carries for certain, and may at most.
#[derive(Clone, Copy, Debug)]
pub(super) struct Path {
    first: u16,
    most: u16,
}

impl Path {
    /// The path that `socket` is connected over, to `peer`.
    pub(super) fn of(socket: &UdpSocket, peer: SocketAddr) -> Path {
        let (mtu, headers, longest) = match peer {
            SocketAddr::V4(_) => (sockopt::ip_mtu(socket), 28, 65_507),
            SocketAddr::V6(_) => (sockopt::ipv6_mtu(socket), 48, MAX_DATAGRAM as u32),
        };
        let most = mtu.unwrap_or(1500).saturating_sub(headers).clamp(SMALLEST.into(), longest) as u16;
        // Nothing lies between this host and itself.
        let here = peer.ip().is_loopback() || socket.local_addr().is_ok_and(|own| own.ip() == peer.ip());
        Path { first: if here { most } else { SMALLEST }, most }
    }
}

/// Whether nobody listens at the other end, as far as is known: who does drops what this sends.
pub(super) fn deserted(probe: &UdpSocket) -> bool {
    let refused = |came: io::Result<usize>| came.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused);
    // The answer to an earlier one may come with either.
    refused(probe.send(&[0])) || refused(probe.recv(&mut [0]))
}

/// A socket that nobody else writes to, connected to `peer`: the kernel tells it of the path, and whether anybody listens
/// at the end of it.
pub(super) fn probe(from: SocketAddr, peer: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind(SocketAddr::new(from.ip(), 0))?;
    socket.set_nonblocking(true)?;
    socket.connect(peer)?;
    Ok(socket)
}
