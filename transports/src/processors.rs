//! Which processors ranks may use: whether each has one to itself, and how a launcher shares them out.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use rustix::thread::{CpuSet, sched_getaffinity};

/// Processors, by the kernel's numbers, in ascending order. Written as the kernel does: `0-3,8`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Processors(Vec<usize>);

impl Processors {
    /// Those that the calling thread may use: what its affinity mask allows.
    pub(crate) fn allowed() -> Processors {
        match sched_getaffinity(None) {
            Ok(set) => Processors((0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect()),
            // A system with more than fit in the mask: as many as there are, whichever they are.
            Err(_) => Processors((0..std::thread::available_parallelism().map_or(1, usize::from)).collect()),
        }
    }

    fn is_within(&self, others: &Processors) -> bool {
        self.0.iter().all(|cpu| others.0.binary_search(cpu).is_ok())
    }

    /// As the kernel takes them.
    pub(crate) fn mask(&self) -> CpuSet {
        let mut mask = CpuSet::new();
        self.0.iter().for_each(|cpu| mask.set(*cpu));
        mask
    }
}

/// Whether a rank that waits may keep its processor, because no other rank of its host needs it: no more ranks are
/// confined to its processors than those are, and the ranks together are no more than the control group's quota.
/// `all` are the processors of the ranks on this host, its own among them.
pub(crate) fn may_spin(own: &Processors, all: &[Processors]) -> bool {
    let (allowed, usable) = (own.0.len(), std::thread::available_parallelism().map_or(1, usize::from));
    // The lesser of mask and quota: only where it is less than the mask is it the quota.
    let within_quota = usable >= allowed || all.len() <= usable;
    within_quota && all.iter().filter(|theirs| theirs.is_within(own)).count() <= allowed
}

/// The share of each of `ranks` ranks in `processors`: neighbours, as even as can be; `None` where there are fewer than
/// ranks.
pub(crate) fn shares(processors: &Processors, ranks: usize) -> Option<Vec<Processors>> {
    let mut near = processors.0.clone();
    near.sort_by_key(|cpu| (place(*cpu), *cpu));
    let n = near.len();
    let share = |rank: usize| {
        let mut share = near[rank * n / ranks..(rank + 1) * n / ranks].to_vec();
        share.sort_unstable();
        Processors(share)
    };
    (n >= ranks && ranks > 0).then(|| (0..ranks).map(share).collect())
}

/// Socket and core of a processor, so that those which share the most are next to each other.
fn place(cpu: usize) -> [usize; 2] {
    ["physical_package_id", "core_id"].map(|what| {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/{what}");
        std::fs::read_to_string(Path::new(&path)).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    })
}

impl fmt::Display for Processors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.0.chunk_by(|a, b| a + 1 == *b);
        for (i, run) in runs.enumerate() {
            let (first, last, comma) = (run[0], run[run.len() - 1], if i == 0 { "" } else { "," });
            match first == last {
                true => write!(f, "{comma}{first}")?,
                false => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

impl FromStr for Processors {
    type Err = ();

    /// Numbers below [`CpuSet::MAX_CPU`], in ascending order; at least one.
    fn from_str(text: &str) -> Result<Processors, ()> {
        let mut all: Vec<usize> = Vec::new();
        for run in text.split(',') {
            let (first, last) = run.split_once('-').unwrap_or((run, run));
            let (first, last): (usize, usize) = (first.parse().map_err(drop)?, last.parse().map_err(drop)?);
            if last >= CpuSet::MAX_CPU || first > last || all.last().is_some_and(|before| *before >= first) {
                return Err(());
            }
            all.extend(first..=last);
        }
        Ok(Processors(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn these(text: &str) -> Processors {
        text.parse().unwrap()
    }

    #[test]
    fn read_as_they_are_written() {
        for text in ["0", "3", "0-3", "0-1,4,6-9"] {
            assert_eq!(these(text).to_string(), text);
        }
        assert_eq!(these("1,2,3").to_string(), "1-3");
        for text in ["", "a", "1-", "-1", "3-1", "2,1", "1,1", "0-99999999", "1;2"] {
            assert_eq!(text.parse::<Processors>(), Err(()), "{text}");
        }
        let allowed = Processors::allowed();
        assert!(!allowed.0.is_empty() && these(&allowed.to_string()) == allowed);
    }

    #[test]
    fn who_has_a_processor_to_itself_may_spin() {
        let spins = |own: &str, all: &[&str]| {
            may_spin(&these(own), &all.iter().map(|text| these(text)).collect::<Vec<_>>())
        };
        // The quota of this machine is at least one processor.
        assert!(spins("5", &["5"]));
        assert!(!spins("5", &["5", "5"]));
        // Bound to one each, as mpirun does.
        assert!(!spins("0-1", &["0-1", "0-1", "0-1"]));
        assert!(spins("0", &["0", "1"]) && spins("1", &["0", "1"]));
        // One that may go anywhere finds room beside one that may not.
        assert!(spins("4", &["0-7", "4"]));
    }

    #[test]
    fn shares_are_even_and_hold_each_processor_once() {
        let all = these("0-4,7");
        for ranks in 1..=6 {
            let shares = shares(&all, ranks).unwrap();
            let (least, most) = (6 / ranks, 6usize.div_ceil(ranks));
            assert!(shares.iter().all(|s| (least..=most).contains(&s.0.len())), "{shares:?}");
            let mut together: Vec<usize> = shares.iter().flat_map(|s| s.0.clone()).collect();
            together.sort_unstable();
            assert_eq!(together, all.0);
        }
        assert_eq!(shares(&all, 7), None);
        assert_eq!(shares(&all, 0), None);
    }
}
