//! A store served over TCP, to ranks on any hosts that know the job's secret: by the launcher, or by rank 0.
//!
//! A connection begins with the handshake of the ranks' own connections; a stranger gets no further than that.

use std::cell::Cell;
use std::io::{self, IoSlice, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tensorwire_core::{Deadline, Error, Result};

use super::Store;
use super::answer::{Client, NOBODY, Table, Unfit, Wire, serve};
use crate::tcp::store::{
    Arrival, Channel, Dial, Endpoint, Hello, Identity, Refusal, Status, Stream, listen, outward,
};
use crate::tcp::{Secret, TcpOptions};

/// Bytes that the kernel holds for a connection, in each direction: requests are short.
const BUFFER: usize = 64 << 10;

fn options() -> TcpOptions {
    TcpOptions { send_buffer: Some(BUFFER), receive_buffer: Some(BUFFER), ..TcpOptions::default() }
}

/// How long one attempt to reach the store takes at most, where there are several places to look.
const ATTEMPT: Duration = Duration::from_secs(1);

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
        secret.check(Identity::Store)?;
        let options = options();
        let listener = listen(at.ip(), at.port()..=at.port(), &options);
        let listener = listener.map_err(|e| Error::os(format!("serving the job's store at {at}"), e))?;
        let (table, own) = (Arc::new(Table::of(world)), secret.clone());
        let admit = move |hello: &Hello, arrival: Arrival| admit(hello, arrival, &own, &table);
        let endpoint =
            Endpoint::serve(listener, "the store".into(), secret.clone(), &options, Some(Box::new(admit)))?;
        Ok(TcpStoreServer { endpoint })
    }

    /// What ranks are given as `TENSORWIRE_STORE`: `tcp:HOST:PORT`.
    pub fn address(&self) -> String {
        format!("tcp:{}", self.endpoint.address())
    }
}

/// Serves a client that has proved itself, in a thread of its own, unless it doesn't belong here.
fn admit(hello: &Hello, arrival: Arrival, secret: &Secret, table: &Arc<Table>) {
    if hello.channel != Channel::Store {
        arrival.settle(secret, Status::NoGroup);
        return;
    }
    if hello.from != NOBODY && !arrival.is_from(Identity::Rank(hello.from as usize)) {
        table.refuse(format!("a process that came as rank {} has another rank's certificate", hello.from));
        arrival.settle(secret, Status::WrongName);
        return;
    }
    let status = match table.enter(hello.from, hello.world, hello.instance) {
        Err(Unfit::World(_)) => Status::WrongWorld,
        Err(Unfit::Rank) => Status::WrongRank,
        Err(Unfit::Taken) => Status::Taken,
        Ok(()) => Status::Accepted,
    };
    let rank = hello.from;
    let Some(stream) = arrival.settle(secret, status) else {
        if status == Status::Accepted {
            table.leave(rank);
        }
        return;
    };
    let own = table.clone();
    let work = move || {
        // This thread has nothing else to do than to wait. A client whose host is cut off is let go of in the end.
        if stream.socket().is_some_and(|s| rustix::net::sockopt::set_socket_keepalive(s, true).is_ok()) {
            serve(Waiting::new(stream), &own);
        }
        own.leave(rank);
    };
    // A client that no thread can be had for sees its connection closed.
    if std::thread::Builder::new().name("tensorwire-store".into()).spawn(work).is_err() {
        table.leave(rank);
    }
}

/// A rank's connection to a [`TcpStoreServer`].
#[derive(Debug)]
pub struct TcpStore {
    client: Client<Waiting>,
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
        let resolved = resolve(place, deadline)?;
        let who = Who { rank, world, secret };
        // Where the launcher serves, the port is taken; where it is another host's, it can't be had.
        let mut unserved = None;
        let server = resolved
            .iter()
            .filter(|_| rank == 0)
            .find_map(|at| TcpStoreServer::start(*at, world, secret).map_err(|e| unserved = Some(e)).ok());
        who.enter(&resolved, place, server, unserved, deadline)
    }

    /// Meets the other ranks of the job called `job` at `host`, which is rank 0's: at `port`, or else at one that follows
    /// from the job's name and secret, or the next of several if that one is taken.
    ///
    /// # Errors
    /// As for [`meet`](TcpStore::meet), and if none of the ports is free.
    pub fn of_job(
        job: &str,
        host: &str,
        port: Option<u16>,
        rank: usize,
        world: usize,
        secret: &Secret,
        deadline: Deadline,
    ) -> Result<TcpStore> {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let ip = resolve((host, 1), deadline)?[0].ip();
        let ports = port.map_or_else(|| job_ports(job, secret).to_vec(), |port| vec![port]);
        let places: Vec<_> = ports.into_iter().map(|port| SocketAddr::new(ip, port)).collect();
        let who = Who { rank, world, secret };
        if rank != 0 {
            return who.enter(&places, host, None, None, deadline);
        }
        // A host that calls itself by an address of its own alone, as Debian does, is called by another elsewhere.
        let is_literal = host.parse::<IpAddr>().is_ok() || host == "localhost";
        let server = loop {
            match who.serve(&places, ip.is_loopback() && !is_literal) {
                Ok(Some(server)) => break server,
                // An earlier run of the same job may be ending.
                Ok(None) if !deadline.passed() => std::thread::sleep(ATTEMPT.min(deadline.remaining()) / 20),
                Ok(None) => return Err(who.twice()),
                Err(e) => return Err(e),
            }
        };
        let mut store = who.enter(&places, host, Some(server), None, deadline)?;
        if store.peer.ip().is_unspecified() {
            store.peer = outward().unwrap_or(SocketAddr::new(ip, store.peer.port()));
        }
        Ok(store)
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

/// How long a name that isn't known yet, such as that of a pod which is being started, is asked for again.
const NAMING: Duration = Duration::from_secs(60);

fn resolve(
    place: impl ToSocketAddrs + Copy + std::fmt::Debug,
    deadline: Deadline,
) -> Result<Vec<SocketAddr>> {
    let until = Deadline::after(NAMING.min(deadline.remaining()));
    loop {
        let all = place.to_socket_addrs().map(Iterator::collect::<Vec<_>>);
        match all {
            Ok(all) if !all.is_empty() => return Ok(all),
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => {
                return Err(Error::Config(format!(
                    "the store address {place:?} is not understood: it reads tcp:HOST:PORT ({e})"
                )));
            }
            other if until.passed() => {
                let why = other.err().map_or_else(|| "it has no address".to_owned(), |e| e.to_string());
                return Err(Error::Config(format!("the host of the store {place:?} can't be found: {why}")));
            }
            _ => std::thread::sleep(Duration::from_millis(200).min(until.remaining())),
        }
    }
}

impl Who<'_> {
    fn twice(self) -> Error {
        let what = format!("another process has come as rank {}: was it started twice?", self.rank);
        Error::Rendezvous { rank: self.rank, world: self.world, what }
    }

    /// Rank 0: serves at the first of `places` that is free; `None` if this job's store is served at one already.
    fn serve(self, places: &[SocketAddr], on_all: bool) -> Result<Option<TcpStoreServer>> {
        let mut taken = None;
        for place in places {
            let any: IpAddr =
                if place.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            let any = SocketAddr::new(any, place.port());
            let kind = |e: &Error| match e {
                Error::Os { source, .. } => source.kind(),
                _ => io::ErrorKind::Other,
            };
            let start = |at| TcpStoreServer::start(at, self.world, self.secret);
            let started = match start(if on_all { any } else { *place }) {
                // Its name is that of a gateway in front of it.
                Err(e) if kind(&e) == io::ErrorKind::AddrNotAvailable => start(any),
                started => started,
            };
            match started {
                Ok(server) => return Ok(Some(server)),
                Err(e) if kind(&e) == io::ErrorKind::AddrInUse => {
                    // Asked as no rank, so that it takes nobody's place.
                    let nobody = Who { rank: NOBODY as usize, ..self };
                    if let Err(Refusal::Status(_)) = nobody.dial(*place, Instant::now() + ATTEMPT) {
                        return Ok(None);
                    }
                    taken = Some(e);
                }
                Err(e) => return Err(e),
            }
        }
        Err(taken.unwrap_or_else(|| Error::invalid("no port to serve the job's store at")))
    }

    /// Connects to the store at one of `places`, trying again until the deadline while nobody serves there; this rank doesn't
    /// if it was `unserved`.
    fn enter(
        self,
        places: &[SocketAddr],
        name: &str,
        server: Option<TcpStoreServer>,
        unserved: Option<Error>,
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
                        let client = Client::new(place.to_string(), Waiting::new(stream));
                        return Ok(TcpStore { client, peer: *place, _server: server });
                    }
                    Err(Refusal::Status(Status::WrongWorld)) => {
                        let what = format!(
                            "it was started for a world of {world}, and the job at {place} has another"
                        );
                        return Err(failed(what));
                    }
                    Err(Refusal::Status(Status::Taken)) => {
                        return Err(self.twice());
                    }
                    Err(refusal @ Refusal::Status(Status::WrongName)) => {
                        return Err(failed(format!("the store at {place}: {}", refusal.describe())));
                    }
                    Err(Refusal::Status(status)) => {
                        return Err(failed(format!("the store at {place} refused: {status:?}")));
                    }
                    // One of several ports may be somebody else's.
                    Err(refusal @ (Refusal::Stranger(_) | Refusal::Unproved | Refusal::Untrusted))
                        if places.len() == 1 =>
                    {
                        let what = refusal.describe();
                        return Err(failed(format!(
                            "what listens at {place} is not this job's store: {what}"
                        )));
                    }
                    Err(other) => last = format!("{place}: {}", other.describe()),
                }
            }
            if deadline.passed() {
                let unserved = unserved.map(|why| format!("; nor could this rank serve it: {why}"));
                return Err(failed(format!(
                    "nobody serves the job's store at {name} within {:?}: is its launcher or rank 0 running? ({last}){}",
                    deadline.budget(),
                    unserved.unwrap_or_default()
                )));
            }
            std::thread::sleep(pause.min(deadline.remaining()));
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// One attempt.
    fn dial(self, to: SocketAddr, until: Instant) -> Result<Stream, Refusal> {
        let unreachable = |e: io::Error| Refusal::Unreachable(e);
        let hello = Hello::new(Channel::Store, self.world, self.rank, 0, [0; 16]);
        let hello = hello.map_err(|e| unreachable(io::Error::other(e)))?;
        let mut dial =
            Dial::begin(to, Identity::Store, &hello, self.secret, &options()).map_err(unreachable)?;
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
        stream.socket().map_or(Ok(()), |s| s.set_nodelay(true)).map_err(unreachable)?;
        Ok(stream)
    }
}

/// A connection whose reader and writer wait, up to a deadline.
#[derive(Debug)]
struct Waiting {
    stream: Stream,
    deadline: Cell<Option<Deadline>>,
}

impl Waiting {
    fn new(stream: Stream) -> Waiting {
        Waiting { stream, deadline: Cell::new(None) }
    }

    /// Waits until the socket may be ready.
    fn wait(&self, what: PollFlags) -> io::Result<()> {
        let left = self.deadline.get().map(|deadline| deadline.remaining());
        if left.is_some_and(|left| left.is_zero()) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let timeout =
            left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
        match poll(&mut [PollFd::new(&self.stream, what)], timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

impl Read for Waiting {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.stream.receive(into)? {
                Some(n) => return Ok(n),
                None => self.wait(PollFlags::IN)?,
            }
        }
    }
}

impl Write for Waiting {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.stream.send(&[IoSlice::new(bytes)])? {
                Some(n) => return Ok(n),
                None => self.wait(PollFlags::OUT)?,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Wire for Waiting {
    fn limit(&self, deadline: Option<Deadline>) -> io::Result<()> {
        if deadline.is_some_and(|deadline| deadline.passed()) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.deadline.set(deadline);
        Ok(())
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
pub const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

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
    fn a_second_rank_0_of_a_job_is_told_so_and_takes_nobodys_place() {
        let secret = Secret::generate().unwrap();
        let of_job = |deadline| TcpStore::of_job("twice", "127.0.0.1", None, 0, 2, &secret, deadline);
        let zero = of_job(soon()).unwrap();
        let twin = of_job(moment()).unwrap_err().to_string();
        assert!(twin.contains("another process has come as rank 0"), "{twin}");
        zero.set("k", b"v", soon()).unwrap();
        assert_eq!(zero.get("k", soon()).unwrap(), b"v");
        // A port of its own that somebody else has is an error, not another job's store.
        let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = Some(other.local_addr().unwrap().port());
        let taken =
            TcpStore::of_job("x", "localhost", port, 0, 2, &secret, moment()).unwrap_err().to_string();
        assert!(taken.contains("in use"), "{taken}");
    }

    #[test]
    fn who_waits_in_vain_learns_who_was_refused() {
        let secret = Secret::generate().unwrap();
        let server = TcpStoreServer::start(LOOPBACK, 2, &secret).unwrap();
        let zero = TcpStore::meet(&server.address(), 0, 2, &secret, soon()).unwrap();
        TcpStore::meet(&server.address(), 1, 3, &secret, soon()).unwrap_err();
        let waits = zero.get("at/1", moment()).unwrap_err().to_string();
        assert!(waits.contains("a process that came as rank 1 was started for a world of 3"), "{waits}");
    }

    #[test]
    fn rank_0_says_that_its_port_is_taken_by_one_who_is_no_store() {
        let secret = Secret::generate().unwrap();
        let other = std::net::TcpListener::bind(LOOPBACK).unwrap();
        let place = other.local_addr().unwrap().to_string();
        let why = |rank| TcpStore::meet(&place, rank, 2, &secret, moment()).unwrap_err().to_string();
        assert!(why(0).contains("timed out); nor could this rank serve it: "), "{}", why(0));
        assert!(why(0).contains("Address already in use"), "{}", why(0));
        assert!(why(1).ends_with("timed out)"), "{}", why(1));
    }

    #[test]
    fn rank_0_serves_a_job_without_a_launcher() {
        let secret = Secret::generate().unwrap();
        let of_job =
            |rank| TcpStore::of_job("torchrun x", "127.0.0.1", None, rank, 2, &secret, soon()).unwrap();
        std::thread::scope(|s| {
            let other = s.spawn(|| of_job(1).get("k", soon()).unwrap());
            let zero = of_job(0);
            zero.set("k", b"v", soon()).unwrap();
            assert_eq!(other.join().unwrap(), b"v");
        });
    }
}
