//! The processes of an MPI communicator: where they are, and what their groups share.

use std::fmt::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use mpi::ffi;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tensorwire_core::{Deadline, Error, Result};

use super::raw::{self, Comm};
use super::{MpiOptions, end};
use crate::processors::{Processors, may_spin};

/// Bytes of what each process tells the others of itself.
const ABOUT: usize = 1024;

/// Tags that a group uses: see [`Tag`].
const TAGS: u32 = 8;

/// What a message is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Tag {
    /// A frame's header, and the first bytes of its payload, in a collective.
    Head = 0,
    /// The rest of that payload.
    Body = 1,
    /// As the first, of a message between two ranks.
    MessageHead = 2,
    /// The rest of that.
    MessageBody = 3,
    /// A word about the group itself, from any rank.
    Control = 4,
}

/// The processes of an MPI communicator, which this library has duplicated.
#[derive(Debug)]
pub struct World {
    pub(super) comm: Comm,
    /// What each process calls its host.
    hosts: Vec<String>,
    /// Of the processes whose end this one can see: those on its host, in its pid namespace.
    pidfds: Vec<Option<OwnedFd>>,
    /// Whether a wait may keep its processor.
    pub(super) spins: bool,
    pub(super) options: MpiOptions,
    /// The next number of a group. Relaxed: ranks agree on it by messages.
    contexts: AtomicU32,
}

impl World {
    /// Of all processes that were started together. Initialises MPI, unless the program has.
    ///
    /// # Errors
    /// [`Error::Config`] where MPI can't be used by this thread, or has ended; [`Error::Rendezvous`] if the other processes
    /// don't come.
    pub fn of_all(options: &MpiOptions) -> Result<Arc<World>> {
        raw::start()?;
        // SAFETY: it is a communicator.
        let world = unsafe { World::duplicate(Comm::world(), options) }?;
        end::is_home(&world);
        Ok(world)
    }

    /// Of the processes of `comm`, all of which call it. MPI and `comm` stay the program's.
    ///
    /// # Safety
    /// `comm` is a communicator of this process's MPI, and not an inter-communicator.
    ///
    /// # Errors
    /// As for [`of_all`](World::of_all), and where MPI isn't initialised.
    pub unsafe fn of(comm: ffi::MPI_Comm, options: &MpiOptions) -> Result<Arc<World>> {
        let mut initialized = 0;
        // SAFETY: it may be called at any time; the number is written before it returns.
        unsafe { ffi::MPI_Initialized(&mut initialized) };
        if initialized == 0 {
            return Err(Error::Config("MPI isn't initialised, so there is no communicator of it yet".into()));
        }
        raw::start()?;
        // SAFETY: the caller vouches for it.
        unsafe { World::duplicate(comm, options) }
    }

    /// # Safety
    /// As for [`of`](World::of).
    unsafe fn duplicate(comm: ffi::MPI_Comm, options: &MpiOptions) -> Result<Arc<World>> {
        let deadline = Deadline::after(options.timeout);
        // SAFETY: the caller vouches for it.
        let comm = unsafe { Comm::duplicate(comm, deadline) };
        let (place, late) = match &comm {
            Ok(Some(comm)) => ((comm.rank, comm.size), None),
            Ok(None) => ((0, 0), Some("a rank of the communicator did not come".to_owned())),
            Err(why) => ((0, 0), Some(why.clone())),
        };
        let failed = |what: String| {
            raw::break_off();
            let (rank, world) = place;
            Error::Rendezvous { rank, world, what: format!("over MPI: {what}") }
        };
        let comm = match (comm, late) {
            (Ok(Some(comm)), _) => comm,
            (_, why) => return Err(failed(why.unwrap_or_default())),
        };
        let all = comm.gather(&about(options), deadline).map_err(failed)?;
        let within = options.timeout;
        let all = all.ok_or_else(|| failed(format!("not all ranks came within {within:?}")))?;
        let told: Vec<Vec<String>> = all
            .chunks_exact(ABOUT)
            .map(|text| {
                String::from_utf8_lossy(text).trim_end_matches('\0').split('\n').map(str::to_owned).collect()
            })
            .collect();
        let part = |rank: usize, which: usize| told[rank].get(which).cloned().unwrap_or_default();
        let here: Vec<usize> = (0..comm.size).filter(|r| part(*r, 1) == part(comm.rank, 1)).collect();
        let pidfd = |rank: usize| {
            let same = rank != comm.rank && here.contains(&rank);
            let pid = part(rank, 2).parse().ok().and_then(Pid::from_raw).filter(|_| same)?;
            pidfd_open(pid, PidfdFlags::empty()).ok()
        };
        let pidfds = (0..comm.size).map(pidfd).collect();
        // Those that share processors are those of a host, whatever it is called.
        let boot = |rank: usize| part(rank, 1).split(' ').next().unwrap_or_default().to_owned();
        let processors: Option<Vec<Processors>> = (0..comm.size)
            .filter(|rank| boot(*rank) == boot(comm.rank))
            .map(|rank| part(rank, 3).parse().ok())
            .collect();
        let spins = processors.is_some_and(|all| may_spin(&Processors::allowed(), &all));
        let hosts = (0..comm.size).map(|rank| part(rank, 0)).collect();
        // A process that has ended since it told its number is still that number's: it is waited for by mpirun. Only once
        // all are known to be there, the numbers are sure.
        let there = comm.gather(&[1], deadline).map_err(failed)?;
        there.ok_or_else(|| failed(format!("not all ranks came within {within:?}")))?;
        let options = options.clone();
        Ok(Arc::new(World { comm, hosts, pidfds, spins, options, contexts: AtomicU32::new(0) }))
    }

    /// This process's rank.
    pub fn rank(&self) -> usize {
        self.comm.rank
    }

    /// The number of processes.
    pub fn size(&self) -> usize {
        self.comm.size
    }

    /// What each rank calls its host.
    pub fn hosts(&self) -> &[String] {
        &self.hosts
    }

    /// Rank 0's bytes, on every rank; all call it.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] if rank 0 doesn't come within the timeout.
    pub fn broadcast(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        let deadline = Deadline::after(self.options.timeout);
        let failed = |what: String| Error::Rendezvous { rank: self.rank(), world: self.size(), what };
        let all = self.comm.broadcast(bytes, deadline).map_err(failed)?;
        all.ok_or_else(|| failed(format!("over MPI: rank 0 did not come within {:?}", self.options.timeout)))
    }

    /// Whether the process of a rank is known to have ended.
    pub(super) fn has_ended(&self, rank: usize) -> bool {
        let Some(fd) = &self.pidfds[rank] else { return false };
        let mut fds = [PollFd::new(fd, PollFlags::IN)];
        // An error says nothing about the peer: it is asked again soon.
        matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(n) if n > 0)
    }

    /// The first number that this rank would give to a group.
    pub(super) fn next_context(&self) -> u32 {
        self.contexts.load(Ordering::Relaxed)
    }

    /// Notes that numbers below `context` are taken.
    pub(super) fn take_contexts(&self, below: u32) {
        self.contexts.fetch_max(below, Ordering::Relaxed);
    }

    /// The numbers that groups can have.
    pub(super) fn most_contexts(&self) -> u32 {
        self.comm.most as u32 / TAGS
    }

    /// The tag of a group's messages.
    pub(super) fn tag(&self, context: u32, tag: Tag) -> i32 {
        (context * TAGS + tag as u32) as i32
    }
}

/// What a process tells of itself: its host's name; what is common to those whose end it can see; its number; and the
/// processors that it may use.
fn about(options: &MpiOptions) -> [u8; ABOUT] {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let boot = boot.trim();
    let pids = std::fs::metadata("/proc/self/ns/pid").map_or(0, |ns| ns.ino());
    let host = options.host.as_deref().unwrap_or(boot);
    let host: String = host.chars().filter(|c| !c.is_control()).take(100).collect();
    let mut text = format!("{host}\n{boot} {pids}\n{}\n", std::process::id());
    let processors = Processors::allowed().to_string();
    if text.len() + processors.len() <= ABOUT {
        let _ = write!(text, "{processors}");
    }
    let mut about = [0; ABOUT];
    about[..text.len()].copy_from_slice(text.as_bytes());
    about
}
