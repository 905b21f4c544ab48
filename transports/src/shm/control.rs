//! The words that ranks share: the group header, a control page a rank, and the flag lines.
//!
//! | word | written by | read by | pairing |
//! | --- | --- | --- | --- |
//! | `Flag::step` | its rank, Release, after the step's payload and slot | peers, Acquire | makes the step's data visible |
//! | `Header::sleepers`, `Control::sleeping` | a rank about to sleep, then SeqCst fence, then it reads the flag once more | a rank that published, after a SeqCst fence | one of the two sees the other (Dekker) |
//! | `Control::doorbell` | ringers, Release | its rank, Acquire, before the last look at the flag; then the kernel, in futex_wait | a ring after that look makes futex_wait return |
//! | `Control::state` | its rank, Release, once, when it leaves | peers, Acquire, before the last look at the flag | what was published before leaving is seen |
//! | `Header::verdict_state` | the first rank that fails: CAS to WRITING, then READY, Release | everyone, Acquire | makes the verdict visible |
//! | `Control::shrinking` | its rank, Release | the decider, Acquire | the rank is out of its call |
//! | `Header::decider` | CAS by the lowest living rank, AcqRel; a dead decider is replaced | itself | one decides |
//! | `Header::decided` | the decider, Release, after `decision` | everyone, Acquire | makes the decision visible |
//! | `Header::left` | each rank once, when it leaves, AcqRel | itself | the last to leave comes after all others |
//! | `LaneHead::written` | the lane's sender, Release, after the bytes | the receiver, Acquire | makes the bytes visible |
//! | `LaneHead::read` | the lane's receiver, Release, after copying | the sender, Acquire | the bytes may be overwritten |
//! | `CallRecord` words | its rank, Relaxed; `seq` Release | peers, after a flag of that call | what the rank called, for error messages |

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use tensorwire_core::Call;

use super::layout::{FLAG, INLINE, MAX_WORLD, PAGE};
use super::verdict::Verdict;

/// Calls a rank keeps on record.
const RECORDS: usize = 32;

#[repr(C, align(4096))]
pub(super) struct Header {
    pub(super) verdict_state: AtomicU32,
    pub(super) verdict: UnsafeCell<Verdict>,
    /// Ranks that have left.
    pub(super) left: AtomicU32,
    /// After a failure, the rank that decides who goes on, plus 1.
    pub(super) decider: AtomicU32,
    /// 1 once `decision` can be read.
    pub(super) decided: AtomicU32,
    pub(super) decision: UnsafeCell<Decision>,
    /// Ranks asleep or about to be; on a cache line that changes only when somebody sleeps.
    pub(super) sleepers: Line<AtomicU32>,
}

#[repr(C, align(4096))]
pub(super) struct Control {
    pub(super) state: AtomicU32,
    pub(super) sleeping: AtomicU32,
    /// 1 once the rank wants to go on without those that are gone.
    pub(super) shrinking: AtomicU32,
    pub(super) doorbell: Line<AtomicU32>,
    calls: Line<[CallRecord; RECORDS]>,
}

/// Who goes on after a failure, and in which part of the memory.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Decision {
    pub(super) start: u64,
    /// A bit a rank.
    members: [u64; MAX_WORLD / 64],
}

impl Decision {
    pub(super) fn new(start: u64, ranks: &[usize]) -> Decision {
        let mut members = [0; MAX_WORLD / 64];
        ranks.iter().for_each(|r| members[r / 64] |= 1 << (r % 64));
        Decision { start, members }
    }

    pub(super) fn ranks(&self) -> Vec<usize> {
        (0..MAX_WORLD).filter(|r| self.members[r / 64] >> (r % 64) & 1 == 1).collect()
    }
}

/// `Control::state` of a rank that has left the group. 0 is a member.
pub(super) const LEFT: u32 = 1;

/// A value on cache lines of its own.
#[repr(C, align(128))]
pub(super) struct Line<T>(pub(super) T);

/// The two counters of a lane, each on a line of its own; the lane's bytes follow.
#[repr(C)]
pub(super) struct LaneHead {
    /// Bytes that the sender has written since the group began.
    pub(super) written: Line<AtomicU64>,
    /// Bytes that the receiver has read.
    pub(super) read: Line<AtomicU64>,
}

#[repr(C)]
struct CallRecord {
    seq: AtomicU64,
    words: [AtomicU64; 4],
}

/// One rank's word to its peers about one step, with the payload of small messages in the same cache line.
#[repr(C, align(128))]
pub(super) struct Flag {
    /// The step that the rank has published last in this place. Steps start at 1.
    pub(super) step: AtomicU64,
    /// The fingerprint of the call that the step belongs to.
    pub(super) fingerprint: AtomicU32,
    pub(super) payload: UnsafeCell<Payload>,
}

/// Aligned for any element type.
#[repr(C, align(16))]
pub(super) struct Payload(pub(super) [u8; INLINE]);

const _: () =
    assert!(size_of::<Header>() == PAGE && size_of::<Control>() == PAGE && size_of::<Flag>() == FLAG);
// Step, fingerprint and payload arrive together: they share one 64-byte cache line.
const _: () = assert!(std::mem::offset_of!(Flag, payload) + INLINE <= 64);

impl Control {
    /// Records that this rank's call number `seq` is `call`.
    #[inline]
    pub(super) fn record(&self, seq: u64, call: &Call) {
        let record = &self.calls.0[seq as usize % RECORDS];
        for (word, value) in record.words.iter().zip(call.to_words()) {
            word.store(value, Ordering::Relaxed);
        }
        record.seq.store(seq, Ordering::Release);
    }

    /// This rank's call number `seq`, if it is still on record.
    pub(super) fn recorded(&self, seq: u64) -> Option<Call> {
        let record = &self.calls.0[seq as usize % RECORDS];
        let before = record.seq.load(Ordering::Acquire);
        let words = record.words.each_ref().map(|w| w.load(Ordering::Acquire));
        // A rank that runs ahead may be overwriting the record: then its number has changed.
        (before == seq && record.seq.load(Ordering::Relaxed) == seq).then(|| Call::from_words(words))?
    }
}
