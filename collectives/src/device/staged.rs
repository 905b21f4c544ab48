//! Calls by way of host memory, where NCCL can't be used: copied down, made by the ranks' processors, copied up. What goes
//! element by element goes in pieces, so that one is on its way down while another is exchanged and a third goes up.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use tensorwire_core::{Element, Error, Result};

use super::buffer::Pinned;
use super::{Device, Mark, Stream};
use crate::Communicator;

/// Bytes of a piece.
const PIECE: usize = 1 << 20;

/// Pieces of pinned memory of one size that may be in use at once, and more if they are free at once.
const SLOTS: usize = 4;

/// The least bytes of pinned memory that are had at once.
const LEAST: usize = 64 << 10;

/// What makes calls for a device's buffers on the host.
#[derive(Debug)]
pub(super) struct Staged {
    device: Device,
    control: Arc<Communicator>,
    /// Each does one of the three things, in the order of the calls.
    down: Stream,
    between: Stream,
    up: Stream,
    slots: Mutex<Vec<Slot>>,
    failure: Arc<Mutex<Option<Error>>>,
}

/// Pinned memory.
#[derive(Debug)]
struct Slot {
    memory: Arc<Pinned>,
    bytes: usize,
    /// It is free from then on.
    until: Option<Mark>,
}

/// Elements of a call on the device; the addresses are its input's and output's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends {
    pub(super) from: *const c_void,
    pub(super) inputs: usize,
    pub(super) to: *mut c_void,
    pub(super) outputs: usize,
}

/// Addresses on their way to the thread that makes the call.
struct Addresses(*mut c_void, *mut c_void);

// SAFETY: pinned memory, which is kept until the call is done, and used in the order of streams.
unsafe impl Send for Addresses {}

impl Staged {
    pub(super) fn new(device: &Device, control: Arc<Communicator>) -> Result<Staged> {
        let (down, between, up) = (device.stream()?, device.stream()?, device.stream()?);
        let failure = Arc::new(Mutex::new(None));
        Ok(Staged { device: device.clone(), control, down, between, up, slots: Mutex::default(), failure })
    }

    /// The first error of a call, once.
    pub(super) fn failure(&self) -> Option<Error> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Ends the calls that are under way.
    pub(super) fn abort(&self, why: &str) {
        self.control.abort(why);
    }

    /// Puts a call on the stream: it brings the input down, calls, and takes the output up.
    ///
    /// # Safety
    /// The ends are on the stream's device and valid until the stream has done the call.
    pub(super) unsafe fn whole<T: Element>(
        &self,
        stream: &Stream,
        ends: Ends,
        call: impl FnOnce(&Communicator, &[T], &mut [T]) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        self.begin(stream)?;
        // SAFETY: as the caller vouches.
        unsafe { self.piece(ends, call)? };
        self.end(stream)
    }

    /// As [`whole`](Staged::whole), piece by piece: `call` makes one of any length, in the output, which has the input.
    ///
    /// # Safety
    /// As for [`whole`](Staged::whole).
    pub(super) unsafe fn pieces<T: Element>(
        &self,
        stream: &Stream,
        ends: Ends,
        call: impl Fn(&Communicator, &mut [T]) -> Result<()> + Clone + Send + 'static,
    ) -> Result<()> {
        self.begin(stream)?;
        let (piece, len) = (PIECE / size_of::<T>(), ends.inputs.max(ends.outputs));
        // A call of nothing is one too.
        for start in (0..len.max(1)).step_by(piece) {
            let part = |whole: usize| piece.min(whole.saturating_sub(start));
            let at = start * size_of::<T>();
            let part = Ends {
                from: ends.from.wrapping_byte_add(at),
                inputs: part(ends.inputs),
                to: ends.to.wrapping_byte_add(at),
                outputs: part(ends.outputs),
            };
            let (call, elements) = (call.clone(), part.inputs.max(part.outputs));
            // SAFETY: as the caller vouches.
            unsafe {
                self.piece::<T>(part, move |comm, input, output| {
                    if output.len() == elements {
                        output[..input.len()].copy_from_slice(input);
                        return call(comm, output);
                    }
                    // Nothing goes up: what is brought down is scratch.
                    call(comm, &mut input.to_vec())
                })?;
            }
        }
        self.end(stream)
    }

    /// Has the copies down wait for the stream.
    fn begin(&self, stream: &Stream) -> Result<()> {
        if stream.is_capturing()? {
            return Err(Error::invalid(
                "calls by way of the host can't be captured in a graph, whose launches nobody would make them for",
            ));
        }
        self.down.await_mark(&stream.mark()?)
    }

    /// Has the stream wait for the copies up.
    fn end(&self, stream: &Stream) -> Result<()> {
        stream.await_mark(&self.up.mark()?)
    }

    /// # Safety
    /// As for [`whole`](Staged::whole).
    unsafe fn piece<T: Element>(
        &self,
        ends: Ends,
        call: impl FnOnce(&Communicator, &[T], &mut [T]) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let Ends { from, inputs, to, outputs } = ends;
        let size = size_of::<T>();
        // The output begins at a cache line.
        let second = (inputs * size).next_multiple_of(64);
        let bytes = second + outputs * size;
        let (memory, index) = self.slot(bytes)?;
        let addresses = Addresses(memory.at(), memory.at().wrapping_byte_add(second));
        // SAFETY: (1) the device's end is as the caller vouches; (2) the slot is this call's until `up` is done with it.
        unsafe { self.down.copy(from, addresses.0, inputs * size)? };
        self.between.await_mark(&self.down.mark()?)?;
        let (control, failure, kept) = (self.control.clone(), self.failure.clone(), memory.clone());
        let output = addresses.1;
        self.between.host_call(Box::new(move || {
            let Addresses(input, output) = { addresses };
            // SAFETY: (1) the slot has so many bytes, aligned to 64, kept by `kept`; (2) `down` has written the input, and
            // nobody else has either until `up` comes, behind this; (3) any bytes are elements.
            let (input, output) = unsafe {
                (
                    std::slice::from_raw_parts(input.cast::<T>().cast_const(), inputs),
                    std::slice::from_raw_parts_mut(output.cast::<T>(), outputs),
                )
            };
            if let Err(error) = call(&control, input, output) {
                let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
                failure.get_or_insert(error);
            }
            drop(kept);
        }))?;
        self.up.await_mark(&self.between.mark()?)?;
        // SAFETY: as for the copy down.
        unsafe { self.up.copy(output, to, outputs * size)? };
        let until = Some(self.up.mark()?);
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)[index].until = until;
        Ok(())
    }

    /// Pinned memory of at least so many bytes, and its place: free, or free before `down` comes to what it is given next.
    fn slot(&self, bytes: usize) -> Result<(Arc<Pinned>, usize)> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |slot: &Slot| slot.bytes >= bytes && slot.bytes <= (4 * bytes).max(LEAST);
        let free = |slot: &Slot| slot.until.as_ref().is_none_or(|mark| mark.is_reached().unwrap_or(false));
        let index = match slots.iter().position(|slot| fits(slot) && free(slot)) {
            Some(index) => index,
            None if slots.iter().filter(|slot| fits(slot)).count() < SLOTS => {
                let bytes = bytes.next_power_of_two().max(LEAST);
                let memory = Arc::new(Pinned::new(&self.device, bytes)?);
                slots.push(Slot { memory, bytes, until: None });
                slots.len() - 1
            }
            None => {
                // The one that was taken first; slots that are taken go to the end.
                let index = slots.iter().position(fits).expect("there are several");
                if let Some(until) = slots[index].until.take() {
                    self.down.await_mark(&until)?;
                }
                index
            }
        };
        let slot = slots.remove(index);
        let memory = slot.memory.clone();
        slots.push(slot);
        Ok((memory, slots.len() - 1))
    }
}
