//! Every schedule of an all-reduce, run by the simulator over any world, length and host map, and its counters against
//! what its documentation says.

use proptest::prelude::*;
use tensorwire_core::{DType, ReduceOp};

use super::hierarchy::Hosts;
use super::steps::simulate::{Sim, WORD, bytes, data, reduced, run, value, words};
use super::steps::{Rank, Step, Steps};
use super::{PIECE, all_reduce, direct, part, tree};
use crate::select::Algorithm;
use tensorwire_transports::tcp::{Place, Span};

/// Those that this module's schedules are for.
const ALGORITHMS: [Algorithm; 7] = [
    Algorithm::OneShot,
    Algorithm::TwoShot,
    Algorithm::Chain,
    Algorithm::Ring,
    Algorithm::RecursiveDoubling,
    Algorithm::HalvingDoubling,
    Algorithm::Hierarchical,
];

/// Ranks that have been run, in place on `len` words, with `combine` where it isn't the default, which shows any order.
fn ran(
    algorithm: Algorithm,
    hosts: &Hosts,
    len: usize,
    piece: usize,
    combine: Option<fn(u64, u64) -> u64>,
    seed: u64,
) -> Vec<Sim> {
    let world = hosts.world();
    let rank = |rank| {
        let make = |steps: &mut Steps, me: Rank| {
            all_reduce(steps, me.rank, hosts, algorithm, len, WORD, piece);
        };
        let mut sim = Sim::new(Rank { rank, world }, None, bytes(&data(rank, len)), make);
        sim.combine = combine.unwrap_or(sim.combine);
        sim
    };
    run((0..world).map(rank).collect(), seed)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn all_ranks_get_everything_once_and_the_same_bits(
        names in proptest::collection::vec(0u8..4, 1..=17),
        len in prop_oneof![0usize..20, 0usize..400],
        piece in prop_oneof![8usize..600, Just(PIECE)],
        algorithm in proptest::sample::select(&ALGORITHMS[..]),
        seed: u64,
    ) {
        let (hosts, world) = (Hosts::new(&names), names.len());
        prop_assume!(world > 1);
        // Each contribution counts, once: the sum is right.
        let sums = ran(algorithm, &hosts, len, piece, Some(u64::wrapping_add), seed);
        let expected: Vec<u64> =
            (0..len).map(|i| (0..world).fold(0, |sum, r| value(r, i).wrapping_add(sum))).collect();
        for (r, sim) in sums.iter().enumerate() {
            prop_assert!(words(&sim.output) == expected, "rank {} of {:?}", r, names);
        }
        // Where order and grouping show, all ranks have the same.
        let ordered = ran(algorithm, &hosts, len, piece, None, seed);
        prop_assert!(ordered.iter().all(|r| r.output == ordered[0].output));
        if algorithm.keeps_order(DType::F64, ReduceOp::Sum) {
            prop_assert!(words(&ordered[0].output) == reduced(world, len));
        }
    }

    #[test]
    fn hosts_are_what_the_names_say(names in proptest::collection::vec(0u8..5, 1..40)) {
        let hosts = Hosts::new(&names);
        for (rank, name) in names.iter().enumerate() {
            let members = &hosts.members()[hosts.of(rank)];
            prop_assert!(members.contains(&rank) && members.is_sorted());
            prop_assert!(members.iter().all(|r| names[*r] == *name));
        }
        prop_assert_eq!(hosts.members().iter().map(Vec::len).sum::<usize>(), hosts.world());
    }
}

#[test]
fn what_is_said_not_to_keep_the_order_does_not() {
    let hosts = Hosts::new(&[0, 0, 0, 0, 1, 1, 1, 1]);
    for algorithm in ALGORITHMS {
        let same = words(&ran(algorithm, &hosts, 1000, PIECE, None, 1)[0].output) == reduced(8, 1000);
        assert_eq!(same, algorithm.keeps_order(DType::F64, ReduceOp::Sum), "{algorithm}");
    }
}

/// Runs what divides evenly, and checks what each rank sends and reduces.
fn counts(algorithm: Algorithm, hosts: &Hosts, sends: usize, sent: usize, summed: usize) {
    let world = hosts.world();
    for sim in ran(algorithm, hosts, world * 64, PIECE, None, 3) {
        assert_eq!((sim.sent, sim.bytes, sim.reduced), (sends, sent, summed), "{algorithm} over {world}");
    }
}

#[test]
fn ranks_send_and_reduce_what_the_tables_say() {
    for k in 1..=4 {
        let n = 1 << k;
        let (s, one) = (n * 64 * WORD, Hosts::new(&vec![0; n]));
        counts(Algorithm::OneShot, &one, n - 1, (n - 1) * s, (n - 1) * s);
        counts(Algorithm::TwoShot, &one, 2 * (n - 1), 2 * (n - 1) * s / n, (n - 1) * s / n);
        counts(Algorithm::Ring, &one, 2 * (n - 1), 2 * (n - 1) * s / n, (n - 1) * s / n);
        counts(Algorithm::RecursiveDoubling, &one, k, k * s, k * s);
        counts(Algorithm::HalvingDoubling, &one, 2 * k, 2 * (n - 1) * s / n, (n - 1) * s / n);
        for h in (0..=k).map(|i| 1 << i) {
            let l = n / h;
            // Also where the ranks of a host aren't neighbours.
            for names in [(0..n).map(|r| r / l).collect::<Vec<_>>(), (0..n).map(|r| r % h).collect()] {
                let hosts = Hosts::new(&names);
                let near = 2 * (l - 1) * s / l;
                let far = 2 * (h - 1) * s / h / l;
                // Of its slice from the host's ranks, and of its part of that from the hosts.
                let summed = (l - 1) * s / l + (h - 1) * s / l / h;
                counts(Algorithm::Hierarchical, &hosts, 2 * (l - 1) + 2 * (h - 1), near + far, summed);
            }
        }
    }
    for n in [3, 5, 6, 12] {
        let (s, one) = (n * 64 * WORD, Hosts::new(&vec![0; n]));
        counts(Algorithm::Ring, &one, 2 * (n - 1), 2 * (n - 1) * s / n, (n - 1) * s / n);
        // The pairs' first send once, their second one step more.
        let k = n.ilog2() as usize;
        let ranks = ran(Algorithm::RecursiveDoubling, &one, n * 64, PIECE, None, 3);
        let pairs = n - (1 << k);
        for (r, sim) in ranks.iter().enumerate() {
            let (sent, summed) = match r {
                r if r >= 2 * pairs => (k, k),
                r if r % 2 == 1 => (k + 1, k + 1),
                _ => (1, 0),
            };
            assert_eq!((sim.bytes, sim.reduced), (sent * s, summed * s), "rank {r} of {n}");
        }
    }
    for (n, pieces) in [(2, 1), (3, 4), (8, 7)] {
        let (len, one) = (pieces * 16, Hosts::new(&vec![0; n]));
        let s = len * WORD;
        let ranks = ran(Algorithm::Chain, &one, len, 16 * WORD, None, 3);
        for (r, sim) in ranks.iter().enumerate() {
            // The last rank starts the results off; the one before it gets them last.
            let streams = if r + 2 >= n { 1 } else { 2 };
            assert_eq!((sim.bytes, sim.sent), (streams * s, streams * pieces), "rank {r} of {n}");
            assert_eq!(sim.reduced, if r == 0 { 0 } else { s });
        }
    }
}

#[test]
fn scratch_memory_does_not_grow_with_pipelined_buffers() {
    let names: Vec<usize> = (0..12).map(|r| r / 4).collect();
    let hosts = Hosts::new(&names);
    let scratch = |algorithm, len| {
        let mut steps = Steps::default();
        all_reduce(&mut steps, 5, &hosts, algorithm, len, 4, PIECE);
        assert!(steps.list().iter().any(|s| matches!(s, Step::Reduce { .. })));
        steps.scratch()
    };
    for (algorithm, most) in [
        (Algorithm::OneShot, 2 * 12 * PIECE),
        (Algorithm::TwoShot, 2 * 12 * PIECE),
        (Algorithm::Chain, 2 * PIECE),
        (Algorithm::Ring, 2 * PIECE),
        // A piece from each rank of the host, and a part of one from each host.
        (Algorithm::Hierarchical, 2 * 4 * PIECE + 2 * (PIECE + 3 * 64)),
    ] {
        assert!(scratch(algorithm, 64 << 20) <= most, "{algorithm}");
        assert_eq!(scratch(algorithm, 64 << 20), scratch(algorithm, 128 << 20), "{algorithm}");
    }
}

/// Makes the steps of each rank, and checks that what ranks send and receive has the same lengths, in the same order, and
/// that every byte of an output of `wanted(rank)` bytes is written: for buffers larger than there is memory for.
fn fits(what: &str, world: usize, wanted: impl Fn(usize) -> usize, make: impl Fn(&mut Steps, Rank)) {
    let mut messages = vec![(Vec::new(), Vec::new()); world * world];
    for rank in 0..world {
        let mut steps = Steps::default();
        make(&mut steps, Rank { rank, world });
        let mut written: Vec<Span> = Vec::new();
        for step in steps.list() {
            match *step {
                Step::Send { to, span } => messages[rank * world + to].0.push(span.len()),
                Step::Receive { from, span } => {
                    messages[from * world + rank].1.push(span.len());
                    written.push(span);
                }
                Step::Reduce { into, .. } | Step::Copy { into, .. } => written.push(into),
                Step::Wait { .. } => {}
            }
        }
        written.retain(|span| span.place == Place::Output);
        written.sort_by_key(|span| span.start);
        let mut end = 0;
        for span in written {
            assert!(span.start <= end, "{what}: rank {rank} of {world} leaves {end}..{}", span.start);
            end = end.max(span.end);
        }
        assert_eq!(end, wanted(rank), "{what}: rank {rank} of {world}");
    }
    for (pair, (sent, received)) in messages.into_iter().enumerate() {
        assert!(sent == received, "{what}: rank {} to {}", pair / world, pair % world);
    }
}

#[test]
fn offsets_go_beyond_32_bits() {
    const SIZE: usize = 4;
    let len = (5 << 30) / SIZE + 13;
    let total = len * SIZE;
    for (world, names) in
        [(2, vec![0, 1]), (3, vec![0, 0, 1]), (4, vec![0, 1, 0, 1]), (5, vec![0, 0, 1, 1, 1])]
    {
        let hosts = Hosts::new(&names);
        for algorithm in ALGORITHMS {
            let make = |steps: &mut Steps, me: Rank| {
                all_reduce(steps, me.rank, &hosts, algorithm, len, SIZE, PIECE);
            };
            fits(&algorithm.to_string(), world, |_| total, make);
        }
        let block = |r: usize| {
            let part = part(len, SIZE, world, r);
            part.start * SIZE..part.end * SIZE
        };
        let own = |r: usize| block(r).len();
        fits("all_gather", world, |_| total, |steps, me| direct::all_gather(steps, me, block, PIECE, None));
        fits("reduce_scatter", world, own, |steps, me| {
            direct::reduce_scatter(steps, me, block, SIZE, PIECE);
        });
        fits("scatter", world, own, |steps, me| direct::scatter(steps, me, block, 1));
        let each = |r: usize| r * total..(r + 1) * total;
        fits(
            "all_to_all",
            world,
            |_| world * total,
            |steps, me| direct::all_to_all(steps, me, |_| true, each, each),
        );
        let received = |r: usize| if r == 0 { 0 } else { total };
        fits("broadcast", world, received, |steps, me| tree::broadcast(steps, me, total, PIECE, 0));
    }
}
