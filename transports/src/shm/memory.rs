//! The memory itself: an anonymous file that the ranks of a host map, and that their groups and buffers take
//! parts of.
//!
//! A memfd has no name, so it can't leak, be mistaken for a stale one, or be limited by the size of
//! /dev/shm; the kernel frees it with its last user. It is sealed against shrinking, so no rank can pull pages
//! away from under another, and pages are reserved when a part is taken, so a full machine is an error there
//! and not a signal later.
//!
//! The first page counts how far parts have been given out. A part is handed out once; when its users are
//! done, its pages go back to the system. Each part says at its start what it is, so that whoever opens the file
//! from outside finds its way (see `inspect`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
// Not loom's: no words of the protocol.
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, memfd_create,
};
use rustix::io::{Errno, pwrite};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use tensorwire_core::{Error, Result};

use super::available::available_memory;
use super::layout::{MAX_WORLD, PAGE};

/// What the file of the memory is called: the end of a link in /proc/PID/fd reads `memfd:` and this.
pub const MEMORY_NAME: &str = "tensorwire";

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::SEAL);

/// Parts of this size and more start at a multiple of it, so that they can be mapped with huge pages.
pub(super) const HUGE: u64 = 2 << 20;

/// Changes with any change of what lies where in the memory, or of how it is handed over.
pub(super) const VERSION: u32 = 5;

/// The file that all ranks of a host share.
#[derive(Debug)]
pub(super) struct Memory {
    fd: OwnedFd,
    root: Mapping,
}

/// The first page of the file.
#[repr(C)]
pub(super) struct Root {
    pub(super) magic: AtomicU64,
    pub(super) version: AtomicU64,
    /// Where the next part starts. Whoever takes a part adds to it, Relaxed: the number alone matters.
    end: AtomicU64,
}

/// What the file begins with.
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"tensorwi");

/// What each part begins with.
#[repr(C)]
pub(super) struct PartHead {
    pub(super) magic: AtomicU64,
    /// Its length.
    pub(super) len: AtomicU64,
    /// A kind of part.
    pub(super) kind: AtomicU32,
    /// Ranks that map it.
    pub(super) world: AtomicU32,
    /// Bytes of slots a rank, or of a block.
    pub(super) bytes: AtomicU64,
    /// A bit for each rank that is done with it. Each sets its own, then looks at all, SeqCst: what any of them did
    /// with the part happened before one gives it back, and of two that set theirs at once one sees both.
    left: [AtomicU64; MAX_WORLD / 64],
}

/// What a part is, for whoever opens the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct About {
    pub(super) kind: Kind,
    pub(super) world: usize,
    pub(super) bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    Group = 1,
    Region = 2,
}

impl About {
    /// Bytes of a part's head but for its last words, which begin as zeros.
    pub(super) const BYTES: usize = 32;

    fn to_bytes(self, len: u64) -> [u8; About::BYTES] {
        let mut bytes = [0; About::BYTES];
        bytes[..8].copy_from_slice(&PART_MAGIC.to_ne_bytes());
        bytes[8..16].copy_from_slice(&len.to_ne_bytes());
        bytes[16..20].copy_from_slice(&(self.kind as u32).to_ne_bytes());
        bytes[20..24].copy_from_slice(&(self.world as u32).to_ne_bytes());
        bytes[24..].copy_from_slice(&(self.bytes as u64).to_ne_bytes());
        bytes
    }

    /// What the part with this head is, and its length, if that makes sense for one of which `most` bytes are
    /// there. Any bytes will do.
    // `inspect` alone asks, which isn't there under loom.
    #[cfg_attr(loom, allow(dead_code))]
    pub(super) fn from_bytes(bytes: &[u8; About::BYTES], most: u64) -> Option<(About, u64)> {
        let long = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| bytes[at + i]));
        let short = |at: usize| u32::from_ne_bytes(std::array::from_fn(|i| bytes[at + i]));
        let kind = [Kind::Group, Kind::Region].into_iter().find(|k| *k as u32 == short(16))?;
        let (len, world) = (long(8), short(20) as usize);
        let sound = long(0) == PART_MAGIC
            && (1..=MAX_WORLD).contains(&world)
            && len > 0
            && len.is_multiple_of(HUGE)
            && len <= most;
        sound.then(|| Some((About { kind, world, bytes: usize::try_from(long(24)).ok()? }, len)))?
    }
}

const PART_MAGIC: u64 = u64::from_le_bytes(*b"tw part\0");

impl Memory {
    /// Makes a file with nothing given out.
    pub(super) fn create() -> Result<Memory> {
        let fd = memfd_create(MEMORY_NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|e| Error::os("making shared memory (memfd_create)", e))?;
        fallocate(&fd, FallocateFlags::empty(), 0, PAGE as u64)
            .map_err(|e| Error::os("reserving a page", e))?;
        fcntl_add_seals(&fd, SEALS).map_err(|e| Error::os("sealing shared memory", e))?;
        let memory = Memory::open(fd)?;
        let root = memory.root();
        root.magic.store(MAGIC, Ordering::Relaxed);
        root.version.store(u64::from(VERSION), Ordering::Relaxed);
        root.end.store(PAGE as u64, Ordering::Relaxed);
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
        // SAFETY: (1) the first page is mapped and aligned; (2) `Root` is atomics, valid from any bytes.
        unsafe { &*self.root.at(0).cast() }
    }

    /// Takes `len` bytes, all zero but for the head of a part, which take memory when they are touched or
    /// reserved. Returns where they start.
    pub(super) fn take(&self, about: About, len: usize) -> Result<u64> {
        // A whole number of huge pages keeps every part's start aligned for them.
        let len = (len as u64).next_multiple_of(HUGE);
        let start = self.root().end.fetch_add(len + HUGE, Ordering::Relaxed).next_multiple_of(HUGE);
        // The file must reach to the part's end for it to be mapped: its last page does that.
        self.reserve(start + len - PAGE as u64, PAGE)?;
        self.reserve(start, PAGE)?;
        pwrite(&self.fd, &about.to_bytes(len), start)
            .map_err(|e| Error::os("writing to shared memory", e))?;
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
    pub(super) fn give_back(&self, start: u64, len: u64) {
        let len = len.next_multiple_of(HUGE);
        // Where holes can't be punched the pages stay until the file goes.
        let _ = fallocate(&self.fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, len);
    }

    /// Maps a part.
    pub(super) fn map(self: &Arc<Memory>, start: u64, len: usize) -> Result<Part> {
        self.map_head(start, len, len)
    }

    /// Maps only `head` bytes of a part of `len`: enough for a rank that can't map all of it to say so and to be
    /// counted.
    pub(super) fn map_head(self: &Arc<Memory>, start: u64, len: usize, head: usize) -> Result<Part> {
        let mapping = map(self.fd(), start, head)?;
        Ok(Part { mapping, start, len, memory: self.clone() })
    }
}

/// A mapped part of the memory.
#[derive(Debug)]
pub(super) struct Part {
    mapping: Mapping,
    start: u64,
    len: usize,
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

    /// Puts the huge pages that lie between `offset` and `offset + len`, which are reserved, where small ones are, if
    /// the system has any, whatever its setting for shared memory: that is about who gets them unasked.
    pub(super) fn make_huge(&self, offset: usize, len: usize) {
        debug_assert!(offset + len <= self.mapping.len);
        // SAFETY: the range lies in the mapping, and what it holds stays the same. Linux before 6.1 doesn't know how;
        // then nothing changes.
        let _ = unsafe { libc::madvise(self.at(offset).cast(), len, MADV_COLLAPSE) };
    }

    /// Counts `rank` of `world` as done with the part; the last one, but for ranks that have `ended` without saying
    /// so, returns its pages to the system.
    pub(super) fn leave(&self, rank: usize, world: usize, ended: impl Fn(usize) -> bool) {
        // SAFETY: (1) the part begins with its head, aligned to a page; (2) atomics are valid from any bytes.
        let head = unsafe { &*self.at(0).cast::<PartHead>() };
        head.left[rank / 64].fetch_or(1 << (rank % 64), Ordering::SeqCst);
        let left = |r: usize| head.left[r / 64].load(Ordering::SeqCst) >> (r % 64) & 1 == 1;
        // Two may both find themselves the last: what is given back a second time is nothing.
        if (0..world).all(|r| left(r) || ended(r)) {
            self.memory.give_back(self.start, self.len as u64);
        }
    }
}

/// Of Linux 6.1 on.
const MADV_COLLAPSE: libc::c_int = 25;

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
    let failed = |e| Error::os(format!("mapping {len} bytes of shared memory"), e);
    // A huge page must begin at a multiple of its size in the address space as in the file, which the kernel doesn't
    // see to: room enough is taken for such an address.
    let room = if len as u64 >= HUGE { len + HUGE as usize } else { len };
    // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
    let taken = unsafe {
        mmap_anonymous(
            std::ptr::null_mut(),
            room,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }
    .map_err(failed)?;
    let taken = NonNull::new(taken.cast::<u8>()).ok_or_else(|| failed(Errno::FAULT))?;
    let before = if room > len { taken.as_ptr().align_offset(HUGE as usize) } else { 0 };
    // SAFETY: `before` is less than a huge page, by which the room is longer than `len`.
    let mapping = Mapping { base: unsafe { taken.add(before) }, len };
    // SAFETY: what is given back was taken above and lies before and behind the mapping. It can fail only for want
    // of room in the kernel's own lists: then it stays taken, and is no memory.
    unsafe {
        let behind = mapping.base.as_ptr().add(len.next_multiple_of(PAGE));
        let rest = room.next_multiple_of(PAGE).saturating_sub(before + len.next_multiple_of(PAGE));
        for (at, bytes) in [(taken.as_ptr(), before), (behind, rest)] {
            if bytes > 0 {
                let _ = munmap(at.cast(), bytes);
            }
        }
    }
    let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::FIXED);
    // SAFETY: (1) the range is this mapping's own, and nothing refers to it yet; (2) the file reaches to the end of
    // every part that was taken, and is sealed against shrinking.
    unsafe { mmap(mapping.base.as_ptr().cast(), len, protection, flags, fd, start) }.map_err(failed)?;
    Ok(mapping)
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
        let about = About { kind: Kind::Region, world: 2, bytes: 1 };
        let (first, second) = (a.take(about, 100).unwrap(), b.take(about, 5 << 20).unwrap());
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
        let nobody = |_| false;
        ours.leave(0, 2, nobody);
        assert!(blocks(&a) >= 5 << 20, "one still needs it");
        theirs.leave(1, 2, nobody);
        assert!(blocks(&a) < 1 << 20, "{}", blocks(&a));
        let third = a.take(about, 5 << 20).unwrap();
        a.reserve(third, 5 << 20).unwrap();
        let part = a.map_head(third, 5 << 20, PAGE).unwrap();
        part.leave(1, 3, |rank| rank == 0);
        assert!(blocks(&a) >= 5 << 20, "rank 2 still needs it");
        part.leave(2, 3, |rank| rank == 0);
        assert!(blocks(&a) < 1 << 20, "the dead don't keep it: {}", blocks(&a));
        assert!(ftruncate(a.fd(), 0).is_err(), "nobody can shrink it");
    }

    #[test]
    fn what_cannot_be_had_is_said_with_both_figures() {
        let memory = Memory::create().unwrap();
        let about = About { kind: Kind::Region, world: 1, bytes: 1 };
        let start = memory.take(about, 1 << 50).unwrap();
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
