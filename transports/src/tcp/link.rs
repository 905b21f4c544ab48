//! One connection: frames to be sent, and frames to be received, in order, straight from and into a call's buffers.
//! Nothing here blocks.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::time::Duration;

use tensorwire_core::Call;

use super::frame::{self, HEADER, Header, Kind};
use super::memory::{Memory, Span};
use super::stream::Stream;
use crate::shm::verdict::Verdict;

/// Bytes that are read ahead, so that a small frame takes one system call. A large one goes straight to its place.
const STAGE: usize = 16 << 10;
const SMALL: usize = STAGE / 2;

/// A frame to be sent.
#[derive(Debug)]
struct Outgoing {
    /// Its place among all that the call sends, to any peer.
    number: usize,
    header: [u8; HEADER],
    /// Whether the header has its checksums, where it is to have them.
    sealed: bool,
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
    /// The peer is gone.
    Lost(String),
    /// The peer said why the group has ended.
    Verdict(Box<Verdict>),
    /// The peer's call isn't this rank's: what it called, as which of its collectives.
    Differs(Option<Call>, u64),
    /// The peer sends another number of bytes than its call says.
    Length { sent: u64, expected: usize },
    /// What came isn't what was sent, as a checksum shows: which part of it.
    Damaged(&'static str),
}

#[derive(Debug)]
pub(super) struct Link {
    stream: Option<Stream>,
    /// Whether frames have checksums.
    checksum: bool,
    sends: VecDeque<Outgoing>,
    /// Bytes of the first of `sends` that are out.
    sent: usize,
    pub(super) receives: VecDeque<Incoming>,
    stage: Box<[u8; STAGE]>,
    staged: std::ops::Range<usize>,
    /// The header of the frame that is being received, or waits for a receive.
    header: Option<Header>,
    /// The checksum of its payload, with checksums.
    sum: u32,
    got: usize,
    /// Whether that frame was found to be for a later call: the kernel has nothing more for this one.
    ahead: bool,
    /// No more will come: how that is known.
    gone: Option<String>,
    left: bool,
}

impl Link {
    /// All links of a group have checksums, or none has.
    pub(super) fn new(checksum: bool) -> Link {
        Link {
            stream: None,
            checksum,
            sends: VecDeque::new(),
            sent: 0,
            receives: VecDeque::new(),
            stage: Box::new([0; STAGE]),
            staged: 0..0,
            header: None,
            sum: 0,
            got: 0,
            ahead: false,
            gone: None,
            left: false,
        }
    }

    pub(super) fn connect(&mut self, stream: Stream) {
        self.stream = Some(stream);
    }

    /// Notes that there is no connection and won't be one.
    pub(super) fn give_up(&mut self, why: String) {
        self.gone = Some(why);
    }

    pub(super) fn stream(&self) -> Option<&Stream> {
        self.stream.as_ref()
    }

    /// Whether there is no connection, and may yet be one.
    pub(super) fn is_unconnected(&self) -> bool {
        self.stream.is_none() && self.gone.is_none()
    }

    pub(super) fn is_sending(&self) -> bool {
        !self.sends.is_empty()
    }

    pub(super) fn is_receiving(&self) -> bool {
        !self.receives.is_empty()
    }

    /// Whether a read can bring something that this link has a use for.
    pub(super) fn may_read(&self) -> bool {
        self.gone.is_none() && (self.header.is_none() || self.is_receiving() && !self.ahead)
    }

    /// Whether something is here already, of which the kernel doesn't tell any more: bytes that were read ahead, or a
    /// frame that was too early for the call before.
    pub(super) fn has_more(&self) -> bool {
        !self.staged.is_empty()
            || self.waiting_frame().is_some()
            || self.stream.as_ref().is_some_and(Stream::has_more)
    }

    /// Whether a read or a write can go on at once, though the kernel doesn't tell.
    pub(super) fn may_go_on(&self) -> bool {
        let Some(stream) = &self.stream else { return false };
        self.is_receiving() && self.may_read() && stream.has_more() || self.is_sending() && stream.has_room()
    }

    /// The frame that waits for this rank, if one does.
    pub(super) fn waiting_frame(&self) -> Option<&Header> {
        self.header.as_ref().filter(|_| self.got == 0)
    }

    /// For how long the peer's host has been silent.
    pub(super) fn silent(&self) -> Duration {
        self.stream.as_ref().map_or(Duration::ZERO, Stream::silent)
    }

    #[inline]
    pub(super) fn send(&mut self, number: usize, header: [u8; HEADER], span: Span) {
        self.sends.push_back(Outgoing { number, header, sealed: false, span });
    }

    /// The number of the first frame that isn't out yet.
    #[inline]
    pub(super) fn next_send(&self) -> Option<usize> {
        self.sends.front().map(|o| o.number)
    }

    /// Sends what the socket takes: how many frames are out with it, and whether anything moved.
    #[inline]
    pub(super) fn write(&mut self, memory: &Memory<'_>) -> Result<(usize, bool), Trouble> {
        let (mut done, mut moved) = (0, false);
        while let Some(first) = self.sends.front_mut() {
            if let (None, Some(gone)) = (&self.stream, &self.gone) {
                return Err(Trouble::Lost(gone.clone()));
            }
            let Some(stream) = &mut self.stream else { break };
            let data = memory.read(first.span);
            if self.checksum && !first.sealed {
                frame::seal(&mut first.header, data);
                first.sealed = true;
            }
            let parts = [
                IoSlice::new(&first.header[self.sent.min(HEADER)..]),
                IoSlice::new(&data[self.sent.saturating_sub(HEADER)..]),
            ];
            match stream.send(&parts) {
                Ok(Some(n)) => {
                    moved = true;
                    self.sent += n;
                    if self.sent == HEADER + data.len() {
                        self.sends.pop_front();
                        self.sent = 0;
                        done += 1;
                    }
                }
                Ok(None) => break,
                Err(e) => return Err(Trouble::Lost(ended(&e))),
            }
        }
        Ok((done, moved))
    }

    /// Receives what has come, up to the last frame that there is a receive for: how many frames are complete with
    /// it, and whether anything moved, be it only from what was read ahead: who is told that nothing moved sleeps until
    /// the kernel has something. Reads no payload that isn't expected.
    #[inline]
    pub(super) fn read(
        &mut self,
        expected: &Expected,
        memory: &mut Memory<'_>,
    ) -> Result<(usize, bool), Trouble> {
        let (mut done, mut moved) = (0, false);
        loop {
            let header = match self.header {
                Some(header) => header,
                None => {
                    while self.staged.len() < HEADER {
                        // What follows the header of a large frame goes straight to its place.
                        let large = self.receives.front().is_some_and(|r| r.span.len() > SMALL);
                        let want = if large { HEADER - self.staged.len() } else { STAGE };
                        if !self.fill(want)? {
                            return Ok((done, moved));
                        }
                        moved = true;
                    }
                    self.parse()?
                }
            };
            match header.kind {
                Kind::Verdict => {
                    if header.len != Verdict::BYTES as u64 {
                        return Err(Trouble::Lost("it sends what is no frame".to_owned()));
                    }
                    while self.staged.len() < Verdict::BYTES {
                        if !self.fill(STAGE)? {
                            return Ok((done, moved));
                        }
                    }
                    let bytes = &self.stage[self.staged.clone()][..Verdict::BYTES];
                    if self.checksum && crc32fast::hash(bytes) != self.sum {
                        return Err(Trouble::Damaged("the word that the group has ended"));
                    }
                    return Err(Trouble::Verdict(Box::new(Verdict::from_bytes(bytes))));
                }
                Kind::Leave => {
                    self.left = true;
                    self.lost("it left the group".to_owned())?;
                    return Ok((done, moved));
                }
                // It is ahead: the frame is for a later call.
                Kind::Data if expected.kind == Kind::Data && header.seq > expected.seq => {
                    self.ahead = true;
                    return Ok((done, moved));
                }
                kind => {
                    self.ahead = false;
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
                    if !self.payload(receive.span, memory, &mut moved)? {
                        return Ok((done, moved));
                    }
                    self.receives.pop_front();
                    (self.header, self.got) = (None, 0);
                    (done, moved) = (done + 1, true);
                    // What comes next is for a later call, or the end of the group: this one may be complete.
                    if self.receives.is_empty() {
                        return Ok((done, moved));
                    }
                }
            }
        }
    }

    /// Takes the header that was read ahead.
    #[inline]
    fn parse(&mut self) -> Result<Header, Trouble> {
        let bytes = &self.stage[self.staged.clone()];
        let header = if self.checksum {
            let (header, sum) = frame::unseal(bytes).ok_or(Trouble::Damaged("a header"))?;
            self.sum = sum;
            header
        } else {
            Header::parse(bytes).ok_or_else(|| Trouble::Lost("it sends what is no frame".to_owned()))?
        };
        self.staged.start += HEADER;
        self.header = Some(header);
        Ok(header)
    }

    /// Receives the rest of a payload: whether it is complete.
    #[inline]
    fn payload(&mut self, span: Span, memory: &mut Memory<'_>, moved: &mut bool) -> Result<bool, Trouble> {
        let into = memory.write(span);
        while self.got < into.len() {
            let rest = &mut into[self.got..];
            if self.staged.is_empty() && rest.len() > SMALL {
                let stream = self.stream.as_mut().expect("a connection, for its header came");
                match stream.receive(rest) {
                    Ok(Some(0)) => return self.lost("its process ended".to_owned()).map(|()| false),
                    Ok(Some(n)) => {
                        *moved = true;
                        self.got += n;
                    }
                    Ok(None) => return Ok(false),
                    Err(e) => return self.lost(ended(&e)).map(|()| false),
                }
                continue;
            }
            if self.staged.is_empty() {
                if !self.fill(STAGE)? {
                    return Ok(false);
                }
                *moved = true;
            }
            let n = rest.len().min(self.staged.len());
            rest[..n].copy_from_slice(&self.stage[self.staged.clone()][..n]);
            self.staged.start += n;
            self.got += n;
        }
        if self.checksum && crc32fast::hash(into) != self.sum {
            return Err(Trouble::Damaged("data"));
        }
        Ok(true)
    }

    /// Reads up to `want` more bytes ahead: whether any came.
    #[inline]
    fn fill(&mut self, want: usize) -> Result<bool, Trouble> {
        if let Some(gone) = &self.gone {
            return if self.is_receiving() { Err(Trouble::Lost(gone.clone())) } else { Ok(false) };
        }
        let Some(stream) = &mut self.stream else { return Ok(false) };
        if self.staged.is_empty() {
            self.staged = 0..0;
        } else if self.staged.end == STAGE {
            self.stage.copy_within(self.staged.clone(), 0);
            self.staged = 0..self.staged.len();
        }
        let end = self.staged.end;
        let room = &mut self.stage[end..STAGE.min(end + want)];
        match stream.receive(room) {
            Ok(Some(0)) => self.lost("its process ended".to_owned()).map(|()| false),
            Ok(Some(n)) => {
                self.staged.end += n;
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(e) => self.lost(ended(&e)).map(|()| false),
        }
    }

    /// Notes that no more will come: trouble if something was to.
    fn lost(&mut self, how: String) -> Result<(), Trouble> {
        let how = if self.left { "it left the group".to_owned() } else { how };
        self.gone = Some(how.clone());
        if self.is_receiving() { Err(Trouble::Lost(how)) } else { Ok(()) }
    }

    /// How it is known that no more will come, if it is.
    pub(super) fn gone(&self) -> Option<&str> {
        self.gone.as_deref()
    }

    /// Forgets what isn't sent yet, but for the rest of a frame that is half out.
    pub(super) fn cut_short(&mut self) {
        let midway = self.sent > 0 || self.stream.as_ref().is_some_and(Stream::is_midway);
        self.sends.truncate(usize::from(midway));
        self.receives.clear();
    }

    /// Reads what has come and looks for the peer's word that the group has ended, behind whatever else it sent. For a
    /// group that is ending: what is read is lost.
    pub(super) fn last_words(&mut self) -> Option<Box<Verdict>> {
        self.receives.clear();
        // As much as the kernel may hold, and more; a peer that goes on sending is not listened to for ever.
        for _ in 0..256 {
            let Some(header) = self.header else {
                if self.staged.len() < HEADER {
                    if !self.fill(STAGE).ok()? {
                        return None;
                    }
                    continue;
                }
                self.parse().ok()?;
                continue;
            };
            if header.kind == Kind::Verdict {
                if self.staged.len() >= Verdict::BYTES {
                    let bytes = &self.stage[self.staged.clone()][..Verdict::BYTES];
                    let sound = !self.checksum || crc32fast::hash(bytes) == self.sum;
                    return sound.then(|| Box::new(Verdict::from_bytes(bytes)));
                }
            } else {
                let skip =
                    (header.len.saturating_sub(self.got as u64)).min(self.staged.len() as u64) as usize;
                self.staged.start += skip;
                self.got += skip;
                if self.got as u64 >= header.len {
                    (self.header, self.got) = (None, 0);
                    continue;
                }
            }
            if !self.fill(STAGE).ok()? {
                return None;
            }
        }
        None
    }

    /// Whether the kernel holds back nothing of what was sent, or there is no point in waiting for it.
    pub(super) fn is_out(&self) -> bool {
        self.gone.is_some() || self.stream.as_ref().is_none_or(Stream::is_out)
    }

    /// Sends bytes of a group's end as far as the socket takes them: how many; all, where nobody is there to hear them. For
    /// a link that sends nothing else.
    pub(super) fn say(&mut self, bytes: &[u8]) -> usize {
        match self.stream.as_mut().filter(|_| self.sends.is_empty()).map(|s| s.send(&[IoSlice::new(bytes)])) {
            Some(Ok(sent)) => sent.unwrap_or(0),
            Some(Err(_)) | None => bytes.len(),
        }
    }
}

/// How a connection ended, for a person.
fn ended(e: &io::Error) -> String {
    match e.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionRefused => format!("its process ended ({e})"),
        io::ErrorKind::UnexpectedEof => {
            "its process ended, or somebody cut the connection: it ends without TLS's last word (close_notify)".to_owned()
        }
        io::ErrorKind::TimedOut => "its host has stopped answering".to_owned(),
        _ => format!("its connection failed: {e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tcp::memory::Place;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    /// A link, and the other end of its connection.
    fn link() -> (Link, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut link = Link::new(false);
        link.connect(TcpStream::connect(listener.local_addr().unwrap()).unwrap().into());
        (link, listener.accept().unwrap().0)
    }

    fn frame(seq: u64, payload: &[u8]) -> Vec<u8> {
        let header = Header { kind: Kind::Data, seq, len: payload.len() as u64, call: [seq; 4] };
        [&header.bytes()[..], payload].concat()
    }

    fn expected(seq: u64) -> Expected {
        Expected { kind: Kind::Data, seq, call: [seq; 4] }
    }

    fn receive(link: &mut Link, number: usize, range: std::ops::Range<usize>) {
        link.receives.push_back(Incoming { number, span: Span::new(Place::Output, range) });
    }

    /// Reads until something moves.
    fn read(link: &mut Link, seq: u64, out: &mut [u8]) -> usize {
        loop {
            let memory = &mut Memory { output: &mut *out, ..Memory::none() };
            if let (done, true) = link.read(&expected(seq), memory).unwrap() {
                return done;
            }
        }
    }

    /// The kernel tells of no bytes that it has handed over: a call that didn't count a frame that was read ahead as
    /// progress would sleep with its data in hand.
    #[test]
    fn a_frame_that_was_read_ahead_is_progress() {
        let (mut link, mut peer) = link();
        // In one segment, so that one read takes all: two frames of a call, and one of the next.
        peer.write_all(&[frame(1, b"one"), frame(1, b"two"), frame(2, b"six")].concat()).unwrap();
        let mut out = [0; 9];
        for (number, seq, text) in [(0, 1, b"one"), (1, 1, b"two"), (2, 2, b"six")] {
            let at = 3 * number..3 * number + 3;
            receive(&mut link, number, at.clone());
            let memory = &mut Memory { output: &mut out, ..Memory::none() };
            let come = match number {
                0 => (read(&mut link, seq, &mut out), true),
                _ => link.read(&expected(seq), memory).unwrap(),
            };
            assert_eq!((come, &out[at]), ((1, true), &text[..]), "frame {number}");
        }
    }

    /// Reads until there is trouble.
    fn trouble(link: &mut Link, seq: u64, out: &mut [u8]) -> String {
        loop {
            let memory = &mut Memory { output: &mut *out, ..Memory::none() };
            if let Err(trouble) = link.read(&expected(seq), memory) {
                return format!("{trouble:?}");
            }
        }
    }

    #[test]
    fn what_a_broken_peer_sends_is_told_apart_and_never_taken_for_data() {
        let verdict = Verdict::new(1, &tensorwire_core::Error::invalid("pressed stop"));
        let mut garbage = frame(1, b"abc");
        garbage[0] ^= 1;
        let mut endless = frame(1, b"abc");
        endless[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        let cases = [
            (Vec::new(), "its process ended"),
            (frame(1, b"abc")[..40].to_vec(), "its process ended"),
            (frame(1, b"abc")[..HEADER + 2].to_vec(), "its process ended"),
            (garbage, "it sends what is no frame"),
            (endless, "Length { sent: 18446744073709551615, expected: 3 }"),
            (frame(1, b"ab"), "Length { sent: 2, expected: 3 }"),
            (frame(0, b"abc"), "Differs"),
            (super::super::frame::parting(&verdict, false), "Verdict"),
            (super::super::frame::parting(&verdict, false)[..200].to_vec(), "its process ended"),
        ];
        for (bytes, expected) in cases {
            let (mut link, mut peer) = link();
            peer.write_all(&bytes).unwrap();
            drop(peer);
            let mut out = *b"...";
            receive(&mut link, 0, 0..3);
            let text = trouble(&mut link, 1, &mut out);
            assert!(text.contains(expected), "{bytes:?}: {text}, not {expected}");
            assert!(link.is_receiving(), "the receive isn't complete");
        }
    }

    #[test]
    fn a_reset_in_the_middle_of_a_frame_is_a_lost_peer() {
        let (mut link, mut peer) = link();
        peer.write_all(&frame(1, &[7; 100_000])[..50_000]).unwrap();
        // What it has not read makes the kernel reset the connection.
        link.send(0, [0; HEADER], Span::new(Place::Input, 0..0));
        link.write(&Memory::none()).unwrap();
        while peer.peek(&mut [0]).unwrap() == 0 {}
        drop(peer);
        let mut out = vec![0; 100_000];
        receive(&mut link, 0, 0..100_000);
        let text = trouble(&mut link, 1, &mut out);
        assert!(text.contains("its process ended"), "{text}");
    }

    #[test]
    fn a_frame_of_a_later_call_waits_where_nothing_is_awaited() {
        let (mut link, mut peer) = link();
        peer.write_all(&[frame(1, b"one"), frame(2, b"two")].concat()).unwrap();
        let mut out = [0; 6];
        receive(&mut link, 0, 0..3);
        assert_eq!(read(&mut link, 1, &mut out), 1);
        let memory = &mut Memory { output: &mut out, ..Memory::none() };
        link.read(&expected(1), memory).unwrap();
        assert!(link.waiting_frame().is_some());
        // Also where something is awaited that can't come any more: the kernel isn't asked, again and again, for nothing.
        receive(&mut link, 0, 3..6);
        let memory = &mut Memory { output: &mut out, ..Memory::none() };
        assert_eq!(link.read(&expected(1), memory).unwrap(), (0, false));
        assert!(!link.may_read());
        assert_eq!(read(&mut link, 2, &mut out), 1);
        assert_eq!(&out, b"onetwo");
        assert!(link.may_read());
    }
}
