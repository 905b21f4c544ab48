//! A small process that outlives a launcher which is killed, to end the ranks' process groups.
//!
//! `PR_SET_PDEATHSIG` makes the kernel kill each rank when its launcher dies, but not the processes that the
//! rank has started. The guard holds the reading end of a pipe whose writing end only the launcher holds.
//! Each rank announces its group there before it runs its program; the launcher withdraws the group when it
//! has ended. When the pipe closes, or the launcher says that it is done, the guard kills the groups that are
//! left, and ends.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::pipe::{PipeFlags, pipe_with};

/// The message that ends the guard. Others are process group ids: positive to watch one, negative to forget it.
const DONE: i32 = 0;

/// The launcher's side. Dropping it ends the guard, and what is left under it.
pub(super) struct Guard {
    control: OwnedFd,
    pid: libc::pid_t,
}

impl Guard {
    /// Starts a guard for up to `groups` process groups.
    pub(super) fn start(groups: usize) -> io::Result<Guard> {
        let (reader, control) = pipe_with(PipeFlags::CLOEXEC)?;
        // Allocated here because the child of a process with threads must not allocate.
        let table = Vec::with_capacity(groups);
        // SAFETY: 1. an all-zero sigset_t is valid storage, and sigfillset initialises it; 2. both sets live
        // on this stack for the whole call; 3. the child runs only `guard`, which never returns and makes
        // only async-signal-safe calls; signals are blocked across the fork so that none of the launcher's
        // handlers can run in the child.
        let pid = unsafe {
            let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
            let pid = libc::fork();
            if pid == 0 {
                guard(reader.as_raw_fd(), control.as_raw_fd(), table);
            }
            let error = io::Error::last_os_error();
            libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
            if pid < 0 {
                return Err(error);
            }
            pid
        };
        Ok(Guard { control, pid })
    }

    /// The descriptor on which a rank announces itself; see [`announce`].
    pub(super) fn control(&self) -> RawFd {
        self.control.as_raw_fd()
    }

    /// Forgets a group that has ended.
    pub(super) fn release(&self, group: i32) {
        self.say(-group);
    }

    fn say(&self, message: i32) {
        // A guard that is gone can't be told, and need not be.
        let _ = rustix::io::write(&self.control, &message.to_ne_bytes());
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Said rather than left to the closing pipe: a fork of this process may hold it open.
        self.say(DONE);
        // SAFETY: `pid` is our own child, not yet waited for; a null status is allowed.
        unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) };
    }
}

/// Puts the calling process's group under the guard. For a rank, between fork and exec: async-signal-safe.
pub(super) fn announce(control: RawFd) -> io::Result<()> {
    // SAFETY: getpid can't fail; the buffer is four bytes on this stack.
    let written = unsafe {
        let group = libc::getpid().to_ne_bytes();
        libc::write(control, group.as_ptr().cast(), group.len())
    };
    if written == 4 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The guard process.
///
/// # Safety
/// Only for the child of a fork: it closes every descriptor and never returns.
unsafe fn guard(reader: RawFd, control: RawFd, mut groups: Vec<i32>) -> ! {
    // SAFETY: 1. every call here is async-signal-safe, and nothing allocates (a push stays within the
    // capacity); 2. the descriptors are this process's own copies, and nothing uses them afterwards;
    // 3. the name is a C string; 4. the buffer is as long as the read says.
    unsafe {
        // A session of its own: what is aimed at the launcher's group or terminal doesn't reach the guard.
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, c"tensorwire-guard".as_ptr());
        // Otherwise the pipe would never close, nor those of whoever reads the launcher's output.
        libc::close(control);
        libc::syscall(libc::SYS_close_range, 0, reader - 1, 0);
        libc::syscall(libc::SYS_close_range, reader + 1, libc::c_uint::MAX, 0);
        loop {
            let mut message = [0u8; 4];
            match libc::read(reader, message.as_mut_ptr().cast(), message.len()) {
                4 => {}
                -1 if *libc::__errno_location() == libc::EINTR => continue,
                _ => break,
            }
            let group = i32::from_ne_bytes(message);
            if group == DONE {
                break;
            }
            if group > 0 && groups.len() < groups.capacity() {
                groups.push(group);
            }
            groups.retain(|&g| g != -group);
        }
        for &group in &groups {
            libc::kill(-group, libc::SIGKILL);
        }
        libc::_exit(0)
    }
}
