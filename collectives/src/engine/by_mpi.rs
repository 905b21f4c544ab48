//! MPI's own collectives in the place of ours, where a program asks for them.

use std::ops::Range;

use tensorwire_transports::mpi::{self, Counts, Offload};
use tensorwire_transports::shm::Failure;

use super::lanes::Lanes;
use super::{Buffers, NetEngine, Reduction};
use crate::select::Algorithm;

impl NetEngine {
    /// Begins or ends to ask MPI first.
    pub(super) fn ask_mpi(&mut self, algorithm: Option<Algorithm>) {
        self.offloads = algorithm == Some(Algorithm::Mpi);
    }

    /// Whether MPI has this reduction.
    pub(crate) fn offloads(&self, r: &Reduction) -> bool {
        mpi::reduces(r.dtype, r.op)
    }

    /// Has MPI do a collective, if it is asked and has one: whether it has done it, which is the same on every rank.
    #[inline]
    fn by_mpi(&mut self, collective: Offload<'_>) -> Result<bool, Failure> {
        match &mut self.group {
            Lanes::Mpi(group) if self.offloads => group.offload(collective),
            _ => Ok(false),
        }
    }

    #[inline]
    pub(super) fn all_reduce_by_mpi(
        &mut self,
        data: &mut Buffers<'_>,
        r: &Reduction,
        root: Option<usize>,
    ) -> Result<bool, Failure> {
        self.by_mpi(Offload::Reduce {
            how: (r.dtype, r.op),
            input: data.input,
            output: &mut *data.output,
            root,
        })
    }

    pub(super) fn reduce_scatter_by_mpi(
        &mut self,
        input: &[u8],
        output: &mut [u8],
        block: impl Fn(usize) -> Range<usize>,
        r: &Reduction,
    ) -> Result<bool, Failure> {
        let Some(blocks) = Counts::new(self.group.world(), block) else { return Ok(false) };
        self.by_mpi(Offload::ReduceScatter { how: (r.dtype, r.op), input, output, blocks })
    }

    pub(super) fn all_gather_by_mpi(
        &mut self,
        input: &[u8],
        output: &mut [u8],
        block: impl Fn(usize) -> Range<usize>,
    ) -> Result<bool, Failure> {
        let Some(blocks) = Counts::new(self.group.world(), block) else { return Ok(false) };
        self.by_mpi(Offload::AllGather { input, output, blocks })
    }

    /// Of equal blocks: where they aren't, a rank sees its own alone.
    pub(super) fn all_to_all_by_mpi(&mut self, input: &[u8], output: &mut [u8]) -> Result<bool, Failure> {
        self.by_mpi(Offload::AllToAll { input, output })
    }

    pub(super) fn broadcast_by_mpi(&mut self, data: &mut [u8], root: usize) -> Result<bool, Failure> {
        self.by_mpi(Offload::Broadcast { data, root })
    }

    pub(super) fn barrier_by_mpi(&mut self) -> Result<bool, Failure> {
        self.by_mpi(Offload::Barrier)
    }
}
