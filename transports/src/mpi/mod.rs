//! Groups of ranks over MPI: whatever fabric an MPI drives carries our collectives.
//!
//! The data of a call is in messages of MPI between two ranks, non-blocking, on a communicator of our own, and the thread
//! that makes the call polls for them. The bits, the errors and the deadlines are those of the other transports: each frame
//! has a header with the sender's call, so that ranks whose calls differ learn both (see `link`). MPI's own collectives can
//! take the place of ours, where a program asks for it: see [`Offload`].
//!
//! What is sent or received is copied once, into memory of our own, for MPI keeps its hands on what it was given until it is
//! done, and can't be asked to let go of what it sends: after an error, no caller's buffer is in use.
//!
//! An MPI without fault tolerance promises nothing once a process has failed, and its `mpirun` mostly ends the job. Where it
//! doesn't, ranks on the failed one's host see its end, the others its silence, and all get an error. Nothing goes on then:
//! [`MpiGroup::shrink`] says so.

mod bootstrap;
mod end;
mod group;
mod link;
mod mesh;
mod offload;
mod raw;
mod shared;
mod world;

use std::time::{Duration, Instant};

use tensorwire_core::Result;

use crate::shm;

/// The bindings, for programs that hand their communicator over.
pub use ::mpi as rsmpi;
pub use bootstrap::meet;
pub use group::{MpiGroup, MpiHandle};
pub use offload::{Counts, Offload, reduces};
pub use world::World;

/// How long a rank that has a processor to itself spins before it pauses.
const SPIN: Duration = Duration::from_micros(200);

/// The longest pause between two looks.
const LONGEST: Duration = Duration::from_millis(1);

/// Options for groups over MPI.
#[derive(Clone, Debug)]
pub struct MpiOptions {
    /// How long ranks wait for each other while nothing comes. `TENSORWIRE_TIMEOUT`, in seconds.
    pub timeout: Duration,
    /// What this rank calls its host: ranks that say the same count as on one. Without it, the number that the kernel got
    /// when it started. `TENSORWIRE_HOST`.
    pub host: Option<String>,
}

impl Default for MpiOptions {
    fn default() -> MpiOptions {
        MpiOptions { timeout: shm::Options::default().timeout, host: None }
    }
}

impl MpiOptions {
    /// The defaults, with what the environment sets.
    ///
    /// # Errors
    /// [`Error::Config`](tensorwire_core::Error::Config) names the variable and what is wrong with it.
    pub fn from_env() -> Result<MpiOptions> {
        let host = std::env::var("TENSORWIRE_HOST").ok().filter(|host| !host.is_empty());
        Ok(MpiOptions { timeout: shm::Options::from_env()?.timeout, host })
    }
}

/// How a thread waits between two looks: it keeps its processor for a moment, then gives it away, at last for longer.
struct Pause {
    shares: bool,
    since: Option<Instant>,
    sleep: Duration,
}

impl Pause {
    /// Of a thread that `shares` its processor with others that may have to run first.
    fn new(shares: bool) -> Pause {
        Pause { shares, since: None, sleep: Duration::from_micros(20) }
    }

    /// Begins anew: something has moved.
    fn restart(&mut self) {
        *self = Pause::new(self.shares);
    }

    /// Whether it has not waited for long.
    fn is_short(&mut self) -> bool {
        self.since.get_or_insert_with(Instant::now).elapsed() < SPIN
    }

    fn wait(&mut self) {
        match (self.is_short(), self.shares) {
            (true, false) => std::hint::spin_loop(),
            (true, true) => std::thread::yield_now(),
            (false, _) => {
                std::thread::sleep(self.sleep);
                self.sleep = (self.sleep * 2).min(LONGEST);
            }
        }
    }
}
