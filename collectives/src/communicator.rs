//! The public face: checks arguments, names mistakes, and keeps a failed group from being used again.

use std::sync::{Mutex, TryLockError};

use tensorwire_core::{Call, Deadline, Element, Error, Op, ReduceOp, Result};
use tensorwire_transports::launch::{Env, Rendezvous};
use tensorwire_transports::shm::{self, Failure, Group, Options};
use tensorwire_transports::store::{Store, UnixStore};

use crate::engine::{Engine, Reduction};
use crate::select::Algorithm;

/// One rank's membership in a group of `world` ranks, and the collectives between them.
///
/// Every rank of the group makes the same calls, with the same counts, types and roots, in the same order; a
/// rank that doesn't gets, like all others, [`Error::Mismatch`] with both calls. A call returns when this
/// rank's buffers are done. If a peer dies or leaves, or doesn't come within the timeout, every rank gets an
/// error that names it, and the communicator can't be used further.
///
/// Results are the same bits on every rank and in every run: element `i` is reduced in rank order.
///
/// One call at a time: a second thread that calls meanwhile gets [`Error::ConcurrentUse`].
///
/// ```
/// use tensorwire_collectives::Communicator;
/// use tensorwire_core::ReduceOp;
///
/// // Ranks are usually processes (`Communicator::from_env`); for a test they can be threads.
/// std::thread::scope(|s| {
///     for comm in Communicator::in_process(3)? {
///         s.spawn(move || {
///             let mut x = [comm.rank() as f32, 1.0];
///             comm.all_reduce(&mut x, ReduceOp::Sum).unwrap();
///             assert_eq!(x, [3.0, 3.0]);
///         });
///     }
///     Ok::<(), tensorwire_core::Error>(())
/// })?;
/// # Ok::<(), tensorwire_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Communicator {
    rank: usize,
    world: usize,
    state: Mutex<State>,
    /// Rank 0 of a job without a launcher serves its store for as long as the communicator lives.
    _store: Option<UnixStore>,
}

#[derive(Debug)]
struct State {
    engine: Engine,
    algorithm: Option<Algorithm>,
    /// The error that ended the group.
    cause: Option<String>,
}

impl Communicator {
    /// The group that this process was started into: by `tensorwire launch`, torchrun, mpirun, or srun, from
    /// the variables they set. Waits for all ranks.
    ///
    /// # Errors
    /// [`Error::Config`] if the variables are missing or make no sense; [`Error::Rendezvous`] if the other
    /// ranks don't come.
    pub fn from_env() -> Result<Communicator> {
        let options = Options::from_env()?;
        let env = Env::read()?;
        let deadline = Deadline::after(options.timeout);
        let store = match &env.rendezvous {
            Rendezvous::Store(address) => UnixStore::connect(address, deadline)?,
            Rendezvous::Job(job) => UnixStore::of_job(job, env.rank, deadline)?,
        };
        let mut comm = Communicator::join(env.rank, env.world, &store, &options)?;
        comm._store = Some(store);
        Ok(comm)
    }

    /// The group of `world` processes on this host that meet in `store`, as `rank`. Waits for all ranks.
    ///
    /// # Errors
    /// [`Error::Config`] for a rank outside the world; [`Error::Rendezvous`] if the other ranks don't come.
    pub fn join(rank: usize, world: usize, store: &dyn Store, options: &Options) -> Result<Communicator> {
        Ok(Communicator::over(shm::join(rank, world, store, options)?))
    }

    /// A group whose ranks are threads of this process; rank `i` is element `i`.
    ///
    /// # Errors
    /// [`Error::Config`] for a world of 0 or beyond what one host holds.
    pub fn in_process(world: usize) -> Result<Vec<Communicator>> {
        Communicator::in_process_with(world, &Options::default())
    }

    /// As [`in_process`](Communicator::in_process), with options.
    ///
    /// # Errors
    /// As for [`in_process`](Communicator::in_process), and for options that can't be had.
    pub fn in_process_with(world: usize, options: &Options) -> Result<Vec<Communicator>> {
        Ok(shm::in_process(world, options)?.into_iter().map(Communicator::over).collect())
    }

    fn over(group: Group) -> Communicator {
        let (rank, world) = (group.rank(), group.world());
        let state = State { engine: Engine::new(group), algorithm: None, cause: None };
        Communicator { rank, world, state: Mutex::new(state), _store: None }
    }

    /// This rank, from 0.
    #[inline]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    #[inline]
    pub fn world(&self) -> usize {
        self.world
    }

    /// Makes every all-reduce use one algorithm, for measuring, or the automatic choice again. Every rank must
    /// set the same. It changes speed, never results.
    ///
    /// # Errors
    /// [`Error::ConcurrentUse`].
    pub fn set_algorithm(&self, algorithm: Option<Algorithm>) -> Result<()> {
        let rank = self.rank;
        let mut state = self.state.try_lock().map_err(|_| Error::ConcurrentUse { rank })?;
        state.algorithm = algorithm;
        Ok(())
    }

    /// The algorithm that an all-reduce of `bytes` takes.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the one set by [`set_algorithm`](Communicator::set_algorithm) can't carry
    /// that many; [`Error::ConcurrentUse`].
    pub fn algorithm(&self, bytes: usize) -> Result<Algorithm> {
        let rank = self.rank;
        let state = self.state.try_lock().map_err(|_| Error::ConcurrentUse { rank })?;
        state.choose(bytes, self.world)
    }

    /// Reduces every rank's `buf`, element by element, and leaves the result in it on every rank.
    ///
    /// # Errors
    /// See [`Communicator`].
    #[inline]
    pub fn all_reduce<T: Element>(&self, buf: &mut [T], op: ReduceOp) -> Result<()> {
        let call = Call { reduce: Some(op), ..self.call::<T>(Op::AllReduce, buf.len()) };
        let bytes = bytemuck::cast_slice_mut::<T, u8>(buf);
        let reduction = Reduction::new(T::DTYPE, op).map_err(|e| *e)?;
        if self.world == 1 {
            reduction.alone(bytes);
        }
        self.run(|state| {
            let algorithm = state.choose(bytes.len(), self.world)?;
            state.engine.run(call, |engine| engine.all_reduce(bytes, &reduction, algorithm))
        })
    }

    /// Concatenates every rank's `input`, in rank order, into `output` on every rank: `output` has
    /// `world * input.len()` elements.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the lengths don't fit; else see [`Communicator`].
    pub fn all_gather<T: Element>(&self, input: &[T], output: &mut [T]) -> Result<()> {
        let block = input.len();
        self.expect("all_gather: output", "world x input", block.checked_mul(self.world), output.len())?;
        let call = self.call::<T>(Op::AllGather, output.len());
        if self.world == 1 {
            output.copy_from_slice(input);
        }
        let (input, output) = (bytemuck::cast_slice(input), bytemuck::cast_slice_mut(output));
        let block = input.len();
        self.run(|state| {
            state.engine.run(call, |engine| engine.all_gather(input, output, |r| r * block..(r + 1) * block))
        })
    }

    /// Concatenates every rank's `input`, in rank order, into `output` on every rank, where rank `r`
    /// contributes `counts[r]` elements. Every rank gives the same `counts`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the lengths don't fit; else see [`Communicator`].
    pub fn all_gather_v<T: Element>(&self, input: &[T], output: &mut [T], counts: &[usize]) -> Result<()> {
        self.expect("all_gather_v: counts", "one a rank", Some(self.world), counts.len())?;
        self.expect("all_gather_v: input", "counts[rank]", Some(counts[self.rank]), input.len())?;
        let total = counts.iter().try_fold(0usize, |sum, c| sum.checked_add(*c));
        self.expect("all_gather_v: output", "the sum of counts", total, output.len())?;
        let call = Call { layout: digest(counts), ..self.call::<T>(Op::AllGather, output.len()) };
        if self.world == 1 {
            output.copy_from_slice(input);
        }
        let size = size_of::<T>();
        let mut ends = Vec::with_capacity(counts.len());
        let mut end = 0;
        for count in counts {
            end += count * size;
            ends.push(end);
        }
        let (input, output) = (bytemuck::cast_slice(input), bytemuck::cast_slice_mut(output));
        self.run(|state| {
            let block = |r: usize| if r == 0 { 0 } else { ends[r - 1] }..ends[r];
            state.engine.run(call, |engine| engine.all_gather(input, output, block))
        })
    }

    /// Reduces every rank's `input`, element by element, and leaves block `rank` of the result, of its `world`
    /// equal blocks, in `output`: `input` has `world * output.len()` elements.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the lengths don't fit; else see [`Communicator`].
    pub fn reduce_scatter<T: Element>(&self, input: &[T], output: &mut [T], op: ReduceOp) -> Result<()> {
        self.expect(
            "reduce_scatter: input",
            "world x output",
            output.len().checked_mul(self.world),
            input.len(),
        )?;
        let call = Call { reduce: Some(op), ..self.call::<T>(Op::ReduceScatter, input.len()) };
        let reduction = Reduction::new(T::DTYPE, op).map_err(|e| *e)?;
        let (input, output) = (bytemuck::cast_slice(input), bytemuck::cast_slice_mut(output));
        if self.world == 1 {
            output.copy_from_slice(input);
            reduction.alone(output);
        }
        self.run(|state| state.engine.run(call, |engine| engine.reduce_scatter(input, output, &reduction)))
    }

    /// Copies the `buf` of rank `root` into every rank's.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `root` is no rank; else see [`Communicator`].
    pub fn broadcast<T: Element>(&self, buf: &mut [T], root: usize) -> Result<()> {
        if root >= self.world {
            let (rank, world) = (self.rank, self.world);
            return Err(Error::invalid(format!(
                "rank {rank}: broadcast: root {root} is outside the world of {world}"
            )));
        }
        let call = Call { root: Some(root as u32), ..self.call::<T>(Op::Broadcast, buf.len()) };
        let bytes = bytemuck::cast_slice_mut(buf);
        self.run(|state| state.engine.run(call, |engine| engine.broadcast(bytes, root)))
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// See [`Communicator`].
    pub fn barrier(&self) -> Result<()> {
        let call = Call { op: Op::Barrier, dtype: None, reduce: None, count: 0, root: None, layout: 0 };
        self.run(|state| state.engine.run(call, Engine::barrier))
    }

    #[inline]
    fn call<T: Element>(&self, op: Op, count: usize) -> Call {
        Call { op, dtype: Some(T::DTYPE), reduce: None, count: count as u64, root: None, layout: 0 }
    }

    fn expect(&self, what: &str, rule: &str, expected: Option<usize>, got: usize) -> Result<()> {
        if expected == Some(got) {
            return Ok(());
        }
        let expected = expected.map_or("more than memory holds".to_owned(), |e| e.to_string());
        Err(Error::invalid(format!("rank {}: {what} has {got} elements, not {expected} ({rule})", self.rank)))
    }

    /// Runs `body` alone, unless the group has failed; if it fails, no further call will run.
    #[inline]
    fn run(&self, body: impl FnOnce(&mut State) -> Result<(), Failure>) -> Result<()> {
        if self.world == 1 {
            return Ok(());
        }
        let mut state = match self.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::WouldBlock) => return Err(Error::ConcurrentUse { rank: self.rank }),
            Err(TryLockError::Poisoned(p)) => p.into_inner(),
        };
        if let Some(cause) = &state.cause {
            return Err(Error::Poisoned { rank: self.rank, cause: cause.clone() });
        }
        body(&mut state).map_err(|failure| {
            if !matches!(*failure, Error::InvalidArgument(_)) {
                state.cause = Some(failure.to_string());
            }
            *failure
        })
    }
}

impl State {
    #[inline]
    fn choose(&self, bytes: usize, world: usize) -> Result<Algorithm> {
        let slot = self.engine.slot_bytes();
        let Some(forced) = self.algorithm else { return Ok(Algorithm::all_reduce(bytes, world, slot)) };
        if bytes > forced.limit(slot) {
            return Err(Error::invalid(format!(
                "{forced} carries at most {} bytes, not {bytes}",
                forced.limit(slot)
            )));
        }
        Ok(forced)
    }
}

/// A digest of per-rank counts, never 0, so that ranks that disagree on them are found out.
fn digest(counts: &[usize]) -> u32 {
    let mut h: u64 = 0xcbf2_9ce4_8422_2325;
    for c in counts {
        h = (h ^ *c as u64).wrapping_mul(0x0000_0100_0000_01b3);
        h ^= h >> 32;
    }
    (h as u32).max(1)
}
