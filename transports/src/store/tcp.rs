//! A store served over TCP, to ranks on any hosts that know the job's secret: by the launcher, or by rank 0.
//!
//! A connection begins with the handshake of the ranks' own connections; a stranger gets no further than that.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, Timespec, poll};
use tensorwire_core::{Deadline, Error, Result};

use super::Store;
use super::answer::{Client, Table, Wire, serve};
use crate::tcp::store::{Arrival, Channel, Dial, Endpoint, Hello, Refusal, Status, listen};
use crate::tcp::{Secret, TcpOptions};

/// Bytes that the kernel holds for a connection, in each direction: requests are short.
const BUFFER: usize = 64 << 10;

fn options() -> TcpOptions {
    TcpOptions { send_buffer: BUFFER, receive_buffer: BUFFER, ..TcpOptions::default() }
}

/// How long one attempt to reach the store takes at most, where there are several places to look.
const ATTEMPT: Duration = Duration::from_secs(1);

/// The processes that are connected, by rank: which, and how often.
type Present = Arc<Mutex<HashMap<u32, ([u8; 16], usize)>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves a store over TCP until it is dropped.
#[derive(Debug)]
pub struct TcpStoreServer {
    endpoint: Endpoint,
}

impl TcpStoreServer {
    /// Serves the ranks of a job of `world` at `at`; port 0 lets the system choose, and
    /// [`address`](TcpStoreServer::address) tells.
    ///
    /// # Errors
    /// [`Error::Os`] if the address can't be listened on.
    pub fn start(at: SocketAddr, world: usize, secret: &Secret) -> Result<TcpStoreServer> {
        let options = options();
        let listener = listen(at.ip(), at.port()..=at.port(), &options);
        let listener = listener.map_err(|e| Error::os(format!("serving the job's store at {at}"), e))?;
        let (table, present) = (Arc::new(Table::default()), Present::default());
        let own = secret.clone();
        let admit =
            move |hello: &Hello, arrival: Arrival| admit(hello, arrival, world, &own, &table, &present);
        let endpoint =
            Endpoint::serve(listener, "the store".into(), secret.clone(), &options, Some(Box::new(admit)))?;
        Ok(TcpStoreServer { endpoint })
    }

    /// What ranks are given as `TENSORWIRE_STORE`: `tcp:HOST:PORT`.
    pub fn address(&self) -> String {
        format!("tcp:{}", self.endpoint.address())
    }
}

/// Serves a client that has proved itself, in a thread of its own, unless another process is the same rank.
fn admit(
    hello: &Hello,
    arrival: Arrival,
    world: usize,
    secret: &Secret,
    table: &Arc<Table>,
    present: &Present,
) {
    let status = match lock(present).get(&hello.from) {
        _ if hello.channel != Channel::Store => Status::NoGroup,
        _ if hello.world as usize != world => Status::WrongWorld,
        _ if hello.from as usize >= world => Status::WrongRank,
        Some((instance, _)) if *instance != hello.instance => Status::Taken,
        _ => Status::Accepted,
    };
    let Some(stream) = arrival.settle(secret, status) else { return };
    let (rank, instance) = (hello.from, hello.instance);
    lock(present).entry(rank).or_insert((instance, 0)).1 += 1;
    let (table, there) = (table.clone(), present.clone());
    let work = move || {
        // Handshakes are done without blocking; from here on this thread has nothing else to do.
        if stream.set_nonblocking(false).is_ok() {
            serve(stream, &table);
        }
        gone(&there, rank);
    };
    // A client that no thread can be had for sees its connection closed.
    if std::thread::Builder::new().name("tensorwire-store".into()).spawn(work).is_err() {
        gone(present, rank);
    }
}

fn gone(present: &Present, rank: u32) {
    let mut present = lock(present);
    if let Some((_, times)) = present.get_mut(&rank) {
        *times -= 1;
        if *times == 0 {
            present.remove(&rank);
        }
    }
}

/// A rank's connection to a [`TcpStoreServer`].
#[derive(Debug)]
pub struct TcpStore {
    client: Client<TcpStream>,
    peer: SocketAddr,
    /// Rank 0 of a job without a launcher serves the store itself.
    _server: Option<TcpStoreServer>,
}

/// A rank that meets the others in a store.
#[derive(Clone, Copy, Debug)]
struct Who<'a> {
    rank: usize,
    world: usize,
    secret: &'a Secret,
}

impl TcpStore {
    /// Meets the other ranks at `address` (`tcp:HOST:PORT`), where the launcher serves a store, or else rank 0 does.
    ///
    /// # Errors
    /// [`Error::Config`] if the address can't be read; [`Error::Rendezvous`] if nobody serves there by the deadline,
    /// or the store is another job's, or has this rank already.
    pub fn meet(
        address: &str,
        rank: usize,
        world: usize,
        secret: &Secret,
        deadline: Deadline,
    ) -> Result<TcpStore> {
        let place = address.strip_prefix("tcp:").unwrap_or(address);
        let resolved = resolve(place)?;
        let who = Who { rank, world, secret };
        // Where the launcher serves, the port is taken; where it is another host's, it can't be had.
        let server = match rank {
            0 => resolved.iter().find_map(|at| TcpStoreServer::start(*at, world, secret).ok()),
            _ => None,
        };
        who.enter(&resolved, place, server, deadline)
    }

    /// Meets the other ranks of the job called `job` at `host`, which is rank 0's: at a port that follows from the
    /// job's name and secret, or the next of several if that one is taken.
    ///
    /// # Errors
    /// As for [`meet`](TcpStore::meet), and if none of the ports is free.
    pub fn of_job(
        job: &str,
        host: &str,
        rank: usize,
        world: usize,
        secret: &Secret,
        deadline: Deadline,
    ) -> Result<TcpStore> {
        let ip = resolve(&format!("{host}:1").replace("::1:1", "[::1]:1"))?[0].ip();
        let places = job_ports(job, secret).map(|port| SocketAddr::new(ip, port));
        let who = Who { rank, world, secret };
        let server = match rank {
            0 => {
                let started = places.iter().map(|at| TcpStoreServer::start(*at, world, secret));
                Some(started.reduce(Result::or).expect("there are several ports")?)
            }
            _ => None,
        };
        who.enter(&places, host, server, deadline)
    }

    /// Where the store is.
    pub fn peer(&self) -> SocketAddr {
        self.peer
    }
}

/// Ports at which rank 0 of a job serves its store: below those that systems give out, and none that a launcher's own
/// store is known to use.
fn job_ports(job: &str, secret: &Secret) -> [u16; 8] {
    std::array::from_fn(|i| {
        let digest = secret.prove("port", &[job.as_bytes(), &[i as u8]]);
        15_000 + u16::from_le_bytes([digest[0], digest[1]]) % 14_000
    })
}

fn resolve(place: &str) -> Result<Vec<SocketAddr>> {
    let bad = |why: String| {
        Error::Config(format!(
            "the store address '{place}' is not understood: it reads tcp:HOST:PORT ({why})"
        ))
    };
    let all: Vec<SocketAddr> = place.to_socket_addrs().map_err(|e| bad(e.to_string()))?.collect();
    if all.is_empty() { Err(bad("the host has no address".into())) } else { Ok(all) }
}

impl Who<'_> {
    /// Connects to the store at one of `places`, trying again until the deadline while nobody serves there.
    fn enter(
        self,
        places: &[SocketAddr],
        name: &str,
        server: Option<TcpStoreServer>,
        deadline: Deadline,
    ) -> Result<TcpStore> {
        let Who { rank, world, .. } = self;
        let failed = |what: String| Error::Rendezvous { rank, world, what };
        let own = server.as_ref().map(|s| s.endpoint.address());
        let places = own.as_ref().map_or(places, std::slice::from_ref);
        let mut pause = Duration::from_millis(1);
        loop {
            let mut last = String::new();
            for place in places {
                let limit = if places.len() > 1 { ATTEMPT } else { deadline.remaining() };
                match self.dial(*place, Instant::now() + limit.min(deadline.remaining())) {
                    Ok(stream) => {
                        let client = Client::new(place.to_string(), stream);
                        return Ok(TcpStore { client, peer: *place, _server: server });
                    }
                    Err(Refusal::Status(Status::WrongWorld)) => {
                        let what = format!(
                            "it was started for a world of {world}, and the job at {place} has another"
                        );
                        return Err(failed(what));
                    }
                    Err(Refusal::Status(Status::Taken)) => {
                        return Err(failed(format!(
                            "another process has come as rank {rank}: was it started twice?"
                        )));
                    }
                    Err(Refusal::Status(status)) => {
                        return Err(failed(format!("the store at {place} refused: {status:?}")));
                    }
                    // One of several ports may be somebody else's.
                    Err(refusal @ (Refusal::Stranger(_) | Refusal::Unproved)) if places.len() == 1 => {
                        let what = refusal.describe();
                        return Err(failed(format!(
                            "what listens at {place} is not this job's store: {what}"
                        )));
                    }
                    Err(other) => last = format!("{place}: {}", other.describe()),
                }
            }
            if deadline.passed() {
                return Err(failed(format!(
                    "nobody serves the job's store at {name} within {:?}: is its launcher or rank 0 running? ({last})",
                    deadline.budget()
                )));
            }
            std::thread::sleep(pause.min(deadline.remaining()));
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// One attempt.
    fn dial(self, to: SocketAddr, until: Instant) -> Result<TcpStream, Refusal> {
        let unreachable = |e: io::Error| Refusal::Unreachable(e);
        let hello = Hello::new(Channel::Store, self.world, self.rank, 0, [0; 16]);
        let hello = hello.map_err(|e| unreachable(io::Error::other(e)))?;
        let mut dial = Dial::begin(to, &hello, &options()).map_err(unreachable)?;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let ready = poll(&mut [PollFd::new(dial.stream(), dial.interest())], Some(&timeout));
            match ready {
                Ok(0) if left.is_zero() => return Err(unreachable(io::ErrorKind::TimedOut.into())),
                Ok(n) if n > 0 && dial.advance(self.secret)? => break,
                _ => {}
            }
        }
        let stream = dial.into_stream();
        stream.set_nonblocking(false).and_then(|()| stream.set_nodelay(true)).map_err(unreachable)?;
        Ok(stream)
    }
}

impl Wire for TcpStream {
    fn limit(&self, deadline: Deadline) -> io::Result<()> {
        let left = deadline.remaining();
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.set_read_timeout(Some(left))?;
        self.set_write_timeout(Some(left))
    }
}

impl Store for TcpStore {
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

/// This host alone, at a port that the system chooses.
pub const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(10))
    }

    fn moment() -> Deadline {
        Deadline::after(Duration::from_millis(200))
    }

    #[test]
    fn ranks_that_know_the_secret_share_a_store() {
        let secret = Secret::generate().unwrap();
        let server = TcpStoreServer::start(LOOPBACK, 3, &secret).unwrap();
        let meet = |rank| TcpStore::meet(&server.address(), rank, 3, &secret, soon()).unwrap();
        // Rank 0 finds that the launcher serves it.
        let (zero, two) = (meet(0), meet(2));
        std::thread::scope(|s| {
            let waiting = s.spawn(|| two.get("k", soon()).unwrap());
            zero.set("k", b"value", soon()).unwrap();
            assert_eq!(waiting.join().unwrap(), b"value");
        });
        assert_eq!(zero.add("n", 2, soon()).unwrap(), 2);
        assert_eq!(two.add("n", 3, soon()).unwrap(), 5);
    }

    #[test]
    fn who_does_not_belong_is_told_why() {
        let secret = Secret::generate().unwrap();
        let server = TcpStoreServer::start(LOOPBACK, 3, &secret).unwrap();
        let error = |world, secret: &Secret| {
            TcpStore::meet(&server.address(), 1, world, secret, soon()).unwrap_err().to_string()
        };
        assert!(error(2, &secret).contains("started for a world of 2"), "{}", error(2, &secret));
        let stranger = Secret::generate().unwrap();
        assert!(error(3, &stranger).contains("another secret"), "{}", error(3, &stranger));
        let address = server.address();
        drop(server);
        let error = TcpStore::meet(&address, 1, 3, &secret, moment()).unwrap_err().to_string();
        assert!(error.contains("is its launcher or rank 0 running?"), "{error}");
        assert!(TcpStore::meet("tcp:nonsense", 1, 3, &secret, moment()).is_err());
    }

    #[test]
    fn rank_0_serves_a_job_without_a_launcher() {
        let secret = Secret::generate().unwrap();
        let of_job = |rank| TcpStore::of_job("torchrun x", "127.0.0.1", rank, 2, &secret, soon()).unwrap();
        std::thread::scope(|s| {
            let other = s.spawn(|| of_job(1).get("k", soon()).unwrap());
            let zero = of_job(0);
            zero.set("k", b"v", soon()).unwrap();
            assert_eq!(other.join().unwrap(), b"v");
        });
    }
}
