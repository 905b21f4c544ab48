//! Which peers' processes are alive, from their pidfds.
//!
//! A pidfd names one process for good: unlike a process id it can't be reused by another, and unlike a
//! heartbeat it can't be late.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, getpid, pidfd_open};
use tensorwire_core::{Error, Result};

/// A pidfd of the calling process, to be handed to its peers.
pub fn own_pidfd() -> Result<OwnedFd> {
    pidfd_open(getpid(), PidfdFlags::empty()).map_err(|e| Error::os("opening a pidfd of this process", e))
}

/// Watches the processes of a group's ranks.
#[derive(Clone, Debug, Default)]
pub struct Liveness {
    /// Of all processes on the host; empty where ranks are threads of one process.
    pidfds: Arc<[OwnedFd]>,
    /// Which of them is each rank's.
    ranks: Vec<usize>,
}

impl Liveness {
    /// Watches `pidfds[rank]` for each rank; empty for ranks that are threads of one process.
    pub fn new(pidfds: Vec<OwnedFd>) -> Liveness {
        Liveness { ranks: (0..pidfds.len()).collect(), pidfds: pidfds.into() }
    }

    /// Watches some of the ranks, which are numbered anew.
    pub fn subset(&self, ranks: &[usize]) -> Liveness {
        let ranks = ranks.iter().filter_map(|r| self.ranks.get(*r).copied()).collect();
        Liveness { pidfds: self.pidfds.clone(), ranks }
    }

    /// Whether the process of `rank` has ended. Costs one system call.
    pub fn ended(&self, rank: usize) -> bool {
        let Some(fd) = self.ranks.get(rank).and_then(|i| self.pidfds.get(*i)) else { return false };
        let mut fds = [PollFd::new(fd, PollFlags::IN)];
        // An error (a full signal queue, say) says nothing about the peer: it is asked again soon.
        matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(n) if n > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::Pid;
    use std::process::{Command, Stdio};

    #[test]
    fn sees_a_process_end() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_child(&child);
        let fds = vec![own_pidfd().unwrap(), pidfd_open(pid, PidfdFlags::empty()).unwrap()];
        let liveness = Liveness::new(fds);
        assert!(!liveness.ended(0));
        assert!(!liveness.ended(1));
        assert!(!liveness.ended(2), "a rank that isn't watched never ends");
        let subset = liveness.subset(&[1]);
        assert!(!subset.ended(0));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(liveness.ended(1));
        assert!(!liveness.ended(0));
        assert!(subset.ended(0));
    }
}
