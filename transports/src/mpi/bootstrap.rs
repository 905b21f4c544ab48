//! How ranks that MPI has started find each other for another transport: rank 0 makes the job's secret, serves the store,
//! and tells all others of both over MPI.

use std::net::SocketAddr;

use tensorwire_core::{Deadline, Error, Result};

use super::world::World;
use crate::store::{LOOPBACK, Store, TcpStore, TcpStoreServer};
use crate::tcp::{Secret, TcpOptions, address_outward};

/// A store that rank 0 serves as long as it lives.
#[derive(Debug)]
struct Served {
    store: TcpStore,
    _server: Option<TcpStoreServer>,
}

impl Store for Served {
    fn set(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()> {
        self.store.set(key, value, deadline)
    }

    fn get(&self, key: &str, deadline: Deadline) -> Result<Vec<u8>> {
        self.store.get(key, deadline)
    }

    fn add(&self, key: &str, delta: i64, deadline: Deadline) -> Result<i64> {
        self.store.add(key, delta, deadline)
    }
}

/// The secret and the store of a job whose ranks are those of `world`, and where the store is. All ranks call it.
///
/// # Errors
/// [`Error::Rendezvous`] if rank 0 doesn't come, or can't serve a store, which every rank is told.
pub fn meet(world: &World, options: &TcpOptions) -> Result<(Secret, Box<dyn Store + Sync>, SocketAddr)> {
    let deadline = Deadline::after(options.timeout);
    let (rank, size) = (world.rank(), world.size());
    let (mut server, mut told) = (None, String::new());
    if rank == 0 {
        told = match serve(world, options) {
            Ok((secret, started)) => {
                let told = format!("{} {}", secret.to_hex(), started.address());
                server = Some(started);
                told
            }
            Err(e) => format!("! {e}"),
        };
    }
    let told = world.broadcast(told.as_bytes())?;
    let told = String::from_utf8_lossy(&told).into_owned();
    let failed = |why: &str| {
        let what = format!("rank 0 could not serve the store for the others: {why}");
        Error::Rendezvous { rank, world: size, what }
    };
    let (secret, address) = told.split_once(' ').ok_or_else(|| failed("it told nothing"))?;
    if secret == "!" {
        return Err(failed(address));
    }
    let secret = Secret::parse(secret).ok_or_else(|| failed("it told what is no secret"))?;
    let store = TcpStore::meet(address, rank, size, &secret, deadline)?;
    let at = store.peer();
    Ok((secret, Box::new(Served { store, _server: server }), at))
}

/// On rank 0: a fresh secret, and a store where the others can reach it.
fn serve(world: &World, options: &TcpOptions) -> Result<(Secret, TcpStoreServer)> {
    let secret = Secret::generate()?;
    let alone = world.hosts().iter().all(|host| *host == world.hosts()[0]);
    let at = match alone {
        true => LOOPBACK,
        false => SocketAddr::new(address_outward(options.interface.as_ref())?, 0),
    };
    let server = TcpStoreServer::start(at, world.size(), &secret)?;
    Ok((secret, server))
}
