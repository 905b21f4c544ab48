//! Direct exchanges: every rank sends every other one what that one needs, and nothing goes through third ranks. Each
//! element is reduced once, from all contributions at once, in rank order.
//!
//! | collective of `S` bytes over `n` ranks | steps | a rank sends |
//! | --- | --- | --- |
//! | all_reduce, one shot | 1 | `(n - 1) S` |
//! | all_reduce, two shot | 2 | `2 (n - 1) / n S` |
//! | all_gather of blocks of `S` | 1 | `(n - 1) S` |
//! | reduce_scatter, all_to_all | 1 | `(n - 1) / n S` |
//! | gather, scatter | 1 | a block; a scatter's root all but one |
//! | barrier | 1 | nothing, `n - 1` times |

use std::ops::Range;

use tensorwire_transports::tcp::{Place, Span};

use super::steps::{Rank, Step, Steps};
use super::{Pieces, part};

/// Pieces whose contributions may be on their way at once: while one is reduced, the next comes.
const DEPTH: usize = 2;

/// Scratch memory that the schedules of a call use: a place for a piece from each peer, [`DEPTH`] times.
#[derive(Clone, Copy, Debug)]
struct Slots {
    piece: usize,
    world: usize,
}

impl Slots {
    fn new(piece: usize, world: usize) -> Slots {
        // Whole cache lines, so that each piece is aligned for any type.
        Slots { piece: piece.next_multiple_of(64), world }
    }

    fn of(&self, turn: usize, peer: usize) -> usize {
        ((turn % DEPTH) * self.world + peer) * self.piece
    }

    /// Sends each rank its piece of `turn`, and receives this rank's from everybody: bytes `of` the input, where a rank has
    /// pieces for `turns_of` turns.
    fn gather(
        &self,
        steps: &mut Steps,
        me: Rank,
        turn: usize,
        turns_of: impl Fn(usize) -> usize,
        of: impl Fn(usize, usize) -> Range<usize>,
    ) {
        for peer in me.peers_ahead().filter(|p| turn < turns_of(*p)) {
            steps.send(peer, Span::new(Place::Input, of(peer, turn)));
        }
        if turn < turns_of(me.rank) {
            for peer in me.peers_behind() {
                let at = self.of(turn, peer);
                steps.receive(peer, Span::new(Place::Scratch, at..at + of(me.rank, turn).len()));
            }
        }
        steps.mark();
    }

    /// Reduces every rank's piece of `turn`, in rank order.
    fn reduce(&self, me: Rank, turn: usize, own: Span, into: Span) -> Step {
        let (at, count) = (me.rank, me.world);
        Step::Reduce { own, at, count, into, theirs: self.of(turn, 0), stride: self.piece }
    }

    /// Bytes in all, where there are `turns`.
    fn total(&self, turns: usize) -> usize {
        self.piece * self.world * turns.min(DEPTH)
    }
}

pub(super) fn bytes(r: Range<usize>, size: usize) -> Range<usize> {
    r.start * size..r.end * size
}

/// `len` elements of `size` bytes, reduced into every rank's output, or the root's, from everybody's whole input.
pub(crate) fn one_shot(
    steps: &mut Steps,
    me: Rank,
    len: usize,
    size: usize,
    piece: usize,
    root: Option<usize>,
) {
    let wanted = root.is_none_or(|root| root == me.rank);
    let pieces = Pieces::new(len, size, piece);
    let turns = pieces.count().max(1);
    let slots = Slots::new(pieces.range(0).len() * size, me.world);
    steps.begin(if wanted { slots.total(turns) } else { 0 });
    for turn in 0..=turns {
        if turn < turns {
            let own = bytes(pieces.range(turn), size);
            for peer in me.peers_ahead().filter(|p| root.is_none_or(|root| root == *p)) {
                steps.send(peer, Span::new(Place::Input, own.clone()));
            }
            for peer in me.peers_behind().filter(|_| wanted) {
                let at = slots.of(turn, peer);
                steps.receive(peer, Span::new(Place::Scratch, at..at + own.len()));
            }
            steps.mark();
        }
        if turn > 0 && wanted {
            let done = bytes(pieces.range(turn - 1), size);
            // What is reduced here may be what is still being sent.
            steps.wait(turn - 1, true);
            let own = Span::new(Place::Input, done.clone());
            steps.push(slots.reduce(me, turn - 1, own, Span::new(Place::Output, done)));
        }
    }
}

/// The same in two steps: each rank reduces its part, of everybody's, and sends the result to all, or to the root. In
/// pieces, of which one is on its way while the one before is reduced.
pub(crate) fn two_shot(
    steps: &mut Steps,
    me: Rank,
    len: usize,
    size: usize,
    piece: usize,
    root: Option<usize>,
) {
    let wanted = root.is_none_or(|root| root == me.rank);
    let start_of = |who: usize| part(len, size, me.world, who).start;
    let pieces_of = |who: usize| Pieces::new(part(len, size, me.world, who).len(), size, piece);
    let of = |who: usize, turn: usize| {
        let r = pieces_of(who).range(turn);
        bytes(start_of(who) + r.start..start_of(who) + r.end, size)
    };
    let turns_of = |who: usize| pieces_of(who).count().max(1);
    // The first rank's part is the largest.
    let turns = turns_of(0);
    let slots = Slots::new(pieces_of(0).range(0).len() * size, me.world);
    let scratch = slots.total(turns);
    // A rank that only helps reduces in memory of its own: its buffer stays as it is.
    steps.begin(scratch + if wanted { 0 } else { slots.piece * DEPTH });
    for turn in 0..=turns {
        if turn < turns {
            slots.gather(steps, me, turn, turns_of, of);
        }
        let Some(before) = turn.checked_sub(1) else { continue };
        if before < turns_of(me.rank) {
            let own = of(me.rank, before);
            let result = if wanted {
                Span::new(Place::Output, own.clone())
            } else {
                let at = scratch + before % DEPTH * slots.piece;
                Span::new(Place::Scratch, at..at + own.len())
            };
            // A result in scratch memory must be out before its place is used again.
            steps.wait(before, !wanted);
            steps.push(slots.reduce(me, before, Span::new(Place::Input, own), result));
            for peer in me.peers_ahead().filter(|p| root.is_none_or(|root| root == *p)) {
                steps.send(peer, result);
            }
        }
        for peer in me.peers_behind().filter(|p| wanted && before < turns_of(*p)) {
            steps.receive(peer, Span::new(Place::Output, of(peer, before)));
        }
    }
}

/// `block(r)`, bytes of the input, is reduced into rank `r`'s output.
pub(crate) fn reduce_scatter(
    steps: &mut Steps,
    me: Rank,
    block: impl Fn(usize) -> Range<usize>,
    size: usize,
    piece: usize,
) {
    let pieces_of = |who: usize| Pieces::new(block(who).len() / size, size, piece);
    let turns_of = |who: usize| pieces_of(who).count().max(1);
    let of = |who: usize, turn: usize| {
        let r = bytes(pieces_of(who).range(turn), size);
        block(who).start + r.start..block(who).start + r.end
    };
    let turns = (0..me.world).map(turns_of).max().unwrap_or(1);
    let slots = Slots::new(pieces_of(me.rank).range(0).len() * size, me.world);
    steps.begin(slots.total(turns_of(me.rank)));
    for turn in 0..=turns {
        if turn < turns {
            slots.gather(steps, me, turn, turns_of, of);
        }
        if let Some(before) = turn.checked_sub(1).filter(|b| *b < turns_of(me.rank)) {
            let own = of(me.rank, before);
            let into = own.start - block(me.rank).start..own.end - block(me.rank).start;
            steps.wait(before, false);
            let into = Span::new(Place::Output, into);
            steps.push(slots.reduce(me, before, Span::new(Place::Input, own), into));
        }
    }
}

/// Each rank's input becomes `block(rank)`, bytes of the output, on every rank, or on the root.
pub(crate) fn all_gather(
    steps: &mut Steps,
    me: Rank,
    block: impl Fn(usize) -> Range<usize>,
    piece: usize,
    root: Option<usize>,
) {
    let wanted = root.is_none_or(|root| root == me.rank);
    let pieces_of = |who: usize| Pieces::new(block(who).len(), 1, piece);
    let turns_of = |who: usize| pieces_of(who).count().max(1);
    let turns = (0..me.world).map(turns_of).max().unwrap_or(1);
    steps.begin(0);
    for turn in 0..turns {
        if turn < turns_of(me.rank) {
            let own = Span::new(Place::Input, pieces_of(me.rank).range(turn));
            for peer in me.peers_ahead().filter(|p| root.is_none_or(|root| root == *p)) {
                steps.send(peer, own);
            }
        }
        for peer in me.peers_behind().filter(|p| wanted && turn < turns_of(*p)) {
            let (r, start) = (pieces_of(peer).range(turn), block(peer).start);
            steps.receive(peer, Span::new(Place::Output, start + r.start..start + r.end));
        }
        steps.mark();
        // Who sends no further ahead of what it receives finds room in its socket.
        if let Some(before) = turn.checked_sub(1) {
            steps.wait(before, false);
        }
    }
    if wanted {
        let own = Span::new(Place::Input, 0..block(me.rank).len());
        steps.push(Step::Copy { from: own, into: Span::new(Place::Output, block(me.rank)) });
    }
}

/// Everybody tells everybody.
pub(crate) fn barrier(steps: &mut Steps, me: Rank) {
    let nothing = Span::new(Place::Output, 0..0);
    steps.begin(0);
    for (to, from) in me.peers_ahead().zip(me.peers_behind()) {
        steps.receive(from, nothing);
        steps.send(to, nothing);
    }
}

/// `block(r)`, bytes of the root's input, becomes rank `r`'s output.
pub(crate) fn scatter(steps: &mut Steps, me: Rank, block: impl Fn(usize) -> Range<usize>, root: usize) {
    let output = Span::new(Place::Output, 0..block(me.rank).len());
    steps.begin(0);
    if me.rank == root {
        for peer in me.peers_ahead() {
            steps.send(peer, Span::new(Place::Input, block(peer)));
        }
        steps.push(Step::Copy { from: Span::new(Place::Input, block(root)), into: output });
    } else {
        steps.receive(root, output);
    }
}

/// This rank and its `mates`, one of each host, bring each other blocks: `brought[h]` are the ranks whose blocks host `h`'s
/// mate has, `block(r)` the bytes of the output that are rank `r`'s.
pub(crate) fn exchange(
    steps: &mut Steps,
    rank: usize,
    mates: &[usize],
    brought: &[Vec<usize>],
    block: impl Fn(usize) -> Range<usize>,
) {
    steps.begin(0);
    let host = mates.iter().position(|mate| *mate == rank).expect("a rank is one of its mates");
    let me = Rank { rank: host, world: mates.len() };
    for (to, from) in me.peers_ahead().zip(me.peers_behind()) {
        for r in &brought[from] {
            steps.receive(mates[from], Span::new(Place::Output, block(*r)));
        }
        for r in &brought[host] {
            steps.send(mates[to], Span::new(Place::Output, block(*r)));
        }
    }
}

/// `sends(r)`, bytes of the input, go to rank `r`; `receives(r)`, bytes of the output, come from it: for those ranks that
/// are `among` the ones between which this goes on, and this one.
pub(crate) fn all_to_all(
    steps: &mut Steps,
    me: Rank,
    among: impl Fn(usize) -> bool,
    sends: impl Fn(usize) -> Range<usize>,
    receives: impl Fn(usize) -> Range<usize>,
) {
    steps.begin(0);
    for (to, from) in me.peers_ahead().zip(me.peers_behind()) {
        if among(from) {
            steps.receive(from, Span::new(Place::Output, receives(from)));
        }
        if among(to) {
            steps.send(to, Span::new(Place::Input, sends(to)));
        }
    }
    let (from, into) = (Span::new(Place::Input, sends(me.rank)), Span::new(Place::Output, receives(me.rank)));
    steps.push(Step::Copy { from, into });
}
