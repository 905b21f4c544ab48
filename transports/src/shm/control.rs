//! The words that ranks share: the group header, a control page a rank, and the flag lines.
//!
//! | word | written by | read by | pairing |
//! | --- | --- | --- | --- |
//! | `Flag::step` | its rank, Release, after the step's payload and slot | peers, Acquire | makes the step's data visible |
//! | `Header::sleepers`, `Control::sleeping` | a rank about to sleep, then SeqCst fence, then it reads the flag once more | a rank that published, after a SeqCst fence | one of the two sees the other (Dekker) |
//! | `Control::doorbell` | ringers, Release | its rank, Acquire, before it looks at anything else; then the kernel, when it sleeps | a ring after that look ends the sleep |
//! | `Control::state` | its rank, Release, once, when it leaves | peers, Acquire, before the last look at the flag | what was published before leaving is seen |
//! | `Header::failed` | CAS from 0 by a rank that fails, Release, after its `Control::verdict` | everyone, Acquire | makes that rank's verdict visible |
//! | `Control::shrinking` | its rank, Release | the others, Acquire | the rank is out of its call |
//! | `Header::decider` | CAS by the rank whose turn it is, AcqRel; a dead decider is replaced | itself | one decides |
//! | `Header::decided` | the decider, Release, after `decision` | everyone, Acquire | makes the decision visible |
//! | `LaneHead::written` | the lane's sender, Release, after the bytes | the receiver, Acquire | makes the bytes visible |
//! | `LaneHead::read` | the lane's receiver, Release, after copying | the sender, Acquire | the bytes may be overwritten |
//! | `Control::records` | its rank: see `record` | anyone | what the rank called |
//! | `Control::looked`, `awaits`, `remaining` | its rank, Relaxed, while it waits for long | anyone | says who keeps whom waiting, and for how long survivors wait for whom: no data depends on it |
//! | `Control::pid` | its rank, Relaxed, when it joins | anyone | a number for a person |
//!
//! All zeros is the state that a group begins in.

use super::bell::Doorbell;
use super::layout::{INLINE, MAX_WORLD};
use super::memory::PartHead;
use super::record::Records;
use super::sync::{AtomicU32, AtomicU64, UnsafeCell};
use super::verdict::Verdict;

#[repr(C, align(4096))]
pub(super) struct Header {
    /// What every part of the memory begins with.
    pub(super) part: PartHead,
    /// The rank whose verdict ended the group, plus 1.
    pub(super) failed: AtomicU32,
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
    /// The rank's process, as it numbers itself; 0 before it has joined.
    pub(super) pid: AtomicU32,
    /// How far the rank is on its way to go on without those that are gone: see `form`.
    pub(super) shrinking: AtomicU32,
    pub(super) sleeping: AtomicU32,
    /// While the rank waits for long: the peer that it waits for, when it last looked around, and for how many
    /// nanoseconds from then it goes on.
    pub(super) awaits: AtomicU32,
    pub(super) looked: AtomicU64,
    pub(super) remaining: AtomicU64,
    pub(super) doorbell: Line<Doorbell>,
    /// Why this rank says that the group ended.
    pub(super) verdict: UnsafeCell<Verdict>,
    pub(super) records: Line<Records>,
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

/// `Control::state` of a rank that has left the group. 0 is a member, or one to be.
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
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub(super) struct Payload(pub(super) [u8; INLINE]);

#[cfg(not(loom))]
mod sizes {
    use super::*;
    use crate::shm::layout::{FLAG, PAGE};

    const _: () =
        assert!(size_of::<Header>() == PAGE && size_of::<Control>() == PAGE && size_of::<Flag>() == FLAG);
    // Step, fingerprint and payload arrive together: they share one 64-byte cache line.
    const _: () = assert!(std::mem::offset_of!(Flag, payload) + INLINE <= 64);
}
