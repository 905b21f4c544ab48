//! A collective with its buffers: called on values whose result is known, or over and over.

use std::ops::{Deref, DerefMut, Range};

use tensorwire::collectives::reduce::Kernels;
use tensorwire::{Communicator, DType, Element, Error, ReduceOp, Symmetric, Wire};

use super::Buffer;
use super::collective::{Collective, Lengths};

/// Elements whose right value is worked out at once.
const CHUNK: usize = 4096;

const PAGE: usize = 4096;

pub(crate) struct Case<'a, T> {
    comm: &'a Communicator,
    collective: Collective,
    reduce: ReduceOp,
    /// In how few bits the elements are sent.
    wire: Option<Wire>,
    /// Whether the root of a broadcast goes round, and which rank is next.
    roots_in_turn: bool,
    root: usize,
    input: Input<T>,
    /// Empty for a collective in place.
    output: Aligned<T>,
}

enum Input<T> {
    User(Aligned<T>),
    Symmetric(Symmetric<T>),
}

/// Ordinary memory from the start of a page on, as the programs that others are measured with have it.
struct Aligned<T> {
    room: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Element> Aligned<T> {
    /// `len` zeros.
    fn new(len: usize) -> Aligned<T> {
        let room = vec![T::zeroed(); len + PAGE / size_of::<T>()];
        let start = room.as_ptr().align_offset(PAGE);
        Aligned { room, start, len }
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.room[self.start..self.start + self.len]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.room[self.start..self.start + self.len]
    }
}

impl<T: Element> Deref for Input<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        match self {
            Input::User(x) => x,
            Input::Symmetric(x) => x,
        }
    }
}

impl<T: Element> DerefMut for Input<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        match self {
            Input::User(x) => x,
            Input::Symmetric(x) => x,
        }
    }
}

impl<'a, T: Element> Case<'a, T> {
    /// Buffers of zeros for `bytes`, which make whole blocks.
    pub(crate) fn new(
        comm: &'a Communicator,
        collective: Collective,
        reduce: ReduceOp,
        buffer: Buffer,
        bytes: usize,
    ) -> tensorwire::Result<Case<'a, T>> {
        let count = bytes / size_of::<T>();
        let lengths = collective.lengths(count, comm.rank(), comm.world());
        let Lengths { input, output } = lengths
            .ok_or_else(|| Error::InvalidArgument(format!("{bytes} bytes are more than memory holds")))?;
        let input = match buffer {
            Buffer::User => Input::User(Aligned::new(input)),
            Buffer::Symmetric => Input::Symmetric(comm.symmetric(input)?),
        };
        let output = Aligned::new(output);
        Ok(Case { comm, collective, reduce, wire: None, roots_in_turn: false, root: 0, input, output })
    }

    /// An all-reduce that sends its elements in fewer bits.
    pub(super) fn sent_as(self, wire: Option<Wire>) -> Case<'a, T> {
        Case { wire, ..self }
    }

    /// A broadcast from each rank in turn, so that each call waits for the one before it, as a root that stays does not:
    /// it writes ahead of the others as far as there is room.
    pub(crate) fn with_roots_in_turn(self) -> Case<'a, T> {
        Case { roots_in_turn: true, ..self }
    }

    /// Calls over `comm` from now on, which has the same ranks; not for symmetric buffers.
    pub(crate) fn over(&mut self, comm: &'a Communicator) {
        self.comm = comm;
    }

    #[inline]
    pub(super) fn call(&mut self) -> tensorwire::Result<()> {
        let (comm, output) = (self.comm, &mut self.output[..]);
        match (self.collective, &mut self.input) {
            (Collective::AllReduce, Input::User(x)) => match self.wire {
                None => comm.all_reduce(x, self.reduce),
                Some(wire) => comm.all_reduce_wire(x, self.reduce, wire),
            },
            (Collective::AllReduce, Input::Symmetric(x)) => comm.all_reduce_symmetric(x, self.reduce),
            (Collective::AllGather, x) => comm.all_gather(x, output),
            (Collective::ReduceScatter, x) => comm.reduce_scatter(x, output, self.reduce),
            (Collective::Broadcast, x) => {
                let root = self.root;
                if self.roots_in_turn {
                    self.root = (root + 1) % comm.world();
                }
                comm.broadcast(x, root)
            }
            (Collective::Reduce, x) => comm.reduce(x, self.reduce, 0),
            (Collective::Gather, x) => comm.gather(x, output, 0),
            (Collective::Scatter, x) => comm.scatter(x, output, 0),
            (Collective::AllToAll, x) => comm.all_to_all(x, output),
            (Collective::SendRecv, x) => comm.send_recv(x, next(comm), output, previous(comm)),
            (Collective::Barrier, _) => comm.barrier(),
        }
    }

    /// Overwrites the input, as whatever computes it would.
    #[inline]
    pub(super) fn touch(&mut self) {
        self.input.fill(T::zeroed());
    }

    /// Calls on values that tell ranks and elements apart, and compares with the definition: the first
    /// element that is wrong, if any. Leaves zeros.
    ///
    /// `round` makes other values, so that nothing left from an earlier call can pass for right.
    pub(crate) fn first_wrong(&mut self, round: u64) -> tensorwire::Result<Option<usize>> {
        let rank = self.comm.rank();
        for (i, x) in self.input.iter_mut().enumerate() {
            *x = sample(round, rank, i);
        }
        self.call()?;
        let result = if self.output.is_empty() { &self.input[..] } else { &self.output[..] };
        // Scatter's and gather's result is nothing on some ranks.
        let len = match self.collective {
            Collective::Gather if rank != 0 => 0,
            _ => result.len(),
        };
        let (mut wrong, slack) = (None, self.slack()?);
        for start in (0..len).step_by(CHUNK) {
            let at = start..len.min(start + CHUNK);
            let right = self.right(round, at.clone());
            let same = |(a, b): (&T, &T)| bytemuck::bytes_of(a) == bytemuck::bytes_of(b);
            let near = |(a, b): (&T, &T)| (float(a) - float(b)).abs() <= slack * float(b).abs();
            let fits = |pair| same(pair) || (slack > 0.0 && near(pair));
            if let Some(i) = result[at].iter().zip(&right).position(|pair| !fits(pair)) {
                wrong = Some(start + i);
                break;
            }
        }
        if slack > 0.0 {
            // Whatever it is, all ranks must have the same.
            let mine = digest(bytemuck::cast_slice(result));
            let mut all = vec![0; self.comm.world()];
            self.comm.all_gather(&[mine], &mut all)?;
            wrong = wrong.or(all.iter().any(|other| *other != mine).then_some(0));
        }
        self.input.fill(T::zeroed());
        self.output.fill(T::zeroed());
        Ok(wrong)
    }

    /// How far a result may be from the reduction in rank order, as a part of it: 0 where it must be the same bits.
    /// Samples are from 1 up to 2.
    fn slack(&self) -> tensorwire::Result<f64> {
        let user = matches!(self.input, Input::User(_));
        if self.collective != Collective::AllReduce || !user || self.comm.world() == 1 {
            return Ok(0.0);
        }
        // Half a unit in the last place, of what is rounded once on each rank, and once in what it is compared with.
        let unit = match T::DTYPE {
            DType::F64 => 53,
            DType::F32 => 24,
            DType::F16 => 11,
            DType::BF16 => 8,
            DType::F8E4M3 => 4,
            DType::F8E5M2 => 3,
            _ => return Ok(0.0),
        };
        let rounding = (self.comm.world() + 1) as f64 * 0.5f64.powi(unit);
        match self.wire {
            // Of the contributions and of the sum, as `Wire` says.
            Some(Wire::Bf16) => Ok(2.0 * 0.5f64.powi(8) + rounding),
            Some(Wire::Q8) => Ok(2.0 * 2.0 / 252.0 * 1.01 + rounding),
            None => {
                let algorithm = self.comm.algorithm_for(size_of_val(&*self.input), T::DTYPE, self.reduce)?;
                Ok(if algorithm.keeps_order(T::DTYPE, self.reduce) { 0.0 } else { rounding })
            }
        }
    }

    /// What elements `at` of this rank's result must be.
    fn right(&self, round: u64, at: Range<usize>) -> Vec<T> {
        let rank = self.comm.rank();
        // Element `i` is a rank's element of a number.
        let samples = |origin: &dyn Fn(usize) -> (usize, usize)| {
            let element = |i| {
                let (rank, index) = origin(i);
                sample(round, rank, index)
            };
            at.clone().map(element).collect()
        };
        // Where this rank's block of a whole begins.
        let mine = rank * self.output.len();
        let block = self.input.len();
        let share = block / self.comm.world();
        match self.collective {
            Collective::AllReduce => self.reduced(round, at),
            Collective::Reduce if rank == 0 => self.reduced(round, at),
            Collective::Reduce => samples(&|i| (rank, i)),
            Collective::ReduceScatter => self.reduced(round, mine + at.start..mine + at.end),
            Collective::AllGather | Collective::Gather => samples(&|i| (i / block, i % block)),
            Collective::Broadcast => samples(&|i| (0, i)),
            Collective::Scatter => samples(&|i| (0, mine + i)),
            Collective::AllToAll => samples(&|i| (i / share, rank * share + i % share)),
            Collective::SendRecv => samples(&|i| (previous(self.comm), i)),
            Collective::Barrier => Vec::new(),
        }
    }

    /// The reduction of all ranks' elements `at`, by the portable kernel.
    fn reduced(&self, round: u64, at: Range<usize>) -> Vec<T> {
        let values: Vec<Vec<T>> =
            (0..self.comm.world()).map(|rank| at.clone().map(|i| sample(round, rank, i)).collect()).collect();
        let sources: Vec<*const u8> = values.iter().map(|v| v.as_ptr().cast()).collect();
        let mut out = vec![T::zeroed(); at.len()];
        let portable = Kernels::available().first().and_then(|k| k.get(T::DTYPE, self.reduce));
        if let Some(kernel) = portable {
            let factor = self.reduce.factor();
            // SAFETY: (1) there are as many sources as said, and each has `at.len()` elements of `T`; (2) so
            // has the destination, which is a buffer of its own; (3) the portable kernels run anywhere.
            unsafe { kernel(out.as_mut_ptr().cast(), sources.as_ptr(), sources.len(), at.len(), factor) };
        }
        out
    }
}

/// An element's value; 0 of integers, which are compared by their bits.
pub(super) fn float<T: Element>(x: &T) -> f64 {
    let bytes = bytemuck::bytes_of(x);
    match T::DTYPE {
        DType::F64 => bytemuck::pod_read_unaligned(bytes),
        DType::F32 => bytemuck::pod_read_unaligned::<f32>(bytes).into(),
        DType::F16 => bytemuck::pod_read_unaligned::<half::f16>(bytes).into(),
        DType::BF16 => bytemuck::pod_read_unaligned::<half::bf16>(bytes).into(),
        DType::F8E4M3 => bytemuck::pod_read_unaligned::<float8::F8E4M3>(bytes).to_f64(),
        DType::F8E5M2 => bytemuck::pod_read_unaligned::<float8::F8E5M2>(bytes).to_f64(),
        _ => 0.0,
    }
}

/// A number that differs where bytes do, but for a small chance.
fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// The rank that this one sends to.
pub(super) fn next(comm: &Communicator) -> usize {
    (comm.rank() + 1) % comm.world()
}

/// The rank that this one receives from.
pub(super) fn previous(comm: &Communicator) -> usize {
    (comm.rank() + comm.world() - 1) % comm.world()
}

/// Rank `rank`'s element `i`: an integer, or a number from 1 up to 2.
pub(super) fn sample<T: Element>(round: u64, rank: usize, i: usize) -> T {
    let h = (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)
        ^ (rank as u64 + 1).wrapping_mul(0x85EB_CA6B)
        ^ round.wrapping_mul(0xC2B2_AE3D_27D4_EB4F);
    let h = (h ^ (h >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 11;
    // The exponent of 1 in the type's own format, and random mantissa bits.
    let bits = match T::DTYPE {
        DType::F64 => 0x3ff0_0000_0000_0000 | h & 0x000f_ffff_ffff_ffff,
        DType::F32 => 0x3f80_0000 | h & 0x007f_ffff,
        DType::F16 => 0x3c00 | h & 0x03ff,
        DType::BF16 => 0x3f80 | h & 0x007f,
        DType::F8E4M3 => 0x38 | h & 0x07,
        DType::F8E5M2 => 0x3c | h & 0x03,
        _ => h,
    };
    bytemuck::pod_read_unaligned(&bits.to_le_bytes()[..size_of::<T>()])
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    fn check(collective: Collective, world: usize, spoil: bool) -> Vec<Option<usize>> {
        let bytes = collective.whole_blocks(40_000, 4, world).unwrap();
        std::thread::scope(|s| {
            let comms = Communicator::in_process(world).unwrap();
            let started: Vec<_> = comms
                .into_iter()
                .map(|comm| {
                    s.spawn(move || {
                        let mut case =
                            Case::<f32>::new(&comm, collective, ReduceOp::Sum, Buffer::User, bytes).unwrap();
                        // A rank that works on another round's values makes the others' results wrong.
                        let round = if spoil && comm.rank() == 0 { 7 } else { 1 };
                        let wrong = case.first_wrong(round).unwrap();
                        assert!(case.input.iter().chain(&*case.output).all(|x| *x == 0.0));
                        wrong
                    })
                })
                .collect();
            started.into_iter().map(|t| t.join().unwrap()).collect()
        })
    }

    #[test]
    fn right_results_pass_and_wrong_ones_do_not() {
        for collective in Collective::value_variants().iter().copied() {
            for world in [2, 3] {
                assert_eq!(check(collective, world, false), vec![None; world], "{collective}");
                let spoiled = check(collective, world, true).iter().any(Option::is_some);
                assert_eq!(
                    spoiled,
                    collective != Collective::Barrier,
                    "{collective}: rank 0 had other values"
                );
            }
        }
    }

    #[test]
    fn samples_are_ordinary_numbers() {
        for i in 0..1000 {
            assert!((1.0..2.0).contains(&sample::<f32>(0, 1, i)));
            assert!((1.0..2.0).contains(&sample::<half::f16>(1, 2, i).to_f32()));
            assert!((1.0..2.0).contains(&sample::<float8::F8E4M3>(1, 3, i).to_f32()));
            assert!((1.0..2.0).contains(&sample::<f64>(2, 4, i)));
        }
        let differ = |a: u64, b: u64| (0..100).any(|i| sample::<u8>(a, 0, i) != sample::<u8>(b, 0, i));
        assert!(differ(1, 2) && sample::<u64>(1, 0, 5) != sample::<u64>(1, 1, 5));
    }
}
