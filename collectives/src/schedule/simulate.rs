//! Runs schedules of all ranks in memory, in random order, with links that hold nothing: a send is done when its
//! receive is, and its bytes are read then, so that a schedule which reuses them too early, or needs a buffer to go
//! on, is found out.

use std::collections::VecDeque;

use proptest::prelude::*;
use tensorwire_transports::tcp::{Place, Span};

use super::{Rank, Step, Steps};
use crate::schedule::{direct, tree};

pub(in crate::schedule) const WORD: usize = 8;

pub(in crate::schedule) struct Sim {
    pub(in crate::schedule) combine: fn(u64, u64) -> u64,
    at: usize,
    steps: Steps,
    input: Option<Vec<u8>>,
    pub(in crate::schedule) output: Vec<u8>,
    scratch: Vec<u8>,
    /// For each peer, what is under way: a number among all of this rank's, and the bytes.
    sends: Vec<VecDeque<(usize, Span)>>,
    receives: Vec<VecDeque<(usize, Span)>>,
    pub(in crate::schedule) sent: usize,
    received: usize,
    pub(in crate::schedule) bytes: usize,
    /// Bytes of contributions that were added to others.
    pub(in crate::schedule) reduced: usize,
}

impl Sim {
    pub(in crate::schedule) fn new(
        me: Rank,
        input: Option<Vec<u8>>,
        output: Vec<u8>,
        make: impl FnOnce(&mut Steps, Rank),
    ) -> Sim {
        let mut steps = Steps::default();
        make(&mut steps, me);
        let queues = || (0..me.world).map(|_| VecDeque::new()).collect();
        // Nothing may depend on what is there before.
        let scratch = vec![0xaa; steps.scratch()];
        let (sends, receives) = (queues(), queues());
        Sim {
            combine,
            at: 0,
            steps,
            input,
            output,
            scratch,
            sends,
            receives,
            sent: 0,
            received: 0,
            bytes: 0,
            reduced: 0,
        }
    }

    fn read(&self, span: Span) -> &[u8] {
        let whole = match span.place {
            Place::Input => self.input.as_ref().unwrap_or(&self.output),
            Place::Output => &self.output,
            Place::Scratch => &self.scratch,
        };
        &whole[span.start..span.end]
    }

    fn write(&mut self, span: Span, bytes: &[u8]) {
        let whole = match span.place {
            Place::Scratch => &mut self.scratch,
            Place::Output | Place::Input => &mut self.output,
        };
        whole[span.start..span.end].copy_from_slice(bytes);
    }

    fn done(&self, received: usize, sent: usize) -> bool {
        let beyond =
            |queues: &[VecDeque<(usize, Span)>], n| queues.iter().flatten().all(|(number, _)| *number >= n);
        beyond(&self.receives, received) && beyond(&self.sends, sent)
    }

    /// Takes a step, if it can.
    fn step(&mut self, me: Rank) -> bool {
        let Some(step) = self.steps.list().get(self.at).copied() else { return false };
        match step {
            Step::Send { to, span } => {
                assert_ne!(to, me.rank);
                self.sends[to].push_back((self.sent, span));
                self.sent += 1;
                self.bytes += span.len();
            }
            Step::Receive { from, span } => {
                assert_ne!(from, me.rank);
                self.receives[from].push_back((self.received, span));
                self.received += 1;
            }
            Step::Wait { received, sent } => {
                if !self.done(received, sent) {
                    return false;
                }
            }
            Step::Reduce { own, at, count, into, theirs, stride } => {
                let len = into.len();
                assert_eq!(own.len(), len);
                let span = |k: usize| match k == at {
                    true => own,
                    false => Span::new(Place::Scratch, theirs + k * stride..theirs + k * stride + len),
                };
                let of = |k| words(self.read(span(k)));
                let sum = (1..count).fold(of(0), |sum, k| {
                    sum.iter().zip(of(k)).map(|(a, b)| (self.combine)(*a, b)).collect()
                });
                self.reduced += len * (count - 1);
                self.write(into, &bytes(&sum));
            }
            Step::Copy { from, into } => {
                let bytes = self.read(from).to_vec();
                self.write(into, &bytes);
            }
        }
        self.at += 1;
        true
    }

    fn finished(&self) -> bool {
        self.at == self.steps.list().len() && self.done(usize::MAX, usize::MAX)
    }
}

/// In an order and a grouping that show.
pub(in crate::schedule) fn combine(a: u64, b: u64) -> u64 {
    a.wrapping_mul(31).wrapping_add(b)
}

pub(in crate::schedule) fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks(WORD).map(|w| u64::from_le_bytes(w.try_into().unwrap())).collect()
}

pub(in crate::schedule) fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

pub(in crate::schedule) fn value(rank: usize, i: usize) -> u64 {
    (i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (rank as u64 + 1).wrapping_mul(0x85EB_CA6B_2545_F491)
}

pub(in crate::schedule) fn data(rank: usize, len: usize) -> Vec<u64> {
    (0..len).map(|i| value(rank, i)).collect()
}

pub(in crate::schedule) fn reduced(world: usize, len: usize) -> Vec<u64> {
    (0..len).map(|i| (1..world).fold(value(0, i), |sum, r| combine(sum, value(r, i)))).collect()
}

/// Runs all ranks to their end.
pub(in crate::schedule) fn run(mut ranks: Vec<Sim>, mut random: u64) -> Vec<Sim> {
    let world = ranks.len();
    let mut draw = |n: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % n
    };
    let mut stuck = 0;
    while !ranks.iter().all(Sim::finished) {
        let (a, b) = (draw(world), draw(world));
        let stepped = ranks[a].step(Rank { rank: a, world });
        let transfer =
            (a != b).then(|| (ranks[a].sends[b].front().copied(), ranks[b].receives[a].front().copied()));
        let moved = if let Some((Some((_, from)), Some((_, into)))) = transfer {
            assert_eq!(from.len(), into.len(), "rank {a} sends {b} another length than it expects");
            let bytes = ranks[a].read(from).to_vec();
            ranks[b].write(into, &bytes);
            ranks[a].sends[b].pop_front();
            ranks[b].receives[a].pop_front();
            true
        } else {
            false
        };
        stuck = if stepped || moved { 0 } else { stuck + 1 };
        assert!(stuck < 1000 * world * world, "no rank can go on");
    }
    ranks
}

/// Runs a schedule that reduces `len` words, in place or not.
fn all_reduce(
    world: usize,
    len: usize,
    in_place: bool,
    root: Option<usize>,
    seed: u64,
    make: impl Fn(&mut Steps, Rank),
) -> Vec<Sim> {
    let rank = |r| {
        let own = bytes(&data(r, len));
        let (input, output) = if in_place { (None, own) } else { (Some(own), vec![0; len * WORD]) };
        Sim::new(Rank { rank: r, world }, input, output, &make)
    };
    let ranks = run((0..world).map(rank).collect(), seed);
    for (r, sim) in ranks.iter().enumerate() {
        if root.is_none_or(|root| root == r) {
            assert!(words(&sim.output) == reduced(world, len), "rank {r} of {world}, {len} words");
        } else if in_place {
            assert!(words(&sim.output) == data(r, len), "rank {r}'s buffer must stay as it is");
        }
    }
    ranks
}

proptest! {
    #[test]
    fn all_reduces(
        world in 2usize..7, len in 0usize..200, piece in 8usize..600, in_place: bool, two: bool, rooted: bool, seed: u64,
    ) {
        let root = rooted.then_some(seed as usize % world);
        all_reduce(world, len, in_place, root, seed, |steps, me| match two {
            true => direct::two_shot(steps, me, len, WORD, piece, root),
            false => direct::one_shot(steps, me, len, WORD, piece, root),
        });
    }

    #[test]
    fn blocks(world in 2usize..7, longest in 0usize..60, piece in 8usize..200, seed: u64) {
        // Blocks of all lengths, some empty.
        let count = |r: usize| if r % 3 == 1 { 0 } else { longest + r };
        let block = |r: usize| {
            let start = (0..r).map(count).sum::<usize>();
            start * WORD..(start + count(r)) * WORD
        };
        let total = block(world - 1).end / WORD;
        let root = seed as usize % world;
        let new = |make: &dyn Fn(&mut Steps, Rank), input: &dyn Fn(usize) -> Vec<u64>, output: &dyn Fn(usize) -> usize| {
            let rank = |r| Sim::new(Rank { rank: r, world }, Some(bytes(&input(r))), vec![0; output(r) * WORD], make);
            run((0..world).map(rank).collect(), seed)
        };
        let own = |r: usize| data(r, count(r));
        let whole: Vec<u64> = (0..world).flat_map(own).collect();

        let all = new(&|s, me| direct::all_gather(s, me, block, piece, None), &own, &|_| total);
        prop_assert!(all.iter().all(|r| words(&r.output) == whole));
        let all = new(&|s, me| direct::all_gather(s, me, block, piece, Some(root)), &own, &|r| if r == root { total } else { 0 });
        prop_assert!(words(&all[root].output) == whole);
        let all = new(&|s, me| direct::scatter(s, me, block, root), &|r| if r == root { whole.clone() } else { vec![] }, &count);
        prop_assert!((0..world).all(|r| words(&all[r].output) == own(r)));
        let all = new(&|s, me| direct::reduce_scatter(s, me, block, WORD, piece), &|r| data(r, total), &count);
        let sums = reduced(world, total);
        prop_assert!((0..world).all(|r| words(&all[r].output) == sums[block(r).start / WORD..block(r).end / WORD]));
        let square = |r: usize| r * longest * WORD..(r + 1) * longest * WORD;
        let all = new(&|s, me| direct::all_to_all(s, me, |_| true, square, square), &|r| data(r, longest * world), &|_| longest * world);
        for (r, sim) in all.iter().enumerate() {
            let expected: Vec<u64> = (0..world).flat_map(|from| data(from, longest * world)[r * longest..][..longest].to_vec()).collect();
            prop_assert!(words(&sim.output) == expected);
        }
    }

    #[test]
    fn broadcasts(world in 2usize..20, len in 0usize..100, piece in 8usize..200, seed: u64) {
        let root = seed as usize % world;
        let rank = |r| {
            let output = if r == root { bytes(&data(root, len)) } else { vec![0; len * WORD] };
            Sim::new(Rank { rank: r, world }, None, output, |s, me| tree::broadcast(s, me, len * WORD, piece, root))
        };
        let ranks = run((0..world).map(rank).collect(), seed);
        let sent: usize = ranks.iter().map(|r| r.bytes).sum();
        prop_assert_eq!(sent, (world - 1) * len * WORD, "each rank gets it once");
        prop_assert!(ranks.iter().all(|r| r.bytes <= len * WORD * world.next_power_of_two().ilog2() as usize));
        prop_assert!(ranks.iter().all(|r| words(&r.output) == data(root, len)));
    }

    #[test]
    fn barriers(world in 2usize..40, seed: u64) {
        for make in [direct::barrier as fn(&mut Steps, Rank), tree::barrier] {
            let rank = |r| Sim::new(Rank { rank: r, world }, None, Vec::new(), make);
            run((0..world).map(rank).collect(), seed);
        }
    }
}

#[test]
fn ranks_send_what_the_tables_say() {
    for world in [2usize, 3, 4, 8] {
        // A whole number of lines for each rank.
        let (len, s) = (world * 64, world * 64 * WORD);
        let one = all_reduce(world, len, true, None, 1, |st, me| {
            direct::one_shot(st, me, len, WORD, 1 << 20, None)
        });
        assert!(one.iter().all(|r| r.bytes == (world - 1) * s && r.sent == world - 1));
        let two = all_reduce(world, len, true, None, 1, |st, me| {
            direct::two_shot(st, me, len, WORD, 1 << 20, None)
        });
        assert!(two.iter().all(|r| r.bytes == 2 * (world - 1) * s / world && r.sent == 2 * (world - 1)));
        // In pieces, the same bytes; and scratch memory for two pieces a peer, however long the buffer is.
        let pieces =
            all_reduce(world, len, true, None, 1, |st, me| direct::two_shot(st, me, len, WORD, 128, None));
        assert!(pieces.iter().all(|r| r.bytes == two[0].bytes && r.scratch.len() == 2 * 128 * world));
    }
    for world in [17usize, 64, 1000] {
        let mut steps = Steps::default();
        tree::barrier(&mut steps, Rank { rank: 3, world });
        let sends = steps.list().iter().filter(|s| matches!(s, Step::Send { .. })).count();
        assert_eq!(sends, world.next_power_of_two().ilog2() as usize);
    }
}
