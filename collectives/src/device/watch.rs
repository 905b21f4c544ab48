//! The thread that sees what becomes of the other ranks. NCCL waits for a rank that has died, or that makes another call, as
//! long as it takes; the ranks' processors know. So the ranks exchange, 20 times a second and over whatever their communicator
//! runs on, where each is: an exchange that a rank doesn't come to says which and why, and two ranks whose calls
//! of one number differ are found by comparing.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tensorwire_core::{Call, Error, Result};
use tensorwire_transports::shm::CallRecord;

use super::communicator::Shared;

/// Time between two exchanges.
const INTERVAL: Duration = Duration::from_millis(50);

/// How long who leaves waits for the others to hear it.
const FAREWELL: Duration = Duration::from_secs(1);

/// Calls in a beat: the first that aren't done, and the last.
const FIRST: usize = 4;
const LAST: usize = 12;
const CALLS: usize = FIRST + LAST;

/// Words of a call in a beat.
const CALL: usize = 5;

/// Words of a beat.
const WORDS: usize = 4 + CALLS * CALL;

/// Where a rank is.
#[derive(Clone, Debug)]
pub(super) struct Beat {
    pub(super) pid: u32,
    /// Collectives that it has launched, and those that its device has done.
    pub(super) launched: u64,
    pub(super) done: u64,
    /// Whether this is its last one.
    pub(super) leaves: bool,
    calls: Vec<(u64, Call)>,
}

impl Beat {
    pub(super) fn new(
        pid: u32,
        launched: u64,
        done: u64,
        leaves: bool,
        first: impl Iterator<Item = (u64, Call)>,
        last: impl Iterator<Item = (u64, Call)>,
    ) -> Beat {
        let mut calls: Vec<_> = first.take(FIRST).chain(last.take(LAST)).collect();
        calls.sort_by_key(|(seq, _)| *seq);
        calls.dedup_by_key(|(seq, _)| *seq);
        Beat { pid, launched, done, leaves, calls }
    }

    fn to_words(&self) -> [u64; WORDS] {
        let mut words = [0; WORDS];
        words[..4].copy_from_slice(&[u64::from(self.pid), self.launched, self.done, u64::from(self.leaves)]);
        for (to, (seq, call)) in words[4..].chunks_mut(CALL).zip(&self.calls) {
            to[0] = *seq;
            to[1..].copy_from_slice(&call.to_words());
        }
        words
    }

    fn from_words(words: &[u64]) -> Beat {
        let call = |c: &[u64]| Some((c[0], Call::from_words(c[1..].try_into().ok()?)?));
        Beat {
            pid: words[0] as u32,
            launched: words[1],
            done: words[2],
            leaves: words[3] != 0,
            calls: words[4..].chunks(CALL).filter_map(call).collect(),
        }
    }

    /// For a flight record; how long ago they were isn't told.
    pub(super) fn calls(&self) -> Vec<CallRecord> {
        let record = |(seq, call): &(u64, Call)| CallRecord {
            seq: *seq,
            call: *call,
            algorithm: String::new(),
            began: Duration::ZERO,
            took: (*seq <= self.done).then_some(Duration::ZERO),
        };
        self.calls.iter().map(record).collect()
    }
}

/// The first collective that two ranks called differently, as `rank` reports it; every rank finds the same two.
pub(super) fn mismatch(rank: usize, beats: &[Beat]) -> Option<Error> {
    let mut numbers: Vec<u64> = beats.iter().flat_map(|b| b.calls.iter().map(|(seq, _)| *seq)).collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers.into_iter().find_map(|seq| {
        let called = |b: &Beat| b.calls.iter().find(|(s, _)| *s == seq).map(|(_, call)| *call);
        let mut made = beats.iter().enumerate().filter_map(|(rank, beat)| Some((rank, called(beat)?)));
        let (a, a_call) = made.next()?;
        // Word by word, as NaN, which a factor may be, is the same in words.
        let (b, b_call) = made.find(|(_, call)| call.to_words() != a_call.to_words())?;
        Some(Error::Mismatch { rank, seq, a, a_call: Box::new(a_call), b, b_call: Box::new(b_call) })
    })
}

/// An error of the watching group, or of a call by way of the host, as one of the device's call.
pub(super) fn renamed(error: Error, rank: usize, call: Call, seq: u64) -> Error {
    match error {
        Error::PeerLost { peer, how, .. } => Error::PeerLost { rank, peer, call, seq, how },
        Error::Timeout { waiting_for, after, instead, .. } => {
            Error::Timeout { rank, call, seq, waiting_for, after, instead }
        }
        Error::Aborted { by, why, .. } => Error::Aborted { rank, by, call, seq, why },
        Error::Corrupted { from, to, what, .. } => Error::Corrupted { rank, from, to, call, seq, what },
        other => other,
    }
}

/// The same error again.
pub(super) fn copied(error: &Error) -> Error {
    match error {
        Error::PeerLost { rank, peer, call, seq, how } => {
            Error::PeerLost { rank: *rank, peer: *peer, call: *call, seq: *seq, how: how.clone() }
        }
        Error::Timeout { rank, call, seq, waiting_for, after, instead } => Error::Timeout {
            rank: *rank,
            call: *call,
            seq: *seq,
            waiting_for: waiting_for.clone(),
            after: *after,
            instead: instead.clone(),
        },
        Error::Aborted { rank, by, call, seq, why } => {
            Error::Aborted { rank: *rank, by: *by, call: *call, seq: *seq, why: why.clone() }
        }
        Error::Mismatch { rank, seq, a, a_call, b, b_call } => Error::Mismatch {
            rank: *rank,
            seq: *seq,
            a: *a,
            a_call: a_call.clone(),
            b: *b,
            b_call: b_call.clone(),
        },
        Error::Engine { rank, engine, call, seq, what } => {
            Error::Engine { rank: *rank, engine: engine.clone(), call: *call, seq: *seq, what: what.clone() }
        }
        Error::Device { device, what, why } => {
            Error::Device { device: device.clone(), what, why: why.clone() }
        }
        other => Error::InvalidArgument(other.to_string()),
    }
}

/// The thread of one group.
#[derive(Debug)]
pub(super) struct Watch(Arc<Ending>);

#[derive(Debug, Default)]
struct Ending {
    state: Mutex<End>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct End {
    asked: bool,
    done: bool,
}

impl Ending {
    fn lock(&self) -> MutexGuard<'_, End> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watch {
    /// Starts watching; not where there is nobody else.
    pub(super) fn start(shared: &Arc<Shared>) -> Result<Watch> {
        let ending = Arc::new(Ending::default());
        if shared.world == 1 {
            ending.lock().done = true;
            return Ok(Watch(ending));
        }
        let (theirs, shared) = (ending.clone(), shared.clone());
        let run = move || {
            watch(&shared, &theirs);
            theirs.lock().done = true;
            theirs.changed.notify_all();
        };
        let name = "tw-watch".to_owned();
        std::thread::Builder::new().name(name).spawn(run).map_err(|e| Error::os("starting a thread", e))?;
        Ok(Watch(ending))
    }

    /// Leaves in order: tells the others, and waits a moment for them to hear it.
    pub(super) fn end(&self) {
        let mut end = self.0.lock();
        end.asked = true;
        self.0.changed.notify_all();
        let _ = self.0.changed.wait_timeout_while(end, FAREWELL, |end| !end.done);
    }
}

fn watch(shared: &Shared, ending: &Ending) {
    let mut all = vec![0; WORDS * shared.world];
    loop {
        let leaves = ending.lock().asked;
        if let Err(error) = shared.watched.all_gather(&shared.beat(leaves).to_words(), &mut all) {
            shared.lose(error);
            break;
        }
        shared.heard(all.chunks(WORDS).map(Beat::from_words).collect());
        // Who has left comes to no further exchange.
        if leaves {
            return;
        }
        if shared.has_left() || shared.end_if_lost() {
            break;
        }
        let end = ending.lock();
        let _ = ending.changed.wait_timeout_while(end, INTERVAL, |end| !end.asked);
    }
    // Whoever waits sees it; what nobody waits for is ended here, once it is certain.
    while !shared.end_if_lost() && !ending.lock().asked {
        std::thread::sleep(INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use tensorwire_core::{DType, Op, ReduceOp};

    use super::*;

    fn call(count: u64) -> Call {
        Call { count, dtype: Some(DType::F32), reduce: Some(ReduceOp::Sum), ..Call::bare(Op::AllReduce) }
    }

    fn beat(calls: &[(u64, Call)]) -> Beat {
        Beat::new(1, 5, 2, false, [].into_iter(), calls.iter().rev().copied())
    }

    #[test]
    fn beats_travel() {
        let many: Vec<_> = (0..40).map(|seq| (seq + 1, call(seq))).collect();
        let sent = Beat::new(7, 40, 3, true, many.iter().skip(3).copied(), many.iter().rev().copied());
        let got = Beat::from_words(&sent.to_words());
        assert_eq!((got.pid, got.launched, got.done, got.leaves), (7, 40, 3, true));
        assert_eq!(got.calls, sent.calls);
        let numbers: Vec<_> = got.calls.iter().map(|(seq, _)| *seq).collect();
        assert_eq!(numbers, [4, 5, 6, 7, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40]);
    }

    #[test]
    fn the_first_difference_is_found_alike_by_all() {
        let same = [(3, call(1)), (4, call(2))];
        assert!(mismatch(0, &[beat(&same), beat(&same[1..]), beat(&[])]).is_none());
        let other = [(4, call(9)), (5, call(1))];
        let beats = [beat(&same), beat(&same), beat(&other)];
        for rank in 0..3 {
            let error = mismatch(rank, &beats).unwrap().to_string();
            assert!(error.starts_with(&format!("rank {rank}: call 4 differs")), "{error}");
            assert!(
                error.contains("rank 0 called all_reduce(2 x f32, sum), rank 2 called all_reduce(9"),
                "{error}"
            );
        }
    }
}
