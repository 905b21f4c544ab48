//! Messages between two ranks, of which the others know nothing: a lane for each pair and direction.
//!
//! A lane is a ring of bytes with one writer and one reader. `written` and `read` count bytes since the
//! group began. A message is a header (the sender's call) and its payload, each padded to 16 bytes; one
//! longer than the lane flows through it while both ends are in their calls.

use tensorwire_core::{Call, DType, Op};

use super::Failure;
use super::group::{Awaited, Group};
use super::layout::LANE_DATA;
use super::record::Label;
use super::sync::Ordering;

const HEADER: usize = 32;
const PAD: usize = 16;
/// Bytes after which the other end is told, so that it need not wait for all of a long message.
const BURST: usize = 16 << 10;

/// A message to send: to whom, and what.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing<'a> {
    /// The receiving rank.
    pub to: usize,
    /// The payload.
    pub data: &'a [u8],
}

/// A message to receive: from whom, and into what. Its length must be what the sender sends.
#[derive(Debug)]
pub struct Incoming<'a> {
    /// The sending rank.
    pub from: usize,
    /// Where the payload goes.
    pub data: &'a mut [u8],
}

/// How far one end of a message has come, in bytes of header and payload with their padding.
struct Progress {
    done: usize,
    total: usize,
    /// The other end's counter when it was last looked at. It is this that must change before looking again
    /// can help: read anew, the counter might have changed already, and a change that has happened is never
    /// waited for.
    seen: u64,
}

impl Progress {
    fn new(payload: usize) -> Progress {
        Progress { done: 0, total: HEADER + payload.next_multiple_of(PAD), seen: 0 }
    }

    fn finished(&self) -> bool {
        self.done == self.total
    }
}

impl Group {
    /// Sends one message, receives one, or both at once, of elements of type `dtype`. Messages of a pair
    /// arrive in the order in which they were sent. A send returns when its message is in the lane, which for
    /// up to 64 KiB doesn't need the receiver.
    pub fn send_recv(
        &mut self,
        dtype: DType,
        out: Option<Outgoing<'_>>,
        mut into: Option<Incoming<'_>>,
    ) -> Result<(), Failure> {
        let call = |op, bytes, peer| Call::message(op, dtype, bytes, peer);
        let sent = out.map(|o| call(Op::Send, o.data.len(), o.to));
        let received = into.as_ref().map(|i| call(Op::Recv, i.data.len(), i.from));
        let Some(doing) = received.or(sent) else { return Ok(()) };
        let both = sent.is_some() && received.is_some();
        if let Some(sent) = sent.filter(|_| both) {
            self.record(&sent, Label::NONE);
        }
        self.record(&doing, Label::NONE);
        self.enter(doing)?;
        let mut sending = out.map(|o| Progress::new(o.data.len()));
        let mut receiving = into.as_ref().map(|i| Progress::new(i.data.len()));
        loop {
            let mut moved = false;
            let (mut from, mut to) = (None, None);
            if let (Some(o), Some(call), Some(p)) = (&out, &sent, &mut sending)
                && !p.finished()
            {
                moved |= self.push(o, call, p);
                to = (!p.finished()).then_some((o.to, p.seen));
            }
            if let (Some(i), Some(call), Some(p)) = (&mut into, &received, &mut receiving)
                && !p.finished()
            {
                moved |= self.pull(i, call, p)?;
                from = (!p.finished()).then_some((i.from, p.seen));
            }
            if from.is_none() && to.is_none() {
                if both {
                    self.finish(1);
                }
                self.end();
                return Ok(());
            }
            if !moved {
                self.wait_for(Awaited::Lanes { from, to })?;
            }
        }
    }

    /// Writes as much of a message as the lane has room for; whether that was anything.
    fn push(&self, out: &Outgoing<'_>, call: &Call, p: &mut Progress) -> bool {
        let lane = self.shared.words.lane(self.rank(), out.to);
        let data = Ring { group: self, from: self.rank(), to: out.to };
        let mut written = lane.written.0.load(Ordering::Relaxed);
        let start = p.done;
        // Acquire: pairs with the reader's Release store; it has copied what was there.
        p.seen = lane.read.0.load(Ordering::Acquire);
        let mut room = LANE_DATA - (written - p.seen) as usize;
        if p.done == 0 {
            if room < HEADER {
                return false;
            }
            let words = call.to_words();
            data.write(written, bytemuck::bytes_of(&words));
            (p.done, room) = (HEADER, room - HEADER);
        }
        while !p.finished() && room > 0 {
            let burst = (p.total - p.done).min(room).min(BURST);
            let at = p.done - HEADER;
            let payload = &out.data[at.min(out.data.len())..(at + burst).min(out.data.len())];
            data.write(written + (p.done - start) as u64, payload);
            (p.done, room) = (p.done + burst, room - burst);
            // Release: what was written is visible to a reader that sees the count.
            lane.written.0.store(written + (p.done - start) as u64, Ordering::Release);
        }
        written += (p.done - start) as u64;
        lane.written.0.store(written, Ordering::Release);
        p.done > start
    }

    /// Reads as much of a message as has come; whether that was anything. Fails if it isn't the one expected.
    fn pull(&self, into: &mut Incoming<'_>, call: &Call, p: &mut Progress) -> Result<bool, Failure> {
        let lane = self.shared.words.lane(into.from, self.rank());
        let data = Ring { group: self, from: into.from, to: self.rank() };
        let read = lane.read.0.load(Ordering::Relaxed);
        let start = p.done;
        // Acquire: pairs with the writer's Release store.
        p.seen = lane.written.0.load(Ordering::Acquire);
        let mut there = (p.seen - read) as usize;
        if p.done == 0 {
            if there < HEADER {
                return Ok(false);
            }
            let mut words = [0u64; 4];
            data.read(read, bytemuck::bytes_of_mut(&mut words));
            let fits = |theirs: &Call| theirs.dtype == call.dtype && theirs.count == call.count;
            match Call::from_words(words) {
                Some(theirs) if fits(&theirs) => {}
                theirs => return Err(self.disagree(into.from, self.seq, *call, theirs.unwrap_or(*call))),
            }
            (p.done, there) = (HEADER, there - HEADER);
        }
        let burst = (p.total - p.done).min(there);
        let (at, len) = (p.done - HEADER, into.data.len());
        data.read(read + (p.done - start) as u64, &mut into.data[at.min(len)..(at + burst).min(len)]);
        p.done += burst;
        // Release: what was there has been copied, and may be overwritten.
        lane.read.0.store(read + (p.done - start) as u64, Ordering::Release);
        Ok(p.done > start)
    }
}

/// The bytes of a lane, addressed by their position in its history.
struct Ring<'a> {
    group: &'a Group,
    from: usize,
    to: usize,
}

impl Ring<'_> {
    /// Copies `bytes` to `position`, going around the end if need be. The reader has read what was there.
    fn write(&self, position: u64, bytes: &[u8]) {
        let (words, at) = (&self.group.shared.words, (position % LANE_DATA as u64) as usize);
        let (first, rest) = bytes.split_at(bytes.len().min(LANE_DATA - at));
        // SAFETY: (1) both pieces lie in the lane; (2) this rank is the lane's only writer, and the reader
        // looks at these bytes only when `written` is beyond them.
        unsafe {
            words.write_lane(self.from, self.to, at, first);
            words.write_lane(self.from, self.to, 0, rest);
        }
    }

    /// Copies the bytes at `position`, which the writer has counted.
    fn read(&self, position: u64, bytes: &mut [u8]) {
        let (words, at) = (&self.group.shared.words, (position % LANE_DATA as u64) as usize);
        let (first, rest) = bytes.split_at_mut(bytes.len().min(LANE_DATA - at));
        // SAFETY: (1) as for `write`; (2) the writer doesn't touch these bytes until `read` is beyond them.
        unsafe {
            words.read_lane(self.from, self.to, at, first);
            words.read_lane(self.from, self.to, 0, rest);
        }
    }
}
