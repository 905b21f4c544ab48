//! The functions of MPI that the rest uses, behind types that own what MPI reads and writes. The one place with `unsafe`,
//! but for `offload`, whose calls block.
//!
//! MPI may look at the memory of a message until the message is complete, and a message that was sent can't be called
//! off. So messages have buffers of their own, never a caller's: where a call fails, they stay with MPI.

use std::ffi::{CStr, c_int, c_void};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::ThreadId;

use mpi::ffi;
use tensorwire_core::{Deadline, Error, Result};

/// What came of a function of MPI: what went wrong, in its words.
pub(super) type Outcome<T> = std::result::Result<T, String>;

/// Which threads may call MPI.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Threads {
    /// All, at any time: `MPI_THREAD_MULTIPLE`.
    Any,
    /// All, one at a time: `MPI_THREAD_SERIALIZED`, in a program that leaves MPI to this library.
    InTurn,
    /// This one: the level that MPI has been given allows no more, or others may be calling it.
    Only(ThreadId, &'static str),
}

/// What is known of this process's MPI.
#[derive(Debug)]
struct Started {
    threads: Threads,
    /// Whether this library has initialised it.
    ours: bool,
    /// What stands for "the output is the input" in a reduction, where that is known.
    in_place: Option<usize>,
    version: String,
}

static STARTED: OnceLock<Started> = OnceLock::new();
/// For starting, and for threads that take turns.
static TURN: Mutex<()> = Mutex::new(());
/// Set, Relaxed, by whoever has seen a peer go in a way that MPI doesn't outlive, before its call returns; read at the end
/// of the process, behind that.
static BROKEN: AtomicBool = AtomicBool::new(false);

/// Initialises MPI, unless the program has; for as many threads as it can.
///
/// # Errors
/// [`Error::Config`] where MPI has ended, or this thread may not call it.
pub(super) fn start() -> Result<()> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if is_over() {
        return Err(Error::Config("MPI was finalised already, and can't be started again".into()));
    }
    if STARTED.get().is_none() {
        let _ = STARTED.set(begin()?);
    }
    drop(turn);
    enter().map(drop).map_err(Error::Config)
}

fn begin() -> Result<Started> {
    let (mut initialized, mut provided) = (0, 0);
    let this = std::thread::current().id();
    // SAFETY: (1) these functions may be called before MPI is initialised, or initialise it; (2) the numbers are written
    // before they return; (3) the turn is this thread's, so that no other thread of this library initialises it.
    unsafe {
        ffi::MPI_Initialized(&mut initialized);
        if initialized != 0 {
            ffi::MPI_Query_thread(&mut provided);
        } else {
            let (argc, argv) = (std::ptr::null_mut(), std::ptr::null_mut());
            let code = ffi::MPI_Init_thread(argc, argv, ffi::RSMPI_THREAD_MULTIPLE, &mut provided);
            check(code, "MPI_Init_thread").map_err(Error::Config)?;
            // A failure is to come back as an error, not as the end of the process.
            ffi::MPI_Comm_set_errhandler(ffi::RSMPI_COMM_WORLD, ffi::RSMPI_ERRORS_RETURN);
            libc::atexit(super::end::at_exit);
        }
    }
    let ours = initialized == 0;
    // SAFETY: MPI's constants are set before the program begins, and never written.
    let (multiple, serialized, funneled) =
        unsafe { (ffi::RSMPI_THREAD_MULTIPLE, ffi::RSMPI_THREAD_SERIALIZED, ffi::RSMPI_THREAD_FUNNELED) };
    let threads = match provided {
        level if level == multiple => Threads::Any,
        level if level == serialized && ours => Threads::InTurn,
        level if level == serialized => Threads::Only(this, "MPI_THREAD_SERIALIZED"),
        level => {
            let mut main = 0;
            // SAFETY: MPI is initialised; the number is written before it returns.
            unsafe { ffi::MPI_Is_thread_main(&mut main) };
            let name = if level == funneled { "MPI_THREAD_FUNNELED" } else { "MPI_THREAD_SINGLE" };
            if main == 0 {
                return Err(Error::Config(format!(
                    "MPI was initialised with {name}, which lets the thread alone call it that initialised it: this is \
                     another one. Initialise it with MPI_THREAD_MULTIPLE"
                )));
            }
            Threads::Only(this, name)
        }
    };
    let version = library_version();
    Ok(Started { threads, ours, in_place: in_place(&version), version })
}

fn library_version() -> String {
    // The longest that an MPI is known to ask for is 8 KiB.
    let (mut text, mut len) = (vec![0u8; 64 << 10], 0);
    // SAFETY: the text is longer than MPI_MAX_LIBRARY_VERSION_STRING of any MPI, and ends with a zero.
    unsafe { ffi::MPI_Get_library_version(text.as_mut_ptr().cast(), &mut len) };
    until_zero(&text)
}

/// `MPI_IN_PLACE` is a macro, which no binding carries; these are its values.
fn in_place(version: &str) -> Option<usize> {
    let is = |names: &[&str]| names.iter().any(|name| version.contains(name));
    if version.starts_with("Open MPI") {
        Some(1)
    } else if is(&["MPICH", "Intel(R) MPI", "MVAPICH"]) {
        Some(usize::MAX)
    } else {
        None
    }
}

fn until_zero(text: &[u8]) -> String {
    let text = CStr::from_bytes_until_nul(text).map(|text| text.to_string_lossy().into_owned());
    text.unwrap_or_default().lines().next().unwrap_or_default().trim().to_owned()
}

/// A thread's right to call MPI, while it holds this.
pub(super) struct Entry(#[expect(dead_code, reason = "held")] Option<MutexGuard<'static, ()>>);

/// Lets this thread call MPI, if it may.
#[inline]
pub(super) fn enter() -> Outcome<Entry> {
    match STARTED.get().map(|started| started.threads) {
        Some(Threads::Any) => Ok(Entry(None)),
        other => enter_slowly(other),
    }
}

#[cold]
fn enter_slowly(threads: Option<Threads>) -> Outcome<Entry> {
    match threads {
        Some(Threads::InTurn) => Ok(Entry(Some(TURN.lock().unwrap_or_else(PoisonError::into_inner)))),
        Some(Threads::Only(only, level)) if only != std::thread::current().id() => Err(format!(
            "MPI was initialised with {level}, so that only the thread may call it that made the first communicator: \
             calls from other threads, and started ones, need MPI_THREAD_MULTIPLE (MPI_Init_thread)"
        )),
        Some(_) => Ok(Entry(None)),
        None => Err("MPI isn't initialised".into()),
    }
}

/// Fails where MPI has ended, or this thread may not call it.
#[inline]
pub(super) fn check_usable() -> Result<()> {
    if is_over() {
        return Err(Error::Config("MPI was finalised, and this group with it".into()));
    }
    enter().map(drop).map_err(Error::Config)
}

/// Whether any thread may call MPI, even while another is in it.
pub(super) fn any_thread() -> bool {
    STARTED.get().is_some_and(|started| started.threads == Threads::Any)
}

/// Whether MPI has ended: nothing of it may be called any more, but this.
pub(super) fn is_over() -> bool {
    let mut over = 0;
    // SAFETY: it may be called at any time; the number is written before it returns.
    unsafe { ffi::MPI_Finalized(&mut over) };
    over != 0
}

/// Notes that a peer is gone, or can't be reached: MPI may wait for it for ever where it ends.
pub(super) fn break_off() {
    BROKEN.store(true, Ordering::Relaxed);
}

/// Whether it is for this library to end MPI, and MPI can be ended.
pub(super) fn is_to_be_ended() -> bool {
    STARTED.get().is_some_and(|started| started.ours) && !BROKEN.load(Ordering::Relaxed) && !is_over()
}

/// The library, and the level of threads, for a person.
pub(super) fn describe() -> String {
    let Some(started) = STARTED.get() else { return "not initialised".into() };
    let threads = match started.threads {
        Threads::Any => "any thread",
        Threads::InTurn => "one thread at a time",
        Threads::Only(..) => "one thread alone",
    };
    format!("{}, for {threads}", started.version)
}

/// What to give as a reduction's input where its output is it, if that is known.
pub(super) fn in_place_input() -> Option<*const c_void> {
    STARTED.get().and_then(|started| started.in_place).map(std::ptr::without_provenance)
}

pub(super) fn check(code: c_int, what: &str) -> Outcome<()> {
    // MPI_SUCCESS is 0 in every MPI: the standard says so.
    if code == 0 { Ok(()) } else { Err(in_words(code, what)) }
}

#[cold]
fn in_words(code: c_int, what: &str) -> String {
    let (mut text, mut len) = (vec![0u8; 8 << 10], 0);
    // SAFETY: the text is longer than MPI_MAX_ERROR_STRING of any MPI, and ends with a zero.
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut len) };
    format!("{what}: {}", until_zero(&text))
}

/// A communicator of this library's own, so that no other message can be taken for one of its. It stays for as long as MPI
/// does: to free it is an affair of all ranks, and what is under way on it when one of them is done can't be called back.
#[derive(Debug)]
pub(super) struct Comm {
    raw: ffi::MPI_Comm,
    pub(super) rank: usize,
    pub(super) size: usize,
    /// The largest tag.
    pub(super) most: i32,
}

// SAFETY: a communicator's handle names the same communicator on every thread; which threads may call MPI, `enter` sees to.
unsafe impl Send for Comm {}
// SAFETY: as above.
unsafe impl Sync for Comm {}

impl Comm {
    /// A duplicate of `parent`, which all of its ranks make; `None` where they didn't in time.
    ///
    /// # Safety
    /// `parent` is a communicator, and not an inter-communicator.
    pub(super) unsafe fn duplicate(parent: ffi::MPI_Comm, deadline: Deadline) -> Outcome<Option<Comm>> {
        let _entry = enter()?;
        // Where it isn't done in time, MPI writes it later: so it is never given back.
        let made: &'static mut ffi::MPI_Comm = Box::leak(Box::new(null_comm()));
        // SAFETY: (1) the caller vouches for the parent; (2) the handle is written at any time until the request is done.
        let request = unsafe {
            let mut request = null_request();
            check(ffi::MPI_Comm_idup(parent, made, &mut request), "MPI_Comm_idup")?;
            request
        };
        if !await_request(request, deadline, "MPI_Comm_idup")? {
            return Ok(None);
        }
        let (raw, mut rank, mut size, mut found) = (*made, 0, 0, 0);
        let mut most: *const c_int = std::ptr::null();
        // SAFETY: (1) the communicator is made; (2) the numbers are written before these return; (3) the attribute is a
        // pointer to an int that is there for as long as MPI.
        unsafe {
            check(ffi::MPI_Comm_set_errhandler(raw, ffi::RSMPI_ERRORS_RETURN), "MPI_Comm_set_errhandler")?;
            check(ffi::MPI_Comm_rank(raw, &mut rank), "MPI_Comm_rank")?;
            check(ffi::MPI_Comm_size(raw, &mut size), "MPI_Comm_size")?;
            let tag_ub = ffi::MPI_TAG_UB as c_int;
            let into: *mut *const c_int = &mut most;
            check(ffi::MPI_Comm_get_attr(raw, tag_ub, into.cast(), &mut found), "MPI_Comm_get_attr")?;
            // The least that the standard lets it be.
            let most = if found != 0 { *most } else { 32_767 };
            Ok(Some(Comm { raw, rank: rank as usize, size: size as usize, most }))
        }
    }

    /// Of all processes that were started together; MPI is initialised.
    pub(super) fn world() -> ffi::MPI_Comm {
        // SAFETY: MPI's constants are set before the program begins, and never written.
        unsafe { ffi::RSMPI_COMM_WORLD }
    }

    pub(super) fn raw(&self) -> ffi::MPI_Comm {
        self.raw
    }

    /// Begins to send the first `len` bytes of `buffer`. A synchronous message is complete when its receive has begun.
    #[inline]
    pub(super) fn send(
        &self,
        buffer: Buffer,
        len: usize,
        to: usize,
        tag: i32,
        synchronous: bool,
    ) -> Outcome<Transfer> {
        let _entry = enter()?;
        assert!(len <= buffer.len);
        let (data, len) = (buffer.memory.as_ptr().cast_const().cast(), len as c_int);
        let mut request = null_request();
        // SAFETY: (1) the buffer has `len` bytes, which nobody writes until the transfer, which owns it, is complete;
        // (2) the communicator is there for as long as MPI.
        let code = unsafe {
            let begin = if synchronous { ffi::MPI_Issend } else { ffi::MPI_Isend };
            begin(data, len, ffi::RSMPI_UINT8_T, to as c_int, tag, self.raw, &mut request)
        };
        check(code, "MPI_Isend")?;
        Ok(Transfer { request, buffer: Some(buffer), incoming: false })
    }

    /// Begins to receive into `buffer` a message from a rank, or from any.
    #[inline]
    pub(super) fn receive(&self, buffer: Buffer, from: Option<usize>, tag: i32) -> Outcome<Transfer> {
        let _entry = enter()?;
        let mut request = null_request();
        let (data, len) = (buffer.memory.as_ptr().cast(), buffer.len as c_int);
        // SAFETY: (1) the buffer has `len` bytes, at which nobody looks until the transfer, which owns it, is complete;
        // (2) the communicator is there for as long as MPI.
        let code = unsafe {
            let from = from.map_or(ffi::RSMPI_ANY_SOURCE, |from| from as c_int);
            ffi::MPI_Irecv(data, len, ffi::RSMPI_UINT8_T, from, tag, self.raw, &mut request)
        };
        check(code, "MPI_Irecv")?;
        Ok(Transfer { request, buffer: Some(buffer), incoming: true })
    }

    /// Every rank's `mine`, of one length, in rank order; `None` where a rank did not come in time.
    pub(super) fn gather(&self, mine: &[u8], deadline: Deadline) -> Outcome<Option<Vec<u8>>> {
        let _entry = enter()?;
        let (input, output) = (Buffer::of(mine), Buffer::new(mine.len() * self.size));
        let (n, mut request) = (mine.len() as c_int, null_request());
        let (from, into) = (input.memory.as_ptr().cast_const().cast(), output.memory.as_ptr().cast());
        // SAFETY: the input has `n` bytes and the output as many for each rank, and both stay until the request is done.
        let code = unsafe {
            let byte = ffi::RSMPI_UINT8_T;
            ffi::MPI_Iallgather(from, n, byte, into, n, byte, self.raw, &mut request)
        };
        check(code, "MPI_Iallgather")?;
        if await_request(request, deadline, "MPI_Iallgather")? {
            return Ok(Some(output.bytes().to_vec()));
        }
        std::mem::forget((input, output));
        Ok(None)
    }

    /// Rank 0's `mine`, on every rank; `None` where that did not come in time.
    pub(super) fn broadcast(&self, mine: &[u8], deadline: Deadline) -> Outcome<Option<Vec<u8>>> {
        let whole = |buffer: Buffer| {
            let _entry = enter()?;
            let (data, n, mut request) = (buffer.memory.as_ptr().cast(), buffer.len as c_int, null_request());
            // SAFETY: the buffer has `n` bytes, and stays until the request is done.
            let code = unsafe { ffi::MPI_Ibcast(data, n, ffi::RSMPI_UINT8_T, 0, self.raw, &mut request) };
            check(code, "MPI_Ibcast")?;
            if await_request(request, deadline, "MPI_Ibcast")? {
                return Ok(Some(buffer));
            }
            std::mem::forget(buffer);
            Ok::<_, String>(None)
        };
        let Some(len) = whole(Buffer::of(&(mine.len() as u64).to_le_bytes()))? else { return Ok(None) };
        let len = u64::from_le_bytes(len.bytes().try_into().expect("eight bytes")) as usize;
        let data = if self.rank == 0 { Buffer::of(mine) } else { Buffer::new(len) };
        Ok(whole(data)?.map(|data| data.bytes().to_vec()))
    }
}

/// Begins a barrier of all processes that were started together, and gives what says whether it is done.
pub(super) fn barrier_of_all() -> Outcome<impl FnMut() -> Outcome<bool>> {
    let mut request = null_request();
    // SAFETY: MPI is initialised, and no memory is involved.
    let code = unsafe { ffi::MPI_Ibarrier(ffi::RSMPI_COMM_WORLD, &mut request) };
    check(code, "MPI_Ibarrier")?;
    Ok(move || test(&mut request).map(|done| done.is_some()))
}

/// Ends MPI.
pub(super) fn finalize() {
    // SAFETY: it is initialised and not ended, and whoever calls this sees to it that nobody else calls it.
    unsafe { ffi::MPI_Finalize() };
}

/// Ends the processes that were started together, this one among them.
pub(super) fn end_job(comm: &Comm) -> ! {
    if any_thread() {
        // SAFETY: MPI is initialised, and any thread may call it at any time.
        unsafe { ffi::MPI_Abort(comm.raw, 1) };
    }
    // SAFETY: it ends the process; nothing is left to be done behind.
    unsafe { libc::_exit(1) }
}

fn null_comm() -> ffi::MPI_Comm {
    // SAFETY: MPI's constants are set before the program begins, and never written.
    unsafe { ffi::RSMPI_COMM_NULL }
}

fn null_request() -> ffi::MPI_Request {
    // SAFETY: as above.
    unsafe { ffi::RSMPI_REQUEST_NULL }
}

/// How many bytes have come, once a request is done.
#[inline]
fn test(request: &mut ffi::MPI_Request) -> Outcome<Option<usize>> {
    let mut done = 0;
    // SAFETY: (1) a status is made of integers; (2) the request is one of MPI's, or none, and is this function's alone;
    // (3) the numbers are written before these return.
    unsafe {
        let mut status: ffi::MPI_Status = std::mem::zeroed();
        check(ffi::MPI_Test(request, &mut done, &mut status), "MPI_Test")?;
        if done == 0 {
            return Ok(None);
        }
        let mut count = 0;
        ffi::MPI_Get_count(&status, ffi::RSMPI_UINT8_T, &mut count);
        // For what was sent, the count isn't defined.
        Ok(Some(usize::try_from(count).unwrap_or(0)))
    }
}

/// Whether a request was done in time. The caller has entered.
fn await_request(mut request: ffi::MPI_Request, deadline: Deadline, what: &str) -> Outcome<bool> {
    let mut pause = super::Pause::new(true);
    loop {
        if test(&mut request).map_err(|why| format!("{what}: {why}"))?.is_some() {
            return Ok(true);
        }
        if deadline.passed() {
            return Ok(false);
        }
        pause.wait();
    }
}

/// Memory for a message, which can be left to MPI.
#[derive(Debug)]
pub(super) struct Buffer {
    memory: NonNull<u8>,
    len: usize,
}

// SAFETY: it is owned memory.
unsafe impl Send for Buffer {}

impl Buffer {
    pub(super) fn new(len: usize) -> Buffer {
        Buffer::from(vec![0; len])
    }

    pub(super) fn of(bytes: &[u8]) -> Buffer {
        Buffer::from(bytes.to_vec())
    }

    #[inline]
    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: (1) the memory is this buffer's, of `len` initialised bytes; (2) while MPI has it, it is inside a
        // transfer, where nobody looks.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.len) }
    }

    #[inline]
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is the only one.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.len) }
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Buffer {
        let bytes = Box::leak(bytes.into_boxed_slice());
        Buffer { len: bytes.len(), memory: NonNull::from(bytes).cast() }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::ptr::slice_from_raw_parts_mut(self.memory.as_ptr(), self.len);
        // SAFETY: it was made of a box of that many bytes, and MPI has nothing to do with it any more.
        drop(unsafe { Box::from_raw(bytes) });
    }
}

/// A message on its way, and its buffer. Dropped before it is complete, it is called off, if it can be, or else left to
/// MPI with its buffer.
#[derive(Debug)]
pub(super) struct Transfer {
    request: ffi::MPI_Request,
    buffer: Option<Buffer>,
    incoming: bool,
}

// SAFETY: a request's handle means the same on every thread; which threads may call MPI, `enter` sees to.
unsafe impl Send for Transfer {}

impl Transfer {
    /// The buffer, and how many bytes have come, once it is complete.
    #[inline]
    pub(super) fn complete(&mut self) -> Outcome<Option<(Buffer, usize)>> {
        let _entry = enter()?;
        match test(&mut self.request)? {
            None => Ok(None),
            Some(count) => Ok(self.buffer.take().map(|buffer| (buffer, count))),
        }
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        let Some(buffer) = self.buffer.take() else { return };
        if self.incoming
            && !is_over()
            && let Ok(_entry) = enter()
        {
            // SAFETY: the request is one of MPI's that isn't complete.
            let code = unsafe { ffi::MPI_Cancel(&mut self.request) };
            if code == 0 && (0..100).any(|_| matches!(test(&mut self.request), Ok(Some(_)))) {
                return;
            }
        }
        std::mem::forget(buffer);
    }
}
