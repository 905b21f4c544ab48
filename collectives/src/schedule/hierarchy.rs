//! All-reduce over ranks on several hosts, which crosses between hosts as little as it can.
//!
//! The ranks of a host reduce a slice each, at once; the ranks with the same slice on all hosts reduce those with each
//! other; then the ranks of a host give each other their slices. With `l` ranks on each of `h` hosts:
//!
//! | all_reduce of `S` bytes | steps | a rank sends on its host | and to other hosts | a rank reduces |
//! | --- | --- | --- | --- | --- |
//! | hierarchical, in `p` pieces | `4`, pipelined: `p + 3` | `2 (l - 1) / l S` | `2 (h - 1) / h S / l` | `S (1 + 1 / h)` of contributions |
//!
//! As in Cho, Finkler, Serrano, Kung and Hunter, "BlueConnect", 2019, with a direct exchange at each level. Where hosts
//! have differing numbers of ranks there are as many slices as the smallest has ranks; further ranks only contribute.
//!
//! Sums are of a host's ranks in their order, then of the hosts in theirs, and are passed on in the type of the elements:
//! not the rank order's bits, but the same on every rank, for each element is summed by one.
//!
//! It works in place, on the output.

use std::ops::Range;

use tensorwire_transports::tcp::{Place, Span};

use super::direct::bytes;
use super::steps::{Rank, Step, Steps};
use super::{Pieces, part};

/// Which ranks are on one host.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Hosts {
    /// Each host's ranks, in order; the hosts in the order of their first.
    members: Vec<Vec<usize>>,
    /// Each rank's host, and its place there.
    place: Vec<(usize, usize)>,
}

impl Hosts {
    /// From what each rank calls its host.
    pub(crate) fn new<T: PartialEq>(names: &[T]) -> Hosts {
        let mut members: Vec<Vec<usize>> = Vec::new();
        let mut place = Vec::with_capacity(names.len());
        for (rank, name) in names.iter().enumerate() {
            let host = members.iter().position(|ranks| names[ranks[0]] == *name).unwrap_or_else(|| {
                members.push(Vec::new());
                members.len() - 1
            });
            place.push((host, members[host].len()));
            members[host].push(rank);
        }
        Hosts { members, place }
    }

    pub(crate) fn world(&self) -> usize {
        self.place.len()
    }

    /// How many hosts there are.
    pub(crate) fn count(&self) -> usize {
        self.members.len()
    }

    /// The ranks of each host.
    pub(crate) fn members(&self) -> &[Vec<usize>] {
        &self.members
    }

    /// The host of a rank.
    pub(crate) fn of(&self, rank: usize) -> usize {
        self.place[rank].0
    }

    /// How many ranks of a host have a slice.
    pub(crate) fn slices(&self) -> usize {
        self.members.iter().map(Vec::len).min().unwrap_or(1)
    }
}

pub(crate) fn all_reduce(steps: &mut Steps, me: Rank, hosts: &Hosts, len: usize, size: usize, piece: usize) {
    let slices = hosts.slices();
    let (host, local) = hosts.place[me.rank];
    let here = &hosts.members[host];
    let carries = local < slices;
    let blocks = Pieces::new(len, size, piece * slices);
    let count = blocks.count().max(1);
    // Slice `j` of block `t`, and the part of it that host `h` reduces.
    let slice = |t: usize, j: usize| {
        let (block, p) = (blocks.range(t), part(blocks.range(t).len(), size, slices, j));
        bytes(block.start + p.start..block.start + p.end, size)
    };
    let share = |t: usize, h: usize| -> Range<usize> {
        let (s, p) = (slice(t, local), part(slice(t, local).len() / size, size, hosts.count(), h));
        s.start + p.start * size..s.start + p.end * size
    };
    // What the host's ranks contribute to this rank's slice, and what the hosts do; each twice.
    let (near, far) = match carries {
        true => (slice(0, local).len().next_multiple_of(64), share(0, host).len().next_multiple_of(64)),
        false => (0, 0),
    };
    let near_of = |t: usize| t % 2 * here.len() * near;
    let far_of = |t: usize| 2 * here.len() * near + t % 2 * hosts.count() * far;
    steps.begin(2 * here.len() * near + 2 * hosts.count() * far);
    let others = || (1..here.len()).map(move |i| (local + i) % here.len());
    let other_hosts = || (1..hosts.count()).map(move |i| (host + i) % hosts.count());
    let output = |range: Range<usize>| Span::new(Place::Output, range);
    for t in 0..count + 3 {
        let block = |behind: usize| t.checked_sub(behind).filter(|t| *t < count);
        if let Some(t) = block(0) {
            for peer in others().filter(|j| *j < slices) {
                steps.send(here[peer], output(slice(t, peer)));
            }
            for peer in others().filter(|_| carries) {
                let at = near_of(t) + peer * near;
                steps.receive(here[peer], Span::new(Place::Scratch, at..at + slice(t, local).len()));
            }
        }
        // Also for what was sent, in whose place other things are received from here on.
        steps.wait_last();
        if let Some(t) = block(1).filter(|_| carries) {
            let own = output(slice(t, local));
            if here.len() > 1 {
                let (at, count) = (local, here.len());
                steps.push(Step::Reduce { own, at, count, into: own, theirs: near_of(t), stride: near });
            }
            for other in other_hosts() {
                let (peer, at) = (hosts.members[other][local], far_of(t) + other * far);
                steps.send(peer, output(share(t, other)));
                steps.receive(peer, Span::new(Place::Scratch, at..at + share(t, host).len()));
            }
        }
        if let Some(t) = block(2).filter(|_| carries) {
            let own = output(share(t, host));
            if hosts.count() > 1 {
                let (at, count) = (host, hosts.count());
                steps.push(Step::Reduce { own, at, count, into: own, theirs: far_of(t), stride: far });
            }
            for other in other_hosts() {
                let peer = hosts.members[other][local];
                steps.send(peer, own);
                steps.receive(peer, output(share(t, other)));
            }
        }
        if let Some(t) = block(3) {
            for peer in others() {
                if carries {
                    steps.send(here[peer], output(slice(t, local)));
                }
                if peer < slices {
                    steps.receive(here[peer], output(slice(t, peer)));
                }
            }
        }
        steps.mark();
    }
}
