//! A group as one rank sees it, and what any thread of the rank may do with it: end it, wake those who sleep,
//! and look at what every rank is doing.

use std::time::Duration;

use tensorwire_core::{Call, Error};

use super::Failure;
use super::clock::{Clock, Reading};
use super::control::LEFT;
use super::sync::{Mutex, Ordering, fence};
use super::verdict::Verdict;
use super::words::Words;

/// A rank that waits looks around much more often than this, however busy the machine is.
const RECENTLY: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) words: Words,
    pub(super) rank: usize,
    pub(super) clock: Clock,
    /// What the group of which this is a host's part calls these ranks; empty for a group of its own.
    pub(super) names: Vec<usize>,
    /// Held by the thread of this rank that writes the rank's verdict.
    failing: Mutex,
}

impl Shared {
    pub(super) fn new(words: Words, rank: usize) -> Shared {
        // Relaxed: a number for a person.
        words.control(rank).pid.store(std::process::id(), Ordering::Relaxed);
        Shared { words, rank, clock: Clock::of_this_machine(), names: Vec::new(), failing: Mutex::default() }
    }

    pub(super) fn world(&self) -> usize {
        self.words.layout.world
    }

    /// What errors call a rank.
    pub(super) fn name(&self, rank: usize) -> usize {
        self.names.get(rank).copied().unwrap_or(rank)
    }

    pub(super) fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.world()).filter(move |r| *r != rank)
    }

    #[inline]
    pub(super) fn ended(&self) -> bool {
        // Relaxed: whoever goes on to read the verdict looks again.
        self.words.header().failed.load(Ordering::Relaxed) != 0
    }

    /// Ends the group for every rank, with `error` as the reason unless another was first; returns what this
    /// rank reports, which was in call number `seq`, `call`.
    pub(super) fn fail(&self, error: Error, call: Call, seq: u64) -> Failure {
        if self.end_with(&error) {
            return Box::new(error);
        }
        self.verdict(call, seq).unwrap_or_else(|| Box::new(error))
    }

    /// Ends the group for every rank, with `error` as the reason, unless it has ended; whether it hadn't.
    pub(super) fn end_with(&self, error: &Error) -> bool {
        let failed = &self.words.header().failed;
        let writing = self.failing.lock();
        if failed.load(Ordering::Acquire) == 0 {
            let verdict = Verdict::new(self.name(self.rank), error);
            // SAFETY: this rank alone writes its verdict, one thread at a time, and nobody reads it before the
            // exchange below, after which it isn't written again.
            self.words.control(self.rank).verdict.with_mut(|v| unsafe { v.write(verdict) });
            let mine = self.rank as u32 + 1;
            // Release: makes the verdict visible. There is no moment at which a rank that dies or stops would
            // leave the others with half a verdict.
            if failed.compare_exchange(0, mine, Ordering::Release, Ordering::Relaxed).is_ok() {
                self.wake_everyone();
                return true;
            }
        }
        drop(writing);
        false
    }

    /// The error that ended the group, if one did, as this rank reports it.
    #[cold]
    pub(super) fn verdict(&self, call: Call, seq: u64) -> Option<Failure> {
        self.look_at_verdict(|_, v| Box::new(v.error(self.name(self.rank), call, seq)))
    }

    /// The ranks that the verdict says are gone or don't answer.
    pub(super) fn lost(&self) -> Vec<usize> {
        self.look_at_verdict(|_, v| v.lost()).unwrap_or_default()
    }

    /// Calls `look` with the rank that ended the group, if one did, and its verdict.
    pub(super) fn look_at_verdict<R>(&self, look: impl FnOnce(usize, &Verdict) -> R) -> Option<R> {
        // Acquire: pairs with the exchange in `fail`.
        let by = self.words.header().failed.load(Ordering::Acquire).checked_sub(1)? as usize;
        // SAFETY: it was written before the exchange that named its rank, and isn't written again.
        Some(self.words.control(by).verdict.with(|v| look(by, unsafe { &*v })))
    }

    /// Wakes peers that sleep, if any do.
    #[inline]
    pub(super) fn ring(&self) {
        // Pairs with the fence in `Group::sleep`.
        fence(Ordering::SeqCst);
        if self.words.header().sleepers.0.load(Ordering::Relaxed) != 0 {
            self.wake_sleepers();
        }
    }

    #[cold]
    #[inline(never)]
    fn wake_sleepers(&self) {
        for peer in self.peers() {
            let control = self.words.control(peer);
            if control.sleeping.load(Ordering::Relaxed) != 0 {
                control.doorbell.0.ring();
            }
        }
    }

    /// Wakes every rank, this one's other threads included.
    pub(super) fn wake_everyone(&self) {
        (0..self.world()).for_each(|rank| self.words.control(rank).doorbell.0.ring());
    }

    /// Shows for whom this rank waits, and for how long it will, unless it has left the group: the memory may be
    /// somebody else's then.
    pub(super) fn show_waiting(&self, waiting: Option<(usize, Duration)>) {
        if self.has_left() {
            return;
        }
        let control = self.words.control(self.rank);
        let (peer, remaining) = waiting.unwrap_or((self.rank, Duration::ZERO));
        let remaining = u64::try_from(remaining.as_nanos()).unwrap_or(u64::MAX);
        control.awaits.store(peer as u32, Ordering::Relaxed);
        control.remaining.store(remaining, Ordering::Relaxed);
        control.looked.store(waiting.map_or(0, |_| self.clock.now()), Ordering::Relaxed);
    }

    fn has_left(&self) -> bool {
        self.words.control(self.rank).state.load(Ordering::Relaxed) == LEFT
    }

    /// For how much longer a rank will wait for another, if it has been seen to wait after `moment`.
    pub(super) fn still_waits(&self, rank: usize, moment: u64, reading: &Reading) -> Option<Duration> {
        if self.has_left() {
            return None;
        }
        let control = self.words.control(rank);
        let looked = control.looked.load(Ordering::Relaxed);
        let remaining = Duration::from_nanos(control.remaining.load(Ordering::Relaxed));
        (looked > moment).then(|| remaining.saturating_sub(reading.since(looked)))
    }

    /// The peer that a rank waits for, if it is seen to wait: it looks around every now and then, and has done
    /// so within `recently`.
    pub(super) fn awaited_by(&self, rank: usize, recently: Duration, reading: &Reading) -> Option<usize> {
        let control = self.words.control(rank);
        let looked = control.looked.load(Ordering::Relaxed);
        (looked != 0 && reading.since(looked) < recently)
            .then(|| control.awaits.load(Ordering::Relaxed) as usize)
            .filter(|peer| *peer < self.world())
    }

    /// Who keeps this rank from going on, of whom it knows that `late` haven't come within `timeout`: not those
    /// who wait themselves, but whom they wait for. Where all wait for each other, it is all who are late.
    pub(super) fn blamed(&self, late: &[usize], timeout: Duration) -> Vec<usize> {
        let (reading, recently) = (self.clock.reading(), RECENTLY.min(timeout / 2));
        let mut blamed = Vec::new();
        for first in late {
            let mut rank = *first;
            // A chain that is longer than the group is a circle.
            for _ in 0..self.world() {
                match self.awaited_by(rank, recently, &reading) {
                    Some(next) if next != self.rank => rank = next,
                    Some(_) => break,
                    None => {
                        blamed.push(rank);
                        break;
                    }
                }
            }
        }
        blamed.sort_unstable();
        blamed.dedup();
        if blamed.is_empty() { late.to_vec() } else { blamed }
    }

    /// Leaves the group, of which some ranks have `ended` without leaving.
    pub(super) fn leave(&self, ended: impl Fn(usize) -> bool) {
        // Release: pairs with the Acquire load in `Group::check_peer`, which then sees all that was published.
        self.words.control(self.rank).state.store(LEFT, Ordering::Release);
        self.wake_everyone();
        self.words.leave(self.rank, ended);
    }
}
