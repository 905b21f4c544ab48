//! Calls that run in the background, one after the other, on a thread of the communicator's own.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tensorwire_core::{Deadline, Error, Result};

use super::Communicator;

type Job = Box<dyn FnOnce(&Communicator) + Send>;

/// The calls that were started on a communicator and its thread, which begins with the first.
#[derive(Default)]
pub(super) struct Started {
    jobs: Mutex<Option<Sender<Job>>>,
    pending: Arc<Pending>,
}

impl fmt::Debug for Started {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Relaxed: a number for a person.
        f.debug_struct("Started").field("pending", &self.pending.count.load(Ordering::Relaxed)).finish()
    }
}

#[derive(Default)]
struct Pending {
    /// Jobs not yet done. Added to by whoever starts one; subtracted from by the thread, Release, after the job,
    /// which pairs with the Acquire load in `finish`.
    count: AtomicUsize,
    lock: Mutex<()>,
    done: Condvar,
}

impl Started {
    /// Waits until every started call is done: calls keep the order in which they were made.
    #[inline]
    pub(super) fn finish(&self) {
        if self.pending.count.load(Ordering::Acquire) != 0 {
            self.finish_slowly();
        }
    }

    #[cold]
    fn finish_slowly(&self) {
        let mut guard = lock(&self.pending.lock);
        while self.pending.count.load(Ordering::Acquire) != 0 {
            guard = self.pending.done.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A call that runs in the background, and the buffer that it owns meanwhile.
///
/// [`wait`](Work::wait) gives the buffer back with the result in it; as a [`Future`] it does the same. Dropping
/// it lets the call finish.
pub struct Work<B> {
    outcome: Arc<Outcome<B>>,
}

impl<B> fmt::Debug for Work<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Work").field("done", &self.is_done()).finish()
    }
}

struct Outcome<B> {
    state: Mutex<(Option<Result<B>>, Option<Waker>)>,
    done: Condvar,
}

impl<B> Work<B> {
    /// Whether the call is done.
    pub fn is_done(&self) -> bool {
        lock(&self.outcome.state).0.is_some()
    }

    /// Waits for the call: the buffer with its result, or the call's error.
    ///
    /// # Errors
    /// The call's own.
    pub fn wait(self) -> Result<B> {
        let mut state = lock(&self.outcome.state);
        loop {
            if let Some(result) = state.0.take() {
                return result;
            }
            state = self.outcome.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for the call until the deadline, and gives itself back if it isn't done by then.
    ///
    /// # Errors
    /// Itself.
    pub fn wait_until(self, deadline: Deadline) -> Result<Result<B>, Work<B>> {
        let mut state = lock(&self.outcome.state);
        while state.0.is_none() && !deadline.passed() {
            let waited = self.outcome.done.wait_timeout(state, deadline.remaining());
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let result = state.0.take();
        drop(state);
        result.ok_or(self)
    }
}

impl<B> Future for Work<B> {
    type Output = Result<B>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<B>> {
        let mut state = lock(&self.outcome.state);
        match state.0.take() {
            Some(result) => Poll::Ready(result),
            None => {
                state.1 = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Communicator {
    /// Starts a call that runs in the background while this thread does something else. It owns `buffer` until
    /// it is done; `call` makes the collective. Started calls run in the order in which they were started, and
    /// a blocking call waits for them first.
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
    /// [`Error::Os`] if the thread can't be started; the call's own come with the [`Work`].
    pub fn start<B: Send + 'static>(
        &self,
        buffer: B,
        call: impl FnOnce(&Communicator, &mut B) -> Result<()> + Send + 'static,
    ) -> Result<Work<B>> {
        let Some(started) = &self.started else {
            return Err(Error::invalid("a started call can't start another"));
        };
        let outcome = Arc::new(Outcome { state: Mutex::new((None, None)), done: Condvar::new() });
        let (told, pending) = (outcome.clone(), started.pending.clone());
        let rank = self.rank;
        let job: Job = Box::new(move |comm| {
            let work = std::panic::AssertUnwindSafe(|| {
                let mut buffer = buffer;
                call(comm, &mut buffer).map(|()| buffer)
            });
            // A panic in the caller's code is the caller's error, not the end of the thread.
            let panicked = |_| Err(Error::InvalidArgument(format!("rank {rank}: a started call panicked")));
            let result = std::panic::catch_unwind(work).unwrap_or_else(panicked);
            let mut state = lock(&told.state);
            state.0 = Some(result);
            let waker = state.1.take();
            drop(state);
            told.done.notify_all();
            if let Some(waker) = waker {
                waker.wake();
            }
            // Last, so that a blocking call which waited for this one finds its result there.
            pending.count.fetch_sub(1, Ordering::Release);
            drop(lock(&pending.lock));
            pending.done.notify_all();
        });
        let mut jobs = lock(&started.jobs);
        if jobs.is_none() {
            *jobs = Some(self.spawn()?);
        }
        // Relaxed: whoever must see the call as pending is this thread, or was told of it by this thread.
        started.pending.count.fetch_add(1, Ordering::Relaxed);
        if let Some(Err(unsent)) = jobs.as_ref().map(|jobs| jobs.send(job)) {
            // The thread ends only with this sender.
            drop(unsent);
            started.pending.count.fetch_sub(1, Ordering::Relaxed);
            return Err(Error::invalid("the communicator's thread has ended"));
        }
        Ok(Work { outcome })
    }

    /// Starts the thread that runs started calls. It ends when this communicator is dropped and the calls are
    /// done.
    fn spawn(&self) -> Result<Sender<Job>> {
        let (send, receive) = channel::<Job>();
        let comm =
            Communicator { rank: self.rank, world: self.world, inner: self.inner.clone(), started: None };
        std::thread::Builder::new()
            .name(format!("tensorwire-{}", self.rank))
            .spawn(move || receive.iter().for_each(|job| job(&comm)))
            .map_err(|e| Error::os("starting a thread for started calls", e))?;
        Ok(send)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
