//! One rank's view of a group's shared memory, and the one protocol that every collective is made of: steps.
//!
//! The ranks of a group count the same **steps** from 1. In a step a rank writes data for its peers into its
//! own slot (or, if small, into its flag's cache line) and **publishes** the step; a peer **waits** for it
//! and reads. A rank publishes step `t` only when it has read all that it needs of step `t - 1` and before,
//! so a peer's step tells also what that peer has read: that is all there is to flow control, and a slot is
//! written again [`DEPTH`] steps later without a further message.
//!
//! A wait spins, then sleeps on the rank's doorbell. Whoever publishes rings the doorbells of sleepers before
//! it sleeps or returns itself.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use rustix::thread::futex;
use tensorwire_core::{Call, Deadline, Error, Op, Result};

use super::control::{Control, Flag, Header, LEFT};
use super::layout::{DEPTH, INLINE, Layout};
use super::segment::Segment;
use super::verdict::Verdict;
use super::{Options, wait::Patience};
use crate::liveness::Liveness;

/// How long a sleeping rank goes without looking whether its peers are alive.
const LIVENESS_INTERVAL: Duration = Duration::from_millis(20);

const NO_VERDICT: u32 = 0;
const WRITING: u32 = 1;
const READY: u32 = 2;

/// An error on the way up; boxed, so that the result of a wait is one word.
pub type Failure = Box<Error>;

/// One rank's membership in a group of ranks that share memory. Dropping it leaves the group.
#[derive(Debug)]
pub struct Group {
    segment: Arc<Segment>,
    rank: usize,
    liveness: Liveness,
    patience: Patience,
    timeout: Duration,
    /// The step that this rank is in.
    step: u64,
    /// The last step that this rank has published: `step`, or the one before while `step` is being written.
    published: u64,
    /// The highest step seen of each rank.
    seen: Vec<u64>,
    /// This rank's calls so far.
    seq: u64,
    call: Call,
    fingerprint: u32,
    /// When the current call gives up; set by its first wait that isn't short.
    deadline: Option<Deadline>,
}

impl Group {
    pub(super) fn new(segment: Arc<Segment>, rank: usize, liveness: Liveness, options: &Options) -> Group {
        let world = segment.layout().world;
        Group {
            segment,
            rank,
            liveness,
            patience: Patience::for_world(world),
            timeout: options.timeout,
            step: 0,
            published: 0,
            seen: vec![0; world],
            seq: 0,
            call: Call { op: Op::Barrier, dtype: None, reduce: None, count: 0, root: None, layout: 0 },
            fingerprint: 0,
            deadline: None,
        }
    }

    /// This rank.
    #[inline]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    #[inline]
    pub fn world(&self) -> usize {
        self.seen.len()
    }

    /// Bytes that a slot holds.
    #[inline]
    pub fn slot_bytes(&self) -> usize {
        self.layout().slot
    }

    fn layout(&self) -> &Layout {
        self.segment.layout()
    }

    fn header(&self) -> &Header {
        // SAFETY: (1) the layout puts a header here, aligned to a page; (2) all its fields are atomics, or
        // guarded by one (`verdict`), valid from all zeros; (3) the segment outlives `self`.
        unsafe { &*self.segment.at(0).cast() }
    }

    fn control(&self, rank: usize) -> &Control {
        // SAFETY: as for `header`; `rank` is below the world's size at every caller.
        unsafe { &*self.segment.at(self.layout().control(rank)).cast() }
    }

    #[inline]
    fn flag(&self, rank: usize, step: u64) -> &Flag {
        debug_assert!(rank < self.world());
        // SAFETY: as for `header`; `payload` is guarded by `step`.
        unsafe { &*self.segment.at(self.layout().flag(rank, step)).cast() }
    }

    /// Begins a call: every wait until the next one checks that peers are in the same call.
    #[inline]
    pub fn begin(&mut self, call: Call) -> Result<(), Failure> {
        self.seq += 1;
        self.call = call;
        self.fingerprint = call.fingerprint();
        self.deadline = None;
        self.control(self.rank).record(self.seq, &call);
        if self.header().verdict_state.load(Ordering::Relaxed) != NO_VERDICT {
            self.read_verdict()?;
        }
        Ok(())
    }

    /// Ends a call: wakes peers that sleep on what this rank has published.
    #[inline]
    pub fn end(&self) {
        self.ring();
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
                if self.seen[peer] < floor && peer != self.rank {
                    self.wait_any_call(peer, floor)?;
                }
            }
        }
        Ok(step)
    }

    /// The rank's own slot in the step it is in, which isn't published yet.
    #[inline]
    pub fn slot(&mut self) -> &mut [u8] {
        assert!(self.published < self.step, "the slot of a published step belongs to its readers");
        let layout = self.layout();
        let at = self.segment.at(layout.slot(self.rank, self.step));
        // SAFETY: (1) the slot lies in the mapping, which outlives `self`; (2) this rank alone writes it, and
        // `self` is borrowed; (3) peers don't read it: what was there they have read (`next_step`), and what
        // will be there they read only once it is published, which needs `self` again.
        unsafe { std::slice::from_raw_parts_mut(at, layout.slot) }
    }

    /// Publishes the step: what was written to the slot before is visible to whoever waits for it.
    #[inline]
    pub fn publish(&mut self) {
        let flag = self.flag(self.rank, self.step);
        flag.fingerprint.store(self.fingerprint, Ordering::Relaxed);
        flag.step.store(self.step, Ordering::Release);
        self.published = self.step;
    }

    /// Publishes the step with up to [`INLINE`] bytes in the flag's own cache line.
    #[inline]
    pub fn publish_inline(&mut self, payload: &[u8]) {
        assert!(payload.len() <= INLINE && self.published < self.step);
        let to = self.flag(self.rank, self.step).payload.get().cast::<u8>();
        // SAFETY: (1) the payload has room for INLINE bytes; (2) as for `slot`.
        unsafe { std::ptr::copy_nonoverlapping(payload.as_ptr(), to, payload.len()) };
        self.publish();
    }

    /// What `peer` wrote to its slot in `step`. [`wait`](Group::wait) must have returned for it, and this rank
    /// must not have published a later step.
    #[inline]
    pub fn peer_slot(&self, peer: usize, step: u64) -> &[u8] {
        self.assert_readable(peer, step);
        let layout = self.layout();
        // SAFETY: (1) the slot lies in the mapping, which outlives `self`; (2) `peer` published `step`, and
        // the Acquire load that showed it makes the slot's bytes visible; (3) `peer` writes there again only
        // when this rank has published a later step, which needs `self` mutably.
        unsafe { std::slice::from_raw_parts(self.segment.at(layout.slot(peer, step)), layout.slot) }
    }

    /// What `peer` published in its flag's cache line in `step`; the conditions of
    /// [`peer_slot`](Group::peer_slot) hold.
    #[inline]
    pub fn peer_inline(&self, peer: usize, step: u64) -> &[u8; INLINE] {
        self.assert_readable(peer, step);
        // SAFETY: as for `peer_slot`.
        unsafe { &(*self.flag(peer, step).payload.get()).0 }
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
        if self.flag(peer, step).fingerprint.load(Ordering::Relaxed) != self.fingerprint {
            return Err(self.mismatch(peer));
        }
        Ok(())
    }

    /// Waits for every peer's `step`.
    #[inline]
    pub fn wait_all(&mut self, step: u64) -> Result<(), Failure> {
        for peer in 0..self.world() {
            if peer != self.rank {
                self.wait(peer, step)?;
            }
        }
        Ok(())
    }

    #[inline]
    fn wait_any_call(&mut self, peer: usize, step: u64) -> Result<(), Failure> {
        let mut tries = self.patience.quick_looks;
        // Acquire: pairs with the Release store in the peer's `publish`.
        while self.flag(peer, step).step.load(Ordering::Acquire) < step {
            if tries == 0 {
                self.wait_long(peer, step)?;
                break;
            }
            tries -= 1;
            std::hint::spin_loop();
        }
        self.seen[peer] = step;
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn wait_long(&mut self, peer: usize, step: u64) -> Result<(), Failure> {
        let deadline = *self.deadline.get_or_insert_with(|| Deadline::after(self.timeout));
        self.ring();
        let flag = self.flag(peer, step);
        let arrived = || flag.step.load(Ordering::Acquire) >= step;
        if self.patience.spin_until(arrived) {
            return Ok(());
        }
        let me = self.control(self.rank);
        let sleepers = &self.header().sleepers.0;
        loop {
            self.check_peer(peer, step, deadline)?;
            me.sleeping.store(1, Ordering::Relaxed);
            sleepers.fetch_add(1, Ordering::Relaxed);
            // Acquire: a ring that comes after this look changes the word, and the kernel sees that.
            let bell = me.doorbell.0.load(Ordering::Acquire);
            // Pairs with the fence in `ring`: either this rank sees the step, or the publisher sees a sleeper.
            fence(Ordering::SeqCst);
            let idle = !arrived() && self.header().verdict_state.load(Ordering::Acquire) == NO_VERDICT;
            if idle {
                // A time-out, a signal or a changed word all mean the same: look again.
                let _ = futex_wait(&me.doorbell.0, bell, LIVENESS_INTERVAL.min(deadline.remaining()));
            }
            me.sleeping.store(0, Ordering::Relaxed);
            sleepers.fetch_sub(1, Ordering::Relaxed);
            if arrived() {
                return Ok(());
            }
        }
    }

    /// Fails if waiting for `peer` has become useless: the group ended, the peer is gone, or time is up.
    fn check_peer(&self, peer: usize, step: u64, deadline: Deadline) -> Result<(), Failure> {
        self.read_verdict()?;
        let left = self.control(peer).state.load(Ordering::Acquire) == LEFT;
        let ended = !left && self.liveness.ended(peer);
        // The peer may have published before it went: its state was read first.
        if self.flag(peer, step).step.load(Ordering::Acquire) >= step {
            return Ok(());
        }
        let (rank, call, seq) = (self.rank, self.call, self.seq);
        if left || ended {
            let how = if left { "it left the group" } else { "its process ended" }.to_owned();
            return Err(self.fail(Error::PeerLost { rank, peer, call, seq, how }));
        }
        if deadline.passed() {
            let late = |p: &usize| *p != rank && self.flag(*p, step).step.load(Ordering::Acquire) < step;
            let waiting_for = (0..self.world()).filter(late).collect();
            return Err(self.fail(Error::Timeout { rank, call, seq, waiting_for, after: deadline.budget() }));
        }
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn mismatch(&self, peer: usize) -> Failure {
        let (rank, seq, ours) = (self.rank, self.seq, self.call);
        let Some(theirs) = self.control(peer).recorded(seq).filter(|theirs| *theirs != ours) else {
            let why = format!("rank {peer} is in another call than {ours}, which it no longer has on record");
            return self.fail(Error::Aborted { rank, by: rank, call: ours, seq, why });
        };
        let ((a, a_call), (b, b_call)) =
            if rank < peer { ((rank, ours), (peer, theirs)) } else { ((peer, theirs), (rank, ours)) };
        self.fail(Error::Mismatch { rank, seq, a, a_call, b, b_call })
    }

    /// Ends the group for every rank, with `error` as the reason unless another rank was first; returns what
    /// this rank reports.
    pub fn fail(&self, error: Error) -> Failure {
        let header = self.header();
        let state = &header.verdict_state;
        // Acquire on failure: the winner's verdict may be read below.
        if state.compare_exchange(NO_VERDICT, WRITING, Ordering::Relaxed, Ordering::Acquire).is_ok() {
            // SAFETY: winning the exchange makes this rank the verdict's only writer, and nobody reads it
            // before READY.
            unsafe { header.verdict.get().write(Verdict::new(self.rank, &error)) };
            state.store(READY, Ordering::Release);
            self.wake_everyone();
        } else if let Err(first) = self.read_verdict() {
            return first;
        }
        Box::new(error)
    }

    /// The error that ended the group, if one did.
    #[cold]
    fn read_verdict(&self) -> Result<(), Failure> {
        let header = self.header();
        // Acquire: pairs with the Release store of READY in `fail`.
        if header.verdict_state.load(Ordering::Acquire) != READY {
            return Ok(());
        }
        // SAFETY: READY is stored after the verdict was written, and nobody writes it again.
        let verdict = unsafe { &*header.verdict.get() };
        Err(Box::new(verdict.error(self.rank, self.call, self.seq, self.timeout)))
    }

    /// Wakes peers that sleep, if any do.
    #[inline]
    fn ring(&self) {
        // Pairs with the fence in `wait_long`.
        fence(Ordering::SeqCst);
        if self.header().sleepers.0.load(Ordering::Relaxed) != 0 {
            self.wake_sleepers();
        }
    }

    #[cold]
    #[inline(never)]
    fn wake_sleepers(&self) {
        for peer in (0..self.world()).filter(|p| *p != self.rank) {
            let control = self.control(peer);
            if control.sleeping.load(Ordering::Relaxed) != 0 {
                control.doorbell.0.fetch_add(1, Ordering::Release);
                futex_wake(&control.doorbell.0);
            }
        }
    }

    fn wake_everyone(&self) {
        for peer in (0..self.world()).filter(|p| *p != self.rank) {
            let bell = &self.control(peer).doorbell.0;
            bell.fetch_add(1, Ordering::Release);
            futex_wake(bell);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Release: pairs with the Acquire load in `check_peer`, which then sees every step published here.
        self.control(self.rank).state.store(LEFT, Ordering::Release);
        self.wake_everyone();
    }
}

// The futex is shared between processes, so neither call may use the PRIVATE flag.
fn futex_wait(
    word: &std::sync::atomic::AtomicU32,
    expected: u32,
    timeout: Duration,
) -> rustix::io::Result<()> {
    let timeout =
        futex::Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    futex::wait(word, futex::Flags::empty(), expected, Some(&timeout))
}

fn futex_wake(word: &std::sync::atomic::AtomicU32) {
    // It can fail only for an address that isn't mapped.
    let _ = futex::wake(word, futex::Flags::empty(), 1);
}
