//! Where a rank is reached: its listening port, and the thread that makes connections, its own and its peers', until
//! their handshakes are done. Strangers cost it a bounded number of small records for a few seconds, and the job
//! nothing.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tensorwire_core::{Error, Result};

use super::TcpOptions;
use super::frame;
use super::hello::{Channel, GroupId, Hello, Status};
use super::interface::Chosen;
use super::listener::Listener;
use super::negotiate::{Arrival, Dial, Refusal};
use super::secret::{Secret, random};
use super::shared::{Answer, Shared};
use super::socket::Wake;
use super::stream::{Identity, Stream};

/// Handshakes that others may have under way here. Beyond that, the oldest goes: a rank's takes no longer than a
/// round trip, and is tried again.
const MAX_ARRIVALS: usize = 128;

/// How soon a dial is tried again that the peer refused for its own, which it was about to make.
const CROSSED: Duration = Duration::from_millis(50);

/// How soon a dial that was cut is tried again, for the first time; each further time is so much later.
const RETRY: Duration = Duration::from_millis(5);

/// How often: a rank that ends hangs up too, and then nobody listens there; one that has another secret goes on.
const RETRIES: u32 = 20;

/// What to do with a connection whose other side has proved itself.
pub(crate) type Admit = dyn Fn(&Hello, Arrival) + Send + Sync;

/// A listening port and the thread that serves it, until dropped.
#[derive(Debug)]
pub(crate) struct Endpoint {
    inner: Arc<Inner>,
    thread: Option<JoinHandle<()>>,
    address: SocketAddr,
    why: String,
}

#[derive(Debug)]
struct Inner {
    secret: Secret,
    options: TcpOptions,
    wake: Arc<Wake>,
    stop: AtomicBool,
    groups: Mutex<HashMap<GroupId, Weak<Shared>>>,
    /// Groups that are left, from which this process has gone on with others.
    past: Mutex<HashSet<GroupId>>,
    requests: Mutex<Vec<Request>>,
}

/// A connection to be opened.
#[derive(Debug)]
struct Request {
    group: Weak<Shared>,
    place: usize,
    to: SocketAddr,
    /// Whom the peer's certificate must name, over TLS.
    peer: Identity,
    hello: Hello,
    /// How often it may be tried again.
    tries: u32,
    /// Not before.
    at: Instant,
    /// When an unreachable host is given up.
    until: Instant,
}

/// What became of a dial.
#[expect(clippy::large_enum_variant, reason = "it is handed on at once")]
enum Dialled {
    /// Its group knows.
    Done,
    UnderWay(Request, Dial),
    Again(Request),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Endpoint {
    /// Listens, and admits to the groups that are entered here.
    pub(super) fn start(chosen: Chosen, secret: Secret, options: &TcpOptions) -> Result<Endpoint> {
        let ports = options.ports.clone();
        let listener = Listener::open(&chosen, &secret, options)?.map_err(|e| {
            let ports = if ports.start() == ports.end() {
                format!("port {}", ports.start())
            } else {
                format!("ports {} to {}", ports.start(), ports.end())
            };
            Error::os(format!("listening on {} ({}), {ports}", chosen.ip, chosen.why), e)
        })?;
        Endpoint::serve(listener, chosen.why, secret, options, None)
    }

    /// Serves `listener`; `admit` decides on what isn't a group's.
    pub(crate) fn serve(
        listener: impl Into<Listener>,
        why: String,
        secret: Secret,
        options: &TcpOptions,
        admit: Option<Box<Admit>>,
    ) -> Result<Endpoint> {
        let listener = listener.into();
        let address = listener.address().map_err(|e| Error::os("asking for the address listened on", e))?;
        let inner = Arc::new(Inner {
            secret,
            options: options.clone(),
            wake: listener.wake().map_err(|e| Error::os("making an eventfd", e))?,
            stop: AtomicBool::new(false),
            groups: Mutex::default(),
            past: Mutex::default(),
            requests: Mutex::default(),
        });
        let thread = std::thread::Builder::new()
            .name("tensorwire-tcp".into())
            .spawn({
                let inner = inner.clone();
                move || {
                    inner.run(&listener, admit.as_deref());
                    listener.close();
                }
            })
            .map_err(|e| Error::os("starting the thread that makes connections", e))?;
        Ok(Endpoint { inner, thread: Some(thread), address, why })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it listens and why there, for a person.
    pub(super) fn describe(&self) -> String {
        format!("{} ({})", self.address, self.why)
    }

    pub(super) fn secret(&self) -> &Secret {
        &self.inner.secret
    }

    /// Takes connections for `group` from now on.
    pub(super) fn enter(&self, group: &Arc<Shared>) {
        lock(&self.inner.groups).insert(group.id, Arc::downgrade(group));
    }

    /// Takes no connections for the group any more.
    pub(super) fn leave(&self, group: &Shared) {
        if group.has_gone_on() {
            lock(&self.inner.past).insert(group.id);
        }
        lock(&self.inner.groups).remove(&group.id);
    }

    /// Opens a connection to `peer`; [`Shared::dialled`] is told what becomes of it.
    pub(super) fn dial(&self, group: &Arc<Shared>, channel: Channel, peer: usize) -> Result<()> {
        let Some(to) = group.addresses.get().and_then(|a| a.get(peer)).copied() else { return Ok(()) };
        let hello = Hello::new(channel, group.world, group.rank, peer, group.id)?;
        let place = group.place(channel, peer);
        let (at, until) = (Instant::now(), Instant::now() + self.inner.options.peer_timeout);
        if channel == Channel::Verdict {
            group.tells_one();
        }
        lock(&self.inner.requests).push(Request {
            tries: RETRIES,
            group: Arc::downgrade(group),
            place,
            to,
            peer: Identity::Rank(group.job_rank(peer)),
            hello,
            at,
            until,
        });
        self.inner.wake.ring();
        Ok(())
    }

    /// Asks peers whether they wait, and for how long they will: see [`Shared::answers`].
    pub(super) fn ask(&self, group: &Arc<Shared>, peers: &[usize]) {
        group.ask(peers);
        for peer in peers {
            if self.dial(group, Channel::Question, *peer).is_err() {
                group.answered(*peer, Answer::Elsewhere);
            }
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        // Release: pairs with the thread's Acquire load, after the ring.
        self.inner.stop.store(true, Ordering::Release);
        self.inner.wake.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Inner {
    fn run(&self, listener: &Listener, admit: Option<&Admit>) {
        let mut arrivals: Vec<Arrival> = Vec::new();
        let mut dials: Vec<(Request, Dial)> = Vec::new();
        let mut later: Vec<Request> = Vec::new();
        let mut accepting_from = Instant::now();
        let mut seen = 0;
        loop {
            let now = Instant::now();
            let next = arrivals.iter().map(Arrival::until).chain(later.iter().map(|r| r.at));
            let next = next.chain(dials.iter().filter(|d| d.1.is_connecting()).map(|d| d.0.until));
            let next = next.chain((accepting_from > now).then_some(accepting_from));
            // Over QUIC, the kernel tells of no stream.
            let streams = arrivals.iter().map(Arrival::stream).chain(dials.iter().map(|(_, d)| d.stream()));
            let at_hand: Vec<bool> = streams.map(Stream::has_more).collect();
            let (flags, at) = listener.watch(&mut seen);
            let next = next.chain(at).chain(at_hand.contains(&true).then_some(now)).min();
            let (heard, mut ready) = {
                let accept = if accepting_from > now { PollFlags::empty() } else { flags };
                let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN), PollFd::new(listener, accept)];
                fds.extend(arrivals.iter().map(|a| PollFd::new(a.stream(), a.stream().interest())));
                fds.extend(dials.iter().map(|(_, d)| PollFd::new(d.stream(), d.interest())));
                let timeout = next.map(|at| timespec(at.saturating_duration_since(now)));
                if poll(&mut fds, timeout.as_ref()).is_err() {
                    // Interrupted, or short of memory: in any case, later.
                    std::thread::sleep(Duration::from_millis(1));
                }
                let ready: Vec<bool> = fds.iter().map(|f| !f.revents().is_empty()).collect();
                (ready[0], ready.into_iter().skip(1))
            };
            if heard {
                self.wake.hush();
            }
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            listener.turn();
            let listening = ready.next() == Some(true) || matches!(listener, Listener::Quic(_));

            let now = Instant::now();
            arrivals = self.go_on(arrivals, &mut ready, now, admit);
            for (request, dial) in std::mem::take(&mut dials) {
                match self.dial_on(request, dial, ready.next() == Some(true), now) {
                    Dialled::Done => {}
                    Dialled::UnderWay(request, dial) => dials.push((request, dial)),
                    Dialled::Again(request) => later.push(request),
                }
            }
            later.append(&mut lock(&self.requests));
            let due: Vec<Request>;
            (due, later) = later.into_iter().partition(|r| r.at <= now);
            for request in due {
                let asks = matches!(request.hello.channel, Channel::Question | Channel::Verdict);
                if !request.group.upgrade().is_some_and(|g| asks || g.is_dialing(request.place)) {
                    continue;
                }
                match listener.dial(request.to, request.peer, &self.secret, &self.options) {
                    Ok(stream) => {
                        let dial = Dial::over(stream, &request.hello);
                        dials.push((request, dial));
                    }
                    Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                        self.refused(&request, &Refusal::Nobody);
                    }
                    Err(e) => self.refused(&request, &Refusal::Unreachable(e)),
                }
            }
            if listening {
                accepting_from = self.accept(listener, &mut arrivals, now);
            }
        }
    }

    /// Takes what has come to the port; until when to leave it alone.
    fn accept(&self, listener: &Listener, arrivals: &mut Vec<Arrival>, now: Instant) -> Instant {
        // Some at a time, so that a flood of strangers doesn't keep the others waiting.
        for _ in 0..32 {
            match listener.accept(&self.secret) {
                Ok(stream) => {
                    if arrivals.len() == MAX_ARRIVALS {
                        arrivals.remove(0);
                    }
                    arrivals.push(Arrival::new(stream));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e)
                    if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => {}
                // No descriptors or no memory: it can only get better.
                Err(_) => return now + Duration::from_millis(50),
            }
        }
        now
    }

    /// Goes on with the arrivals that are ready; those that are still under way.
    fn go_on(
        &self,
        arrivals: Vec<Arrival>,
        ready: &mut impl Iterator<Item = bool>,
        now: Instant,
        admit: Option<&Admit>,
    ) -> Vec<Arrival> {
        let mut left = Vec::with_capacity(arrivals.len());
        for mut arrival in arrivals {
            if ready.next() == Some(true) || arrival.stream().has_more() {
                match arrival.advance(&self.secret) {
                    Ok(None) => {}
                    Ok(Some(hello)) => {
                        self.admit(&hello, arrival, admit);
                        continue;
                    }
                    Err(_) => continue,
                }
            }
            if arrival.until() > now {
                left.push(arrival);
            }
        }
        left
    }

    fn admit(&self, hello: &Hello, arrival: Arrival, admit: Option<&Admit>) {
        if let Some(admit) = admit {
            return admit(hello, arrival);
        }
        let group = lock(&self.groups).get(&hello.group).and_then(Weak::upgrade);
        if hello.channel == Channel::Question {
            // In a call of whichever group: whoever waits for this rank there waits for what that call waits for.
            let groups: Vec<_> = lock(&self.groups).values().filter_map(Weak::upgrade).collect();
            let waits = groups.iter().filter_map(|g| g.waits()).max();
            arrival.tell_waits(&self.secret, waits);
            return;
        }
        if hello.channel == Channel::Verdict {
            if let Some(group) = group {
                group.is_told(hello, &arrival);
            }
            return;
        }
        match group {
            Some(group) if arrival.stream().tune(&self.options).is_ok() => {
                group.offer(hello, arrival, &self.secret);
            }
            _ => {
                let late = hello.channel == Channel::Survivors && lock(&self.past).contains(&hello.group);
                let status = if late { Status::WentOn } else { Status::NoGroup };
                arrival.settle(&self.secret, status);
            }
        }
    }

    /// Goes on with a dial.
    fn dial_on(&self, mut request: Request, mut dial: Dial, ready: bool, now: Instant) -> Dialled {
        let Some(group) = request.group.upgrade() else { return Dialled::Done };
        if !ready && !matches!(dial.stream(), Stream::Quic(_)) {
            if dial.is_connecting() && request.until <= now {
                self.refused(&request, &Refusal::Unreachable(io::ErrorKind::TimedOut.into()));
                return Dialled::Done;
            }
            return Dialled::UnderWay(request, dial);
        }
        match dial.advance(&self.secret) {
            Ok(false) => return Dialled::UnderWay(request, dial),
            Ok(true) if request.hello.channel == Channel::Verdict => {
                if let Some(verdict) = group.verdict() {
                    // Behind a handshake there is room; who has gone meanwhile needs no word.
                    let _ = dial.into_stream().say(&frame::parting(&verdict, group.checksum));
                }
                group.told_one();
            }
            Ok(true) => {
                let stream = dial.into_stream();
                let tuned = stream.tune(&self.options).map(|()| stream);
                group.dialled(request.place, tuned.map_err(|e| format!("setting up the connection: {e}")));
            }
            // The peer's own dial comes in its place, unless the peer ends before: then this one will find nobody there.
            Err(Refusal::Status(Status::Crossed)) => return self.again(request, now, CROSSED),
            Err(Refusal::Cut | Refusal::Unproved | Refusal::Untrusted) if request.tries > 0 => {
                request.tries -= 1;
                // Over a second in all: a flood that pushes handshakes out may take that long to pass.
                let after = RETRY * (RETRIES - request.tries);
                return self.again(request, now, after);
            }
            Err(refusal) => self.refused(&request, &refusal),
        }
        Dialled::Done
    }

    /// The same dial, to be tried later.
    fn again(&self, mut request: Request, now: Instant, after: Duration) -> Dialled {
        match random() {
            Ok(nonce) => request.hello.nonce = nonce,
            Err(e) => {
                self.refused(&request, &Refusal::Unreachable(io::Error::other(e.to_string())));
                return Dialled::Done;
            }
        }
        (request.at, request.until) = (now + after, now + after + self.options.peer_timeout);
        Dialled::Again(request)
    }

    fn refused(&self, request: &Request, refusal: &Refusal) {
        if request.hello.channel == Channel::Question {
            if let Some(group) = request.group.upgrade() {
                let answer = match refusal {
                    Refusal::Waits(left) => Answer::Waits(*left),
                    _ => Answer::Elsewhere,
                };
                group.answered(request.hello.to as usize, answer);
            }
            return;
        }
        if request.hello.channel == Channel::Verdict {
            // It finds out by itself.
            if let Some(group) = request.group.upgrade() {
                group.told_one();
            }
            return;
        }
        let at = request.to;
        let why = match refusal {
            Refusal::Status(Status::NoGroup) => "it left the group".to_owned(),
            Refusal::Status(Status::WentOn) => "it went on without this rank".to_owned(),
            Refusal::Status(Status::WrongName) => {
                format!("at {at}, it refused this rank's certificate, which is another rank's")
            }
            Refusal::Status(status) => format!("it refused the connection to {at}: {status:?}"),
            Refusal::Nobody => format!("its process ended: nothing listens at {at} any more"),
            Refusal::Unreachable(e) if e.kind() == io::ErrorKind::TimedOut => {
                format!("its host did not answer at {at} within {:?}", self.options.peer_timeout)
            }
            Refusal::Unreachable(e) => format!("its host can't be reached at {at}: {e}"),
            Refusal::Stranger(what) => format!("at {at}, {what}"),
            Refusal::Unproved => format!("at {at}, it has another secret: all ranks of a job need the same"),
            Refusal::Cut => "it hung up".to_owned(),
            Refusal::Untrusted | Refusal::Waits(_) => format!("at {at}, {}", refusal.describe()),
        };
        if let Some(group) = request.group.upgrade() {
            // Where both dialled, the peer may have gone on with this rank, over its own connection.
            if matches!(refusal, Refusal::Status(Status::WentOn)) && group.is_dialing(request.place) {
                group.leave_behind();
            }
            group.dialled(request.place, Err(why));
        }
    }
}

fn timespec(d: Duration) -> Timespec {
    // Rounded up, so that what is due then is due when the poll ends.
    let d = if d.is_zero() { d } else { d + Duration::from_millis(1) };
    Timespec { tv_sec: d.as_secs() as i64, tv_nsec: d.subsec_nanos().into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tcp::shared::Arrived;
    use crate::tcp::socket;

    #[test]
    fn a_peer_that_refuses_for_its_own_dial_and_ends_before_it_is_found_gone() {
        let (secret, options) = (Secret::fixed(), TcpOptions::default());
        let local = || socket::listen([127, 0, 0, 1].into(), 0..=0, &options).unwrap();
        let endpoint = Endpoint::serve(local(), String::new(), secret.clone(), &options, None).unwrap();
        let group = Arc::new(Shared::new(1, 2, [7; 16], false).unwrap());
        let zero = local();
        group.addresses.set(vec![zero.local_addr().unwrap(), endpoint.address()]).unwrap();
        endpoint.enter(&group);
        let place = group.place(Channel::Collective, 0);
        assert!(group.should_dial(place));
        endpoint.dial(&group, Channel::Collective, 0).unwrap();
        // Rank 0 is about to dial itself, says so, and ends.
        let stream = loop {
            if let Ok((stream, _)) = zero.accept() {
                break stream;
            }
        };
        let mut arrival = Arrival::new(Stream::accepted(stream, &secret).unwrap());
        while arrival.advance(&secret).unwrap().is_none() {}
        drop(zero);
        arrival.settle(&secret, Status::Crossed);
        let end = Instant::now() + Duration::from_secs(10);
        let arrived = loop {
            if let Some((0, arrived)) = group.take_arrivals().pop() {
                break arrived;
            }
            assert!(Instant::now() < end, "the dial is never tried again");
            std::thread::sleep(Duration::from_millis(1));
        };
        assert!(matches!(&arrived, Arrived::Failed(why) if why.contains("its process ended")), "{arrived:?}");
    }
}
