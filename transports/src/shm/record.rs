//! The flight recorder: a rank's last calls, in its control page. It costs a call two readings of a clock and
//! stores to cache lines that nobody else touches.

// Not loom's: nothing that the protocol relies on.
use std::sync::atomic::{AtomicU64, Ordering, fence};

use tensorwire_core::{Call, Op};

/// Calls a rank keeps on record.
pub(crate) const RECORDS: usize = 32;

/// Up to 16 characters in two words; zero is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label([u64; 2]);

impl Label {
    pub(crate) const NONE: Label = Label([0; 2]);

    /// The label that reads `name`, cut to 16 bytes.
    pub const fn new(name: &str) -> Label {
        let (name, mut words, mut i) = (name.as_bytes(), [0; 2], 0);
        while i < name.len() && i < 16 {
            words[i / 8] |= (name[i] as u64) << (8 * (i % 8));
            i += 1;
        }
        Label(words)
    }
}

impl std::fmt::Display for Label {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // It may come from memory that anybody wrote.
        let shown = |b: u8| if b.is_ascii_graphic() { b as char } else { '?' };
        let bytes = self.0.iter().flat_map(|w| w.to_le_bytes());
        f.pad(&bytes.filter(|b| *b != 0).map(shown).collect::<String>())
    }
}

/// The last calls of one rank, which alone writes them.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Records([Record; RECORDS]);

/// One call. `number` is 0 while the others change.
#[derive(Debug)]
#[repr(C)]
struct Record {
    number: AtomicU64,
    seq: AtomicU64,
    call: [AtomicU64; 4],
    started: AtomicU64,
    finished: AtomicU64,
    label: [AtomicU64; 2],
}

/// A call as it was recorded. The moments are those of [`Clock`](super::clock::Clock).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Recorded {
    /// Counts this rank's calls of every kind.
    pub(crate) number: u64,
    /// The collectives that the rank had begun, this one included.
    pub(crate) seq: u64,
    pub(crate) call: Call,
    pub(crate) label: Label,
    pub(crate) started: u64,
    /// 0 while the call isn't done.
    pub(crate) finished: u64,
}

impl Records {
    /// Of no calls, in memory that no other process sees.
    #[cfg(any(feature = "mpi", test))]
    pub(crate) fn new() -> Records {
        let word = || AtomicU64::new(0);
        Records(std::array::from_fn(|_| Record {
            number: word(),
            seq: word(),
            call: std::array::from_fn(|_| word()),
            started: word(),
            finished: word(),
            label: std::array::from_fn(|_| word()),
        }))
    }

    #[inline]
    fn place(&self, number: u64) -> &Record {
        &self.0[number as usize % RECORDS]
    }

    /// Records that call number `number`, from 1, begins, and how it is carried out.
    #[inline]
    pub(crate) fn begin(&self, number: u64, seq: u64, call: &Call, label: Label, now: u64) {
        let r = self.place(number);
        r.number.store(0, Ordering::Relaxed);
        // The record is marked as changing before it changes.
        fence(Ordering::Release);
        r.seq.store(seq, Ordering::Relaxed);
        for (word, value) in r.call.iter().zip(call.to_words()) {
            word.store(value, Ordering::Relaxed);
        }
        r.started.store(now, Ordering::Relaxed);
        r.finished.store(0, Ordering::Relaxed);
        self.label(number, label);
        r.number.store(number, Ordering::Release);
    }

    /// Records how the call is carried out.
    #[inline]
    pub(crate) fn label(&self, number: u64, label: Label) {
        for (word, value) in self.place(number).label.iter().zip(label.0) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Records that the call is done.
    #[inline]
    pub(crate) fn finish(&self, number: u64, now: u64) {
        self.place(number).finished.store(now, Ordering::Relaxed);
    }

    /// The calls on record, oldest first. Any bytes will do: what makes no sense is left out.
    pub(crate) fn read(&self) -> Vec<Recorded> {
        let mut calls: Vec<Recorded> = self.0.iter().filter_map(Record::read).collect();
        calls.sort_unstable_by_key(|c| c.number);
        calls
    }

    /// The collective with this number, if it is still on record.
    pub(crate) fn collective(&self, seq: u64) -> Option<Call> {
        let is_it = |c: &Recorded| c.seq == seq && !matches!(c.call.op, Op::Send | Op::Recv);
        self.0.iter().filter_map(Record::read).find(is_it).map(|c| c.call)
    }
}

impl Record {
    fn read(&self) -> Option<Recorded> {
        // Acquire: pairs with the Release store at the end of `begin`.
        let number = self.number.load(Ordering::Acquire);
        let load = |word: &AtomicU64| word.load(Ordering::Relaxed);
        let call = self.call.each_ref().map(load);
        let (seq, started, finished) = (load(&self.seq), load(&self.started), load(&self.finished));
        let label = Label(self.label.each_ref().map(load));
        // If anything above was of a later call, the number has changed: pairs with the fence in `begin`.
        fence(Ordering::Acquire);
        if number == 0 || self.number.load(Ordering::Relaxed) != number {
            return None;
        }
        Some(Recorded { number, seq, call: Call::from_words(call)?, label, started, finished })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn empty() -> Box<Records> {
        Box::new(Records::new())
    }

    fn call(op: Op, count: u64) -> Call {
        Call {
            op,
            dtype: Some(tensorwire_core::DType::F32),
            reduce: None,
            count,
            root: None,
            layout: 0,
            wire: None,
        }
    }

    #[test]
    fn the_last_calls_are_kept_in_order() {
        let records = empty();
        assert!(records.read().is_empty());
        for n in 1..=100 {
            records.begin(n, n, &call(Op::AllGather, n), Label::new("two_shot"), 10 * n);
            if n < 100 {
                records.finish(n, 10 * n + 5);
            }
        }
        let calls = records.read();
        assert_eq!(calls.len(), RECORDS);
        assert!(calls.windows(2).all(|w| w[0].number + 1 == w[1].number));
        let last = calls[RECORDS - 1];
        assert_eq!((last.number, last.call.count, last.started, last.finished), (100, 100, 1000, 0));
        assert_eq!(calls[0].finished, calls[0].started + 5);
        assert_eq!(last.label.to_string(), "two_shot");
        assert_eq!(records.collective(80), Some(call(Op::AllGather, 80)));
        assert_eq!(records.collective(10), None);
    }

    #[test]
    fn messages_share_a_collectives_number_and_are_not_taken_for_it() {
        let records = empty();
        records.begin(1, 7, &call(Op::Barrier, 0), Label::NONE, 1);
        records.begin(2, 7, &call(Op::Send, 3), Label::NONE, 2);
        assert_eq!(records.collective(7), Some(call(Op::Barrier, 0)));
    }

    #[test]
    fn a_record_that_changes_while_it_is_read_is_never_a_mixture() {
        let records = empty();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                for n in 1..=200_000 {
                    records.begin(n, n, &call(Op::AllGather, n), Label::NONE, n);
                }
                done.store(true, Ordering::Release);
            });
            while !done.load(Ordering::Acquire) {
                for c in records.read() {
                    assert_eq!((c.seq, c.call.count, c.started), (c.number, c.number, c.number));
                }
            }
        });
    }

    #[test]
    fn a_label_is_cut_and_harmless() {
        assert_eq!(Label::new("").to_string(), "");
        assert_eq!(Label::new("a_name_that_is_too_long").to_string(), "a_name_that_is_t");
        assert_eq!(Label::new("\x1b[31m").to_string(), "?[31m");
        assert_eq!(Label([u64::MAX; 2]).to_string(), "?".repeat(16));
    }
}
