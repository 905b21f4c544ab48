//! All-reduces around a ring: rank `r` sends to rank `r + 1` alone, so that few messages cross the slowest link.
//!
//! | all_reduce of `S` bytes over `n` ranks | steps | a rank sends | a rank reduces | partial sums |
//! | --- | --- | --- | --- | --- |
//! | ring | `2 (n - 1)` | `2 (n - 1) / n S` | `(n - 1) / n S` | from another rank on for each part |
//! | chain, in `p` pieces | `2 n + p - 3` | at most `2 S` | `S` | in rank order |
//!
//! The ring is that of Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009:
//! `n` parts are reduced at once, and part `c` begins with rank `c`. In the chain every piece begins with rank 0 and ends
//! with rank `n - 1`, which keeps the order of the ranks; pieces follow each other, and the results go around while later
//! pieces are still being reduced. Both pass partial sums on in the type of the elements.
//!
//! Both work in place, on the output.

use tensorwire_transports::tcp::{Place, Span};

use super::direct::bytes;
use super::steps::{Rank, Steps};
use super::{Pieces, part};

/// Parts are reduced around the ring, one ending at each rank, then gathered around it.
pub(crate) fn ring(steps: &mut Steps, me: Rank, len: usize, size: usize, piece: usize) {
    let (next, previous) = ((me.rank + 1) % me.world, (me.rank + me.world - 1) % me.world);
    // The first rank's part is the largest.
    let turns = Pieces::new(part(len, size, me.world, 0).len(), size, piece).count().max(1);
    // Piece `turn` of the part that began `back` ranks ago.
    let of = |back: usize, turn: usize| {
        let part = part(len, size, me.world, (me.rank + 2 * me.world - back) % me.world);
        let r = Pieces::new(part.len(), size, piece).range(turn);
        bytes(part.start + r.start..part.start + r.end, size)
    };
    let slot = of(me.rank, 0).len().next_multiple_of(64);
    steps.begin(2 * slot);
    // With one piece, what is received in a step is sent in the next; with more, it is reduced while the next one comes.
    let behind = usize::from(turns > 1);
    let all = (me.world - 1) * turns;
    for t in 0..all + behind {
        if t < all {
            let (step, turn) = (t / turns, t % turns);
            let at = t % 2 * slot;
            steps.receive(previous, Span::new(Place::Scratch, at..at + of(step + 1, turn).len()));
            steps.send(next, Span::new(Place::Output, of(step, turn)));
            steps.mark();
        }
        if let Some(done) = t.checked_sub(behind) {
            steps.wait(done, false);
            steps.fold(of(done / turns + 1, done % turns), done % 2 * slot, true);
        }
    }
    // What is received from here on takes the place of what was sent.
    steps.wait_last();
    for t in 0..all {
        let (step, turn) = (t / turns, t % turns);
        steps.receive(previous, Span::new(Place::Output, of(step, turn)));
        if let Some(before) = t.checked_sub(turns) {
            steps.wait(all + before, false);
        }
        steps.send(next, Span::new(Place::Output, of(step + me.world - 1, turn)));
        steps.mark();
    }
}

/// Each piece is reduced from rank 0 on to the last rank, and goes around from there.
pub(crate) fn chain(steps: &mut Steps, me: Rank, len: usize, size: usize, piece: usize) {
    let Rank { rank, world } = me;
    let (next, previous, last) = ((rank + 1) % world, (rank + world - 1) % world, world - 1);
    let pieces = Pieces::new(len, size, piece);
    let count = pieces.count().max(1);
    let of = |i: usize| bytes(pieces.range(i), size);
    let slot = of(0).len().next_multiple_of(64);
    steps.begin(if rank == 0 { 0 } else { 2 * slot });
    // In its turn `t`, of which each rank is one behind the rank before it, a rank gets the sum of piece `t` so far, and
    // the result of piece `t - world`.
    let summed = |t: usize| (t < count).then_some(t);
    let finished = |t: usize| t.checked_sub(world).filter(|i| *i < count);
    for t in 0..=count + world {
        if let Some(i) = summed(t).filter(|_| rank > 0) {
            let at = i % 2 * slot;
            steps.receive(previous, Span::new(Place::Scratch, at..at + of(i).len()));
        }
        if let Some(i) = finished(t).filter(|_| rank != last) {
            // It takes the place of the sum, which must have been sent.
            steps.wait_sends(i + 1);
            steps.receive(previous, Span::new(Place::Output, of(i)));
        }
        if let Some(before) = t.checked_sub(1) {
            steps.wait(before, false);
            if let Some(i) = summed(before) {
                if rank > 0 {
                    steps.fold(of(i), i % 2 * slot, true);
                }
                steps.send(next, Span::new(Place::Output, of(i)));
            }
            if let Some(i) = finished(before).filter(|_| rank != last && next != last) {
                steps.send(next, Span::new(Place::Output, of(i)));
            }
        }
        steps.mark();
    }
}
