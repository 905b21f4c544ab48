//! Ranks over QUIC: what is not as it is over TLS. That collectives work over it, the other files show.

use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::Signal;
use tensorwire::transports::store::{Store, StoreServer, UnixStore};
use tensorwire::transports::tcp::{Authority, Congestion, Secret, TcpOptions};
use tensorwire::{Communicator, Deadline, Error, ReduceOp, Result};

use crate::processes::{assert_killed_is_named, assert_others_are_named};
use crate::tcp::{random_bytes, unharmed_with};
use crate::tls::{assert_both_named, barrier_with, secured, secured_job, tls};

/// Long enough for a busy machine.
const SOON: Duration = Duration::from_secs(20);

fn over(congestion: Congestion) -> TcpOptions {
    TcpOptions { quic: Some(congestion), timeout: SOON, ..TcpOptions::default() }
}

#[test]
fn both_certificate_and_secret_are_needed() {
    let [secret, other] = [(); 2].map(|()| Secret::generate().unwrap());
    let [ours, theirs] = [(); 2].map(|()| Authority::generate().unwrap());
    let options = over(Congestion::Cubic);
    let zero = secured(&ours, 0, secret.clone());
    let barrier = |one: Secret| barrier_with([zero.clone(), one], &options);
    assert_both_named(barrier(secured(&theirs, 1, secret.clone())), &["authority"]);
    // One that trusts both: only its own certificate is foreign, and rank 0 is the one that refuses.
    let mut foreign = theirs.rank(1).unwrap();
    let both =
        tensorwire::transports::tcp::Tls::from_pem(&(ours.ca() + &theirs.ca()), &foreign.cert, &foreign.key);
    assert_both_named(barrier(secret.clone().with_tls(both.unwrap())), &["authority"]);
    assert_both_named(barrier(secured(&ours, 1, other)), &["secret"]);
    foreign = ours.rank(1).unwrap();
    for result in barrier(secret.clone().with_tls(tls(&ours, &foreign))) {
        result.unwrap();
    }
    let server = StoreServer::start().unwrap();
    let store = UnixStore::connect(&server.address(), Deadline::after(SOON)).unwrap();
    let error = Communicator::join_tcp(0, 1, &store, None, &secret, &options).unwrap_err();
    assert!(matches!(&error, Error::Config(what) if what.contains("certificate")), "{error}");
}

#[test]
fn a_rank_over_tls_is_told_that_the_others_are_not() {
    let (secret, authority) = (Secret::generate().unwrap(), Authority::generate().unwrap());
    let server = StoreServer::start().unwrap();
    std::thread::scope(|s| {
        let join = |rank, options: TcpOptions| {
            let (server, secret) = (&server, secured(&authority, rank, secret.clone()));
            s.spawn(move || {
                let store = UnixStore::connect(&server.address(), Deadline::after(SOON)).unwrap();
                Communicator::join_tcp(rank, 2, &store, None, &secret, &options).unwrap_err().to_string()
            })
        };
        let soon = Duration::from_secs(2);
        let zero = join(0, TcpOptions { timeout: soon, ..over(Congestion::Cubic) });
        let one = join(1, TcpOptions { timeout: soon, ..TcpOptions::default() });
        assert!(one.join().unwrap().contains("TENSORWIRE_TRANSPORT"));
        assert!(zero.join().unwrap().contains("rank(s) [1] did not come"));
    });
}

#[test]
fn every_congestion_control_carries_large_messages() {
    for congestion in [Congestion::Cubic, Congestion::NewReno, Congestion::Bbr] {
        let (secret, authority) = (Secret::generate().unwrap(), Authority::generate().unwrap());
        let server = StoreServer::start().unwrap();
        std::thread::scope(|s| {
            for rank in 0..2 {
                let (server, secret) = (&server, secured(&authority, rank, secret.clone()));
                s.spawn(move || {
                    let store = UnixStore::connect(&server.address(), Deadline::after(SOON)).unwrap();
                    let comm =
                        Communicator::join_tcp(rank, 2, &store, None, &secret, &over(congestion)).unwrap();
                    let mut x = vec![1.0f32; 1 << 20];
                    comm.all_reduce(&mut x, ReduceOp::Sum).unwrap();
                    assert!(x.iter().all(|x| *x == 2.0), "{congestion:?}");
                });
            }
        });
    }
}

#[test]
fn a_killed_rank_is_named_on_every_other() {
    assert_killed_is_named(&[3], |body, world| secured_job("quic", body, world));
}

/// Over TCP, a host whose process is stopped goes on answering; over QUIC, nobody does.
#[test]
fn a_stopped_rank_is_silent_and_named() {
    let (mut job, _store) = secured_job("quic", "endless", 3);
    (0..3).for_each(|rank| drop(job.wait_for(rank, "at work")));
    job.signal(2, Signal::STOP);
    for rank in 0..2 {
        let (status, text) = job.join_within(rank, SOON);
        assert!(
            status.success() && text.contains(&format!("rank {rank}: lost rank 2 in all_reduce")),
            "{text}"
        );
        // Or did not answer, if it was stopped before they were connected.
        assert!(text.contains("its host") && text.contains("answer"), "{text}");
    }
}

#[test]
fn faults_look_as_they_do_over_tcp() {
    assert_others_are_named(|body, world| secured_job("quic", body, world));
}

/// A datagram that begins a connection, as far as a stranger can make one up: QUIC's version 1, and fresh identifiers.
fn initial(seed: &mut u64) -> Vec<u8> {
    let mut bytes = vec![0xc3, 0, 0, 0, 1, 8];
    bytes.extend(random_bytes(seed, 8));
    bytes.push(8);
    bytes.extend(random_bytes(seed, 8));
    // No token, and a length of two bytes.
    bytes.extend([0, 0x44, 0x9e]);
    bytes.extend(random_bytes(seed, 1200 - bytes.len()));
    bytes
}

#[test]
fn strangers_cost_bounded_memory_and_harm_nobody() {
    let authority = Authority::generate().unwrap();
    let (ca, any) = (authority.ca(), authority.any_rank().unwrap());
    let env = [
        ("TENSORWIRE_TRANSPORT", "quic"),
        ("TENSORWIRE_TLS_CA", &*ca),
        ("TENSORWIRE_TLS_CERT", &any.cert),
        ("TENSORWIRE_TLS_KEY", &any.key),
    ];
    unharmed_with(&env, |target| {
        let (threads, memory, files) = (target.most("task"), target.memory(), target.most("fd"));
        let mut seed = 7;
        for round in 0..20 {
            // Each from a port of its own.
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            for n in 0..500 {
                let port = target.ports[n % 3];
                let bytes = match n % 4 {
                    0 => random_bytes(&mut seed, 1 + (n * 7 + round) % 1400),
                    1 => initial(&mut seed),
                    // An initial of a version that there isn't, for which there is an answer.
                    2 => [&[0xc3, 9, 9, 9, 9], &initial(&mut seed)[5..]].concat(),
                    // What looks like data of a connection that there isn't.
                    _ => [&[0x43], &random_bytes(&mut seed, 100)[..]].concat(),
                };
                // A full queue drops it.
                let _ = socket.send_to(&bytes, port);
            }
        }
        assert_eq!(target.most("task"), threads, "a stranger is no reason for a thread");
        assert!(target.most("fd") <= files + 3, "{}", target.most("fd"));
        assert!(target.memory() < memory + 16384, "{} kB, then {}", memory, target.memory());
    });
}

/// Passes datagrams on to one peer, and its answers back, as a router does that hides who sends; when it moves, what it
/// passes on comes from another port.
#[derive(Debug)]
struct Relay {
    address: SocketAddr,
    moves: Arc<AtomicBool>,
    /// Datagrams that the peer has sent to the second port.
    followed: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    fn to(peer: SocketAddr) -> Relay {
        let out = move || {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.connect(peer).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        };
        let front = UdpSocket::bind("127.0.0.1:0").unwrap();
        front.set_nonblocking(true).unwrap();
        let address = front.local_addr().unwrap();
        let (moves, followed, stop) = <(Arc<AtomicBool>, Arc<AtomicUsize>, Arc<AtomicBool>)>::default();
        let thread = std::thread::spawn({
            let (moves, followed, stop) = (moves.clone(), followed.clone(), stop.clone());
            move || {
                let (mut back, mut moved, mut bytes) = (out(), false, vec![0; 65_536]);
                let mut from = None;
                while !stop.load(Ordering::Relaxed) {
                    if moves.load(Ordering::Relaxed) && !moved {
                        (back, moved) = (out(), true);
                    }
                    let mut idle = true;
                    if let Ok((n, sender)) = front.recv_from(&mut bytes) {
                        (from, idle) = (Some(sender), false);
                        let _ = back.send(&bytes[..n]);
                    }
                    if let (Ok(n), Some(to)) = (back.recv(&mut bytes), from) {
                        idle = false;
                        followed.fetch_add(usize::from(moved), Ordering::Relaxed);
                        let _ = front.send_to(&bytes[..n], to);
                    }
                    if idle {
                        std::thread::sleep(Duration::from_micros(50));
                    }
                }
            }
        });
        Relay { address, moves, followed, stop, thread: Some(thread) }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().unwrap().join();
    }
}

/// A store in which a rank finds a relay in the place of the other rank.
#[derive(Debug)]
struct Veiled<'a> {
    store: UnixStore,
    rank: usize,
    /// The relay to each rank.
    relays: &'a Mutex<HashMap<usize, Relay>>,
    own: Mutex<String>,
}

impl Store for Veiled<'_> {
    fn set(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()> {
        if key.ends_with(&format!("/at/{}", self.rank)) {
            *self.own.lock().unwrap() = String::from_utf8(value.to_vec()).unwrap();
        }
        self.store.set(key, value, deadline)
    }

    fn get(&self, key: &str, deadline: Deadline) -> Result<Vec<u8>> {
        let value = self.store.get(key, deadline)?;
        let relay = |to: usize, place: &str| {
            let (address, processors) = place.split_once('/').unwrap();
            let relay = Relay::to(address.parse().unwrap());
            let at = format!("{}/{processors}", relay.address);
            self.relays.lock().unwrap().insert(to, relay);
            at
        };
        let text = || std::str::from_utf8(&value).unwrap();
        if self.rank == 0 && key.ends_with("/at/1") {
            return Ok(relay(1, text()).into_bytes());
        }
        if self.rank == 1 && key.ends_with("/all") {
            let (zero, _) = text().split_once(' ').unwrap();
            return Ok(format!("{} {}", relay(0, zero), self.own.lock().unwrap()).into_bytes());
        }
        Ok(value)
    }

    fn add(&self, key: &str, by: i64, deadline: Deadline) -> Result<i64> {
        self.store.add(key, by, deadline)
    }
}

#[test]
fn a_job_goes_on_when_a_peers_address_changes() {
    let (secret, authority) = (Secret::generate().unwrap(), Authority::generate().unwrap());
    let (server, relays) = (StoreServer::start().unwrap(), Mutex::default());
    std::thread::scope(|s| {
        for rank in 0..2 {
            let (server, relays, secret) = (&server, &relays, secured(&authority, rank, secret.clone()));
            s.spawn(move || {
                let store = UnixStore::connect(&server.address(), Deadline::after(SOON)).unwrap();
                let store = Veiled { store, rank, relays, own: Mutex::default() };
                let comm =
                    Communicator::join_tcp(rank, 2, &store, None, &secret, &over(Congestion::Cubic)).unwrap();
                for n in 0..60 {
                    if n == 20 && rank == 0 {
                        relays
                            .lock()
                            .unwrap()
                            .values()
                            .for_each(|r: &Relay| r.moves.store(true, Ordering::Relaxed));
                    }
                    let mut x = vec![n as f32 + rank as f32; 1 + n * 1000];
                    comm.all_reduce(&mut x, ReduceOp::Sum).unwrap();
                    assert!(x.iter().all(|x| *x == 2.0 * n as f32 + 1.0), "call {n}");
                }
            });
        }
    });
    let relays = relays.into_inner().unwrap();
    let followed: usize = relays.values().map(|r| r.followed.load(Ordering::Relaxed)).sum();
    assert!(followed > 10, "the peer has sent {followed} datagrams to the new address");
}
