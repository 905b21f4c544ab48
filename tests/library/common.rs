//! What the tests share: ranks as threads, and values whose reduction is known.

#[cfg(feature = "tcp")]
use tensorwire::transports::tcp::TcpOptions;
use tensorwire::{Communicator, Options};

pub(crate) use crate::values::{assert_same, buffer, reduced};

/// Runs `body` once a rank, each in a thread of its own.
pub(crate) fn threads(world: usize, options: &Options, body: impl Fn(Communicator) + Sync) {
    std::thread::scope(|s| {
        let body = &body;
        let ranks: Vec<_> = Communicator::in_process_with(world, options)
            .unwrap()
            .into_iter()
            .map(|comm| s.spawn(move || body(comm)))
            .collect();
        for rank in ranks {
            rank.join().unwrap();
        }
    });
}

/// A port on the loopback interface that is free, and that no system gives to a connection or to who asks for any port.
#[cfg(feature = "tcp")]
pub(crate) fn free_port() -> u16 {
    // Others that look at the same time begin elsewhere.
    let begin = 29_100 + (std::process::id() % 3000) as u16;
    (begin..32_767).find(|port| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok()).unwrap()
}

/// What carries the data of a test's ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Over {
    Shm,
    #[cfg(feature = "tcp")]
    Tcp,
    #[cfg(feature = "tls")]
    Tls,
    #[cfg(feature = "quic")]
    Quic,
    /// Shared memory on each of several hosts, TCP between them.
    #[cfg(feature = "tcp")]
    Mixed(Layout),
}

/// Which ranks are on one host.
#[cfg(feature = "tcp")]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Layout {
    /// The first half, and the rest.
    Halves,
    /// The even ones, and the odd ones.
    Alternating,
    /// All but the last, and that.
    AllButOne,
}

#[cfg(feature = "tcp")]
impl Layout {
    pub(crate) fn host(self, rank: usize, world: usize) -> usize {
        match self {
            Layout::Halves => usize::from(rank >= world.div_ceil(2)),
            Layout::Alternating => rank % 2,
            Layout::AllButOne => usize::from(rank + 1 == world),
        }
    }
}

impl Over {
    pub(crate) const ALL: &[Over] = &[
        Over::Shm,
        #[cfg(feature = "tcp")]
        Over::Tcp,
        #[cfg(feature = "tls")]
        Over::Tls,
        #[cfg(feature = "quic")]
        Over::Quic,
        #[cfg(feature = "tcp")]
        Over::Mixed(Layout::Halves),
        #[cfg(feature = "tcp")]
        Over::Mixed(Layout::Alternating),
        #[cfg(feature = "tcp")]
        Over::Mixed(Layout::AllButOne),
    ];

    /// As [`threads`], over this.
    pub(crate) fn threads(self, world: usize, options: &Options, body: impl Fn(Communicator) + Sync) {
        match self {
            Over::Shm => threads(world, options, body),
            #[cfg(feature = "tcp")]
            Over::Tcp => tcp_threads(world, &tcp_options(options), |_, comm| body(comm)),
            #[cfg(feature = "tls")]
            Over::Tls => secured_threads(world, &tcp_options(options), body),
            #[cfg(feature = "quic")]
            Over::Quic => {
                let quic = Some(tensorwire::transports::tcp::Congestion::default());
                secured_threads(world, &TcpOptions { quic, ..tcp_options(options) }, body);
            }
            #[cfg(feature = "tcp")]
            Over::Mixed(layout) => mixed_threads(|rank| layout.host(rank, world), world, options, body),
        }
    }
}

#[cfg(feature = "tcp")]
pub(crate) fn tcp_options(options: &Options) -> TcpOptions {
    TcpOptions { timeout: options.timeout, ..Default::default() }
}

/// As [`tcp_threads`], where each rank has a certificate.
#[cfg(feature = "tls")]
fn secured_threads(world: usize, options: &TcpOptions, body: impl Fn(Communicator) + Sync) {
    let authority = tensorwire::transports::tcp::Authority::generate().unwrap();
    let secured = |rank, secret| crate::tls::secured(&authority, rank, secret);
    network_threads(world, options, secured, |_, comm| body(comm));
}

/// Runs `body` once a rank, each in a thread of its own, over TCP on the loopback interface; `body` is given the job's
/// secret.
#[cfg(feature = "tcp")]
pub(crate) fn tcp_threads(
    world: usize,
    options: &TcpOptions,
    body: impl Fn(&tensorwire::transports::tcp::Secret, Communicator) + Sync,
) {
    network_threads(world, options, |_, secret| secret, body);
}

/// As [`tcp_threads`], with what `own` makes of the job's secret for each rank.
#[cfg(feature = "tcp")]
fn network_threads(
    world: usize,
    options: &TcpOptions,
    own: impl Fn(usize, tensorwire::transports::tcp::Secret) -> tensorwire::transports::tcp::Secret + Sync,
    body: impl Fn(&tensorwire::transports::tcp::Secret, Communicator) + Sync,
) {
    use tensorwire::Deadline;
    use tensorwire::transports::store::{StoreServer, UnixStore};
    let secret = tensorwire::transports::tcp::Secret::generate().unwrap();
    let server = StoreServer::start().unwrap();
    std::thread::scope(|s| {
        let (body, own, secret, server) = (&body, &own, &secret, &server);
        let rank = |rank| {
            s.spawn(move || {
                let store = UnixStore::connect(&server.address(), Deadline::after(options.timeout)).unwrap();
                let secret = &own(rank, secret.clone());
                body(secret, Communicator::join_tcp(rank, world, &store, None, secret, options).unwrap());
            })
        };
        for rank in (0..world).map(rank).collect::<Vec<_>>() {
            rank.join().unwrap();
        }
    });
}

/// As [`tcp_threads`], where rank `r` is on host `host(r)` and shares memory there.
#[cfg(feature = "tcp")]
pub(crate) fn mixed_threads(
    host: impl Fn(usize) -> usize + Sync,
    world: usize,
    options: &Options,
    body: impl Fn(Communicator) + Sync,
) {
    use tensorwire::Deadline;
    use tensorwire::collectives::network::NetworkOptions;
    use tensorwire::transports::store::{StoreServer, UnixStore};
    let secret = tensorwire::transports::tcp::Secret::generate().unwrap();
    let (server, tcp) = (StoreServer::start().unwrap(), tcp_options(options));
    std::thread::scope(|s| {
        let (host, body, secret, server, tcp) = (&host, &body, &secret, &server, &tcp);
        let rank = |rank| {
            s.spawn(move || {
                let store = UnixStore::connect(&server.address(), Deadline::after(tcp.timeout)).unwrap();
                let network = NetworkOptions { host: Some(host(rank).to_string()), ..Default::default() };
                let comm =
                    Communicator::join_mixed(rank, world, &store, None, secret, tcp, &network, options);
                body(comm.unwrap());
            })
        };
        for rank in (0..world).map(rank).collect::<Vec<_>>() {
            rank.join().unwrap();
        }
    });
}
