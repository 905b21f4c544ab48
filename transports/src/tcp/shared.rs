//! A group as the threads of one rank see it: its connections as they are made, why it ended, and its seat, in which
//! the connections rest between calls.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tensorwire_core::{Call, Deadline, Error, Op, Result};

use super::frame;
use super::group::UNDER_WAY;
use super::hello::{Channel, GroupId, Hello, Status};
use super::mesh::Mesh;
use super::negotiate::Arrival;
use super::secret::Secret;
use super::socket::Wake;
use super::stream::{Identity, Stream};
use crate::shm;
use crate::shm::verdict::Verdict;

/// Connections that a rank may have to a peer: for collectives, messages and survivors.
const CHANNELS: usize = 3;

/// Calls that a rank remembers of itself: at least those that may be under way.
const REMEMBERED: usize = UNDER_WAY;

/// For an error of a rank that is in no call.
pub(super) const NOTHING: Call = Call::bare(Op::Barrier);

/// What is known of a connection that isn't in use yet, a peer and a channel.
#[derive(Debug)]
enum Slot {
    /// Nobody has asked for it.
    Idle,
    /// This rank is opening it.
    Dialing,
    /// It is there, for the caller's thread to take.
    Ready(Stream),
    /// The caller's thread has it.
    Taken,
    /// It can't be had.
    Failed(String),
}

/// What became of a dial, for the caller's thread.
#[derive(Debug)]
pub(super) enum Arrived {
    Connection(Stream),
    Failed(String),
}

/// What a peer says that was asked whether it waits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Answer {
    /// Nothing yet.
    Awaited,
    /// It waits in a call, for so much longer; or for no longer, but knows that the group has ended.
    Waits(Duration),
    /// It is in no call that waits, or can't be asked.
    Elsewhere,
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

    /// The call is done that was begun before the last `behind`.
    pub(super) fn done(&mut self, behind: usize) {
        if let Some(call) = self.calls.iter_mut().rev().nth(behind) {
            call.took = Some(call.began.elapsed());
        }
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) rank: usize,
    pub(super) world: usize,
    pub(super) id: GroupId,
    /// Whether the group's frames have checksums.
    pub(super) checksum: bool,
    /// Where each rank listens; known once all have come.
    pub(super) addresses: OnceLock<Vec<SocketAddr>>,
    /// Each rank's number in the job, which certificates name; unset where it is the same.
    pub(super) job_ranks: OnceLock<Vec<usize>>,
    pub(super) wake: Arc<Wake>,
    slots: Mutex<Vec<Slot>>,
    /// Set, Release, after a slot or the verdict has changed; the caller's thread clears it, Acquire, before it looks.
    stirred: AtomicBool,
    /// Set, Release, after the verdict, once.
    failed: AtomicBool,
    verdict: Mutex<Option<Verdict>>,
    seat: Mutex<Seat>,
    /// Set under the lock on the slots, once: this rank has gone on with the survivors.
    went_on: AtomicBool,
    /// Until when the caller's thread waits in a call, if it does: for a peer that asks.
    waits: Mutex<Option<Deadline>>,
    /// Whether the rank's waits spin. Any thread of the rank may set it at any time; a hint: Relaxed.
    spins: AtomicBool,
    /// Set, Release, by whoever wants the thread that waits in a call to come out of it, which clears it, Acquire.
    interrupted: AtomicBool,
    /// The peers of which this rank has asked whether they wait, and what each has answered.
    answers: Mutex<Vec<(usize, Answer)>>,
    /// What ends with the group.
    tied: Mutex<Tied>,
    /// Peers that are being told over connections of their own that the group has ended. A count: Relaxed; whoever waits
    /// for it is woken, and looks again.
    telling: AtomicUsize,
    /// Set, Release, before the slot of a peer that has gone on without this rank; read, Acquire, behind it.
    left_behind: AtomicBool,
}

/// What a group whose ranks share memory on their hosts ends with.
#[derive(Debug, Default)]
struct Tied {
    /// The memory that this rank shares.
    memory: Option<shm::Handle>,
    /// A rank of each other host: all others there may be waiting in their memory.
    elsewhere: Vec<usize>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(rank: usize, world: usize, id: GroupId, checksum: bool) -> Result<Shared> {
        Ok(Shared {
            rank,
            world,
            id,
            checksum,
            addresses: OnceLock::new(),
            job_ranks: OnceLock::new(),
            wake: Arc::new(Wake::new().map_err(|e| Error::os("making an eventfd", e))?),
            slots: Mutex::new((0..CHANNELS * world).map(|_| Slot::Idle).collect()),
            stirred: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            verdict: Mutex::new(None),
            seat: Mutex::new(Seat {
                mesh: Some(Box::new(Mesh::new(world, checksum))),
                calls: VecDeque::new(),
            }),
            went_on: AtomicBool::new(false),
            left_behind: AtomicBool::new(false),
            waits: Mutex::default(),
            spins: AtomicBool::new(true),
            interrupted: AtomicBool::new(false),
            answers: Mutex::default(),
            tied: Mutex::default(),
            telling: AtomicUsize::new(0),
        })
    }

    pub(super) fn seat(&self) -> MutexGuard<'_, Seat> {
        lock(&self.seat)
    }

    /// The number in the job of one of this group's ranks.
    pub(super) fn job_rank(&self, rank: usize) -> usize {
        self.job_ranks.get().map_or(rank, |all| all[rank])
    }

    /// Where the connection to `peer` for `channel` is kept.
    pub(super) fn place(&self, channel: Channel, peer: usize) -> usize {
        match channel {
            Channel::Collective | Channel::Store | Channel::Question | Channel::Verdict => peer,
            Channel::Message => self.world + peer,
            Channel::Survivors => 2 * self.world + peer,
        }
    }

    /// Whether a place is for the survivors of the group's end, and not for its calls.
    fn is_for_survivors(&self, place: usize) -> bool {
        place >= 2 * self.world
    }

    /// Whether a connection for this is one of the group's.
    fn is_connected_by(&self, channel: Channel) -> bool {
        matches!(channel, Channel::Collective | Channel::Message | Channel::Survivors)
    }

    /// Notes that this rank goes on with the survivors: who asks from now on comes too late. False if it did before.
    pub(super) fn go_on(&self) -> bool {
        let _slots = lock(&self.slots);
        // Relaxed, here and below: the lock orders it with the connections.
        !self.went_on.swap(true, Ordering::Relaxed)
    }

    pub(super) fn has_gone_on(&self) -> bool {
        self.went_on.load(Ordering::Relaxed)
    }

    /// Notes until when the caller's thread waits in a call, if it does.
    pub(super) fn set_waits(&self, until: Option<Deadline>) {
        *lock(&self.waits) = until;
    }

    /// Sets whether waits spin.
    pub(super) fn set_spins(&self, spins: bool) {
        self.spins.store(spins, Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn spins(&self) -> bool {
        self.spins.load(Ordering::Relaxed)
    }

    /// Has the thread that waits in a call come out of it, or the next one that would.
    pub(super) fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Release);
        self.wake.ring();
    }

    /// Whether this rank has been interrupted since it was asked last.
    pub(super) fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed) && self.interrupted.swap(false, Ordering::Acquire)
    }

    /// For how much longer this rank waits itself. Zero if it only knows that the group has ended: it isn't the one that
    /// keeps others waiting then either.
    pub(super) fn waits(&self) -> Option<Duration> {
        let waits = lock(&self.waits).map(|until| until.remaining());
        waits.or_else(|| self.has_failed().then_some(Duration::ZERO))
    }

    /// Notes that these peers are asked whether they wait.
    pub(super) fn ask(&self, peers: &[usize]) {
        *lock(&self.answers) = peers.iter().map(|peer| (*peer, Answer::Awaited)).collect();
    }

    /// A peer has answered, or gives no answer.
    pub(super) fn answered(&self, peer: usize, answer: Answer) {
        lock(&self.answers).iter_mut().filter(|(who, _)| *who == peer).for_each(|(_, a)| *a = answer);
        self.stir();
    }

    /// What the peers that were asked have answered so far.
    pub(super) fn answers(&self) -> Vec<(usize, Answer)> {
        lock(&self.answers).clone()
    }

    /// Notes that peers have gone on without this rank.
    pub(super) fn leave_behind(&self) {
        self.left_behind.store(true, Ordering::Release);
    }

    pub(super) fn is_left_behind(&self) -> bool {
        self.left_behind.load(Ordering::Acquire)
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
        let held = *lock(&self.verdict).get_or_insert(verdict);
        self.failed.store(true, Ordering::Release);
        self.stir();
        if let Some(memory) = &lock(&self.tied).memory {
            memory.end_with(&held.error(self.rank, NOTHING, 0));
        }
        held
    }

    /// Notes what ends with the group: the memory that this rank shares, and whom on other hosts it then tells.
    pub(super) fn tie(&self, memory: Option<shm::Handle>, elsewhere: Vec<usize>) {
        *lock(&self.tied) = Tied { memory, elsewhere };
    }

    /// The ranks of other hosts that the rank whose verdict it is tells of the group's end over connections of their own.
    pub(super) fn to_be_told(&self, verdict: &Verdict) -> Vec<usize> {
        if verdict.by() == self.rank { lock(&self.tied).elsewhere.clone() } else { Vec::new() }
    }

    /// A peer is being told over a connection of its own.
    pub(super) fn tells_one(&self) {
        self.telling.fetch_add(1, Ordering::Relaxed);
    }

    /// It has been told, or can't be.
    pub(super) fn told_one(&self) {
        self.telling.fetch_sub(1, Ordering::Relaxed);
        self.stir();
    }

    pub(super) fn is_telling(&self) -> bool {
        self.telling.load(Ordering::Relaxed) > 0
    }

    /// A peer has come to say that the group has ended, and has proved to be one of this job.
    pub(super) fn is_told(&self, hello: &Hello, arrival: &Arrival) {
        let (from, to) = (hello.from as usize, hello.to as usize);
        let is_peer = hello.world as usize == self.world && to == self.rank && from < self.world;
        if is_peer
            && arrival.is_from(Identity::Rank(self.job_rank(from)))
            && let Some(verdict) = frame::parted(arrival.word(), self.checksum)
        {
            self.fail(verdict);
        }
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

    /// Whether this rank's own dial is still what a connection may come of.
    pub(super) fn is_dialing(&self, place: usize) -> bool {
        matches!(lock(&self.slots)[place], Slot::Dialing)
    }

    /// What has come of the connections that aren't in use yet: those for calls.
    pub(super) fn take_arrivals(&self) -> Vec<(usize, Arrived)> {
        self.take(0..2 * self.world)
    }

    /// As [`take_arrivals`](Shared::take_arrivals), of those for survivors: by the peer's rank.
    pub(super) fn take_survivors(&self) -> Vec<(usize, Arrived)> {
        let arrived = self.take(2 * self.world..CHANNELS * self.world);
        arrived.into_iter().map(|(place, arrived)| (place - 2 * self.world, arrived)).collect()
    }

    fn take(&self, places: std::ops::Range<usize>) -> Vec<(usize, Arrived)> {
        let mut arrived = Vec::new();
        for (place, slot) in places.clone().zip(&mut lock(&self.slots)[places]) {
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
    pub(super) fn dialled(&self, place: usize, outcome: Result<Stream, String>) {
        let slot = &mut lock(&self.slots)[place];
        // Where both dialled, the peer's may have come meanwhile.
        if matches!(slot, Slot::Dialing) {
            *slot = match outcome {
                Ok(stream) => self.ready(place, stream),
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
        if to != self.rank || from >= self.world || from == self.rank || !self.is_connected_by(hello.channel)
        {
            arrival.settle(secret, Status::WrongRank);
            return;
        }
        if !arrival.is_from(Identity::Rank(self.job_rank(from))) {
            arrival.settle(secret, Status::WrongName);
            return;
        }
        let place = self.place(hello.channel, from);
        let slot = &mut lock(&self.slots)[place];
        let status = match slot {
            _ if self.is_for_survivors(place) && self.has_gone_on() => Status::WentOn,
            Slot::Idle => Status::Accepted,
            Slot::Dialing if from < self.rank => Status::Accepted,
            Slot::Dialing => Status::Crossed,
            Slot::Ready(_) | Slot::Taken | Slot::Failed(_) => Status::Taken,
        };
        // Told before the caller's thread gets it, which may send at once.
        if let Some(stream) = arrival.settle(secret, status) {
            *slot = self.ready(place, stream);
            self.stir();
        }
    }

    /// A connection for the caller's thread. That thread makes no more calls once the group has ended: the peer, which
    /// may be waiting in one, is told here then. It takes what is here when it learns of the end, so that no connection
    /// falls between the two.
    fn ready(&self, place: usize, mut stream: Stream) -> Slot {
        stream.belongs_to(&self.wake);
        if let Some(verdict) = self.verdict().filter(|_| !self.is_for_survivors(place)) {
            // A fresh connection has room. Where it has ended already, there is nobody to tell.
            let _ = stream.say(&frame::parting(&verdict, self.checksum));
        }
        Slot::Ready(stream)
    }

    /// What this rank called as its collective `seq`, if it remembers.
    pub(super) fn called(&self, seq: u64) -> Option<Call> {
        self.seat().calls.iter().rev().find(|c| c.seq == seq).map(|c| c.call)
    }
}
