//! Calls that run in the background.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Waker};

#[cfg(feature = "tcp")]
use tensorwire_core::{Call, Op};
use tensorwire_core::{Deadline, Element, Error, ReduceOp, Result};

use super::Communicator;
use super::background::{Background, Job, lock};
#[cfg(feature = "tcp")]
use super::collectives::call;
#[cfg(feature = "tcp")]
use crate::engine::{Owned, Reduction, Request};

/// A call that runs in the background, and the buffer that it owns meanwhile.
///
/// [`wait`](Work::wait) gives the buffer back with the result in it; as a [`Future`] it does the same. Dropping
/// it lets the call finish; [`cancel`](Work::cancel) doesn't. Works are done in the order in which they were started.
#[must_use = "dropping it lets the call finish, and drops its result"]
pub struct Work<B> {
    outcome: Arc<Outcome<B>>,
    /// Gone when the communicator is and all of its calls are done.
    background: Weak<Background>,
}

impl<B> fmt::Debug for Work<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Work").field("done", &self.is_done()).finish()
    }
}

struct Outcome<B>(Mutex<State<B>>);

enum State<B> {
    /// The call isn't done: who is to be told when it is.
    Pending(Option<Waker>),
    Done(Result<B>),
    /// The result was given to who polled for it.
    Taken,
}

impl<B> Outcome<B> {
    fn is_pending(&self) -> bool {
        matches!(*lock(&self.0), State::Pending(_))
    }

    /// Notes what has become of the call.
    fn settle(&self, result: Result<B>) {
        let before = std::mem::replace(&mut *lock(&self.0), State::Done(result));
        if let State::Pending(Some(waker)) = before {
            waker.wake();
        }
    }

    /// The result, if the call is done.
    fn take(&self, waker: Option<&Waker>) -> Option<Result<B>> {
        let mut state = lock(&self.0);
        match &mut *state {
            State::Pending(tell) => {
                *tell = waker.cloned();
                None
            }
            done => match std::mem::replace(done, State::Taken) {
                State::Done(result) => Some(result),
                _ => panic!("a Work gives its result once"),
            },
        }
    }
}

/// A buffer, and where it goes when its call is done.
#[cfg(feature = "tcp")]
struct Owner<T> {
    buf: Vec<T>,
    outcome: Arc<Outcome<Vec<T>>>,
}

#[cfg(feature = "tcp")]
impl<T> fmt::Debug for Owner<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Owner").field("len", &self.buf.len()).finish()
    }
}

#[cfg(feature = "tcp")]
impl<T: Element> Owned for Owner<T> {
    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.buf)
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.buf)
    }

    fn settle(self: Box<Self>, result: Result<()>) {
        let Owner { buf, outcome } = *self;
        outcome.settle(result.map(|()| buf));
    }
}

impl<B> Work<B> {
    /// Whether the call is done.
    pub fn is_done(&self) -> bool {
        !self.outcome.is_pending()
    }

    /// Waits for the call: the buffer with its result, or the call's error. If the background hasn't begun it, this
    /// thread makes it, and those that were started before.
    ///
    /// # Errors
    /// The call's own.
    pub fn wait(self) -> Result<B> {
        if let Some(background) = self.background.upgrade().filter(|_| !self.is_done()) {
            background.help(|| self.is_done());
        }
        self.outcome.take(None).expect("a call that the communicator's thread has left behind is done")
    }

    /// Waits for the call until the deadline, and gives itself back if it isn't done by then.
    ///
    /// # Errors
    /// Itself.
    pub fn wait_until(self, deadline: Deadline) -> Result<Result<B>, Work<B>> {
        if let Some(background) = self.background.upgrade() {
            background.wait_until(deadline, || self.is_done());
        }
        self.outcome.take(None).ok_or(self)
    }

    /// Ends the call, begun or not, and with it the group: a collective in which other ranks take part can't be undone
    /// for one of them. Every call that isn't complete fails with [`Error::Aborted`], on every rank, which names this
    /// one; [`shrink`](Communicator::shrink) gives a communicator to go on with. Where the call is done already nothing
    /// happens, and its result is what it is. Returns when the call has let go of everything, which waits for no peer.
    ///
    /// # Errors
    /// [`Error::Aborted`], or what has ended the group or the call before.
    pub fn cancel(self) -> Result<B> {
        if let Some(background) = self.background.upgrade().filter(|_| !self.is_done()) {
            background.abort("it cancelled a started call");
        }
        self.wait()
    }
}

impl<B> Future for Work<B> {
    type Output = Result<B>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<B>> {
        self.outcome.take(Some(context.waker())).map_or(Poll::Pending, Poll::Ready)
    }
}

impl Communicator {
    /// Starts a call that runs in the background while this thread does something else. It owns `buffer` until
    /// it is done; `call` makes the collective.
    ///
    /// Started calls are made in the order in which they were started, one behind the other, and a blocking call waits
    /// for them first. Up to 1024 may be under way; starting another waits for the first of them. While they wait for
    /// peers for long they leave the processor to others, over a network at once.
    ///
    /// ```
    /// # use tensorwire_collectives::Communicator;
    /// # use tensorwire_core::ReduceOp;
    /// # std::thread::scope(|s| {
    /// #     for comm in Communicator::in_process(2)? {
    /// #         s.spawn(move || {
    /// let sum = comm.start(vec![1f32; 1000], |comm, x| comm.all_reduce(x, ReduceOp::Sum)).unwrap();
    /// // ... compute meanwhile ...
    /// assert_eq!(sum.wait().unwrap()[0], 2.0);
    /// #         });
    /// #     }
    /// #     Ok::<(), tensorwire_core::Error>(())
    /// # })?;
    /// # Ok::<(), tensorwire_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Os`] if the thread can't be started; the call's own come with the [`Work`]. When one has ended the group,
    /// those behind it get [`Error::Poisoned`].
    pub fn start<B: Send + 'static>(
        &self,
        buffer: B,
        call: impl FnOnce(&Communicator, &mut B) -> Result<()> + Send + 'static,
    ) -> Result<Work<B>> {
        let Some(started) = &self.started else {
            return Err(Error::invalid("a started call can't start another"));
        };
        let background = started.background(self)?;
        let outcome = Arc::new(Outcome(Mutex::new(State::Pending(None))));
        let (told, rank) = (outcome.clone(), self.rank);
        background.push(Job::Call(Box::new(move |comm| {
            let work = std::panic::AssertUnwindSafe(|| {
                let mut buffer = buffer;
                call(comm, &mut buffer).map(|()| buffer)
            });
            // A panic in the caller's code is the caller's error, not the end of the thread.
            let panicked = |_| Err(Error::InvalidArgument(format!("rank {rank}: a started call panicked")));
            told.settle(std::panic::catch_unwind(work).unwrap_or_else(panicked));
        })));
        Ok(Work { outcome, background: Arc::downgrade(background) })
    }

    /// Starts an [`all_reduce`](Communicator::all_reduce) of `buf`, as [`start`](Communicator::start) would. Over TCP
    /// and TLS more than one may be on its way: while one waits, what the next ones send goes out behind it, up to 16 at
    /// once, so that several small ones take one latency, and no pause comes between large ones. Peers needn't start
    /// theirs; results, errors and the order in which calls are done are the same.
    ///
    /// ```
    /// # use tensorwire_collectives::Communicator;
    /// # use tensorwire_core::ReduceOp;
    /// # std::thread::scope(|s| {
    /// #     for comm in Communicator::in_process(2)? {
    /// #         s.spawn(move || {
    /// let gradients = vec![vec![1f32; 1000], vec![2.0; 50]];
    /// let works: Vec<_> =
    ///     gradients.into_iter().map(|x| comm.start_all_reduce(x, ReduceOp::Sum).unwrap()).collect();
    /// // ... compute meanwhile ...
    /// let sums: Vec<_> = works.into_iter().map(|work| work.wait().unwrap()).collect();
    /// assert_eq!((sums[0][999], sums[1][0]), (2.0, 4.0));
    /// #         });
    /// #     }
    /// #     Ok::<(), tensorwire_core::Error>(())
    /// # })?;
    /// # Ok::<(), tensorwire_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As for [`start`](Communicator::start).
    pub fn start_all_reduce<T: Element>(&self, buf: Vec<T>, op: ReduceOp) -> Result<Work<Vec<T>>> {
        #[cfg(feature = "tcp")]
        if let (true, Some(started)) = (self.inner.pipelines, &self.started) {
            let background = started.background(self)?;
            let outcome = Arc::new(Outcome(Mutex::new(State::Pending(None))));
            let call = Call { reduce: Some(op), ..call::<T>(Op::AllReduce, buf.len()) };
            let reduction = Reduction::new(T::DTYPE, op)?;
            let buffer = Box::new(Owner { buf, outcome: outcome.clone() });
            background.push(Job::Request(Request { call, reduction, buffer }));
            return Ok(Work { outcome, background: Arc::downgrade(background) });
        }
        self.start(buf, move |comm, x| comm.all_reduce(x, op))
    }
}
