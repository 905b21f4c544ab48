//! Who goes on after a group has ended: the ranks that are left agree, without one that decides for them.
//!
//! Each rank tells all others whom it takes to be there, and again whenever that changes: a peer that has ended, left,
//! was cut off or is late is there no more, and whoever isn't there for one isn't for all. A rank that has heard its own
//! set from everybody in it has decided, and says so; others take a decision over. Sets only get smaller and a
//! connection keeps the order of what is said, so that two ranks that live can't decide differently: to decide without a
//! rank that had decided otherwise, a peer would have to pass over its last word. (Flooding consensus: Cachin, Guerraoui
//! and Rodrigues, Reliable and Secure Distributed Programming, 2011, section 5.2.) In `n` ranks of which `f` die
//! meanwhile, each sends at most `(f + 2) (n - 1)` messages of `n` bytes.
//!
//! A rank that was late, and comes when the others have gone on, is told so: it doesn't go on alone. Where a network
//! falls apart, the ranks on either side go on as a group of their own.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tensorwire_core::{Deadline, Error, Result};

use super::frame::{Header, Kind};
use super::group::TcpGroup;
use super::hello::Channel;
use super::link::{Expected, Incoming, Link};
use super::memory::{Memory, Place, Span};
use super::shared::{Answer, Arrived};

/// How often peers' hosts are looked at.
const LOOK: Duration = Duration::from_millis(500);

/// What every frame here is: they are read in the order in which they come.
const EXPECTED: Expected = Expected { kind: Kind::Data, seq: 0, call: [0; 4] };

/// Ranks, each in or out.
type Set = Vec<bool>;

/// One rank's part in the agreement. It does no I/O.
#[derive(Debug)]
struct Agreement {
    me: usize,
    /// Whom this rank takes to be there.
    there: Set,
    /// Who is gone, or was waited for in vain, as this rank knows by itself: there is nothing more to hear.
    lost: Set,
    /// What each rank said last.
    said: Vec<Option<Set>>,
    /// Who has said that it has decided.
    done: Set,
    decision: Option<Set>,
}

/// The others have gone on without this rank: who.
#[derive(Debug, PartialEq)]
struct LeftBehind(Set);

impl Agreement {
    fn new(me: usize, world: usize) -> Agreement {
        let none = vec![false; world];
        let there = vec![true; world];
        Agreement { me, there, lost: none.clone(), said: vec![None; world], done: none, decision: None }
    }

    /// Nothing more will come from `peer`.
    fn lose(&mut self, peer: usize) {
        (self.there[peer], self.lost[peer]) = (false, true);
    }

    /// `from` takes the ranks in `set` to be there, or has decided that they go on.
    fn hear(&mut self, from: usize, decided: bool, set: Set) -> Result<(), LeftBehind> {
        self.done[from] |= decided;
        // The last word of a rank that isn't there counts for nobody.
        if self.decision.is_some() || !self.there[from] {
            return Ok(());
        }
        if !set[self.me] {
            return Err(LeftBehind(set));
        }
        if decided {
            self.decision = Some(set);
            return Ok(());
        }
        for (there, theirs) in self.there.iter_mut().zip(&set) {
            *there &= theirs;
        }
        self.said[from] = Some(set);
        Ok(())
    }

    /// Who goes on, if that is decided.
    fn decision(&mut self) -> Option<&Set> {
        if self.decision.is_none() && self.awaited().next().is_none() {
            self.decision = Some(self.there.clone());
        }
        self.decision.as_ref()
    }

    /// Whom this rank waits for: to say what it says itself, or that they have decided too.
    fn awaited(&self) -> impl Iterator<Item = usize> {
        let open = |r: &usize| match &self.decision {
            Some(set) => set[*r] && !self.done[*r] && !self.lost[*r],
            None => self.there[*r] && self.said[*r].as_ref() != Some(&self.there),
        };
        (0..self.there.len()).filter(|r| *r != self.me).filter(open)
    }

    /// Who goes on, as far as this rank knows.
    fn going_on(&self) -> &Set {
        self.decision.as_ref().unwrap_or(&self.there)
    }

    /// What this rank has to say: whether it has decided, and the set, a byte a rank.
    fn words(&self) -> Vec<u8> {
        [self.decision.is_some()].iter().chain(self.going_on()).map(|b| u8::from(*b)).collect()
    }

    fn hear_words(&mut self, from: usize, words: &[u8]) -> Result<(), LeftBehind> {
        self.hear(from, words[0] != 0, words[1..].iter().map(|b| *b != 0).collect())
    }
}

fn ranks(set: &[bool]) -> Vec<usize> {
    (0..set.len()).filter(|r| set[*r]).collect()
}

impl TcpGroup {
    /// Forms a group of the ranks that are still there, in their old order, after this one has failed; if it hasn't,
    /// this ends it. Every survivor calls it, once. It waits up to the timeout for survivors that haven't yet, and as long
    /// as for a host that doesn't answer for those that a timeout named. If one then waits in a call of another group, it
    /// waits up to the timeout from when that call gives up. Returns the group, and its ranks' numbers in this one.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] if the others went on without this rank; [`Error::InvalidArgument`] if the group was shrunk
    /// before; [`Error::Os`] if the system gives this rank no part in a new group.
    pub fn shrink(&self) -> Result<(TcpGroup, Vec<usize>)> {
        let (me, world) = (self.rank(), self.world());
        if self.shared.has_gone_on() {
            let what = format!("rank {me}: this group was shrunk before: use the one that it became");
            return Err(Error::invalid(what));
        }
        if !self.shared.has_failed() {
            self.handle().abort(&format!("rank {me} shrinks the group"));
        }
        let left_behind = |who: &str| {
            let what = format!("shrinking: {who} went on without this one, which came too late");
            Error::Rendezvous { rank: me, world, what }
        };
        let mut talk = Talk::new(self);
        let agreed = talk.agree();
        self.shared.set_waits(None);
        match agreed {
            Ok(()) => {}
            Err(Broken::LeftBehind(None)) => return Err(left_behind("the others")),
            Err(Broken::LeftBehind(Some(set))) => {
                return Err(left_behind(&format!("ranks {:?}", ranks(&set))));
            }
            Err(Broken::Error(error)) => return Err(error),
        }
        let next = talk.next.take().expect("the ranks have agreed");
        self.shared.go_on();
        // Who has come meanwhile finds here what the others have agreed on.
        talk.welcome();
        talk.write();
        Ok(next)
    }
}

enum Broken {
    LeftBehind(Option<Set>),
    Error(Error),
}

/// Until when a rank waits for its peers. Those that have said nothing by then are asked, once, whether they wait in a
/// call of another group.
struct Patience {
    deadline: Deadline,
    asked: Asked,
}

enum Asked {
    NotYet,
    Now,
    Before,
}

/// The connections over which ranks agree.
struct Talk<'a> {
    group: &'a TcpGroup,
    agreement: Agreement,
    links: Vec<Link>,
    /// All that was said so far, one after the other.
    said: Vec<u8>,
    /// What the peers say, one after the other.
    heard: Vec<u8>,
    /// Bytes that one says at once.
    len: usize,
    /// This rank's part in the group of those who go on, and who they are.
    next: Option<(TcpGroup, Vec<usize>)>,
}

impl<'a> Talk<'a> {
    fn new(group: &'a TcpGroup) -> Talk<'a> {
        let (me, world) = (group.rank(), group.world());
        let len = world + 1;
        Talk {
            group,
            agreement: Agreement::new(me, world),
            links: (0..world).map(|_| Link::new(group.shared.checksum)).collect(),
            said: Vec::new(),
            heard: vec![0; len * world],
            len,
            next: None,
        }
    }

    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let me = self.group.rank();
        (0..self.group.world()).filter(move |r| *r != me)
    }

    /// Talks until all who go on are known to know it.
    fn agree(&mut self) -> Result<(), Broken> {
        let TcpGroup { shared, options, .. } = self.group;
        let named = shared.verdict().map_or(Vec::new(), |v| v.lost());
        let start = Instant::now();
        let mut patience = Patience { deadline: Deadline::after(options.timeout), asked: Asked::NotYet };
        self.call_all();
        loop {
            self.welcome();
            // Who has decided is among those who go on: a second dial of its own may have found that a peer has, since.
            if shared.is_left_behind() && self.agreement.decision.is_none() {
                return Err(Broken::LeftBehind(None));
            }
            self.listen().map_err(|LeftBehind(set)| Broken::LeftBehind(Some(set)))?;
            if let (Some(set), None) = (self.agreement.decision(), &self.next) {
                let members = ranks(set);
                // A stopped rank whose peers are gone when it goes on was one that they named.
                if members.len() == 1 && named.contains(&shared.rank) {
                    return Err(Broken::LeftBehind(None));
                }
                let set: Vec<u8> = set.iter().map(|b| u8::from(*b)).collect();
                // Before this rank says that it has decided, for then others may connect.
                let next = self.group.part(&members, "survivors", &[&set]).map_err(Broken::Error)?;
                self.next = Some((next, members));
            }
            self.say();
            self.write();
            let awaited: Vec<usize> = self.agreement.awaited().collect();
            let going_on = self.agreement.going_on();
            let unsaid = self.peers().any(|p| going_on[p] && self.links[p].is_sending() && self.can_write(p));
            if self.next.is_some() && awaited.is_empty() && !unsaid {
                return Ok(());
            }
            let overdue = self.overdue(&mut patience, &awaited);
            shared.set_waits(Some(patience.deadline));
            let late = |p: usize| {
                let silent = self.links[p].silent() > options.peer_timeout;
                // Who has said something was only waiting for another.
                let mute = named.contains(&p) && self.agreement.said[p].is_none();
                silent || (mute && start.elapsed() > options.peer_timeout) || overdue.contains(&p)
            };
            let late: Vec<usize> = awaited.into_iter().filter(|p| late(*p)).collect();
            if late.is_empty() {
                self.sleep(LOOK.min(patience.deadline.remaining() + Duration::from_millis(1)));
            }
            late.into_iter().for_each(|p| self.agreement.lose(p));
        }
    }

    /// Who of those awaited is too late, now that the deadline has passed, if it has.
    fn overdue(&self, patience: &mut Patience, awaited: &[usize]) -> Vec<usize> {
        let TcpGroup { shared, endpoint, options, .. } = self.group;
        let unheard: Vec<usize> =
            awaited.iter().copied().filter(|p| self.agreement.said[*p].is_none()).collect();
        let has_passed = patience.deadline.passed();
        match patience.asked {
            Asked::NotYet if has_passed && !unheard.is_empty() => {
                endpoint.ask(shared, &unheard);
                *patience = Patience { deadline: Deadline::after(options.peer_timeout), asked: Asked::Now };
                Vec::new()
            }
            Asked::Now => {
                let mut answers = shared.answers();
                answers.retain(|(peer, _)| unheard.contains(peer));
                if !has_passed && answers.iter().any(|(_, answer)| *answer == Answer::Awaited) {
                    return Vec::new();
                }
                let waits = |answer| if let Answer::Waits(left) = answer { left } else { Duration::ZERO };
                let left = answers.iter().map(|(_, answer)| waits(*answer)).max().unwrap_or_default();
                let deadline = Deadline::after(left.saturating_add(options.timeout));
                *patience = Patience { deadline, asked: Asked::Before };
                if left.is_zero() { answers.into_iter().map(|(peer, _)| peer).collect() } else { Vec::new() }
            }
            _ if has_passed => {
                patience.deadline = Deadline::after(options.timeout);
                awaited.to_vec()
            }
            _ => Vec::new(),
        }
    }

    fn can_write(&self, peer: usize) -> bool {
        self.links[peer].stream().is_some() && self.links[peer].gone().is_none()
    }

    /// Opens the connections, and expects to hear something on each.
    fn call_all(&mut self) {
        let TcpGroup { shared, endpoint, .. } = self.group;
        for peer in self.peers() {
            self.expect(peer);
            if shared.should_dial(shared.place(Channel::Survivors, peer))
                && endpoint.dial(shared, Channel::Survivors, peer).is_err()
            {
                self.agreement.lose(peer);
            }
        }
    }

    fn expect(&mut self, peer: usize) {
        let span = Span::new(Place::Output, peer * self.len..(peer + 1) * self.len);
        self.links[peer].receives.push_back(Incoming { number: 0, span });
    }

    /// Takes the connections that have been made.
    fn welcome(&mut self) {
        for (peer, arrived) in self.group.shared.take_survivors() {
            match arrived {
                Arrived::Connection(stream) => self.links[peer].connect(stream),
                Arrived::Failed(why) => {
                    self.links[peer].give_up(why);
                    self.agreement.lose(peer);
                }
            }
        }
    }

    /// Hears what has come.
    fn listen(&mut self) -> Result<(), LeftBehind> {
        for peer in self.peers() {
            while !self.agreement.lost[peer] {
                let mut memory = Memory { output: &mut self.heard, ..Memory::none() };
                match self.links[peer].read(&EXPECTED, &mut memory) {
                    Ok((0, _)) => break,
                    Ok(_) => {
                        let words = &self.heard[peer * self.len..][..self.len];
                        self.agreement.hear_words(peer, words)?;
                        self.expect(peer);
                    }
                    Err(_) => self.agreement.lose(peer),
                }
            }
        }
        Ok(())
    }

    /// Says what has changed, also to those who aren't taken to be there: they may be late.
    fn say(&mut self) {
        let words = self.agreement.words();
        if self.said.ends_with(&words) {
            return;
        }
        let at = self.said.len()..self.said.len() + words.len();
        self.said.extend_from_slice(&words);
        let header = Header { kind: Kind::Data, seq: 0, len: words.len() as u64, call: [0; 4] }.bytes();
        for peer in self.peers() {
            self.links[peer].send(0, header, Span::new(Place::Input, at.clone()));
        }
    }

    fn write(&mut self) {
        let memory = Memory { input: Some(&self.said), ..Memory::none() };
        for link in &mut self.links {
            // Whoever is gone is found out by reading, behind what it said last.
            let _ = link.write(&memory);
        }
    }

    fn sleep(&self, wait: Duration) {
        if self.links.iter().zip(&self.agreement.lost).any(|(link, lost)| !lost && link.may_go_on()) {
            return;
        }
        let mut fds = vec![PollFd::new(&self.group.shared.wake, PollFlags::IN)];
        for (link, lost) in self.links.iter().zip(&self.agreement.lost) {
            if let Some(stream) = link.stream().filter(|_| !lost) {
                let out = if link.is_sending() { PollFlags::OUT } else { PollFlags::empty() };
                fds.push(PollFd::new(stream, stream.awaits(PollFlags::IN | out)));
            }
        }
        let timeout = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() };
        // Interrupted, or short of memory: in any case, later.
        let _ = poll(&mut fds, Some(&timeout));
        self.group.shared.wake.hush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    /// Ranks that agree over channels that keep their order, while some die in the middle of what they say.
    struct World {
        ranks: Vec<Option<Agreement>>,
        /// What each has said last.
        said: Vec<Vec<u8>>,
        /// `ways[a][b]`: what `a` said and `b` hasn't heard.
        ways: Vec<Vec<VecDeque<Vec<u8>>>>,
    }

    impl World {
        fn new(world: usize) -> World {
            World {
                ranks: (0..world).map(|r| Some(Agreement::new(r, world))).collect(),
                said: vec![Vec::new(); world],
                ways: vec![vec![VecDeque::new(); world]; world],
            }
        }

        /// Rank `r` says what is new, but dies when it has told `listeners`, if they are given.
        fn say(&mut self, r: usize, listeners: Option<usize>) {
            let Some(rank) = &mut self.ranks[r] else { return };
            rank.decision();
            let words = rank.words();
            if words != self.said[r] {
                let told = (0..self.ways.len()).filter(|to| *to != r).take(listeners.unwrap_or(usize::MAX));
                told.for_each(|to| self.ways[r][to].push_back(words.clone()));
                self.said[r] = words;
            }
            if listeners.is_some() {
                self.ranks[r] = None;
            }
        }

        /// `to` hears `from`'s next word, or, behind the last, that it is dead.
        fn hear(&mut self, from: usize, to: usize) -> bool {
            let dead = self.ranks[from].is_none();
            let Some(rank) = self.ranks[to].as_mut().filter(|r| from != to && !r.lost[from]) else {
                return false;
            };
            match self.ways[from][to].pop_front() {
                Some(words) => rank.hear_words(from, &words).expect("nobody that lives is left out"),
                None if dead => rank.lose(from),
                None => return false,
            }
            true
        }
    }

    proptest! {
        #[test]
        fn survivors_agree_whoever_dies_when(
            world in 1usize..7,
            events in proptest::collection::vec((0usize..7, 0usize..7, 0u8..20, 0usize..7), 0..300),
        ) {
            let mut w = World::new(world);
            for (a, b, what, listeners) in events {
                let (a, b) = (a % world, b % world);
                let alive = w.ranks.iter().flatten().count();
                match what {
                    // One in twenty dies while it speaks; the last one doesn't.
                    0 if alive > 1 => w.say(a, Some(listeners)),
                    1..8 => w.say(a, None),
                    _ => drop(w.hear(a, b)),
                }
            }
            // Then nobody dies any more, and everybody hears everything.
            loop {
                let mut moved = false;
                for a in 0..world {
                    w.say(a, None);
                    for b in 0..world {
                        moved |= w.hear(a, b);
                    }
                }
                if !moved {
                    break;
                }
            }
            let mut decisions: Vec<Set> = Vec::new();
            for (r, rank) in w.ranks.iter_mut().enumerate() {
                let Some(rank) = rank else { continue };
                let set = rank.decision().expect("all who live have decided").clone();
                prop_assert!(set[r], "rank {} is part of its own group", r);
                prop_assert_eq!(rank.awaited().count(), 0, "and knows that the others have too");
                decisions.push(set);
            }
            prop_assert!(decisions.windows(2).all(|d| d[0] == d[1]), "{:?}", decisions);
        }
    }

    #[test]
    fn the_last_word_of_a_rank_that_is_not_there_counts_for_nobody() {
        let mut one = Agreement::new(1, 4);
        let without_three = vec![true, true, true, false];
        one.hear(0, false, without_three.clone()).unwrap();
        // Rank 0 may decide without rank 3 as soon as this rank has said the same, which it does next.
        one.hear(3, true, vec![true; 4]).unwrap();
        assert_eq!(one.decision(), None);
        one.hear(2, false, without_three.clone()).unwrap();
        assert_eq!(one.decision(), Some(&without_three));
    }

    #[test]
    fn who_is_left_out_learns_it() {
        let mut late = Agreement::new(2, 3);
        assert_eq!(late.hear(0, false, vec![true, true, false]), Err(LeftBehind(vec![true, true, false])));
        let mut one = Agreement::new(0, 2);
        assert_eq!(one.decision(), None, "nobody decides before it has heard of the others");
        one.lose(1);
        assert_eq!(one.decision(), Some(&vec![true, false]));
    }
}
