//! Reading a peer's memory where it lies (cross-memory attach, `process_vm_readv(2)`), so that data is copied once and
//! not into a slot first.
//!
//! A rank publishes where its data lies, and returns from its call only when every peer has published that it has read
//! it. One that returns sooner has failed, and has ended the group before it did: whoever reads looks for that
//! afterwards, and what it has read then counts for nothing.
//!
//! The kernel lets a process read another's memory that it may trace: one of the same user, where nothing (Yama's
//! `ptrace_scope`, a seccomp filter, a user or process namespace) stands against it. So ranks try it once, and go on through
//! slots unless it works for all.

use std::io;
use std::time::Duration;

use tensorwire_core::{Deadline, Error};

use super::Failure;
use super::group::Group;
use super::sync::{Ordering, fence};
use crate::local_socket::random_u64;

/// How long a process whose memory is gone may take to be seen to have ended.
const ENDED_WITHIN: Duration = Duration::from_millis(100);

/// What a rank knows of its peers' memory.
#[derive(Debug)]
pub(super) struct Reach {
    /// By rank; empty if not every rank can read every peer's.
    peers: Vec<Process>,
    /// A random number that a peer reads along with the data: proof that it reads this process.
    _token: Box<u64>,
}

/// A process as its peers address it.
#[derive(Clone, Copy, Debug)]
struct Process {
    pid: libc::pid_t,
    token_at: u64,
    token: u64,
}

impl Process {
    /// Copies what lies at `at` in the process's memory.
    fn read(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        let mut token = 0u64;
        let iovec = |at: *mut u8, len| libc::iovec { iov_base: at.cast(), iov_len: len };
        let remote = |at: u64, len| iovec(std::ptr::without_provenance_mut(at as usize), len);
        let local = [iovec((&raw mut token).cast(), size_of::<u64>()), iovec(to.as_mut_ptr(), to.len())];
        // The token first, of the same process: the kernel looks it up once.
        let remote = [remote(self.token_at, size_of::<u64>()), remote(at, to.len())];
        // SAFETY: (1) the local parts are this function's and the caller's to write; (2) of the other process, the kernel
        // checks what is there, and nothing is written; (3) both arrays have two elements.
        let read = unsafe { libc::process_vm_readv(self.pid, local.as_ptr(), 2, remote.as_ptr(), 2, 0) };
        match usize::try_from(read) {
            Err(_) => Err(io::Error::last_os_error()),
            Ok(_) if token != self.token => Err(io::Error::other("it is another process")),
            Ok(read) if read != size_of::<u64>() + to.len() => {
                Err(io::Error::other(format!("only {read} bytes could be read")))
            }
            Ok(_) => Ok(()),
        }
    }
}

impl Group {
    /// Whether every rank can read every peer's memory. The first time, the ranks find out, in two steps of the call that
    /// they are in: all of them ask in the same call.
    pub fn reaches(&mut self) -> Result<bool, Failure> {
        if self.reach.is_none() {
            self.reach = Some(self.try_to_reach()?);
        }
        Ok(self.reach.as_ref().is_some_and(|reach| !reach.peers.is_empty()))
    }

    #[cold]
    fn try_to_reach(&mut self) -> Result<Reach, Failure> {
        let token = Box::new(random_u64().unwrap_or_default());
        let token_at = (&raw const *token).expose_provenance() as u64;
        let mine = [u64::from(std::process::id()), token_at, *token];
        let all = self.exchange::<24>(bytemuck::cast(mine))?;
        let process = |words: [u8; 24]| {
            let [pid, token_at, token] = bytemuck::cast::<_, [u64; 3]>(words);
            Process { pid: pid as libc::pid_t, token_at, token }
        };
        let mut peers: Vec<Process> = all.into_iter().map(process).collect();
        let reads = |p: &Process| p.token != 0 && p.read(p.token_at, &mut [0; 8]).is_ok();
        let ok = !cfg!(miri) && peers.iter().all(reads);
        let all = self.exchange([u8::from(ok)])?;
        if all.contains(&[0]) {
            peers.clear();
        }
        Ok(Reach { peers, _token: token })
    }

    /// Copies what lies at `at` in the memory of `peer`, who has published that in this call and waits for this rank's
    /// next step. The group [reaches](Group::reaches) it.
    pub fn read_peer(&self, peer: usize, at: u64, to: &mut [u8]) -> Result<(), Failure> {
        let reach = self.reach.as_ref().expect("a group that knows whom it reaches");
        if let Err(e) = reach.peers[peer].read(at, to) {
            return Err(self.unread(peer, to.len(), e));
        }
        // A peer that has given up ended the group before it did anything else with its memory. Pairs with the Release in
        // `Shared::end_with`: where what was read is what it wrote afterwards, that is seen here.
        fence(Ordering::Acquire);
        if self.shared.ended() { self.check_verdict() } else { Ok(()) }
    }

    #[cold]
    fn unread(&self, peer: usize, bytes: usize, e: io::Error) -> Failure {
        let soon = Deadline::after(ENDED_WITHIN);
        while !soon.passed() {
            if let Err(failure) = self.check_verdict() {
                return failure;
            }
            if let Some(how) = self.gone(peer) {
                return self.lost_peer(peer, how);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let (rank, peer) = (self.shared.name(self.rank()), self.shared.name(peer));
        self.fail(Error::os(format!("rank {rank} cannot read {bytes} bytes of rank {peer}'s memory"), e))
    }
}

#[cfg(all(test, not(loom), not(miri)))]
mod tests {
    use std::sync::Barrier;

    use super::*;
    use crate::shm::{Options, in_process};
    use tensorwire_core::{Call, Op};

    fn this_process(token: &u64) -> Process {
        let token_at = (&raw const *token).expose_provenance() as u64;
        Process { pid: std::process::id() as libc::pid_t, token_at, token: *token }
    }

    #[test]
    fn a_process_is_read_if_it_is_the_one_that_is_meant_and_has_what_is_asked_for() {
        let (token, data) = (7, [1u8, 2, 3]);
        let at = data.as_ptr().expose_provenance() as u64;
        let process = this_process(&token);
        let mut to = [0; 3];
        process.read(at, &mut to).unwrap();
        assert_eq!(to, data);
        let other = Process { token: 8, ..process };
        assert_eq!(other.read(at, &mut to).unwrap_err().to_string(), "it is another process");
        assert!(process.read(0, &mut to).unwrap_err().to_string().contains("only 8 bytes"));
        let gone = Process { pid: i32::MAX, ..process };
        assert_eq!(gone.read(at, &mut to).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }

    /// What rank 0 gets that reads 4 bytes of rank 1, after that has done something.
    fn read_after(
        before: impl Fn(&Group) + Sync,
        at: impl Fn(&[u8; 4]) -> u64 + Sync,
    ) -> Result<[u8; 4], Failure> {
        let (data, did, has_read) = ([4, 3, 2, 1], Barrier::new(2), Barrier::new(2));
        let [mut reader, mut other] = in_process(2, &Options::default()).unwrap().try_into().unwrap();
        std::thread::scope(|s| {
            s.spawn(|| {
                other.begin(Call::bare(Op::Barrier)).unwrap();
                assert!(other.reaches().unwrap());
                before(&other);
                did.wait();
                has_read.wait();
            });
            reader.begin(Call::bare(Op::Barrier)).unwrap();
            assert!(reader.reaches().unwrap() && reader.reaches().unwrap());
            did.wait();
            let mut to = [0; 4];
            let read = reader.read_peer(1, at(&data), &mut to);
            has_read.wait();
            read.map(|()| to)
        })
    }

    #[test]
    fn what_is_read_of_a_rank_that_has_given_up_counts_for_nothing() {
        let here = |data: &[u8; 4]| data.as_ptr().expose_provenance() as u64;
        assert_eq!(read_after(|_| {}, here).unwrap(), [4, 3, 2, 1]);
        let gives_up = |group: &Group| drop(group.fail(Error::invalid("no more")));
        assert!(read_after(gives_up, here).unwrap_err().to_string().contains("no more"));
        let nowhere = read_after(|_| {}, |_| 0).unwrap_err().to_string();
        assert!(nowhere.contains("rank 0 cannot read 4 bytes of rank 1's memory"), "{nowhere}");
    }
}
