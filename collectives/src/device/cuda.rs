//! GPUs, by CUDA's driver through cudarc, which loads it at run time.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};
use tensorwire_core::{Error, Result};

/// Fails where there is no driver: cudarc panics when it finds none.
fn driver() -> Result<()> {
    // SAFETY: it loads the driver's library, if there is one, and lets go of it again.
    if unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    let why = "libcuda.so.1, which comes with NVIDIA's driver, was looked for where the loader looks (LD_LIBRARY_PATH, \
               ld.so.conf); in a container, start it with its GPUs";
    Err(Error::Unavailable { what: "CUDA's driver", why: why.to_owned() })
}

pub(super) fn open(ordinal: usize) -> Result<Arc<CudaContext>> {
    driver()?;
    CudaContext::new(ordinal).map_err(|e| error(format!("GPU {ordinal}"), "opening it", e))
}

pub(super) fn count() -> Result<usize> {
    driver()?;
    let count = CudaContext::device_count().map_err(|e| error("CUDA".to_owned(), "counting GPUs", e))?;
    Ok(usize::try_from(count).unwrap_or(0))
}

pub(super) fn failed(context: &CudaContext, what: &'static str, e: DriverError) -> Error {
    error(format!("GPU {}", context.ordinal()), what, e)
}

fn error(device: String, what: &'static str, e: DriverError) -> Error {
    let text = |c: Result<&std::ffi::CStr, DriverError>| c.ok().map(|c| c.to_string_lossy().into_owned());
    let (name, meaning) = (text(e.error_name()), text(e.error_string()));
    let why = match (name, meaning) {
        (Some(name), Some(meaning)) => format!("{meaning} ({name})"),
        _ => format!("{:?}", e.0),
    };
    Error::Device { device, what, why }
}

/// Which GPU it is, whatever number it has in a process.
pub(super) fn uuid(context: &CudaContext) -> Result<[u8; 16]> {
    let uuid = context.uuid().map_err(|e| failed(context, "asking for its UUID", e))?;
    Ok(uuid.bytes.map(|b| b.cast_unsigned()))
}

pub(super) fn is_capturing(stream: &CudaStream) -> Result<bool> {
    let status = stream
        .capture_status()
        .map_err(|e| failed(stream.context(), "asking whether a graph is captured", e))?;
    Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

/// # Safety
/// As for [`Stream::copy`](super::Stream::copy).
pub(super) unsafe fn copy(
    stream: &CudaStream,
    from: *const c_void,
    to: *mut c_void,
    bytes: usize,
) -> Result<()> {
    let context = stream.context();
    context.bind_to_thread().map_err(|e| failed(context, "using it in a thread", e))?;
    // SAFETY: (1) the addresses are as the caller vouches; with unified addressing, which 64-bit Linux always has, the
    // driver knows from an address whether it is the host's or the device's; (2) the stream is alive.
    unsafe { sys::cuMemcpyAsync(to as u64, from as u64, bytes, stream.cu_stream()) }
        .result()
        .map_err(|e| failed(context, "copying", e))
}

/// Zeroes memory in the stream's order.
///
/// # Safety
/// The address is the device's and valid for so many bytes until the stream has done it.
pub(super) unsafe fn zero(stream: &CudaStream, at: *mut c_void, bytes: usize) -> Result<()> {
    let context = stream.context();
    context.bind_to_thread().map_err(|e| failed(context, "using it in a thread", e))?;
    // SAFETY: as the caller vouches.
    unsafe { result::memset_d8_async(at as u64, 0, bytes, stream.cu_stream()) }
        .map_err(|e| failed(context, "zeroing memory", e))
}

pub(super) fn host_call(stream: &CudaStream, call: Box<dyn FnOnce() + Send>) -> Result<()> {
    unsafe extern "C" fn run(call: *mut c_void) {
        // SAFETY: it is the box below, which the driver gives here once, as the stream isn't captured.
        let call = unsafe { Box::from_raw(call.cast::<Box<dyn FnOnce() + Send>>()) };
        // Nothing may unwind into the driver.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call));
    }
    let context = stream.context();
    context.bind_to_thread().map_err(|e| failed(context, "using it in a thread", e))?;
    let call = Box::into_raw(Box::new(call));
    // SAFETY: the function takes the box that it is given.
    unsafe { result::stream::launch_host_function(stream.cu_stream(), run, call.cast()) }.map_err(|e| {
        // SAFETY: the driver hasn't taken it.
        drop(unsafe { Box::from_raw(call) });
        failed(context, "having the host called", e)
    })
}

/// Memory for the device, in the stream's order, which frees it too.
pub(super) fn allocate(stream: &Arc<CudaStream>, bytes: usize) -> Result<cudarc::driver::CudaSlice<u8>> {
    // SAFETY: its bytes are zeroed before anything else is put on the stream.
    unsafe { stream.alloc::<u8>(bytes.max(1)) }.map_err(|e| failed(stream.context(), "allocating memory", e))
}

/// Host memory that the device can copy from and to by itself.
#[derive(Debug)]
pub(super) struct Pinned {
    at: *mut c_void,
    context: Arc<CudaContext>,
}

// SAFETY: memory that nobody else frees; who reads and writes it is ordered by streams.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    pub(super) fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Pinned> {
        context.bind_to_thread().map_err(|e| failed(context, "using it in a thread", e))?;
        // SAFETY: its bytes are written before they are read.
        let at = unsafe { result::malloc_host(bytes.max(1), 0) }
            .map_err(|e| failed(context, "allocating pinned memory", e))?;
        Ok(Pinned { at, context: context.clone() })
    }

    pub(super) fn at(&self) -> *mut c_void {
        self.at
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: it is from `malloc_host`, and freed once.
            let _ = unsafe { result::free_host(self.at) };
        }
    }
}
