//! A faulty link between two of three ranks: a relay that, at one byte of what passes, delays, fragments, damages, cuts,
//! resets or stops. Nobody may take what it does for data, and nobody hangs.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use tensorwire::transports::store::{Store, StoreServer, UnixStore};
use tensorwire::transports::tcp::{Secret, TcpOptions};
use tensorwire::{Communicator, Deadline, Error, ReduceOp, Result};

use crate::common::tcp_threads;

/// Far above what any of these jobs takes.
const HANG: Duration = Duration::from_secs(60);

/// Bytes of a handshake, either way, and more: a fault beyond strikes what carries data.
const HANDSHAKE: usize = 300;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// From here on some hundred bytes come one by one.
    Fragment,
    Delay,
    /// From here on everything comes at 4 KiB in 50 ms.
    Slow,
    /// These bits of the byte are turned.
    Corrupt(u8),
    /// Both directions end in order, as where a process has ended.
    Truncate,
    Reset,
    /// Nothing passes any more, and nobody is told.
    Stop,
}

/// What strikes the first connection that is made, after so many bytes from the side that dials, or to it.
#[derive(Clone, Copy, Debug)]
struct Plan {
    fault: Fault,
    outward: bool,
    at: usize,
}

/// Passes on what comes to `address`; gone when dropped.
#[derive(Debug)]
struct Relay {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    fn start(to: SocketAddr, plan: Option<Plan>) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            std::thread::scope(|s| {
                let mut plan = plan;
                while let Ok((outer, _)) = listener.accept() {
                    if stopped.load(Ordering::Acquire) {
                        return;
                    }
                    let Ok(inner) = TcpStream::connect(to) else { continue };
                    let (plan, stopped) = (plan.take(), &*stopped);
                    s.spawn(move || pass([outer, inner], plan, stopped));
                }
            });
        });
        Relay { address, stop, thread: Some(thread) }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().unwrap().join();
    }
}

/// Passes on what comes from the side that dials, the first, to the other, and the other way round.
fn pass(mut sides: [TcpStream; 2], plan: Option<Plan>, stop: &AtomicBool) {
    let mut passed = [0; 2];
    let mut chunk = [0; 4096];
    for side in &sides {
        side.set_nodelay(true).unwrap();
    }
    loop {
        let ready = {
            let mut fds = [0, 1].map(|i| PollFd::new(&sides[i], PollFlags::IN));
            let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 10_000_000 }));
            fds.map(|f| !f.revents().is_empty())
        };
        if stop.load(Ordering::Acquire) {
            return;
        }
        for from in (0..2).filter(|i| ready[*i]) {
            let n = match sides[from].read(&mut chunk) {
                Ok(n @ 1..) => n,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Ok(0) | Err(_) => return,
            };
            let bytes = &mut chunk[..n];
            let ours = plan.filter(|p| p.outward == (from == 0));
            let struck = ours.filter(|p| (passed[from]..passed[from] + n).contains(&p.at));
            if ours.is_some_and(|p| p.fault == Fault::Slow && passed[from] >= p.at) {
                std::thread::sleep(Duration::from_millis(50));
            }
            let at = struck.map_or(0, |p| p.at - passed[from]);
            passed[from] += n;
            let to = &mut sides[1 - from];
            let sent = match struck.map(|p| p.fault) {
                None | Some(Fault::Slow) => to.write_all(bytes),
                Some(Fault::Fragment) => {
                    let (whole, single) = bytes.split_at(at);
                    let (single, rest) = single.split_at(single.len().min(300));
                    to.write_all(whole)
                        .and_then(|()| single.iter().try_for_each(|b| to.write_all(&[*b])))
                        .and_then(|()| to.write_all(rest))
                }
                Some(Fault::Delay) => to.write_all(&bytes[..at]).and_then(|()| {
                    std::thread::sleep(Duration::from_millis(20));
                    to.write_all(&bytes[at..])
                }),
                Some(Fault::Corrupt(bits)) => {
                    bytes[at] ^= bits;
                    to.write_all(bytes)
                }
                Some(Fault::Truncate) => {
                    let _ = to.write_all(&bytes[..at]);
                    return;
                }
                Some(Fault::Reset) => {
                    let _ = to.write_all(&bytes[..at]);
                    sides.iter().for_each(|s| sockopt::set_socket_linger(s, Some(Duration::ZERO)).unwrap());
                    return;
                }
                Some(Fault::Stop) => {
                    let _ = to.write_all(&bytes[..at]);
                    while !stop.load(Ordering::Acquire) {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    return;
                }
            };
            if sent.is_err() {
                return;
            }
        }
    }
}

/// A rank's store, which gives it relays in place of its peers' addresses.
#[derive(Debug)]
struct Through {
    store: UnixStore,
    rank: usize,
    plan: Option<Plan>,
    own: Mutex<String>,
    relays: Mutex<Vec<(String, Relay)>>,
}

impl Through {
    /// The place of the relay to the rank at a place, an address and processors; the plan is for ranks 0 and 1.
    fn relay(&self, peer: usize, place: &str) -> String {
        if *self.own.lock().unwrap() == place {
            return place.to_owned();
        }
        let (address, processors) = place.split_once('/').unwrap();
        let mut relays = self.relays.lock().unwrap();
        if !relays.iter().any(|(to, _)| to == address) {
            let plan = self.plan.filter(|_| self.rank + peer == 1);
            relays.push((address.to_owned(), Relay::start(address.parse().unwrap(), plan)));
        }
        let (_, relay) = relays.iter().find(|(to, _)| to == address).unwrap();
        format!("{}/{processors}", relay.address)
    }
}

impl Store for Through {
    fn set(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()> {
        let mut value = value.to_vec();
        if key.contains("/at/") {
            *self.own.lock().unwrap() = String::from_utf8(value.clone()).unwrap();
        } else if key.ends_with("/all") {
            // What rank 0 has from its store, as it is without the relays.
            let relays = self.relays.lock().unwrap();
            let real = |place: &str| {
                let (address, processors) = place.split_once('/').unwrap();
                let relay = relays.iter().find(|r| r.1.address.to_string() == address);
                relay.map_or(place.to_owned(), |r| format!("{}/{processors}", r.0))
            };
            let text = String::from_utf8(value).unwrap();
            value = text.split(' ').map(real).collect::<Vec<_>>().join(" ").into_bytes();
        }
        self.store.set(key, &value, deadline)
    }

    fn get(&self, key: &str, deadline: Deadline) -> Result<Vec<u8>> {
        let value = self.store.get(key, deadline)?;
        let text = || String::from_utf8(value.clone()).unwrap();
        Ok(if let Some((_, peer)) = key.split_once("/at/") {
            self.relay(peer.parse().unwrap(), &text()).into_bytes()
        } else if key.ends_with("/all") {
            let all = text();
            let all = all.split(' ').enumerate().map(|(peer, address)| self.relay(peer, address));
            all.collect::<Vec<_>>().join(" ").into_bytes()
        } else {
            value
        })
    }

    fn add(&self, key: &str, delta: i64, deadline: Deadline) -> Result<i64> {
        self.store.add(key, delta, deadline)
    }
}

/// How a rank fared.
#[derive(Debug)]
enum Outcome {
    Right,
    Wrong,
    Failed(Error),
}

fn calls(comm: &Communicator) -> Result<bool> {
    let (rank, world) = (comm.rank() as u32, comm.world() as u32);
    for (call, len) in [1u32, 50, 3000, 0, 40_000, 7].into_iter().enumerate() {
        let mut data: Vec<u32> = (0..len).map(|i| i * (rank + 1) + call as u32).collect();
        comm.all_reduce(&mut data, ReduceOp::Sum)?;
        let sum = |i: u32| i * (world * (world + 1) / 2) + world * call as u32;
        if !data.into_iter().eq((0..len).map(sum)) {
            return Ok(false);
        }
    }
    comm.barrier().map(|()| true)
}

/// Ranks of which the first two are connected through what the plan says; how each fared.
fn job(world: usize, plan: Option<Plan>, checksum: bool, timeout: Duration) -> Vec<Outcome> {
    let (server, secret) = (StoreServer::start().unwrap(), Secret::generate().unwrap());
    let (tell, told) = mpsc::channel();
    for rank in 0..world {
        let (tell, secret, address) = (tell.clone(), secret.clone(), server.address());
        std::thread::spawn(move || {
            let store = UnixStore::connect(&address, Deadline::after(HANG)).unwrap();
            let through = Through { store, rank, plan, own: Mutex::default(), relays: Mutex::default() };
            // Rank 0's choice holds, whatever the others say.
            let checksum = checksum && rank == 0;
            let options = TcpOptions { timeout, checksum, ..TcpOptions::default() };
            let comm = Communicator::join_tcp(rank, world, &through, None, &secret, &options).unwrap();
            let outcome = match calls(&comm) {
                Ok(true) => Outcome::Right,
                Ok(false) => Outcome::Wrong,
                Err(e) => Outcome::Failed(e),
            };
            tell.send((rank, outcome, comm, through)).unwrap();
        });
    }
    let mut all: Vec<_> = (0..world)
        .map(|_| told.recv_timeout(HANG).unwrap_or_else(|_| panic!("{plan:?}: a rank hangs")))
        .collect();
    all.sort_by_key(|(rank, ..)| *rank);
    all.into_iter().map(|(_, outcome, ..)| outcome).collect()
}

/// Runs a job for each plan, some at once, and gives what came of it to `check`.
fn each(plans: &[Plan], checksum: bool, timeout: Duration, check: impl Fn(Plan, &[Outcome]) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                while let Some(plan) = plans.get(next.fetch_add(1, Ordering::Relaxed)) {
                    check(*plan, &job(3, Some(*plan), checksum, timeout));
                }
            });
        }
    });
}

/// In both directions, in handshakes, headers and payloads.
fn plans(faults: &[Fault], offsets: impl Iterator<Item = usize> + Clone) -> Vec<Plan> {
    let with = |fault: Fault| offsets.clone().map(move |at| Plan { fault, outward: at % 2 == 0, at });
    faults.iter().flat_map(|fault| with(*fault)).collect()
}

/// The handshake's bytes and, in steps that no header's size divides, those of the first frames; then some far ones.
fn offsets() -> impl Iterator<Item = usize> + Clone {
    (0..HANDSHAKE).step_by(77).chain((HANDSHAKE..1200).step_by(31)).chain([5000, 12_345, 70_001])
}

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_secs(1);

#[test]
fn what_comes_late_or_in_pieces_is_right() {
    for checksum in [false, true] {
        let plans = plans(&[Fault::Fragment, Fault::Delay], offsets().step_by(3));
        each(&plans, checksum, LONG, |plan, all| {
            assert!(all.iter().all(|o| matches!(o, Outcome::Right)), "{plan:?}: {all:?}");
        });
    }
}

/// Its 80 KB, twice, take as long as they take: the timeout is for a peer from whom nothing comes and whom nothing
/// reaches. One side has all it needs while what it sent is still under way for about the timeout.
#[test]
fn a_call_may_take_longer_than_the_timeout_while_something_moves() {
    for outward in [true, false] {
        let plan = Plan { fault: Fault::Slow, outward, at: HANDSHAKE };
        let start = Instant::now();
        let all = job(2, Some(plan), false, SHORT);
        assert!(all.iter().all(|o| matches!(o, Outcome::Right)), "{plan:?}: {all:?}");
        assert!(start.elapsed() > SHORT, "{plan:?}: the link wasn't slow");
    }
}

#[test]
fn a_connection_that_ends_anywhere_is_named_on_every_rank() {
    each(&plans(&[Fault::Truncate, Fault::Reset], offsets()), false, LONG, |plan, all| {
        for outcome in all {
            match outcome {
                // A handshake is tried again.
                Outcome::Right => assert!(plan.at < HANDSHAKE, "{plan:?}: {all:?}"),
                Outcome::Failed(Error::PeerLost { peer: 0 | 1, .. }) => {}
                wrong => panic!("{plan:?}: {wrong:?}"),
            }
        }
    });
}

#[test]
fn a_connection_that_stops_anywhere_is_named_on_every_rank() {
    each(&plans(&[Fault::Stop], [150, 310, 351, 900, 12_345].into_iter()), false, SHORT, |plan, all| {
        let named =
            |o: &Outcome| matches!(o, Outcome::Failed(Error::Timeout { .. } | Error::PeerLost { .. }));
        assert!(all.iter().all(named), "{plan:?}: {all:?}");
    });
}

#[test]
fn with_checksums_damage_is_named_on_every_rank_wherever_it_is() {
    each(&plans(&[Fault::Corrupt(1), Fault::Corrupt(0x80)], offsets()), true, LONG, |plan, all| {
        for outcome in all {
            match outcome {
                // A handshake is tried again, or the peer refuses it.
                Outcome::Right | Outcome::Failed(Error::PeerLost { .. }) if plan.at < HANDSHAKE => {}
                Outcome::Failed(Error::Corrupted { from, to, .. }) if from + to == 1 => {}
                wrong => panic!("{plan:?}: {wrong:?}"),
            }
        }
    });
}

#[test]
fn without_checksums_damage_neither_crashes_nor_hangs() {
    each(&plans(&[Fault::Corrupt(0x10)], offsets()), false, SHORT, |plan, all| {
        // Where it strikes an element, a sum is wrong: that is what checksums are for.
        let known = |o: &Outcome| match o {
            Outcome::Right | Outcome::Wrong => true,
            Outcome::Failed(e) => e.ends_group(),
        };
        assert!(all.iter().all(known), "{plan:?}: {all:?}");
    });
}

/// Megabytes that the kernel holds for either side don't stand between a rank and the reason why its group has ended: not
/// where the peer reads nothing, for it computes, nor where this rank leaves, and hasn't read what the peer sends.
#[test]
fn the_cause_reaches_a_rank_behind_full_buffers() {
    for (round, computes) in [true, false, false, false].into_iter().enumerate() {
        let (gone, is_gone) = mpsc::channel();
        let is_gone = Mutex::new(is_gone);
        tcp_threads(2, &TcpOptions { timeout: HANG, ..TcpOptions::default() }, |_, comm| {
            comm.barrier().unwrap();
            let mut data = vec![1f32; 16 << 20];
            let mut calls = || loop {
                if let Err(error) = comm.all_reduce(&mut data, ReduceOp::Sum) {
                    return error;
                }
            };
            let error = match comm.rank() {
                0 => std::thread::scope(|s| {
                    s.spawn(|| {
                        std::thread::sleep(Duration::from_millis(100 + 7 * round as u64));
                        comm.abort("pressed stop");
                    });
                    calls()
                }),
                _ if computes => {
                    is_gone.lock().unwrap().recv_timeout(HANG).unwrap();
                    calls()
                }
                _ => calls(),
            };
            let named = matches!(&error, Error::Aborted { by: 0, why, .. } if why == "pressed stop");
            assert!(named, "rank {}: {error}", comm.rank());
            if comm.rank() == 0 {
                drop(comm);
                gone.send(()).unwrap();
            }
        });
    }
}
