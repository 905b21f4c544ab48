//! The connections of a rank, and how a call drives them: from the caller's thread, spinning for a short while, then
//! polling.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tensorwire_core::{Call, Deadline};

use super::endpoint::Endpoint;
use super::frame::{self, Header, Kind};
use super::hello::Channel;
use super::link::{Expected, Incoming, Link, Trouble};
use super::memory::{Memory, Span};
use super::shared::{Answer, Arrived, Shared};
use crate::shm::verdict::Verdict;

/// How often a rank that waits for long asks the kernel whether its peers' hosts answer.
const LOOK: Duration = Duration::from_millis(250);

/// How long a spinning rank keeps its processor at a time.
const YIELD_INTERVAL: Duration = Duration::from_micros(20);

/// For how long the end of a group waits for the rest of a frame to go out, behind which peers are told of it.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// After how long of that a peer that has no room, or a host that shares memory, is told over another connection: as late as
/// who hears a verdict heeds it.
const ASIDE: Duration = GRACE;

/// For how long a call that others may yet complete goes on after a peer has said that the group has ended: the peer may
/// have been in a later call.
const GRACE: Duration = Duration::from_millis(50);

/// For how long a call whose time is up waits for the peers' answers whether they wait themselves.
const ANSWERS: Duration = Duration::from_millis(500);

/// What a call waits for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Goal {
    /// The receives with numbers below this, of those that the call has asked for.
    pub(super) received: usize,
    /// The sends with numbers below this.
    pub(super) sent: usize,
}

/// Why a call can't go on.
#[derive(Debug)]
pub(super) enum Stop {
    /// A connection is in trouble: the peer's.
    Peer(usize, Channel, Trouble),
    /// The group has ended, here or elsewhere.
    Ended(Box<Verdict>),
    /// These ranks have not come in time.
    Late(Vec<usize>),
}

/// Where a call finds what isn't in the mesh.
pub(super) struct Around<'a> {
    pub(super) shared: &'a Arc<Shared>,
    pub(super) endpoint: &'a Endpoint,
    pub(super) spin: Duration,
    pub(super) peer_timeout: Duration,
    /// Whether the wait ends when this rank is interrupted.
    pub(super) interruptible: bool,
}

#[derive(Debug)]
pub(super) struct Mesh {
    world: usize,
    checksum: bool,
    /// One a peer for collectives, then one a peer for messages; made at first use.
    links: Vec<Option<Box<Link>>>,
    /// Which of them there are.
    live: Vec<usize>,
    /// What the frames of the collective that was begun last are.
    collective: Expected,
    /// Where several are under way: the first receive of each, and what its frames are.
    under_way: VecDeque<(usize, Expected)>,
    /// Receives and sends that the call has asked for, numbered in that order, and how many are done.
    asked: usize,
    received: usize,
    pub(super) sends: usize,
    sent: usize,
    /// Why the group has ended, as a peer said from whom nothing is awaited, and when.
    heard: Option<(Box<Verdict>, Instant)>,
    /// Whether the peers know that the group has ended.
    told: bool,
    /// When the peers' hosts were looked at last.
    looked: Instant,
    /// When the peers that this call waits for in vain were asked whether they wait themselves.
    asked_at: Option<Instant>,
}

impl Mesh {
    pub(super) fn new(world: usize, checksum: bool) -> Mesh {
        Mesh {
            world,
            checksum,
            links: (0..2 * world).map(|_| None).collect(),
            live: Vec::new(),
            collective: Expected { kind: Kind::Data, seq: 0, call: [0; 4] },
            under_way: VecDeque::new(),
            asked: 0,
            received: 0,
            sends: 0,
            sent: 0,
            heard: None,
            told: false,
            looked: Instant::now(),
            asked_at: None,
        }
    }

    /// Begins a call; a collective has a number and a call of its own that its frames carry.
    pub(super) fn begin(&mut self, collective: Option<(u64, &Call)>) {
        (self.asked, self.received, self.sends, self.sent) = (0, 0, 0, 0);
        self.under_way.clear();
        self.asked_at = None;
        if let Some((seq, call)) = collective {
            self.collective = Expected { kind: Kind::Data, seq, call: call.to_words() };
        }
    }

    /// Begins a collective behind others, which have asked for all that they send and receive: so the frames on each link
    /// are in the order of the calls. What they have asked for in all.
    pub(super) fn begin_behind(&mut self, seq: u64, call: &Call) -> Goal {
        if self.under_way.is_empty() {
            self.under_way.push_back((0, self.collective));
        }
        self.collective = Expected { kind: Kind::Data, seq, call: call.to_words() };
        self.under_way.push_back((self.asked, self.collective));
        Goal { received: self.asked, sent: self.sends }
    }

    /// Ends the first of the collectives that are under way.
    pub(super) fn end_first(&mut self) {
        self.under_way.pop_front();
        self.asked_at = None;
    }

    fn link(&mut self, place: usize) -> &mut Link {
        if self.links[place].is_none() {
            self.links[place] = Some(Box::new(Link::new(self.checksum)));
            self.live.push(place);
        }
        self.links[place].as_mut().expect("made above")
    }

    fn peer(&self, place: usize) -> usize {
        place % self.world
    }

    fn channel(&self, place: usize) -> Channel {
        if place < self.world { Channel::Collective } else { Channel::Message }
    }

    /// Asks for the bytes of `span` to be sent.
    #[inline]
    pub(super) fn send(&mut self, place: usize, span: Span) {
        let Expected { seq, call, .. } = self.collective;
        let header = Header { kind: Kind::Data, seq, len: span.len() as u64, call };
        let number = self.sends;
        self.sends += 1;
        self.link(place).send(number, header.bytes(), span);
    }

    /// As [`send`](Mesh::send), for a message.
    pub(super) fn send_message(&mut self, place: usize, span: Span, call: &Call) {
        let seq = self.collective.seq;
        let header = Header { kind: Kind::Message, seq, len: span.len() as u64, call: call.to_words() };
        let number = self.sends;
        self.sends += 1;
        self.link(place).send(number, header.bytes(), span);
    }

    /// Asks for the bytes of `span` to be received.
    #[inline]
    pub(super) fn receive(&mut self, place: usize, span: Span) {
        let number = self.asked;
        self.asked += 1;
        self.link(place).receives.push_back(Incoming { number, span });
    }

    /// How many receives the call has asked for.
    #[inline]
    pub(super) fn asked(&self) -> usize {
        self.asked
    }

    /// What frames on a link must be. A message's is given by the call that receives it.
    #[inline]
    fn expected(&self, place: usize, message: &Expected) -> Expected {
        match place < self.world {
            true if self.under_way.is_empty() => self.collective,
            true => self.expected_next(place),
            false => *message,
        }
    }

    /// What the next frame on a link must be, where several collectives are under way.
    fn expected_next(&self, place: usize) -> Expected {
        let next = self.links[place].as_ref().and_then(|l| l.receives.front());
        let of = |number| self.under_way.iter().rev().find(|(first, _)| *first <= number);
        next.and_then(|r| of(r.number)).map_or(self.collective, |(_, expected)| *expected)
    }

    /// Whether receives and sends have come as far as the goal: the links' first ones are beyond it.
    #[inline]
    fn reached(&self, goal: Goal) -> bool {
        let all = self.received == self.asked && self.sent == self.sends;
        all || (self.received >= goal.received
            && self.sent >= goal.sent
            && self.live.iter().all(|place| !self.awaits(*place, goal) && !self.owes(*place, goal)))
    }

    /// Whether a link has sends to do that the goal needs.
    #[inline]
    fn owes(&self, place: usize, goal: Goal) -> bool {
        self.links[place].as_ref().is_some_and(|l| l.next_send().is_some_and(|n| n < goal.sent))
    }

    /// Whether a link has receives to come that the goal needs.
    #[inline]
    fn awaits(&self, place: usize, goal: Goal) -> bool {
        self.links[place]
            .as_ref()
            .is_some_and(|l| l.receives.front().is_some_and(|r| r.number < goal.received))
    }

    /// Moves what can be moved on one link.
    #[inline]
    fn advance(&mut self, place: usize, message: &Expected, memory: &mut Memory<'_>) -> Result<bool, Stop> {
        let expected = self.expected(place, message);
        let Some(link) = &mut self.links[place] else { return Ok(false) };
        let mut moved = false;
        let trouble = 'trouble: {
            if link.is_sending() {
                match link.write(memory) {
                    Ok((done, some)) => {
                        self.sent += done;
                        moved |= some;
                    }
                    Err(trouble) => {
                        // It may have made another call before it went, or have said that it leaves, or why.
                        match link.read(&expected, memory) {
                            Ok((done, _)) => self.received += done,
                            Err(Trouble::Lost(_)) => {}
                            Err(known) => break 'trouble known,
                        }
                        break 'trouble match link.last_words() {
                            Some(verdict) => Trouble::Verdict(verdict),
                            None => link.gone().map_or(trouble, |how| Trouble::Lost(how.to_owned())),
                        };
                    }
                }
            }
            if link.is_receiving() {
                match link.read(&expected, memory) {
                    Ok((done, some)) => {
                        self.received += done;
                        moved |= some;
                    }
                    Err(trouble) => break 'trouble trouble,
                }
            }
            return Ok(moved);
        };
        Err(Stop::Peer(self.peer(place), self.channel(place), trouble))
    }

    /// Moves what can be moved now, once.
    #[inline]
    pub(super) fn push(
        &mut self,
        place: usize,
        around: &Around<'_>,
        message: &Expected,
        memory: &mut Memory<'_>,
    ) -> Result<(), Stop> {
        if self.links[place].as_ref().is_some_and(|l| l.stream().is_none()) {
            return self.open(place, around);
        }
        self.advance(place, message, memory).map(drop)
    }

    /// Sees that there is a connection, or that one is on its way.
    fn open(&mut self, place: usize, around: &Around<'_>) -> Result<(), Stop> {
        self.look_around(around)?;
        let unconnected = self.links[place].as_ref().is_some_and(|l| l.is_unconnected());
        if unconnected && around.shared.should_dial(place) {
            let (channel, peer) = (self.channel(place), self.peer(place));
            if let Err(e) = around.endpoint.dial(around.shared, channel, peer) {
                return Err(Stop::Peer(peer, channel, Trouble::Lost(e.to_string())));
            }
        }
        Ok(())
    }

    fn arrived(&mut self, place: usize, arrived: Arrived) {
        let link = self.link(place);
        match arrived {
            Arrived::Connection(stream) => link.connect(stream),
            Arrived::Failed(why) => link.give_up(why),
        }
    }

    /// Takes the connections that have been made, and notices that the group has ended.
    fn look_around(&mut self, around: &Around<'_>) -> Result<(), Stop> {
        for (place, arrived) in around.shared.take_arrivals() {
            self.arrived(place, arrived);
        }
        match around.shared.verdict() {
            Some(verdict) if around.shared.has_failed() => Err(Stop::Ended(Box::new(verdict))),
            _ => Ok(()),
        }
    }

    /// Drives the connections until the goal is reached; whether it is, for a wait that may be interrupted.
    pub(super) fn drive(
        &mut self,
        goal: Goal,
        around: &Around<'_>,
        message: &Expected,
        deadline: &mut Option<Deadline>,
        timeout: Duration,
        memory: &mut Memory<'_>,
    ) -> Result<bool, Stop> {
        let mut idle: Option<(Instant, Instant)> = None;
        let mut slept = false;
        loop {
            let reached = self.reached(goal);
            if reached || (around.interruptible && around.shared.is_interrupted()) {
                if slept {
                    around.shared.set_waits(None);
                }
                return Ok(reached);
            }
            if around.shared.has_stirred() {
                self.look_around(around)?;
            }
            let mut moved = false;
            for i in 0..self.live.len() {
                moved |= self.advance(self.live[i], message, memory)?;
            }
            if moved {
                idle = None;
                // However long a call takes, it is late only where nothing moves.
                if deadline.take().is_some() {
                    self.asked_at = None;
                }
                continue;
            }
            let now = Instant::now();
            let (since, yielded) = idle.get_or_insert((now, now));
            if around.shared.spins() && now - *since < around.spin {
                if now - *yielded >= YIELD_INTERVAL {
                    *yielded = now;
                    std::thread::yield_now();
                }
                continue;
            }
            let known = std::mem::replace(&mut slept, true) && deadline.is_some();
            let until = *deadline.get_or_insert_with(|| Deadline::after(timeout));
            if !known {
                around.shared.set_waits(Some(until));
            }
            if let Some(left) = self.sleep(goal, around, message, until, memory)? {
                let until = *deadline.insert(Deadline::after(left));
                around.shared.set_waits(Some(until));
            }
        }
    }

    /// Polls until something may have happened. For how much longer to wait than the deadline, if that has changed.
    #[cold]
    #[inline(never)]
    fn sleep(
        &mut self,
        goal: Goal,
        around: &Around<'_>,
        message: &Expected,
        deadline: Deadline,
        memory: &mut Memory<'_>,
    ) -> Result<Option<Duration>, Stop> {
        for i in 0..self.live.len() {
            let place = self.live[i];
            // A peer that is gone is noticed by a connection alone.
            if self.links[place]
                .as_ref()
                .is_some_and(|l| l.stream().is_none() && (l.is_receiving() || l.is_sending()))
            {
                self.open(place, around)?;
            }
        }
        if deadline.passed()
            && let Some(left) = self.ask_who_is_late(goal, around)?
        {
            return Ok(Some(left));
        }
        for i in 0..self.live.len() {
            let place = self.live[i];
            if self.links[place].as_ref().is_some_and(|l| l.has_more()) {
                self.listen(place, message, memory)?;
            }
        }
        if self.live.iter().any(|place| self.links[*place].as_ref().is_some_and(|l| l.may_go_on())) {
            return Ok(None);
        }
        let mut wait = match self.asked_at {
            Some(_) => Duration::from_millis(20),
            None => LOOK.min(deadline.remaining() + Duration::from_millis(1)),
        };
        if let Some((verdict, at)) = &self.heard {
            match GRACE.checked_sub(at.elapsed()) {
                Some(left) => wait = wait.min(left),
                None => return Err(Stop::Ended(verdict.clone())),
            }
        }
        let mut asked = Vec::with_capacity(self.live.len());
        let (heard, readable) = {
            let mut fds = vec![PollFd::new(&around.shared.wake, PollFlags::IN)];
            for place in &self.live {
                let Some(link) = &self.links[*place] else { continue };
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::IN, link.may_read());
                flags.set(PollFlags::OUT, link.is_sending());
                if let Some(stream) = link.stream().filter(|_| !flags.is_empty()) {
                    asked.push(*place);
                    wait = wait.min(stream.patience());
                    fds.push(PollFd::new(stream, stream.awaits(flags)));
                }
            }
            let timeout = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() };
            // Interrupted, or short of memory: in any case, later.
            if poll(&mut fds, Some(&timeout)).unwrap_or(0) == 0 {
                fds.iter_mut().for_each(PollFd::clear_revents);
            }
            let ready = |f: &PollFd<'_>| !f.revents().is_empty();
            (ready(&fds[0]), fds[1..].iter().map(ready).collect::<Vec<_>>())
        };
        // Also while there is much to hear of others.
        if self.looked.elapsed() >= LOOK {
            self.looked = Instant::now();
            self.look_for_silence(around)?;
        }
        if heard {
            around.shared.wake.hush();
            self.look_around(around)?;
        }
        // Links that nothing is awaited from bring the end of the group, or a frame that has to wait.
        for (place, _) in asked.into_iter().zip(readable).filter(|(_, ready)| *ready) {
            self.listen(place, message, memory)?;
        }
        Ok(None)
    }

    /// Reads what a link that nothing is awaited from may say.
    fn listen(&mut self, place: usize, message: &Expected, memory: &mut Memory<'_>) -> Result<(), Stop> {
        let (expected, peer, channel) =
            (self.expected(place, message), self.peer(place), self.channel(place));
        match &mut self.links[place] {
            Some(link) if !link.is_receiving() => match link.read(&expected, memory) {
                Ok(_) => Ok(()),
                Err(Trouble::Verdict(verdict)) => {
                    self.heard.get_or_insert((verdict, Instant::now()));
                    Ok(())
                }
                Err(trouble) => Err(Stop::Peer(peer, channel, trouble)),
            },
            _ => Ok(()),
        }
    }

    /// Why the group has ended, if some peer has said so. For a call that has failed.
    pub(super) fn hear(&mut self) -> Option<Box<Verdict>> {
        self.live.iter().find_map(|place| self.links[*place].as_mut()?.last_words())
    }

    /// Fails if the host of a peer on whom this call depends has stopped answering.
    fn look_for_silence(&mut self, around: &Around<'_>) -> Result<(), Stop> {
        for place in &self.live {
            let Some(link) = &self.links[*place] else { continue };
            if (link.is_receiving() || link.is_sending()) && link.silent() > around.peer_timeout {
                let how = format!("its host has answered nothing for {:?}", around.peer_timeout);
                return Err(Stop::Peer(self.peer(*place), self.channel(*place), Trouble::Lost(how)));
            }
        }
        Ok(())
    }

    /// Ends a call whose time is up, once it knows whom to name: not those that wait as well, for another. Where all do,
    /// for how much longer the last of them: something has reached that one since anything reached this rank, such as what
    /// this rank has sent and the kernel passes on slowly. What a rank waits longer for that reason is no reason for others,
    /// so that this ends.
    fn ask_who_is_late(&mut self, goal: Goal, around: &Around<'_>) -> Result<Option<Duration>, Stop> {
        let late = self.late(goal);
        let Some(since) = self.asked_at else {
            self.asked_at = Some(Instant::now());
            around.endpoint.ask(around.shared, &late);
            return Ok(None);
        };
        let answers = around.shared.answers();
        let of =
            |peer: &usize| answers.iter().find(|(who, _)| who == peer).map_or(Answer::Awaited, |(_, a)| *a);
        let left = |peer: &usize| if let Answer::Waits(left) = of(peer) { Some(left) } else { None };
        let guilty: Vec<usize> = late.iter().copied().filter(|p| left(p).is_none()).collect();
        let open = guilty.iter().any(|p| of(p) == Answer::Awaited);
        match since.elapsed() {
            t if guilty.is_empty() => {
                // The answers are as old as the question at most.
                let left = late.iter().filter_map(left).max().unwrap_or_default().saturating_sub(t);
                if left > ANSWERS {
                    self.asked_at = None;
                    return Ok(Some(left));
                }
                // One of them will say for whom.
                if t < 2 * ANSWERS { Ok(None) } else { Err(Stop::Late(late)) }
            }
            t if t < ANSWERS && open => Ok(None),
            _ => Err(Stop::Late(guilty)),
        }
    }

    /// Whom the call waits for.
    fn late(&self, goal: Goal) -> Vec<usize> {
        let which = |f: &dyn Fn(usize) -> bool| {
            let mut ranks: Vec<usize> = self.live.iter().filter(|l| f(**l)).map(|l| self.peer(*l)).collect();
            ranks.sort_unstable();
            ranks.dedup();
            ranks
        };
        let senders = which(&|l| self.awaits(l, goal));
        // Who doesn't take what is sent may be waiting itself; who sends nothing is behind.
        if senders.is_empty() { which(&|l| self.owes(l, goal)) } else { senders }
    }

    /// What is known of a peer that is late, for a person.
    pub(super) fn seen_of(&self, peer: usize) -> String {
        let link = |place: usize| self.links[place].as_ref();
        let connected =
            [peer, peer + self.world].into_iter().any(|p| link(p).is_some_and(|l| l.stream().is_some()));
        let frame = link(peer).and_then(|l| l.waiting_frame());
        match frame {
            Some(h) if h.seq > self.collective.seq => {
                let call = h.call().map_or("another".to_owned(), |c| c.to_string());
                format!("rank {peer} is ahead, in {call} (call {})", h.seq)
            }
            _ if connected => format!("rank {peer} is connected and silent"),
            _ => format!("there is no connection to rank {peer} yet"),
        }
    }

    /// Tells the peers that are connected why the group has ended, once, behind the frames that are half out; and those
    /// to whom a call was about to be connected, for whom `dial` asks. Who takes nothing now, because its buffers are full
    /// while it computes, is told over a connection of its own, as is a rank of each other host where ranks share memory.
    ///
    /// It ends when all of it is on its way, for this rank may end next: what the kernel still holds then is lost if there
    /// is anything that this rank hasn't read.
    pub(super) fn tell(
        &mut self,
        verdict: &Verdict,
        memory: &Memory<'_>,
        shared: &Shared,
        dial: impl Fn(Channel, usize),
    ) {
        if std::mem::replace(&mut self.told, true) {
            return;
        }
        let (frame, mut aside) = (frame::parting(verdict, self.checksum), false);
        let (begun, mut elsewhere) = (Instant::now(), shared.to_be_told(verdict));
        // Those who came before the end was known here; who comes later is told on arrival.
        for (place, arrived) in shared.take_arrivals() {
            self.arrived(place, arrived);
        }
        // With how much of it is out.
        let mut left: Vec<(usize, usize)> = self.live.iter().map(|place| (*place, 0)).collect();
        for (place, _) in &left {
            let link = self.link(*place);
            link.cut_short();
            if link.is_unconnected() && shared.should_dial(*place) {
                dial(self.channel(*place), self.peer(*place));
            }
        }
        while begun.elapsed() < LAST_WORDS {
            for (place, arrived) in shared.take_arrivals() {
                self.arrived(place, arrived);
            }
            left.retain_mut(|(place, said)| {
                let link = self.link(*place);
                let stuck = link.is_unconnected() || (link.write(memory).is_ok() && link.is_sending());
                if !stuck && *said < frame.len() {
                    *said += link.say(&frame[*said..]);
                }
                // The peer may be at the same, and need room; who has said it knows it, and may read no more.
                let knows = link.last_words().is_some();
                !knows && (*said < frame.len() || !link.is_out())
            });
            if left.is_empty() && elsewhere.is_empty() && !shared.is_telling() {
                break;
            }
            if begun.elapsed() > ASIDE && !std::mem::replace(&mut aside, true) {
                elsewhere.extend(left.iter().map(|(place, _)| self.peer(*place)));
                elsewhere.sort_unstable();
                elsewhere.dedup();
                elsewhere.drain(..).for_each(|peer| dial(Channel::Verdict, peer));
            }
            let mut fds = vec![PollFd::new(&shared.wake, PollFlags::IN)];
            for (place, said) in &left {
                let room = if *said < frame.len() { PollFlags::OUT } else { PollFlags::empty() };
                let stream = self.links[*place].as_ref().and_then(|link| link.stream());
                fds.extend(stream.map(|s| PollFd::new(s, s.awaits(room | PollFlags::IN))));
            }
            // Of what is out, the kernel doesn't tell.
            let wait = if left.iter().any(|(_, said)| *said == frame.len()) { 1_000_000 } else { 20_000_000 };
            let _ = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: wait }));
            shared.wake.hush();
        }
    }

    /// Tells the peers that are connected that this rank leaves, unless they know that the group has ended.
    pub(super) fn leave(&mut self) {
        if self.told {
            // A connection that closes with something unread takes back what the peer hasn't got.
            self.live.clone().into_iter().for_each(|place| drop(self.link(place).last_words()));
        } else {
            let Expected { seq, call, .. } = self.collective;
            let mut frame = Header { kind: Kind::Leave, seq, len: 0, call }.bytes();
            if self.checksum {
                frame::seal(&mut frame, &[]);
            }
            for place in self.live.clone() {
                let _ = self.link(place).say(&frame);
            }
        }
    }
}
