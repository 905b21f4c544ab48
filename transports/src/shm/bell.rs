//! Where a rank sleeps until somebody rings.

use std::time::Duration;

use super::sync::{AtomicU32, Ordering};

/// A rank's doorbell. Its rank [looks](Doorbell::look) at it, then at whatever it waits for, and then sleeps: a
/// ring after that first look ends the sleep, or keeps it from beginning.
pub(super) struct Doorbell {
    rings: AtomicU32,
    #[cfg(loom)]
    kernel: (loom::sync::Mutex<()>, loom::sync::Condvar),
}

impl Doorbell {
    /// The rings so far. What a ringer did before it rang is visible to whoever looks afterwards.
    pub(super) fn look(&self) -> u32 {
        self.rings.load(Ordering::Acquire)
    }

    /// Wakes the rank, and any thread that looked before and is about to sleep.
    pub(super) fn ring(&self) {
        self.rings.fetch_add(1, Ordering::Release);
        self.wake();
    }
}

/// The futex is shared between processes, so neither call may use the PRIVATE flag.
#[cfg(not(loom))]
impl Doorbell {
    /// Sleeps until somebody rings after the look that gave `seen`, or until the time is over; which of them
    /// doesn't matter to any caller.
    pub(super) fn sleep(&self, seen: u32, timeout: Duration) {
        use rustix::thread::futex::{Flags, Timespec, wait};
        let timeout =
            Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
        let _ = wait(&self.rings, Flags::empty(), seen, Some(&timeout));
    }

    fn wake(&self) {
        use rustix::thread::futex::{Flags, wake};
        // It can fail only for an address that isn't mapped.
        let _ = wake(&self.rings, Flags::empty(), i32::MAX as u32);
    }
}

/// What the kernel promises: looking at the word and going to sleep is one step, between or after wake-ups. Time
/// is never over, so a lost ring is a deadlock, which loom reports.
#[cfg(loom)]
impl Doorbell {
    pub(super) fn new() -> Doorbell {
        let kernel = (loom::sync::Mutex::new(()), loom::sync::Condvar::new());
        Doorbell { rings: AtomicU32::new(0), kernel }
    }

    pub(super) fn sleep(&self, seen: u32, _: Duration) {
        let guard = self.kernel.0.lock().unwrap();
        if self.rings.load(Ordering::Relaxed) == seen {
            drop(self.kernel.1.wait(guard).unwrap());
        }
    }

    fn wake(&self) {
        drop(self.kernel.0.lock().unwrap());
        self.kernel.1.notify_all();
    }
}
