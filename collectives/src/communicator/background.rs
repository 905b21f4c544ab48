//! The queue of started calls, and who makes them: a thread of the communicator's own, or one that waits for them.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use tensorwire_core::{Deadline, Error, Result};

use super::Communicator;
#[cfg(feature = "tcp")]
use super::{Carrier, State, check};
#[cfg(feature = "tcp")]
use crate::engine::{Either, NetEngine, Owned, Progress, Request};

/// Started calls that may be under way at once.
pub(super) const MOST: usize = 1024;

/// A started call.
pub(super) enum Job {
    /// Made as a whole.
    Call(Box<dyn FnOnce(&Communicator) + Send>),
    /// Made over TCP, while others are under way.
    #[cfg(feature = "tcp")]
    Request(Request),
}

/// The calls that were started on a communicator, and their thread, which begins with the first.
#[derive(Default)]
pub(super) struct Started {
    background: OnceLock<Arc<Background>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl fmt::Debug for Started {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Started").field("pending", &self.pending()).finish()
    }
}

impl Started {
    fn pending(&self) -> usize {
        self.background.get().map_or(0, |b| b.pending.load(Ordering::Acquire))
    }

    /// Sees to it that every started call is done: calls keep the order in which they were made.
    #[inline]
    pub(super) fn finish(&self) {
        if self.pending() != 0 {
            self.finish_slowly();
        }
    }

    #[cold]
    fn finish_slowly(&self) {
        if let Some(background) = self.background.get() {
            background.help(|| background.pending.load(Ordering::Acquire) == 0);
        }
    }

    /// What makes the calls, which `comm` starts.
    pub(super) fn background(&self, comm: &Communicator) -> Result<&Arc<Background>> {
        if let Some(background) = self.background.get() {
            return Ok(background);
        }
        let mut thread = lock(&self.thread);
        if thread.is_none() {
            let background = Arc::new(Background::new(comm));
            let named = std::thread::Builder::new().name(format!("tensorwire-{}", comm.rank));
            let ran = background.clone();
            let spawned = named.spawn(move || ran.run());
            *thread = Some(spawned.map_err(|e| Error::os("starting a thread for started calls", e))?);
            let _ = self.background.set(background);
        }
        drop(thread);
        Ok(self.background.get().expect("set with the thread"))
    }
}

/// The thread ends when the calls are done. Where they are, it is waited for, so that nothing is left of it.
impl Drop for Started {
    fn drop(&mut self) {
        let Some(background) = self.background.get() else { return };
        lock(&background.queue).closed = true;
        background.wanted.notify_one();
        let thread = lock(&self.thread).take();
        // A started call may be the last that held the communicator.
        if let Some(thread) = thread.filter(|t| t.thread().id() != std::thread::current().id())
            && self.pending() == 0
        {
            let _ = thread.join();
        }
    }
}

pub(super) struct Background {
    /// Makes the calls; it can start none itself.
    comm: Communicator,
    /// Started calls that aren't done yet. Written under the lock on the queue; subtracted from, Release, when a call's
    /// result is there, which pairs with the Acquire load of whoever makes a call behind it.
    pending: AtomicUsize,
    queue: Mutex<Queue>,
    /// Where others than the thread wait until a call is done, or nobody makes calls any more.
    changed: Condvar,
    /// Where the thread waits until there are calls to be made and nobody else makes them.
    wanted: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Calls that were taken from there to be made while others are under way, and aren't done.
    under_way: usize,
    /// Whether the last call is done, and the group not yet left to others.
    #[cfg(feature = "tcp")]
    late: bool,
    /// Whether some thread makes calls.
    driven: bool,
    /// Threads that wait for calls and make them themselves, as soon as nobody else does.
    helpers: usize,
    /// Threads that wait for a change.
    sleepers: usize,
    /// Whether the communicator is gone.
    closed: bool,
}

impl Queue {
    fn has_calls(&self) -> bool {
        !self.jobs.is_empty() || self.under_way > 0
    }
}

type Held<'a> = MutexGuard<'a, Queue>;

impl Background {
    fn new(comm: &Communicator) -> Background {
        let comm = Communicator {
            rank: comm.rank,
            world: comm.world,
            inner: comm.inner.clone(),
            why: comm.why.clone(),
            started: None,
        };
        Background {
            comm,
            pending: AtomicUsize::new(0),
            queue: Mutex::default(),
            changed: Condvar::new(),
            wanted: Condvar::new(),
        }
    }

    /// Ends the group.
    pub(super) fn abort(&self, why: &str) {
        self.comm.abort(why);
    }

    /// Adds a call behind the others, when there is room.
    pub(super) fn push(&self, job: Job) {
        // Relaxed: a call that is done meanwhile only makes room.
        let room = || self.pending.load(Ordering::Relaxed) < MOST;
        if !room() {
            self.help(room);
        }
        let mut queue = lock(&self.queue);
        queue.jobs.push_back(job);
        // Relaxed: whoever must see the call as pending is this thread, or was told of it by this thread.
        self.pending.fetch_add(1, Ordering::Relaxed);
        if queue.driven {
            self.interrupt(&queue);
        } else if queue.helpers == 0 {
            self.wanted.notify_one();
        }
    }

    /// Makes calls until `done`, or waits for the thread that does.
    pub(super) fn help(&self, done: impl Fn() -> bool) {
        let mut queue = lock(&self.queue);
        queue.helpers += 1;
        while !done() {
            queue = match queue.driven {
                true => {
                    self.interrupt(&queue);
                    self.comm.spin(true);
                    self.wait(queue)
                }
                false => self.drive(queue, true, |_| done()),
            };
        }
        queue.helpers -= 1;
        // The rest is the thread's.
        if queue.helpers == 0 && !queue.driven && (queue.has_calls() || queue.closed) {
            self.wanted.notify_one();
        }
    }

    /// Waits until `done` or the deadline, and makes no calls: none could be left half made.
    pub(super) fn wait_until(&self, deadline: Deadline, done: impl Fn() -> bool) {
        let mut queue = lock(&self.queue);
        queue.sleepers += 1;
        while !done() && !deadline.passed() {
            let waited = self.changed.wait_timeout(queue, deadline.remaining());
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        queue.sleepers -= 1;
    }

    fn wait<'a>(&self, mut queue: Held<'a>) -> Held<'a> {
        queue.sleepers += 1;
        queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        queue.sleepers -= 1;
        queue
    }

    /// Wakes those who wait for a change, but for the thread.
    fn wake(&self, queue: &Queue) {
        if queue.sleepers > 0 {
            self.changed.notify_all();
        }
    }

    /// Has the thread that waits with several calls under way look at the queue.
    fn interrupt(&self, queue: &Queue) {
        if queue.under_way > 0 {
            self.comm.interrupt();
        }
    }

    /// Makes calls, one behind the other, until `done` or none is left. While they wait for the network they spin, or not.
    fn drive<'a>(&'a self, mut queue: Held<'a>, spin: bool, done: impl Fn(&Queue) -> bool) -> Held<'a> {
        queue.driven = true;
        while !done(&queue) {
            #[cfg(feature = "tcp")]
            if queue.under_way > 0 || matches!(queue.jobs.front(), Some(Job::Request(_))) {
                drop(queue);
                self.go_on(spin, &done);
                queue = lock(&self.queue);
                if std::mem::take(&mut queue.late) {
                    self.count_off(&queue);
                }
                continue;
            }
            let Some(job) = queue.jobs.pop_front() else { break };
            drop(queue);
            self.comm.spin(spin);
            match job {
                Job::Call(call) => call(&self.comm),
                #[cfg(feature = "tcp")]
                Job::Request(_) => unreachable!("taken above"),
            }
            // Before a call that isn't started can be made.
            self.comm.spin(true);
            queue = lock(&self.queue);
            self.count_off(&queue);
        }
        queue.driven = false;
        self.wake(&queue);
        queue
    }

    /// A call is done.
    fn count_off(&self, queue: &Queue) {
        self.pending.fetch_sub(1, Ordering::Release);
        self.wake(queue);
    }

    /// Makes calls of which several may be under way, until `done` or none is left, or the next isn't such a one.
    #[cfg(feature = "tcp")]
    fn go_on(&self, spin: bool, done: &dyn Fn(&Queue) -> bool) {
        let mut state = self.comm.inner.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { engine: Either::Tcp(engine), algorithm, cause } = &mut *state else {
            unreachable!("such calls are started over TCP alone")
        };
        self.comm.spin(spin);
        let rank = self.comm.rank;
        let poisoned = |cause: &String| Err(Error::Poisoned { rank, cause: cause.clone() });
        loop {
            let mut more = |engine: &NetEngine| loop {
                let mut queue = lock(&self.queue);
                let request = match queue.jobs.pop_front()? {
                    Job::Request(request) => request,
                    call => {
                        queue.jobs.push_front(call);
                        return None;
                    }
                };
                let bytes = request.buffer.bytes().len();
                let chosen = match (&*cause, *algorithm) {
                    (Some(cause), _) => poisoned(cause),
                    (_, Some(forced)) => check(forced, Carrier::Network, bytes),
                    (_, None) => Ok(engine.choose(bytes, &request.reduction)),
                };
                // In its turn, like a result.
                if chosen.is_err() && engine.is_going_on() {
                    queue.jobs.push_front(Job::Request(request));
                    return None;
                }
                queue.under_way += 1;
                drop(queue);
                match chosen {
                    Ok(algorithm) => return Some((request, algorithm)),
                    Err(error) => self.settle(request.buffer, Err(error)),
                }
            };
            match engine.go_on(&mut more) {
                Ok(Progress::Done(buffer)) => self.settle(buffer, Ok(())),
                Ok(Progress::Paused) => {}
                Err(failure) => {
                    let cause = &*cause.insert(failure.to_string());
                    let results =
                        [Err(*failure)].into_iter().chain(std::iter::repeat_with(|| poisoned(cause)));
                    for (buffer, result) in engine.abandon().into_iter().zip(results) {
                        self.settle(buffer, result.map(drop));
                    }
                }
            }
            let queue = lock(&self.queue);
            let next = matches!(queue.jobs.front(), Some(Job::Request(_)));
            if done(&queue) || !(engine.is_going_on() || next) {
                break;
            }
        }
        self.comm.spin(true);
    }

    /// A call is done that was taken from the queue.
    #[cfg(feature = "tcp")]
    fn settle(&self, buffer: Box<dyn Owned>, result: Result<()>) {
        buffer.settle(result);
        let mut queue = lock(&self.queue);
        queue.under_way -= 1;
        // A call that isn't started finds nobody in the group when none is pending.
        if self.pending.load(Ordering::Relaxed) > 1 {
            self.count_off(&queue);
        } else {
            queue.late = true;
            self.wake(&queue);
        }
    }

    /// The thread: makes the calls that nobody waits for. Over a network it doesn't spin, for others compute meanwhile.
    fn run(&self) {
        let mut queue = lock(&self.queue);
        while !queue.closed || queue.has_calls() || queue.driven {
            queue = if queue.driven || queue.helpers > 0 || !queue.has_calls() {
                self.wanted.wait(queue).unwrap_or_else(PoisonError::into_inner)
            } else {
                self.drive(queue, false, |queue| queue.helpers > 0)
            };
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
