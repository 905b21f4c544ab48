//! How far apart two processors are.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Instant;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

const ROUNDS: usize = 51;

/// Round trips of a round.
const TRIPS: u32 = 500;

/// A number with its cache line, and the one that is fetched with it, to itself.
#[repr(align(128))]
#[derive(Default)]
struct Line(AtomicU32);

impl Line {
    /// Written by one of the two threads alone.
    fn set(&self, n: u32) {
        self.0.store(n, Ordering::Release);
    }

    /// The other one waits here: pairs with `set`.
    fn wait_for(&self, n: u32) {
        while self.0.load(Ordering::Acquire) < n {
            spin_loop();
        }
    }
}

/// Nanoseconds of a cache line's round trip between the first two processors that this process may use; nothing where it
/// may use one. A round that something came between takes longer, so the lower quartile of some rounds.
pub(crate) fn distance() -> Option<u32> {
    let [first, second] = *allowed().first_chunk()?;
    let (ping, pong) = (Line::default(), Line::default());
    let mut trips = thread::scope(|scope| {
        scope.spawn(|| {
            pin(second);
            for n in 1..=ROUNDS as u32 * TRIPS {
                ping.wait_for(n);
                pong.set(n);
            }
        });
        let timed = scope.spawn(|| {
            pin(first);
            let round = |round: usize| {
                let start = Instant::now();
                for n in round as u32 * TRIPS + 1..=(round as u32 + 1) * TRIPS {
                    ping.set(n);
                    pong.wait_for(n);
                }
                start.elapsed().as_nanos() as u32 / TRIPS
            };
            (0..ROUNDS).map(round).collect::<Vec<_>>()
        });
        timed.join().ok()
    })?;
    trips.sort_unstable();
    Some(trips[ROUNDS / 4].max(1))
}

/// Keeps the calling thread on a processor, where the system lets it.
pub(super) fn pin(processor: usize) {
    let mut one = CpuSet::new();
    one.set(processor);
    // Where it can't be, the measurement is of wherever the thread is.
    let _ = sched_setaffinity(None, &one);
}

/// The processors that this thread may run on.
pub(super) fn allowed() -> Vec<usize> {
    let set = sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
    (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_processors_have_a_distance_and_threads_stay_where_they_were() {
        let before = allowed();
        assert_eq!(distance().is_some(), before.len() > 1);
        assert_eq!(allowed(), before);
    }
}
