//! The links of a rank in a group, and how a call drives them: from the caller's thread, which polls, for MPI has nothing to
//! sleep on: it spins for a short while, then pauses longer and longer.

use std::time::{Duration, Instant};

use tensorwire_core::{Call, Deadline};

use super::Pause;
use super::link::{Expected, Incoming, Link, Pool, Trouble};
use super::raw::{Buffer, Transfer};
use super::shared::{CONTROL, Shared, Word};
use super::world::Tag;
use crate::shm::verdict::Verdict;
use crate::tcp::{Header, Kind, Memory, Span};

/// How often a rank that waits for long looks whether its peers' processes are alive.
const LOOK: Duration = Duration::from_millis(20);

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
    /// Whether what was sent in collectives must be where it is asked for: between its calls, a rank gives MPI no chance to
    /// go on with it.
    pub(super) there: bool,
}

/// Why a call can't go on.
#[derive(Debug)]
pub(super) enum Stop {
    /// A link is in trouble: the peer's, and whether it is one for messages.
    Peer(usize, bool, Trouble),
    /// The group has ended, here or elsewhere.
    Ended(Box<Verdict>),
    /// These ranks have not come in time.
    Late(Vec<usize>),
    /// MPI can't be used.
    Unusable(String),
}

#[derive(Debug)]
pub(super) struct Mesh {
    /// One a peer for collectives, then one a peer for messages; made at first use.
    links: Vec<Option<Box<Link>>>,
    /// Which of them there are.
    live: Vec<usize>,
    pool: Pool,
    /// What the frames of the collective are.
    collective: Expected,
    /// Receives and sends that the call has asked for, numbered in that order, and how many are done.
    asked: usize,
    received: usize,
    pub(super) sends: usize,
    sent: usize,
    /// Waits for a word about the group.
    control: Option<Transfer>,
    /// Why the group has ended, as a peer has said, and when.
    heard: Option<(Box<Verdict>, Instant)>,
    /// When the peers that this call waits for in vain were asked whether they wait themselves, and which have said so.
    asked_at: Option<Instant>,
    waiting: Vec<usize>,
}

impl Mesh {
    pub(super) fn new(world: usize) -> Mesh {
        Mesh {
            links: (0..2 * world).map(|_| None).collect(),
            live: Vec::new(),
            pool: Pool::default(),
            collective: Expected { kind: Kind::Data, seq: 0, call: [0; 4] },
            asked: 0,
            received: 0,
            sends: 0,
            sent: 0,
            control: None,
            heard: None,
            asked_at: None,
            waiting: Vec::new(),
        }
    }

    /// Begins a call; a collective has a number and a call of its own that its frames carry.
    pub(super) fn begin(&mut self, collective: Option<(u64, &Call)>) {
        (self.asked, self.received, self.sends, self.sent) = (0, 0, 0, 0);
        self.asked_at = None;
        if let Some((seq, call)) = collective {
            self.collective = Expected { kind: Kind::Data, seq, call: call.to_words() };
        }
    }

    fn link(&mut self, place: usize, shared: &Shared) -> &mut Link {
        let world = shared.world();
        if self.links[place].is_none() {
            let peer = shared.ranks[place % world];
            let link = Link::new(&shared.over, shared.context, peer, place >= world);
            self.links[place] = Some(Box::new(link));
            self.live.push(place);
        }
        self.links[place].as_mut().expect("made above")
    }

    /// Asks for the bytes of `span` to be sent; a message says as which call.
    #[inline]
    pub(super) fn send(&mut self, place: usize, span: Span, message: Option<&Call>, shared: &Shared) {
        let Expected { seq, call, .. } = self.collective;
        let (kind, call) = message.map_or((Kind::Data, call), |call| (Kind::Message, call.to_words()));
        let header = Header { kind, seq, len: span.len() as u64, call };
        let number = self.sends;
        self.sends += 1;
        self.link(place, shared).send(number, header.bytes(), span);
    }

    /// Asks for the bytes of `span` to be received.
    #[inline]
    pub(super) fn receive(&mut self, place: usize, span: Span, shared: &Shared) {
        let number = self.asked;
        self.asked += 1;
        self.link(place, shared).receives.push_back(Incoming { number, span });
    }

    /// How many receives the call has asked for.
    #[inline]
    pub(super) fn asked(&self) -> usize {
        self.asked
    }

    /// Whether receives and sends have come as far as the goal: the links' first ones are beyond it.
    #[inline]
    fn reached(&self, goal: Goal) -> bool {
        let all = self.received == self.asked && self.sent == self.sends;
        (all && !goal.there)
            || (self.received >= goal.received
                && self.sent >= goal.sent
                && self.live.iter().all(|place| !self.awaits(*place, goal) && !self.owes(*place, goal)))
    }

    /// Whether a link has sends to do that the goal needs.
    #[inline]
    fn owes(&self, place: usize, goal: Goal) -> bool {
        let owes = |l: &Link| {
            l.next_send().is_some_and(|n| n < goal.sent)
                || (goal.there && l.is_asked() && place < self.links.len() / 2)
        };
        self.links[place].as_deref().is_some_and(owes)
    }

    /// Whether a link has receives to come that the goal needs.
    #[inline]
    fn awaits(&self, place: usize, goal: Goal) -> bool {
        self.links[place]
            .as_ref()
            .is_some_and(|l| l.receives.front().is_some_and(|r| r.number < goal.received))
    }

    /// Moves what can be moved on one link. A message's frames must be what the call that receives it says.
    #[inline]
    pub(super) fn advance(
        &mut self,
        place: usize,
        shared: &Shared,
        message: &Expected,
        memory: &mut Memory<'_>,
    ) -> Result<bool, Stop> {
        let world = shared.world();
        let expected = if place < world { &self.collective } else { message };
        let Some(link) = &mut self.links[place] else { return Ok(false) };
        let mut moved = false;
        let trouble = 'trouble: {
            if link.is_sending() || link.is_asked() {
                match link.write(&shared.over, &mut self.pool, memory) {
                    Ok((done, some)) => {
                        self.sent += done;
                        moved |= some;
                    }
                    Err(trouble) => break 'trouble trouble,
                }
            }
            if link.is_receiving() {
                match link.read(&shared.over, &mut self.pool, expected, memory) {
                    Ok((done, some)) => {
                        self.received += done;
                        moved |= some;
                    }
                    Err(trouble) => break 'trouble trouble,
                }
            }
            return Ok(moved);
        };
        Err(Stop::Peer(place % world, place >= world, trouble))
    }

    /// Drives the links until the goal is reached.
    pub(super) fn drive(
        &mut self,
        goal: Goal,
        shared: &Shared,
        message: &Expected,
        deadline: &mut Option<Deadline>,
        memory: &mut Memory<'_>,
    ) -> Result<(), Stop> {
        let mut pause = Pause::new(!shared.spins());
        let mut looked: Option<Instant> = None;
        let mut slept = false;
        loop {
            if self.reached(goal) {
                return Ok(());
            }
            if shared.has_failed()
                && let Some(verdict) = shared.verdict()
            {
                return Err(Stop::Ended(Box::new(verdict)));
            }
            let mut moved = false;
            for i in 0..self.live.len() {
                moved |= self.advance(self.live[i], shared, message, memory)?;
            }
            if moved {
                pause.restart();
                // However long a call takes, it is late only where nothing moves.
                if deadline.take().is_some() {
                    self.asked_at = None;
                }
                continue;
            }
            if pause.is_short() {
                pause.wait();
                continue;
            }
            let until = *deadline.get_or_insert_with(|| Deadline::after(shared.over.options.timeout));
            let now = Instant::now();
            if looked.is_none_or(|at| now - at >= LOOK) {
                looked = Some(now);
                // The first look is at who is ahead or has gone, the others also at who is no more.
                let alive = !std::mem::replace(&mut slept, true);
                self.listen(shared, message, memory)?;
                if !alive {
                    self.look_for_the_dead(goal, shared, message, memory)?;
                }
                if until.passed() {
                    self.ask_who_is_late(goal, shared)?;
                }
            }
            self.hear(shared)?;
            if let Some((verdict, at)) = &self.heard
                && at.elapsed() >= GRACE
            {
                return Err(Stop::Ended(verdict.clone()));
            }
            pause.wait();
        }
    }

    /// Takes what peers say about the group, and answers those that ask.
    fn hear(&mut self, shared: &Shared) -> Result<(), Stop> {
        let over = &shared.over;
        loop {
            if self.control.is_none() {
                let tag = over.tag(shared.context, Tag::Control);
                let open = over.comm.receive(Buffer::new(CONTROL), None, tag).map_err(Stop::Unusable)?;
                self.control = Some(open);
            }
            let Some(open) = &mut self.control else { return Ok(()) };
            let Some((buffer, count)) = open.complete().map_err(Stop::Unusable)? else { return Ok(()) };
            self.control = None;
            match Word::parse(&buffer.bytes()[..count]) {
                Some(Word::Ended(verdict)) => {
                    self.heard.get_or_insert((verdict, Instant::now()));
                }
                // Whoever asks waits for this rank, which waits as well: it is in a call.
                Some(Word::Asks(who)) if who < shared.world() => shared.say(who, &Word::Waits(shared.rank)),
                Some(Word::Waits(who)) => self.waiting.push(who),
                _ => {}
            }
        }
    }

    /// Looks at links from which nothing is awaited: they may bring a frame that shows another call.
    fn listen(&mut self, shared: &Shared, message: &Expected, memory: &mut Memory<'_>) -> Result<(), Stop> {
        let world = shared.world();
        for i in 0..self.live.len() {
            let place = self.live[i];
            let expected = if place < world { &self.collective } else { message };
            let Some(link) = self.links[place].as_mut().filter(|link| !link.is_receiving()) else { continue };
            link.read(&shared.over, &mut self.pool, expected, memory)
                .map_err(|trouble| Stop::Peer(place % world, place >= world, trouble))?;
        }
        Ok(())
    }

    /// Fails if the process of a peer on whom this call depends has ended, and nothing of it is left to be read.
    fn look_for_the_dead(
        &mut self,
        goal: Goal,
        shared: &Shared,
        message: &Expected,
        memory: &mut Memory<'_>,
    ) -> Result<(), Stop> {
        for i in 0..self.live.len() {
            let place = self.live[i];
            let peer = place % shared.world();
            let needed = self.awaits(place, goal) || self.owes(place, goal);
            if needed
                && shared.over.has_ended(shared.ranks[peer])
                && !self.advance(place, shared, message, memory)?
            {
                super::raw::break_off();
                let how = Trouble::Lost("its process ended".to_owned());
                return Err(Stop::Peer(peer, place >= shared.world(), how));
            }
        }
        Ok(())
    }

    /// Ends a call whose time is up, once it knows whom to name: not those that wait as well, for another.
    fn ask_who_is_late(&mut self, goal: Goal, shared: &Shared) -> Result<(), Stop> {
        let late = self.late(goal, shared.world());
        let Some(since) = self.asked_at else {
            self.asked_at = Some(Instant::now());
            self.waiting.clear();
            late.iter().for_each(|peer| shared.say(*peer, &Word::Asks(shared.rank)));
            return Ok(());
        };
        let guilty: Vec<usize> = late.iter().copied().filter(|p| !self.waiting.contains(p)).collect();
        match since.elapsed() {
            t if t < ANSWERS => Ok(()),
            // Where all wait, one of them will say for whom.
            t if t < 2 * ANSWERS && guilty.is_empty() => Ok(()),
            _ => Err(Stop::Late(if guilty.is_empty() { late } else { guilty })),
        }
    }

    /// Whom the call waits for.
    fn late(&self, goal: Goal, world: usize) -> Vec<usize> {
        let which = |f: &dyn Fn(usize) -> bool| {
            let mut ranks: Vec<usize> = self.live.iter().filter(|l| f(**l)).map(|l| *l % world).collect();
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
        let frame = self.links[peer].as_ref().and_then(|link| link.waiting_frame());
        match frame {
            Some(h) if h.seq > self.collective.seq => {
                let call = h.call().map_or("another".to_owned(), |c| c.to_string());
                format!("rank {peer} is ahead, in {call} (call {})", h.seq)
            }
            _ => format!("rank {peer} is silent"),
        }
    }

    /// Waits, for no longer than `limit`, until everything that was sent is on its way; what isn't stays with MPI.
    pub(super) fn leave(&mut self, limit: Duration) {
        let (begun, mut pause) = (Instant::now(), Pause::new(true));
        let out = |mesh: &mut Mesh| {
            let Mesh { links, pool, .. } = mesh;
            links.iter_mut().flatten().all(|link| link.is_out(pool))
        };
        while !out(self) && begun.elapsed() < limit {
            pause.wait();
        }
        super::end::leave_behind(self.links.iter_mut().flatten().flat_map(|link| link.leave()));
    }
}
