//! What the schedules are expected to take, from what messages cost: a formula for each, by which one is chosen.
//!
//! A step costs the latency of its slowest message, the overhead of the rank that has most messages, and the bytes of the
//! link that carries most, a rank's or, between hosts, a host's. Which messages a step has follows from where the ranks
//! are. This is the model of Thakur, Rabenseifner and Gropp, 2005, with what they leave out where many messages leave one
//! rank or one host at once. `timed` runs the schedules themselves; the tests compare the two.

use super::PIECE;
use super::hierarchy::Hosts;
use crate::network::{Link, Links};
use crate::select::Algorithm;

/// Microseconds for each byte of a contribution that is reduced, while it is in the caches.
pub(super) const REDUCE_US: f64 = 1e-3 / 32.0;

/// The time of a schedule, in microseconds, as a function of the bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Cost {
    /// Whatever the size.
    fixed: f64,
    /// A byte of the first piece, which nothing overlaps with.
    first: f64,
    /// A byte more.
    further: f64,
    /// A piece more.
    piece_us: f64,
    /// Bytes of a piece.
    piece: usize,
}

impl Cost {
    /// A schedule without pieces that overlap.
    fn line(fixed: f64, byte: f64) -> Cost {
        Cost { fixed, first: byte, further: byte, piece_us: 0.0, piece: usize::MAX }
    }

    fn us(&self, bytes: usize) -> f64 {
        let first = bytes.min(self.piece);
        let pieces = bytes.div_ceil(self.piece).max(1) - 1;
        self.fixed
            + self.first * first as f64
            + self.further * (bytes - first) as f64
            + self.piece_us * pieces as f64
    }
}

/// Messages that are sent at once.
struct Round<'a> {
    hosts: &'a Hosts,
    links: &'a Links,
    alpha: f64,
    /// Overhead of each rank.
    busy: Vec<f64>,
    /// Microseconds a byte of the buffer: of what each rank sends on its host and receives there, and each host.
    ranks: Vec<(f64, f64)>,
    wires: Vec<(f64, f64)>,
}

impl<'a> Round<'a> {
    fn new(hosts: &'a Hosts, links: &'a Links) -> Round<'a> {
        let none = (0.0, 0.0);
        let (busy, ranks) = (vec![0.0; hosts.world()], vec![none; hosts.world()]);
        Round { hosts, links, alpha: 0.0, busy, ranks, wires: vec![none; hosts.count()] }
    }

    fn link(&self, from: usize, to: usize) -> &Link {
        if self.hosts.of(from) == self.hosts.of(to) { &self.links.intra } else { &self.links.inter }
    }

    /// A message of a fraction of the buffer.
    fn send(&mut self, from: usize, to: usize, fraction: f64) {
        let link = *self.link(from, to);
        let (a, b) = (self.hosts.of(from), self.hosts.of(to));
        self.alpha = self.alpha.max(link.alpha_us);
        self.busy[from] += link.overhead_us;
        self.busy[to] += link.overhead_us;
        let byte = fraction * link.us_a_byte();
        let (out, into) = match a == b {
            true => (&mut self.ranks, (from, to)),
            false => (&mut self.wires, (a, b)),
        };
        out[into.0].0 += byte;
        out[into.1].1 += byte;
    }

    /// What it takes, and what each byte adds.
    fn cost(&self) -> (f64, f64) {
        let most = |all: &[(f64, f64)]| all.iter().fold(0f64, |most, (out, into)| most.max(*out).max(*into));
        let busy = self.busy.iter().fold(0f64, |most, b| most.max(*b));
        (self.alpha + busy, most(&self.ranks).max(most(&self.wires)))
    }
}

fn round(
    hosts: &Hosts,
    links: &Links,
    messages: impl IntoIterator<Item = (usize, usize, f64)>,
) -> (f64, f64) {
    let mut round = Round::new(hosts, links);
    for (from, to, fraction) in messages {
        round.send(from, to, fraction);
    }
    round.cost()
}

fn cost(algorithm: Algorithm, hosts: &Hosts, links: &Links) -> Cost {
    let world = hosts.world();
    let n = world as f64;
    let all_pairs = |fraction: f64| {
        let pairs = (0..world).flat_map(move |a| (1..world).map(move |i| (a, (a + i) % world, fraction)));
        round(hosts, links, pairs)
    };
    match algorithm {
        Algorithm::Inline | Algorithm::OneShot => {
            let (fixed, byte) = all_pairs(1.0);
            Cost::line(fixed, byte + n * REDUCE_US)
        }
        Algorithm::TwoShot | Algorithm::Symmetric | Algorithm::Mpi => {
            let (fixed, byte) = all_pairs(1.0 / n);
            Cost::line(2.0 * fixed, 2.0 * byte + REDUCE_US)
        }
        Algorithm::Ring => {
            // A part's way leads over all links, and over the slowest one lead all parts.
            let hops = || (0..world).map(|r| (r, (r + 1) % world, 1.0 / n));
            let fixed: f64 = hops().map(|hop| round(hosts, links, [hop]).0).sum();
            let (_, byte) = round(hosts, links, hops());
            Cost::line(2.0 * (n - 1.0) / n * fixed, 2.0 * (n - 1.0) * byte + 2.0 * REDUCE_US)
        }
        Algorithm::Chain => {
            // Reduced from rank 0 to the last, and from there around to the one before it.
            let up = (1..world).map(|r| (r - 1, r, 1.0));
            let around = || (0..world - 1).map(|r| ((r + world - 1) % world, r, 1.0));
            let hops = up.clone().chain(around()).map(|hop| round(hosts, links, [hop]));
            let (fixed, byte) = hops.fold((0.0, 0.0), |(f, b), (fixed, byte)| (f + fixed, b + byte));
            let (all, further) = round(hosts, links, up.chain(around()));
            let alpha = links.intra.alpha_us.max(if hosts.count() > 1 { links.inter.alpha_us } else { 0.0 });
            Cost {
                fixed,
                first: byte + 2.0 * (n - 1.0) * REDUCE_US,
                further: further + 2.0 * REDUCE_US,
                // Pieces follow each other without waiting for what is on its way.
                piece_us: (all - alpha).max(0.0),
                piece: PIECE,
            }
        }
        Algorithm::RecursiveDoubling | Algorithm::HalvingDoubling => {
            let steps = world.ilog2();
            let pairs = world - (1 << steps);
            let rank = |place: usize| if place < pairs { 2 * place + 1 } else { place + pairs };
            let halves = algorithm == Algorithm::HalvingDoubling;
            let (mut fixed, mut byte) = (0.0, 0.0);
            for k in 0..steps {
                let (times, fraction) = if halves { (2.0, 0.5f64.powi(k as i32 + 1)) } else { (1.0, 1.0) };
                let messages = (0..1usize << steps).map(|p| (rank(p), rank(p ^ (1 << k)), fraction));
                let step = round(hosts, links, messages);
                fixed += times * step.0;
                byte += times * step.1 + 2.0 * fraction * REDUCE_US;
            }
            if pairs > 0 {
                let fold = round(hosts, links, (0..pairs).map(|p| (2 * p, 2 * p + 1, 1.0)));
                fixed += 2.0 * fold.0;
                byte += 2.0 * fold.1 + 2.0 * REDUCE_US;
            }
            Cost::line(fixed, byte)
        }
        Algorithm::Hierarchical => {
            let slices = hosts.slices();
            let slice = 1.0 / slices as f64;
            let carriers = |ranks: &Vec<usize>| ranks[..slices].to_vec();
            let mut near = Round::new(hosts, links);
            let mut far = Round::new(hosts, links);
            let mut both = Round::new(hosts, links);
            for ranks in hosts.members() {
                for (a, b) in carriers(ranks).into_iter().flat_map(|a| ranks.iter().map(move |b| (a, *b))) {
                    if a != b {
                        near.send(b, a, slice);
                        both.send(a, b, slice);
                        both.send(b, a, slice);
                    }
                }
                for other in hosts.members().iter().filter(|o| o[0] != ranks[0]) {
                    for (a, b) in carriers(ranks).into_iter().zip(carriers(other)) {
                        let share = slice / hosts.count() as f64;
                        far.send(a, b, share);
                        both.send(a, b, share);
                        both.send(a, b, share);
                    }
                }
            }
            let (near, far, both) = (near.cost(), far.cost(), both.cost());
            let largest = hosts.members().iter().map(Vec::len).max().unwrap_or(1) as f64;
            let reduce = (largest * slice + slice) * REDUCE_US;
            Cost {
                fixed: 2.0 * (near.0 + far.0),
                first: 2.0 * (near.1 + far.1) + reduce,
                further: both.1 + reduce,
                piece_us: both.0,
                piece: slices * PIECE,
            }
        }
    }
}

/// Those that are chosen from, the first of equals.
pub(super) const CANDIDATES: [Algorithm; 7] = [
    Algorithm::OneShot,
    Algorithm::TwoShot,
    Algorithm::Chain,
    Algorithm::Ring,
    Algorithm::RecursiveDoubling,
    Algorithm::HalvingDoubling,
    Algorithm::Hierarchical,
];

/// What each schedule takes on a network: the same on every rank that has the same links and hosts.
#[derive(Clone, Debug)]
pub(crate) struct Costs(Vec<(Algorithm, Cost)>);

impl Costs {
    pub(crate) fn new(hosts: &Hosts, links: &Links) -> Costs {
        Costs(match hosts.world() {
            0 | 1 => Vec::new(),
            _ => CANDIDATES.map(|a| (a, cost(a, hosts, links))).to_vec(),
        })
    }

    /// What each of the algorithms takes with so many bytes, in microseconds.
    pub(crate) fn predicted(&self, bytes: usize) -> impl Iterator<Item = (Algorithm, f64)> {
        self.0.iter().map(move |(a, cost)| (*a, cost.us(bytes)))
    }

    /// What an algorithm takes with so many bytes, in microseconds.
    pub(crate) fn us(&self, algorithm: Algorithm, bytes: usize) -> f64 {
        // What shared memory knows by another name is the same over a network.
        let known = match algorithm {
            Algorithm::Inline => Algorithm::OneShot,
            Algorithm::Symmetric | Algorithm::Mpi => Algorithm::TwoShot,
            other => other,
        };
        self.predicted(bytes).find(|(a, _)| *a == known).map_or(0.0, |(_, us)| us)
    }

    /// The fastest of those that are allowed.
    pub(crate) fn choose(&self, bytes: usize, allowed: impl Fn(Algorithm) -> bool) -> Algorithm {
        let fastest = self.predicted(bytes).filter(|(a, _)| allowed(*a)).min_by(|a, b| a.1.total_cmp(&b.1));
        fastest.map_or(Algorithm::OneShot, |(a, _)| a)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;
    use tensorwire_core::{DType, ReduceOp};

    fn link() -> impl Strategy<Value = Link> {
        (0f64..100.0, 0.01f64..100.0, 0f64..10.0).prop_map(|(alpha_us, gbps, overhead_us)| Link {
            alpha_us,
            gbps,
            overhead_us,
        })
    }

    proptest! {
        #[test]
        fn the_choice_is_the_fastest_that_is_allowed(
            names in proptest::collection::vec(0u8..5, 2..24),
            intra in link(),
            inter in link(),
            bytes in prop_oneof![0usize..4096, 0usize..1 << 30],
        ) {
            let costs = Costs::new(&Hosts::new(&names), &Links { intra, inter });
            let ordered = |a: Algorithm| a.keeps_order(DType::F32, ReduceOp::Sum);
            for allowed in [&ordered as &dyn Fn(Algorithm) -> bool, &|_| true, &|a| a.is_shm()] {
                let chosen = costs.choose(bytes, allowed);
                prop_assert!(allowed(chosen));
                let us = |a| costs.predicted(bytes).find(|(b, _)| *b == a).unwrap().1;
                prop_assert!(costs.predicted(bytes).all(|(a, other)| !allowed(a) || us(chosen) <= other));
                prop_assert!(us(chosen) >= 0.0);
            }
            // More bytes never take less time.
            for ((_, less), (_, more)) in costs.predicted(bytes).zip(costs.predicted(bytes + 4096)) {
                prop_assert!(less <= more * (1.0 + 1e-9));
            }
        }
    }
}
