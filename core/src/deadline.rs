//! When to stop waiting.

use std::time::{Duration, Instant};

/// How long a call waits for its peers unless told otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// A moment after which a wait gives up, and how long that was when it was set.
///
/// ```
/// use std::time::Duration;
/// use tensorwire_core::Deadline;
///
/// let deadline = Deadline::after(Duration::from_secs(5));
/// assert!(!deadline.passed());
/// assert!(deadline.remaining() <= Duration::from_secs(5));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    at: Instant,
    budget: Duration,
}

impl Deadline {
    /// A deadline `budget` from now. A budget beyond what the clock can hold is cut to a year.
    pub fn after(budget: Duration) -> Deadline {
        let budget = budget.min(Duration::from_secs(365 * 24 * 3600));
        Deadline { at: Instant::now() + budget, budget }
    }

    /// The time that was allowed when the deadline was set.
    pub fn budget(&self) -> Duration {
        self.budget
    }

    /// The time left; zero once the deadline has passed.
    pub fn remaining(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    /// Whether the deadline has passed.
    pub fn passed(&self) -> bool {
        self.remaining().is_zero()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zero_budget_has_passed_and_a_huge_one_does_not_overflow() {
        assert!(Deadline::after(Duration::ZERO).passed());
        assert!(!Deadline::after(Duration::MAX).passed());
    }
}
