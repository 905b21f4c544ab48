//! What the ranks of a job that this program starts are given to find each other, over either transport.

use std::ffi::OsStr;

use tensorwire::transports::launch::{Launcher, Transport};
use tensorwire::transports::store::{LOOPBACK, StoreServer, TcpStoreServer};
use tensorwire::transports::tcp::{SECRET_FILE_VAR, SECRET_VAR, Secret};

use crate::failure::Failure;

/// A store that is served for as long as the job runs, and what the ranks' environment says of it.
pub(crate) struct Job {
    ranks: usize,
    transport: Transport,
    address: String,
    secret: Secret,
    _server: Server,
}

#[expect(dead_code, reason = "they are served until they are dropped")]
enum Server {
    Unix(StoreServer),
    Tcp(TcpStoreServer),
}

impl Job {
    pub(crate) fn new(ranks: usize, transport: Transport) -> Result<Job, Failure> {
        // Ours by default; one that is given serves ranks which others start elsewhere.
        let given = [SECRET_VAR, SECRET_FILE_VAR].iter().any(|name| std::env::var_os(name).is_some());
        let secret = if given {
            Secret::from_env().map_err(Failure::usage)?
        } else {
            Secret::generate().map_err(Failure::run)?
        };
        let (address, server) = match transport {
            Transport::Shm => {
                let server = StoreServer::start().map_err(Failure::run)?;
                (server.address(), Server::Unix(server))
            }
            Transport::Tcp => {
                let server = TcpStoreServer::start(LOOPBACK, ranks, &secret).map_err(Failure::run)?;
                (server.address(), Server::Tcp(server))
            }
        };
        Ok(Job { ranks, transport, address, secret, _server: server })
    }

    /// A launcher of the job's ranks, which run `program`.
    pub(crate) fn launcher<'a>(&self, program: impl AsRef<OsStr>) -> Launcher<'a> {
        // In the environment, which only this user can read; never among the arguments, which everybody can.
        Launcher::new(program, self.ranks, &self.address)
            .env("TENSORWIRE_TRANSPORT", self.transport.name())
            .env(SECRET_VAR, self.secret.to_hex())
    }
}
