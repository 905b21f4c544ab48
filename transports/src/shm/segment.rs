//! The memory itself: an anonymous file that its ranks map.
//!
//! A memfd has no name, so it can't leak, be mistaken for a stale one, or be limited by the size of
//! /dev/shm; the kernel frees it with its last user. It is sealed against resizing, so no rank can pull pages
//! away from under another, and its pages are reserved when it is made, so a full machine is an error there
//! and not a signal later.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate,
    memfd_create,
};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use tensorwire_core::{Error, Result};

use super::layout::Layout;

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// A mapping of a group's memory.
#[derive(Debug)]
pub(super) struct Segment {
    base: NonNull<u8>,
    layout: Layout,
    fd: OwnedFd,
}

// SAFETY: (1) the mapping is plain memory, valid from any thread until drop; (2) what may be read and written
// in it, and when, is decided by the protocol of the modules that ask for its parts.
unsafe impl Send for Segment {}
// SAFETY: as for Send; `Segment` itself has no state that changes.
unsafe impl Sync for Segment {}

impl Segment {
    /// Makes a segment, reserves its memory and maps it, all zero.
    pub(super) fn create(layout: Layout) -> Result<Segment> {
        let fd = memfd_create("tensorwire", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|e| Error::os("making shared memory (memfd_create)", e))?;
        let len = layout.len as u64;
        ftruncate(&fd, len).map_err(|e| Error::os(format!("sizing shared memory to {len} bytes"), e))?;
        fallocate(&fd, FallocateFlags::empty(), 0, len).map_err(|e| {
            let what = format!(
                "reserving {len} bytes of shared memory for {} ranks ({} available): lower TENSORWIRE_SHM_BYTES",
                layout.world,
                available_memory().map_or("an unknown amount".to_owned(), |b| format!("{b} bytes"))
            );
            Error::os(what, e)
        })?;
        fcntl_add_seals(&fd, SEALS).map_err(|e| Error::os("sealing shared memory", e))?;
        Segment::map(fd, layout)
    }

    /// Maps a segment that a peer made, after checking that it is what the layout says and can't change.
    pub(super) fn open(fd: OwnedFd, layout: Layout) -> Result<Segment> {
        let size = fstat(&fd).map_err(|e| Error::os("looking at the shared memory received", e))?.st_size;
        let seals = fcntl_get_seals(&fd).map_err(|e| Error::os("looking at the shared memory's seals", e))?;
        if u64::try_from(size) != Ok(layout.len as u64) || !seals.contains(SEALS) {
            return Err(Error::os(
                format!(
                    "the shared memory received has {size} bytes and seals {seals:?}, not {} and {SEALS:?}",
                    layout.len
                ),
                Errno::INVAL,
            ));
        }
        Segment::map(fd, layout)
    }

    fn map(fd: OwnedFd, layout: Layout) -> Result<Segment> {
        // SAFETY: (1) a new mapping at an address of the kernel's choice overlaps nothing; (2) the file has
        // `layout.len` bytes and is sealed against shrinking, so each of them stays backed.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                layout.len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )
        }
        .map_err(|e| Error::os(format!("mapping {} bytes of shared memory", layout.len), e))?;
        let base =
            NonNull::new(base.cast()).ok_or_else(|| Error::os("mapping shared memory", Errno::FAULT))?;
        Ok(Segment { base, layout, fd })
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The address of the byte at `offset`.
    #[inline]
    pub(super) fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset <= self.layout.len);
        // SAFETY: offsets come from the layout, which lies within the mapping.
        unsafe { self.base.as_ptr().add(offset) }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: (1) the range is the one that `map` mapped; (2) references into it borrow `self`.
        // It can fail only for a range that is not mapped.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.layout.len) };
    }
}

/// What the kernel says could still be allocated, for the message of a failed reservation.
fn available_memory() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find(|l| l.starts_with("MemAvailable:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_share_and_a_wrong_one_is_refused() {
        let layout = Layout::new(2, 64 << 10).unwrap();
        let a = Segment::create(layout).unwrap();
        let b = Segment::open(a.fd().try_clone_to_owned().unwrap(), layout).unwrap();
        // SAFETY: the offset lies in the mapping and nobody else touches it.
        unsafe {
            a.at(layout.slot(1, 0)).write(42);
            assert_eq!(b.at(layout.slot(1, 0)).read(), 42);
        }
        let other = Layout::new(3, 64 << 10).unwrap();
        assert!(Segment::open(a.fd().try_clone_to_owned().unwrap(), other).is_err());
        let unsealed = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&unsealed, layout.len as u64).unwrap();
        let message = Segment::open(unsealed, layout).unwrap_err().to_string();
        assert!(message.contains("seals"), "{message}");
        assert!(ftruncate(a.fd(), 0).is_err(), "nobody can shrink it");
    }
}
