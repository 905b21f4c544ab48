//! Host memory in the place of a device: streams that are threads, memory that is freed in their order.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ffi::c_void;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tensorwire_core::{Error, Result};

type Work = Box<dyn FnOnce() + Send>;

/// A thread that does what it is given, in order. It ends when nobody has the stream any more and all is done.
pub(crate) struct HostStream {
    work: Sender<Work>,
    /// What a library that stands in for NCCL takes for a stream.
    raw: Box<RawStream>,
}

/// As C sees it: `enqueue(stream, function, argument)` has the stream call the function, once.
#[repr(C)]
struct RawStream {
    enqueue: unsafe extern "C" fn(*mut RawStream, unsafe extern "C" fn(*mut c_void), *mut c_void),
    work: Sender<Work>,
}

/// C's argument on its way to another thread.
struct Argument(*mut c_void);

// SAFETY: whoever enqueues it means it for the stream's thread.
unsafe impl Send for Argument {}

/// # Safety
/// 1. The stream is alive. 2. The function may be called with the argument by another thread.
unsafe extern "C" fn enqueue(
    stream: *mut RawStream,
    call: unsafe extern "C" fn(*mut c_void),
    argument: *mut c_void,
) {
    let argument = Argument(argument);
    // SAFETY: the stream is alive, and the sender is used from any thread.
    let work = unsafe { &(*stream).work };
    let _ = work.send(Box::new(move || {
        let argument = argument;
        // SAFETY: as the caller vouches.
        unsafe { call(argument.0) }
    }));
}

impl HostStream {
    pub(crate) fn start() -> Result<Arc<HostStream>> {
        let (work, given) = channel::<Work>();
        std::thread::Builder::new()
            .name("tw-stream".to_owned())
            .spawn(move || given.into_iter().for_each(|work| work()))
            .map_err(|e| Error::os("starting a stream's thread", e))?;
        let raw = Box::new(RawStream { enqueue, work: work.clone() });
        Ok(Arc::new(HostStream { work, raw }))
    }

    pub(crate) fn raw(&self) -> *mut c_void {
        std::ptr::from_ref(&*self.raw).cast_mut().cast()
    }

    pub(crate) fn push(&self, work: Work) {
        let _ = self.work.send(work);
    }

    pub(crate) fn mark(&self) -> Arc<Flag> {
        let flag = Arc::new(Flag::default());
        let set = flag.clone();
        self.push(Box::new(move || set.set()));
        flag
    }

    /// # Safety
    /// As for [`Stream::copy`](super::Stream::copy).
    pub(crate) unsafe fn copy(&self, from: *const c_void, to: *mut c_void, bytes: usize) {
        let (from, to) = (Argument(from.cast_mut()), Argument(to));
        self.push(Box::new(move || {
            let (from, to) = (from, to);
            // SAFETY: as the caller vouches; the two may overlap.
            unsafe { std::ptr::copy(from.0.cast::<u8>(), to.0.cast::<u8>(), bytes) }
        }));
    }
}

/// Whether a stream has come to a place.
#[derive(Debug, Default)]
pub(crate) struct Flag(Mutex<bool>, Condvar);

impl Flag {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self) {
        *self.lock() = true;
        self.1.notify_all();
    }

    pub(crate) fn is_set(&self) -> bool {
        *self.lock()
    }

    pub(crate) fn wait(&self) {
        let set = self.1.wait_while(self.lock(), |set| !*set);
        drop(set.unwrap_or_else(PoisonError::into_inner));
    }
}

/// Zeroed memory, for a device or pinned.
#[derive(Debug)]
pub(crate) struct HostMemory {
    at: *mut u8,
    layout: Layout,
}

// SAFETY: memory that nobody else frees; who reads and writes it is ordered by streams.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    /// # Errors
    /// [`Error::Device`] if there isn't so much.
    pub(crate) fn zeroed(bytes: usize) -> Result<HostMemory> {
        let refused = |why: &str| Error::Device {
            device: "host memory".to_owned(),
            what: "allocating",
            why: format!("{bytes} bytes: {why}"),
        };
        let layout = Layout::from_size_align(bytes.max(1), 64).map_err(|_| refused("too many"))?;
        // SAFETY: the layout isn't empty.
        let at = unsafe { alloc_zeroed(layout) };
        if at.is_null() { Err(refused("out of memory")) } else { Ok(HostMemory { at, layout }) }
    }

    pub(crate) fn at(&self) -> *mut c_void {
        self.at.cast()
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: it was allocated with this layout, and is freed once.
        unsafe { dealloc(self.at, self.layout) }
    }
}
