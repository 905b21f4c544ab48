//! A group as the threads of one rank see it: its connections as they are made, why it ended, and its seat, in which
//! the connections rest between calls.

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tensorwire_core::{Call, Error, Result};

use super::hello::{Channel, GroupId, Hello, Status};
use super::mesh::Mesh;
use super::negotiate::Arrival;
use super::secret::Secret;
use super::socket::Wake;
use crate::shm::verdict::Verdict;

/// Calls that a rank remembers of itself.
const REMEMBERED: usize = 16;

/// What is known of a connection that isn't in use yet, a peer and a channel.
#[derive(Debug)]
enum Slot {
    /// Nobody has asked for it.
    Idle,
    /// This rank is opening it.
    Dialing,
    /// It is there, for the caller's thread to take.
    Ready(TcpStream),
    /// The caller's thread has it.
    Taken,
    /// It can't be had.
    Failed(String),
}

/// What became of a dial, for the caller's thread.
#[derive(Debug)]
pub(super) enum Arrived {
    Connection(TcpStream),
    Failed(String),
}

/// Where the connections are while no call is running, and what this rank has called.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) mesh: Option<Box<Mesh>>,
    pub(super) calls: VecDeque<Remembered>,
}

/// A call of this rank.
#[derive(Clone, Copy, Debug)]
pub(super) struct Remembered {
    pub(super) seq: u64,
    pub(super) call: Call,
    pub(super) began: Instant,
    pub(super) took: Option<Duration>,
}

impl Seat {
    pub(super) fn remember(&mut self, seq: u64, call: Call) {
        if self.calls.len() == REMEMBERED {
            self.calls.pop_front();
        }
        self.calls.push_back(Remembered { seq, call, began: Instant::now(), took: None });
    }

    pub(super) fn done(&mut self) {
        if let Some(last) = self.calls.back_mut() {
            last.took = Some(last.began.elapsed());
        }
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) rank: usize,
    pub(super) world: usize,
    pub(super) id: GroupId,
    /// Where each rank listens; known once all have come.
    pub(super) addresses: OnceLock<Vec<SocketAddr>>,
    pub(super) wake: Wake,
    slots: Mutex<Vec<Slot>>,
    /// Set, Release, after a slot or the verdict has changed; the caller's thread clears it, Acquire, before it looks.
    stirred: AtomicBool,
    /// Set, Release, after the verdict, once.
    failed: AtomicBool,
    verdict: Mutex<Option<Verdict>>,
    seat: Mutex<Seat>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(rank: usize, world: usize, id: GroupId) -> Result<Shared> {
        Ok(Shared {
            rank,
            world,
            id,
            addresses: OnceLock::new(),
            wake: Wake::new().map_err(|e| Error::os("making an eventfd", e))?,
            slots: Mutex::new((0..2 * world).map(|_| Slot::Idle).collect()),
            stirred: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            verdict: Mutex::new(None),
            seat: Mutex::new(Seat { mesh: Some(Box::new(Mesh::new(world))), calls: VecDeque::new() }),
        })
    }

    pub(super) fn seat(&self) -> MutexGuard<'_, Seat> {
        lock(&self.seat)
    }

    /// Where the connection to `peer` for `channel` is kept.
    pub(super) fn place(&self, channel: Channel, peer: usize) -> usize {
        peer + if channel == Channel::Message { self.world } else { 0 }
    }

    /// Tells the caller's thread to look around.
    fn stir(&self) {
        self.stirred.store(true, Ordering::Release);
        self.wake.ring();
    }

    /// Whether something has changed since it was asked last.
    #[inline]
    pub(super) fn has_stirred(&self) -> bool {
        // Looked at first, as it mostly hasn't: a write would take the cache line.
        self.stirred.load(Ordering::Relaxed) && self.stirred.swap(false, Ordering::Acquire)
    }

    #[inline]
    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// Ends the group with `verdict`, unless it has ended with another: the one that holds.
    pub(super) fn fail(&self, verdict: Verdict) -> Verdict {
        let mut held = lock(&self.verdict);
        let held = *held.get_or_insert(verdict);
        self.failed.store(true, Ordering::Release);
        self.stir();
        held
    }

    pub(super) fn verdict(&self) -> Option<Verdict> {
        *lock(&self.verdict)
    }

    /// Whether the caller's thread should open this connection: nobody is doing so, and it isn't there.
    pub(super) fn should_dial(&self, place: usize) -> bool {
        let slot = &mut lock(&self.slots)[place];
        let should = matches!(slot, Slot::Idle);
        if should {
            *slot = Slot::Dialing;
        }
        should
    }

    /// What has come of the connections that aren't in use yet.
    pub(super) fn take_arrivals(&self) -> Vec<(usize, Arrived)> {
        let mut arrived = Vec::new();
        for (place, slot) in lock(&self.slots).iter_mut().enumerate() {
            match slot {
                Slot::Ready(_) => {
                    if let Slot::Ready(stream) = std::mem::replace(slot, Slot::Taken) {
                        arrived.push((place, Arrived::Connection(stream)));
                    }
                }
                Slot::Failed(why) => {
                    arrived.push((place, Arrived::Failed(std::mem::take(why))));
                    *slot = Slot::Taken;
                }
                _ => {}
            }
        }
        arrived
    }

    /// Hands over a connection that this rank opened, or says why it can't be had.
    pub(super) fn dialled(&self, place: usize, outcome: Result<TcpStream, String>) {
        let slot = &mut lock(&self.slots)[place];
        // Where both dialled, the peer's may have come meanwhile.
        if matches!(slot, Slot::Dialing) {
            *slot = match outcome {
                Ok(stream) => Slot::Ready(stream),
                Err(why) => Slot::Failed(why),
            };
            self.stir();
        }
    }

    /// Decides on a connection that a peer has opened and proved to be its own, and tells it.
    ///
    /// Where two ranks dial each other at once, the lower rank's connection is the one: the lower refuses the
    /// higher's while its own dial is under way, and the higher takes the lower's in place of its own. Each decides
    /// under the lock on its slots, and the lower doesn't dial once it has taken one: they can't decide differently.
    pub(super) fn offer(&self, hello: &Hello, arrival: Arrival, secret: &Secret) {
        let (from, to) = (hello.from as usize, hello.to as usize);
        if hello.world as usize != self.world {
            arrival.settle(secret, Status::WrongWorld);
            return;
        }
        if to != self.rank || from >= self.world || from == self.rank || hello.channel == Channel::Store {
            arrival.settle(secret, Status::WrongRank);
            return;
        }
        let slot = &mut lock(&self.slots)[self.place(hello.channel, from)];
        let status = match slot {
            Slot::Idle => Status::Accepted,
            Slot::Dialing if from < self.rank => Status::Accepted,
            Slot::Dialing => Status::Crossed,
            Slot::Ready(_) | Slot::Taken | Slot::Failed(_) => Status::Taken,
        };
        // Told before the caller's thread gets it, which may send at once.
        if let Some(stream) = arrival.settle(secret, status) {
            *slot = Slot::Ready(stream);
            self.stir();
        }
    }

    /// What this rank called as its collective `seq`, if it remembers.
    pub(super) fn called(&self, seq: u64) -> Option<Call> {
        self.seat().calls.iter().rev().find(|c| c.seq == seq).map(|c| c.call)
    }
}
