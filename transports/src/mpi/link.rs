//! One peer, in a group's collectives or messages: frames to be sent and to be received, in order. Nothing here blocks.
//!
//! A frame is a message of a header and up to [`INLINE`] bytes of its payload, and, if there is more, messages of up to
//! [`CHUNK`] bytes each with the rest, which are asked for when the header has come: so a large payload isn't buffered
//! where nobody waits for it.

use std::collections::VecDeque;

use tensorwire_core::Call;

use super::raw::{Buffer, Outcome, Transfer};
use super::world::{Tag, World};
use crate::tcp::{HEADER, Header, Kind, Memory, Span};

/// Bytes of a payload that travel with their header: together fewer than the 4 KiB up to which Open MPI sends without asking
/// the receiver, also in shared memory.
pub(super) const INLINE: usize = 3 << 10;
/// Bytes of a first message.
const FIRST: usize = HEADER + INLINE;
/// Bytes of each further message: few enough that the copies of it find it in the second-level cache.
const CHUNK: usize = 128 << 10;

/// Messages to a peer that may be on their way.
const WINDOW: usize = 16;
/// Every so many messages, one is synchronous: what a peer has not asked for stays bounded.
const SYNCHRONOUS: usize = 8;
/// Receives of a payload that are open at once.
const AHEAD: usize = 3;

/// Buffers of a rank that MPI doesn't have at the moment.
#[derive(Debug, Default)]
pub(super) struct Pool {
    first: Vec<Buffer>,
    chunk: Vec<Buffer>,
}

impl Pool {
    fn take(&mut self, len: usize) -> Buffer {
        let (spare, size) = if len <= FIRST { (&mut self.first, FIRST) } else { (&mut self.chunk, CHUNK) };
        spare.pop().unwrap_or_else(|| Buffer::new(size))
    }

    fn give(&mut self, buffer: Buffer) {
        let spare = if buffer.bytes().len() == FIRST { &mut self.first } else { &mut self.chunk };
        if spare.len() < 2 * WINDOW {
            spare.push(buffer);
        }
    }
}

/// A frame to be sent.
#[derive(Debug)]
struct Outgoing {
    /// Its place among all that the call sends, to any peer.
    number: usize,
    header: [u8; HEADER],
    span: Span,
}

/// A frame to be received.
#[derive(Clone, Copy, Debug)]
pub(super) struct Incoming {
    /// Its place among all that the call receives, from any peer.
    pub(super) number: usize,
    pub(super) span: Span,
}

/// What the frames of a link must be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Expected {
    pub(super) kind: Kind,
    pub(super) seq: u64,
    pub(super) call: [u64; 4],
}

/// Why a link can't go on.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The peer is gone, or MPI can't reach it.
    Lost(String),
    /// The peer's call isn't this rank's: what it called, as which of its collectives.
    Differs(Option<Call>, u64),
    /// The peer sends another number of bytes than its call says.
    Length { sent: u64, expected: usize },
}

/// A header that has come, with the first bytes of its payload.
#[derive(Debug)]
struct Frame {
    header: Header,
    first: Buffer,
    /// Bytes of the payload that are where they belong, and that were asked for.
    got: usize,
    asked: usize,
}

#[derive(Debug)]
pub(super) struct Link {
    /// The peer's rank in the world.
    peer: usize,
    head: i32,
    body: i32,
    sends: VecDeque<Outgoing>,
    /// Bytes of the first of `sends`, its header among them, that were given to MPI.
    given: usize,
    /// Each with whether it is one of those that are asked for, and may need this rank until they are there.
    on_way: VecDeque<(Transfer, bool)>,
    /// How many of them are.
    asked_for: usize,
    /// Messages since a synchronous one.
    since: usize,
    pub(super) receives: VecDeque<Incoming>,
    /// Waits for a header.
    open: Option<Transfer>,
    frame: Option<Frame>,
    /// Wait for the rest of its payload, in order.
    bodies: VecDeque<Transfer>,
    left: bool,
}

impl Link {
    /// To the world's rank `peer`, in the group with this number.
    pub(super) fn new(world: &World, context: u32, peer: usize, message: bool) -> Link {
        let (head, body) =
            if message { (Tag::MessageHead, Tag::MessageBody) } else { (Tag::Head, Tag::Body) };
        Link {
            peer,
            head: world.tag(context, head),
            body: world.tag(context, body),
            sends: VecDeque::new(),
            given: 0,
            on_way: VecDeque::new(),
            asked_for: 0,
            since: 0,
            receives: VecDeque::new(),
            open: None,
            frame: None,
            bodies: VecDeque::new(),
            left: false,
        }
    }

    pub(super) fn is_sending(&self) -> bool {
        !self.sends.is_empty()
    }

    /// Whether MPI may need this rank to go on with what it has sent.
    #[inline]
    pub(super) fn is_asked(&self) -> bool {
        self.asked_for > 0
    }

    pub(super) fn is_receiving(&self) -> bool {
        !self.receives.is_empty()
    }

    /// The frame that waits for this rank, if one does.
    pub(super) fn waiting_frame(&self) -> Option<&Header> {
        self.frame.as_ref().filter(|frame| frame.got == 0).map(|frame| &frame.header)
    }

    #[inline]
    pub(super) fn send(&mut self, number: usize, header: [u8; HEADER], span: Span) {
        self.sends.push_back(Outgoing { number, header, span });
    }

    /// The number of the first frame that MPI hasn't got yet.
    #[inline]
    pub(super) fn next_send(&self) -> Option<usize> {
        self.sends.front().map(|o| o.number)
    }

    /// Gives MPI what there is room for: how many frames it has with it, and whether anything moved.
    #[inline]
    pub(super) fn write(
        &mut self,
        world: &World,
        pool: &mut Pool,
        memory: &Memory<'_>,
    ) -> Result<(usize, bool), Trouble> {
        let (mut done, mut moved) = (0, self.reap(pool)?);
        while let Some(Outgoing { header, span, .. }) = self.sends.front() {
            let (header, data) = (*header, memory.read(*span));
            while self.given < HEADER + data.len() {
                if self.on_way.len() >= WINDOW && !self.reap(pool)? {
                    return Ok((done, moved));
                }
                let mut given = self.given.saturating_sub(HEADER);
                if self.given == 0 {
                    given = data.len().min(INLINE);
                    let mut first = pool.take(HEADER + given);
                    let len = HEADER + given;
                    first.bytes_mut()[..HEADER].copy_from_slice(&header);
                    first.bytes_mut()[HEADER..len].copy_from_slice(&data[..given]);
                    self.give(world, first, len, self.head).map_err(Trouble::Lost)?;
                } else {
                    let len = (data.len() - given).min(CHUNK);
                    let mut chunk = pool.take(CHUNK);
                    chunk.bytes_mut()[..len].copy_from_slice(&data[given..given + len]);
                    self.give(world, chunk, len, self.body).map_err(Trouble::Lost)?;
                    given += len;
                }
                self.given = HEADER + given;
                moved = true;
            }
            self.sends.pop_front();
            self.given = 0;
            done += 1;
        }
        Ok((done, moved))
    }

    fn give(&mut self, world: &World, buffer: Buffer, len: usize, tag: i32) -> Outcome<()> {
        self.since += 1;
        let synchronous = self.since == SYNCHRONOUS;
        if synchronous {
            self.since = 0;
        }
        let asked_for = tag == self.body;
        self.asked_for += usize::from(asked_for);
        self.on_way.push_back((world.comm.send(buffer, len, self.peer, tag, synchronous)?, asked_for));
        Ok(())
    }

    /// Takes back the buffers of what has gone out: whether any has.
    #[inline]
    fn reap(&mut self, pool: &mut Pool) -> Result<bool, Trouble> {
        let mut some = false;
        while let Some((first, asked_for)) = self.on_way.front_mut() {
            let Some((buffer, _)) = first.complete().map_err(Trouble::Lost)? else { break };
            self.asked_for -= usize::from(*asked_for);
            pool.give(buffer);
            self.on_way.pop_front();
            some = true;
        }
        Ok(some)
    }

    /// Has MPI go on with what this rank has sent: whether all of it is on its way.
    pub(super) fn is_out(&mut self, pool: &mut Pool) -> bool {
        self.reap(pool).is_err() || self.on_way.is_empty()
    }

    /// Receives what has come, up to the last frame that there is a receive for: how many frames are complete with it, and
    /// whether anything moved. Reads no payload that isn't expected.
    #[inline]
    pub(super) fn read(
        &mut self,
        world: &World,
        pool: &mut Pool,
        expected: &Expected,
        memory: &mut Memory<'_>,
    ) -> Result<(usize, bool), Trouble> {
        let (mut done, mut moved) = (0, false);
        loop {
            if self.frame.is_none() {
                if self.left {
                    let how = "it left the group".to_owned();
                    return if self.is_receiving() { Err(Trouble::Lost(how)) } else { Ok((done, moved)) };
                }
                if !self.listen(world, pool)? {
                    return Ok((done, moved));
                }
                moved = true;
            }
            let Some(frame) = &mut self.frame else { return Ok((done, moved)) };
            let header = frame.header;
            match header.kind {
                Kind::Leave => {
                    self.left = true;
                    self.frame = None;
                    continue;
                }
                // It is ahead: the frame is for a later call.
                Kind::Data if expected.kind == Kind::Data && header.seq > expected.seq => {
                    return Ok((done, moved));
                }
                kind => {
                    let at_hand = self.receives.front().copied();
                    // A message waits for its receive, whatever it is; a collective's calls are compared at once.
                    if kind == Kind::Message && at_hand.is_none() {
                        return Ok((done, moved));
                    }
                    let same_seq = kind == Kind::Message || header.seq == expected.seq;
                    if kind != expected.kind || !same_seq || header.call != expected.call {
                        return Err(Trouble::Differs(header.call(), header.seq));
                    }
                    let Some(receive) = at_hand else { return Ok((done, moved)) };
                    if header.len != receive.span.len() as u64 {
                        return Err(Trouble::Length { sent: header.len, expected: receive.span.len() });
                    }
                    if !self.payload(world, pool, receive.span, memory, &mut moved)? {
                        return Ok((done, moved));
                    }
                    self.receives.pop_front();
                    (done, moved) = (done + 1, true);
                    // What comes next is for a later call, or the end of the group: this one may be complete.
                    if self.receives.is_empty() {
                        return Ok((done, moved));
                    }
                }
            }
        }
    }

    /// Looks for a header: whether one has come.
    #[inline]
    fn listen(&mut self, world: &World, pool: &mut Pool) -> Result<bool, Trouble> {
        if self.open.is_none() {
            let first = pool.take(FIRST);
            let open = world.comm.receive(first, Some(self.peer), self.head).map_err(Trouble::Lost)?;
            self.open = Some(open);
        }
        let Some(open) = &mut self.open else { return Ok(false) };
        let Some((first, count)) = open.complete().map_err(Trouble::Lost)? else { return Ok(false) };
        self.open = None;
        let header = Header::parse(&first.bytes()[..count]);
        let header = header.filter(|h| count == HEADER + (h.len as usize).min(INLINE));
        let header = header.ok_or_else(|| Trouble::Lost("it sends what is no frame".to_owned()))?;
        self.frame = Some(Frame { header, first, got: 0, asked: 0 });
        Ok(true)
    }

    /// Receives the rest of a payload: whether it is complete. The frame is done with then.
    #[inline]
    fn payload(
        &mut self,
        world: &World,
        pool: &mut Pool,
        span: Span,
        memory: &mut Memory<'_>,
        moved: &mut bool,
    ) -> Result<bool, Trouble> {
        let (Some(frame), into) = (&mut self.frame, memory.write(span)) else { return Ok(false) };
        if frame.got == 0 {
            let first = into.len().min(INLINE);
            into[..first].copy_from_slice(&frame.first.bytes()[HEADER..HEADER + first]);
            (frame.got, frame.asked) = (first, first);
        }
        while frame.got < into.len() {
            while frame.asked < into.len() && self.bodies.len() < AHEAD {
                let chunk = pool.take(CHUNK);
                let body = world.comm.receive(chunk, Some(self.peer), self.body).map_err(Trouble::Lost)?;
                self.bodies.push_back(body);
                frame.asked += (into.len() - frame.asked).min(CHUNK);
            }
            let Some(body) = self.bodies.front_mut() else { return Ok(false) };
            let Some((chunk, count)) = body.complete().map_err(Trouble::Lost)? else { return Ok(false) };
            self.bodies.pop_front();
            let rest = &mut into[frame.got..];
            let len = rest.len().min(CHUNK);
            if count != len {
                return Err(Trouble::Lost(format!("it sends {count} bytes of {len}")));
            }
            rest[..len].copy_from_slice(&chunk.bytes()[..len]);
            pool.give(chunk);
            frame.got += len;
            *moved = true;
        }
        if let Some(frame) = self.frame.take() {
            pool.give(frame.first);
        }
        Ok(true)
    }

    /// What MPI still has of this rank's, at the end of the group.
    pub(super) fn leave(&mut self) -> impl Iterator<Item = Transfer> + use<'_> {
        self.on_way.drain(..).map(|(sent, _)| sent)
    }
}
