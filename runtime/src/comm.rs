//! The rank's collectives on candle tensors, and the time they take.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use candle_core::{CpuStorage, InplaceOp1, Layout, Storage, Tensor};
use tensorwire::{Communicator, ReduceOp};

use crate::{Error, Result};

/// A communicator that keeps count of the time spent in it. With one rank it does nothing.
pub(crate) struct Comm {
    inner: Arc<Communicator>,
    spent_ns: AtomicU64,
}

impl Comm {
    pub(crate) fn new(inner: Arc<Communicator>) -> Comm {
        Comm { inner, spent_ns: AtomicU64::default() }
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
        self.timed(|c| c.all_reduce(buf, ReduceOp::Sum))
    }

    /// Sums a contiguous f32 tensor over all ranks, in place: the collective works on candle's own storage.
    pub(crate) fn sum_tensor(&self, tensor: &Tensor) -> Result<()> {
        if self.world() == 1 {
            return Ok(());
        }
        let op = SumInPlace { comm: self, failed: RefCell::default() };
        let done = tensor.inplace_op1(&op);
        // The collective's own error says more than candle's wrapping of it.
        match op.failed.into_inner() {
            Some(error) => Err(Error::Comm(error)),
            None => Ok(done?),
        }
    }

    /// Concatenates the ranks' vectors, `counts[r]` elements of rank `r`.
    pub(crate) fn gather(&self, mine: &Tensor, counts: &[usize]) -> Result<Vec<f32>> {
        with_f32(mine, |mine| {
            if self.world() == 1 {
                return Ok(mine.to_vec());
            }
            let mut all = vec![0.0; counts.iter().sum()];
            self.timed(|c| c.all_gather_v(mine, &mut all, counts))?;
            Ok(all)
        })
    }

    fn timed(&self, call: impl FnOnce(&Communicator) -> tensorwire::Result<()>) -> tensorwire::Result<()> {
        if self.world() == 1 {
            return Ok(());
        }
        let start = Instant::now();
        let done = call(&self.inner);
        self.spent_ns.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        done
    }
}

struct SumInPlace<'a> {
    comm: &'a Comm,
    failed: RefCell<Option<tensorwire::Error>>,
}

impl InplaceOp1 for SumInPlace<'_> {
    fn name(&self) -> &'static str {
        "all-reduce"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(data), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            candle_core::bail!("all-reduce needs a contiguous f32 tensor")
        };
        self.comm.sum(&mut data[start..end]).map_err(|error| {
            *self.failed.borrow_mut() = Some(error);
            candle_core::Error::Msg("all-reduce failed".into())
        })
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
