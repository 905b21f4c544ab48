//! One rank's membership in a group over TCP: calls, and what they are made of: sends, receives and waits.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tensorwire_core::{Call, DType, Deadline, Error, Op};

use super::TcpOptions;
use super::endpoint::Endpoint;
use super::frame::Kind;
use super::hello::Channel;
use super::link::{Expected, Trouble};
use super::memory::{Memory, Place, Span};
use super::mesh::{Around, Goal, Mesh, Stop};
use super::shared::{NOTHING, Remembered, Shared};
use crate::shm::verdict::Verdict;
use crate::shm::{self, CallRecord, Failure, FlightRecord, Incoming, Outgoing, RankRecord, RankState};

/// Collectives that may be [under way](TcpGroup::begin_behind) at once.
pub const UNDER_WAY: usize = 16;

/// How long a rank that has a processor to itself spins before it polls.
const SPIN: Duration = Duration::from_micros(200);

/// One rank's membership in a group of ranks that exchange data over TCP. Dropping it leaves the group.
#[derive(Debug)]
pub struct TcpGroup {
    pub(super) shared: Arc<Shared>,
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) options: TcpOptions,
    /// The connections, while a call is running.
    mesh: Option<Box<Mesh>>,
    spin: Duration,
    /// This rank's collectives so far.
    pub(super) seq: u64,
    call: Call,
    /// The collectives that are under way, of which the last has number `seq`, where there may be several.
    under_way: VecDeque<Call>,
    /// What the message that is being received must be.
    message: Expected,
    /// When the current call gives up, unless something moves before; set by a wait that isn't short.
    deadline: Option<Deadline>,
}

impl TcpGroup {
    /// `shared` has been entered at the endpoint and knows all addresses; the rank `spins` if it has a processor of its own.
    pub(super) fn new(
        shared: Arc<Shared>,
        endpoint: Arc<Endpoint>,
        spins: bool,
        options: TcpOptions,
    ) -> TcpGroup {
        let spin = if spins { SPIN } else { Duration::ZERO };
        let message = Expected { kind: Kind::Message, seq: 0, call: [0; 4] };
        TcpGroup {
            shared,
            endpoint,
            options,
            mesh: None,
            spin,
            seq: 0,
            call: NOTHING,
            under_way: VecDeque::new(),
            message,
            deadline: None,
        }
    }

    pub(super) fn spins(&self) -> bool {
        !self.spin.is_zero()
    }

    /// This rank.
    #[inline]
    pub fn rank(&self) -> usize {
        self.shared.rank
    }

    /// The number of ranks.
    #[inline]
    pub fn world(&self) -> usize {
        self.shared.world
    }

    /// What other threads of this rank may do with the group.
    pub fn handle(&self) -> TcpHandle {
        TcpHandle { shared: self.shared.clone(), endpoint: Arc::downgrade(&self.endpoint) }
    }

    /// Has the memory that this rank shares with others of its host, if it shares any, end with the group; and the ranks
    /// `elsewhere`, one of each other host, be told by connections of their own where this rank ends it: they may wait in
    /// memory, where they hear nothing from a network.
    pub fn tie(&self, memory: Option<shm::Handle>, elsewhere: Vec<usize>) {
        self.shared.tie(memory, elsewhere);
    }

    /// This rank's collectives so far: the number of the current one.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// Notes for how long this rank waits in another place for others, if it does, so that peers which wait for it don't
    /// take it for the one that is late.
    pub fn waits_elsewhere(&self, waits: Option<Duration>) {
        self.shared.set_waits(waits.map(Deadline::after));
    }

    /// What carries the group's data: `tcp`, `tls` or `quic`.
    pub fn transport(&self) -> &'static str {
        match self.endpoint.secret().tls() {
            _ if self.options.quic.is_some() => "quic",
            Some(_) => "tls",
            None => "tcp",
        }
    }

    /// What carries the group's data; where this rank listens, and why there, for a person.
    pub fn describe(&self) -> String {
        format!("{} {}", self.transport(), self.endpoint.describe())
    }

    /// Begins a call: what it sends and receives is compared with the peers' calls.
    ///
    /// # Errors
    /// The error that has ended the group, if one has.
    #[inline]
    pub fn begin(&mut self, call: Call) -> Result<(), Failure> {
        self.seq += 1;
        let seq = self.seq;
        self.enter(call)?.begin(Some((seq, &call)));
        Ok(())
    }

    /// Begins a call while others that were begun so may be under way, up to [`UNDER_WAY`] in all, if they have asked for
    /// all that they send and receive. Every connection then carries the calls' frames in the calls' order, as if each
    /// had ended before the next; peers needn't make them in this way. Returns how many receives and sends were asked
    /// for before, from which the call's own are counted, in [`wait_unless_interrupted`](TcpGroup::wait_unless_interrupted).
    ///
    /// # Errors
    /// As for [`begin`](TcpGroup::begin).
    pub fn begin_behind(&mut self, call: Call) -> Result<(usize, usize), Failure> {
        assert!(self.under_way.len() < UNDER_WAY);
        let before = match &mut self.mesh {
            Some(mesh) => {
                self.seq += 1;
                self.shared.seat().remember(self.seq, call);
                mesh.begin_behind(self.seq, &call)
            }
            None => {
                self.begin(call)?;
                Goal { received: 0, sent: 0 }
            }
        };
        self.under_way.push_back(call);
        Ok((before.received, before.sent))
    }

    /// Ends the first of the calls that are under way.
    pub fn end_first(&mut self) {
        self.under_way.pop_front();
        match (&mut self.mesh, self.under_way.len()) {
            (Some(mesh), behind @ 1..) => {
                mesh.end_first();
                self.deadline = None;
                self.shared.seat().done(behind);
            }
            _ => self.end(),
        }
    }

    /// The call that this rank is in, the first of several, and its number.
    fn current(&self) -> (Call, u64) {
        match self.under_way.front() {
            Some(call) => (*call, self.seq + 1 - self.under_way.len() as u64),
            None => (self.call, self.seq),
        }
    }

    /// Takes the connections for a call.
    fn enter(&mut self, call: Call) -> Result<&mut Mesh, Failure> {
        (self.call, self.deadline) = (call, None);
        let mut seat = self.shared.seat();
        if self.shared.has_failed()
            && let Some(verdict) = self.shared.verdict()
        {
            return Err(Box::new(verdict.error(self.shared.rank, call, self.seq)));
        }
        seat.remember(self.seq, call);
        // They are away only where a call has panicked, and may have left half a frame behind.
        let Some(mesh) = seat.mesh.take() else {
            let why =
                Error::invalid(format!("rank {}: an earlier call was left half done", self.shared.rank));
            drop(seat);
            return Err(self.fail(why, &Memory::none()));
        };
        drop(seat);
        Ok(self.mesh.insert(mesh))
    }

    /// Ends a call: everything has been sent and received.
    #[inline]
    pub fn end(&mut self) {
        let mut seat = self.shared.seat();
        seat.done(0);
        if let Some(mut mesh) = self.mesh.take() {
            // Another thread that aborted found no connections here, and leaves it to this one to tell the peers.
            if self.shared.has_failed()
                && let Some(verdict) = self.shared.verdict()
            {
                mesh.tell(&verdict, &Memory::none(), &self.shared, |channel, peer| {
                    let _ = self.endpoint.dial(&self.shared, channel, peer);
                });
            }
            seat.mesh = Some(mesh);
        }
    }

    /// Sends `span` to rank `to`, as far as the socket takes it now; the rest follows while the call waits.
    ///
    /// # Errors
    /// See [`wait`](TcpGroup::wait).
    #[inline]
    pub fn send(&mut self, to: usize, span: Span, memory: &mut Memory<'_>) -> Result<(), Failure> {
        let mesh = self.mesh.as_mut().expect("inside a call");
        mesh.send(to, span);
        self.push(to, memory)
    }

    fn push(&mut self, place: usize, memory: &mut Memory<'_>) -> Result<(), Failure> {
        let around = Around {
            shared: &self.shared,
            endpoint: &self.endpoint,
            spin: self.spin,
            peer_timeout: self.options.peer_timeout,
            interruptible: false,
        };
        let mesh = self.mesh.as_mut().expect("inside a call");
        match mesh.push(place, &around, &self.message, memory) {
            Ok(()) => Ok(()),
            Err(stop) => Err(self.stop(stop, memory)),
        }
    }

    /// Receives `span` from rank `from` while the call waits.
    #[inline]
    pub fn receive(&mut self, from: usize, span: Span) {
        self.mesh.as_mut().expect("inside a call").receive(from, span);
    }

    /// How many receives and sends this call has asked for.
    #[inline]
    pub fn asked(&self) -> (usize, usize) {
        let mesh = self.mesh.as_ref().expect("inside a call");
        (mesh.asked(), mesh.sends)
    }

    /// Waits until the first `received` receives of this call, and the first `sent` sends, are complete.
    ///
    /// # Errors
    /// [`Error::PeerLost`], [`Error::Timeout`], [`Error::Mismatch`], [`Error::Corrupted`] or [`Error::Aborted`]; the group
    /// has ended then.
    #[inline]
    pub fn wait(&mut self, received: usize, sent: usize, memory: &mut Memory<'_>) -> Result<(), Failure> {
        self.drive(Goal { received, sent }, false, memory).map(drop)
    }

    /// As [`wait`](TcpGroup::wait), unless [`TcpHandle::interrupt`] ends it before: whether it has come that far.
    ///
    /// # Errors
    /// See [`wait`](TcpGroup::wait).
    pub fn wait_unless_interrupted(
        &mut self,
        received: usize,
        sent: usize,
        memory: &mut Memory<'_>,
    ) -> Result<bool, Failure> {
        self.drive(Goal { received, sent }, true, memory)
    }

    #[inline]
    fn drive(&mut self, goal: Goal, interruptible: bool, memory: &mut Memory<'_>) -> Result<bool, Failure> {
        let around = Around {
            shared: &self.shared,
            endpoint: &self.endpoint,
            spin: self.spin,
            peer_timeout: self.options.peer_timeout,
            interruptible,
        };
        let mesh = self.mesh.as_mut().expect("inside a call");
        let timeout = self.options.timeout;
        match mesh.drive(goal, &around, &self.message, &mut self.deadline, timeout, memory) {
            Ok(reached) => Ok(reached),
            Err(stop) => Err(self.stop(stop, memory)),
        }
    }

    /// Waits until everything that this call has asked for is sent and received.
    ///
    /// # Errors
    /// See [`wait`](TcpGroup::wait).
    #[inline]
    pub fn finish(&mut self, memory: &mut Memory<'_>) -> Result<(), Failure> {
        let (received, sent) = self.asked();
        self.wait(received, sent, memory)
    }

    /// Every rank's `mine`, in rank order, within a call.
    pub(super) fn exchange<const N: usize>(&mut self, mine: [u8; N]) -> Result<Vec<[u8; N]>, Failure> {
        let (rank, world) = (self.rank(), self.world());
        let mut all = vec![0; N * world];
        all[rank * N..][..N].copy_from_slice(&mine);
        let mut memory = Memory { input: Some(&mine), output: &mut all, ..Memory::none() };
        for i in 1..world {
            let (to, from) = ((rank + i) % world, (rank + world - i) % world);
            self.receive(from, Span::new(Place::Output, from * N..(from + 1) * N));
            self.send(to, Span::new(Place::Input, 0..N), &mut memory)?;
        }
        self.finish(&mut memory)?;
        Ok(all.as_chunks::<N>().0.to_vec())
    }

    /// Sends one message, receives one, or both at once, of elements of type `dtype`. Messages of a pair arrive in
    /// the order in which they were sent. A send returns when the kernel has its message, which for up to 64 KiB
    /// doesn't need the receiver.
    ///
    /// # Errors
    /// See [`wait`](TcpGroup::wait).
    pub fn send_recv(
        &mut self,
        dtype: DType,
        out: Option<Outgoing<'_>>,
        into: Option<Incoming<'_>>,
    ) -> Result<(), Failure> {
        let call = |op, bytes, peer| Call::message(op, dtype, bytes, peer);
        let sent = out.map(|o| call(Op::Send, o.data.len(), o.to));
        let received = into.as_ref().map(|i| call(Op::Recv, i.data.len(), i.from));
        let Some(doing) = received.or(sent) else { return Ok(()) };
        let rank = self.rank();
        let place = |shared: &Shared, peer| shared.place(Channel::Message, peer);
        let mesh = self.enter(doing)?;
        mesh.begin(None);
        let mut nowhere = [];
        let (from, output) = into.map_or((None, &mut nowhere[..]), |i| (Some(i.from), i.data));
        if let Some(from) = from {
            let at = place(&self.shared, from);
            let span = Span::new(Place::Output, 0..output.len());
            self.mesh.as_mut().expect("inside a call").receive(at, span);
            self.message.call = call(Op::Send, output.len(), rank).to_words();
        }
        let mut memory = Memory { input: out.map(|o| o.data), output, ..Memory::none() };
        if let (Some(o), Some(call)) = (out, sent) {
            let at = place(&self.shared, o.to);
            let span = Span::new(Place::Input, 0..o.data.len());
            self.mesh.as_mut().expect("inside a call").send_message(at, span, &call);
            self.push(at, &mut memory)?;
        }
        self.finish(&mut memory)?;
        self.end();
        Ok(())
    }

    /// Ends the group for every rank, with `error` as the reason unless another was first; returns what this rank
    /// reports.
    pub fn fail(&mut self, error: Error, memory: &Memory<'_>) -> Failure {
        self.close(Verdict::new(self.rank(), &error), Some(error), memory)
    }

    /// Ends the group for every rank because of an error that another layer has met, unless it has ended.
    pub fn end_with(&mut self, error: &Error, memory: &Memory<'_>) {
        self.close(Verdict::new(self.rank(), error), None, memory);
    }

    /// Ends the group with `verdict`, unless it has ended; `error` is how this rank, which made it, puts it.
    fn close(&mut self, verdict: Verdict, error: Option<Error>, memory: &Memory<'_>) -> Failure {
        let had_failed = self.shared.has_failed();
        let verdict = self.shared.fail(verdict);
        self.shared.set_waits(None);
        if let Some(mut mesh) = self.mesh.take() {
            mesh.tell(&verdict, memory, &self.shared, |channel, peer| {
                // A peer that can't be told finds out by itself.
                let _ = self.endpoint.dial(&self.shared, channel, peer);
            });
            self.shared.seat().mesh = Some(mesh);
        }
        let own = error.filter(|_| !had_failed);
        let (call, seq) = self.current();
        self.under_way.clear();
        Box::new(own.unwrap_or_else(|| verdict.error(self.rank(), call, seq)))
    }

    #[cold]
    #[inline(never)]
    fn stop(&mut self, stop: Stop, memory: &mut Memory<'_>) -> Failure {
        let (rank, (call, seq)) = (self.rank(), self.current());
        let mesh = self.mesh.as_mut().expect("inside a call");
        let error = match stop {
            Stop::Ended(verdict) | Stop::Peer(_, _, Trouble::Verdict(verdict)) => {
                return self.close(*verdict, None, memory);
            }
            Stop::Peer(peer, _, Trouble::Lost(how)) => {
                // Somebody may know better why it is gone.
                if let Some(verdict) = mesh.hear() {
                    return self.close(*verdict, None, memory);
                }
                Error::PeerLost { rank, peer, call, seq, how }
            }
            Stop::Peer(peer, channel, Trouble::Differs(theirs, at)) => {
                let message = channel == Channel::Message;
                let ours = if message || at == seq { Some(call) } else { self.shared.called(at) };
                match (ours, theirs) {
                    (Some(ours), Some(theirs)) if ours != theirs => {
                        let seq = if message { seq } else { at };
                        let ((a, a_call), (b, b_call)) = if rank < peer {
                            ((rank, ours), (peer, theirs))
                        } else {
                            ((peer, theirs), (rank, ours))
                        };
                        Error::Mismatch { rank, seq, a, a_call: a_call.into(), b, b_call: b_call.into() }
                    }
                    (_, theirs) => {
                        let theirs = theirs.map_or("what is no call".to_owned(), |c| c.to_string());
                        let why = format!(
                            "rank {peer} is still in call {at}, {theirs}, which this rank is done with"
                        );
                        Error::Aborted { rank, by: rank, call, seq, why }
                    }
                }
            }
            Stop::Peer(peer, _, Trouble::Length { sent, expected }) => {
                let why = format!("rank {peer} sent {sent} bytes where {expected} were expected");
                Error::Aborted { rank, by: rank, call, seq, why }
            }
            Stop::Peer(peer, _, Trouble::Damaged(what)) => {
                Error::Corrupted { rank, from: peer, to: rank, call, seq, what: what.to_owned() }
            }
            Stop::Late(waiting_for) => {
                let seen: Vec<String> = waiting_for.iter().take(8).map(|peer| mesh.seen_of(*peer)).collect();
                let instead = seen.join("; ").into();
                Error::Timeout { rank, call, seq, waiting_for, after: self.options.timeout, instead }
            }
        };
        self.fail(error, memory)
    }
}

impl Drop for TcpGroup {
    fn drop(&mut self) {
        self.endpoint.leave(&self.shared);
        // Where a call has panicked, the connections end in the middle of what they were sending.
        if let Some(mut mesh) = self.shared.seat().mesh.take() {
            mesh.leave();
        }
    }
}

/// What any thread of a rank may do with its group, whatever the rank is waiting for.
#[derive(Clone, Debug)]
pub struct TcpHandle {
    shared: Arc<Shared>,
    /// It makes connections for as long as there is a group that it does so for.
    endpoint: Weak<Endpoint>,
}

impl TcpHandle {
    /// Ends the group: every rank's current or next call fails with [`Error::Aborted`] and `why`. Does nothing if
    /// the group has ended already.
    pub fn abort(&self, why: &str) {
        let verdict = self.shared.fail(Verdict::new(self.shared.rank, &Error::invalid(why)));
        // A call that is running has the connections, and tells the peers.
        if let Some(mesh) = &mut self.shared.seat().mesh {
            mesh.tell(&verdict, &Memory::none(), &self.shared, |channel, peer| {
                if let Some(endpoint) = self.endpoint.upgrade() {
                    let _ = endpoint.dial(&self.shared, channel, peer);
                }
            });
        }
    }

    /// Ends the wait that [may be ended](TcpGroup::wait_unless_interrupted), or the next one.
    pub fn interrupt(&self) {
        self.shared.interrupt();
    }

    /// Sets whether waits spin before they poll, as they do unless told otherwise: who computes meanwhile may have more
    /// use for the processor.
    pub fn spin(&self, spin: bool) {
        self.shared.set_spins(spin);
    }

    /// What this rank is doing, and did last. Of the others it knows nothing.
    pub fn flight_record(&self) -> FlightRecord {
        let record = |c: &Remembered| CallRecord {
            seq: c.seq,
            call: c.call,
            algorithm: String::new(),
            began: c.began.elapsed(),
            took: c.took,
        };
        let calls = self.shared.seat().calls.iter().map(record).collect();
        let (rank, pid) = (self.shared.rank, std::process::id());
        let own = RankRecord { rank, pid, state: RankState::Member, waits_for: None, calls };
        let failure = self.shared.verdict().map(|v| v.error(rank, NOTHING, 0).to_string());
        FlightRecord { ranks: vec![own], failure }
    }
}
