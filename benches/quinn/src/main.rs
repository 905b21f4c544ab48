//! What carries more over QUIC on loopback, from one process to another: tensorwire, or quinn on tokio, as in quinn's own
//! bulk benchmark (one thread on either side, one stream, read in order). quinn runs as it comes, with datagrams as large
//! as tensorwire's, and with its windows too. All are run in turn, some rounds; what counts is the median of the ratios.
//!
//! The first process sends and takes the time until the second has said that it has everything.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::CubicConfig;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    ClientConfig, Endpoint, EndpointConfig, MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tensorwire::transports::launch::Transport;
use tensorwire::transports::store::{StoreServer, UnixStore};
use tensorwire::transports::tcp::{
    Authority, Congestion, SECRET_VAR, Secret, TLS_CA_VAR, TLS_CERT_VAR, TLS_KEY_VAR, TcpOptions, Tls,
};
use tensorwire::{Communicator, Deadline};

const PIECE: usize = 16 << 20;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("tensorwire-receives") => return tensorwire_receives(&args[1], args[2].parse()?),
        Some("quinn-receives") => return quinn_receives(args[1].parse()?),
        _ => {}
    }
    let mib: usize = args.first().map_or(Ok(1024), |a| a.parse())?;
    let rounds: usize = args.get(1).map_or(Ok(5), |a| a.parse())?;
    let mut ratios = [const { Vec::new() }; SETTINGS];
    println!("GB/s   tensorwire   quinn: as it comes   large datagrams   and tensorwire's windows");
    for _ in 0..rounds {
        let ours = tensorwire_sends(mib)?;
        print!("       {ours:10.2}");
        for (settings, ratios) in ratios.iter_mut().enumerate() {
            let theirs = quinn_sends(mib, settings)?;
            print!("   {theirs:18.2}");
            ratios.push(ours / theirs);
        }
        println!();
    }
    print!("ours / theirs    ");
    for ratios in &mut ratios {
        ratios.sort_by(f64::total_cmp);
        print!("   {:18.2}", ratios[ratios.len() / 2]);
    }
    println!();
    Ok(())
}

fn gb_per_s(mib: usize, took: Duration) -> f64 {
    (mib << 20) as f64 / took.as_secs_f64() / 1e9
}

fn options() -> TcpOptions {
    TcpOptions { quic: Some(Congestion::Cubic), ..TcpOptions::default() }
}

fn join(rank: usize, store: &str, secret: Secret) -> Result<Communicator> {
    let store = UnixStore::connect(store, Deadline::after(Duration::from_secs(10)))?;
    Ok(Communicator::join_tcp(rank, 2, &store, None, &secret, &options())?)
}

fn tensorwire_sends(mib: usize) -> Result<f64> {
    let (store, authority, secret) = (StoreServer::start()?, Authority::generate()?, Secret::generate()?);
    let (ca, own, other) = (authority.ca(), authority.rank(0)?, authority.rank(1)?);
    let mut child = Command::new(std::env::current_exe()?)
        .args(["tensorwire-receives", &store.address(), &mib.to_string()])
        .env(SECRET_VAR, secret.to_hex())
        .envs([(TLS_CA_VAR, &ca), (TLS_CERT_VAR, &other.cert), (TLS_KEY_VAR, &other.key)])
        .spawn()?;
    let comm = join(0, &store.address(), secret.with_tls(Tls::from_pem(&ca, &own.cert, &own.key)?))?;
    let data = vec![1u8; PIECE];
    comm.send(&data, 1)?;
    comm.recv(&mut [0u8], 1)?;
    let start = Instant::now();
    for _ in 0..(mib << 20) / PIECE {
        comm.send(&data, 1)?;
    }
    comm.recv(&mut [0u8], 1)?;
    let took = start.elapsed();
    drop(comm);
    child.wait()?;
    Ok(gb_per_s(mib, took))
}

fn tensorwire_receives(store: &str, mib: usize) -> Result<()> {
    let comm = join(1, store, Secret::for_transport(Transport::Quic)?)?;
    let mut data = vec![0u8; PIECE];
    comm.recv(&mut data, 0)?;
    comm.send(&[1u8], 0)?;
    for _ in 0..(mib << 20) / PIECE {
        comm.recv(&mut data, 0)?;
    }
    comm.send(&[1u8], 0)?;
    Ok(())
}

/// How quinn can be set: 0 as it comes, 1 with tensorwire's datagrams over loopback, 2 with its windows too; see
/// transports/src/tcp/quic/config.rs.
const SETTINGS: usize = 3;

fn transport(settings: usize) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    if settings >= 1 {
        let mut congestion = CubicConfig::default();
        congestion.initial_window(384 << 10);
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(65_507);
        config
            .congestion_controller_factory(Arc::new(congestion))
            .initial_mtu(65_507)
            .mtu_discovery_config(Some(discovery));
    }
    if settings >= 2 {
        config
            .stream_receive_window(VarInt::from_u32(512 << 10))
            .receive_window(VarInt::from_u32(512 << 10))
            .send_window(384 << 10);
    }
    Arc::new(config)
}

fn endpoint(settings: usize, server: Option<ServerConfig>) -> Result<Endpoint> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 2 << 20)?;
    rustix::net::sockopt::set_socket_send_buffer_size(&socket, 2 << 20)?;
    let mut config = EndpointConfig::default();
    if settings >= 1 {
        config.max_udp_payload_size(65_527)?;
    }
    Ok(Endpoint::new(config, server, socket, Arc::new(quinn::TokioRuntime))?)
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn quinn_sends(mib: usize, settings: usize) -> Result<f64> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["quinn-receives", &settings.to_string()])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut line = || lines.next().ok_or("the receiver ended")?.map_err(Box::<dyn std::error::Error>::from);
    let address: SocketAddr = line()?.parse()?;
    let certificate: Vec<u8> = line()?.split(' ').map(str::parse).collect::<std::result::Result<_, _>>()?;
    let took = runtime()?.block_on(async {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from(certificate))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let crypto = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(crypto)?));
        config.transport_config(transport(settings));
        let endpoint = endpoint(settings, None)?;
        let connection = endpoint.connect_with(config, address, "localhost")?.await?;
        let data = vec![1u8; PIECE];
        let (mut to, mut from) = connection.open_bi().await?;
        to.write_all(&data).await?;
        from.read_exact(&mut [0]).await?;
        let start = Instant::now();
        for _ in 0..(mib << 20) / PIECE {
            to.write_all(&data).await?;
        }
        to.finish()?;
        from.read_exact(&mut [0]).await?;
        let took = start.elapsed();
        connection.close(VarInt::from_u32(0), b"");
        endpoint.wait_idle().await;
        Ok::<_, Box<dyn std::error::Error>>(took)
    })?;
    child.wait()?;
    Ok(gb_per_s(mib, took))
}

fn quinn_receives(settings: usize) -> Result<()> {
    let key = rcgen::KeyPair::generate()?;
    let certificate = rcgen::CertificateParams::new(vec!["localhost".into()])?.self_signed(&key)?;
    runtime()?.block_on(async {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let crypto = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::try_from(key.serialize_der())?,
            )?;
        let mut config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(crypto)?));
        config.transport_config(transport(settings));
        let endpoint = endpoint(settings, Some(config))?;
        println!("{}", endpoint.local_addr()?);
        println!("{}", certificate.der().iter().map(u8::to_string).collect::<Vec<_>>().join(" "));
        let connection = endpoint.accept().await.ok_or("nobody came")?.await?;
        let (mut to, mut from) = connection.accept_bi().await?;
        let mut data = vec![0; PIECE];
        from.read_exact(&mut data).await?;
        to.write_all(&[1]).await?;
        // Into one's own memory, as a caller of tensorwire has it.
        while let Some(n) = from.read(&mut data).await? {
            assert!(n > 0);
        }
        to.write_all(&[1]).await?;
        to.finish()?;
        connection.closed().await;
        Ok::<_, Box<dyn std::error::Error>>(())
    })
}
