//! A store served over an abstract Unix socket: by the launcher, or by rank 0 of a job that has none.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tensorwire_core::{Deadline, Error, Result};

use super::Store;
use super::answer::{Client, Table, Wire, serve};
use crate::local_socket;

/// Serves a store until it is dropped.
#[derive(Debug)]
pub struct StoreServer {
    name: String,
    stop: Arc<AtomicBool>,
    accepting: Option<JoinHandle<()>>,
}

impl StoreServer {
    /// Serves under a fresh name; [`address`](StoreServer::address) tells the ranks.
    pub fn start() -> Result<StoreServer> {
        let name =
            local_socket::fresh_name("store").map_err(|e| Error::os("naming the store's socket", e))?;
        StoreServer::start_at(&name)
    }

    /// Serves under `name`, which must be free.
    fn start_at(name: &str) -> Result<StoreServer> {
        let listener =
            local_socket::listen(name).map_err(|e| Error::os(format!("serving the store {name}"), e))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let table = Arc::new(Table::default());
        let accept = move || {
            for stream in listener.incoming() {
                if stopping.load(Ordering::Acquire) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                if local_socket::check_user(&stream).is_err() {
                    continue;
                }
                let table = table.clone();
                // A client that no thread can be had for sees its connection closed.
                let _ = std::thread::Builder::new()
                    .name("tensorwire-store".into())
                    .spawn(move || serve(stream, &table));
            }
        };
        let accepting = std::thread::Builder::new()
            .name("tensorwire-store".into())
            .spawn(accept)
            .map_err(|e| Error::os("starting the store's thread", e))?;
        Ok(StoreServer { name: name.to_owned(), stop, accepting: Some(accepting) })
    }

    /// What ranks are given as `TENSORWIRE_STORE`: `unix:NAME`.
    pub fn address(&self) -> String {
        format!("unix:{}", self.name)
    }
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        // Release: pairs with the accepting thread's Acquire load, after the connection that wakes it.
        self.stop.store(true, Ordering::Release);
        let woken = local_socket::connect(&self.name, Deadline::after(Duration::ZERO));
        if let (Ok(_), Some(thread)) = (woken, self.accepting.take()) {
            let _ = thread.join();
        }
    }
}

/// A rank's connection to a [`StoreServer`].
#[derive(Debug)]
pub struct UnixStore {
    client: Client<UnixStream>,
    /// Rank 0 of a job without a launcher serves the store itself.
    _server: Option<StoreServer>,
}

impl UnixStore {
    /// Connects to the store at `address` (`unix:NAME`), as [`StoreServer::address`] gave it.
    pub fn connect(address: &str, deadline: Deadline) -> Result<UnixStore> {
        let name = address.strip_prefix("unix:").filter(|n| !n.is_empty()).ok_or_else(|| {
            Error::Config(format!("the store address '{address}' is not understood: it reads unix:NAME"))
        })?;
        UnixStore::open(name, None, deadline)
    }

    /// The store of the job called `job` on this host: served by rank 0, joined by the others.
    pub fn of_job(job: &str, rank: usize, deadline: Deadline) -> Result<UnixStore> {
        let name = job_name(job);
        if rank != 0 {
            return UnixStore::open(&name, None, deadline);
        }
        // The name may still be held by an earlier run of the same job that is ending.
        loop {
            match StoreServer::start_at(&name) {
                Ok(server) => return UnixStore::open(&name, Some(server), deadline),
                Err(Error::Os { source, .. })
                    if source.kind() == io::ErrorKind::AddrInUse && !deadline.passed() =>
                {
                    std::thread::sleep(Duration::from_millis(10).min(deadline.remaining()));
                }
                Err(Error::Os { source, .. }) if source.kind() == io::ErrorKind::AddrInUse => {
                    return Err(Error::Config(format!(
                        "another process serves the job '{job}' as its rank 0: is a job with the same name running?"
                    )));
                }
                Err(other) => return Err(other),
            }
        }
    }

    /// Says which rank of what world this process is, for as long as this connection lasts.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] if another process is this rank, or the job has another world.
    pub fn enter(&self, rank: usize, world: usize, deadline: Deadline) -> Result<()> {
        self.client.enter(rank, world, deadline).map_err(|e| match e {
            Error::InvalidArgument(what) => Error::Rendezvous { rank, world, what },
            other => other,
        })
    }

    fn open(name: &str, server: Option<StoreServer>, deadline: Deadline) -> Result<UnixStore> {
        let stream = local_socket::connect(name, deadline).map_err(|e| {
            Error::os(format!("connecting to the job's store {name}: is its launcher or rank 0 running?"), e)
        })?;
        Ok(UnixStore { client: Client::new(name.to_owned(), stream), _server: server })
    }
}

/// The socket name of a job: long or odd job names are cut to what a socket name can hold.
fn job_name(job: &str) -> String {
    let mut digest: u64 = 0xcbf2_9ce4_8422_2325;
    for b in job.bytes() {
        digest = (digest ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    let readable: String =
        job.chars().filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c)).take(40).collect();
    format!("tensorwire-job-{}-{readable}-{digest:016x}", rustix::process::geteuid().as_raw())
}

impl Wire for UnixStream {
    fn limit(&self, deadline: Option<Deadline>) -> io::Result<()> {
        match deadline {
            Some(deadline) => local_socket::limit(self, deadline),
            None => self.set_read_timeout(None).and_then(|()| self.set_write_timeout(None)),
        }
    }
}

impl Store for UnixStore {
    fn set(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()> {
        self.client.set(key, value, deadline)
    }

    fn get(&self, key: &str, deadline: Deadline) -> Result<Vec<u8>> {
        self.client.get(key, deadline)
    }

    fn add(&self, key: &str, delta: i64, deadline: Deadline) -> Result<i64> {
        self.client.add(key, delta, deadline)
    }
}

#[cfg(test)]
mod tests {
    use super::super::answer::{MAX_VALUE, answer};
    use super::*;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(10))
    }

    #[test]
    fn set_get_and_add_are_seen_by_every_client() {
        let server = StoreServer::start().unwrap();
        let a = UnixStore::connect(&server.address(), soon()).unwrap();
        let b = UnixStore::connect(&server.address(), soon()).unwrap();
        std::thread::scope(|s| {
            let waiting = s.spawn(|| b.get("k", soon()).unwrap());
            a.set("k", b"value", soon()).unwrap();
            assert_eq!(waiting.join().unwrap(), b"value");
        });
        assert_eq!(a.add("n", 2, soon()).unwrap(), 2);
        assert_eq!(b.add("n", -5, soon()).unwrap(), -3);
        let message = b.get("absent", Deadline::after(Duration::from_millis(10))).unwrap_err().to_string();
        assert!(message.contains("no rank set 'absent'"), "{message}");
        assert!(a.set("long", &vec![0; MAX_VALUE + 1], soon()).unwrap_err().to_string().contains("over"));
        assert!(a.add("k", 1, soon()).unwrap_err().to_string().contains("k is no counter"));
    }

    #[test]
    fn rank_0_of_a_job_serves_the_others_and_a_second_one_is_refused() {
        let job = local_socket::fresh_name("test").unwrap();
        std::thread::scope(|s| {
            let other = s.spawn(|| UnixStore::of_job(&job, 1, soon()).unwrap().get("k", soon()).unwrap());
            let zero = UnixStore::of_job(&job, 0, soon()).unwrap();
            let twin = UnixStore::of_job(&job, 0, Deadline::after(Duration::from_millis(20)));
            assert!(twin.unwrap_err().to_string().contains("another process serves the job"));
            zero.set("k", b"v", soon()).unwrap();
            assert_eq!(other.join().unwrap(), b"v");
        });
    }

    #[test]
    fn a_rank_that_comes_twice_or_with_another_world_is_told_so_and_so_are_those_who_wait() {
        let server = StoreServer::start().unwrap();
        let connect = || UnixStore::connect(&server.address(), soon()).unwrap();
        let zero = connect();
        zero.enter(0, 2, soon()).unwrap();
        connect().enter(0, 2, soon()).expect("the same process may connect again");
        let wrong = connect().enter(1, 3, soon()).unwrap_err().to_string();
        assert!(wrong.contains("was started for a world of 3, and the job has 2"), "{wrong}");
        let outside = connect().enter(2, 2, soon()).unwrap_err().to_string();
        assert!(outside.contains("is outside the world of 2"), "{outside}");
        let waits = zero.get("at/1", Deadline::after(Duration::from_millis(50))).unwrap_err().to_string();
        assert!(waits.contains("a process that came as rank 1 was started for a world of 3"), "{waits}");
    }

    #[test]
    fn garbage_is_refused_and_does_not_disturb_the_store() {
        let table = Table::default();
        for request in
            [&b""[..], b"\x01", b"\x09\x00", b"\x01\x05ab", b"\x02\x01k", b"\x03\x01kxx", b"\x01\x01\xff"]
        {
            assert!(answer(request, &table).is_err(), "{request:?}");
        }
        assert!(table.values.lock().unwrap().is_empty());
        let server = StoreServer::start().unwrap();
        let mut stranger = local_socket::connect(&server.name, soon()).unwrap();
        io::Write::write_all(&mut stranger, &[0xff; 64]).unwrap();
        let client = UnixStore::connect(&server.address(), soon()).unwrap();
        client.set("k", b"v", soon()).unwrap();
        assert_eq!(client.get("k", soon()).unwrap(), b"v");
    }
}
