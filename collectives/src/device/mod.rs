//! Devices, their memory and streams, and the collectives between them.
//!
//! A [`Device`] is a GPU, by CUDA's driver, which is loaded at run time; or, for tests of what is written for GPUs, host memory
//! whose streams are threads. Work on a device is put on a [`Stream`] and done in order. A [`DeviceBuffer`] belongs to one
//! stream, and whatever reads or writes it goes through that, so that nobody sees it half-written; [`DeviceBuffer::on`] hands
//! it to another. A [`DeviceCommunicator`] puts collectives on the buffers' stream.
//!
//! | file | what |
//! | --- | --- |
//! | `cuda`, `host` | the two kinds of devices |
//! | `buffer` | memory on a device |
//! | `choose` | what carries a group's data |
//! | `communicator` | groups: how they are formed, what is under way, how they end |
//! | `collectives` | the calls |
//! | `staged` | calls by way of host memory, where NCCL can't be used |
//! | `watch` | the thread that sees what becomes of the others |

mod buffer;
mod choose;
mod collectives;
mod communicator;
mod cuda;
mod group;
mod host;
mod staged;
mod watch;

use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::{CudaContext, CudaStream};
use tensorwire_core::{Element, Error, Result};

/// CUDA's driver: the version whose types are taken and given here.
pub use cudarc;

pub use buffer::{DeviceBuffer, DeviceSlice, DeviceSliceMut};
pub use choose::{DeviceOptions, Engine, EngineChoice};
pub use communicator::DeviceCommunicator;
pub use group::Group;

/// A device that ranks compute on.
#[derive(Clone)]
pub struct Device(DeviceKind);

#[derive(Clone)]
enum DeviceKind {
    Cuda(Arc<CudaContext>),
    Host,
}

/// Which device it is, wherever a rank calls it something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) is_cuda: bool,
    pub(crate) uuid: [u8; 16],
}

impl Device {
    /// The GPU with this number, by CUDA's driver: 0 is the first that `CUDA_VISIBLE_DEVICES` leaves. Ranks of one host
    /// take one each, usually by `LOCAL_RANK`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if there is no driver, with where it was looked for; [`Error::Device`] if it has no such GPU.
    pub fn cuda(ordinal: usize) -> Result<Device> {
        cuda::open(ordinal).map(Device::from)
    }

    /// How many GPUs CUDA's driver has.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if there is no driver; [`Error::Device`] if it can't be asked.
    pub fn cuda_count() -> Result<usize> {
        cuda::count()
    }

    /// Host memory in the place of a device, whose streams are threads, for tests of what is written for devices. NCCL
    /// can't use it: groups go [by way of the host](Engine::Staged).
    pub fn host() -> Device {
        Device(DeviceKind::Host)
    }

    /// A stream of its own.
    ///
    /// # Errors
    /// [`Error::Device`] if it can't be had.
    pub fn stream(&self) -> Result<Stream> {
        Ok(Stream(match &self.0 {
            DeviceKind::Cuda(context) => {
                let made = context.new_stream().map_err(|e| cuda::failed(context, "making a stream", e))?;
                StreamKind::Cuda(made)
            }
            DeviceKind::Host => StreamKind::Host(host::HostStream::start()?),
        }))
    }

    /// Makes it this thread's, for libraries that ask CUDA which one that is.
    pub(crate) fn bind(&self) -> Result<()> {
        match &self.0 {
            DeviceKind::Cuda(context) => {
                context.bind_to_thread().map_err(|e| cuda::failed(context, "using it in a thread", e))
            }
            DeviceKind::Host => Ok(()),
        }
    }

    pub(crate) fn identity(&self) -> Result<Identity> {
        Ok(match &self.0 {
            DeviceKind::Cuda(context) => Identity { is_cuda: true, uuid: cuda::uuid(context)? },
            DeviceKind::Host => Identity { is_cuda: false, uuid: [0; 16] },
        })
    }

    fn is(&self, other: &Device) -> bool {
        match (&self.0, &other.0) {
            (DeviceKind::Cuda(a), DeviceKind::Cuda(b)) => a == b,
            (DeviceKind::Host, DeviceKind::Host) => true,
            _ => false,
        }
    }
}

impl From<Arc<CudaContext>> for Device {
    /// The device of a context that cudarc has made, as frameworks on it have.
    fn from(context: Arc<CudaContext>) -> Device {
        Device(DeviceKind::Cuda(context))
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            DeviceKind::Cuda(context) => write!(f, "GPU {}", context.ordinal()),
            DeviceKind::Host => f.write_str("host memory"),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Work for a device, done in the order in which it was put there. Clones are the same stream.
#[derive(Clone)]
pub struct Stream(StreamKind);

#[derive(Clone)]
enum StreamKind {
    Cuda(Arc<CudaStream>),
    Host(Arc<host::HostStream>),
}

/// What a stream does next after what it was given so far: a mark to wait for.
#[derive(Debug)]
pub(crate) enum Mark {
    Cuda(cudarc::driver::CudaEvent),
    Host(Arc<host::Flag>),
}

impl From<Arc<CudaStream>> for Stream {
    /// A stream of cudarc's, such as the one on which a framework computes.
    fn from(stream: Arc<CudaStream>) -> Stream {
        Stream(StreamKind::Cuda(stream))
    }
}

impl Stream {
    /// The device whose work it is.
    pub fn device(&self) -> Device {
        match &self.0 {
            StreamKind::Cuda(stream) => Device(DeviceKind::Cuda(stream.context().clone())),
            StreamKind::Host(_) => Device::host(),
        }
    }

    /// Memory for `len` elements, all zero once the stream comes there.
    ///
    /// # Errors
    /// [`Error::Device`] if it can't be had.
    pub fn zeros<T: Element>(&self, len: usize) -> Result<DeviceBuffer<T>> {
        DeviceBuffer::zeros(self, len)
    }

    /// Memory with a copy of these elements, which are read before it returns.
    ///
    /// # Errors
    /// As for [`zeros`](Stream::zeros).
    pub fn upload<T: Element>(&self, from: &[T]) -> Result<DeviceBuffer<T>> {
        let mut buffer = self.zeros(from.len())?;
        buffer.write(from)?;
        Ok(buffer)
    }

    /// cudarc's stream, if it is CUDA's: to capture a graph, to launch kernels.
    pub fn as_cuda(&self) -> Option<&Arc<CudaStream>> {
        match &self.0 {
            StreamKind::Cuda(stream) => Some(stream),
            StreamKind::Host(_) => None,
        }
    }

    /// Whether it is one and the same stream.
    pub(crate) fn is(&self, other: &Stream) -> bool {
        match (&self.0, &other.0) {
            (StreamKind::Cuda(a), StreamKind::Cuda(b)) => a == b,
            (StreamKind::Host(a), StreamKind::Host(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// As C knows it.
    pub(crate) fn raw(&self) -> *mut c_void {
        match &self.0 {
            StreamKind::Cuda(stream) => stream.cu_stream().cast(),
            StreamKind::Host(stream) => stream.raw(),
        }
    }

    /// Whether what is put there now is kept for a graph, to be done when that is launched.
    pub(crate) fn is_capturing(&self) -> Result<bool> {
        match &self.0 {
            StreamKind::Cuda(stream) => cuda::is_capturing(stream),
            StreamKind::Host(_) => Ok(false),
        }
    }

    /// A mark behind all that it was given so far.
    pub(crate) fn mark(&self) -> Result<Mark> {
        match &self.0 {
            StreamKind::Cuda(stream) => stream
                .record_event(None)
                .map(Mark::Cuda)
                .map_err(|e| cuda::failed(stream.context(), "recording an event", e)),
            StreamKind::Host(stream) => Ok(Mark::Host(stream.mark())),
        }
    }

    /// Goes on only once the mark of another stream is reached.
    pub(crate) fn await_mark(&self, mark: &Mark) -> Result<()> {
        match (&self.0, mark) {
            (StreamKind::Cuda(stream), Mark::Cuda(event)) => {
                stream.wait(event).map_err(|e| cuda::failed(stream.context(), "waiting for an event", e))
            }
            (StreamKind::Host(stream), Mark::Host(flag)) => {
                let flag = flag.clone();
                stream.push(Box::new(move || flag.wait()));
                Ok(())
            }
            _ => Err(Error::invalid("two streams of different kinds of devices")),
        }
    }

    /// Has `call` run by the host when the stream comes there; it must not use the device.
    pub(crate) fn host_call(&self, call: Box<dyn FnOnce() + Send>) -> Result<()> {
        match &self.0 {
            StreamKind::Cuda(stream) => cuda::host_call(stream, call),
            StreamKind::Host(stream) => {
                stream.push(call);
                Ok(())
            }
        }
    }

    /// Copies bytes, in the stream's order, between the device and pinned memory, or within either.
    ///
    /// # Safety
    /// Both addresses are valid for so many bytes until the stream has done it, and nobody else writes there meanwhile, nor
    /// reads what is written.
    pub(crate) unsafe fn copy(&self, from: *const c_void, to: *mut c_void, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        match &self.0 {
            // SAFETY: as the caller vouches.
            StreamKind::Cuda(stream) => unsafe { cuda::copy(stream, from, to, bytes)? },
            // SAFETY: as the caller vouches.
            StreamKind::Host(stream) => unsafe { stream.copy(from, to, bytes) },
        }
        Ok(())
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream {:?} of {}", self.raw(), self.device())
    }
}

impl Mark {
    /// Whether the stream has come there.
    pub(crate) fn is_reached(&self) -> Result<bool> {
        match self {
            Mark::Cuda(event) => {
                event.try_is_complete().map_err(|e| cuda::failed(event.context(), "what it was given", e))
            }
            Mark::Host(flag) => Ok(flag.is_set()),
        }
    }
}

/// Pauses between two looks at something that is waited for: none at first, longer the longer it takes.
#[derive(Debug, Default)]
pub(crate) struct Pause(u32);

impl Pause {
    pub(crate) fn rest(&mut self) {
        self.0 = self.0.saturating_add(1);
        match self.0 {
            0..200 => std::hint::spin_loop(),
            200..400 => std::thread::yield_now(),
            n => std::thread::sleep(Duration::from_micros(u64::from((n - 390).min(50) * 20))),
        }
    }
}
