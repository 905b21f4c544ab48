//! The time for records that are written at every call: a processor's counter, turned into seconds only when
//! somebody reads a record.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Where the counter is compared with the system's clock for the first time.
static ANCHOR: OnceLock<(u64, Instant)> = OnceLock::new();

/// The comparison takes at least this long, for its result to be good to 1 in 10 000.
const COMPARED: Duration = Duration::from_millis(5);

/// The clock of this machine: all its processes read the same one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    counter: bool,
}

impl Clock {
    /// Uses the time-stamp counter if it runs at one speed, whatever the processor does, and the system's
    /// monotonic clock otherwise.
    pub(crate) fn of_this_machine() -> Clock {
        let clock = Clock { counter: counter_is_steady() };
        ANCHOR.get_or_init(|| clock.moment());
        clock
    }

    /// The moment, in units of its own, never 0.
    #[inline]
    pub(crate) fn now(self) -> u64 {
        #[cfg(target_arch = "x86_64")]
        if self.counter {
            // SAFETY: every x86-64 processor has the instruction.
            return unsafe { std::arch::x86_64::_rdtsc() }.max(1);
        }
        monotonic()
    }

    /// The same moment by this clock and by the system's: of a few tries, the one in which least passed between the two
    /// looks at this clock, for the thread may lose its processor there.
    fn moment(self) -> (u64, Instant) {
        let tries = std::iter::repeat_with(|| (self.now(), Instant::now(), self.now())).take(4);
        let best = tries.min_by_key(|(before, _, after)| after.saturating_sub(*before));
        best.map(|(before, at, _)| (before, at)).expect("there are some")
    }

    /// What moments of this clock mean now.
    pub(crate) fn reading(self) -> Reading {
        let (ticks, at) = *ANCHOR.get_or_init(|| self.moment());
        std::thread::sleep(COMPARED.saturating_sub(at.elapsed()));
        let (now, here) = self.moment();
        let passed = here - at;
        let seconds_a_tick = passed.as_secs_f64() / now.saturating_sub(ticks).max(1) as f64;
        Reading { now, seconds_a_tick }
    }
}

/// The clock read at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reading {
    now: u64,
    seconds_a_tick: f64,
}

impl Reading {
    /// How long ago a moment was; zero for one that is still to come.
    pub(crate) fn since(&self, moment: u64) -> Duration {
        self.between(moment, self.now)
    }

    /// The time from one moment to another.
    pub(crate) fn between(&self, from: u64, to: u64) -> Duration {
        let seconds = to.saturating_sub(from) as f64 * self.seconds_a_tick;
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }
}

#[cfg(target_arch = "x86_64")]
fn counter_is_steady() -> bool {
    use std::arch::x86_64::__cpuid;
    // The highest extended leaf, and in the power leaf the bit "invariant TSC".
    __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx >> 8 & 1 == 1
}

#[cfg(not(target_arch = "x86_64"))]
fn counter_is_steady() -> bool {
    false
}

fn monotonic() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Both are positive on a machine that has started.
    (t.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(t.tv_nsec as u64).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_clocks_agree_with_the_systems() {
        for clock in [Clock::of_this_machine(), Clock { counter: false }] {
            let (before, start) = clock.moment();
            std::thread::sleep(Duration::from_millis(20));
            // Each kind has its own units: the comparison is made anew here, not with the other's anchor.
            let (after, end) = clock.moment();
            let passed = end - start;
            assert!(after > before);
            if clock.counter == counter_is_steady() {
                let measured = clock.reading().between(before, after);
                let error = measured.as_secs_f64() / passed.as_secs_f64() - 1.0;
                assert!(error.abs() < 0.05, "{measured:?} for {passed:?}");
            } else {
                assert!(after - before >= 20_000_000);
            }
        }
    }

    #[test]
    fn moments_that_make_no_sense_are_no_panic() {
        let reading = Clock::of_this_machine().reading();
        assert_eq!(reading.since(u64::MAX), Duration::ZERO);
        assert!(reading.since(0) > Duration::ZERO);
        let slow = Reading { now: u64::MAX, seconds_a_tick: f64::MAX };
        assert_eq!(slow.since(0), Duration::MAX);
    }
}
