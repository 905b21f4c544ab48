//! Groups from groups: by splitting one, and from the survivors of one that failed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tensorwire_core::{Call, Deadline, Error, Op, Result};

use crate::color;

use super::Failure;
use super::control::{Decision, LEFT};
use super::group::{Above, Group};
use super::layout::Layout;
use super::memory::Memory;
use super::sync::Ordering;
use super::words::Words;
use super::{Options, region::Region};
use crate::liveness::Liveness;
use crate::processors::Processors;

/// How often a rank that waits to go on looks who is alive.
const LOOK: Duration = Duration::from_millis(10);

/// How long, when time is up, a rank has to decide before it is another's turn.
const TURN: Duration = Duration::from_secs(1);

/// Whether those who wait to go on show it, and look who waits elsewhere. That decides nothing but for how long they
/// wait, and loom, for which no time passes, would try each look in every order.
const HINTS: bool = !cfg!(loom);

// `Control::shrinking`: 0, or
/// the rank waits to go on;
const READY: u32 = 1;
/// it has done so up to the timeout;
const OVERDUE: u32 = 2;
/// it knows who goes on.
const WENT_ON: u32 = 3;

impl Group {
    /// A rank's membership in the group whose part of the memory starts at `start` and whose head is
    /// reserved: maps it and reserves the rank's own slots.
    pub(super) fn enter_part(
        memory: &Arc<Memory>,
        start: u64,
        layout: Layout,
        rank: usize,
        liveness: Liveness,
        processors: Vec<Processors>,
        options: &Options,
    ) -> Result<Group> {
        let group = |part| Group::new(Words::new(part, layout), rank, liveness, processors, options);
        let (group, had) = match memory.map(start, layout.len) {
            Ok(part) => (group(part), memory.reserve(start + layout.slot(rank, 0) as u64, layout.slots())),
            // What it takes to say so may still be had.
            Err(e) => (group(memory.map_head(start, layout.len, layout.head)?), Err(e)),
        };
        // The others learn why, and not only that this rank has left.
        had.inspect_err(|e| drop(group.fail(Error::invalid(e.to_string()))))?;
        Ok(group)
    }

    fn memory(&self) -> &Arc<Memory> {
        self.shared.words.part.memory()
    }

    /// Forms groups of the ranks that give the same `color`, ordered by `key`, then rank; a rank without a
    /// color gets none. Every rank of this group calls it. A failure to get memory is every rank's, and leaves
    /// this group as it was.
    pub fn split(&mut self, color: Option<u32>, key: i32) -> Result<Option<Group>, Failure> {
        self.begin(Call::bare(Op::Split))?;
        let ranks = color::members(color, &self.exchange(color::choice(color, key))?);

        // The first of each new group takes its memory and tells the others where it starts; 0 says it failed.
        let layout = Layout::new(ranks.len().max(1), self.shared.words.layout.slots());
        let first = ranks.first().copied();
        let taken = match (&layout, first == Some(self.rank())) {
            (Ok(layout), true) => layout.take(self.memory()),
            _ => Ok(0),
        };
        let start = *taken.as_ref().unwrap_or(&0);
        let starts = self.exchange(start.to_le_bytes())?;
        let start = first.map_or(0, |first| u64::from_le_bytes(starts[first]));
        let made = match (taken, layout, ranks.iter().position(|r| *r == self.rank())) {
            (Err(e), ..) | (_, Err(e), _) => Err(e),
            (_, _, None) => Ok(None),
            (_, Ok(layout), Some(rank)) if start != 0 => {
                let (liveness, processors) = (self.liveness.subset(&ranks), self.processors_of(&ranks));
                let group = Group::enter_part(
                    self.memory(),
                    start,
                    layout,
                    rank,
                    liveness,
                    processors,
                    &self.options,
                );
                // The processors are shared with the ranks of the other groups.
                group.map(|mut group| {
                    group.patience = self.patience;
                    group.above = self.above_another(&ranks);
                    Some(group)
                })
            }
            _ => Err(self.no_memory(first.unwrap_or(0))),
        };
        self.agree(made)
    }

    fn processors_of(&self, ranks: &[usize]) -> Vec<Processors> {
        ranks.iter().map(|r| self.processors[*r].clone()).collect()
    }

    /// This group and those above it, for a group of some of its ranks.
    fn above_another(&self, ranks: &[usize]) -> Vec<Above> {
        let this = Above { shared: Arc::downgrade(&self.shared), ranks: ranks.to_vec() };
        let further = self.above.iter().map(|above| Above {
            shared: above.shared.clone(),
            ranks: ranks.iter().map(|r| above.ranks[*r]).collect(),
        });
        further.chain([this]).collect()
    }

    /// Takes memory of which every rank of the group has `bytes`, mapped by all. Every rank calls it with the
    /// same size. A failure to get memory is every rank's, and leaves the group as it was.
    pub fn region(&mut self, bytes: usize) -> Result<Region, Failure> {
        self.begin(Call {
            op: Op::Symmetric,
            dtype: None,
            reduce: None,
            count: bytes as u64,
            root: None,
            layout: 0,
            wire: None,
        })?;
        let taken = match self.rank() {
            0 => Region::take(self.memory(), self.world(), bytes),
            _ => Region::len(self.world(), bytes).map(|_| 0),
        };
        let start = u64::from_le_bytes(self.exchange(taken.as_ref().unwrap_or(&0).to_le_bytes())?[0]);
        let made = match taken {
            Err(e) => Err(e),
            Ok(_) if start == 0 => Err(self.no_memory(0)),
            Ok(_) => {
                Region::map(&self.shared.words.part, start, self.world(), self.rank(), bytes, &self.liveness)
            }
        };
        self.agree(made)
    }

    /// Whether the region was taken by this group.
    pub fn owns(&self, region: &Region) -> bool {
        region.is_of(&self.shared.words.part)
    }

    fn no_memory(&self, by: usize) -> Error {
        let (rank, world) = (self.rank(), self.world());
        Error::Rendezvous {
            rank,
            world,
            what: format!("rank {by} could not get the shared memory asked for"),
        }
    }

    /// Ends a call whose outcome each rank knows only for itself: if it failed on any, it fails on all.
    fn agree<T>(&mut self, made: Result<T>) -> Result<T, Failure> {
        let all = self.exchange([u8::from(made.is_err())])?;
        self.end();
        let made = made?;
        match all.iter().position(|[failed]| *failed != 0) {
            None => Ok(made),
            Some(rank) => Err(Box::new(self.no_memory(rank))),
        }
    }

    /// Forms a group of the ranks that are still there, in their old order, after this one has failed. Every
    /// survivor calls it, once. A rank that has ended, left, or is the one that a timeout named, is left out; for
    /// the others it waits up to the timeout, and for one that it sees waiting in a call of another group up to the
    /// timeout from when that call gives up. The first that has come decides; if it is stopped before it does, the next
    /// one.
    pub fn shrink(&self) -> Result<Group> {
        let (shared, me) = (&self.shared, self.rank());
        if !shared.ended() {
            self.fail(Error::invalid(format!("rank {me} shrinks the group")));
        }
        let mine = &shared.words.control(me).shrinking;
        if mine.load(Ordering::Relaxed) == WENT_ON {
            let what = format!("rank {me}: this group was shrunk before: use the one that it became");
            return Err(Error::invalid(what));
        }
        mine.store(READY, Ordering::Release);
        shared.wake_everyone();
        let decision = self.decision().inspect_err(|_| mine.store(0, Ordering::Release));
        if HINTS {
            self.show_waiting(None);
        }
        let decision = decision?;
        mine.store(WENT_ON, Ordering::Relaxed);
        let members = decision.ranks();
        let rank = members.iter().position(|r| *r == me).ok_or_else(|| {
            let what = format!("shrinking: ranks {members:?} went on without this one, which came too late");
            Error::Rendezvous { rank: me, world: self.world(), what }
        })?;
        let layout = Layout::new(members.len(), shared.words.layout.slots())?;
        let (liveness, processors) = (self.liveness.subset(&members), self.processors_of(&members));
        let mut group = Group::enter_part(
            self.memory(),
            decision.start,
            layout,
            rank,
            liveness,
            processors,
            &self.options,
        )?;
        group.above = self.above_another(&members);
        Ok(group)
    }

    /// Waits for the decision who goes on, or makes it when it is this rank's turn.
    fn decision(&self) -> Result<Decision> {
        let (shared, me, timeout) = (&self.shared, self.rank(), self.options.timeout);
        let (header, deadline) = (shared.words.header(), Deadline::after(timeout));
        let doorbell = &shared.words.control(me).doorbell.0;
        let lost = shared.lost();
        let began = shared.clock.now();
        // When it is too late to come, for each.
        let mut until = vec![deadline; self.world()];
        let mut overdue: Option<Instant> = None;
        loop {
            let bell = doorbell.look();
            if header.decided.load(Ordering::Acquire) == 1 {
                // SAFETY: `decided` is stored after the decision was written, and nobody writes it again.
                return Ok(header.decision.with(|d| unsafe { *d }));
            }
            let gone = |r: usize| {
                shared.words.control(r).state.load(Ordering::Acquire) == LEFT
                    || self.liveness.ended(r)
                    || lost.contains(&r)
            };
            let state = |r: usize| shared.words.control(r).shrinking.load(Ordering::Acquire);
            let there: Vec<usize> = (0..self.world()).filter(|r| *r == me || !gone(*r)).collect();
            let states: Vec<u32> = there.iter().map(|r| state(*r)).collect();
            let come = |has: bool| there.iter().zip(&states).filter(move |(_, s)| (**s != 0) == has);
            let ready: Vec<usize> = come(true).map(|(r, _)| *r).collect();
            let missing: Vec<usize> = come(false).map(|(r, _)| *r).collect();
            // Each is seen for as long as the timeout allows, and no longer: it may make calls forever.
            if HINTS && !missing.is_empty() && !deadline.passed() {
                let reading = shared.clock.reading();
                for r in &missing {
                    if let Some(left) = self.still_waits(*r, began, &reading) {
                        until[*r] = Deadline::after(left.saturating_add(timeout));
                    }
                }
            }
            let left = missing.iter().map(|r| until[*r].remaining()).max().unwrap_or_default();
            if HINTS {
                self.show_waiting(missing.first().map(|r| (*r, left)));
            }
            if deadline.passed() && left.is_zero() {
                shared.words.control(me).shrinking.store(OVERDUE, Ordering::Release);
            }
            // All take it from the first whose time is up, so that they agree whose turn it is.
            if overdue.is_none() && states.contains(&OVERDUE) {
                overdue = Some(Instant::now());
            }
            let turn = overdue.map_or(0, |since| (since.elapsed().as_nanos() / TURN.as_nanos()) as usize);
            let ours = ready.iter().position(|r| *r == me).unwrap_or(0);
            if turn == ours && (overdue.is_some() || ready.len() == there.len()) {
                self.decide(&ready[turn..], |decider| self.liveness.ended(decider))?;
            } else if turn > ours + 1 {
                let decider = header.decider.load(Ordering::Acquire).saturating_sub(1) as usize;
                return Err(Error::Timeout {
                    rank: me,
                    call: self.call,
                    seq: self.seq,
                    waiting_for: vec![decider],
                    after: timeout,
                    instead: "it was about to say who goes on after this call".into(),
                });
            }
            doorbell.sleep(bell, LOOK);
        }
    }

    /// Decides who goes on, unless another rank that lives does.
    fn decide(&self, members: &[usize], ended: impl Fn(usize) -> bool) -> Result<()> {
        let header = self.shared.words.header();
        let before = header.decider.load(Ordering::Acquire);
        let mine = self.rank() as u32 + 1;
        if before != 0 && (before == mine || !ended(before as usize - 1)) {
            return Ok(());
        }
        let layout = Layout::new(members.len(), self.shared.words.layout.slots())?;
        let start = layout.take(self.memory())?;
        if header.decider.compare_exchange(before, mine, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            // SAFETY: winning the exchange makes this rank the decision's only writer: an earlier decider has
            // ended, and nobody reads it before `decided`.
            header.decision.with_mut(|d| unsafe { d.write(Decision::new(start, members)) });
            header.decided.store(1, Ordering::Release);
            self.shared.wake_everyone();
        } else {
            self.memory().give_back(start, layout.len as u64);
        }
        Ok(())
    }
}
