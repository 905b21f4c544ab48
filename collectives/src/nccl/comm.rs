//! One NCCL communicator. It is nonblocking, as NCCL asks for where it may be aborted: a call that isn't done at once says so
//! and is polled, between other threads' calls and with somebody looking whether it is worth to go on.

use std::ffi::{c_int, c_void};
use std::sync::mpsc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tensorwire_core::{DType, Deadline, Error, Result};

use super::library::Library;
use super::sys::{self, Code, Config, IN_PROGRESS, RawComm, RawStream, SUCCESS, UniqueId};
use crate::device::{Device, Pause};

/// Bytes of what tells a communicator from others.
pub(crate) const ID_BYTES: usize = size_of::<UniqueId>();

/// How long an abort is waited for; one that takes longer goes on by itself.
const ABORT_WITHIN: Duration = Duration::from_secs(10);

/// Why NCCL did not do something.
#[derive(Debug)]
pub(crate) enum Fault {
    /// In its own words.
    Nccl(String),
    /// Who looks on says not to wait for it.
    Stopped(Error),
}

impl From<Error> for Fault {
    fn from(e: Error) -> Fault {
        Fault::Stopped(e)
    }
}

/// Says, while something is waited for, whether to go on.
pub(crate) type LookOn<'a> = &'a dyn Fn() -> Result<()>;

/// One of NCCL's operations, between addresses on the device. Counts are of elements of the type, bytes where there is none.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Primitive {
    AllReduce { from: *const c_void, to: *mut c_void, count: usize, by: Reducing },
    Reduce { from: *const c_void, to: *mut c_void, count: usize, by: Reducing, root: usize },
    ReduceScatter { from: *const c_void, to: *mut c_void, block: usize, by: Reducing },
    Broadcast { from: *const c_void, to: *mut c_void, bytes: usize, root: usize },
    AllGather { from: *const c_void, to: *mut c_void, block: usize },
    Send { from: *const c_void, bytes: usize, to: usize },
    Recv { to: *mut c_void, bytes: usize, from: usize },
}

/// How elements are reduced.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reducing {
    pub(crate) dtype: DType,
    pub(crate) op: Operation,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Operation {
    /// One of NCCL's own.
    Known(c_int),
    /// A sum of elements times a factor, which has the elements' type.
    PreScaled([u8; 8]),
}

/// One rank's part of an NCCL communicator.
#[derive(Debug)]
pub(crate) struct Comm {
    library: Library,
    device: Device,
    /// None once it has been aborted or destroyed. Locked for every call, so that none is under way when it is aborted.
    raw: Mutex<Option<Raw>>,
}

#[derive(Clone, Copy, Debug)]
struct Raw(RawComm);

// SAFETY: NCCL's communicators may be used by any thread, one at a time, which the lock above sees to.
unsafe impl Send for Raw {}

/// What tells a new communicator from others; made by one rank.
pub(crate) fn unique_id(library: &Library, device: &Device) -> Result<[u8; ID_BYTES], Fault> {
    device.bind()?;
    let mut id = UniqueId([0; ID_BYTES]);
    // SAFETY: it writes one id.
    check(library, unsafe { (library.table().get_unique_id)(&mut id) })?;
    Ok(id.0)
}

/// A result of NCCL's: whether more is to come.
fn check(library: &Library, code: Code) -> Result<bool, Fault> {
    match code {
        SUCCESS => Ok(false),
        IN_PROGRESS => Ok(true),
        other => Err(Fault::Nccl(library.explain(other))),
    }
}

impl Comm {
    /// Joins the communicator of `world` ranks with this id; returns when all have.
    pub(crate) fn join(
        library: &Library,
        device: &Device,
        id: [u8; ID_BYTES],
        rank: usize,
        world: usize,
        look_on: LookOn<'_>,
    ) -> Result<Comm, Fault> {
        device.bind()?;
        let mut raw: RawComm = std::ptr::null_mut();
        let mut config = Config::nonblocking();
        let (id, rank, world) = (UniqueId(id), rank as c_int, world as c_int);
        // SAFETY: (1) it writes one pointer and reads a configuration, which states its size and version; (2) the device is
        // this thread's.
        let code = unsafe { (library.table().init_rank)(&mut raw, world, id, rank, &mut config) };
        let raw = (!raw.is_null()).then_some(Raw(raw));
        let comm = Comm { library: library.clone(), device: device.clone(), raw: Mutex::new(raw) };
        comm.settle(code, look_on)?;
        Ok(comm)
    }

    /// Forms communicators of the ranks of one color, which is at least 0, ordered by `key`; those without get none.
    pub(crate) fn split(
        &self,
        color: Option<i32>,
        key: i32,
        look_on: LookOn<'_>,
    ) -> Result<Option<Comm>, Fault> {
        self.device.bind()?;
        // NCCL writes it when it is done, which may be after this has given up: then it stays where it is.
        let child: *mut RawComm = Box::into_raw(Box::new(std::ptr::null_mut()));
        let code = self.with(|raw| {
            let mut config = Config::nonblocking();
            // SAFETY: (1) the communicator is alive, by the lock; (2) the pointer that it writes is freed below alone, when it
            // is done; (3) the configuration states its size and version.
            unsafe { (self.library.table().split)(raw, color.unwrap_or(-1), key, child, &mut config) }
        })?;
        self.settle(code, look_on)?;
        // SAFETY: (1) it was made above, and is freed once; (2) NCCL has written it and is done with it.
        let raw = Raw(*unsafe { Box::from_raw(child) });
        if color.is_none() || raw.0.is_null() {
            return Ok(None);
        }
        let (library, device) = (self.library.clone(), self.device.clone());
        let comm = Comm { library, device, raw: Mutex::new(Some(raw)) };
        comm.settle(IN_PROGRESS, look_on)?;
        Ok(Some(comm))
    }

    /// Puts these on the stream, as one group if they are several.
    ///
    /// # Safety
    /// 1. The addresses are the device's, and valid for what is read and written there until the stream is done with it.
    /// 2. The stream is of the communicator's device.
    pub(crate) unsafe fn launch(
        &self,
        primitives: &[Primitive],
        stream: RawStream,
        look_on: LookOn<'_>,
    ) -> Result<(), Fault> {
        self.device.bind()?;
        let table = self.library.table();
        let mut made = Vec::new();
        let code = self.with(|raw| {
            let mut ops = Vec::with_capacity(primitives.len());
            for primitive in primitives {
                let op = match primitive {
                    Primitive::AllReduce { by, .. }
                    | Primitive::Reduce { by, .. }
                    | Primitive::ReduceScatter { by, .. } => self.operation(raw, by, &mut made),
                    _ => Ok(sys::SUM),
                };
                match op {
                    Ok(op) => ops.push(op),
                    Err(code) => return code,
                }
            }
            // SAFETY: groups belong to the thread, and this one is ended below whatever happens within.
            let mut code = unsafe { (table.group_start)() };
            if code != SUCCESS {
                return code;
            }
            for (primitive, op) in primitives.iter().zip(&ops) {
                // SAFETY: (1) the communicator is alive, by the lock; (2) the addresses and the stream are as the caller
                // vouches.
                code = unsafe { self.call(raw, primitive, *op, stream) };
                if code != SUCCESS && code != IN_PROGRESS {
                    break;
                }
            }
            // SAFETY: as above.
            let ended = unsafe { (table.group_end)() };
            // What went wrong within says more than that the group did.
            if code != SUCCESS && code != IN_PROGRESS { code } else { ended }
        })?;
        let done = self.settle(code, look_on);
        let _ = self.with(|raw| {
            for op in made {
                // SAFETY: it was made for this communicator, and the last call that uses it has returned.
                unsafe { (table.destroy_op)(op, raw) };
            }
            SUCCESS
        });
        done
    }

    /// NCCL's number of an operation, made where it isn't one of its own.
    fn operation(&self, raw: RawComm, by: &Reducing, made: &mut Vec<c_int>) -> Result<c_int, Code> {
        let mut factor = match by.op {
            Operation::Known(op) => return Ok(op),
            Operation::PreScaled(factor) => factor,
        };
        let mut op = 0;
        let (at, dtype) = (factor.as_mut_ptr().cast(), sys::dtype(by.dtype));
        // SAFETY: (1) the communicator is alive, by the lock of the caller; (2) the factor has at least the type's bytes and is
        // read before the call returns.
        match unsafe {
            (self.library.table().create_pre_mul_sum)(&mut op, at, dtype, sys::HOST_IMMEDIATE, raw)
        } {
            SUCCESS => {
                made.push(op);
                Ok(op)
            }
            code => Err(code),
        }
    }

    /// # Safety
    /// As for [`launch`](Comm::launch), and the communicator is alive.
    unsafe fn call(&self, raw: RawComm, what: &Primitive, op: c_int, stream: RawStream) -> Code {
        let table = self.library.table();
        // SAFETY: as the caller vouches.
        unsafe {
            match *what {
                Primitive::AllReduce { from, to, count, by } => {
                    (table.all_reduce)(from, to, count, sys::dtype(by.dtype), op, raw, stream)
                }
                Primitive::Reduce { from, to, count, by, root } => {
                    (table.reduce)(from, to, count, sys::dtype(by.dtype), op, root as c_int, raw, stream)
                }
                Primitive::ReduceScatter { from, to, block, by } => {
                    (table.reduce_scatter)(from, to, block, sys::dtype(by.dtype), op, raw, stream)
                }
                Primitive::Broadcast { from, to, bytes, root } => {
                    (table.broadcast)(from, to, bytes, sys::UINT8, root as c_int, raw, stream)
                }
                Primitive::AllGather { from, to, block } => {
                    (table.all_gather)(from, to, block, sys::UINT8, raw, stream)
                }
                Primitive::Send { from, bytes, to } => {
                    (table.send)(from, bytes, sys::UINT8, to as c_int, raw, stream)
                }
                Primitive::Recv { to, bytes, from } => {
                    (table.recv)(to, bytes, sys::UINT8, from as c_int, raw, stream)
                }
            }
        }
    }

    /// The error that NCCL has met since, if it has.
    pub(crate) fn async_error(&self) -> Option<String> {
        match self.state().and_then(|code| check(&self.library, code)) {
            Err(Fault::Nccl(why)) => Some(why),
            _ => None,
        }
    }

    fn state(&self) -> Result<Code, Fault> {
        let mut state = SUCCESS;
        let code = self.with(|raw| {
            // SAFETY: (1) the communicator is alive, by the lock; (2) it writes one number.
            unsafe { (self.library.table().async_error)(raw, &mut state) }
        })?;
        Ok(if code == SUCCESS { state } else { code })
    }

    /// Waits until what gave `code` is done.
    fn settle(&self, code: Code, look_on: LookOn<'_>) -> Result<(), Fault> {
        let mut more = check(&self.library, code)?;
        let mut pause = Pause::default();
        while more {
            more = check(&self.library, self.state()?)?;
            if more {
                look_on()?;
                pause.rest();
            }
        }
        Ok(())
    }

    /// Calls `body` with the communicator, alone.
    fn with(&self, body: impl FnOnce(RawComm) -> Code) -> Result<Code, Fault> {
        match *self.lock() {
            Some(Raw(raw)) => Ok(body(raw)),
            None => Err(Fault::Nccl("the communicator was aborted".to_owned())),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Raw>> {
        self.raw.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends it for this rank, with all that is under way: streams go on behind that. Others are to do the same.
    pub(crate) fn abort(&self) {
        let Some(raw) = self.lock().take() else { return };
        let (table, device) = (*self.library.table(), self.device.clone());
        let (tell, told) = mpsc::channel();
        let abort = move || {
            // Taken whole, as it is what may be sent.
            let raw = raw;
            let _ = device.bind();
            // SAFETY: nobody else has the communicator any more, and nobody is in a call of it.
            unsafe { (table.abort)(raw.0) };
            let _ = tell.send(());
        };
        // If there can be no thread, the communicator stays behind: this one must not wait for it.
        if std::thread::Builder::new().name("tw-nccl-abort".to_owned()).spawn(abort).is_ok() {
            let _ = told.recv_timeout(ABORT_WITHIN);
        }
    }

    /// Lets go of it when all ranks do: what is under way is done first. Aborts it if that isn't so by the deadline.
    pub(crate) fn finish(&self, deadline: Deadline) -> Result<(), Fault> {
        self.device.bind()?;
        let late = || Error::invalid("the other ranks did not let go of the communicator in time");
        let look_on = || if deadline.passed() { Err(late()) } else { Ok(()) };
        // SAFETY: the communicator is alive, by the lock.
        let finalized = self.with(|raw| unsafe { (self.library.table().finalize)(raw) });
        if let Err(fault) = finalized.and_then(|code| self.settle(code, &look_on)) {
            self.abort();
            return Err(fault);
        }
        if let Some(raw) = self.lock().take() {
            // SAFETY: nobody else has it any more; it is finalized, so that this blocks for nobody.
            unsafe { (self.library.table().destroy)(raw.0) };
        }
        Ok(())
    }

    /// Makes memory known to NCCL, which may then use it without copies.
    ///
    /// # Safety
    /// The address is the device's, and valid for so many bytes until it is [deregistered](Comm::deregister).
    pub(crate) unsafe fn register(&self, at: *mut c_void, bytes: usize) -> Result<Registration, Fault> {
        let register = self.library.table().register.ok_or_else(|| self.lacks("ncclCommRegister"))?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: (1) the communicator is alive, by the lock; (2) the memory is as the caller vouches.
        let code = self.with(|raw| unsafe { register(raw, at, bytes, &mut handle) })?;
        check(&self.library, code)?;
        Ok(Registration(handle))
    }

    /// Undoes [`register`](Comm::register); nothing once the communicator is gone, which has undone it.
    pub(crate) fn deregister(&self, registration: Registration) {
        if let Some(deregister) = self.library.table().deregister {
            // SAFETY: (1) the communicator is alive, by the lock; (2) the handle is of one of its registrations, given up here.
            let _ = self.with(|raw| unsafe { deregister(raw, registration.0) });
        }
    }

    /// Memory that suits NCCL best, not registered yet.
    pub(crate) fn allocate(&self, bytes: usize) -> Result<*mut c_void, Fault> {
        self.device.bind()?;
        let allocate = self.library.table().mem_alloc.ok_or_else(|| self.lacks("ncclMemAlloc"))?;
        let mut at = std::ptr::null_mut();
        // SAFETY: it writes one pointer; the device is this thread's.
        check(&self.library, unsafe { allocate(&mut at, bytes.max(1)) })?;
        Ok(at)
    }

    /// # Safety
    /// It is from [`allocate`](Comm::allocate), and nothing uses it any more.
    pub(crate) unsafe fn free(&self, at: *mut c_void) {
        if let (Some(free), Ok(())) = (self.library.table().mem_free, self.device.bind()) {
            // SAFETY: as the caller vouches.
            unsafe { free(at) };
        }
    }

    /// Whether memory can be registered.
    pub(crate) fn registers(&self) -> bool {
        self.library.registers()
    }

    fn lacks(&self, what: &str) -> Fault {
        let (version, path) = (self.library.version(), self.library.path().display());
        Fault::Nccl(format!("NCCL {version} ({path}) has no {what}: 2.19 and later have"))
    }
}

/// What NCCL calls memory that is registered.
#[derive(Debug)]
pub(crate) struct Registration(*mut c_void);

// SAFETY: a handle that NCCL alone looks into.
unsafe impl Send for Registration {}
// SAFETY: as above.
unsafe impl Sync for Registration {}

impl Drop for Comm {
    fn drop(&mut self) {
        self.abort();
    }
}
