//! Runs the schedules of collectives over the connections of a group over TCP, or over MPI.

use std::borrow::Cow;
use std::ops::Range;

use tensorwire_core::DType;
use tensorwire_core::{Call, Error};
use tensorwire_transports::shm::{self, Failure, Incoming, Outgoing};
use tensorwire_transports::tcp::{Memory, Place, Span};

use super::lanes::Lanes;
use super::mixed::Local;
use super::pipeline::Pipeline;
use super::{Buffers, Encoded, Epilogue, Network, Reduction, Sources};
use crate::adapt::Adaptation;
use crate::network::NetworkInUse;
use crate::schedule::steps::{Rank, Step, Steps};
use crate::schedule::{self, PIECE, direct, direct_piece, tree};
use crate::select::Algorithm;

/// Bytes that are passed on in a broadcast, while the next are on their way.
pub(super) const BROADCAST_PIECE: usize = 256 << 10;

/// Ranks up to which a barrier tells everybody: beyond, it takes more than one step, of few messages each.
const DIRECT_BARRIER: usize = 16;

/// A group's engine over a network. Its collectives are those of the engine over shared memory.
#[derive(Debug)]
pub(crate) struct NetEngine {
    pub(crate) group: Lanes,
    pub(super) network: Network,
    /// Where ranks share memory, if some do.
    pub(super) local: Option<Box<Local>>,
    /// How ranks of one host are to share memory, if they are to.
    pub(super) sharing: Option<shm::Options>,
    pub(super) steps: Steps,
    /// Scratch memory, in words, so that it is aligned for any type.
    scratch: Vec<u64>,
    pub(super) adaptation: Adaptation,
    /// This rank's buffer in fewer bits.
    encoded: Vec<u64>,
    pub(super) sources: Sources,
    /// Started calls that are under way.
    pub(super) pipeline: Pipeline,
    /// Whether MPI is asked first for its own collectives.
    #[cfg(feature = "mpi")]
    pub(super) offloads: bool,
}

impl NetEngine {
    /// With options for the memory that ranks of one host are to [share](NetEngine::share).
    pub(crate) fn sharing(group: Lanes, network: Network, sharing: Option<shm::Options>) -> NetEngine {
        let sources = Sources(vec![std::ptr::null(); group.world()]);
        let adaptation = Adaptation::new(network.adapt_percent());
        NetEngine {
            group,
            adaptation,
            network,
            local: None,
            sharing,
            steps: Steps::default(),
            scratch: Vec::new(),
            encoded: Vec::new(),
            sources,
            pipeline: Pipeline::default(),
            #[cfg(feature = "mpi")]
            offloads: false,
        }
    }

    /// The algorithm for a reduction of `bytes`.
    pub(crate) fn choose(&self, bytes: usize, r: &Reduction) -> Algorithm {
        let allowed = |a| self.network.any_order() || r.keeps_order(a);
        let mixed = self.local.as_ref().and_then(|local| local.choose(bytes, allowed));
        mixed.unwrap_or_else(|| self.network.choose(bytes, |a| r.keeps_order(a)))
    }

    /// Why [`choose`](NetEngine::choose) has chosen this algorithm, for a person.
    pub(crate) fn explain(&self, bytes: usize, r: &Reduction, algorithm: Algorithm) -> String {
        match (&self.local, algorithm) {
            (Some(local), Algorithm::Hierarchical) => {
                let (across, slice) = (&local.across, local.largest_slice(bytes));
                let (between, why) = (across.choose(slice, |_| true), across.explain(slice, |_| true));
                format!("ranks of a host share memory, and hosts exchange slices by {between}: {why}")
            }
            (Some(_), Algorithm::OneShot) => {
                "ranks of a host share memory, and hosts exchange all contributions, to keep their order"
                    .into()
            }
            _ => self.network.explain(bytes, |a| r.keeps_order(a)),
        }
    }

    /// The algorithm for a reduction of `bytes` to one rank.
    pub(crate) fn choose_rooted(&self, bytes: usize) -> Algorithm {
        self.network.choose_rooted(bytes)
    }

    /// The group of the ranks that are left.
    pub(crate) fn shrink(&mut self) -> Result<NetEngine, Error> {
        if let Some(local) = self.local.as_ref().and_then(|l| l.handle()) {
            local.abort("a rank shrinks the group");
        }
        let (group, ranks) = self.group.shrink()?;
        Ok(NetEngine::sharing(group, self.network.survivors(&ranks), self.sharing.clone()))
    }

    /// Forms groups of the ranks that give the same color, in the order of their keys.
    pub(crate) fn split(&mut self, color: Option<u32>, key: i32) -> Result<Option<NetEngine>, Failure> {
        let part = self.group.split(color, key).map_err(|failure| self.end_both(failure))?;
        let engine = |(group, ranks): (_, Vec<usize>)| {
            NetEngine::sharing(group, self.network.part(&ranks), self.sharing.clone())
        };
        Ok(part.map(engine))
    }

    /// Whether MPI's own collectives can be asked for.
    pub(crate) fn is_over_mpi(&self) -> bool {
        self.group.is_over_mpi()
    }

    /// Begins or ends to choose by what was set, of which links are no matter.
    pub(crate) fn force(&mut self, forced: Option<Algorithm>) {
        #[cfg(feature = "mpi")]
        self.ask_mpi(forced);
        let percent = if forced.is_some() { 0.0 } else { self.network.adapt_percent() };
        self.adaptation = Adaptation::new(percent);
    }

    pub(super) fn me(&self) -> Rank {
        Rank { rank: self.group.rank(), world: self.group.world() }
    }

    /// Runs `body` as the call `call`.
    #[inline]
    pub(crate) fn run(
        &mut self,
        call: Call,
        body: impl FnOnce(&mut NetEngine) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut done = self.begin(call).and_then(|()| body(self));
        if done.is_ok() && self.adaptation.is_due() {
            done = self.adapt();
        }
        done.map_err(|failure| self.end_both(failure))?;
        self.end_locally();
        self.group.end();
        Ok(())
    }

    #[inline]
    fn begin(&mut self, call: Call) -> Result<(), Failure> {
        self.group.begin(call)?;
        if self.local.is_some() { self.begin_locally(call) } else { Ok(()) }
    }

    /// As over TCP or MPI.
    pub(crate) fn send_recv(
        &mut self,
        dtype: DType,
        out: Option<Outgoing<'_>>,
        into: Option<Incoming<'_>>,
    ) -> Result<(), Failure> {
        self.group.send_recv(dtype, out, into).map_err(|failure| self.end_both(failure))
    }

    /// What carries the data, for a person.
    pub(crate) fn describe(&self) -> String {
        let local = self.local.as_ref().map(|local| local.describe()).unwrap_or_default();
        format!("{local}{}", self.group.describe())
    }

    /// The network, for a person.
    pub(crate) fn network(&self) -> NetworkInUse {
        self.network.in_use(self.group.transport(), self.adaptation.measured())
    }

    /// What other threads may do with the memory that ranks share.
    pub(crate) fn local_handle(&self) -> Option<shm::Handle> {
        self.local.as_ref().and_then(|local| local.handle())
    }

    /// Runs the steps that were made.
    pub(super) fn execute(
        &mut self,
        data: Buffers<'_>,
        reduction: Option<&Reduction>,
    ) -> Result<(), Failure> {
        self.execute_among(None, data, reduction)
    }

    /// Runs the steps that were made for these ranks, numbered from 0 in this order, or for all.
    pub(super) fn execute_among(
        &mut self,
        ranks: Option<&[usize]>,
        data: Buffers<'_>,
        reduction: Option<&Reduction>,
    ) -> Result<(), Failure> {
        let rank = |i: usize| ranks.map_or(i, |ranks| ranks[i]);
        let NetEngine { group, steps, scratch, sources, .. } = self;
        let words = steps.scratch().div_ceil(8);
        if scratch.len() < words {
            scratch.resize(words, 0);
        }
        let scratch = bytemuck::cast_slice_mut(scratch.as_mut_slice());
        let mut memory = Memory { input: data.input, output: data.output, scratch, calls: None };
        // A call may run several lists.
        let before = group.asked();
        for step in steps.list() {
            match *step {
                Step::Send { to, span } => group.send(rank(to), span, &mut memory)?,
                Step::Receive { from, span } => group.receive(rank(from), span),
                Step::Wait { received, sent } => {
                    group.wait(before.0 + received, before.1 + sent, &mut memory)?;
                }
                Step::Reduce { own, at, count, into, theirs, stride } => {
                    let reduction = reduction.expect("a schedule that reduces belongs to a call that does");
                    let theirs = |k| theirs + k * stride;
                    reduce(&mut memory, reduction, &mut sources.0[..count], at, own, into, theirs);
                }
                Step::Copy { from, into } => copy(&mut memory, from, into),
            }
        }
        group.finish(&mut memory)
    }

    /// Reduces every rank's input into every rank's output, or into `root`'s alone.
    pub(crate) fn all_reduce(
        &mut self,
        #[cfg_attr(not(feature = "mpi"), expect(unused_mut, reason = "MPI may be asked first"))]
        mut data: Buffers<'_>,
        r: &Reduction,
        algorithm: Algorithm,
        root: Option<usize>,
    ) -> Result<(), Failure> {
        #[cfg(feature = "mpi")]
        if self.all_reduce_by_mpi(&mut data, r, root)? {
            return Ok(());
        }
        if root.is_none() {
            self.note(data.len(), r, algorithm);
        }
        self.all_reduce_by(data, r, algorithm, root)
    }

    /// The same, of which no account is kept.
    pub(super) fn all_reduce_by(
        &mut self,
        data: Buffers<'_>,
        r: &Reduction,
        algorithm: Algorithm,
        root: Option<usize>,
    ) -> Result<(), Failure> {
        let mixed = matches!(algorithm, Algorithm::Inline | Algorithm::OneShot | Algorithm::Hierarchical);
        if mixed && self.local.is_some() && root.is_none() {
            return self.all_reduce_mixed(data, r, algorithm);
        }
        let mut steps = std::mem::take(&mut self.steps);
        let partial = self.all_reduce_steps(&mut steps, data.len() / r.size, r, algorithm, root);
        self.steps = steps;
        if !partial {
            return self.execute(data, Some(r));
        }
        r.alone(Buffers { input: data.input, output: &mut *data.output });
        self.execute(Buffers::in_place(&mut *data.output), Some(&r.partial()))?;
        r.finish(data.output, self.group.world());
        Ok(())
    }

    /// Makes the steps of a reduction of `len` elements; whether they add up sums of some ranks.
    pub(super) fn all_reduce_steps(
        &self,
        steps: &mut Steps,
        len: usize,
        r: &Reduction,
        algorithm: Algorithm,
        root: Option<usize>,
    ) -> bool {
        let me = self.me();
        match algorithm {
            // A small message travels in one segment with its header whatever it is called.
            Algorithm::Inline | Algorithm::OneShot => {
                direct::one_shot(steps, me, len, r.size, direct_piece(me.world), root);
            }
            Algorithm::TwoShot | Algorithm::Symmetric => {
                direct::two_shot(steps, me, len, r.size, direct_piece(me.world), root);
            }
            _ => {
                assert!(root.is_none(), "a reduction to one rank is a direct exchange");
                let hosts = self.network.hosts();
                schedule::all_reduce(steps, me.rank, hosts, algorithm, len, r.size, PIECE);
                return true;
            }
        }
        false
    }

    /// Reduces every rank's input into every rank's output, in fewer bits.
    pub(crate) fn all_reduce_encoded(
        &mut self,
        data: Buffers<'_>,
        encoded: &Encoded,
        algorithm: Algorithm,
    ) -> Result<(), Failure> {
        self.in_fewer_bits(encoded.bytes(data.len()), |engine, units| {
            encoded.codec.encode(data.input(), units);
            engine.all_reduce_by(Buffers::in_place(units), &encoded.reduction, algorithm, None)?;
            encoded.codec.decode(units, data.output);
            Ok(())
        })
    }

    /// Lends `bytes` for what elements become, aligned for any type.
    fn in_fewer_bits(
        &mut self,
        bytes: usize,
        body: impl FnOnce(&mut NetEngine, &mut [u8]) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        // Away while the engine runs.
        let mut words = std::mem::take(&mut self.encoded);
        words.resize(bytes.div_ceil(8).max(words.len()), 0);
        let done = body(self, &mut bytemuck::cast_slice_mut(&mut words)[..bytes]);
        self.encoded = words;
        done
    }

    /// Reduces every rank's `x` into every rank's, and finishes its rows.
    pub(crate) fn all_reduce_add_rms_norm(
        &mut self,
        x: &mut [u8],
        mut epilogue: Epilogue<'_>,
        algorithm: Algorithm,
    ) -> Result<(), Failure> {
        self.all_reduce(Buffers::in_place(x), &epilogue.sum(), algorithm, None)?;
        epilogue.finish_arrived(x, 0, x.len());
        Ok(())
    }

    /// `block(r)` are the bytes of `output` that rank `r`'s `input` becomes, on every rank or on `root` alone,
    /// whose `output` alone is looked at then. Without an input, the rank's block of its `output` is it: it is copied
    /// first, here and below, for what is sent must stay as it is while other bytes arrive beside it.
    pub(crate) fn all_gather(
        &mut self,
        input: Option<&[u8]>,
        output: &mut [u8],
        block: impl Fn(usize) -> Range<usize>,
        root: Option<usize>,
    ) -> Result<(), Failure> {
        if self.local.is_some() && root.is_none() {
            return self.all_gather_mixed(input, output, block);
        }
        let me = self.me();
        let input = input.map_or_else(|| Cow::Owned(output[block(me.rank)].to_vec()), Cow::Borrowed);
        #[cfg(feature = "mpi")]
        if root.is_none() && self.all_gather_by_mpi(&input, output, &block)? {
            return Ok(());
        }
        direct::all_gather(&mut self.steps, me, block, direct_piece(me.world), root);
        self.execute(Buffers { input: Some(&input), output }, None)
    }

    /// `block(r)` are the bytes of `root`'s `input` that become rank `r`'s `output`; no other `input` is looked
    /// at. Without an input, the root's `output` is it, of which nothing changes.
    pub(crate) fn scatter(
        &mut self,
        input: Option<&[u8]>,
        output: &mut [u8],
        block: impl Fn(usize) -> Range<usize>,
        root: usize,
    ) -> Result<(), Failure> {
        let me = self.me();
        let mut own = Vec::new();
        let (input, output) = match input {
            None if me.rank == root => {
                own.resize(block(root).len(), 0);
                (&*output, own.as_mut_slice())
            }
            input => (input.unwrap_or_default(), output),
        };
        direct::scatter(&mut self.steps, me, block, root);
        self.execute(Buffers { input: Some(input), output }, None)
    }

    /// As [`all_gather`](NetEngine::all_gather), in fewer bits: a rank's own block becomes what the others get of it.
    pub(crate) fn all_gather_encoded(
        &mut self,
        input: &[u8],
        output: &mut [u8],
        block: impl Fn(usize) -> Range<usize>,
        encoded: &Encoded,
    ) -> Result<(), Failure> {
        let Rank { rank: me, world } = self.me();
        let mut ends = Vec::with_capacity(world);
        for rank in 0..world {
            ends.push(ends.last().unwrap_or(&0) + encoded.bytes(block(rank).len()));
        }
        let coded = |rank: usize| rank.checked_sub(1).map_or(0, |before| ends[before])..ends[rank];
        self.in_fewer_bits(coded(world - 1).end, |engine, units| {
            encoded.codec.encode(input, &mut units[coded(me)]);
            engine.all_gather(None, units, coded, None)?;
            (0..world).for_each(|rank| encoded.codec.decode(&units[coded(rank)], &mut output[block(rank)]));
            Ok(())
        })
    }

    /// `sends(r)` are the bytes of `input` that go to rank `r`, `receives(r)` those of `output` that come from
    /// it. Without an input, `output` is it.
    pub(crate) fn all_to_all(
        &mut self,
        input: Option<&[u8]>,
        output: &mut [u8],
        sends: impl Fn(usize) -> Range<usize>,
        receives: impl Fn(usize) -> Range<usize>,
        _longest: usize,
    ) -> Result<(), Failure> {
        let me = self.me();
        let input = input.map_or_else(|| Cow::Owned(output.to_vec()), Cow::Borrowed);
        if self.local.is_some() {
            return self.all_to_all_mixed(&input, output, sends, receives);
        }
        #[cfg(feature = "mpi")]
        if self.all_to_all_by_mpi(&input, output)? {
            return Ok(());
        }
        direct::all_to_all(&mut self.steps, me, |_| true, sends, receives);
        self.execute(Buffers { input: Some(&input), output }, None)
    }

    /// Tells each rank how many bytes this one sends to it, and checks what this one expects against what the
    /// others send. Returns the most that this rank sends or receives.
    pub(crate) fn agree_on_counts(&mut self, sends: &[u64], expects: &[u64]) -> Result<u64, Failure> {
        let me = self.me();
        let mut sent = vec![0u64; sends.len()];
        let word = |r: usize| r * 8..(r + 1) * 8;
        direct::all_to_all(&mut self.steps, me, |_| true, word, word);
        let (input, output) = (bytemuck::cast_slice(sends), bytemuck::cast_slice_mut(&mut sent));
        self.execute(Buffers { input: Some(input), output }, None)?;
        if let Some(who) = (0..me.world).find(|who| sent[*who] != expects[*who]) {
            let (rank, sent, expected) = (me.rank, sent[who], expects[who]);
            let what = format!("rank {who} sends {sent} bytes to rank {rank}, which expects {expected}");
            return Err(self.group.fail(Error::InvalidArgument(what), &Memory::none()));
        }
        Ok(sends.iter().chain(expects).copied().max().unwrap_or(0))
    }

    /// Block `block(r)` of the input is reduced into rank `r`'s `output`; without an input, of `output` into the rank's
    /// block of it.
    pub(crate) fn reduce_scatter(
        &mut self,
        input: Option<&[u8]>,
        output: &mut [u8],
        block: impl Fn(usize) -> Range<usize>,
        r: &Reduction,
    ) -> Result<(), Failure> {
        let me = self.me();
        let own = block(me.rank);
        if self.reduces_by_host(r) {
            return self.reduce_scatter_by_host(input, output, block, r);
        }
        // In words, so that it is aligned for any type.
        let mut words = Vec::new();
        let (input, output) = match input {
            Some(input) => (input, output),
            None => {
                words.resize(output.len().div_ceil(8), 0u64);
                let input = &mut bytemuck::cast_slice_mut(&mut words)[..output.len()];
                input.copy_from_slice(output);
                (&*input, &mut output[own])
            }
        };
        #[cfg(feature = "mpi")]
        if self.reduce_scatter_by_mpi(input, output, &block, r)? {
            return Ok(());
        }
        direct::reduce_scatter(&mut self.steps, me, block, r.dtype.size(), direct_piece(me.world));
        self.execute(Buffers { input: Some(input), output }, Some(r))
    }

    /// Copies `root`'s input, or without one its `output`, into every rank's `output`.
    pub(crate) fn broadcast(
        &mut self,
        input: Option<&[u8]>,
        output: &mut [u8],
        root: usize,
    ) -> Result<(), Failure> {
        let me = self.me();
        if let (Some(input), true) = (input, me.rank == root) {
            output.copy_from_slice(input);
        }
        if self.local.is_some() {
            return self.broadcast_mixed(output, root);
        }
        #[cfg(feature = "mpi")]
        if self.broadcast_by_mpi(output, root)? {
            return Ok(());
        }
        // Between two ranks nothing is passed on.
        let piece = if me.world == 2 { output.len().max(1) } else { BROADCAST_PIECE };
        tree::broadcast(&mut self.steps, me, output.len(), piece, root);
        self.execute(Buffers::in_place(output), None)
    }

    pub(crate) fn barrier(&mut self) -> Result<(), Failure> {
        if self.local.is_some() {
            return self.barrier_mixed();
        }
        #[cfg(feature = "mpi")]
        if self.barrier_by_mpi()? {
            return Ok(());
        }
        let me = self.me();
        if me.world <= DIRECT_BARRIER {
            direct::barrier(&mut self.steps, me);
        } else {
            tree::barrier(&mut self.steps, me);
        }
        self.execute(Buffers::in_place(&mut []), None)
    }
}

/// Reduces as many contributions as there are `sources`, number `at` from `own`, number `k` of the others from byte
/// `theirs(k)` of the scratch memory on, into `into`.
pub(super) fn reduce(
    memory: &mut Memory<'_>,
    r: &Reduction,
    sources: &mut [*const u8],
    at: usize,
    own: Span,
    into: Span,
    theirs: impl Fn(usize) -> usize,
) {
    let len = into.len();
    assert_eq!(own.len(), len);
    // Everything is cut to its length here, which checks that it is there. A result in scratch memory lies behind all
    // that is received there; one in the output is this rank's contribution, or apart from it.
    let is_output = |place| place == Place::Output || (place == Place::Input && memory.input.is_none());
    let in_place = is_output(own.place) && is_output(into.place) && own.start == into.start;
    assert!(in_place || !(is_output(own.place) && is_output(into.place)));
    assert!(own.place != Place::Scratch);
    let others = || (0..sources.len()).filter(|k| *k != at).map(|k| theirs(k)..theirs(k) + len);
    assert!(others().all(|r| r.end <= memory.scratch.len()));
    assert!(into.place != Place::Scratch || others().all(|r| r.end <= into.start || into.end <= r.start));
    let dst = memory.write(into).as_mut_ptr();
    let own = if in_place { dst.cast_const() } else { memory.read(own).as_ptr() };
    let scratch = memory.scratch.as_ptr();
    for (k, source) in sources.iter_mut().enumerate() {
        *source = if k == at { own } else { scratch.wrapping_add(theirs(k)) };
    }
    // SAFETY: each source has `len` bytes, as checked above; `dst` is this rank's source or overlaps none.
    unsafe { r.run(dst, sources, len) }
}

pub(super) fn copy(memory: &mut Memory<'_>, from: Span, into: Span) {
    match (memory.input, from.place) {
        (Some(input), Place::Input) => memory.write(into).copy_from_slice(&input[from.start..from.end]),
        _ => unreachable!("a schedule copies from an input that is no output"),
    }
}
