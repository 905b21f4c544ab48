//! What an exchange and a decode step are expected to take: the alpha-beta model.
//!
//! A step of an exchange costs `alpha + bytes / bandwidth`: a fixed latency, and the bytes a rank moves.
//! This is the model of Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations
//! in MPICH", 2005; NCCL's tuner chooses algorithms by the same formula. With `n` ranks and a payload of
//! `B` bytes (of the whole result), in shared memory, where a rank reads what each other rank has written:
//!
//! | exchange | steps | bytes a rank reads | time |
//! | --- | --- | --- | --- |
//! | all-reduce, each rank reads all | 1 | `(n-1) B` | `alpha + (n-1) B / bandwidth` |
//! | all-reduce as reduce-scatter and all-gather | 2 | `2 (n-1)/n B` | `2 alpha + 2 (n-1)/n B / bandwidth` |
//! | all-gather | 1 | `(n-1)/n B` | `alpha + (n-1)/n B / bandwidth` |
//!
//! | reduce-scatter, all-to-all | 1 | `(n-1)/n B` | `alpha + (n-1)/n B / bandwidth` |
//! | broadcast, send_recv | 1 | `B` | `alpha + B / bandwidth` |
//!
//! An all-reduce takes the cheaper of its two forms: at the payloads of a decode step the first, as latency
//! decides there. The arithmetic of the reduction is counted in the bandwidth.
//!
//! Decoding one token reads every weight once and does two operations with it, far below what a processor can
//! compute in that time, so a rank's computing time is its bytes over its memory bandwidth.
//!
//! Constants hold where nothing was measured; on a [fabric](CostModel::on_fabric) its links and devices do, by which
//! placements are predicted. Where `tensorwire topo --probe` has left a [`Profile`], its curves do,
//! which are alpha-beta in pieces and fitted to this machine ([`Curve`](crate::table::Curve)); and a step's time beside
//! its collectives is a time for each layer and one for each byte of weights ([`Step`](crate::table::Step)). Each
//! [`Estimate`] says which it is from.

mod links;

use crate::fabric::Fabric;
use crate::table::{Profile, Table};

pub use links::Links;

/// What communication and memory cost.
///
/// The [`Default`] is a set of assumed constants and no measurement.
#[derive(Clone, Debug, PartialEq)]
pub struct CostModel {
    /// Latency of one step of an exchange, in microseconds.
    pub alpha_us: f64,
    /// Bytes that one rank moves through shared memory in a microsecond (MB/s); 1000 is 1 GB/s.
    pub link_bytes_per_us: f64,
    /// Bytes of weights that one rank reads from memory in a microsecond.
    pub memory_bytes_per_us: f64,
    /// Where the figures come from, for the plan's notes.
    pub source: String,
    /// Links of a fabric: they have precedence over the latency and the bandwidth above.
    pub links: Option<Links>,
    /// What was measured: it has precedence over all others.
    pub measured: Option<Measured>,
}

/// What was measured over a transport.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// At one distance of the processors.
    pub profile: Profile,
    /// What carries the bytes, such as `shm`.
    pub transport: String,
}

/// What something is expected to take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Microseconds.
    pub us: f64,
    /// By what factor most measurements miss it at most, where it is from measurements; nothing where it is from
    /// constants, whose error nobody knows.
    pub band: Option<f64>,
}

impl Default for CostModel {
    /// Two processes on one host: 2 us for a write to be seen and answered between cores, 8 GB/s of copying
    /// and adding a core, 16 GB/s of reading a rank, about what one or two cores draw from DRAM. Round
    /// figures of the right order of magnitude for a present server.
    fn default() -> CostModel {
        CostModel {
            alpha_us: 2.0,
            link_bytes_per_us: 8_000.0,
            memory_bytes_per_us: 16_000.0,
            source: "built-in constants for shared memory on one host, not a measurement of this machine"
                .to_owned(),
            links: None,
            measured: None,
        }
    }
}

impl CostModel {
    /// What a profile says of `transport`, and constants for what it says nothing of.
    pub fn measured(profile: &Profile, transport: &str) -> CostModel {
        let constants = CostModel::default();
        let slowest = profile.memory(usize::MAX).map(|reading| reading.gbps * 1e3);
        let memory_bytes_per_us = slowest.unwrap_or(constants.memory_bytes_per_us);
        CostModel { memory_bytes_per_us, source: "built-in constants".to_owned(), ..constants }
            .with_measured(profile, transport)
    }

    /// What a profile says of `transport`, and these costs for what it says nothing of.
    pub fn with_measured(self, profile: &Profile, transport: &str) -> CostModel {
        let at = profile.distance_ns.map_or(String::new(), |ns| format!(", at {ns} ns between processors"));
        let source = format!(
            "curves measured on this machine over {transport}{at}; from {} where it has none",
            self.source
        );
        let measured = Some(Measured { profile: profile.clone(), transport: transport.to_owned() });
        CostModel { source, measured, ..self }
    }

    /// What this machine's table says of shared memory at this distance of its processors, or last where that isn't
    /// known; constants where there is no table.
    pub fn in_force(distance_ns: Option<u32>) -> CostModel {
        let table = Table::in_force().ok();
        let profile = table.as_ref().and_then(|table| table.profile(distance_ns));
        profile.map_or_else(CostModel::default, |profile| CostModel::measured(profile, "shm"))
    }

    /// What the links and the devices of a fabric cost, as [placements](crate::place) are predicted: `ranks` are the devices
    /// of all ranks in order, of which the first `tp` are one tensor-parallel group, for operands of 8, 16 or 32 bits.
    ///
    /// # Panics
    /// If there is no such device.
    pub fn on_fabric(fabric: &Fabric, ranks: &[usize], tp: usize, bits: u32) -> CostModel {
        let links = Links::new(fabric, ranks, bits);
        let constants = CostModel::default();
        let memory = links.memory_bytes_per_us(tp);
        let (alpha_us, link_bytes_per_us) =
            links.farthest().unwrap_or((constants.alpha_us, constants.link_bytes_per_us));
        CostModel {
            alpha_us,
            link_bytes_per_us,
            memory_bytes_per_us: memory.unwrap_or(constants.memory_bytes_per_us),
            source: format!("the links and devices of {}", fabric.name()),
            links: Some(links),
            ..constants
        }
    }

    /// What a collective takes over `world` ranks; nothing for a name that isn't known here. `bytes` is what one rank
    /// contributes: one block of an all-gather, the whole input of a reduce-scatter or an all-to-all.
    ///
    /// ```
    /// let costs = tensorwire_topology::cost::CostModel::default();
    /// let estimate = costs.collective("all_reduce", 8192, 2).unwrap();
    /// assert!(estimate.us > 2.0 && estimate.band.is_none(), "from constants");
    /// ```
    pub fn collective(&self, name: &str, bytes: u64, world: usize) -> Option<Estimate> {
        self.estimate(name, bytes as f64, world)
    }

    fn estimate(&self, name: &str, bytes: f64, world: usize) -> Option<Estimate> {
        let constant = self.constant_us(name, bytes, world)?;
        Some(self.measured_or(constant, name, bytes, world))
    }

    fn measured_or(&self, us: f64, name: &str, bytes: f64, world: usize) -> Estimate {
        let measured = self.measured.as_ref().filter(|_| world > 1);
        let timing = measured.and_then(|m| m.profile.timing(name, &m.transport, world, false));
        match timing {
            Some(timing) => {
                Estimate { us: timing.p50.us(bytes.round() as u64), band: Some(timing.p50.band()) }
            }
            None => Estimate { us, band: None },
        }
    }

    /// What a step of a decoder takes beside its collectives, where each of `world` ranks reads up to `bytes` of weights
    /// in `layers` layers, the output head one of them.
    pub fn step(&self, layers: usize, bytes: u64, world: usize) -> Estimate {
        match self.measured.as_ref().and_then(|m| m.profile.step(world)) {
            Some(step) => Estimate { us: step.us(layers, bytes), band: Some(step.band) },
            None => Estimate { us: self.read_us(bytes), band: None },
        }
    }

    /// An all-reduce of `bytes` over `world` ranks, in microseconds.
    pub fn all_reduce_us(&self, bytes: u64, world: usize) -> f64 {
        self.collective("all_reduce", bytes, world).map_or(0.0, |e| e.us)
    }

    /// An all-gather whose result is `bytes` on each of `world` ranks, in microseconds.
    pub fn all_gather_us(&self, bytes: u64, world: usize) -> f64 {
        self.estimate("all_gather", bytes as f64 / world as f64, world).map_or(0.0, |e| e.us)
    }

    /// A reduce-scatter or an all-to-all of `bytes` on each of `world` ranks, by its name, in microseconds.
    pub fn exchange_us(&self, name: &str, bytes: u64, world: usize) -> f64 {
        self.collective(name, bytes, world).map_or(0.0, |e| e.us)
    }

    /// An all-to-all of `bytes` on each rank, among `among` of `world` ranks that are `world / among` apart, in microseconds.
    pub fn grouped_all_to_all_us(&self, bytes: u64, world: usize, among: usize) -> f64 {
        let bytes = bytes as f64;
        let links = self.links.as_ref().and_then(|links| links.all_to_all_us(bytes, world, among));
        let us = links.or_else(|| self.constant_us("all_to_all", bytes, among));
        us.map_or(0.0, |us| self.measured_or(us, "all_to_all", bytes, among).us)
    }

    fn constant_us(&self, name: &str, bytes: f64, world: usize) -> Option<f64> {
        if let Some(us) = self.links.as_ref().and_then(|links| links.us(name, bytes, world)) {
            return Some(us);
        }
        let (n, wire) = (world as f64, bytes / self.link_bytes_per_us);
        let us = match name {
            "all_reduce" => {
                let one_step = self.alpha_us + (n - 1.0) * wire;
                let two_steps = 2.0 * self.alpha_us + 2.0 * (n - 1.0) / n * wire;
                one_step.min(two_steps)
            }
            "all_gather" => self.alpha_us + (n - 1.0) * wire,
            "reduce_scatter" | "all_to_all" => self.alpha_us + (n - 1.0) / n * wire,
            "broadcast" | "send_recv" => self.alpha_us + wire,
            "barrier" => self.alpha_us,
            _ => return None,
        };
        Some(if world < 2 { 0.0 } else { us })
    }

    /// Reading `bytes` of weights, in microseconds.
    pub fn read_us(&self, bytes: u64) -> f64 {
        bytes as f64 / self.memory_bytes_per_us
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{Curve, Reading, Step, Timing};

    fn model() -> CostModel {
        CostModel {
            alpha_us: 2.0,
            link_bytes_per_us: 1_000.0,
            memory_bytes_per_us: 4_000.0,
            source: "test".to_owned(),
            links: None,
            measured: None,
        }
    }

    #[test]
    fn one_rank_exchanges_nothing() {
        assert_eq!(model().all_reduce_us(1 << 30, 1), 0.0);
        assert_eq!(model().all_gather_us(1 << 30, 1), 0.0);
    }

    #[test]
    fn a_small_all_reduce_takes_one_step_and_a_large_one_two() {
        // 4 ranks, 1000 bytes (1 us on the link): 2 + 3 = 5 us in one step, 4 + 1.5 = 5.5 us in two.
        assert_eq!(model().all_reduce_us(1_000, 4), 5.0);
        // 100,000 bytes: 2 + 300 us in one step, 4 + 150 us in two.
        assert_eq!(model().all_reduce_us(100_000, 4), 154.0);
    }

    #[test]
    fn an_all_gather_reads_what_the_others_have() {
        // 4 ranks, 4000 bytes in all: each reads 3000.
        assert_eq!(model().all_gather_us(4_000, 4), 5.0);
        assert_eq!(model().read_us(8_000), 2.0);
    }

    #[test]
    fn the_other_collectives_read_what_they_need() {
        let us = |name| model().collective(name, 4_000, 4).map(|e| (e.us, e.band));
        assert_eq!(us("all_gather"), Some((14.0, None)), "each reads three blocks of 4 us");
        assert_eq!(us("reduce_scatter"), Some((5.0, None)));
        assert_eq!(us("all_to_all"), us("reduce_scatter"));
        assert_eq!(us("send_recv"), Some((6.0, None)));
        assert_eq!((us("broadcast"), us("barrier")), (us("send_recv"), Some((2.0, None))));
        assert_eq!(us("all_reduc"), None);
    }

    #[test]
    fn what_was_measured_has_precedence_and_a_band() {
        let curve = Curve::fit(&[(1_000, 9.0), (1_000, 10.0), (1_000, 11.0), (2_000, 20.0)]).unwrap();
        let timing = Timing {
            collective: "all_reduce".into(),
            transport: "shm".into(),
            ranks: 2,
            contended: false,
            p50: curve.clone(),
            p99: curve,
            measured_at: 1,
        };
        let contended = Timing { collective: "all_gather".into(), contended: true, ..timing.clone() };
        let profile = Profile {
            distance_ns: Some(100),
            timings: vec![timing, contended],
            steps: vec![Step { ranks: 2, layer_us: 10.0, gbps: 2.0, band: 1.2, measured_at: 1 }],
            reads: vec![Reading { processors: 2, bytes: 1 << 28, gbps: 5.0 }],
        };
        let costs = CostModel::measured(&profile, "shm");
        let constants = CostModel::default();
        assert_eq!(costs.all_reduce_us(1_500, 2), 15.0);
        assert!(costs.collective("all_reduce", 1_500, 2).unwrap().band.is_some_and(|band| band > 1.0));
        // Other ranks, another transport, and what was measured under contention alone.
        assert_eq!(costs.all_reduce_us(1_500, 4), constants.all_reduce_us(1_500, 4));
        assert_eq!(costs.all_reduce_us(1_500, 1), 0.0);
        assert_eq!(
            CostModel::measured(&profile, "tcp").all_reduce_us(1_500, 2),
            constants.all_reduce_us(1_500, 2)
        );
        assert_eq!(costs.collective("all_gather", 64, 2).unwrap().band, None);
        assert_eq!(costs.step(3, 4_000, 2), Estimate { us: 32.0, band: Some(1.2) });
        assert_eq!(costs.step(3, 4_000, 4), Estimate { us: 0.8, band: None }, "by the memory's bandwidth");
        assert!(
            costs.source.contains("100 ns") && costs.source.contains("constants where"),
            "{}",
            costs.source
        );
    }
}
