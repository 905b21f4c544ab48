//! What the words that ranks share are made of: the processor's atomics, or loom's, which try every order of
//! events that the memory model allows (`RUSTFLAGS="--cfg loom" cargo test -p tensorwire-transports --release loom`).

#[cfg(loom)]
pub(super) use loom::{
    cell::UnsafeCell,
    sync::atomic::{AtomicU32, AtomicU64, Ordering, fence},
};

#[cfg(not(loom))]
pub(super) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// A lock between threads of one rank.
#[derive(Debug, Default)]
pub(super) struct Mutex(MutexOfThreads);

#[cfg(loom)]
type MutexOfThreads = loom::sync::Mutex<()>;
#[cfg(not(loom))]
type MutexOfThreads = std::sync::Mutex<()>;

impl Mutex {
    /// A thread that panicked while it held the lock left nothing half done.
    pub(super) fn lock(&self) -> impl Drop + '_ {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The standard cell, with loom's way of asking for what is in it.
#[cfg(not(loom))]
#[repr(transparent)]
pub(super) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    /// Calls `look` with what is there, which nobody writes meanwhile.
    #[inline]
    pub(super) fn with<R>(&self, look: impl FnOnce(*const T) -> R) -> R {
        look(self.0.get())
    }

    /// Calls `change` with what is there, which nobody else looks at meanwhile.
    #[inline]
    pub(super) fn with_mut<R>(&self, change: impl FnOnce(*mut T) -> R) -> R {
        change(self.0.get())
    }
}
