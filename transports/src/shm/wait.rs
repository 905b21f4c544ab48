//! How long to burn a processor before sleeping.

use std::time::{Duration, Instant};

/// How a rank waits before it sleeps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// Looks at the flag, a pause apart, before anything else is considered.
    pub(super) quick_looks: u32,
    spin: Duration,
    yields: u32,
}

impl Patience {
    /// With a processor of its own, a rank spins; without, it gives the processor away at once, for the rank waited for
    /// may need it.
    pub(super) fn new(spins: bool) -> Patience {
        // Looking again and again would be all that loom tries out, and it has no time: it sleeps at once.
        if cfg!(loom) {
            return Patience { quick_looks: 0, spin: Duration::ZERO, yields: 0 };
        }
        if spins {
            Patience { quick_looks: 200, spin: Duration::from_micros(200), yields: 0 }
        } else {
            Patience { quick_looks: 0, spin: Duration::ZERO, yields: 64 }
        }
    }

    /// Burns time until `arrived` or until it is time to sleep; whether it arrived. While it spins it doesn't yield:
    /// where another program computes on this processor, that would give it the rest of this rank's turn, for a peer
    /// that takes some 50 us to wake.
    pub(super) fn spin_until(&self, arrived: impl Fn() -> bool) -> bool {
        let start = Instant::now();
        while start.elapsed() < self.spin {
            for _ in 0..64 {
                if arrived() {
                    return true;
                }
                std::hint::spin_loop();
            }
        }
        for _ in 0..self.yields {
            if arrived() {
                return true;
            }
            std::thread::yield_now();
        }
        arrived()
    }
}
