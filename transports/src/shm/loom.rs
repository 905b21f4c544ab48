//! The words that ranks share, as loom has them.
//!
//! Loom's atomics and cells are bigger than the real ones and have to be made, so they can't lie in the shared
//! memory. They stand beside it, each under the offset that the layout gives it: two words that the real layout
//! puts into one place are one word here too.

use std::any::Any;
use std::collections::BTreeMap;
use std::mem::zeroed;
// Not loom's: the tests' own bookkeeping.
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};

use super::bell::Doorbell;
use super::control::{Control, Decision, Flag, Header, LaneHead, Line, Payload};
use super::layout::{DEPTH, INLINE, LANE_DATA, Layout, PAGE};
use super::memory::{Memory, Part};
use super::sync::{AtomicU32, AtomicU64, Ordering, UnsafeCell};
use super::words::Words;

/// The words and bytes of one part of the memory.
#[derive(Debug)]
pub(super) struct Model {
    places: BTreeMap<usize, Box<dyn Any>>,
    left: AtomicUsize,
}

// SAFETY: (1) it is made of loom's types and atomics, whose every use loom checks; (2) loom runs the threads of a
// model one at a time.
unsafe impl Send for Model {}
// SAFETY: as for Send.
unsafe impl Sync for Model {}

/// Bytes of a lane that loom watches as one: messages are padded to as many.
const CHUNK: usize = 16;

/// The models of the parts that are in use, by memory and start.
static MODELS: Mutex<BTreeMap<(usize, u64), Arc<Model>>> = Mutex::new(BTreeMap::new());

impl Model {
    /// Makes the words of a part that was taken.
    pub(super) fn make(memory: &Memory, start: u64, layout: &Layout) {
        assert_eq!(layout.slot, PAGE);
        let mut places = BTreeMap::<usize, Box<dyn Any>>::new();
        places.insert(0, Box::new(header()));
        for rank in 0..layout.world {
            places.insert(layout.control(rank), Box::new(control()));
            // As many steps as it takes to come around.
            for step in 0..4 * DEPTH {
                places.entry(layout.flag(rank, step)).or_insert_with(|| Box::new(flag()));
                let slot = || Box::new(UnsafeCell::new([0u8; PAGE])) as Box<dyn Any>;
                places.entry(layout.slot(rank, step)).or_insert_with(slot);
            }
            for to in 0..layout.world {
                let (written, read) = (Line(AtomicU64::new(0)), Line(AtomicU64::new(0)));
                let lane = layout.lane(rank, to);
                places.insert(lane, Box::new(LaneHead { written, read }));
                for at in (0..LANE_DATA).step_by(CHUNK) {
                    let chunk = UnsafeCell::new([0u8; CHUNK]);
                    places.insert(lane + size_of::<LaneHead>() + at, Box::new(chunk));
                }
            }
        }
        let model = Model { places, left: AtomicUsize::new(0) };
        MODELS.lock().unwrap().insert((std::ptr::from_ref(memory).addr(), start), Arc::new(model));
    }
}

fn header() -> Header {
    Header {
        // SAFETY: all zeros is a valid head.
        part: unsafe { zeroed() },
        failed: AtomicU32::new(0),
        decider: AtomicU32::new(0),
        decided: AtomicU32::new(0),
        decision: UnsafeCell::new(Decision::new(0, &[])),
        sleepers: Line(AtomicU32::new(0)),
    }
}

fn control() -> Control {
    Control {
        state: AtomicU32::new(0),
        pid: AtomicU32::new(0),
        shrinking: AtomicU32::new(0),
        sleeping: AtomicU32::new(0),
        awaits: AtomicU32::new(0),
        looked: AtomicU64::new(0),
        doorbell: Line(Doorbell::new()),
        // SAFETY: a verdict is valid from any bytes.
        verdict: UnsafeCell::new(unsafe { zeroed() }),
        // SAFETY: so are records.
        records: unsafe { zeroed() },
    }
}

fn flag() -> Flag {
    let payload = UnsafeCell::new(Payload([0; INLINE]));
    Flag { step: AtomicU64::new(0), fingerprint: AtomicU32::new(0), payload }
}

/// What `words` says of the real ones holds.
impl Words {
    pub(super) fn new(part: Part, layout: Layout) -> Words {
        let model = MODELS.lock().unwrap()[&Words::key(&part)].clone();
        Words { part, layout, model }
    }

    fn key(part: &Part) -> (usize, u64) {
        (Arc::as_ptr(part.memory()).addr(), part.start())
    }

    /// # Safety
    /// None here: what isn't a `T` is a panic.
    pub(super) unsafe fn at<T: 'static>(&self, offset: usize) -> &T {
        self.model.places[&offset].downcast_ref().unwrap()
    }

    fn cell<const N: usize>(&self, offset: usize) -> &UnsafeCell<[u8; N]> {
        // SAFETY: see `at`.
        unsafe { self.at(offset) }
    }

    pub(super) fn leave(&self) {
        if self.model.left.fetch_add(1, Ordering::Relaxed) + 1 == self.layout.world {
            MODELS.lock().unwrap().remove(&Words::key(&self.part));
        }
    }

    /// Loom notes a use at this moment. What keeps the slice that is made of it from being used later than the
    /// protocol allows is its lifetime.
    pub(super) fn slot(&self, rank: usize, step: u64) -> *mut u8 {
        self.cell::<PAGE>(self.layout.slot(rank, step)).with_mut(|bytes| bytes.cast())
    }

    /// As for `slot`.
    pub(super) fn peer_slot(&self, peer: usize, step: u64) -> *const u8 {
        self.cell::<PAGE>(self.layout.slot(peer, step)).with(|bytes| bytes.cast())
    }

    /// # Safety
    /// As for the real ones; loom checks it.
    pub(super) unsafe fn write_lane(&self, from: usize, to: usize, at: usize, bytes: &[u8]) {
        for (i, piece) in bytes.chunks(CHUNK).enumerate() {
            let chunk = self.cell::<CHUNK>(self.lane_bytes(from, to, at + i * CHUNK));
            // SAFETY: loom has checked that nobody else looks at the chunk.
            chunk.with_mut(|c| unsafe { (&mut *c)[..piece.len()].copy_from_slice(piece) });
        }
    }

    /// # Safety
    /// As for the real ones; loom checks it.
    pub(super) unsafe fn read_lane(&self, from: usize, to: usize, at: usize, bytes: &mut [u8]) {
        for (i, piece) in bytes.chunks_mut(CHUNK).enumerate() {
            let chunk = self.cell::<CHUNK>(self.lane_bytes(from, to, at + i * CHUNK));
            // SAFETY: loom has checked that nobody writes the chunk.
            chunk.with(|c| piece.copy_from_slice(unsafe { &(&*c)[..piece.len()] }));
        }
    }
}
