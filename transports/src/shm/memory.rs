//! The memory itself: an anonymous file that the ranks of a host map, and that their groups and buffers take
//! parts of.
//!
//! A memfd has no name, so it can't leak, be mistaken for a stale one, or be limited by the size of
//! /dev/shm; the kernel frees it with its last user. It is sealed against shrinking, so no rank can pull pages
//! away from under another, and pages are reserved when a part is taken, so a full machine is an error there
//! and not a signal later.
//!
//! The first page counts how far parts have been given out. A part is handed out once; when its users are
//! done, its pages go back to the system.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, memfd_create,
};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use tensorwire_core::{Error, Result};

use super::layout::PAGE;

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::SEAL);

/// Parts of this size and more start at a multiple of it, so that they can be mapped with huge pages.
const HUGE: u64 = 2 << 20;

/// The file that all ranks of a host share.
#[derive(Debug)]
pub(super) struct Memory {
    fd: OwnedFd,
    root: Mapping,
}

/// The first page of the file.
#[repr(C)]
struct Root {
    /// Where the next part starts. Whoever takes a part adds to it, Relaxed: the number alone matters.
    end: AtomicU64,
}

impl Memory {
    /// Makes a file with nothing given out.
    pub(super) fn create() -> Result<Memory> {
        let fd = memfd_create("tensorwire", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|e| Error::os("making shared memory (memfd_create)", e))?;
        fallocate(&fd, FallocateFlags::empty(), 0, PAGE as u64)
            .map_err(|e| Error::os("reserving a page", e))?;
        fcntl_add_seals(&fd, SEALS).map_err(|e| Error::os("sealing shared memory", e))?;
        let memory = Memory::open(fd)?;
        memory.root().end.store(PAGE as u64, Ordering::Relaxed);
        Ok(memory)
    }

    /// The file that a peer made, after checking that nobody can shrink it.
    pub(super) fn open(fd: OwnedFd) -> Result<Memory> {
        let seals = fcntl_get_seals(&fd).map_err(|e| Error::os("looking at the shared memory's seals", e))?;
        if !seals.contains(SEALS) {
            return Err(Error::os(
                format!("the shared memory received has seals {seals:?}, not {SEALS:?}"),
                Errno::INVAL,
            ));
        }
        let root = map(fd.as_fd(), 0, PAGE)?;
        Ok(Memory { fd, root })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn root(&self) -> &Root {
        // SAFETY: (1) the first page is mapped and aligned; (2) `Root` is an atomic, valid from any bytes.
        unsafe { &*self.root.at(0).cast() }
    }

    /// Takes `len` bytes, all zero, which take memory when they are touched or reserved. Returns where they
    /// start.
    pub(super) fn take(&self, len: usize) -> Result<u64> {
        // A whole number of huge pages keeps every part's start aligned for them.
        let len = (len as u64).next_multiple_of(HUGE);
        let start = self.root().end.fetch_add(len + HUGE, Ordering::Relaxed).next_multiple_of(HUGE);
        // The file must reach to the part's end for it to be mapped: its last page does that.
        self.reserve(start + len - PAGE as u64, PAGE)?;
        Ok(start)
    }

    /// Backs `len` bytes from `start` with memory, near the processor that asks.
    pub(super) fn reserve(&self, start: u64, len: usize) -> Result<()> {
        let refused = |e: Errno, available: Option<u64>| {
            let available = available.map_or("an unknown amount".to_owned(), |b| format!("{b} bytes"));
            let what = format!(
                "reserving {len} bytes of shared memory ({available} available): lower TENSORWIRE_SHM_BYTES or the size \
                 asked for"
            );
            Error::os(what, e)
        };
        // The kernel would take pages until none is left, and then end a process of its choice.
        let available = available_memory();
        if available.is_some_and(|most| len as u64 > most) {
            return Err(refused(Errno::NOMEM, available));
        }
        let len = len as u64;
        fallocate(&self.fd, FallocateFlags::empty(), start, len).map_err(|e| refused(e, available))
    }

    /// Returns a part's pages to the system. Nobody may look at them again.
    fn give_back(&self, start: u64, len: u64) {
        // Where holes can't be punched the pages stay until the file goes.
        let _ = fallocate(&self.fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, len);
    }

    /// Maps a part.
    pub(super) fn map(self: &Arc<Memory>, start: u64, len: usize) -> Result<Part> {
        let mapping = map(self.fd(), start, len)?;
        Ok(Part { mapping, start, memory: self.clone() })
    }
}

/// A mapped part of the memory.
#[derive(Debug)]
pub(super) struct Part {
    mapping: Mapping,
    start: u64,
    memory: Arc<Memory>,
}

impl Part {
    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    pub(super) fn start(&self) -> u64 {
        self.start
    }

    /// The address of the byte at `offset`.
    #[inline]
    pub(super) fn at(&self, offset: usize) -> *mut u8 {
        self.mapping.at(offset)
    }

    /// Counts one user of `world` as done with the part; the last one returns its pages to the system.
    pub(super) fn leave(&self, left: &AtomicU32, world: usize) {
        // AcqRel: what any rank did with the memory happened before the last one gives it back.
        if left.fetch_add(1, Ordering::AcqRel) as usize + 1 == world {
            self.memory.give_back(self.start, (self.mapping.len as u64).next_multiple_of(HUGE));
        }
    }
}

#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: (1) the mapping is plain memory, valid from any thread until drop; (2) what may be read and written
// in it, and when, is decided by the protocol of the modules that ask for its parts.
unsafe impl Send for Mapping {}
// SAFETY: as for Send; `Mapping` itself has no state that changes.
unsafe impl Sync for Mapping {}

fn map(fd: BorrowedFd<'_>, start: u64, len: usize) -> Result<Mapping> {
    let flags = MapFlags::SHARED;
    // SAFETY: (1) a new mapping at an address of the kernel's choice overlaps nothing; (2) the file reaches to
    // the end of every part that was taken, and is sealed against shrinking.
    let base =
        unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags, fd, start) }
            .map_err(|e| Error::os(format!("mapping {len} bytes of shared memory"), e))?;
    let base =
        NonNull::new(base.cast::<u8>()).ok_or_else(|| Error::os("mapping shared memory", Errno::FAULT))?;
    if len as u64 >= HUGE {
        // SAFETY: the range was mapped above. Advice: where the system has no huge pages for shared memory,
        // nothing changes.
        let _ = unsafe { madvise(base.as_ptr().cast(), len, Advice::LinuxHugepage) };
    }
    Ok(Mapping { base, len })
}

impl Mapping {
    #[inline]
    fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset <= self.len);
        // SAFETY: offsets come from layouts that lie within the mapping.
        unsafe { self.base.as_ptr().add(offset) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: (1) the range is the one that `map` mapped; (2) references into it borrow `self`.
        // It can fail only for a range that is not mapped.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Bytes that could still be had: on the machine, or under the control group's limit if that is less.
fn available_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find(|l| l.starts_with("MemAvailable:"))?;
    let machine = line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)?;
    let group =
        |name| std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse::<u64>().ok();
    // Without a limit, memory.max reads "max".
    let group = group("memory.max").zip(group("memory.current")).map(|(max, used)| max.saturating_sub(used));
    Some(group.map_or(machine, |g| g.min(machine)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{fstat, ftruncate};

    fn blocks(memory: &Memory) -> u64 {
        fstat(memory.fd()).unwrap().st_blocks as u64 * 512
    }

    #[test]
    fn parts_are_shared_apart_and_given_back() {
        let a = Arc::new(Memory::create().unwrap());
        let b = Arc::new(Memory::open(a.fd().try_clone_to_owned().unwrap()).unwrap());
        let (first, second) = (a.take(100).unwrap(), b.take(5 << 20).unwrap());
        assert!(first + 100 <= second && second.is_multiple_of(HUGE));
        let (ours, theirs) = (a.map(second, 5 << 20).unwrap(), b.map(second, 5 << 20).unwrap());
        // SAFETY: the offset lies in the mapping and nobody else touches it.
        unsafe {
            ours.at((5 << 20) - 1).write(42);
            assert_eq!(theirs.at((5 << 20) - 1).read(), 42);
        }
        assert!(blocks(&a) < 1 << 20, "only what is touched takes memory");
        a.reserve(second, 5 << 20).unwrap();
        assert!(blocks(&a) >= 5 << 20);
        ours.leave(&AtomicU32::new(1), 2);
        assert!(blocks(&a) < 1 << 20, "{}", blocks(&a));
        assert!(ftruncate(a.fd(), 0).is_err(), "nobody can shrink it");
    }

    #[test]
    fn what_cannot_be_had_is_said_with_both_figures() {
        let memory = Memory::create().unwrap();
        let start = memory.take(1 << 50).unwrap();
        let message = memory.reserve(start, 1 << 50).unwrap_err().to_string();
        assert!(
            message.contains("reserving 1125899906842624 bytes") && message.contains("bytes available"),
            "{message}"
        );
    }

    #[test]
    fn memory_that_could_shrink_is_refused() {
        let unsealed = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&unsealed, 1 << 20).unwrap();
        assert!(Memory::open(unsealed).unwrap_err().to_string().contains("seals"));
    }
}
