//! Writing what peers will read: through the caches or past them, whichever costs less just now.
//!
//! To write a cache line a processor first takes it back from the one that read it last. Between cores of one die, in
//! slots that walk, that costs 1 or 2 ns a line; between dies or sockets, or where a hypervisor has put a machine's
//! processors far apart, 25 ns. Non-temporal stores take nothing back and cost 1 ns a line, but then the reader fetches
//! from memory, for 2 to 3 ns a line more than from a near core's cache (measured on a Zen 4). A virtual machine's
//! processors are moved while it runs, so no table can say: now and then a write is timed. How a rank writes is nobody
//! else's concern.

use std::time::Instant;

use super::copy::{copy_past_caches as past_caches, copy_to_both};

/// Bytes below which a write isn't worth a decision: it is a few lines, and readers wait for each.
const LEAST: usize = 2 << 10;

/// Writes between two trials.
const EVERY: u32 = 64;

/// Bytes that are written for a trial: enough for its time to exceed the clock's own, few enough to cost
/// next to nothing if written the wrong way.
const TRIAL: usize = 4 << 10;

/// What a line costs through the caches, in nanoseconds, at which it isn't tried whether it costs less past them.
const NEAR_NS: f32 = 10.0;

/// How much less a line must cost past the caches, in nanoseconds: more than its reader loses.
const MARGIN_NS: f32 = 8.0;

#[derive(Debug)]
pub(super) struct Writer {
    past_caches: bool,
    until_trial: u32,
    /// What a line cost through the caches, if past them is to be tried next.
    through_ns: Option<f32>,
}

impl Writer {
    pub(super) fn new() -> Writer {
        Writer { past_caches: false, until_trial: EVERY, through_ns: None }
    }

    /// Whether writes take lines into this processor's cache, so that it helps to ask for them ahead of time.
    #[inline]
    pub(super) fn through_caches(&self) -> bool {
        !self.past_caches
    }

    /// Copies `from` to `to`, of the same length.
    #[inline]
    pub(super) fn write(&mut self, to: &mut [u8], from: &[u8]) {
        if from.len() < LEAST {
            return to.copy_from_slice(from);
        }
        self.until_trial -= 1;
        if self.until_trial == 0 {
            self.try_both(to, from);
        } else if self.past_caches {
            past_caches(to, from);
        } else {
            to.copy_from_slice(from);
        }
    }

    /// Copies `from` to `to` and to `own`, both of its length, reading it once where that's possible.
    #[inline]
    pub(super) fn write_both(&mut self, to: &mut [u8], own: &mut [u8], from: &[u8]) {
        if from.len() < LEAST || self.past_caches || self.until_trial == 1 {
            self.write(to, from);
            own.copy_from_slice(from);
            return;
        }
        self.until_trial -= 1;
        copy_to_both(to, own, from);
    }

    /// Copies and decides: of two trials, the second only if the first leaves doubt.
    #[cold]
    fn try_both(&mut self, to: &mut [u8], from: &[u8]) {
        let trial = from.len().min(TRIAL);
        let ((to, to_rest), (from, from_rest)) = (to.split_at_mut(trial), from.split_at(trial));
        let start = Instant::now();
        if self.through_ns.is_some() {
            past_caches(to, from)
        } else {
            to.copy_from_slice(from)
        }
        self.judge(start.elapsed().as_nanos() as f32 * 64.0 / trial as f32);
        if self.past_caches { past_caches(to_rest, from_rest) } else { to_rest.copy_from_slice(from_rest) }
    }

    /// Draws the conclusion from a trial in which a line cost `ns`.
    fn judge(&mut self, ns: f32) {
        self.until_trial = EVERY;
        match self.through_ns.take() {
            Some(through) => self.past_caches = ns + MARGIN_NS < through,
            None if ns < NEAR_NS => self.past_caches = false,
            None => (self.through_ns, self.until_trial) = (Some(ns), 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(trials: &[f32]) -> Writer {
        let mut writer = Writer::new();
        trials.iter().for_each(|ns| writer.judge(*ns));
        writer
    }

    #[test]
    fn far_peers_are_written_to_past_the_caches_until_they_are_near() {
        assert!(after(&[]).through_caches());
        assert!(after(&[2.0]).through_caches());
        assert!(!after(&[25.0, 1.0]).through_caches());
        // A trial that still finds them far changes nothing while its second half is to come, nor after it.
        assert!(!after(&[25.0, 1.0, 26.0]).through_caches());
        assert!(!after(&[25.0, 1.0, 26.0, 1.0]).through_caches());
        assert!(after(&[25.0, 1.0, 2.0]).through_caches());
    }

    #[test]
    fn what_is_slow_either_way_goes_through_the_caches() {
        // The source is in memory, or the trial was interrupted.
        assert!(after(&[14.0, 9.0]).through_caches());
        assert!(after(&[5000.0, 4995.0]).through_caches());
    }

    #[test]
    fn every_byte_is_written_in_and_between_trials() {
        for trials in [&[][..], &[25.0], &[25.0, 1.0]] {
            for len in [0, 1, LEAST - 1, LEAST, TRIAL, TRIAL + 333] {
                let mut writer = after(trials);
                for round in 0..2 * EVERY {
                    let from: Vec<u8> = (0..len).map(|i| (i as u32 * 7 + round) as u8).collect();
                    let mut to = vec![0; len];
                    writer.write(&mut to, &from);
                    assert!(to == from);
                }
            }
        }
    }
}
