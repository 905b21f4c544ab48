//! The flight record of a group: what each rank is doing and did last, and how they differ.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use tensorwire_core::{Call, Op};

use super::clock::Reading;
use super::control::{Control, LEFT};
use super::shared::Shared;
use super::sync::Ordering;
use super::verdict::Verdict;
use crate::liveness::Liveness;

/// Calls of each rank that are printed; the record has more.
const PRINTED: usize = 6;

/// What the ranks of a group are doing and did last, read at one moment while they go on. Printed, it is the
/// difference between the ranks in a sentence, and a table.
#[derive(Clone, Debug)]
pub struct FlightRecord {
    /// One for each rank, in order.
    pub ranks: Vec<RankRecord>,
    /// The error that ended the group, if one did, as the rank that met it reports it.
    pub failure: Option<String>,
}

/// What one rank is doing and did last.
#[derive(Clone, Debug)]
pub struct RankRecord {
    /// The rank.
    pub rank: usize,
    /// Its process, as it numbers itself; 0 before it has joined.
    pub pid: u32,
    /// Whether it is there.
    pub state: RankState,
    /// Whom it waits for, if it sleeps in a wait.
    pub waits_for: Option<usize>,
    /// Its last calls, oldest first; it is still in the last one if that isn't done.
    pub calls: Vec<CallRecord>,
}

/// Whether a rank is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RankState {
    /// It has not come yet.
    Joining,
    /// It is there.
    Member,
    /// Its process is stopped, by a signal or a debugger.
    Stopped,
    /// It has left the group.
    Left,
    /// Its process has ended without leaving the group.
    Ended,
}

impl fmt::Display for RankState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            RankState::Joining => "joining",
            RankState::Member => "member",
            RankState::Stopped => "stopped",
            RankState::Left => "left",
            RankState::Ended => "ended",
        })
    }
}

/// One call of one rank.
#[derive(Clone, Debug, PartialEq)]
pub struct CallRecord {
    /// A collective's number in its group, from 1; of a message, the number of the collective before it.
    pub seq: u64,
    /// What was called.
    pub call: Call,
    /// How it was carried out; empty where there is one way.
    pub algorithm: String,
    /// How long ago it began.
    pub began: Duration,
    /// How long it took; `None` while the rank is in it.
    pub took: Option<Duration>,
}

impl CallRecord {
    fn is_message(&self) -> bool {
        matches!(self.call.op, Op::Send | Op::Recv)
    }

    /// How long ago the rank began it, or was done with it.
    fn since(&self) -> Duration {
        self.began.saturating_sub(self.took.unwrap_or_default())
    }
}

impl fmt::Display for CallRecord {
    /// As errors name it: the call and its number.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = if self.is_message() { "after call" } else { "call" };
        write!(f, "{} ({place} {})", self.call, self.seq)
    }
}

impl RankRecord {
    /// What the control page says, read twice: a call that changed meanwhile is left out. Any bytes will do.
    pub(super) fn read(
        rank: usize,
        world: usize,
        pages: [&Control; 2],
        reading: &Reading,
        process: impl FnOnce(u32) -> RankState,
    ) -> RankRecord {
        let [control, again] = pages;
        // Relaxed: numbers for a person.
        let pid = control.pid.load(Ordering::Relaxed);
        let looked = control.looked.load(Ordering::Relaxed);
        let awaits = control.awaits.load(Ordering::Relaxed) as usize;
        let state = match control.state.load(Ordering::Relaxed) {
            LEFT => RankState::Left,
            _ if pid == 0 => RankState::Joining,
            _ => process(pid),
        };
        let still = again.records.0.read();
        let calls = control.records.0.read().into_iter().filter(|c| still.contains(c));
        let calls = calls.map(|c| CallRecord {
            seq: c.seq,
            call: c.call,
            algorithm: c.label.to_string(),
            began: reading.since(c.started),
            took: (c.finished != 0).then(|| reading.between(c.started, c.finished)),
        });
        let waits_for = Some(awaits).filter(|r| looked != 0 && *r < world);
        RankRecord { rank, pid, state, waits_for, calls: calls.collect() }
    }

    /// The call that the rank is in.
    pub fn current(&self) -> Option<&CallRecord> {
        self.calls.last().filter(|c| c.took.is_none())
    }

    /// The collectives that the rank has begun.
    fn seq(&self) -> u64 {
        self.calls.last().map_or(0, |c| c.seq)
    }
}

/// Where some ranks are, which are at the same place.
struct Place<'a> {
    ranks: Vec<usize>,
    last: Option<&'a CallRecord>,
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.last {
            None => f.write_str("before the first call"),
            Some(call) => {
                let place = if call.took.is_none() { "in" } else { "done with" };
                write!(f, "{place} {call} since {}", Age(call.since()))
            }
        }
    }
}

impl FlightRecord {
    pub(super) fn of(shared: &Shared, liveness: &Liveness) -> FlightRecord {
        let (reading, world) = (shared.clock.reading(), shared.world());
        let read = |rank| {
            let control = shared.words.control(rank);
            let alive = |_| if liveness.ended(rank) { RankState::Ended } else { RankState::Member };
            RankRecord::read(rank, world, [control, control], &reading, alive)
        };
        let named = |rank| {
            let record: RankRecord = read(rank);
            let waits_for = record.waits_for.map(|peer| shared.name(peer));
            RankRecord { rank: shared.name(rank), waits_for, ..record }
        };
        let mut record = FlightRecord { ranks: (0..world).map(named).collect(), failure: None };
        record.failure = shared.look_at_verdict(|by, verdict| record.describe(by, verdict));
        record
    }

    /// The verdict of rank `by` in words.
    pub(super) fn describe(&self, by: usize, verdict: &Verdict) -> String {
        match self.ranks.get(by).and_then(|r| r.calls.last()) {
            Some(c) => verdict.error(by, c.call, c.seq).to_string(),
            None => format!("rank {by} ended the group before its first call"),
        }
    }

    /// How the ranks differ, in a sentence.
    pub fn difference(&self) -> String {
        let mut clauses = Vec::new();
        for state in [RankState::Joining, RankState::Stopped, RankState::Left, RankState::Ended] {
            let ranks: Vec<usize> = self.ranks.iter().filter(|r| r.state == state).map(|r| r.rank).collect();
            if !ranks.is_empty() {
                let (named, is) = named(&ranks);
                let (has, is) = if ranks.len() == 1 { ("has", is) } else { ("have", is) };
                clauses.push(match state {
                    RankState::Joining => format!("{named} {has} not joined"),
                    RankState::Stopped => format!("{named} {is} stopped"),
                    RankState::Left => format!("{named} {has} left"),
                    _ => format!("{named} {has} ended"),
                });
            }
        }
        match self.mismatch() {
            Some(difference) => clauses.push(difference),
            None => clauses.extend(self.places()),
        }
        let mut waiting = BTreeMap::<usize, Vec<usize>>::new();
        for r in self.ranks.iter().filter(|r| r.state == RankState::Member) {
            if let Some(peer) = r.waits_for {
                waiting.entry(peer).or_default().push(r.rank);
            }
        }
        clauses.extend(waiting.into_iter().map(|(peer, ranks)| {
            let wait = if ranks.len() == 1 { "waits" } else { "wait" };
            format!("{} {wait} for rank {peer}", named(&ranks).0)
        }));
        clauses.join("; ")
    }

    /// The first collective on record that the ranks called differently.
    fn mismatch(&self) -> Option<String> {
        let mut calls = BTreeMap::<u64, Vec<(Call, Vec<usize>)>>::new();
        for rank in &self.ranks {
            for c in rank.calls.iter().filter(|c| !c.is_message()) {
                let known = calls.entry(c.seq).or_default();
                match known.iter_mut().find(|(call, _)| *call == c.call) {
                    Some((_, ranks)) => ranks.push(rank.rank),
                    None => known.push((c.call, vec![rank.rank])),
                }
            }
        }
        let (seq, differing) = calls.into_iter().find(|(_, known)| known.len() > 1)?;
        let called = differing.iter().map(|(call, ranks)| format!("{} called {call}", named(ranks).0));
        Some(format!("the ranks differ at call {seq}: {}", called.collect::<Vec<_>>().join(", ")))
    }

    /// Where the ranks are, those who are behind first.
    fn places(&self) -> Vec<String> {
        let mut places = Vec::<Place<'_>>::new();
        for rank in &self.ranks {
            let last = rank.calls.last();
            let same = |c: &CallRecord| (c.seq, c.call, c.took.is_some());
            match places.iter_mut().find(|p| p.last.map(same) == last.map(same)) {
                Some(place) => {
                    place.ranks.push(rank.rank);
                    place.last = place.last.into_iter().chain(last).max_by_key(|c| c.since());
                }
                None => places.push(Place { ranks: vec![rank.rank], last }),
            }
        }
        let most = self.ranks.iter().map(RankRecord::seq).max().unwrap_or(0);
        places.sort_by_key(|p| p.last.map_or(0, |c| c.seq));
        let describe = |place: &Place<'_>| {
            let (named, is) = named(&place.ranks);
            match most - place.last.map_or(0, |c| c.seq) {
                _ if place.ranks.len() == self.ranks.len() && place.ranks.len() > 1 => {
                    format!("all ranks are {place}")
                }
                0 => format!("{named} {is} {place}"),
                1 => format!("{named} {is} 1 call behind, {place}"),
                behind => format!("{named} {is} {behind} calls behind, {place}"),
            }
        };
        places.iter().map(describe).collect()
    }

    /// Where a rank was seen last, to go behind what became of it.
    pub(super) fn last_seen(&self, rank: usize) -> String {
        let last = self.ranks.get(rank).and_then(|r| r.calls.last());
        format!(", {}", Place { ranks: Vec::new(), last })
    }
}

/// Ranks by name, and the verb for them.
fn named(ranks: &[usize]) -> (String, &'static str) {
    match ranks {
        [rank] => (format!("rank {rank}"), "is"),
        _ => {
            let shown: Vec<String> = ranks.iter().take(8).map(usize::to_string).collect();
            let more = if ranks.len() > 8 { format!(" and {} more", ranks.len() - 8) } else { String::new() };
            (format!("ranks {}{more}", shown.join(", ")), "are")
        }
    }
}

/// A span of time, as precise as a person wants it.
struct Age(Duration);

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs_f64();
        f.pad(&match seconds {
            0.0..1e-6 => format!("{:.0} ns", seconds * 1e9),
            1e-6..1e-3 => format!("{:.1} us", seconds * 1e6),
            1e-3..1.0 => format!("{:.1} ms", seconds * 1e3),
            _ => format!("{seconds:.1} s"),
        })
    }
}

impl fmt::Display for FlightRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.difference())?;
        if let Some(failure) = &self.failure {
            writeln!(f, "the group has ended: {failure}")?;
        }
        let columns = ["rank", "pid", "state", "call", "what", "algorithm", "began", "took"];
        let mut rows = vec![columns.map(str::to_owned)];
        for r in &self.ranks {
            let shown = r.calls.len().saturating_sub(PRINTED);
            let (rank, pid, state) = (r.rank.to_string(), r.pid.to_string(), r.state.to_string());
            if r.calls.is_empty() {
                let none = "no call".to_owned();
                let rest = [String::new(), none, String::new(), String::new(), String::new()];
                let [seq, what, algorithm, began, took] = rest;
                rows.push([rank, pid, state, seq, what, algorithm, began, took]);
                continue;
            }
            for (i, c) in r.calls[shown..].iter().enumerate() {
                let first = |text: &String| if i == 0 { text.clone() } else { String::new() };
                let took = match (c.took, r.waits_for) {
                    (Some(took), _) => Age(took).to_string(),
                    (None, Some(peer)) => format!("in it, waits for rank {peer}"),
                    (None, None) => "in it".to_owned(),
                };
                let seq = if c.is_message() { String::new() } else { c.seq.to_string() };
                let began = format!("{} ago", Age(c.began));
                let what = c.call.to_string();
                rows.push([
                    first(&rank),
                    first(&pid),
                    first(&state),
                    seq,
                    what,
                    c.algorithm.clone(),
                    began,
                    took,
                ]);
            }
        }
        let widths: [usize; 8] =
            std::array::from_fn(|i| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0));
        for row in rows {
            let cells: Vec<String> =
                row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            writeln!(f, "{}", cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::shm::{Label, Options, in_process};
    use tensorwire_core::{DType, ReduceOp};

    fn call(op: Op) -> Call {
        Call { op, dtype: Some(DType::F32), reduce: None, count: 8, root: None, layout: 0, wire: None }
    }

    fn rank(rank: usize, last: u64, op: Op, took: Option<Duration>, ago: u64) -> RankRecord {
        let began = Duration::from_millis(ago);
        let earlier = |seq| CallRecord {
            seq,
            call: call(Op::AllGather),
            algorithm: String::new(),
            began: began * 2,
            took: Some(Duration::from_micros(3)),
        };
        let mut calls: Vec<CallRecord> = (1..last).map(earlier).collect();
        calls.push(CallRecord { call: call(op), began, took, ..earlier(last) });
        RankRecord { rank, pid: 100, state: RankState::Member, waits_for: None, calls }
    }

    fn record(ranks: Vec<RankRecord>) -> FlightRecord {
        FlightRecord { ranks, failure: None }
    }

    #[test]
    fn the_difference_says_who_is_behind_and_who_waits() {
        let waits = |r: RankRecord, peer| RankRecord { waits_for: Some(peer), ..r };
        let behind = record(vec![
            waits(rank(0, 20, Op::AllGather, None, 1100), 2),
            waits(rank(1, 20, Op::AllGather, None, 1000), 2),
            rank(2, 17, Op::AllGather, None, 1200),
        ]);
        assert_eq!(
            behind.difference(),
            "rank 2 is 3 calls behind, in all_gather(8 x f32) (call 17) since 1.2 s; \
             ranks 0, 1 are in all_gather(8 x f32) (call 20) since 1.1 s; ranks 0, 1 wait for rank 2"
        );
        let done = Some(Duration::from_millis(200));
        let outside = record(vec![
            rank(0, 3, Op::AllGather, done, 2200),
            waits(rank(1, 4, Op::AllGather, None, 1000), 0),
        ]);
        assert_eq!(
            outside.difference(),
            "rank 0 is 1 call behind, done with all_gather(8 x f32) (call 3) since 2.0 s; \
             rank 1 is in all_gather(8 x f32) (call 4) since 1.0 s; rank 1 waits for rank 0"
        );
        let mut stopped =
            record((0..2).map(|r| waits(rank(r, 5, Op::AllGather, None, 3000), 1 - r)).collect());
        stopped.ranks[1].state = RankState::Stopped;
        assert_eq!(
            stopped.difference(),
            "rank 1 is stopped; all ranks are in all_gather(8 x f32) (call 5) since 3.0 s; \
             rank 0 waits for rank 1"
        );
    }

    #[test]
    fn the_difference_names_the_first_call_that_differs() {
        let differ = record(vec![
            rank(0, 6, Op::Barrier, None, 1),
            rank(1, 6, Op::Broadcast, None, 1),
            rank(2, 6, Op::Barrier, None, 1),
        ]);
        assert_eq!(
            differ.difference(),
            "the ranks differ at call 6: ranks 0, 2 called barrier(8 x f32), rank 1 called broadcast(8 x f32)"
        );
        // Messages are between two ranks, and are no difference.
        let message = record(vec![rank(0, 6, Op::Send, None, 1), rank(1, 6, Op::AllGather, None, 2)]);
        let said = message.difference();
        assert!(said.contains("rank 0 is in send(8 x f32) (after call 6) since 1.0 ms"), "{said}");
    }

    #[test]
    fn ranks_that_are_not_there_are_said_first() {
        let mut gone = record((0..4).map(|r| rank(r, 2, Op::AllGather, None, 10)).collect());
        gone.ranks[0].state = RankState::Joining;
        gone.ranks[0].calls.clear();
        gone.ranks[1].state = RankState::Left;
        gone.ranks[2].state = RankState::Ended;
        let said = gone.difference();
        assert!(said.starts_with("rank 0 has not joined; rank 1 has left; rank 2 has ended; "), "{said}");
        assert!(said.contains("rank 0 is 2 calls behind, before the first call"), "{said}");
        assert!(gone.to_string().contains("no call"));
    }

    #[test]
    fn a_group_records_what_its_ranks_do() {
        let mut groups = in_process(3, &Options::default()).unwrap();
        let sum = Call { reduce: Some(ReduceOp::Sum), ..call(Op::AllReduce) };
        let [a, b, _] = &mut groups[..] else { unreachable!() };
        for group in [&mut *a, &mut *b] {
            for _ in 0..40 {
                group.begin(sum).unwrap();
                group.note(Label::new("one_shot"));
                group.end();
            }
        }
        a.send_recv(DType::F32, Some(crate::shm::Outgoing { to: 1, data: &[0; 4] }), None).unwrap();
        b.begin(call(Op::Barrier)).unwrap();
        b.next_step().unwrap();
        b.publish();
        let record = groups[2].flight_record();
        assert_eq!(record.failure, None);
        let [a, b, c] = &record.ranks[..] else { panic!("{record}") };
        assert_eq!((a.calls.len(), b.calls.len(), c.calls.len()), (32, 32, 0));
        assert_eq!(a.calls[31].call.op, Op::Send);
        assert!(a.current().is_none() && a.calls[31].took.is_some());
        assert_eq!((a.calls[30].seq, a.calls[30].call, &*a.calls[30].algorithm), (40, sum, "one_shot"));
        assert!(a.calls[30].took.unwrap() < a.calls[30].began);
        assert_eq!(b.current().map(|c| c.seq), Some(41));
        assert!(record.ranks.iter().all(|r| r.state == RankState::Member && r.pid == std::process::id()));
        let text = record.to_string();
        assert!(text.contains("rank 2 is 41 calls behind, before the first call"), "{text}");
        assert!(text.contains("send(1 x f32, to 1)") && text.contains("in it"), "{text}");

        drop(groups.remove(0));
        let failed = groups[0].wait(0, 1).unwrap_err().to_string();
        assert!(
            failed.contains("it left the group, done with send(1 x f32, to 1) (after call 40)"),
            "{failed}"
        );
        let record = groups[1].flight_record();
        assert_eq!(record.ranks[0].state, RankState::Left);
        assert_eq!(record.failure, Some(failed));
    }
}
