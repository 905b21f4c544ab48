//! Groups whose ranks lie on several hosts and share memory on each: what stays on a host goes through its memory, what
//! crosses between hosts over TCP.
//!
//! Every call begins with a step in shared memory, so that ranks of one host that make different calls, or don't come,
//! find out there as they would without a network. A failure in either layer ends both, with the ranks numbered as in the
//! whole group.
//!
//! All-reduces of `S` bytes work on slices, as many as the smallest host has ranks; the ranks with the same slice, one a
//! host, exchange it over TCP, all slices at once. `h` hosts have `l` ranks each. On the host, each rank writes `S`, reads
//! `2 (l - 1) / l S` and reduces `S / l`.
//!
//! | all_reduce | messages between two hosts, one after the other | a host sends to others |
//! | --- | --- | --- |
//! | hierarchical: reduce-scatter on the host, all-reduce of each slice between hosts, all-gather on the host | as the all-reduce of `h` ranks | `2 (h - 1) / h S` |
//! | one shot: every rank's contribution to a slice goes to each rank that has the slice, which reduces all in rank order | 1 | `(h - 1) l S` |
//!
//! A reduce-scatter of `S` bytes that may be done in any order, between hosts of as many ranks, reduces each block on the host
//! first: a host sends `(h - 1) / h S` to others in `(h - 1) l` messages, an `l`th of what a direct exchange between all
//! ranks does. Of an all-to-all, only what is for other hosts goes over TCP, as it is.

use std::cell::{Cell, RefCell};
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use tensorwire_core::{Call, Deadline, Error, Op, Result};
use tensorwire_transports::shm::{self, Failure};
use tensorwire_transports::store::Store;
use tensorwire_transports::tcp::Memory;

use super::{Buffers, Either, Engine, NetEngine, Network, Reduction};
use crate::schedule::hierarchy::Hosts;
use crate::schedule::{self, PIECE, Pieces, direct, direct_piece, part, tree};
use crate::select::{Algorithm, tuned};

/// How long ranks of a host wait for each other to share memory, which they could at once; a quarter of the timeout, if that
/// is shorter, for those on other hosts wait as well.
const SHARE_WITHIN: Duration = Duration::from_secs(5);

/// How much longer a rank waits for one of its host that exchanges data with other hosts: that one knows better for
/// whom, and says so.
const BEHIND: Duration = Duration::from_secs(3);

/// And for each byte that it exchanges. Whether anything comes of those, it knows better too; this is only for its being stopped
/// itself, which those notice with whom it exchanges.
const A_BYTE: Duration = Duration::from_micros(1);

/// The largest all-reduce in rank order in which hosts send all contributions to each other. Between two hosts of as many
/// ranks, it is no more than a direct exchange between all ranks sends, and done for any size.
const ONE_SHOT: usize = 64 << 10;

/// Bytes of which the contributions are held at once.
const BLOCK: usize = 8 << 20;

/// Bytes that a rank tells the others while memory is shared: a name and its length.
const NAME: usize = 128;

const FORMING: Call = Call::bare(Op::Split);

/// Where the ranks of a group that shares memory on its hosts are.
#[derive(Debug)]
pub(super) struct Local {
    /// Of this host's ranks, if there is more than one.
    engine: Option<Engine>,
    hosts: Hosts,
    /// This rank's host, and which of its ranks it is.
    host: usize,
    place: usize,
    /// The network of one rank a host.
    pub(super) across: Network,
    timeout: Duration,
    /// What the ranks contribute to this rank's slice, in words, so that it is aligned for any type.
    contributions: Vec<u64>,
}

impl Local {
    pub(super) fn handle(&self) -> Option<shm::Handle> {
        self.engine.as_ref().map(|engine| engine.group.handle())
    }

    fn here(&self) -> &[usize] {
        &self.hosts.members()[self.host]
    }

    /// The ranks that have the same slice as this one, in the order of their hosts; none if it has no slice.
    fn mates(&self) -> Option<Vec<usize>> {
        let carries = self.place < self.hosts.slices();
        carries.then(|| self.hosts.members().iter().map(|ranks| ranks[self.place]).collect())
    }

    /// The bytes of the slice of the `place`th rank of each host, of `len` elements of `size` bytes.
    fn slice(&self, len: usize, size: usize) -> impl Fn(usize) -> Range<usize> + use<> {
        let slices = self.hosts.slices();
        move |place| {
            if place >= slices {
                return len * size..len * size;
            }
            let slice = part(len, size, slices, place);
            slice.start * size..slice.end * size
        }
    }

    /// The most bytes of `bytes` that a rank has in its slice.
    pub(super) fn largest_slice(&self, bytes: usize) -> usize {
        bytes.div_ceil(self.hosts.slices())
    }

    /// The algorithm for an all-reduce of `bytes`, if it is one that uses the hosts' memory.
    pub(super) fn choose(&self, bytes: usize, allowed: impl Fn(Algorithm) -> bool) -> Option<Algorithm> {
        if allowed(Algorithm::Hierarchical) {
            return Some(Algorithm::Hierarchical);
        }
        ((self.hosts.count() == 2 && self.is_even()) || bytes <= ONE_SHOT).then_some(Algorithm::OneShot)
    }

    /// Whether each host has as many ranks.
    fn is_even(&self) -> bool {
        self.hosts.members().iter().all(|ranks| ranks.len() == self.hosts.slices())
    }

    /// Which ranks this one shares memory with, for a person.
    pub(super) fn describe(&self) -> String {
        match &self.engine {
            Some(_) => format!("shm between ranks {:?}, ", self.here()),
            None => "no shm with other ranks, ".to_owned(),
        }
    }
}

impl NetEngine {
    /// Begins a call in shared memory too: the ranks of a host are all in it.
    pub(super) fn begin_locally(&mut self, call: Call) -> Result<(), Failure> {
        let seq = self.group.seq();
        self.locally(None, |engine| {
            engine.group.begin_as(seq, call)?;
            engine.barrier()
        })
    }

    pub(super) fn end_locally(&mut self) {
        if let Some(engine) = self.local.as_mut().and_then(|l| l.engine.as_mut()) {
            engine.group.end();
        }
    }

    /// Whether some of the ranks share memory.
    pub(crate) fn is_mixed(&self) -> bool {
        self.local.is_some()
    }

    /// Moves data between the ranks of this host, before or `behind` so many bytes that cross between hosts.
    fn locally(
        &mut self,
        behind: Option<usize>,
        body: impl FnOnce(&mut Engine) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let Some(local) = &mut self.local else { return Ok(()) };
        let Some(engine) = &mut local.engine else { return Ok(()) };
        let longer = behind.map_or(Duration::ZERO, |bytes| {
            BEHIND + A_BYTE.saturating_mul(u32::try_from(bytes).unwrap_or(u32::MAX))
        });
        let timeout = local.timeout.saturating_add(longer);
        engine.group.allow(timeout);
        self.group.waits_elsewhere(Some(timeout));
        let done = body(engine);
        self.group.waits_elsewhere(None);
        // Before this rank may wait for another host.
        engine.group.ring();
        done
    }

    /// Ends the group in both layers, for whoever waits there; returns the failure.
    pub(super) fn end_both(&mut self, failure: Failure) -> Failure {
        if let Some(local) = &self.local {
            if let Some(engine) = &local.engine {
                engine.group.end_with(&failure);
            }
            self.group.end_with(&failure, &Memory::none());
        }
        failure
    }

    /// An all-reduce that uses the memory of the hosts, if `algorithm` is one that does.
    pub(super) fn all_reduce_mixed(
        &mut self,
        data: Buffers<'_>,
        r: &Reduction,
        algorithm: Algorithm,
    ) -> Result<(), Failure> {
        match algorithm {
            Algorithm::Hierarchical => self.all_reduce_by_host(data, r),
            _ => self.all_reduce_contributions(data, r),
        }
    }

    /// Reduces on each host, then between hosts.
    fn all_reduce_by_host(&mut self, data: Buffers<'_>, r: &Reduction) -> Result<(), Failure> {
        let (world, size) = (self.group.world(), r.size);
        let Some(local) = &self.local else { unreachable!("chosen where memory is shared") };
        let slice = local.slice(data.len() / size, size);
        let (mates, own, host) = (local.mates(), slice(local.place), local.host);
        let partial = r.partial();
        r.alone(Buffers { input: data.input, output: &mut *data.output });
        let output = data.output;
        self.locally(None, |engine| engine.reduce_scatter(None, output, &slice, &partial))?;
        if let (Some(mates), Some(local)) = (mates, &self.local) {
            let algorithm = local.across.choose(own.len(), |_| true);
            let (hosts, len) = (local.across.hosts(), own.len() / size);
            schedule::all_reduce(&mut self.steps, host, hosts, algorithm, len, size, PIECE);
            self.execute_among(Some(&mates), Buffers::in_place(&mut output[own]), Some(&partial))?;
        }
        self.locally(Some(output.len()), |engine| engine.all_gather(None, output, &slice, None))?;
        r.finish(output, world);
        Ok(())
    }

    /// Brings all contributions to a slice to the ranks that have it, who reduce them in rank order.
    fn all_reduce_contributions(&mut self, data: Buffers<'_>, r: &Reduction) -> Result<(), Failure> {
        let blocks = Pieces::new(data.len() / r.size, r.size, BLOCK);
        for i in 0..blocks.count().max(1) {
            let block = blocks.range(i).start * r.size..blocks.range(i).end * r.size;
            let input = data.input.map(|input| &input[block.clone()]);
            self.reduce_contributions(Buffers { input, output: &mut data.output[block] }, r, i > 0)?;
        }
        Ok(())
    }

    /// The same of a block, `behind` others.
    fn reduce_contributions(
        &mut self,
        data: Buffers<'_>,
        r: &Reduction,
        behind: bool,
    ) -> Result<(), Failure> {
        let (me, size) = (self.group.rank(), r.size);
        let Some(local) = &mut self.local else { unreachable!("chosen where memory is shared") };
        let slice = local.slice(data.len() / size, size);
        let (mates, own) = (local.mates(), slice(local.place));
        let here = local.here().to_vec();
        // Rank q's contribution to this rank's slice lies here.
        let stride = own.len().next_multiple_of(64);
        let theirs = |q: usize| q * stride..q * stride + own.len();
        let mut words = std::mem::take(&mut local.contributions);
        words.resize((self.group.world() * stride).div_ceil(8).max(words.len()), 0);
        let all: &mut [u8] = bytemuck::cast_slice_mut(&mut words);
        let longest = slice(0).len();
        let Buffers { input, output } = data;
        all[theirs(me)].copy_from_slice(&input.unwrap_or(output)[own.clone()]);
        let input = Some(input.unwrap_or(output));
        let receives = |place: usize| theirs(here[place]);
        self.locally(behind.then_some(0), |engine| engine.all_to_all(input, all, &slice, receives, longest))?;
        if let (Some(mates), Some(local)) = (&mates, &self.local) {
            direct::exchange(&mut self.steps, me, mates, local.hosts.members(), theirs);
            self.execute_among(None, Buffers::in_place(all), None)?;
            let sources: Vec<&[u8]> = (0..self.group.world()).map(|q| &all[theirs(q)]).collect();
            r.reduce_all(&mut output[own], &sources);
        }
        if let Some(local) = &mut self.local {
            local.contributions = words;
        }
        let bytes = output.len() * self.group.world();
        self.locally(Some(bytes), |engine| engine.all_gather(None, output, &slice, None))
    }

    /// Every rank's block is gathered on its host, then crosses to each other host once, by as many ranks at a time as
    /// the smallest has.
    pub(super) fn all_gather_mixed(
        &mut self,
        input: Option<&[u8]>,
        output: &mut [u8],
        block: impl Fn(usize) -> Range<usize>,
    ) -> Result<(), Failure> {
        let me = self.group.rank();
        let Some(local) = &self.local else { unreachable!("called where memory is shared") };
        let (here, members, slices) =
            (local.here().to_vec(), local.hosts.members().to_vec(), local.hosts.slices());
        let (host, place, mates) = (local.host, local.place, local.mates());
        match here.len() {
            1 => {
                if let Some(input) = input {
                    output[block(me)].copy_from_slice(input);
                }
            }
            _ => {
                let block = |place: usize| block(here[place]);
                self.locally(None, |engine| engine.all_gather(input, output, block, None))?;
            }
        }
        if let Some(mates) = &mates {
            // The ranks whose blocks this rank and its mates bring.
            let brought: Vec<Vec<usize>> = members
                .iter()
                .map(|ranks| ranks.iter().copied().skip(place).step_by(slices).collect())
                .collect();
            direct::exchange(&mut self.steps, me, mates, &brought, &block);
            self.execute_among(None, Buffers::in_place(output), None)?;
        }
        self.locally(Some(output.len()), |engine| {
            for (_, ranks) in members.iter().enumerate().filter(|(h, _)| *h != host) {
                for (place, rank) in ranks.iter().enumerate() {
                    engine.broadcast(None, &mut output[block(*rank)], place % slices)?;
                }
            }
            Ok(())
        })
    }

    /// Whether a reduce-scatter is done on each host first: where no order is lost, and each rank has one to exchange with
    /// on each other host.
    pub(super) fn reduces_by_host(&self, r: &Reduction) -> bool {
        let in_any_order = self.network.any_order() || r.keeps_order(Algorithm::Hierarchical);
        in_any_order && self.local.as_ref().is_some_and(|local| local.is_even())
    }

    /// Reduces each rank's block on each host, then between hosts.
    pub(super) fn reduce_scatter_by_host(
        &mut self,
        input: Option<&[u8]>,
        output: &mut [u8],
        block: impl Fn(usize) -> Range<usize>,
        r: &Reduction,
    ) -> Result<(), Failure> {
        let (me, world) = (self.group.rank(), self.group.world());
        let Some(local) = &self.local else { unreachable!("called where memory is shared") };
        let (members, host, place) = (local.hosts.members().to_vec(), local.host, local.place);
        let partial = r.partial();
        let whole = input.unwrap_or(output);
        // In words, so that it is aligned for any type.
        let mut words = vec![0u64; whole.len().div_ceil(8)];
        let sums = &mut bytemuck::cast_slice_mut(&mut words)[..whole.len()];
        r.alone(Buffers { input: Some(whole), output: &mut *sums });
        for ranks in &members {
            let block = |place: usize| block(ranks[place]);
            self.locally(None, |engine| engine.reduce_scatter(None, sums, block, &partial))?;
        }
        let mates: Vec<usize> = members.iter().map(|ranks| ranks[place]).collect();
        let rank = schedule::steps::Rank { rank: host, world: mates.len() };
        let piece = direct_piece(mates.len());
        direct::reduce_scatter(&mut self.steps, rank, |host| block(mates[host]), r.size, piece);
        let own = if input.is_some() { output } else { &mut output[block(me)] };
        self.execute_among(Some(&mates), Buffers { input: Some(sums), output: &mut *own }, Some(&partial))?;
        r.finish(own, world);
        Ok(())
    }

    /// What stays on a host goes through its memory; every two ranks of different hosts exchange their blocks.
    pub(super) fn all_to_all_mixed(
        &mut self,
        input: &[u8],
        output: &mut [u8],
        sends: impl Fn(usize) -> Range<usize>,
        receives: impl Fn(usize) -> Range<usize>,
    ) -> Result<(), Failure> {
        let me = self.me();
        let Some(local) = &self.local else { unreachable!("called where memory is shared") };
        let here = local.here().to_vec();
        let longest = here.iter().map(|r| sends(*r).len()).max().unwrap_or(0);
        self.locally(None, |engine| {
            // Blocks may be of any lengths, which their two ranks alone know.
            let mut all = vec![0u64; here.len()];
            let words = bytemuck::cast_slice_mut(&mut all);
            let word = |place: usize| place * 8..(place + 1) * 8;
            engine.all_gather(Some(&(longest as u64).to_ne_bytes()), words, word, None)?;
            let longest = all.into_iter().max().unwrap_or(0) as usize;
            let (sends, receives) = (|place: usize| sends(here[place]), |place: usize| receives(here[place]));
            engine.all_to_all(Some(input), output, sends, receives, longest)
        })?;
        direct::all_to_all(&mut self.steps, me, |r| !here.contains(&r), sends, receives);
        self.execute(Buffers { input: Some(input), output }, None)
    }

    /// One rank of each host passes the root's buffer on to the others there.
    pub(super) fn broadcast_mixed(&mut self, output: &mut [u8], root: usize) -> Result<(), Failure> {
        let me = self.group.rank();
        let Some(local) = &self.local else { unreachable!("called where memory is shared") };
        let leader = |ranks: &Vec<usize>| if ranks.contains(&root) { root } else { ranks[0] };
        let leaders: Vec<usize> = local.hosts.members().iter().map(leader).collect();
        let first = leaders[local.host];
        let from = local.here().iter().position(|r| *r == first).unwrap_or(0);
        if first == me {
            let top = leaders.iter().position(|r| *r == root).unwrap_or(0);
            let rank = schedule::steps::Rank { rank: local.host, world: leaders.len() };
            tree::broadcast(&mut self.steps, rank, output.len(), super::net::BROADCAST_PIECE, top);
            self.execute_among(Some(&leaders), Buffers::in_place(output), None)?;
        }
        self.locally(Some(output.len()), |engine| engine.broadcast(None, output, from))
    }

    /// The ranks of this host have come: see [`begin_locally`](NetEngine::begin_locally).
    pub(super) fn barrier_mixed(&mut self) -> Result<(), Failure> {
        let Some(local) = &self.local else { unreachable!("called where memory is shared") };
        if local.place == 0 {
            let leaders: Vec<usize> = local.hosts.members().iter().map(|ranks| ranks[0]).collect();
            let rank = schedule::steps::Rank { rank: local.host, world: leaders.len() };
            tree::barrier(&mut self.steps, rank);
            self.execute_among(Some(&leaders), Buffers::in_place(&mut []), None)?;
        }
        self.locally(Some(0), Engine::barrier)
    }
}

// How memory comes to be shared.
impl NetEngine {
    /// Shares memory between ranks of one host, where this group is one that does: those that a rank of theirs could
    /// hand its memory, and that have read a token there which it had written. Where all ranks do, shared memory is all
    /// that is left.
    pub(crate) fn share(mut self) -> Result<Either, Failure> {
        let Some(options) = self.sharing.clone().filter(|_| self.group.world() > 1) else {
            return Ok(Either::Tcp(Box::new(self)));
        };
        let (me, world) = (self.group.rank(), self.group.world());
        // Who may share memory: sockets in the abstract namespace are a network namespace's.
        let namespace = std::fs::metadata("/proc/self/ns/net").map_or(me as u64, |m| m.ino());
        let namespaces = self.exchange(namespace.to_le_bytes())?;
        let names: Vec<_> = (0..world).map(|r| (self.network.host(r), namespaces[r])).collect();
        let hosts = Hosts::new(&names);
        let candidates = hosts.members()[hosts.of(me)].clone();
        let place = candidates.iter().position(|r| *r == me).unwrap_or(0);

        let meeting = Meeting {
            leader: candidates[0],
            engine: RefCell::new(&mut self),
            met: Cell::new(false),
            failed: RefCell::new(None),
        };
        let joining =
            shm::Options { timeout: (options.timeout / 4).min(SHARE_WITHIN), ..tuned(&options, place) };
        let joined = match candidates.len() {
            1 => None,
            among => shm::join(place, among, &meeting, &joining).ok(),
        };
        if !meeting.met.get() {
            // Whatever was in the way: the others wait.
            let _ = meeting.meet(&[]);
        }
        let failed = meeting.failed.take();
        if let Some(failure) = failed {
            return Err(failure);
        }
        let mut token = RandomState::new().hash_one(me).to_le_bytes();
        let engine = joined.and_then(|mut group| {
            group.name_ranks(candidates.clone());
            let mut engine = Engine::new(group);
            engine.run(FORMING, |engine| engine.broadcast(None, &mut token, 0)).ok().map(|()| engine)
        });
        let mut proof = [0; 9];
        proof[0] = u8::from(engine.is_some());
        proof[1..].copy_from_slice(&token);
        let proofs = self.exchange(proof)?;

        let proved =
            |ranks: &Vec<usize>| ranks.iter().all(|r| proofs[*r][0] == 1 && proofs[*r] == proofs[ranks[0]]);
        let host = |rank: usize| {
            let ranks = &hosts.members()[hosts.of(rank)];
            if proved(ranks) { ranks[0] } else { rank }
        };
        let hosts = Hosts::new(&(0..world).map(host).collect::<Vec<_>>());
        let mut engine = engine.filter(|_| hosts.members()[hosts.of(me)].len() > 1);
        if let Some(engine) = &mut engine {
            engine.group.allow(options.timeout);
        }
        match engine {
            Some(engine) if hosts.count() == 1 => return Ok(Either::Shm(engine)),
            _ if hosts.count() == world => return Ok(Either::Tcp(Box::new(self))),
            _ => {}
        }
        let host = hosts.of(me);
        let place = hosts.members()[host].iter().position(|r| *r == me).unwrap_or(0);
        let across = self.network.between(hosts.count());
        let (timeout, contributions) = (options.timeout, Vec::new());
        // Each rank tells another of a host, so that not all come to the same.
        let others = hosts.members().iter().enumerate().filter(|(h, _)| *h != host);
        let elsewhere = others.map(|(_, ranks)| ranks[place % ranks.len()]).collect();
        self.group.tie(engine.as_ref().map(|engine| engine.group.handle()), elsewhere);
        self.local = Some(Box::new(Local { engine, hosts, host, place, across, timeout, contributions }));
        Ok(Either::Tcp(Box::new(self)))
    }

    /// Every rank's `mine`.
    fn exchange<const N: usize>(&mut self, mine: [u8; N]) -> Result<Vec<[u8; N]>, Failure> {
        let mut all = vec![0; N * self.group.world()];
        self.run(FORMING, |engine| engine.all_gather(Some(&mine), &mut all, |r| r * N..(r + 1) * N, None))?;
        Ok(all.as_chunks::<N>().0.to_vec())
    }
}

/// The store in which ranks meet to share memory: each tells all others one thing, over the group's connections.
#[derive(Debug)]
struct Meeting<'a> {
    leader: usize,
    engine: RefCell<&'a mut NetEngine>,
    met: Cell<bool>,
    failed: RefCell<Option<Failure>>,
}

impl Meeting<'_> {
    fn meet(&self, value: &[u8]) -> Result<Vec<u8>> {
        self.met.set(true);
        let mut mine = [0; NAME];
        let len = value.len().min(NAME - 1);
        mine[0] = len as u8;
        mine[1..=len].copy_from_slice(&value[..len]);
        match self.engine.borrow_mut().exchange(mine) {
            Ok(all) => {
                let theirs = &all[self.leader];
                Ok(theirs[1..=usize::from(theirs[0]).min(NAME - 1)].to_vec())
            }
            Err(failure) => {
                let why = failure.to_string();
                *self.failed.borrow_mut() = Some(failure);
                Err(Error::invalid(why))
            }
        }
    }
}

impl Store for Meeting<'_> {
    fn set(&self, _: &str, value: &[u8], _: Deadline) -> Result<()> {
        self.meet(value).map(drop)
    }

    fn get(&self, _: &str, _: Deadline) -> Result<Vec<u8>> {
        self.meet(&[])
    }

    fn add(&self, _: &str, delta: i64, _: Deadline) -> Result<i64> {
        Ok(delta)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Rules;
    use crate::schedule::steps::{Rank, Step, Steps};
    use tensorwire_core::{DType, ReduceOp};

    const RULES: Rules = Rules { any_order: false, adapt_percent: 0.0 };

    #[test]
    fn sums_keep_the_rank_order_and_the_rest_cross_least() {
        let local = |names: &str| {
            let hosts = Hosts::new(names.as_bytes());
            let across = Network::new(&(0..hosts.count()).collect::<Vec<_>>(), Default::default(), RULES);
            let (timeout, contributions) = (Duration::ZERO, Vec::new());
            Local { engine: None, hosts, host: 0, place: 0, across, timeout, contributions }
        };
        let of = |names: &str, bytes, dtype: DType, op: ReduceOp| {
            local(names).choose(bytes, |a| a.keeps_order(dtype, op))
        };
        for (names, bytes, large) in
            [("aabb", 1 << 30, true), ("abc", 1 << 30, false), ("aab", 1 << 30, false), ("abcc", 100, true)]
        {
            let expected = large.then_some(Algorithm::OneShot);
            assert_eq!(of(names, bytes, DType::F32, ReduceOp::Sum), expected, "{names}");
            assert_eq!(of(names, bytes, DType::F32, ReduceOp::Max), Some(Algorithm::Hierarchical));
            assert_eq!(of(names, bytes, DType::I32, ReduceOp::Sum), Some(Algorithm::Hierarchical));
        }
    }

    /// Messages and bytes that go over TCP, where rank `r` runs the steps that `make` gives it.
    fn sent(world: usize, make: impl Fn(&mut Steps, usize)) -> (usize, usize) {
        let (mut messages, mut bytes) = (0, 0);
        for rank in 0..world {
            let mut steps = Steps::default();
            make(&mut steps, rank);
            for step in steps.list() {
                if let Step::Send { span, .. } = step {
                    (messages, bytes) = (messages + 1, bytes + span.len());
                }
            }
        }
        (messages, bytes)
    }

    #[test]
    fn what_hosts_can_do_by_themselves_is_not_sent() {
        const BLOCK: usize = 1024;
        for names in [&b"aabb"[..], b"abab", b"aaabbbccc"] {
            let hosts = Hosts::new(names);
            let (n, h) = (names.len(), hosts.count());
            let l = n / h;
            let block = |r: usize| r * BLOCK..(r + 1) * BLOCK;
            let all = |rank| Rank { rank, world: n };
            let direct = sent(n, |steps, r| direct::reduce_scatter(steps, all(r), block, 4, PIECE));
            assert_eq!(direct, (n * (n - 1), n * (n - 1) * BLOCK));
            let by_host = sent(n, |steps, r| {
                let host = hosts.of(r);
                let place = hosts.members()[host].iter().position(|m| *m == r).unwrap();
                let mate = |h: usize| block(hosts.members()[h][place]);
                direct::reduce_scatter(steps, Rank { rank: host, world: h }, mate, 4, PIECE);
            });
            assert_eq!(by_host, (n * (h - 1), n * (h - 1) * BLOCK));
            let exchange = sent(n, |steps, r| {
                direct::all_to_all(steps, all(r), |other| hosts.of(other) != hosts.of(r), block, block);
            });
            assert_eq!(exchange, (n * (n - l), n * (n - l) * BLOCK));
        }
    }

    #[test]
    fn slices_are_as_many_as_the_smallest_host_has_ranks() {
        let hosts = Hosts::new(b"aaabb");
        let across = Network::new(&[0, 1], Default::default(), RULES);
        let (timeout, contributions) = (Duration::ZERO, Vec::new());
        let mut local = Local { engine: None, hosts, host: 0, place: 1, across, timeout, contributions };
        let slice = local.slice(100, 4);
        assert_eq!([slice(0), slice(1), slice(2)], [0..256, 256..400, 400..400]);
        assert_eq!(local.mates(), Some(vec![1, 4]));
        local.place = 2;
        assert_eq!(local.mates(), None);
    }
}
