//! Looks into the memory of a job from outside: whatever state its ranks are in, running, stopped, or gone but
//! for one. The memory is foreign input here. It is read, never mapped or written, and every number in it is
//! checked; where it makes no sense, that is an error or a gap in the record, whatever the bytes.

use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{SeekFrom, fstat, seek};
use rustix::io::{Errno, pread};
use tensorwire_core::{Error, Result};

use super::clock::Clock;
use super::control::{Control, Header};
use super::flight::{FlightRecord, RankRecord, RankState};
use super::layout::{Layout, PAGE};
use super::memory::{About, HUGE, Kind, MAGIC, VERSION};
use super::sync::Ordering;

/// The flight records of the groups in a job's memory, in the order in which they were formed. `file` is the
/// memory, opened through /proc/PID/fd; `process` says of a member's process id, as that process numbers itself,
/// whether it is [`Member`](RankState::Member), [`Stopped`](RankState::Stopped) or [`Ended`](RankState::Ended).
///
/// # Errors
/// [`Error::Os`] if it can't be read, or isn't the memory of a job of this version.
pub fn inspect(file: &impl AsFd, process: impl Fn(u32) -> RankState) -> Result<Vec<FlightRecord>> {
    let file = file.as_fd();
    let failed = |e: io::Error| Error::os("looking into shared memory", e);
    let len = fstat(file).map_err(|e| failed(e.into()))?.st_size.max(0) as u64;
    let mut root = [0; 16];
    read(file, &mut root, 0).map_err(failed)?;
    let [magic, version] = [0, 8].map(|at| u64::from_ne_bytes(std::array::from_fn(|i| root[at + i])));
    if magic != MAGIC || version != u64::from(VERSION) {
        let what = if magic == MAGIC { format!("version {version}, not {VERSION}") } else { "none".into() };
        let what = format!("it is no memory of this version of tensorwire ({what})");
        return Err(failed(io::Error::new(ErrorKind::InvalidData, what)));
    }
    let mut groups = Vec::new();
    let mut at = HUGE;
    while let Some(start) = next_data(file, at).map_err(failed)? {
        // A part's head is the first data at a multiple of HUGE. Anything else is a part that is being made.
        let mut head = [0; About::BYTES];
        let about = match start.is_multiple_of(HUGE) && read(file, &mut head, start).is_ok() {
            true => About::from_bytes(&head, len - start.min(len)),
            false => None,
        };
        let Some((about, part_len)) = about else {
            at = (start + 1).next_multiple_of(HUGE);
            continue;
        };
        at = start + part_len;
        if about.kind == Kind::Group
            && let Some(layout) =
                Layout::new(about.world, about.bytes).ok().filter(|l| l.len as u64 <= part_len)
        {
            // A group that is given back meanwhile reads as zeros, or not at all.
            if let Ok(Some(record)) = group(file, start, &layout, &process) {
                groups.push(record);
            }
        }
    }
    Ok(groups)
}

/// Where the file has data from `at` on.
fn next_data(file: BorrowedFd<'_>, at: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(at)) {
        Ok(start) => Ok(Some(start)),
        Err(Errno::NXIO) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// The flight record of the group at `start`; none if all its ranks have left.
fn group(
    file: BorrowedFd<'_>,
    start: u64,
    layout: &Layout,
    process: impl Fn(u32) -> RankState,
) -> io::Result<Option<FlightRecord>> {
    let clock = Clock::of_this_machine();
    let page = |rank| page::<Control>(file, start + layout.control(rank) as u64);
    let header = self::page::<Header>(file, start)?;
    let read = |rank| {
        let (first, second) = (page(rank)?, page(rank)?);
        Ok(RankRecord::read(rank, layout.world, [&first, &second], &clock.reading(), &process))
    };
    let ranks = (0..layout.world).map(read).collect::<io::Result<Vec<_>>>()?;
    if ranks.iter().all(|r| r.state == RankState::Left) {
        return Ok(None);
    }
    let mut record = FlightRecord { ranks, failure: None };
    // Relaxed: this is a copy.
    let by = header.failed.load(Ordering::Relaxed).checked_sub(1).map(|by| by as usize);
    if let Some(by) = by.filter(|by| *by < layout.world) {
        let control = page(by)?;
        // SAFETY: this thread alone has the copy.
        record.failure = Some(control.verdict.with(|v| record.describe(by, unsafe { &*v })));
    }
    Ok(Some(record))
}

/// One page of words.
///
/// # Safety
/// The type has the size of a page and is valid from any bytes.
unsafe trait Page {}
// SAFETY: (1) the size is asserted in `control`; (2) it is made of atomics and plain numbers in cells.
unsafe impl Page for Header {}
// SAFETY: as for `Header`.
unsafe impl Page for Control {}

/// A copy of the page at `at`.
fn page<T: Page>(file: BorrowedFd<'_>, at: u64) -> io::Result<Box<T>> {
    let mut page = Box::new(MaybeUninit::<T>::zeroed());
    // SAFETY: (1) `T` has `PAGE` bytes, all of them written just now; (2) `page` is borrowed.
    let bytes = unsafe { std::slice::from_raw_parts_mut(page.as_mut_ptr().cast::<u8>(), PAGE) };
    read(file, bytes, at)?;
    // SAFETY: `T` is valid from any bytes.
    Ok(unsafe { Box::from_raw(Box::into_raw(page).cast::<T>()) })
}

/// Fills `bytes` from the file.
fn read(file: BorrowedFd<'_>, bytes: &mut [u8], at: u64) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match pread(file, &mut bytes[done..], at + done as u64) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::{Group, Options, in_process};
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::io::pwrite;
    use std::os::fd::OwnedFd;
    use tensorwire_core::{Call, Op};

    fn member(_: u32) -> RankState {
        RankState::Member
    }

    fn fd(group: &Group) -> OwnedFd {
        group.shared.words.part.memory().fd().try_clone_to_owned().unwrap()
    }

    fn barrier(group: &mut Group) {
        group.begin(Call::bare(Op::Barrier)).unwrap();
        let step = group.next_step().unwrap();
        group.publish();
        group.wait_all(step).unwrap();
        group.end();
    }

    #[test]
    fn finds_the_groups_that_are_there_and_what_ended_them() {
        let mut groups = in_process(2, &Options { slot_bytes: 64 << 10, ..Options::default() }).unwrap();
        let file = fd(&groups[0]);
        let (mut one, mut region) = (Vec::new(), Vec::new());
        std::thread::scope(|s| {
            let work = |group: &mut Group| {
                (0..3).for_each(|_| barrier(group));
                let region = group.region(3 << 20).unwrap();
                let gone = group.split(Some(0), 0).unwrap().unwrap();
                let one = group.split(Some(group.rank() as u32), 0).unwrap().unwrap();
                drop(gone);
                (one, region)
            };
            let made: Vec<_> = groups.iter_mut().map(|g| s.spawn(move || work(g))).collect();
            for m in made {
                let (o, r) = m.join().unwrap();
                one.push(o);
                region.push(r);
            }
        });
        let found = inspect(&file, member).unwrap();
        assert_eq!(found.iter().map(|g| g.ranks.len()).collect::<Vec<_>>(), [2, 1, 1]);
        for rank in &found[0].ranks {
            assert_eq!((rank.pid, rank.calls.len()), (std::process::id(), 6));
        }
        let same = groups[0].flight_record();
        let calls = |r: &FlightRecord| r.ranks[1].calls.iter().map(|c| (c.seq, c.call)).collect::<Vec<_>>();
        assert_eq!(calls(&found[0]), calls(&same));
        one.clear();
        region.clear();
        groups[1].handle().abort("enough");
        let found = inspect(&file, |_| RankState::Stopped).unwrap();
        assert_eq!(found.len(), 1);
        assert!(found[0].failure.as_deref().unwrap().contains("enough"), "{}", found[0]);
        assert_eq!(found[0].ranks[0].state, RankState::Stopped);
        drop(groups);
        assert!(inspect(&file, member).unwrap().is_empty());
    }

    #[test]
    fn what_is_no_memory_is_refused() {
        let empty = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        assert!(inspect(&empty, member).is_err());
        ftruncate(&empty, 8 << 20).unwrap();
        assert!(inspect(&empty, member).unwrap_err().to_string().contains("no memory of this version"));
        pwrite(&empty, &MAGIC.to_ne_bytes(), 0).unwrap();
        pwrite(&empty, &99u64.to_ne_bytes(), 8).unwrap();
        assert!(inspect(&empty, member).unwrap_err().to_string().contains("version 99"));
        let directory = std::fs::File::open("/").unwrap();
        assert!(inspect(&directory, member).is_err());
    }

    /// Bytes that are wrong in any place: an error, or less to see, and nothing worse.
    #[test]
    fn damaged_memory_is_no_panic() {
        let mut groups = in_process(3, &Options { slot_bytes: 64 << 10, ..Options::default() }).unwrap();
        std::thread::scope(|s| {
            groups.iter_mut().for_each(|g| drop(s.spawn(move || (0..40).for_each(|_| barrier(g)))));
        });
        groups[0].handle().abort("enough");
        let file = fd(&groups[0]);
        let len = HUGE as usize * 2;
        let mut bytes = vec![0; len];
        read(file.as_fd(), &mut bytes, 0).unwrap();
        let copy = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&copy, len as u64 * 2).unwrap();
        let mut seed = 1u64;
        let mut random = || {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            seed >> 33
        };
        let head = HUGE as usize..HUGE as usize + 5 * PAGE;
        let mut seen = 0;
        for round in 0..400 {
            let mut damaged = bytes.clone();
            for _ in 0..=random() % 64 {
                // Few bytes of the head, many of the pages behind it.
                let at = match random() % 8 {
                    0 => random() as usize % 24,
                    1 => head.start + random() as usize % 64,
                    _ => head.start + random() as usize % head.len(),
                };
                damaged[at] = [0, 1, 0x7f, 0xff, random() as u8][random() as usize % 5];
            }
            if round % 4 == 0 {
                damaged[head.start + 64..head.end].iter_mut().for_each(|b| *b = random() as u8);
            }
            pwrite(&copy, &damaged, 0).unwrap();
            for record in inspect(&copy, member).into_iter().flatten() {
                seen += record.to_string().len();
            }
        }
        assert!(seen > 10_000, "some of it could still be read: {seen}");
    }
}
