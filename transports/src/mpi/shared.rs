//! A group over MPI as the threads of one rank see it: who is in it, why it ended, and what this rank has called.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tensorwire_core::{Call, Op};

use super::offload::Own;
use super::raw::Buffer;
use super::world::{Tag, World};
use super::{end, raw};
use crate::shm::clock::Clock;
use crate::shm::record::{Label, Records};
use crate::shm::verdict::Verdict;
use crate::shm::{CallRecord, FlightRecord, RankRecord, RankState};

/// For an error of a rank that is in no call.
pub(super) const NOTHING: Call = Call::bare(Op::Barrier);

/// Bytes of a word about a group, at most.
pub(super) const CONTROL: usize = 1 + Verdict::BYTES;

/// What ranks tell each other about their group, besides its data.
#[derive(Debug)]
pub(super) enum Word {
    /// Why it has ended.
    Ended(Box<Verdict>),
    /// This rank's time is up, and it asks whether the one that it waits for waits as well.
    Asks(usize),
    /// This rank does.
    Waits(usize),
}

impl Word {
    fn bytes(&self) -> Vec<u8> {
        let number = |kind: u8, rank: usize| [&[kind][..], &(rank as u64).to_le_bytes()].concat();
        match self {
            Word::Ended(verdict) => [&[1][..], verdict.bytes()].concat(),
            Word::Asks(rank) => number(2, *rank),
            Word::Waits(rank) => number(3, *rank),
        }
    }

    /// What these bytes say, if it is a word.
    pub(super) fn parse(bytes: &[u8]) -> Option<Word> {
        let (kind, rest) = bytes.split_first()?;
        let rank = || Some(u64::from_le_bytes(rest.try_into().ok()?) as usize);
        match kind {
            1 if rest.len() == Verdict::BYTES => Some(Word::Ended(Box::new(Verdict::from_bytes(rest)))),
            2 => Some(Word::Asks(rank()?)),
            3 => Some(Word::Waits(rank()?)),
            _ => None,
        }
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) over: Arc<World>,
    /// This rank in the group, and each of its ranks' number in the world.
    pub(super) rank: usize,
    pub(super) ranks: Vec<usize>,
    /// What tells this group's messages from others'.
    pub(super) context: u32,
    /// Set, Release, after the verdict, once; read, Acquire, before it.
    failed: AtomicBool,
    verdict: Mutex<Option<Verdict>>,
    /// Whether waits spin. Any thread of the rank may set it at any time; a hint: Relaxed.
    spins: AtomicBool,
    pub(super) records: Records,
    clock: Clock,
    /// The number of the call that is in one of MPI's own collectives; 0 if none is. The caller's thread sets it, Relaxed;
    /// the watch reads it, Relaxed, and acts only on what it has seen for long.
    offloaded: AtomicU64,
    /// For MPI's own collectives; made for the first.
    pub(super) own: OnceLock<Own>,
    /// Whether the others know from this rank that the group has ended. Relaxed: who is first tells them.
    told: AtomicBool,
}

impl Shared {
    pub(super) fn new(over: Arc<World>, ranks: Vec<usize>, context: u32) -> Shared {
        let rank = ranks.iter().position(|r| *r == over.rank()).expect("this rank is one of them");
        Shared {
            spins: AtomicBool::new(over.spins),
            over,
            rank,
            ranks,
            context,
            failed: AtomicBool::new(false),
            verdict: Mutex::new(None),
            records: Records::new(),
            clock: Clock::of_this_machine(),
            offloaded: AtomicU64::new(0),
            own: OnceLock::new(),
            told: AtomicBool::new(false),
        }
    }

    #[inline]
    pub(super) fn world(&self) -> usize {
        self.ranks.len()
    }

    #[inline]
    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    pub(super) fn verdict(&self) -> Option<Verdict> {
        *self.verdict.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn spins(&self) -> bool {
        self.spins.load(Ordering::Relaxed)
    }

    /// Sets whether waits spin.
    pub(super) fn set_spins(&self, spins: bool) {
        self.spins.store(spins && self.over.spins, Ordering::Relaxed);
    }

    /// Ends the group with `verdict`, unless it has ended with another: the one that holds. Who ends it tells all others.
    pub(super) fn fail(&self, verdict: Verdict) -> Verdict {
        let mut held = self.verdict.lock().unwrap_or_else(PoisonError::into_inner);
        let held = *held.get_or_insert(verdict);
        self.failed.store(true, Ordering::Release);
        // A thread that may not call MPI leaves it to the one that may, when that learns of it.
        let tells = held.by() == self.rank && raw::enter().is_ok();
        if tells && !self.told.swap(true, Ordering::Relaxed) {
            let word = Word::Ended(Box::new(held));
            (0..self.world()).filter(|who| *who != self.rank).for_each(|who| self.say(who, &word));
        }
        held
    }

    /// Tells a peer something about the group, if MPI can.
    pub(super) fn say(&self, who: usize, word: &Word) {
        self.send(who, Tag::Control, word.bytes());
    }

    /// Sends a peer a small message that nobody waits for.
    pub(super) fn send(&self, who: usize, tag: Tag, bytes: Vec<u8>) {
        let (to, tag, len) = (self.ranks[who], self.over.tag(self.context, tag), bytes.len());
        if !raw::is_over()
            && !self.over.has_ended(to)
            && let Ok(sent) = self.over.comm.send(Buffer::from(bytes), len, to, tag, false)
        {
            end::leave_behind([sent]);
        }
    }

    /// Notes that the call `seq` is in one of MPI's own collectives; 0 that none is.
    #[inline]
    pub(super) fn watched(&self, seq: u64) {
        self.offloaded.store(seq, Ordering::Relaxed);
    }

    /// The call that is.
    pub(super) fn offloaded(&self) -> u64 {
        self.offloaded.load(Ordering::Relaxed)
    }

    /// Records that this rank begins a call, its `number`th of any kind.
    #[inline]
    pub(super) fn begins(&self, number: u64, seq: u64, call: &Call) {
        self.records.begin(number, seq, call, Label::NONE, self.clock.now());
    }

    /// Records that a call is done.
    #[inline]
    pub(super) fn ends(&self, number: u64) {
        self.records.finish(number, self.clock.now());
    }

    /// What this rank is doing, and did last. Of the others it knows nothing.
    pub(super) fn flight_record(&self) -> FlightRecord {
        let reading = self.clock.reading();
        let calls = self.records.read().into_iter().map(|c| CallRecord {
            seq: c.seq,
            call: c.call,
            algorithm: c.label.to_string(),
            began: reading.since(c.started),
            took: (c.finished != 0).then(|| reading.between(c.started, c.finished)),
        });
        let (rank, pid) = (self.rank, std::process::id());
        let calls = calls.collect();
        let own = RankRecord { rank, pid, state: RankState::Member, waits_for: None, calls };
        let failure = self.verdict().map(|v| v.error(rank, NOTHING, 0).to_string());
        FlightRecord { ranks: vec![own], failure }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensorwire_core::Error;

    #[test]
    fn words_survive_the_way_and_anything_else_is_none() {
        let verdict = Verdict::new(3, &Error::invalid("enough"));
        match Word::parse(&Word::Ended(Box::new(verdict)).bytes()) {
            Some(Word::Ended(v)) => assert_eq!((v.by(), v.bytes()), (3, verdict.bytes())),
            wrong => panic!("{wrong:?}"),
        }
        assert!(matches!(Word::parse(&Word::Asks(7).bytes()), Some(Word::Asks(7))));
        assert!(matches!(Word::parse(&Word::Waits(1 << 20).bytes()), Some(Word::Waits(0x10_0000))));
        for bytes in [&[][..], &[1], &[1; 9], &[2], &[2; 10], &[9; 9], &[1; CONTROL + 1]] {
            assert!(Word::parse(bytes).is_none(), "{bytes:?}");
        }
    }
}
