//! Shared memory between the ranks of one host.
//!
//! [`Group`] is a rank's membership: it carries the step protocol (publish, wait) that the collectives are
//! made of, notices peers that die, leave, stall or make another call, and says so on every rank.
//!
//! By default a rank takes 4 MiB + 8 KiB of shared memory a group (`TENSORWIRE_SHM_BYTES` sets the 4 MiB), and up
//! to 64 KiB for each peer that it sends messages to, from an anonymous file: the size of /dev/shm doesn't
//! matter and nothing is left behind, however a job ends.

mod available;
mod bell;
mod cache;
pub(crate) mod clock;
mod control;
mod flight;
mod form;
mod group;
mod handover;
// It reads words from a file, where loom's aren't.
#[cfg(not(loom))]
mod inspect;
mod lane;
mod layout;
#[cfg(loom)]
mod loom;
mod memory;
pub(crate) mod record;
mod region;
mod shared;
mod single_copy;
mod sync;
pub(crate) mod verdict;
mod wait;
mod words;

use std::sync::Arc;
use std::time::Duration;

use tensorwire_core::{DEFAULT_TIMEOUT, Deadline, Error, Result, Tuning};

pub use flight::{CallRecord, FlightRecord, RankRecord, RankState};
pub use group::{Group, Handle};
#[cfg(not(loom))]
pub use inspect::inspect;
pub use lane::{Incoming, Outgoing};
pub use layout::{DEFAULT_SLOTS, DEPTH, INLINE, MAX_WORLD};
pub use memory::MEMORY_NAME;
pub use record::Label;
pub use region::Region;

use crate::liveness::Liveness;
use crate::processors::Processors;
use crate::store::Store;
use layout::Layout;
use memory::Memory;

/// An error on the way up; boxed, so that the result of a wait is one word.
pub type Failure = Box<Error>;

/// What can be set about a group.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long joining the group takes at most, and how long a call waits while nothing comes of the peers it waits for.
    /// `TENSORWIRE_TIMEOUT`, in seconds.
    pub timeout: Duration,
    /// Bytes of slots a rank; rank 0's value holds for all. `TENSORWIRE_SHM_BYTES`.
    pub slot_bytes: usize,
    /// Where collectives change their algorithm, for any numbers of ranks; rank 0's value holds for all, and for
    /// the groups that are formed from this one. Empty: what was measured on this machine, or what is built in.
    pub tuning: Vec<Tuning>,
}

impl Default for Options {
    fn default() -> Options {
        Options { timeout: DEFAULT_TIMEOUT, slot_bytes: DEFAULT_SLOTS, tuning: Vec::new() }
    }
}

impl Options {
    /// The defaults, with what the environment sets.
    pub fn from_env() -> Result<Options> {
        Options::from_lookup(|name| std::env::var(name).ok())
    }

    fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Options> {
        let mut options = Options::default();
        if let Some(text) = lookup("TENSORWIRE_TIMEOUT") {
            let seconds = text.parse::<f64>().ok().filter(|s| *s > 0.0 && *s < 1e9);
            options.timeout = Duration::from_secs_f64(seconds.ok_or_else(|| {
                Error::Config(format!(
                    "TENSORWIRE_TIMEOUT is '{text}': give seconds above 0, such as 30 or 0.5"
                ))
            })?);
        }
        if let Some(text) = lookup("TENSORWIRE_SHM_BYTES") {
            options.slot_bytes = text.parse().map_err(|_| {
                Error::Config(format!(
                    "TENSORWIRE_SHM_BYTES is '{text}': give bytes a rank, such as {DEFAULT_SLOTS}"
                ))
            })?;
        }
        Ok(options)
    }

    fn check(&self) -> Result<()> {
        match self.tuning.iter().find(|t| !t.is_sound()) {
            Some(t) => Err(Error::Config(format!("{t:?} can't be used: see Tuning::is_sound"))),
            None if self.tuning.len() > handover::MAX_TUNINGS => {
                let most = handover::MAX_TUNINGS;
                Err(Error::Config(format!("{} tunings: at most {most} can be given", self.tuning.len())))
            }
            None => Ok(()),
        }
    }
}

/// The group of `world` ranks that are threads of this process; rank `i` is element `i`.
pub fn in_process(world: usize, options: &Options) -> Result<Vec<Group>> {
    options.check()?;
    let layout = Layout::new(world, options.slot_bytes)?;
    let memory = Arc::new(Memory::create()?);
    let start = layout.take(&memory)?;
    // Threads may move later on, each for itself.
    let processors = vec![Processors::allowed(); world];
    let enter = |rank| {
        Group::enter_part(&memory, start, layout, rank, Liveness::default(), processors.clone(), options)
    };
    (0..world).map(enter).collect()
}

/// Joins the group of `world` processes on this host that meet in `store`, as `rank`.
pub fn join(rank: usize, world: usize, store: &dyn Store, options: &Options) -> Result<Group> {
    if rank >= world {
        return Err(Error::Config(format!(
            "rank {rank} is outside the world of {world}: ranks are 0 to world - 1"
        )));
    }
    options.check()?;
    let layout = Layout::new(world, options.slot_bytes)?;
    let deadline = Deadline::after(options.timeout);
    // A program may make several groups over one store: its nth meets the others' nth.
    let nth = store.add(&format!("shm/made/{rank}"), 1, deadline)?;
    let key = format!("shm/{nth}");
    let handover = match rank {
        0 => handover::give(layout, &options.tuning, &key, store, deadline)?,
        _ => handover::take(rank, world, &key, store, deadline)?,
    };
    let (memory, liveness) = (Arc::new(handover.memory), Liveness::new(handover.pidfds));
    let options = Options { tuning: handover.tuning, ..options.clone() };
    let processors = handover.processors;
    Group::enter_part(&memory, handover.start, handover.layout, rank, liveness, processors, &options)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_come_from_the_environment_or_say_why_not() {
        let set = |name: &'static str, value: &'static str| {
            Options::from_lookup(move |n| (n == name).then(|| value.to_owned()))
        };
        assert_eq!(set("TENSORWIRE_TIMEOUT", "0.5").unwrap().timeout, Duration::from_millis(500));
        assert_eq!(set("TENSORWIRE_SHM_BYTES", "65536").unwrap().slot_bytes, 65536);
        assert_eq!(set("OTHER", "x").unwrap().timeout, DEFAULT_TIMEOUT);
        for (name, value) in [
            ("TENSORWIRE_TIMEOUT", "soon"),
            ("TENSORWIRE_TIMEOUT", "0"),
            ("TENSORWIRE_TIMEOUT", "NaN"),
            ("TENSORWIRE_TIMEOUT", "-1"),
            ("TENSORWIRE_SHM_BYTES", "4M"),
            ("TENSORWIRE_SHM_BYTES", "-1"),
        ] {
            assert!(set(name, value).unwrap_err().to_string().contains(name));
        }
    }
}
