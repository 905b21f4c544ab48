//! Runs the schedules of collectives over the connections of a [`TcpGroup`].

use std::borrow::Cow;
use std::ops::Range;

use tensorwire_core::{Call, Error};
use tensorwire_transports::shm::Failure;
use tensorwire_transports::tcp::{Memory, Place, Span, TcpGroup};

use super::{Buffers, Epilogue, Reduction, Sources};
use crate::schedule::steps::{Rank, Step, Steps};
use crate::schedule::{direct, tree};
use crate::select::Algorithm;

/// Bytes that are sent, or reduced, while the next are on their way. From each peer two pieces may be held.
const PIECE: usize = 128 << 10;

/// Bytes that are passed on in a broadcast, while the next are on their way.
const BROADCAST_PIECE: usize = 256 << 10;

/// Ranks up to which a barrier tells everybody: beyond, it takes more than one step, of few messages each.
const DIRECT_BARRIER: usize = 16;

/// Bytes that a rank sends in a one-shot all-reduce, beyond which a second step costs less.
const ONE_SHOT_BYTES: usize = 64 << 10;

/// A group's engine over TCP. Its collectives are those of the engine over shared memory.
#[derive(Debug)]
pub(crate) struct NetEngine {
    pub(crate) group: TcpGroup,
    steps: Steps,
    /// Scratch memory, in words, so that it is aligned for any type.
    scratch: Vec<u64>,
    sources: Sources,
}

impl NetEngine {
    pub(crate) fn new(group: TcpGroup) -> NetEngine {
        let sources = Sources(vec![std::ptr::null(); group.world()]);
        NetEngine { group, steps: Steps::default(), scratch: Vec::new(), sources }
    }

    /// The algorithm for an all-reduce of `bytes`.
    pub(crate) fn choose(&self, bytes: usize) -> Algorithm {
        let peers = self.group.world() - 1;
        if bytes.saturating_mul(peers) <= ONE_SHOT_BYTES { Algorithm::OneShot } else { Algorithm::TwoShot }
    }

    fn me(&self) -> Rank {
        Rank { rank: self.group.rank(), world: self.group.world() }
    }

    /// Runs `body` as the call `call`.
    #[inline]
    pub(crate) fn run(
        &mut self,
        call: Call,
        body: impl FnOnce(&mut NetEngine) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        self.group.begin(call)?;
        body(self)?;
        self.group.end();
        Ok(())
    }

    /// Runs the steps that were made.
    fn execute(&mut self, data: Buffers<'_>, reduction: Option<&Reduction>) -> Result<(), Failure> {
        let NetEngine { group, steps, scratch, sources } = self;
        let words = steps.scratch().div_ceil(8);
        if scratch.len() < words {
            scratch.resize(words, 0);
        }
        let scratch = bytemuck::cast_slice_mut(scratch.as_mut_slice());
        let mut memory = Memory { input: data.input, output: data.output, scratch };
        for step in steps.list() {
            match *step {
                Step::Send { to, span } => group.send(to, span, &mut memory)?,
                Step::Receive { from, span } => group.receive(from, span),
                Step::Wait { received, sent } => group.wait(received, sent, &mut memory)?,
                Step::Reduce { own, into, theirs, stride } => {
                    let reduction = reduction.expect("a schedule that reduces belongs to a call that does");
                    reduce(&mut memory, reduction, sources, group.rank(), own, into, |r| theirs + r * stride);
                }
                Step::Copy { from, into } => copy(&mut memory, from, into),
            }
        }
        group.finish(&mut memory)
    }

    /// Reduces every rank's input into every rank's output, or into `root`'s alone.
    pub(crate) fn all_reduce(
        &mut self,
        data: Buffers<'_>,
        r: &Reduction,
        algorithm: Algorithm,
        root: Option<usize>,
    ) -> Result<(), Failure> {
        let (me, size) = (self.me(), r.dtype.size());
        let len = data.len() / size;
        match algorithm {
            // A small message travels in one segment with its header whatever it is called.
            Algorithm::Inline | Algorithm::OneShot => {
                direct::one_shot(&mut self.steps, me, len, size, PIECE, root)
            }
            Algorithm::TwoShot | Algorithm::Symmetric => {
                direct::two_shot(&mut self.steps, me, len, size, PIECE, root)
            }
        }
        self.execute(data, Some(r))
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
        let me = self.me();
        let input = input.map_or_else(|| Cow::Owned(output[block(me.rank)].to_vec()), Cow::Borrowed);
        direct::all_gather(&mut self.steps, me, block, root);
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
        direct::all_to_all(&mut self.steps, me, sends, receives);
        self.execute(Buffers { input: Some(&input), output }, None)
    }

    /// Tells each rank how many bytes this one sends to it, and checks what this one expects against what the
    /// others send. Returns the most that this rank sends or receives.
    pub(crate) fn agree_on_counts(&mut self, sends: &[u64], expects: &[u64]) -> Result<u64, Failure> {
        let me = self.me();
        let mut sent = vec![0u64; sends.len()];
        let word = |r: usize| r * 8..(r + 1) * 8;
        direct::all_to_all(&mut self.steps, me, word, word);
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
        direct::reduce_scatter(&mut self.steps, me, block, r.dtype.size(), PIECE);
        match input {
            Some(_) => self.execute(Buffers { input, output }, Some(r)),
            None => {
                // In words, so that it is aligned for any type.
                let mut words = vec![0u64; output.len().div_ceil(8)];
                let input = &mut bytemuck::cast_slice_mut(&mut words)[..output.len()];
                input.copy_from_slice(output);
                self.execute(Buffers { input: Some(input), output: &mut output[own] }, Some(r))
            }
        }
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
        tree::broadcast(&mut self.steps, me, output.len(), BROADCAST_PIECE, root);
        self.execute(Buffers::in_place(output), None)
    }

    pub(crate) fn barrier(&mut self) -> Result<(), Failure> {
        let me = self.me();
        if me.world <= DIRECT_BARRIER {
            direct::barrier(&mut self.steps, me);
        } else {
            tree::barrier(&mut self.steps, me);
        }
        self.execute(Buffers::in_place(&mut []), None)
    }
}

/// Reduces this rank's bytes from `own` on, and rank `r`'s from byte `theirs(r)` of the scratch memory on, into `into`.
fn reduce(
    memory: &mut Memory<'_>,
    r: &Reduction,
    sources: &mut Sources,
    rank: usize,
    own: usize,
    into: Span,
    theirs: impl Fn(usize) -> usize,
) {
    let len = into.len();
    let contribution = Span::new(Place::Input, own..own + len);
    // Everything is cut to its length here, which checks that it is there. A result in scratch memory lies behind all
    // that is received there; one in the output is this rank's contribution, or apart from it.
    let in_place = memory.input.is_none() && into == Span { place: Place::Output, ..contribution };
    let ranges = |r: usize| theirs(r)..theirs(r) + len;
    assert!(in_place || memory.input.is_some() || into.place == Place::Scratch);
    assert!(
        into.place != Place::Scratch
            || (0..sources.0.len())
                .all(|r| r == rank || ranges(r).end <= into.start || into.end <= ranges(r).start)
    );
    let dst = memory.write(into).as_mut_ptr();
    let own = if in_place { dst.cast_const() } else { memory.read(contribution).as_ptr() };
    let scratch = memory.scratch.as_ptr();
    assert!((0..sources.0.len()).all(|r| r == rank || ranges(r).end <= memory.scratch.len()));
    for (who, source) in sources.0.iter_mut().enumerate() {
        *source = if who == rank { own } else { scratch.wrapping_add(theirs(who)) };
    }
    // SAFETY: each source has `len` bytes, as checked above; `dst` is this rank's source or overlaps none.
    unsafe { r.run(dst, sources, len) }
}

fn copy(memory: &mut Memory<'_>, from: Span, into: Span) {
    match (memory.input, from.place) {
        (Some(input), Place::Input) => memory.write(into).copy_from_slice(&input[from.start..from.end]),
        _ => unreachable!("a schedule copies from an input that is no output"),
    }
}
