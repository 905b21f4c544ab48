//! Signals that the launcher passes on, as bytes on a pipe that a poll loop can wait for.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::pipe::{PipeFlags, pipe_with};

const FORWARDED: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// Lives as long as the process, so that a handler that is still running never writes to a closed descriptor.
static PIPE: OnceLock<(OwnedFd, OwnedFd)> = OnceLock::new();
/// Handlers belong to the whole process: one at a time may have them.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Catches the signals while it lives, and puts the former handlers back when dropped.
pub(super) struct Signals {
    reader: BorrowedFd<'static>,
    former: Vec<(libc::c_int, libc::sigaction)>,
}

impl Signals {
    pub(super) fn catch() -> io::Result<Signals> {
        let pipe = match PIPE.get() {
            Some(pipe) => pipe,
            None => {
                let new = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
                PIPE.get_or_init(|| new)
            }
        };
        if TAKEN.swap(true, Ordering::AcqRel) {
            return Err(io::Error::other("another launcher in this process is forwarding signals already"));
        }
        let mut signals = Signals { reader: pipe.0.as_fd(), former: Vec::new() };
        while signals.next().is_some() {} // a leftover of an earlier launcher
        for signal in FORWARDED {
            // SAFETY: 1. an all-zero sigaction is valid storage, and the kernel fills `old`; 2. `on_signal`
            // has the type of a handler and is async-signal-safe.
            unsafe {
                let mut old: libc::sigaction = std::mem::zeroed();
                if libc::sigaction(signal, std::ptr::null(), &mut old) != 0 {
                    return Err(io::Error::last_os_error());
                }
                // What the user chose to ignore (nohup) stays ignored, here and in the ranks.
                if old.sa_sigaction == libc::SIG_IGN {
                    continue;
                }
                let mut new: libc::sigaction = std::mem::zeroed();
                new.sa_sigaction = on_signal as *const () as libc::sighandler_t;
                new.sa_flags = libc::SA_RESTART;
                if libc::sigaction(signal, &new, std::ptr::null_mut()) != 0 {
                    return Err(io::Error::last_os_error());
                }
                signals.former.push((signal, old));
            }
        }
        Ok(signals)
    }

    /// Becomes readable when a signal has come.
    pub(super) fn reader(&self) -> BorrowedFd<'static> {
        self.reader
    }

    /// The next signal that has come, if one has.
    pub(super) fn next(&mut self) -> Option<libc::c_int> {
        let mut byte = [0u8];
        matches!(rustix::io::read(self.reader, &mut byte), Ok(1)).then(|| libc::c_int::from(byte[0]))
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for (signal, old) in &self.former {
            // SAFETY: `old` is what sigaction gave for this signal.
            unsafe { libc::sigaction(*signal, old, std::ptr::null_mut()) };
        }
        TAKEN.store(false, Ordering::Release);
    }
}

extern "C" fn on_signal(signal: libc::c_int) {
    if let Some((_, writer)) = PIPE.get() {
        // SAFETY: 1. `write` is async-signal-safe, and the descriptor is never closed; 2. errno is put back,
        // so the interrupted code doesn't see this call's; 3. a full pipe drops the byte, it doesn't block.
        unsafe {
            let errno = *libc::__errno_location();
            let byte = signal as u8;
            libc::write(writer.as_raw_fd(), (&raw const byte).cast(), 1);
            *libc::__errno_location() = errno;
        }
    }
}
