//! Memory on a device, in the order of one stream.

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;

use cudarc::driver::{CudaSlice, DevicePtr};
use tensorwire_core::{Element, Result};

use super::host::HostMemory;
use super::{DeviceKind, Pause, Stream, StreamKind, cuda};
use crate::nccl::comm::{Comm, Fault, Registration};

/// Elements on a device. Whatever reads or writes them is put on its stream, in order; dropping it frees the memory when the
/// stream has done all that it was given before.
///
/// Of a call that failed, or hasn't been [waited](super::DeviceCommunicator::wait) for, the elements mean nothing.
pub struct DeviceBuffer<T> {
    stream: Stream,
    memory: Owner,
    at: *mut c_void,
    len: usize,
    elements: PhantomData<T>,
}

// SAFETY: memory on a device, which only a stream's work touches, in order.
unsafe impl<T: Element> Send for DeviceBuffer<T> {}
// SAFETY: as above; a shared buffer is only read.
unsafe impl<T: Element> Sync for DeviceBuffer<T> {}

/// What frees the memory, in the order of the stream.
struct Owner {
    memory: Option<Memory>,
    stream: Stream,
    /// By whom NCCL knows the memory.
    registration: Option<(Arc<Comm>, Registration)>,
}

enum Memory {
    Cuda(CudaSlice<u8>),
    Host(HostMemory),
    Nccl { _memory: NcclMemory },
}

/// Memory from NCCL.
struct NcclMemory {
    at: *mut c_void,
    comm: Arc<Comm>,
}

// SAFETY: memory that nobody else frees.
unsafe impl Send for NcclMemory {}

impl Drop for NcclMemory {
    fn drop(&mut self) {
        // SAFETY: it is from this communicator's library; `Owner` waits for the stream that used it.
        unsafe { self.comm.free(self.at) };
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let (memory, registration) = (self.memory.take(), self.registration.take());
        match (memory, registration) {
            (Some(Memory::Host(memory)), None) => drop(self.stream.host_call(Box::new(move || drop(memory)))),
            (Some(Memory::Cuda(memory)), None) => {
                // It frees itself on the stream that it is from.
                if !self.stream.is(&Stream(StreamKind::Cuda(memory.stream().clone())))
                    && let Ok(mark) = self.stream.mark()
                {
                    let _ = Stream(StreamKind::Cuda(memory.stream().clone())).await_mark(&mark);
                }
            }
            (memory, registration) => {
                let mark = self.stream.mark();
                let release = move || {
                    let mut pause = Pause::default();
                    while mark.as_ref().is_ok_and(|mark| matches!(mark.is_reached(), Ok(false))) {
                        pause.rest();
                    }
                    if let Some((comm, registration)) = registration {
                        comm.deregister(registration);
                    }
                    drop(memory);
                };
                // Without a thread it stays behind: what is still used must not be freed.
                let _ = std::thread::Builder::new().name("tw-free".to_owned()).spawn(release);
            }
        }
    }
}

impl<T: Element> DeviceBuffer<T> {
    pub(super) fn zeros(stream: &Stream, len: usize) -> Result<DeviceBuffer<T>> {
        let bytes = len.saturating_mul(size_of::<T>());
        let (memory, at) = match &stream.0 {
            StreamKind::Cuda(cuda) => {
                let memory = cuda::allocate(cuda, bytes)?;
                let at = memory.device_ptr(cuda).0 as *mut c_void;
                (Memory::Cuda(memory), at)
            }
            StreamKind::Host(_) => {
                let memory = HostMemory::zeroed(bytes)?;
                let at = memory.at();
                (Memory::Host(memory), at)
            }
        };
        let buffer = DeviceBuffer::of(stream, memory, at, len);
        buffer.zero()?;
        Ok(buffer)
    }

    /// As [`zeros`](DeviceBuffer::zeros), of memory that NCCL likes best and knows.
    pub(super) fn registered(
        stream: &Stream,
        len: usize,
        comm: &Arc<Comm>,
    ) -> Result<DeviceBuffer<T>, Fault> {
        let at = comm.allocate(len.saturating_mul(size_of::<T>()))?;
        let memory = Memory::Nccl { _memory: NcclMemory { at, comm: comm.clone() } };
        let mut buffer = DeviceBuffer::of(stream, memory, at, len);
        buffer.zero()?;
        buffer.register(comm)?;
        Ok(buffer)
    }

    fn of(stream: &Stream, memory: Memory, at: *mut c_void, len: usize) -> DeviceBuffer<T> {
        let memory = Owner { memory: Some(memory), stream: stream.clone(), registration: None };
        DeviceBuffer { stream: stream.clone(), memory, at, len, elements: PhantomData }
    }

    /// Whether it wasn't registered before, and has elements.
    pub(super) fn register(&mut self, comm: &Arc<Comm>) -> Result<bool, Fault> {
        if self.memory.registration.is_some() || self.len == 0 {
            return Ok(false);
        }
        // SAFETY: the memory is this buffer's, which deregisters it before it lets go of it.
        let registration = unsafe { comm.register(self.at, self.bytes()) }?;
        self.memory.registration = Some((comm.clone(), registration));
        Ok(true)
    }

    fn zero(&self) -> Result<()> {
        match (&self.stream.0, &self.memory.memory) {
            // SAFETY: the memory is this buffer's, and is freed behind what its stream is given.
            (StreamKind::Cuda(stream), _) => unsafe { cuda::zero(stream, self.at, self.bytes()) },
            // Zeroed by the allocator.
            (StreamKind::Host(_), Some(Memory::Host(_))) => Ok(()),
            (StreamKind::Host(_), _) => {
                let zeros = HostMemory::zeroed(self.bytes())?;
                // SAFETY: (1) the memory is this buffer's; (2) the zeros are freed behind the copy, below.
                unsafe { self.stream.copy(zeros.at(), self.at, self.bytes())? };
                self.stream.host_call(Box::new(move || drop(zeros)))
            }
        }
    }

    /// How many elements it has.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// The stream in whose order it is read and written.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// The same buffer in another stream's order from now on, which waits for what its own was given so far.
    ///
    /// # Errors
    /// [`Error::Device`](tensorwire_core::Error::Device) if the driver refuses;
    /// [`Error::InvalidArgument`](tensorwire_core::Error::InvalidArgument) for a stream of another device.
    pub fn on(mut self, stream: &Stream) -> Result<DeviceBuffer<T>> {
        if !self.stream.device().is(&stream.device()) {
            return Err(tensorwire_core::Error::invalid("a buffer can't go to a stream of another device"));
        }
        stream.await_mark(&self.stream.mark()?)?;
        (self.memory.stream, self.stream) = (stream.clone(), stream.clone());
        Ok(self)
    }

    /// Copies these elements there; returns when it has them.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](tensorwire_core::Error::InvalidArgument) if they aren't as many;
    /// [`Error::Device`](tensorwire_core::Error::Device) if the device fails.
    pub fn write(&mut self, from: &[T]) -> Result<()> {
        self.expect(from.len())?;
        // SAFETY: (1) as many bytes are in each; (2) the caller's are borrowed until the copy is done, below.
        unsafe { self.stream.copy(from.as_ptr().cast(), self.at, self.bytes())? };
        self.settle()
    }

    /// Copies its elements into these; returns when they are there. Waits without a deadline for what its stream was given
    /// before: [wait](super::DeviceCommunicator::wait) for calls first.
    ///
    /// # Errors
    /// As for [`write`](DeviceBuffer::write).
    pub fn read(&self, to: &mut [T]) -> Result<()> {
        self.expect(to.len())?;
        // SAFETY: as in `write`.
        unsafe { self.stream.copy(self.at, to.as_mut_ptr().cast(), self.bytes())? };
        self.settle()
    }

    /// As [`read`](DeviceBuffer::read), into new memory.
    ///
    /// # Errors
    /// As for [`read`](DeviceBuffer::read).
    pub fn to_vec(&self) -> Result<Vec<T>> {
        let mut elements = vec![T::zeroed(); self.len];
        self.read(&mut elements)?;
        Ok(elements)
    }

    fn expect(&self, len: usize) -> Result<()> {
        if len == self.len {
            return Ok(());
        }
        let why =
            format!("a buffer of {} elements on {}, and {len} of the host's", self.len, self.stream.device());
        Err(tensorwire_core::Error::invalid(why))
    }

    /// Waits until the stream has done what it was given.
    fn settle(&self) -> Result<()> {
        let (mark, mut pause) = (self.stream.mark()?, Pause::default());
        while !mark.is_reached()? {
            pause.rest();
        }
        Ok(())
    }

    /// Some of its elements, to be read.
    ///
    /// # Panics
    /// If the range isn't within it.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> DeviceSlice<'_, T> {
        DeviceSlice::from(self).slice(range)
    }

    /// Some of its elements, to be written.
    ///
    /// # Panics
    /// If the range isn't within it.
    pub fn slice_mut(&mut self, range: impl RangeBounds<usize>) -> DeviceSliceMut<'_, T> {
        let (at, len) = within(self.at, self.len, size_of::<T>(), range);
        DeviceSliceMut { stream: &self.stream, at, len, elements: PhantomData }
    }
}

impl<T> fmt::Debug for DeviceBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceBuffer").field("len", &self.len).field("stream", &self.stream).finish()
    }
}

/// Elements on a device that are read.
#[derive(Clone, Copy, Debug)]
pub struct DeviceSlice<'a, T> {
    pub(super) stream: &'a Stream,
    pub(super) at: *const c_void,
    pub(super) len: usize,
    elements: PhantomData<&'a T>,
}

/// Elements on a device that are written.
#[derive(Debug)]
pub struct DeviceSliceMut<'a, T> {
    pub(super) stream: &'a Stream,
    pub(super) at: *mut c_void,
    pub(super) len: usize,
    elements: PhantomData<&'a mut T>,
}

fn within(at: *mut c_void, len: usize, size: usize, range: impl RangeBounds<usize>) -> (*mut c_void, usize) {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(before) => before + 1,
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(last) => last + 1,
        Bound::Excluded(end) => *end,
        Bound::Unbounded => len,
    };
    assert!(start <= end && end <= len, "elements {start}..{end} of a buffer of {len}");
    (at.wrapping_byte_add(start * size), end - start)
}

impl<'a, T: Element> DeviceSlice<'a, T> {
    /// Elements of memory that is somebody else's, such as a framework's tensor.
    ///
    /// # Safety
    /// 1. They are on the stream's device, or of pinned memory, and aligned for the type. 2. What else uses them is
    ///    ordered with the stream, until it has done the calls that they are given to. 3. They stay allocated until then.
    pub unsafe fn from_raw(stream: &'a Stream, at: *const c_void, len: usize) -> DeviceSlice<'a, T> {
        DeviceSlice { stream, at, len, elements: PhantomData }
    }

    /// Some of them.
    ///
    /// # Panics
    /// If the range isn't within them.
    pub fn slice(self, range: impl RangeBounds<usize>) -> DeviceSlice<'a, T> {
        let (at, len) = within(self.at.cast_mut(), self.len, size_of::<T>(), range);
        DeviceSlice { at, len, ..self }
    }
}

impl<'a, T: Element> DeviceSliceMut<'a, T> {
    /// Elements of memory that is somebody else's, such as a framework's tensor.
    ///
    /// # Safety
    /// As for [`DeviceSlice::from_raw`], and nobody else writes or reads them until the calls are done.
    pub unsafe fn from_raw(stream: &'a Stream, at: *mut c_void, len: usize) -> DeviceSliceMut<'a, T> {
        DeviceSliceMut { stream, at, len, elements: PhantomData }
    }
}

impl<'a, T: Element> From<&'a DeviceBuffer<T>> for DeviceSlice<'a, T> {
    fn from(buffer: &'a DeviceBuffer<T>) -> DeviceSlice<'a, T> {
        DeviceSlice { stream: &buffer.stream, at: buffer.at, len: buffer.len, elements: PhantomData }
    }
}

impl<'a, T: Element> From<&'a mut DeviceBuffer<T>> for DeviceSliceMut<'a, T> {
    fn from(buffer: &'a mut DeviceBuffer<T>) -> DeviceSliceMut<'a, T> {
        DeviceSliceMut { stream: &buffer.stream, at: buffer.at, len: buffer.len, elements: PhantomData }
    }
}

/// Host memory that a device copies from and to.
#[derive(Debug)]
pub(super) enum Pinned {
    Cuda(cuda::Pinned),
    Host(HostMemory),
}

impl Pinned {
    pub(super) fn new(device: &super::Device, bytes: usize) -> Result<Pinned> {
        Ok(match &device.0 {
            DeviceKind::Cuda(context) => Pinned::Cuda(cuda::Pinned::new(context, bytes)?),
            DeviceKind::Host => Pinned::Host(HostMemory::zeroed(bytes)?),
        })
    }

    pub(super) fn at(&self) -> *mut c_void {
        match self {
            Pinned::Cuda(memory) => memory.at(),
            Pinned::Host(memory) => memory.at(),
        }
    }
}
