//! The rank's collectives on candle tensors, and the time they take.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use candle_core::{CpuStorage, InplaceOp1, Layout, Storage, Tensor};
use tensorwire::{Communicator, ReduceOp, Wire};

use crate::Result;

/// A communicator that keeps count of the time spent in it: none with one rank, which exchanges nothing.
pub(crate) struct Comm {
    inner: Arc<Communicator>,
    /// In how few bits what it exchanges is sent.
    pub(crate) wire: Option<Wire>,
    spent_ns: AtomicU64,
}

impl Comm {
    pub(crate) fn new(inner: Arc<Communicator>) -> Comm {
        Comm { inner, wire: None, spent_ns: AtomicU64::default() }
    }

    pub(crate) fn rank(&self) -> usize {
        self.inner.rank()
    }

    pub(crate) fn world(&self) -> usize {
        self.inner.world()
    }

    /// The time spent in collectives so far, waiting for peers included.
    pub(crate) fn spent(&self) -> Duration {
        Duration::from_nanos(self.spent_ns.load(Ordering::Relaxed))
    }

    /// Sums `buf` over all ranks, in place.
    pub(crate) fn sum(&self, buf: &mut [f32]) -> tensorwire::Result<()> {
        self.timed(|c| match self.wire {
            None => c.all_reduce(buf, ReduceOp::Sum),
            Some(wire) => c.all_reduce_wire(buf, ReduceOp::Sum, wire),
        })
    }

    /// Sums a contiguous f32 tensor over all ranks, in place: the collective works on candle's own storage.
    pub(crate) fn sum_tensor(&self, tensor: &Tensor) -> Result<()> {
        if self.world() == 1 {
            return Ok(());
        }
        with_f32_mut(tensor, |data| Ok(self.sum(data)?))
    }

    /// Adds `x`, summed over all ranks, to `residual`, and makes `x` the root-mean-square norm of that, times
    /// `weight`: all in place.
    pub(crate) fn sum_add_rms_norm(
        &self,
        x: &Tensor,
        residual: &Tensor,
        weight: &Tensor,
        eps: f32,
    ) -> Result<()> {
        with_f32_mut(x, |x| {
            with_f32_mut(residual, |residual| {
                with_f32(weight, |weight| {
                    Ok(self.timed(|c| match self.wire {
                        None => c.all_reduce_add_rms_norm(x, residual, weight, eps),
                        Some(wire) => c.all_reduce_add_rms_norm_wire(x, residual, weight, eps, wire),
                    })?)
                })
            })
        })
    }

    /// Concatenates the ranks' vectors, `counts[r]` elements of rank `r`.
    pub(crate) fn gather(&self, mine: &Tensor, counts: &[usize]) -> Result<Vec<f32>> {
        with_f32(mine, |mine| {
            if self.world() == 1 {
                return Ok(mine.to_vec());
            }
            let mut all = vec![0.0; counts.iter().sum()];
            self.timed(|c| match self.wire {
                None => c.all_gather_v(mine, &mut all, counts),
                Some(wire) => c.all_gather_v_wire(mine, &mut all, counts, wire),
            })?;
            Ok(all)
        })
    }

    fn timed(&self, call: impl FnOnce(&Communicator) -> tensorwire::Result<()>) -> tensorwire::Result<()> {
        let start = Instant::now();
        let done = call(&self.inner);
        if self.world() > 1 {
            self.spent_ns.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        }
        done
    }
}

/// What a part of the network took on this rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spent {
    /// All of it.
    pub total: Duration,
    /// Of that, in collectives, waiting for the other ranks included.
    pub comm: Duration,
}

/// Times the parts of a network one after the other.
pub(crate) struct StopWatch<'a> {
    comm: &'a Comm,
    last: (Instant, Duration),
    pub(crate) laps: Vec<Spent>,
}

impl StopWatch<'_> {
    pub(crate) fn start(comm: &Comm) -> StopWatch<'_> {
        StopWatch { comm, last: (Instant::now(), comm.spent()), laps: Vec::new() }
    }

    /// A part ends, and the next one begins.
    pub(crate) fn lap(&mut self) {
        let now = (Instant::now(), self.comm.spent());
        self.laps.push(Spent { total: now.0 - self.last.0, comm: now.1 - self.last.1 });
        self.last = now;
    }
}

/// Lends the elements of a contiguous f32 tensor.
pub(crate) fn with_f32<T>(tensor: &Tensor, use_it: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(data)), Some((start, end))) => use_it(&data[start..end]),
        _ => Err(candle_core::Error::Msg("a contiguous f32 tensor in memory is needed".into()).into()),
    }
}

/// As [`with_f32`], to be written too.
fn with_f32_mut<T>(tensor: &Tensor, use_it: impl FnOnce(&mut [f32]) -> Result<T>) -> Result<T> {
    let lend = Lend { use_it: RefCell::new(Some(use_it)), result: RefCell::default() };
    tensor.inplace_op1(&lend)?;
    let none = || Err(candle_core::Error::Msg("the tensor wasn't lent".into()).into());
    lend.result.into_inner().unwrap_or_else(none)
}

/// An operation in place, as which candle lends a tensor's storage. It keeps the result to itself, for candle
/// would wrap an error in one of its own, which says less.
struct Lend<T, F> {
    use_it: RefCell<Option<F>>,
    result: RefCell<Option<Result<T>>>,
}

impl<T, F: FnOnce(&mut [f32]) -> Result<T>> InplaceOp1 for Lend<T, F> {
    fn name(&self) -> &'static str {
        "collective"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(data), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("a collective needs a contiguous f32 tensor")
        };
        let use_it = self.use_it.take();
        *self.result.borrow_mut() = use_it.map(|use_it| use_it(&mut data[start..end]));
        Ok(())
    }
}
