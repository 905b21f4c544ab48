//! MPI's own collectives in the place of ours, for types and operations that MPI has.
//!
//! They block, and can't be called off. So a thread watches for how long a rank is in one: where that is too long, or a
//! peer's process has ended, it says so on standard error, and ends the process, and through MPI its job.

use std::ffi::{c_int, c_void};
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use mpi::ffi;
use tensorwire_core::{DType, ReduceOp};

use super::raw::{self, Outcome, check};
use super::shared::{NOTHING, Shared};

/// How often the watch looks, at most.
const LOOK: Duration = Duration::from_millis(50);

/// One of MPI's collectives. Counts are in bytes; where a rank has no part in it, its buffers are empty.
#[derive(Debug)]
pub enum Offload<'a> {
    /// `MPI_Allreduce`, or to one rank `MPI_Reduce`. Without an input, the output is it.
    Reduce {
        /// The elements' type, and what is done with them.
        how: (DType, ReduceOp),
        /// This rank's contribution.
        input: Option<&'a [u8]>,
        /// Where the result goes.
        output: &'a mut [u8],
        /// The one rank that gets it.
        root: Option<usize>,
    },
    /// `MPI_Reduce_scatter`: block `r` of the input is reduced into rank `r`'s output.
    ReduceScatter {
        /// The elements' type, and what is done with them.
        how: (DType, ReduceOp),
        /// This rank's contribution, of all blocks.
        input: &'a [u8],
        /// Where this rank's block goes.
        output: &'a mut [u8],
        /// The blocks.
        blocks: Counts,
    },
    /// `MPI_Allgather`, of equal blocks or not.
    AllGather {
        /// This rank's block.
        input: &'a [u8],
        /// All of them.
        output: &'a mut [u8],
        /// The blocks.
        blocks: Counts,
    },
    /// `MPI_Alltoall`, of equal blocks.
    AllToAll {
        /// A block for each rank.
        input: &'a [u8],
        /// A block of each rank.
        output: &'a mut [u8],
    },
    /// `MPI_Bcast`.
    Broadcast {
        /// The root's is what all have then.
        data: &'a mut [u8],
        /// Whose it is.
        root: usize,
    },
    /// `MPI_Barrier`.
    Barrier,
}

/// Each rank's block of a buffer, in bytes: blocks follow each other in rank order.
#[derive(Clone, Debug)]
pub struct Counts(Vec<usize>);

impl Counts {
    /// Of blocks of so many bytes; `None` where they don't follow each other.
    pub fn new(world: usize, block: impl Fn(usize) -> std::ops::Range<usize>) -> Option<Counts> {
        let mut at = 0;
        let counts: Option<Vec<usize>> = (0..world)
            .map(|rank| {
                let block = block(rank);
                let follows = block.start == at || block.is_empty();
                at = at.max(block.end);
                follows.then_some(block.len())
            })
            .collect();
        counts.map(Counts)
    }

    /// The count of each block, if it is the same.
    fn equal(&self) -> Option<usize> {
        self.0.iter().all(|n| *n == self.0[0]).then(|| self.0[0])
    }

    /// In elements of `size` bytes, and where each begins, as MPI counts; `None` where MPI can't.
    fn for_mpi(&self, size: usize) -> Option<(Vec<c_int>, Vec<c_int>)> {
        let mut at = 0usize;
        self.0
            .iter()
            .map(|n| {
                let begins = c_int::try_from(at / size).ok()?;
                at = at.checked_add(*n)?;
                c_int::try_from(at / size).ok()?;
                Some((c_int::try_from(n / size).ok()?, begins))
            })
            .collect()
    }
}

fn datatype(dtype: DType) -> Option<ffi::MPI_Datatype> {
    // SAFETY: MPI's constants are set before the program begins, and never written.
    unsafe {
        Some(match dtype {
            DType::F32 => ffi::RSMPI_FLOAT,
            DType::F64 => ffi::RSMPI_DOUBLE,
            DType::I8 => ffi::RSMPI_INT8_T,
            DType::U8 => ffi::RSMPI_UINT8_T,
            DType::I32 => ffi::RSMPI_INT32_T,
            DType::U32 => ffi::RSMPI_UINT32_T,
            DType::I64 => ffi::RSMPI_INT64_T,
            DType::U64 => ffi::RSMPI_UINT64_T,
            _ => return None,
        })
    }
}

fn operation(op: ReduceOp) -> Option<ffi::MPI_Op> {
    // SAFETY: as above.
    unsafe {
        Some(match op {
            ReduceOp::Sum => ffi::RSMPI_SUM,
            ReduceOp::Product => ffi::RSMPI_PROD,
            ReduceOp::Min => ffi::RSMPI_MIN,
            ReduceOp::Max => ffi::RSMPI_MAX,
            ReduceOp::BitAnd => ffi::RSMPI_BAND,
            ReduceOp::BitOr => ffi::RSMPI_BOR,
            ReduceOp::BitXor => ffi::RSMPI_BXOR,
            _ => return None,
        })
    }
}

/// Whether MPI reduces elements of this type so.
pub fn reduces(dtype: DType, op: ReduceOp) -> bool {
    datatype(dtype).is_some() && operation(op).is_some()
}

fn known((dtype, op): (DType, ReduceOp)) -> Option<(ffi::MPI_Datatype, ffi::MPI_Op, usize)> {
    Some((datatype(dtype)?, operation(op)?, dtype.size()))
}

/// Runs `collective` as call number `seq`: whether MPI has it, which is the same on every rank.
#[inline]
pub(super) fn run(shared: &Arc<Shared>, seq: u64, collective: Offload<'_>) -> Outcome<bool> {
    match collective {
        Offload::Reduce { how, input, output, root } => reduce(shared, seq, how, input, output, root),
        Offload::ReduceScatter { how, input, output, blocks } => {
            reduce_scatter(shared, seq, how, input, output, &blocks)
        }
        Offload::AllGather { input, output, blocks } => all_gather(shared, seq, input, output, &blocks),
        Offload::AllToAll { input, output } => all_to_all(shared, seq, input, output),
        Offload::Broadcast { data, root } => broadcast(shared, seq, data, root),
        Offload::Barrier => {
            // SAFETY: no memory is involved.
            call(shared, seq, "MPI_Barrier", |comm| unsafe { ffi::MPI_Barrier(comm) })
        }
    }
}

/// Makes a call of MPI on the group's own communicator, watched.
#[inline]
fn call(
    shared: &Arc<Shared>,
    seq: u64,
    what: &str,
    body: impl FnOnce(ffi::MPI_Comm) -> c_int,
) -> Outcome<bool> {
    let comm = match shared.own.get() {
        Some(Own(comm)) => *comm,
        None => own(shared, seq)?,
    };
    let _entry = raw::enter()?;
    shared.watched(seq);
    let code = body(comm);
    shared.watched(0);
    check(code, what).map(|()| true)
}

/// A communicator of the ranks of a group.
#[derive(Clone, Copy, Debug)]
pub(super) struct Own(ffi::MPI_Comm);

// SAFETY: a communicator's handle names the same communicator on every thread.
unsafe impl Send for Own {}
// SAFETY: as above.
unsafe impl Sync for Own {}

/// Makes the group's own communicator with the other ranks of it, and has it watched.
#[cold]
fn own(shared: &Arc<Shared>, seq: u64) -> Outcome<ffi::MPI_Comm> {
    watch(shared)?;
    let parent = shared.over.comm.raw();
    let whole = shared.ranks.iter().copied().eq(0..shared.over.size());
    let comm = if whole {
        parent
    } else {
        let _entry = raw::enter()?;
        shared.watched(seq);
        let ranks: Vec<c_int> = shared.ranks.iter().map(|rank| *rank as c_int).collect();
        let tag = shared.over.tag(shared.context, super::world::Tag::Control);
        // SAFETY: (1) the parent is there for as long as MPI; (2) the ranks are as many as is said, each of the parent's and
        // once; (3) the handles are written before these return.
        unsafe {
            let (mut all, mut some) = (ffi::RSMPI_GROUP_NULL, ffi::RSMPI_GROUP_NULL);
            let mut made = ffi::RSMPI_COMM_NULL;
            check(ffi::MPI_Comm_group(parent, &mut all), "MPI_Comm_group")?;
            let included = ffi::MPI_Group_incl(all, ranks.len() as c_int, ranks.as_ptr(), &mut some);
            check(included, "MPI_Group_incl")?;
            check(ffi::MPI_Comm_create_group(parent, some, tag, &mut made), "MPI_Comm_create_group")?;
            ffi::MPI_Comm_set_errhandler(made, ffi::RSMPI_ERRORS_RETURN);
            ffi::MPI_Group_free(&mut some);
            ffi::MPI_Group_free(&mut all);
            shared.watched(0);
            made
        }
    };
    let _ = shared.own.set(Own(comm));
    Ok(comm)
}

/// Where an input begins. An empty one is nowhere, and its address may be what MPI takes for something else.
fn begin_of(input: &[u8]) -> *const c_void {
    if input.is_empty() { std::ptr::without_provenance(ELSEWHERE) } else { input.as_ptr().cast() }
}

/// Where an output begins.
fn begin_of_mut(output: &mut [u8]) -> *mut c_void {
    if output.is_empty() { std::ptr::without_provenance_mut(ELSEWHERE) } else { output.as_mut_ptr().cast() }
}

/// An address at which nothing is, and which means nothing to any MPI.
const ELSEWHERE: usize = 64;

/// What MPI is to take for an input that is the output; a copy of it where that isn't known.
fn input_of<'a>(input: Option<&'a [u8]>, output: &[u8], copy: &'a mut Vec<u8>) -> *const c_void {
    match (input, raw::in_place_input()) {
        (Some(input), _) => begin_of(input),
        (None, Some(in_place)) => in_place,
        (None, None) => {
            copy.extend_from_slice(output);
            begin_of(copy)
        }
    }
}

#[inline]
fn reduce(
    shared: &Arc<Shared>,
    seq: u64,
    how: (DType, ReduceOp),
    input: Option<&[u8]>,
    output: &mut [u8],
    root: Option<usize>,
) -> Outcome<bool> {
    let Some((datatype, op, size)) = known(how) else { return Ok(false) };
    let len = input.map_or(output.len(), <[u8]>::len);
    let Ok(count) = c_int::try_from(len / size) else { return Ok(false) };
    let gets = root.is_none_or(|root| root == shared.rank);
    assert!(!gets || output.len() == len);
    let mut copy = Vec::new();
    // A rank that gets no result gives its contribution as it is.
    let from = if gets { input_of(input, output, &mut copy) } else { begin_of(input.unwrap_or(output)) };
    let into = begin_of_mut(output);
    match root {
        // SAFETY: (1) input and output have `count` elements of the type, checked above, and the call borrows both; (2) they
        // are apart, or the input is what MPI takes for the output's.
        None => call(shared, seq, "MPI_Allreduce", |comm| unsafe {
            ffi::MPI_Allreduce(from, into, count, datatype, op, comm)
        }),
        // SAFETY: as above; the output is looked at on the root alone.
        Some(root) => call(shared, seq, "MPI_Reduce", |comm| unsafe {
            ffi::MPI_Reduce(from, into, count, datatype, op, root as c_int, comm)
        }),
    }
}

fn reduce_scatter(
    shared: &Arc<Shared>,
    seq: u64,
    how: (DType, ReduceOp),
    input: &[u8],
    output: &mut [u8],
    blocks: &Counts,
) -> Outcome<bool> {
    let Some((datatype, op, size)) = known(how) else { return Ok(false) };
    let Some((counts, _)) = blocks.for_mpi(size) else { return Ok(false) };
    assert!(input.len() == blocks.0.iter().sum::<usize>() && output.len() == blocks.0[shared.rank]);
    let (from, into) = (begin_of(input), begin_of_mut(output));
    // SAFETY: the input has all blocks and the output this rank's, checked above; the call borrows both, apart.
    call(shared, seq, "MPI_Reduce_scatter", |comm| unsafe {
        match blocks.equal() {
            Some(_) => ffi::MPI_Reduce_scatter_block(from, into, counts[0], datatype, op, comm),
            None => ffi::MPI_Reduce_scatter(from, into, counts.as_ptr(), datatype, op, comm),
        }
    })
}

fn all_gather(
    shared: &Arc<Shared>,
    seq: u64,
    input: &[u8],
    output: &mut [u8],
    blocks: &Counts,
) -> Outcome<bool> {
    let Some((counts, begins)) = blocks.for_mpi(1) else { return Ok(false) };
    assert!(output.len() == blocks.0.iter().sum::<usize>() && input.len() == blocks.0[shared.rank]);
    let (from, into, n) = (begin_of(input), begin_of_mut(output), counts[shared.rank]);
    // SAFETY: the output has all blocks and the input this rank's, checked above; the call borrows both, apart.
    call(shared, seq, "MPI_Allgather", |comm| unsafe {
        let byte = ffi::RSMPI_UINT8_T;
        match blocks.equal() {
            Some(_) => ffi::MPI_Allgather(from, n, byte, into, n, byte, comm),
            None => ffi::MPI_Allgatherv(from, n, byte, into, counts.as_ptr(), begins.as_ptr(), byte, comm),
        }
    })
}

fn all_to_all(shared: &Arc<Shared>, seq: u64, input: &[u8], output: &mut [u8]) -> Outcome<bool> {
    let world = shared.world();
    let (Ok(n), Ok(_)) = (c_int::try_from(input.len() / world), c_int::try_from(input.len())) else {
        return Ok(false);
    };
    assert!(input.len() == output.len() && input.len() % world == 0);
    let (from, into) = (begin_of(input), begin_of_mut(output));
    // SAFETY: both have a block of `n` bytes for each rank, checked above; the call borrows both, apart.
    call(shared, seq, "MPI_Alltoall", |comm| unsafe {
        let byte = ffi::RSMPI_UINT8_T;
        ffi::MPI_Alltoall(from, n, byte, into, n, byte, comm)
    })
}

fn broadcast(shared: &Arc<Shared>, seq: u64, data: &mut [u8], root: usize) -> Outcome<bool> {
    let Ok(n) = c_int::try_from(data.len()) else { return Ok(false) };
    let at = begin_of_mut(data);
    // SAFETY: the data has `n` bytes, and the call borrows it.
    call(shared, seq, "MPI_Bcast", |comm| unsafe {
        ffi::MPI_Bcast(at, n, ffi::RSMPI_UINT8_T, root as c_int, comm)
    })
}

/// The groups that are watched, while there is a thread that does.
static WATCHED: Mutex<Option<Vec<Weak<Shared>>>> = Mutex::new(None);

fn watch(shared: &Arc<Shared>) -> Outcome<()> {
    let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
    if watched.is_none() {
        let thread = std::thread::Builder::new().name("tensorwire-watch".into()).spawn(keep_watch);
        thread.map_err(|e| format!("starting the thread that watches MPI's collectives: {e}"))?;
    }
    watched.get_or_insert_default().push(Arc::downgrade(shared));
    Ok(())
}

/// The thread: ends the job where a rank is in one of MPI's collectives for too long.
fn keep_watch() {
    // In which call each group was, and since when.
    let mut seen: Vec<(Weak<Shared>, u64, Instant)> = Vec::new();
    loop {
        let mut watched = WATCHED.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(groups) = watched.as_mut() else { return };
        groups.retain(|group| group.strong_count() > 0);
        if groups.is_empty() {
            *watched = None;
            return;
        }
        let mut now: Vec<_> = groups.iter().filter_map(|g| Some((g.clone(), g.upgrade()?))).collect();
        drop(watched);
        let mut pause = LOOK;
        let before = std::mem::take(&mut seen);
        for (group, shared) in now.drain(..) {
            let seq = shared.offloaded();
            let known = before.iter().find(|(g, was, _)| g.ptr_eq(&group) && *was == seq);
            let since = known.map_or_else(Instant::now, |(_, _, since)| *since);
            if seq != 0 && known.is_some() {
                judge(&shared, seq, since);
            }
            pause = pause.min(shared.over.options.timeout / 8);
            seen.push((group, seq, since));
        }
        std::thread::sleep(pause);
    }
}

/// Ends the job if a call can't be expected to end.
fn judge(shared: &Shared, seq: u64, since: Instant) {
    let timeout = shared.over.options.timeout;
    let gone = (0..shared.world()).find(|who| shared.over.has_ended(shared.ranks[*who]));
    let why = match gone {
        Some(peer) => format!("lost rank {peer} in"),
        None if since.elapsed() >= timeout => {
            format!("timed out after {timeout:?} (the limit is TENSORWIRE_TIMEOUT) in")
        }
        None => return,
    };
    if shared.offloaded() != seq {
        return;
    }
    let call = shared.records.collective(seq).unwrap_or(NOTHING);
    // At once, so that nothing comes in between.
    let line = format!(
        "tensorwire: rank {}: {why} {call} (call {seq}): MPI's own collective can't be called off, so this ends the job\n",
        shared.rank
    );
    let _ = std::io::stderr().write_all(line.as_bytes());
    raw::break_off();
    raw::end_job(&shared.over.comm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_counted_as_mpi_does() {
        let ends = [0usize, 8, 8, 24];
        let counts = Counts::new(3, |r| ends[r]..ends[r + 1]).unwrap();
        assert_eq!(counts.for_mpi(4), Some((vec![2, 0, 4], vec![0, 2, 2])));
        assert_eq!(counts.equal(), None);
        assert_eq!(Counts::new(3, |r| r * 8..r * 8 + 8).unwrap().equal(), Some(8));
        assert!(Counts::new(2, |r| (1 - r) * 8..(2 - r) * 8).is_none());
        let large = Counts::new(2, |r| r << 31..(r + 1) << 31).unwrap();
        assert_eq!(large.for_mpi(1), None);
        assert!(large.for_mpi(4).is_some());
    }

    #[test]
    fn mpi_reduces_numbers_of_c_alone() {
        assert!(reduces(DType::F32, ReduceOp::Sum) && reduces(DType::U8, ReduceOp::BitXor));
        for (dtype, op) in [(DType::BF16, ReduceOp::Sum), (DType::F32, ReduceOp::Average)] {
            assert!(!reduces(dtype, op));
        }
    }
}
