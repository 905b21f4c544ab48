//! A group's part of the memory as one rank sees it, and what any thread of the rank may do with it: end the
//! group, and wake those who sleep.

use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::Duration;

use rustix::thread::futex;
use tensorwire_core::{Call, Error};

use super::Failure;
use super::control::{Control, Flag, Header, LEFT, LaneHead};
use super::layout::Layout;
use super::memory::Part;
use super::verdict::Verdict;

pub(super) const NO_VERDICT: u32 = 0;
const WRITING: u32 = 1;
const READY: u32 = 2;

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) part: Part,
    pub(super) layout: Layout,
    pub(super) rank: usize,
}

impl Shared {
    pub(super) fn world(&self) -> usize {
        self.layout.world
    }

    pub(super) fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.world()).filter(move |r| *r != rank)
    }

    pub(super) fn header(&self) -> &Header {
        // SAFETY: (1) the layout puts a header here, aligned to a page; (2) all its fields are atomics, or
        // guarded by one (`verdict`), valid from all zeros; (3) the part outlives `self`.
        unsafe { &*self.part.at(0).cast() }
    }

    pub(super) fn control(&self, rank: usize) -> &Control {
        // SAFETY: as for `header`; `rank` is below the world's size at every caller.
        unsafe { &*self.part.at(self.layout.control(rank)).cast() }
    }

    #[inline]
    pub(super) fn flag(&self, rank: usize, step: u64) -> &Flag {
        debug_assert!(rank < self.world());
        // SAFETY: as for `header`; `payload` is guarded by `step`.
        unsafe { &*self.part.at(self.layout.flag(rank, step)).cast() }
    }

    pub(super) fn lane(&self, from: usize, to: usize) -> &LaneHead {
        debug_assert!(from < self.world() && to < self.world());
        // SAFETY: as for `header`.
        unsafe { &*self.part.at(self.layout.lane(from, to)).cast() }
    }

    #[inline]
    pub(super) fn ended(&self) -> bool {
        self.header().verdict_state.load(Ordering::Relaxed) != NO_VERDICT
    }

    /// Ends the group for every rank, with `error` as the reason unless another rank was first; returns what
    /// this rank reports, which was in call number `seq`, `call`.
    pub(super) fn fail(&self, error: Error, call: Call, seq: u64, timeout: Duration) -> Failure {
        let header = self.header();
        let state = &header.verdict_state;
        // Acquire on failure: the winner's verdict may be read below.
        if state.compare_exchange(NO_VERDICT, WRITING, Ordering::Relaxed, Ordering::Acquire).is_ok() {
            // SAFETY: winning the exchange makes this rank the verdict's only writer, and nobody reads it
            // before READY.
            unsafe { header.verdict.get().write(Verdict::new(self.rank, &error)) };
            state.store(READY, Ordering::Release);
            self.wake_everyone();
        } else if let Some(first) = self.verdict(call, seq, timeout) {
            return first;
        }
        Box::new(error)
    }

    /// The error that ended the group, if one did, as this rank reports it.
    #[cold]
    pub(super) fn verdict(&self, call: Call, seq: u64, timeout: Duration) -> Option<Failure> {
        let header = self.header();
        // Acquire: pairs with the Release store of READY in `fail`.
        if header.verdict_state.load(Ordering::Acquire) != READY {
            return None;
        }
        // SAFETY: READY is stored after the verdict was written, and nobody writes it again.
        let verdict = unsafe { &*header.verdict.get() };
        Some(Box::new(verdict.error(self.rank, call, seq, timeout)))
    }

    /// Wakes peers that sleep, if any do.
    #[inline]
    pub(super) fn ring(&self) {
        // Pairs with the fence in `Group::sleep`.
        fence(Ordering::SeqCst);
        if self.header().sleepers.0.load(Ordering::Relaxed) != 0 {
            self.wake_sleepers();
        }
    }

    #[cold]
    #[inline(never)]
    fn wake_sleepers(&self) {
        for peer in self.peers() {
            let control = self.control(peer);
            if control.sleeping.load(Ordering::Relaxed) != 0 {
                control.doorbell.0.fetch_add(1, Ordering::Release);
                futex_wake(&control.doorbell.0);
            }
        }
    }

    /// Wakes every rank, this one's other threads included.
    pub(super) fn wake_everyone(&self) {
        for rank in 0..self.world() {
            let bell = &self.control(rank).doorbell.0;
            bell.fetch_add(1, Ordering::Release);
            futex_wake(bell);
        }
    }

    /// Leaves the group. The last rank to leave returns its memory to the system.
    pub(super) fn leave(&self) {
        // Release: pairs with the Acquire load in `Group::check_peer`, which then sees all that was published.
        self.control(self.rank).state.store(LEFT, Ordering::Release);
        self.wake_everyone();
        self.part.leave(&self.header().left, self.world());
    }

    /// The ranks that the verdict says are gone or don't answer.
    pub(super) fn lost(&self) -> Vec<usize> {
        let header = self.header();
        if header.verdict_state.load(Ordering::Acquire) != READY {
            return Vec::new();
        }
        // SAFETY: as in `verdict`.
        unsafe { &*header.verdict.get() }.lost()
    }
}

/// Sleeps until `word` is no longer `expected`, somebody wakes it, or the time is over; which of them doesn't
/// matter to any caller. The futex is shared between processes, so neither call may use the PRIVATE flag.
pub(super) fn futex_wait(word: &AtomicU32, expected: u32, timeout: Duration) {
    let timeout =
        futex::Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    let _ = futex::wait(word, futex::Flags::empty(), expected, Some(&timeout));
}

fn futex_wake(word: &AtomicU32) {
    // It can fail only for an address that isn't mapped.
    let _ = futex::wake(word, futex::Flags::empty(), i32::MAX as u32);
}
