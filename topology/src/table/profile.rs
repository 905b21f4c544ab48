//! What was measured while the machine was in one state.
//!
//! A virtual machine's host may move its processors: two that shared a cache are on two sockets a minute later, small
//! messages take five times as long, and nothing in sysfs says so. What tells is the distance: how long a cache line
//! takes from one processor to the other and back. Each distance has a profile of its own, and what is measured at one
//! says nothing about another.

use serde::{Deserialize, Serialize};

use super::Curve;
use super::fit::median;

/// Distances within this factor are one.
const SAME: f64 = 1.4;

/// The most timings of a profile, for which a file has room.
const MOST: usize = 512;

/// What was measured at one distance of the processors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// Nanoseconds of a cache line's round trip between the first two processors; nothing where there is one.
    pub distance_ns: Option<u32>,
    /// What collectives take.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub timings: Vec<Timing>,
    /// What a decoder's layers take.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
    /// How fast memory is read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reads: Vec<Reading>,
}

/// What a collective takes, by the bytes that one rank contributes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Its name, such as `all_reduce`.
    pub collective: String,
    /// What carries the bytes, such as `shm`.
    pub transport: String,
    /// The ranks.
    pub ranks: usize,
    /// Whether something else kept memory busy meanwhile.
    pub contended: bool,
    /// The median call.
    pub p50: Curve,
    /// The call that one in a hundred is slower than.
    pub p99: Curve,
    /// When, in seconds since 1970.
    pub measured_at: u64,
}

/// What a step of a decoder takes beside its collectives: a time for each layer, and for each byte of weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// The ranks, on whose processors nothing else runs.
    pub ranks: usize,
    /// What a layer takes however small it is, its waiting for other ranks included, in microseconds.
    pub layer_us: f64,
    /// How fast each rank reads weights while all do, in GB/s.
    pub gbps: f64,
    /// By what factor, at least 1, measured steps miss this at most.
    pub band: f64,
    /// When, in seconds since 1970.
    pub measured_at: u64,
}

/// How fast memory is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reading {
    /// Processors that read at once, each bytes of its own.
    pub processors: usize,
    /// How many bytes each reads over and over.
    pub bytes: u64,
    /// How fast one of them does, in GB/s.
    pub gbps: f64,
}

impl Profile {
    /// A collective's timing.
    pub fn timing(
        &self,
        collective: &str,
        transport: &str,
        ranks: usize,
        contended: bool,
    ) -> Option<&Timing> {
        self.timings.iter().find(|t| t.is_of(collective, transport, ranks, contended))
    }

    /// A decoder's step over so many ranks.
    pub fn step(&self, ranks: usize) -> Option<&Step> {
        self.steps.iter().find(|step| step.ranks == ranks)
    }

    /// How fast each of so many processors reads from memory that no cache holds: as the nearest number of them that
    /// was measured.
    pub fn memory(&self, processors: usize) -> Option<&Reading> {
        let largest = self.reads.iter().map(|r| r.bytes).max()?;
        let of_memory = self.reads.iter().filter(|r| r.bytes == largest);
        of_memory.min_by_key(|r| r.processors.abs_diff(processors))
    }

    /// When the last of it was measured, in seconds since 1970.
    pub fn measured_at(&self) -> u64 {
        let timings = self.timings.iter().map(|t| t.measured_at);
        timings.chain(self.steps.iter().map(|s| s.measured_at)).max().unwrap_or(0)
    }

    /// Whether it was measured at this distance, or as good as.
    pub fn is_at(&self, distance_ns: Option<u32>) -> bool {
        factor(self.distance_ns, distance_ns) <= SAME
    }

    /// Takes over what a later one measured, and leaves the rest as it is.
    fn update(&mut self, later: Profile) {
        self.distance_ns = later.distance_ns;
        for timing in later.timings {
            let Timing { collective, transport, ranks, contended, .. } = &timing;
            self.timings.retain(|t| !t.is_of(collective, transport, *ranks, *contended));
            self.timings.push(timing);
        }
        for step in later.steps {
            self.steps.retain(|known| known.ranks != step.ranks);
            self.steps.push(step);
        }
        if !later.reads.is_empty() {
            self.reads = later.reads;
        }
    }

    /// What is wrong with it, if anything.
    pub(super) fn unsound(&self) -> Option<String> {
        let usable = |x: f64| x.is_finite() && x > 0.0;
        let bad_timing = |t: &&Timing| t.ranks < 2 || !t.p50.is_sound() || !t.p99.is_sound();
        let bad_step = |s: &&Step| {
            s.ranks == 0
                || !usable(s.gbps)
                || !(s.layer_us.is_finite() && s.layer_us >= 0.0)
                || s.band.is_nan()
                || s.band < 1.0
        };
        let bad_reading = |r: &&Reading| r.processors == 0 || r.bytes == 0 || !usable(r.gbps);
        if let Some(t) = self.timings.iter().find(bad_timing) {
            return Some(format!("its times of {} over {} ranks make no sense", t.collective, t.ranks));
        }
        if let Some(s) = self.steps.iter().find(bad_step) {
            return Some(format!("its step of {} ranks makes no sense", s.ranks));
        }
        if self.reads.iter().any(|r| bad_reading(&r)) {
            return Some("its bandwidths of memory make no sense".into());
        }
        let most = [self.timings.len(), self.steps.len(), self.reads.len()].into_iter().max().unwrap_or(0);
        (most > MOST).then(|| format!("a profile has {most} entries, at most {MOST}"))
    }
}

impl Timing {
    fn is_of(&self, collective: &str, transport: &str, ranks: usize, contended: bool) -> bool {
        (self.collective.as_str(), self.transport.as_str(), self.ranks, self.contended)
            == (collective, transport, ranks, contended)
    }
}

impl Step {
    /// The step of so many ranks that steps of some models are nearest to: `(layers, bytes of weights that a rank
    /// reads, microseconds without the collectives)`, by least squares of relative errors. It takes two models at
    /// least, of which one has more bytes a layer.
    ///
    /// ```
    /// use tensorwire_topology::table::Step;
    ///
    /// // 30 us a layer, and 10 GB/s.
    /// let measured = [(20.0, 50e6, 5_600.0), (2.0, 200e6, 20_060.0)];
    /// let step = Step::fit(2, &measured, 0).unwrap();
    /// assert!((step.layer_us - 30.0).abs() < 0.01 && (step.gbps - 10.0).abs() < 0.001);
    /// ```
    pub fn fit(ranks: usize, measured: &[(f64, f64, f64)], measured_at: u64) -> Option<Step> {
        if measured.iter().any(|(layers, bytes, us)| !(*us > 0.0 && *layers > 0.0 && *bytes > 0.0)) {
            return None;
        }
        let sum = |of: fn(f64, f64) -> f64| -> f64 {
            measured.iter().map(|(layers, bytes, us)| of(layers / us, bytes / us)).sum()
        };
        let (ll, bb, lb) = (sum(|l, _| l * l), sum(|_, b| b * b), sum(|l, b| l * b));
        let (l, b) = (sum(|l, _| l), sum(|_, b| b));
        let determinant = ll * bb - lb * lb;
        // Models with as many bytes a layer as each other tell nothing apart.
        if determinant.is_nan() || determinant <= 1e-9 * ll * bb {
            return None;
        }
        let mut layer_us = (l * bb - b * lb) / determinant;
        let mut us_a_byte = (b * ll - l * lb) / determinant;
        if layer_us < 0.0 {
            (layer_us, us_a_byte) = (0.0, b / bb);
        }
        if us_a_byte <= 0.0 {
            return None;
        }
        let misses =
            measured.iter().map(|(n, bytes, us)| ((n * layer_us + bytes * us_a_byte) / us).ln().abs());
        let band = misses.fold(0.0, f64::max).exp();
        let rounded = |x: f64| format!("{x:.4e}").parse().unwrap_or(x);
        let (layer_us, gbps, band) = (rounded(layer_us), rounded(1e-3 / us_a_byte), rounded(band).max(1.0));
        Some(Step { ranks, layer_us, gbps, band, measured_at })
    }

    /// What so many layers with so many bytes of weights a rank take beside their collectives, in microseconds.
    pub fn us(&self, layers: usize, bytes: u64) -> f64 {
        layers as f64 * self.layer_us + bytes as f64 / (self.gbps * 1e3)
    }
}

/// By what factor two distances differ: not at all where either isn't known.
fn factor(a: Option<u32>, b: Option<u32>) -> f64 {
    match (a, b) {
        (Some(a), Some(b)) => f64::from(a.max(b).max(1)) / f64::from(a.min(b).max(1)),
        _ => 1.0,
    }
}

/// The distance that several measurements of it agree on; nothing if there is none, or the processors were moved
/// between them.
pub fn one_distance(measured: &[Option<u32>]) -> Option<Option<u32>> {
    let known: Option<Vec<f64>> = measured.iter().map(|ns| ns.map(f64::from)).collect();
    let Some(mut known) = known else { return Some(None) };
    let middle = median(&mut known)? as u32;
    let agree = measured.iter().all(|ns| factor(*ns, Some(middle)) <= SAME);
    agree.then_some(Some(middle))
}

/// The profile that was measured nearest to a distance, and of those that are equally near, last.
pub(super) fn nearest(profiles: &[Profile], distance_ns: Option<u32>) -> Option<&Profile> {
    let far = |p: &Profile| factor(p.distance_ns, distance_ns);
    profiles.iter().min_by(|a, b| far(a).total_cmp(&far(b)).then(b.measured_at().cmp(&a.measured_at())))
}

/// Takes a profile over into those of its distance, or beside them; of more than `most`, the oldest goes.
pub(super) fn merge(profiles: &mut Vec<Profile>, profile: Profile, most: usize) {
    let same =
        profiles.iter_mut().filter(|known| known.distance_ns.is_some() == profile.distance_ns.is_some());
    match same.into_iter().find(|known| known.is_at(profile.distance_ns)) {
        Some(known) => known.update(profile),
        None => profiles.push(profile),
    }
    while profiles.len() > most {
        let oldest = (0..profiles.len()).min_by_key(|i| profiles[*i].measured_at());
        oldest.map(|i| profiles.remove(i));
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A profile of one collective that takes `us`.
    pub(in crate::table) fn profile(distance_ns: Option<u32>, us: f64, measured_at: u64) -> Profile {
        let timing = Timing {
            collective: "all_reduce".into(),
            transport: "shm".into(),
            ranks: 2,
            contended: false,
            p50: Curve::fit(&[(1024, us), (4096, 4.0 * us)]).unwrap(),
            p99: Curve::fit(&[(1024, 2.0 * us)]).unwrap(),
            measured_at,
        };
        let step = Step { ranks: 2, layer_us: 30.0, gbps: 10.0, band: 1.1, measured_at };
        let read = |processors, bytes, gbps| Reading { processors, bytes, gbps };
        let reads = vec![read(1, 1 << 20, 40.0), read(1, 1 << 28, 20.0), read(2, 1 << 28, 15.0)];
        Profile { distance_ns, timings: vec![timing], steps: vec![step], reads }
    }

    fn us(profile: Option<&Profile>) -> f64 {
        profile.unwrap().timing("all_reduce", "shm", 2, false).unwrap().p50.us(1024)
    }

    #[test]
    fn each_distance_has_a_profile_and_the_oldest_goes() {
        let mut all = Vec::new();
        assert_eq!(nearest(&all, Some(100)), None);
        merge(&mut all, profile(Some(50), 1.0, 10), 2);
        merge(&mut all, profile(Some(480), 5.0, 11), 2);
        assert_eq!((us(nearest(&all, Some(60))), us(nearest(&all, Some(400)))), (1.0, 5.0));
        assert_eq!(us(nearest(&all, None)), 5.0, "the last");
        merge(&mut all, profile(Some(55), 2.0, 12), 2);
        assert_eq!((all.len(), us(nearest(&all, Some(50)))), (2, 2.0));
        merge(&mut all, profile(Some(100), 3.0, 13), 2);
        assert_eq!(all.iter().map(|p| p.distance_ns.unwrap()).collect::<Vec<_>>(), [55, 100]);
        assert!(nearest(&all, Some(480)).is_some_and(|p| p.distance_ns == Some(100) && !p.is_at(Some(480))));
        // Where there is one processor, there is no distance, and another profile.
        merge(&mut all, profile(None, 9.0, 14), 3);
        assert_eq!((all.len(), us(nearest(&all, None))), (3, 9.0));
    }

    #[test]
    fn what_is_measured_later_leaves_the_rest() {
        let mut all = vec![profile(Some(50), 1.0, 10)];
        let gather = Timing { collective: "all_gather".into(), ..all[0].timings[0].clone() };
        let step = Step { ranks: 1, ..all[0].steps[0].clone() };
        let later =
            Profile { distance_ns: Some(50), timings: vec![gather], steps: vec![step], reads: vec![] };
        merge(&mut all, later, 4);
        let [known] = &all[..] else { panic!("{all:?}") };
        assert_eq!((known.timings.len(), known.steps.len(), known.reads.len()), (2, 2, 3));
        assert_eq!((known.memory(1).unwrap().gbps, known.memory(64).unwrap().gbps), (20.0, 15.0));
        assert_eq!(known.step(2).unwrap().us(12, 1_000_000), 460.0);
    }

    #[test]
    fn distances_agree_or_there_is_none() {
        assert_eq!(one_distance(&[Some(100), Some(95), Some(110)]), Some(Some(100)));
        assert_eq!(one_distance(&[Some(50), Some(480)]), None);
        assert_eq!(one_distance(&[None, None]), Some(None));
        assert_eq!(one_distance(&[]), None);
    }

    #[test]
    fn nonsense_is_found() {
        let good = profile(Some(50), 1.0, 10);
        assert_eq!(good.unsound(), None);
        let with = |change: fn(&mut Profile)| {
            let mut bad = good.clone();
            change(&mut bad);
            bad.unsound()
        };
        for bad in [
            with(|p| p.timings[0].ranks = 1),
            with(|p| p.steps[0].gbps = 0.0),
            with(|p| p.steps[0].layer_us = -1.0),
            with(|p| p.steps[0].band = f64::NAN),
            with(|p| p.reads[0].gbps = f64::INFINITY),
            with(|p| p.timings = vec![p.timings[0].clone(); 513]),
        ] {
            assert!(bad.is_some());
        }
    }

    #[test]
    fn what_tells_nothing_apart_is_no_step() {
        assert_eq!(Step::fit(2, &[], 0), None);
        assert_eq!(Step::fit(2, &[(1.0, 1e6, 100.0)], 0), None);
        assert_eq!(Step::fit(2, &[(1.0, 1e6, 100.0), (2.0, 2e6, 200.0)], 0), None);
        assert_eq!(Step::fit(2, &[(1.0, 1e6, 0.0), (2.0, 9e6, 200.0)], 0), None);
        // More bytes that take less.
        assert_eq!(Step::fit(2, &[(1.0, 1e6, 100.0), (1.0, 9e6, 50.0)], 0), None);
    }

    proptest! {
        #[test]
        fn a_step_is_found_through_noise(
            layer_us in 5f64..100.0,
            gbps in 2f64..50.0,
            noise in proptest::collection::vec(0.97f64..1.03, 6),
        ) {
            let time = |n: f64, bytes: f64| n * layer_us + bytes / (gbps * 1e3);
            let models = [(24.0, 40e6), (2.0, 200e6), (12.0, 90e6)].repeat(2);
            let measured: Vec<_> = models.iter().zip(&noise).map(|((n, b), x)| (*n, *b, time(*n, *b) * x)).collect();
            let step = Step::fit(4, &measured, 0).unwrap();
            for (n, bytes) in [(12usize, 200_000_000u64), (32, 100_000_000), (1, 10_000_000)] {
                let ratio = step.us(n, bytes) / time(n as f64, bytes as f64);
                prop_assert!((0.9..1.1).contains(&ratio), "{n} {bytes}: {ratio}");
            }
        }
    }
}
