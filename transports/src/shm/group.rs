//! One rank's membership in a group, and the protocol that every collective is made of: steps.
//!
//! The ranks of a group count the same **steps** from 1. In a step a rank writes data for its peers into its
//! own slot (or, if small, into its flag's cache line) and **publishes** the step; a peer **waits** for it
//! and reads. A rank publishes step `t` only when it has read all that it needs of step `t - 1` and before,
//! so a peer's step tells also what that peer has read: that is all there is to flow control, and a slot is
//! written again [`DEPTH`] steps later without a further message.
//!
//! A wait spins, then sleeps on the rank's doorbell. Whoever publishes rings the doorbells of sleepers before
//! it sleeps or returns itself.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tensorwire_core::{Call, Deadline, Error, Op, Result, Tuning};

use super::cache;
use super::clock::Reading;
use super::control::LEFT;
use super::flight::FlightRecord;
use super::layout::{DEPTH, INLINE, Span};
use super::record::{Label, RECORDS};
use super::shared::Shared;
use super::single_copy::Reach;
use super::sync::{Ordering, fence};
use super::words::Words;
use super::{Failure, Options, wait::Patience};
use crate::liveness::Liveness;
use crate::processors::{Processors, may_spin};

/// How long a sleeping rank goes without looking whether its peers are alive.
const LIVENESS_INTERVAL: Duration = Duration::from_millis(20);

/// Elements of a call that a rank copies in no time.
const SMALL: u64 = 4096;

/// How long a rank's call may take to be on record when a peer has seen it published, on a busy machine.
const RECORDED_WITHIN: Duration = Duration::from_millis(100);

/// One rank's membership in a group of ranks that share memory. Dropping it leaves the group.
#[derive(Debug)]
pub struct Group {
    pub(super) shared: Arc<Shared>,
    pub(super) liveness: Liveness,
    pub(super) options: Options,
    pub(super) patience: Patience,
    /// Of each rank.
    pub(super) processors: Vec<Processors>,
    /// The step that this rank is in.
    step: u64,
    /// Where the current call's steps keep their bytes.
    span: Span,
    /// The last step that this rank has published: `step`, or the one before while `step` is being written.
    published: u64,
    /// The highest step seen of each rank.
    seen: Vec<u64>,
    /// This rank's collective calls so far.
    pub(super) seq: u64,
    /// Its calls of every kind on record so far.
    recorded: u64,
    /// Whether the current call is still to be put on record, and how it is carried out.
    unrecorded: bool,
    label: Label,
    pub(super) call: Call,
    fingerprint: u32,
    /// When the current call gives up; set by its first wait that isn't short.
    pub(super) deadline: Option<Deadline>,
    /// The groups that this one was split from, whose ranks may come to wait for this one's.
    pub(super) above: Vec<Above>,
    /// How to read the peers' memory, once that has been tried.
    pub(super) reach: Option<Reach>,
}

/// A group that another was split from.
#[derive(Clone, Debug)]
pub(super) struct Above {
    pub(super) shared: Weak<Shared>,
    /// What it calls the other group's ranks.
    pub(super) ranks: Vec<usize>,
}

/// What a rank waits for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Awaited {
    /// A peer's publication of a step.
    Step { peer: usize, step: u64 },
    /// Bytes written to the lane from a peer beyond a position, or read from the lane to a peer beyond one.
    Lanes { from: Option<(usize, u64)>, to: Option<(usize, u64)> },
}

impl Awaited {
    #[inline]
    fn arrived(&self, shared: &Shared) -> bool {
        let me = shared.rank;
        match *self {
            // Acquire: pairs with the Release store in the peer's `publish`.
            Awaited::Step { peer, step } => {
                shared.words.flag(peer, step).step.load(Ordering::Acquire) >= step
            }
            // Acquire: pairs with the Release stores of the lane's other end.
            Awaited::Lanes { from, to } => {
                from.is_some_and(|(peer, at)| {
                    shared.words.lane(peer, me).written.0.load(Ordering::Acquire) > at
                }) || to
                    .is_some_and(|(peer, at)| shared.words.lane(me, peer).read.0.load(Ordering::Acquire) > at)
            }
        }
    }

    /// The same of another peer.
    fn of(&self, peer: usize) -> Awaited {
        match *self {
            Awaited::Step { step, .. } => Awaited::Step { peer, step },
            lanes @ Awaited::Lanes { .. } => lanes,
        }
    }

    /// The peers without whom it can't come.
    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let (a, b) = match *self {
            Awaited::Step { peer, .. } => (Some(peer), None),
            Awaited::Lanes { from, to } => (from.map(|f| f.0), to.map(|t| t.0)),
        };
        a.into_iter().chain(b)
    }

    /// The peers that haven't come.
    fn late(&self, shared: &Shared) -> Vec<usize> {
        match *self {
            Awaited::Step { step, .. } => {
                let has_come = |p| shared.words.flag(p, step).step.load(Ordering::Acquire) >= step;
                shared.peers().filter(|p| !has_come(*p)).collect()
            }
            Awaited::Lanes { .. } => self.peers().collect(),
        }
    }
}

impl Group {
    pub(super) fn new(
        words: Words,
        rank: usize,
        liveness: Liveness,
        processors: Vec<Processors>,
        options: &Options,
    ) -> Group {
        let world = words.layout.world;
        Group {
            shared: Arc::new(Shared::new(words, rank)),
            liveness,
            patience: Patience::new(may_spin(&processors[rank], &processors)),
            processors,
            options: options.clone(),
            step: 0,
            span: Span::NONE,
            published: 0,
            seen: vec![0; world],
            seq: 0,
            recorded: 0,
            unrecorded: false,
            label: Label::NONE,
            call: Call::bare(Op::Barrier),
            fingerprint: 0,
            deadline: None,
            above: Vec::new(),
            reach: None,
        }
    }

    /// This rank.
    #[inline]
    pub fn rank(&self) -> usize {
        self.shared.rank
    }

    /// The number of ranks.
    #[inline]
    pub fn world(&self) -> usize {
        self.seen.len()
    }

    /// Bytes that a slot holds.
    #[inline]
    pub fn slot_bytes(&self) -> usize {
        self.shared.words.layout.slot
    }

    /// Where the collectives change their algorithm: the same on every rank.
    pub fn tuning(&self) -> Tuning {
        Tuning::for_world(&self.options.tuning, self.world())
    }

    /// Whether that is what was measured or given, and not what is built in.
    pub fn is_tuned(&self) -> bool {
        !self.options.tuning.is_empty()
    }

    /// What other threads of this rank may do with the group.
    pub fn handle(&self) -> Handle {
        Handle { shared: self.shared.clone(), liveness: self.liveness.clone() }
    }

    /// What every rank is doing, and did last.
    pub fn flight_record(&self) -> FlightRecord {
        FlightRecord::of(&self.shared, &self.liveness)
    }

    /// Makes the group the part on this host of a larger one, which calls these ranks by other numbers: errors say those.
    /// To be called before anything else.
    pub fn name_ranks(&mut self, names: Vec<usize>) {
        assert_eq!(names.len(), self.world());
        Arc::get_mut(&mut self.shared).expect("a group that nobody has a handle of yet").names = names;
    }

    /// Waits for up to `timeout` from here on, in the call that has begun and those after it.
    pub fn allow(&mut self, timeout: Duration) {
        self.options.timeout = timeout;
        self.deadline = None;
    }

    /// As [`begin`](Group::begin), for call number `seq` of the group of which this is a part.
    pub fn begin_as(&mut self, seq: u64, call: Call) -> Result<(), Failure> {
        self.seq = seq - 1;
        self.begin(call)
    }

    /// Begins a call: every wait until the next one checks that peers are in the same call.
    ///
    /// Always inlined, for a call is made of constants: written to memory in small pieces to be passed on, and read
    /// there in large ones, it would have to wait for the pieces to leave the store buffer.
    #[inline(always)]
    pub fn begin(&mut self, call: Call) -> Result<(), Failure> {
        self.seq += 1;
        // Of all calls so far: a rank that waits for nobody, as the root of a broadcast, is found out later. What is
        // done to the last value can be undone, so that once it differs between ranks it always does.
        self.fingerprint = call.fingerprint() ^ self.fingerprint.wrapping_mul(0x9E37_79B1);
        self.unrecorded = true;
        self.label = Label::NONE;
        self.span = Span::NONE;
        self.enter(call)?;
        if call.count > SMALL {
            self.record_call();
        }
        Ok(())
    }

    /// Notes what this rank is doing, for errors; fails if the group has ended.
    #[inline(always)]
    pub(super) fn enter(&mut self, call: Call) -> Result<(), Failure> {
        self.call = call;
        self.deadline = None;
        if self.shared.ended() {
            self.check_verdict()?;
        }
        Ok(())
    }

    /// Notes how the call that has begun is carried out, for the flight record.
    #[inline]
    pub fn note(&mut self, label: Label) {
        self.label = label;
        if !self.unrecorded {
            self.shared.words.control(self.rank()).records.0.label(self.recorded, label);
        }
    }

    /// Puts the call that has begun on record, if it isn't yet. Peers wait for a small call's first publication,
    /// so it goes on record behind that, or before its first long wait.
    #[inline]
    fn record_call(&mut self) {
        if std::mem::take(&mut self.unrecorded) {
            let (call, label) = (self.call, self.label);
            self.record(&call, label);
        }
    }

    #[inline]
    pub(super) fn record(&mut self, call: &Call, label: Label) {
        self.recorded += 1;
        let records = &self.shared.words.control(self.rank()).records.0;
        records.begin(self.recorded, self.seq, call, label, self.shared.clock.now());
    }

    /// Ends a call: wakes peers that sleep on what this rank has published.
    #[inline]
    pub fn end(&mut self) {
        self.record_call();
        self.finish(0);
        self.shared.ring();
    }

    /// Records that the call `before` the last one is done.
    #[inline]
    pub(super) fn finish(&mut self, before: u64) {
        let records = &self.shared.words.control(self.rank()).records.0;
        records.finish(self.recorded - before, self.shared.clock.now());
    }

    /// Says that each of the call's steps from here on uses up to `bytes` of its slot, before the first that does.
    /// Every rank says the same.
    #[inline]
    pub fn use_slots(&mut self, bytes: usize) {
        assert!(bytes <= self.slot_bytes());
        self.span = self.shared.words.layout.span(bytes);
    }

    /// Enters the next step and returns its number. The rank's slot for it may be written from now on: every
    /// peer has read what was there.
    #[inline]
    pub fn next_step(&mut self) -> Result<u64, Failure> {
        self.step += 1;
        let step = self.step;
        if step >= DEPTH {
            // Publishing step t - DEPTH + 1, a peer had read step t - DEPTH, whose place this step takes.
            let floor = step - DEPTH + 1;
            for peer in 0..self.world() {
                if self.seen[peer] < floor && peer != self.rank() {
                    // Some steps more than it must be, so that a rank which runs ahead need not look in every step. They
                    // come: a peer publishes a step once it has seen earlier ones, and this rank has published all
                    // of them.
                    self.wait_any_call(peer, floor + DEPTH / 2 - 1)?;
                }
            }
        }
        Ok(step)
    }

    /// What the step that the rank is in uses of its slot. It isn't published yet.
    #[inline]
    pub fn slot(&mut self) -> &mut [u8] {
        assert!(self.published < self.step, "the slot of a published step belongs to its readers");
        let words = &self.shared.words;
        let at = words.slot(self.rank(), self.step, self.span);
        // SAFETY: (1) the span lies within the slot, and the slot lies in the mapping, which outlives `self`; (2) this rank alone writes it, and
        // `self` is borrowed; (3) peers don't read it: what was there they have read (`next_step`), and what
        // will be there they read only once it is published, which needs `self` again.
        unsafe { std::slice::from_raw_parts_mut(at, self.span.bytes) }
    }

    /// Publishes the step: what was written to the slot before is visible to whoever waits for it.
    #[inline]
    pub fn publish(&mut self) {
        let flag = self.shared.words.flag(self.rank(), self.step);
        flag.fingerprint.store(self.fingerprint, Ordering::Relaxed);
        flag.step.store(self.step, Ordering::Release);
        self.published = self.step;
        let next = self.shared.words.flag(self.rank(), self.step + 1);
        cache::fetch_for_writing(std::ptr::from_ref(next).cast(), 1);
        self.record_call();
    }

    /// Asks the processor for the slot that the next step will write, if its `bytes` are few. Peers have read
    /// these cache lines, and it takes time to get them back; here it passes while this rank waits.
    #[inline]
    pub fn prefetch(&self, bytes: usize) {
        let words = &self.shared.words;
        let bytes = bytes.min(cache::FEW).min(self.span.bytes);
        cache::fetch_for_writing(words.slot(self.rank(), self.step + 1, self.span), bytes);
    }

    /// Publishes the step with up to [`INLINE`] bytes in the flag's own cache line.
    #[inline]
    pub fn publish_inline(&mut self, payload: &[u8]) {
        assert!(payload.len() <= INLINE && self.published < self.step);
        self.shared.words.flag(self.rank(), self.step).payload.with_mut(|to| {
            // SAFETY: (1) the payload has room for INLINE bytes; (2) as for `slot`.
            unsafe { std::ptr::copy_nonoverlapping(payload.as_ptr(), to.cast::<u8>(), payload.len()) }
        });
        self.publish();
    }

    /// What `peer` wrote to its slot in `step`. [`wait`](Group::wait) must have returned for it, and this rank
    /// must not have published a later step.
    #[inline]
    pub fn peer_slot(&self, peer: usize, step: u64) -> &[u8] {
        self.assert_readable(peer, step);
        let words = &self.shared.words;
        // SAFETY: (1) the span lies within the slot, and the slot in the mapping, which outlives `self`; (2) `peer` published `step`, and
        // the Acquire load that showed it makes the slot's bytes visible; (3) `peer` writes there again only
        // when this rank has published a later step, which needs `self` mutably.
        unsafe { std::slice::from_raw_parts(words.peer_slot(peer, step, self.span), self.span.bytes) }
    }

    /// What `peer` published in its flag's cache line in `step`; the conditions of
    /// [`peer_slot`](Group::peer_slot) hold.
    #[inline]
    pub fn peer_inline(&self, peer: usize, step: u64) -> &[u8; INLINE] {
        self.assert_readable(peer, step);
        // SAFETY: as for `peer_slot`.
        self.shared.words.flag(peer, step).payload.with(|payload| unsafe { &(*payload).0 })
    }

    #[inline]
    fn assert_readable(&self, peer: usize, step: u64) {
        assert!(
            self.seen[peer] >= step && self.published <= step,
            "step {step} of rank {peer} can't be read now"
        );
    }

    /// Waits until `peer` has published `step` in this same call.
    #[inline]
    pub fn wait(&mut self, peer: usize, step: u64) -> Result<(), Failure> {
        self.wait_any_call(peer, step)?;
        if self.shared.words.flag(peer, step).fingerprint.load(Ordering::Relaxed) != self.fingerprint {
            return Err(self.mismatch(peer));
        }
        Ok(())
    }

    /// Waits for every peer's `step`.
    #[inline]
    pub fn wait_all(&mut self, step: u64) -> Result<(), Failure> {
        for peer in 0..self.world() {
            if peer != self.rank() {
                self.wait(peer, step)?;
            }
        }
        Ok(())
    }

    /// Every rank's `mine`, of up to [`INLINE`] bytes, in rank order: a step of its own within a call.
    pub fn exchange<const N: usize>(&mut self, mine: [u8; N]) -> Result<Vec<[u8; N]>, Failure> {
        let step = self.next_step()?;
        self.publish_inline(&mine);
        self.wait_all(step)?;
        let of = |rank: usize| {
            let mut theirs = mine;
            if rank != self.rank() {
                theirs.copy_from_slice(&self.peer_inline(rank, step)[..N]);
            }
            theirs
        };
        Ok((0..self.world()).map(of).collect())
    }

    #[inline]
    fn wait_any_call(&mut self, peer: usize, step: u64) -> Result<(), Failure> {
        self.wait_for(Awaited::Step { peer, step })?;
        self.seen[peer] = step;
        Ok(())
    }

    #[inline]
    pub(super) fn wait_for(&mut self, awaited: Awaited) -> Result<(), Failure> {
        for _ in 0..self.patience.quick_looks {
            if awaited.arrived(&self.shared) {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        if awaited.arrived(&self.shared) { Ok(()) } else { self.wait_long(awaited) }
    }

    #[cold]
    #[inline(never)]
    fn wait_long(&mut self, awaited: Awaited) -> Result<(), Failure> {
        self.record_call();
        let deadline = *self.deadline.get_or_insert_with(|| Deadline::after(self.options.timeout));
        let arrived = || awaited.arrived(&self.shared);
        self.shared.ring();
        if self.patience.spin_until(arrived) {
            self.deadline = None;
            return Ok(());
        }
        let me = self.shared.words.control(self.rank());
        loop {
            // Whatever happens from here on rings, and ends the sleep.
            let bell = me.doorbell.0.look();
            // Every peer that hasn't come to a step is needed, by this rank or by one that it waits for, and that
            // one may be elsewhere for long: so a death is known at once.
            for peer in awaited.late(&self.shared) {
                // Where it fails, for whom it waited stays to be seen, until that is long ago: in a group above, peers
                // may find out just now who is late, before this rank has come there.
                self.check_peer(peer, awaited.of(peer), deadline)?;
            }
            self.show_waiting(awaited.peers().last().map(|peer| (peer, deadline.remaining())));
            self.sleep(awaited, bell, deadline);
            if arrived() {
                self.show_waiting(None);
                // However long a call takes, it is late only where nobody comes.
                self.deadline = None;
                return Ok(());
            }
        }
    }

    /// Shows everyone for whom this rank waits, and for how long it will: in the groups above too, where its peers may
    /// wait for it.
    pub(super) fn show_waiting(&self, waiting: Option<(usize, Duration)>) {
        self.shared.show_waiting(waiting);
        for above in &self.above {
            if let Some(shared) = above.shared.upgrade() {
                shared.show_waiting(waiting.map(|(peer, remaining)| (above.ranks[peer], remaining)));
            }
        }
    }

    /// For how much longer a peer will wait in a call of another group, if it has been seen to after `moment`: a group
    /// that was split from this one, or that was made from the same as this one.
    pub(super) fn still_waits(&self, peer: usize, moment: u64, reading: &Reading) -> Option<Duration> {
        let below = self.shared.still_waits(peer, moment, reading);
        let above = self
            .above
            .iter()
            .filter_map(|above| above.shared.upgrade()?.still_waits(above.ranks[peer], moment, reading));
        above.chain(below).max()
    }

    /// Sleeps until somebody rings, or it is time to look whether the peers are alive.
    fn sleep(&self, awaited: Awaited, bell: u32, deadline: Deadline) {
        let me = self.shared.words.control(self.rank());
        let sleepers = &self.shared.words.header().sleepers.0;
        me.sleeping.store(1, Ordering::Relaxed);
        sleepers.fetch_add(1, Ordering::Relaxed);
        // Pairs with the fence in `Shared::ring`: either this rank sees what was published, or the publisher
        // sees a sleeper.
        fence(Ordering::SeqCst);
        if !awaited.arrived(&self.shared) {
            me.doorbell.0.sleep(bell, LIVENESS_INTERVAL.min(deadline.remaining()));
        }
        me.sleeping.store(0, Ordering::Relaxed);
        sleepers.fetch_sub(1, Ordering::Relaxed);
    }

    /// Fails if waiting for `peer` has become useless: the group ended, the peer is gone, or time is up.
    fn check_peer(&self, peer: usize, awaited: Awaited, deadline: Deadline) -> Result<(), Failure> {
        self.check_verdict()?;
        // Before the last look at what is awaited, which the peer may have published before it went.
        let gone = self.gone(peer);
        if awaited.arrived(&self.shared) {
            return Ok(());
        }
        if let Some(how) = gone {
            return Err(self.lost_peer(peer, how));
        }
        let (rank, call, seq) = (self.shared.name(self.rank()), self.call, self.seq);
        if deadline.passed() {
            let blamed = self.shared.blamed(&awaited.late(&self.shared), deadline.budget());
            let waiting_for = blamed.into_iter().map(|r| self.shared.name(r)).collect();
            let (after, instead) = (deadline.budget(), self.flight_record().difference());
            return Err(self.fail(Error::Timeout {
                rank,
                call,
                seq,
                waiting_for,
                after,
                instead: instead.into(),
            }));
        }
        Ok(())
    }

    /// How `peer` has gone, if it has.
    pub(super) fn gone(&self, peer: usize) -> Option<&'static str> {
        // In this order: a process that leaves and ends between the two has left.
        let ended = self.liveness.ended(peer);
        let left = self.shared.words.control(peer).state.load(Ordering::Acquire) == LEFT;
        if left { Some("it left the group") } else { ended.then_some("its process ended") }
    }

    /// Ends the group because `peer` has gone.
    pub(super) fn lost_peer(&self, peer: usize, how: &str) -> Failure {
        let how = format!("{how}{}", self.flight_record().last_seen(peer));
        let (rank, peer) = (self.shared.name(self.rank()), self.shared.name(peer));
        self.fail(Error::PeerLost { rank, peer, call: self.call, seq: self.seq, how })
    }

    #[cold]
    #[inline(never)]
    fn mismatch(&self, peer: usize) -> Failure {
        let (rank, seq, call) = (self.rank(), self.seq, self.call);
        let records = |rank: usize| &self.shared.words.control(rank).records.0;
        // The peer may have published before it put its call on record, and not after.
        let soon = Deadline::after(RECORDED_WITHIN);
        while records(peer).collective(seq).is_none() && !soon.passed() {}
        let ours = |of: u64| if of == seq { Some(call) } else { records(rank).collective(of) };
        let differs = |of: u64| {
            let (ours, theirs) = (ours(of)?, records(peer).collective(of)?);
            (ours != theirs).then_some((of, ours, theirs))
        };
        // It may have been an earlier call, in which neither waited for the other.
        match (seq.saturating_sub(RECORDS as u64)..=seq).find_map(differs) {
            Some((seq, ours, theirs)) => self.disagree(peer, seq, ours, theirs),
            None => {
                let (rank, peer) = (self.shared.name(rank), self.shared.name(peer));
                let why = format!(
                    "rank {peer} made another call than this rank, in {call} or before it, that is no longer on record"
                );
                self.fail(Error::Aborted { rank, by: rank, call, seq, why })
            }
        }
    }

    /// Ends the group because this rank and `peer` made calls that don't fit together, as their number `seq`.
    pub(super) fn disagree(&self, peer: usize, seq: u64, ours: Call, theirs: Call) -> Failure {
        let (rank, peer) = (self.shared.name(self.rank()), self.shared.name(peer));
        let ((a, a_call), (b, b_call)) =
            if rank < peer { ((rank, ours), (peer, theirs)) } else { ((peer, theirs), (rank, ours)) };
        self.fail(Error::Mismatch { rank, seq, a, a_call: Box::new(a_call), b, b_call: Box::new(b_call) })
    }

    /// Ends the group for every rank, with `error` as the reason unless another was first; returns what this
    /// rank reports.
    pub fn fail(&self, error: Error) -> Failure {
        self.shared.fail(error, self.call, self.seq)
    }

    /// Ends the group for every rank because of an error that another layer has met, unless it has ended.
    pub fn end_with(&self, error: &Error) {
        self.shared.end_with(error);
    }

    /// Wakes peers that sleep on what this rank has published, before it waits elsewhere.
    #[inline]
    pub fn ring(&self) {
        self.shared.ring();
    }

    pub(super) fn check_verdict(&self) -> Result<(), Failure> {
        self.shared.verdict(self.call, self.seq).map_or(Ok(()), Err)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.shared.leave(|rank| self.liveness.ended(rank));
    }
}

/// What any thread of a rank may do with its group, whatever the rank is waiting for.
#[derive(Clone, Debug)]
pub struct Handle {
    shared: Arc<Shared>,
    liveness: Liveness,
}

impl Handle {
    /// Ends the group: every rank's current or next call fails with [`Error::Aborted`] and `why`. Does nothing
    /// if the group has ended already.
    pub fn abort(&self, why: &str) {
        let call = Call::bare(Op::Barrier);
        self.shared.fail(Error::InvalidArgument(why.to_owned()), call, 0);
    }

    /// Ends the group for every rank because of an error that another layer has met, unless it has ended.
    pub fn end_with(&self, error: &Error) {
        self.shared.end_with(error);
    }

    /// What every rank is doing, and did last.
    pub fn flight_record(&self) -> FlightRecord {
        FlightRecord::of(&self.shared, &self.liveness)
    }
}
