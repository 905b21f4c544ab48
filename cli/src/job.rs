//! What the ranks of a job that this program starts are given to find each other, over any transport.

use std::ffi::OsStr;
use std::net::SocketAddr;

use tensorwire::collectives::network::NetworkOptions;
use tensorwire::transports::launch::{Env, Host, Launcher, Transport};
use tensorwire::transports::store::{LOOPBACK, StoreServer, TcpStoreServer};
use tensorwire::transports::tcp::{
    Authority, Certificate, SECRET_FILE_VAR, SECRET_VAR, Secret, TLS_CA_VAR, TLS_CERT_VAR, TLS_KEY_VAR,
    TcpOptions, Tls, address_towards,
};
use tensorwire::{Error, Options};

use crate::failure::Failure;
use crate::mpi;

/// A store that is served for as long as the job runs, and what the ranks' environment says of it.
pub(crate) struct Job {
    ranks: usize,
    transport: Transport,
    address: String,
    keys: Keys,
    _server: Server,
}

/// What lets ranks into the job.
struct Keys {
    secret: Secret,
    /// Over TLS and QUIC: the certificates' authority, and each rank's. None where certificates were given.
    certificates: Option<(String, Vec<Certificate>)>,
}

#[expect(dead_code, reason = "they are served until they are dropped")]
enum Server {
    /// Rank 0 serves it, or nobody needs to.
    Elsewhere,
    Unix(StoreServer),
    Tcp(TcpStoreServer),
}

impl Job {
    /// A job on this host.
    pub(crate) fn new(ranks: usize, transport: Transport) -> Result<Job, Failure> {
        check_environment(transport)?;
        let keys = Keys::new(ranks, transport)?;
        match transport {
            Transport::Shm => {
                let server = StoreServer::start().map_err(Failure::run)?;
                Ok(Job { ranks, transport, address: server.address(), keys, _server: Server::Unix(server) })
            }
            Transport::Mpi => Err(mpi::not_ours()),
            Transport::Tcp | Transport::Tls | Transport::Quic | Transport::Auto => {
                Job::served_at(LOOPBACK, ranks, transport, keys)
            }
        }
    }

    /// A job on these hosts, over TCP, TLS or QUIC, or also over shared memory on each. Its ranks meet at `store`, or at an
    /// address of this host that leads to the others.
    pub(crate) fn on_hosts(
        ranks: usize,
        hosts: &[Host],
        transport: Transport,
        store: Option<&str>,
    ) -> Result<Job, Failure> {
        if transport == Transport::Mpi {
            return Err(mpi::not_ours());
        }
        check_environment(transport)?;
        let keys = Keys::new(ranks, transport)?;
        if let Some(store) = store {
            let address = store.to_owned();
            return Ok(Job { ranks, transport, address, keys, _server: Server::Elsewhere });
        }
        let at = match hosts.iter().find(|host| !host.is_local()) {
            None => LOOPBACK,
            Some(other) => {
                let options = TcpOptions::from_env().map_err(Failure::usage)?;
                let ip = address_towards(other.address(), options.interface.as_ref()).map_err(|e| {
                    Failure::usage(format!("{e}; --store tcp:HOST:PORT says where the ranks meet instead"))
                })?;
                SocketAddr::new(ip, 0)
            }
        };
        Job::served_at(at, ranks, transport, keys)
    }

    fn served_at(at: SocketAddr, ranks: usize, transport: Transport, keys: Keys) -> Result<Job, Failure> {
        let server = TcpStoreServer::start(at, ranks, &keys.secret).map_err(|e| match e {
            Error::Config(_) => Failure::usage(e),
            _ => Failure::run(e),
        })?;
        Ok(Job { ranks, transport, address: server.address(), keys, _server: Server::Tcp(server) })
    }

    /// A launcher of the job's ranks, which run `program`.
    pub(crate) fn launcher<'a>(&self, program: impl AsRef<OsStr>) -> Launcher<'a> {
        // In the environment, which only this user can read; never among the arguments, which everybody can.
        let mut launcher = Launcher::new(program, self.ranks, &self.address)
            .env("TENSORWIRE_TRANSPORT", self.transport.name())
            .env(SECRET_VAR, self.keys.secret.to_hex());
        if let Some((ca, certificates)) = &self.keys.certificates {
            launcher = launcher.env(TLS_CA_VAR, ca);
            for (rank, Certificate { cert, key }) in certificates.iter().enumerate() {
                launcher = launcher.rank_env(rank, TLS_CERT_VAR, cert).rank_env(rank, TLS_KEY_VAR, key);
            }
        }
        launcher
    }
}

/// The ranks read the same variables: what makes no sense is said before one is started.
fn check_environment(transport: Transport) -> Result<(), Failure> {
    let shares = matches!(transport, Transport::Shm | Transport::Auto);
    let shared = if shares { Options::from_env().map(drop) } else { Ok(()) };
    let network = || match transport {
        Transport::Shm => Ok(()),
        _ => TcpOptions::for_transport(transport).and_then(|_| NetworkOptions::from_env()).map(drop),
    };
    shared.and_then(|()| network()).map_err(Failure::usage)
}

impl Keys {
    /// Ours by default; what is given serves ranks which others start elsewhere.
    fn new(ranks: usize, transport: Transport) -> Result<Keys, Failure> {
        let is_set = |name: &&str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let secret = match [SECRET_VAR, SECRET_FILE_VAR].iter().any(is_set) {
            true => Secret::from_env().map_err(Failure::usage)?,
            false => Secret::generate().map_err(Failure::run)?,
        };
        if !transport.has_certificates() {
            return Ok(Keys { secret, certificates: None });
        }
        if [TLS_CA_VAR, TLS_CERT_VAR, TLS_KEY_VAR].iter().any(is_set) {
            let given = Tls::from_env().map_err(Failure::usage)?;
            return Ok(Keys { secret: secret.with_tls(given), certificates: None });
        }
        let made = || {
            let authority = Authority::generate()?;
            let all: Result<Vec<_>, Error> = (0..ranks).map(|rank| authority.rank(rank)).collect();
            Ok((authority.store()?, (authority.ca(), all?)))
        };
        let (store, certificates) = made().map_err(|e: Error| Failure::run(e))?;
        Ok(Keys { secret: secret.with_tls(store), certificates: Some(certificates) })
    }
}

/// This process's place in the job of a `tensorwire launch` that has started it, or of an mpirun for ranks over MPI, if one
/// has: it is a rank then, and starts none.
pub(crate) fn launched() -> Result<Option<(Env, Transport)>, Failure> {
    if std::env::var_os("TENSORWIRE_RANK").is_none() {
        let over_mpi = Transport::from_env().is_ok_and(|transport| transport == Transport::Mpi);
        return Ok(mpi::place().filter(|_| over_mpi).map(|env| (env, Transport::Mpi)));
    }
    let env = Env::read().map_err(Failure::usage)?;
    Ok(Some((env, Transport::from_env().map_err(Failure::usage)?)))
}
