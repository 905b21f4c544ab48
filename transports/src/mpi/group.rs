//! One rank's membership in a group over MPI: calls, and what they are made of: sends, receives and waits.

use std::sync::Arc;
use std::time::Duration;

use tensorwire_core::{Call, DType, Deadline, Error, Op};

use super::link::{Expected, Trouble};
use super::mesh::{Goal, Mesh, Stop};
use super::offload::{self, Offload};
use super::raw;
use super::shared::{NOTHING, Shared};
use super::world::{Tag, World};
use crate::color;
use crate::shm::verdict::Verdict;
use crate::shm::{Failure, FlightRecord, Incoming, Outgoing};
use crate::tcp::{Header, Kind, Memory, Place, Span};

/// For how long a rank that leaves a group waits until what it has sent is on its way.
const LEAVING: Duration = Duration::from_millis(300);

/// One rank's membership in a group of ranks that exchange data over MPI. Dropping it leaves the group.
#[derive(Debug)]
pub struct MpiGroup {
    shared: Arc<Shared>,
    mesh: Box<Mesh>,
    /// This rank's collectives so far, and its calls of every kind.
    seq: u64,
    recorded: u64,
    call: Call,
    /// Whether a call has begun and not ended.
    within: bool,
    /// What the message that is being received must be.
    message: Expected,
    /// When the current call gives up, unless something moves before; set by a wait that isn't short.
    deadline: Option<Deadline>,
}

impl MpiGroup {
    /// The group of all of a world's processes. All of them make it, and in the same order as their others.
    ///
    /// # Errors
    /// [`Error::Config`] where MPI's tags are used up.
    pub fn of_all(world: &Arc<World>) -> Result<MpiGroup, Error> {
        let context = world.next_context();
        MpiGroup::new(world, (0..world.size()).collect(), context)
    }

    fn new(world: &Arc<World>, ranks: Vec<usize>, context: u32) -> Result<MpiGroup, Error> {
        if context >= world.most_contexts() {
            let most = world.most_contexts();
            return Err(Error::Config(format!(
                "this MPI has tags for {most} groups, and all of them are used"
            )));
        }
        world.take_contexts(context + 1);
        let mesh = Box::new(Mesh::new(ranks.len()));
        let message = Expected { kind: Kind::Message, seq: 0, call: [0; 4] };
        Ok(MpiGroup {
            shared: Arc::new(Shared::new(world.clone(), ranks, context)),
            mesh,
            seq: 0,
            recorded: 0,
            call: NOTHING,
            within: false,
            message,
            deadline: None,
        })
    }

    /// This rank.
    #[inline]
    pub fn rank(&self) -> usize {
        self.shared.rank
    }

    /// The number of ranks.
    #[inline]
    pub fn world(&self) -> usize {
        self.shared.world()
    }

    /// What other threads of this rank may do with the group.
    pub fn handle(&self) -> MpiHandle {
        MpiHandle { shared: self.shared.clone() }
    }

    /// This rank's collectives so far: the number of the current one.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// The MPI that carries the data, for a person.
    pub fn describe(&self) -> String {
        format!("mpi ({})", raw::describe())
    }

    /// Begins a call: what it sends and receives is compared with the peers' calls.
    ///
    /// # Errors
    /// The error that has ended the group, if one has; [`Error::Config`] where MPI has ended, or this thread may not call it.
    #[inline]
    pub fn begin(&mut self, call: Call) -> Result<(), Failure> {
        raw::check_usable()?;
        self.seq += 1;
        self.enter(call)?;
        self.mesh.begin(Some((self.seq, &call)));
        Ok(())
    }

    #[inline]
    fn enter(&mut self, call: Call) -> Result<(), Failure> {
        (self.call, self.deadline) = (call, None);
        if self.shared.has_failed()
            && let Some(verdict) = self.shared.verdict()
        {
            return Err(Box::new(verdict.error(self.rank(), call, self.seq)));
        }
        self.recorded += 1;
        self.shared.begins(self.recorded, self.seq, &call);
        if std::mem::replace(&mut self.within, true) {
            // It has panicked, and may have left half a frame behind.
            let why = Error::invalid(format!("rank {}: an earlier call was left half done", self.rank()));
            return Err(self.fail(why));
        }
        Ok(())
    }

    /// Ends a call: everything has been sent and received.
    #[inline]
    pub fn end(&mut self) {
        self.within = false;
        self.shared.ends(self.recorded);
    }

    /// Sends `span` to rank `to`, as far as there is room for it now; the rest follows while the call waits.
    ///
    /// # Errors
    /// See [`wait`](MpiGroup::wait).
    #[inline]
    pub fn send(&mut self, to: usize, span: Span, memory: &mut Memory<'_>) -> Result<(), Failure> {
        self.mesh.send(to, span, None, &self.shared);
        self.push(to, memory)
    }

    #[inline]
    fn push(&mut self, place: usize, memory: &mut Memory<'_>) -> Result<(), Failure> {
        match self.mesh.advance(place, &self.shared, &self.message, memory) {
            Ok(_) => Ok(()),
            Err(stop) => Err(self.stop(stop)),
        }
    }

    /// Receives `span` from rank `from` while the call waits.
    #[inline]
    pub fn receive(&mut self, from: usize, span: Span) {
        self.mesh.receive(from, span, &self.shared);
    }

    /// How many receives and sends this call has asked for.
    #[inline]
    pub fn asked(&self) -> (usize, usize) {
        (self.mesh.asked(), self.mesh.sends)
    }

    /// Waits until the first `received` receives of this call are complete, and MPI has the first `sent` sends.
    ///
    /// # Errors
    /// [`Error::PeerLost`], [`Error::Timeout`], [`Error::Mismatch`] or [`Error::Aborted`]; the group has ended then.
    #[inline]
    pub fn wait(&mut self, received: usize, sent: usize, memory: &mut Memory<'_>) -> Result<(), Failure> {
        self.drive(Goal { received, sent, there: false }, memory)
    }

    #[inline]
    fn drive(&mut self, goal: Goal, memory: &mut Memory<'_>) -> Result<(), Failure> {
        let MpiGroup { mesh, shared, message, deadline, .. } = self;
        match mesh.drive(goal, shared, message, deadline, memory) {
            Ok(()) => Ok(()),
            Err(stop) => Err(self.stop(stop)),
        }
    }

    /// Waits until everything that this call has asked for is received, and MPI needs this rank no more for what is sent.
    ///
    /// # Errors
    /// See [`wait`](MpiGroup::wait).
    #[inline]
    pub fn finish(&mut self, memory: &mut Memory<'_>) -> Result<(), Failure> {
        let (received, sent) = self.asked();
        self.drive(Goal { received, sent, there: true }, memory)
    }

    /// Every rank's `mine`, in rank order, within a call.
    fn exchange<const N: usize>(&mut self, mine: [u8; N]) -> Result<Vec<[u8; N]>, Failure> {
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
    /// the order in which they were sent. A send returns when MPI has its message, which for up to 1 MiB doesn't need the
    /// receiver.
    ///
    /// # Errors
    /// See [`wait`](MpiGroup::wait).
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
        let (rank, world) = (self.rank(), self.world());
        raw::check_usable()?;
        self.enter(doing)?;
        self.mesh.begin(None);
        let mut nowhere = [];
        let (from, output) = into.map_or((None, &mut nowhere[..]), |i| (Some(i.from), i.data));
        if let Some(from) = from {
            self.mesh.receive(world + from, Span::new(Place::Output, 0..output.len()), &self.shared);
            self.message.call = call(Op::Send, output.len(), rank).to_words();
        }
        let mut memory = Memory { input: out.map(|o| o.data), output, ..Memory::none() };
        if let (Some(o), Some(call)) = (out, sent) {
            let span = Span::new(Place::Input, 0..o.data.len());
            self.mesh.send(world + o.to, span, Some(&call), &self.shared);
            self.push(world + o.to, &mut memory)?;
        }
        self.finish(&mut memory)?;
        self.end();
        Ok(())
    }

    /// Runs one of MPI's own collectives, if it has one for this call: whether it does.
    ///
    /// It can't be called off, and compares nothing: where a rank doesn't come in time, or is gone, or makes another call,
    /// the process ends, and its job with it, behind a line on standard error.
    ///
    /// # Errors
    /// What MPI says, as [`Error::Aborted`].
    #[inline]
    pub fn offload(&mut self, collective: Offload<'_>) -> Result<bool, Failure> {
        // Where blocks are uneven, each rank knows its own alone, and can't tell whether MPI can count all of them.
        if matches!(collective, Offload::AllToAll { .. }) && self.call.layout != 0 {
            return Ok(false);
        }
        match offload::run(&self.shared, self.seq, collective) {
            Ok(done) => Ok(done),
            Err(why) => {
                raw::break_off();
                let (rank, call, seq) = (self.rank(), self.call, self.seq);
                Err(self.fail(Error::Aborted { rank, by: rank, call, seq, why }))
            }
        }
    }

    /// Ends the group for every rank, with `error` as the reason unless another was first; returns what this rank
    /// reports.
    pub fn fail(&mut self, error: Error) -> Failure {
        self.close(Verdict::new(self.rank(), &error), Some(error))
    }

    /// Ends the group with `verdict`, unless it has ended; `error` is how this rank, which made it, puts it.
    fn close(&mut self, verdict: Verdict, error: Option<Error>) -> Failure {
        let had_failed = self.shared.has_failed();
        let verdict = self.shared.fail(verdict);
        let own = error.filter(|_| !had_failed);
        let error = own.unwrap_or_else(|| verdict.error(self.rank(), self.call, self.seq));
        if matches!(error, Error::Timeout { .. }) {
            raw::break_off();
        }
        Box::new(error)
    }

    #[cold]
    #[inline(never)]
    fn stop(&mut self, stop: Stop) -> Failure {
        let (rank, call, seq) = (self.rank(), self.call, self.seq);
        let error = match stop {
            Stop::Ended(verdict) => return self.close(*verdict, None),
            Stop::Peer(peer, _, Trouble::Lost(how)) => Error::PeerLost { rank, peer, call, seq, how },
            Stop::Peer(peer, message, Trouble::Differs(theirs, at)) => {
                let ours = if message || at == seq { Some(call) } else { self.shared.records.collective(at) };
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
            Stop::Late(waiting_for) => {
                let seen: Vec<String> =
                    waiting_for.iter().take(8).map(|peer| self.mesh.seen_of(*peer)).collect();
                let (instead, after) = (seen.join("; ").into(), self.shared.over.options.timeout);
                Error::Timeout { rank, call, seq, waiting_for, after, instead }
            }
            Stop::Unusable(why) => Error::Aborted { rank, by: rank, call, seq, why },
        };
        self.fail(error)
    }

    /// Forms groups of the ranks that give the same `color`, ordered by `key`, then rank; a rank without a color gets
    /// none. Returns also the ranks' numbers in this group. Every rank of this group calls it.
    ///
    /// # Errors
    /// See [`wait`](MpiGroup::wait); [`Error::Config`] where MPI's tags are used up.
    pub fn split(&mut self, color: Option<u32>, key: i32) -> Result<Option<(MpiGroup, Vec<usize>)>, Failure> {
        self.begin(Call::bare(Op::Split))?;
        let mut mine = [0; 13];
        mine[..9].copy_from_slice(&color::choice(color, key));
        mine[9..].copy_from_slice(&self.shared.over.next_context().to_le_bytes());
        let all = self.exchange(mine)?;
        self.end();
        // The first number that is free on every rank, and one for each group.
        let next = |told: &[u8; 13]| u32::from_le_bytes([told[9], told[10], told[11], told[12]]);
        let first = all.iter().map(next).max().unwrap_or(0);
        let choices: Vec<[u8; 9]> =
            all.iter().map(|told| *told.first_chunk().expect("as many bytes")).collect();
        let mut colors: Vec<&[u8]> =
            choices.iter().filter(|choice| choice[0] == 1).map(|choice| &choice[1..5]).collect();
        colors.sort_unstable();
        colors.dedup();
        self.shared.over.take_contexts(first.saturating_add(colors.len() as u32));
        let Some(color) = color else { return Ok(None) };
        let which = colors.iter().position(|c| *c == color.to_le_bytes()).unwrap_or(0);
        let ranks = color::members(Some(color), &choices);
        let in_world = ranks.iter().map(|rank| self.shared.ranks[*rank]).collect();
        let group = MpiGroup::new(&self.shared.over, in_world, first.saturating_add(which as u32))?;
        Ok(Some((group, ranks)))
    }

    /// Says that a group over MPI has no survivors, and ends it for all that there are.
    ///
    /// # Errors
    /// [`Error::Rendezvous`], always.
    pub fn shrink(&mut self) -> Error {
        let (rank, world) = (self.rank(), self.world());
        if !self.shared.has_failed() {
            self.fail(Error::invalid("a rank shrinks the group"));
        }
        let what = "a group over MPI can't go on with some of its ranks: MPI's standard promises nothing once a process \
                    has failed, and this MPI has no user-level failure mitigation (ULFM). Start the job anew, or use a \
                    transport that can shrink: shm, tcp, tls, quic or auto";
        Error::Rendezvous { rank, world, what: what.into() }
    }
}

impl Drop for MpiGroup {
    fn drop(&mut self) {
        if raw::is_over() {
            return;
        }
        if !self.shared.has_failed() && !self.within {
            for (kind, tag) in [(Kind::Leave, Tag::Head), (Kind::Leave, Tag::MessageHead)] {
                let bytes = Header { kind, seq: self.seq, len: 0, call: [0; 4] }.bytes();
                let others = (0..self.world()).filter(|who| *who != self.rank());
                others.for_each(|who| self.shared.send(who, tag, bytes.to_vec()));
            }
        }
        let limit = if self.shared.has_failed() { Duration::ZERO } else { LEAVING };
        self.mesh.leave(limit);
    }
}

/// What any thread of a rank may do with its group, whatever the rank is waiting for.
#[derive(Clone, Debug)]
pub struct MpiHandle {
    shared: Arc<Shared>,
}

impl MpiHandle {
    /// Ends the group: every rank's current or next call fails with [`Error::Aborted`] and `why`. Does nothing if
    /// the group has ended already.
    pub fn abort(&self, why: &str) {
        self.shared.fail(Verdict::new(self.shared.rank, &Error::invalid(why)));
    }

    /// Sets whether waits spin before they pause.
    pub fn spin(&self, spin: bool) {
        self.shared.set_spins(spin);
    }

    /// What this rank is doing, and did last. Of the others it knows nothing.
    pub fn flight_record(&self) -> FlightRecord {
        self.shared.flight_record()
    }
}
