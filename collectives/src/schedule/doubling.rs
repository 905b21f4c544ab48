//! All-reduces in which the distance between the ranks that exchange doubles with each step, so that there are few steps.
//!
//! | all_reduce of `S` bytes over `n = 2^k` ranks | steps | a rank sends | a rank reduces |
//! | --- | --- | --- | --- |
//! | recursive doubling | `k` | `k S` | `k S` |
//! | recursive halving and doubling | `2 k` | `2 (n - 1) / n S` | `(n - 1) / n S` |
//!
//! Of another number of ranks, `2^k + m`, the first `2 m` make pairs: the first of a pair gives its buffer to the second
//! at first, and gets the result at last, which is 2 steps more, and `S` sent more by each of them. Both are in Thakur,
//! Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", 2005.
//!
//! Sums are of neighbouring ranks, then of neighbouring pairs, and so on, passed on in the type of the elements: not the
//! rank order's bits, but the same on every rank, for whoever sums takes the lower ranks' part first.
//!
//! Both work in place, on the output, with scratch memory for what is received at once: the buffer, or half of it.

use std::ops::Range;

use tensorwire_transports::tcp::{Place, Span};

use super::direct::bytes;
use super::part;
use super::steps::{Rank, Steps};

/// What is left of the ranks after pairs have become one: a power of two.
struct Folded {
    /// How many pairs there are.
    pairs: usize,
    count: usize,
    /// This rank's place among them; `None` for the first of a pair.
    place: Option<usize>,
}

impl Folded {
    /// Folds the pairs, whose second has room for all `whole` bytes at the start of its scratch memory.
    fn new(steps: &mut Steps, me: Rank, whole: Range<usize>) -> Folded {
        let count = 1 << me.world.ilog2();
        let pairs = me.world - count;
        let place = match me.rank {
            r if r >= 2 * pairs => Some(r - pairs),
            r if r % 2 == 1 => Some(r / 2),
            _ => None,
        };
        if me.rank < 2 * pairs {
            match place {
                None => steps.send(me.rank + 1, Span::new(Place::Output, whole)),
                Some(_) => {
                    steps.receive(me.rank - 1, Span::new(Place::Scratch, whole.clone()));
                    steps.mark();
                    steps.wait_last();
                    steps.fold(whole, 0, true);
                }
            }
        }
        Folded { pairs, count, place }
    }

    /// The rank at a place.
    fn rank(&self, place: usize) -> usize {
        if place < self.pairs { 2 * place + 1 } else { place + self.pairs }
    }

    /// Gives the result to the first of each pair.
    fn unfold(&self, steps: &mut Steps, me: Rank, whole: Range<usize>) {
        let whole = Span::new(Place::Output, whole);
        if me.rank < 2 * self.pairs {
            match self.place {
                None => {
                    // It takes the place of what was sent.
                    steps.mark();
                    steps.wait_last();
                    steps.receive(me.rank + 1, whole);
                }
                Some(_) => steps.send(me.rank - 1, whole),
            }
        }
    }
}

/// Each step doubles the ranks whose sum a rank has.
pub(crate) fn recursive_doubling(steps: &mut Steps, me: Rank, len: usize, size: usize) {
    let whole = 0..len * size;
    steps.begin(whole.len());
    let folded = Folded::new(steps, me, whole.clone());
    if let Some(place) = folded.place {
        for bit in (0..folded.count.ilog2()).map(|k| 1 << k) {
            let peer = folded.rank(place ^ bit);
            steps.receive(peer, Span::new(Place::Scratch, whole.clone()));
            steps.send(peer, Span::new(Place::Output, whole.clone()));
            steps.mark();
            steps.wait_last();
            steps.fold(whole.clone(), 0, place & bit != 0);
        }
    }
    folded.unfold(steps, me, whole);
}

/// Each step halves the part that a rank sums and doubles the ranks whose sum it has; then the parts are gathered the
/// same way back.
pub(crate) fn halving_doubling(steps: &mut Steps, me: Rank, len: usize, size: usize) {
    let whole = 0..len * size;
    let folds = me.rank % 2 == 1 && me.rank < 2 * (me.world - (1 << me.world.ilog2()));
    let half = |r: Range<usize>| r.start + part(r.len(), size, 2, 0).len();
    steps.begin(if folds { whole.len() } else { half(0..len) * size });
    let folded = Folded::new(steps, me, whole.clone());
    if let Some(place) = folded.place {
        let mut own = 0..len;
        // The rank that each step's other half went to, and that half.
        let mut given = Vec::new();
        for bit in (0..folded.count.ilog2()).map(|k| 1 << k) {
            let peer = folded.rank(place ^ bit);
            let (low, high) = (own.start..half(own.clone()), half(own.clone())..own.end);
            let (kept, sent) = if place & bit == 0 { (low, high) } else { (high, low) };
            steps.receive(peer, Span::new(Place::Scratch, 0..kept.len() * size));
            steps.send(peer, Span::new(Place::Output, bytes(sent.clone(), size)));
            steps.mark();
            // Also for the send: the half is received again.
            steps.wait_last();
            steps.fold(bytes(kept.clone(), size), 0, place & bit != 0);
            given.push((peer, sent));
            own = kept;
        }
        for (peer, half) in given.into_iter().rev() {
            steps.receive(peer, Span::new(Place::Output, bytes(half.clone(), size)));
            steps.send(peer, Span::new(Place::Output, bytes(own.clone(), size)));
            steps.mark();
            steps.wait_last();
            own = own.start.min(half.start)..own.end.max(half.end);
        }
    }
    folded.unfold(steps, me, whole);
}
