//! The words that ranks share, as loom has them, and the tests of the protocol under loom.
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
use super::layout::{DEPTH, INLINE, LANE_DATA, Layout, PAGE, Span};
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
        remaining: AtomicU64::new(0),
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

    pub(super) fn leave(&self, _: usize, _: impl Fn(usize) -> bool) {
        if self.model.left.fetch_add(1, Ordering::Relaxed) + 1 == self.layout.world {
            MODELS.lock().unwrap().remove(&Words::key(&self.part));
        }
    }

    /// Loom notes a use at this moment. What keeps the slice that is made of it from being used later than the
    /// protocol allows is its lifetime.
    pub(super) fn slot(&self, rank: usize, step: u64, span: Span) -> *mut u8 {
        self.cell::<PAGE>(self.layout.slot(rank, step) + span.start(step)).with_mut(|bytes| bytes.cast())
    }

    /// As for `slot`.
    pub(super) fn peer_slot(&self, peer: usize, step: u64, span: Span) -> *const u8 {
        self.cell::<PAGE>(self.layout.slot(peer, step) + span.start(step)).with(|bytes| bytes.cast())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::liveness::Liveness;
    use crate::processors::Processors;
    use crate::shm::memory::{About, Kind};
    use crate::shm::{Group, Incoming, Options, Outgoing};
    use loom::thread::spawn;
    use std::mem::ManuallyDrop;
    use std::ops::{Deref, DerefMut, Range};
    use std::time::Duration;
    use tensorwire_core::{Call, DType, Error, Op};

    /// A rank's membership. A rank that panics doesn't leave: loom can't go on then, and would say that instead.
    struct Rank(ManuallyDrop<Group>);

    impl Deref for Rank {
        type Target = Group;
        fn deref(&self) -> &Group {
            &self.0
        }
    }

    impl DerefMut for Rank {
        fn deref_mut(&mut self) -> &mut Group {
            &mut self.0
        }
    }

    impl Drop for Rank {
        fn drop(&mut self) {
            if !std::thread::panicking() {
                // SAFETY: nobody looks at it after this.
                unsafe { ManuallyDrop::drop(&mut self.0) }
            }
        }
    }

    /// Tries what the ranks of a group may do, in every order that takes a thread that could go on off its
    /// processor up to `preemptions` times, or `LOOM_MAX_PREEMPTIONS`: with any number, most tests would not end
    /// in a day. What happens before `ranks` makes a second thread has one order only.
    ///
    /// Time stands still: a rank that nobody wakes is a deadlock, which loom reports.
    fn check<const N: usize>(preemptions: usize, ranks: impl Fn([Rank; N]) + Send + Sync + 'static) {
        let layout = Layout::new(N, DEPTH as usize * PAGE).unwrap();
        let memory = Arc::new(Memory::create().unwrap());
        let about = About { kind: Kind::Group, world: N, bytes: layout.slots() };
        let start = memory.take(about, layout.len).unwrap();
        let options = Options { timeout: Duration::from_secs(24 * 3600), ..Options::default() };
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound.get_or_insert(preemptions);
        builder.check(move || {
            Model::make(&memory, start, &layout);
            ranks(std::array::from_fn(|rank| {
                let words = Words::new(memory.map(start, layout.len).unwrap(), layout);
                let mut group =
                    Group::new(words, rank, Liveness::default(), vec![Processors::allowed(); N], &options);
                let (op, dtype, reduce, count, root, layout) = (Op::Barrier, None, None, 0, None, 0);
                group.begin(Call { op, dtype, reduce, count, root, layout, wire: None }).unwrap();
                group.use_slots(PAGE);
                Rank(ManuallyDrop::new(group))
            }));
        });
    }

    /// Publishes a step, which says in slot and flag whose it is and which.
    fn say(rank: &mut Rank) {
        rank.use_slots(PAGE);
        let step = rank.next_step().unwrap();
        let said = [rank.rank() as u8, step as u8];
        rank.slot()[..2].copy_from_slice(&said);
        rank.publish_inline(&said);
    }

    /// Waits for what `peer` says in `step`.
    fn hear(rank: &mut Rank, peer: usize, step: u64) {
        rank.wait(peer, step).unwrap();
        let said = [peer as u8, step as u8];
        assert_eq!(rank.peer_slot(peer, step)[..2], said);
        assert_eq!(rank.peer_inline(peer, step)[..2], said);
    }

    /// In each step says something and hears the others.
    fn talk(rank: &mut Rank, steps: Range<u64>) {
        for step in steps {
            say(rank);
            let (me, world) = (rank.rank(), rank.world());
            (0..world).filter(|peer| *peer != me).for_each(|peer| hear(rank, peer, step));
        }
        rank.end();
    }

    #[test]
    fn what_is_published_is_seen() {
        check(3, |[mut a, mut b]| {
            let b = spawn(move || {
                talk(&mut b, 1..3);
                b
            });
            talk(&mut a, 1..3);
            b.join().unwrap();
        });
    }

    #[test]
    fn what_each_of_three_publishes_is_seen() {
        check(1, |[mut a, b, c]| {
            let ranks = [b, c].map(|mut rank| {
                spawn(move || {
                    talk(&mut rank, 1..2);
                    rank
                })
            });
            talk(&mut a, 1..2);
            let _ranks = ranks.map(|rank| rank.join().unwrap());
        });
    }

    #[test]
    fn a_place_is_written_again_when_its_reader_is_done() {
        check(3, |[mut a, mut b]| {
            say(&mut a);
            say(&mut b);
            hear(&mut a, 1, 1);
            hear(&mut b, 0, 1);
            // As far ahead as `a` may be.
            (2..=DEPTH).for_each(|_| say(&mut a));
            let b = spawn(move || {
                // A step that `b` publishes says that it has read the ones before.
                say(&mut b);
                hear(&mut b, 0, 2);
                say(&mut b);
                hear(&mut b, 0, DEPTH + 1);
                hear(&mut b, 0, DEPTH + 2);
                b.end();
                b
            });
            say(&mut a);
            say(&mut a);
            a.end();
            b.join().unwrap();
        });
    }

    #[test]
    fn a_rank_that_sleeps_is_woken() {
        // The ranks stay until all are awake: one that leaves wakes the others.
        check(3, |[mut a, b, c]| {
            let ranks = [b, c].map(|mut rank| {
                spawn(move || {
                    rank.wait(0, 1).unwrap();
                    rank
                })
            });
            a.next_step().unwrap();
            a.publish();
            a.end();
            let _ranks = ranks.map(|rank| rank.join().unwrap());
        });
    }

    /// Of a message that takes three quarters of a lane with its header.
    const PAYLOAD: usize = LANE_DATA / 4;

    fn send(rank: &mut Rank, to: usize, said: u8) {
        let out = Outgoing { to, data: &[said; PAYLOAD] };
        rank.send_recv(DType::U8, Some(out), None).unwrap();
    }

    fn receive(rank: &mut Rank, from: usize, said: u8) {
        let mut data = [0; PAYLOAD];
        rank.send_recv(DType::U8, None, Some(Incoming { from, data: &mut data })).unwrap();
        assert_eq!(data, [said; PAYLOAD]);
    }

    #[test]
    fn a_lane_is_written_again_when_it_was_read() {
        check(3, |[mut a, mut b]| {
            send(&mut a, 1, 1);
            let b = spawn(move || {
                receive(&mut b, 0, 1);
                receive(&mut b, 0, 2);
                b
            });
            // Goes around the end of the lane.
            send(&mut a, 1, 2);
            b.join().unwrap();
        });
    }

    #[test]
    fn a_message_longer_than_its_lane_flows_through_it() {
        // Some of it is written where its header was, and some where other payload was.
        const LONG: usize = 5 * PAYLOAD;
        check(2, |[mut a, mut b]| {
            let b = spawn(move || {
                let mut data = [0; LONG];
                b.send_recv(DType::U8, None, Some(Incoming { from: 0, data: &mut data })).unwrap();
                assert_eq!(data, [1; LONG]);
                b
            });
            a.send_recv(DType::U8, Some(Outgoing { to: 1, data: &[1; LONG] }), None).unwrap();
            b.join().unwrap();
        });
    }

    #[test]
    fn messages_cross() {
        fn swap(rank: &mut Rank, peer: usize) {
            let (mut data, out) = ([0; PAYLOAD], Outgoing { to: peer, data: &[2; PAYLOAD] });
            rank.send_recv(DType::U8, Some(out), Some(Incoming { from: peer, data: &mut data })).unwrap();
            assert_eq!(data, [1; PAYLOAD]);
            receive(rank, peer, 2);
        }
        check(3, |[mut a, mut b]| {
            send(&mut a, 1, 1);
            send(&mut b, 0, 1);
            let b = spawn(move || {
                swap(&mut b, 0);
                b
            });
            swap(&mut a, 1);
            b.join().unwrap();
        });
    }

    /// Who ended the group, and why.
    fn verdict(e: &Error) -> (usize, String) {
        match e {
            Error::Aborted { by, why, .. } => (*by, why.clone()),
            wrong => panic!("{wrong}"),
        }
    }

    #[test]
    fn of_failures_at_once_one_is_everyones() {
        check(3, |[a, b, mut c]| {
            let b = spawn(move || {
                b.handle().abort("b");
                (verdict(&b.fail(Error::invalid("again"))), b)
            });
            let c = spawn(move || (verdict(&c.wait(0, 1).unwrap_err()), c));
            a.handle().abort("a");
            let ours = verdict(&a.fail(Error::invalid("again")));
            assert!([(0, "a".into()), (1, "b".into())].contains(&ours));
            let ((theirs, _b), (last, _c)) = (b.join().unwrap(), c.join().unwrap());
            assert_eq!([&theirs, &last], [&ours; 2]);
        });
    }

    #[test]
    fn of_failures_of_one_rank_at_once_one_is_everyones() {
        check(3, |[a, mut b]| {
            let handle = a.handle();
            let other = spawn(move || handle.abort("other"));
            let b = spawn(move || (verdict(&b.wait(0, 1).unwrap_err()), b));
            a.handle().abort("one");
            let ours = verdict(&a.fail(Error::invalid("again")));
            assert!([(0, "one".into()), (0, "other".into())].contains(&ours));
            other.join().unwrap();
            let (theirs, _b) = b.join().unwrap();
            assert_eq!(theirs, ours);
        });
    }

    #[test]
    fn what_a_rank_published_before_it_left_is_seen() {
        check(3, |[mut a, mut b]| {
            let b = spawn(move || {
                hear(&mut b, 0, 1);
                match *b.wait(0, 2).unwrap_err() {
                    Error::PeerLost { peer: 0, how, .. } => assert!(how.starts_with("it left the group")),
                    wrong => panic!("{wrong}"),
                }
            });
            say(&mut a);
            drop(a);
            b.join().unwrap();
        });
    }

    fn shrunk(rank: &Rank) -> Rank {
        Rank(ManuallyDrop::new(rank.shrink().unwrap()))
    }

    #[test]
    fn survivors_go_on() {
        check(2, |[a, b]| {
            let b = spawn(move || {
                let mut new = shrunk(&b);
                talk(&mut new, 1..2);
                (b, new)
            });
            let mut new = shrunk(&a);
            // The one who decided may be gone from the old group before the others know.
            drop(a);
            talk(&mut new, 1..2);
            b.join().unwrap();
        });
    }

    #[test]
    fn survivors_go_on_without_one_that_leaves() {
        check(2, |[a, b, c]| {
            let [b, c] = [b, c].map(|rank| spawn(move || (shrunk(&rank), rank)));
            drop(a);
            let ((b, _b), (c, _c)) = (b.join().unwrap(), c.join().unwrap());
            assert_eq!([(b.rank(), b.world()), (c.rank(), c.world())], [(0, 2), (1, 2)]);
        });
    }
}
