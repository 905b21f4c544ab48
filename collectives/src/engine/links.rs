//! Measures links: how long exchanges over them take, when asked and, where the choice of algorithms follows them, again
//! and again.

use std::time::Instant;

use tensorwire_core::{Call, DType, Op, ReduceOp};
use tensorwire_transports::shm::Failure;

use super::{Buffers, NetEngine, Reduction};
use crate::adapt::{self, Adaptation, Allowed, LARGE_TIMES, Level, Levels, SMALL, SMALL_TIMES, Seen};
use crate::network::{Exchange, LinkClass};
use crate::schedule::around::Rings;
use crate::select::Algorithm;

impl NetEngine {
    /// See [`Communicator::measure_link`](crate::Communicator::measure_link).
    pub(crate) fn measure_link(
        &mut self,
        class: LinkClass,
        bytes: usize,
        messages: usize,
        times: usize,
    ) -> Result<Option<Exchange>, Failure> {
        let rings = Rings::new(self.network.hosts(), class);
        let Some(sharing) = rings.map(|rings| rings.sharing()) else { return Ok(None) };
        let call = Call {
            op: Op::MeasureLink,
            dtype: Some(DType::U8),
            reduce: None,
            count: bytes as u64,
            root: Some(messages as u32),
            layout: (times as u32) << 1 | class as u32,
            wire: None,
        };
        let mut slowest = [0u64];
        self.run(call, |engine| {
            let took = engine.time_exchanges(class, bytes, messages, times)?;
            slowest[0] = took.iter().sum();
            engine.agree_on_most(&mut slowest)
        })?;
        let us = slowest[0] as f64 * 1e-3 / times.max(1) as f64;
        Ok(Some(Exchange { us, bytes: bytes * messages * sharing }))
    }

    /// Exchanges `messages` of `bytes` with this rank's neighbours over a class of links, one time after the other: the
    /// nanoseconds of each. A rank without such a neighbour has nothing to wait for.
    pub(super) fn time_exchanges(
        &mut self,
        class: LinkClass,
        bytes: usize,
        messages: usize,
        times: usize,
    ) -> Result<Vec<u64>, Failure> {
        let Some(rings) = Rings::new(self.network.hosts(), class) else { return Ok(Vec::new()) };
        rings.exchange(&mut self.steps, self.group.rank(), bytes, messages);
        let (input, mut output) = (vec![0; bytes], vec![0; bytes]);
        let mut took = Vec::with_capacity(times);
        for _ in 0..times {
            let start = Instant::now();
            self.execute(Buffers { input: Some(&input), output: &mut output }, None)?;
            took.push(start.elapsed().as_nanos() as u64);
        }
        Ok(took)
    }

    /// Notes an all-reduce for which the links have chosen this algorithm: see [`Adaptation`](crate::adapt::Adaptation).
    pub(super) fn note(&mut self, bytes: usize, r: &Reduction, algorithm: Algorithm) {
        if !self.adaptation.is_on() {
            return;
        }
        let (level, bytes, allowed) = match (&self.local, algorithm) {
            (Some(local), Algorithm::Hierarchical) => {
                (Level::Hosts, local.largest_slice(bytes), Allowed::new(|_| true))
            }
            // Memory has chosen this one.
            (Some(_), Algorithm::Inline | Algorithm::OneShot) => return,
            _ => {
                let any_order = self.network.any_order();
                (Level::Ranks, bytes, Allowed::new(|a| any_order || r.keeps_order(a)))
            }
        };
        if !self.adaptation.has_begun() {
            self.account_anew();
        }
        let costs = self.levels().of(level);
        let us = match level {
            Level::Ranks => costs.us(algorithm, bytes),
            Level::Hosts => costs.us(costs.choose(bytes, |_| true), bytes),
        };
        self.adaptation.note(level, bytes, allowed, us);
    }

    fn levels(&self) -> Levels<'_> {
        Levels { ranks: self.network.costs(), hosts: self.local.as_ref().map(|local| local.across.costs()) }
    }

    /// The classes of links that are measured.
    fn classes(&self) -> Vec<LinkClass> {
        adapt::classes(self.network.hosts(), self.network.links(), self.local.is_some())
    }

    fn account_anew(&mut self) {
        let classes = self.classes();
        if classes.is_empty() {
            self.adaptation = Adaptation::new(0.0);
            return;
        }
        let (hosts, links) = (self.network.hosts(), &self.network.links().links);
        let (costs, bytes) = (self.network.costs(), classes.len() * 2 * size_of::<u64>());
        let agreeing_us = costs.us(costs.choose(bytes, |_| true), bytes);
        let us = adapt::measuring_us(
            hosts,
            links,
            &classes,
            self.adaptation.large(self.group.world()),
            agreeing_us,
        );
        self.adaptation.begin(us);
    }

    /// Measures the links within a call that all ranks are in the end of, and takes them over if that pays.
    #[cold]
    pub(super) fn adapt(&mut self) -> Result<(), Failure> {
        let (classes, large) = (self.classes(), self.adaptation.large(self.group.world()));
        let mut took = Vec::with_capacity(2 * classes.len());
        for class in &classes {
            // The first makes the connection.
            let mut small = self.time_exchanges(*class, SMALL, 1, SMALL_TIMES)?.split_off(1);
            let mut large = self.time_exchanges(*class, large, 1, LARGE_TIMES)?;
            took.extend([&mut small, &mut large].map(|times| {
                times.sort_unstable();
                times[times.len() / 2]
            }));
        }
        self.agree_on_most(&mut took)?;
        let us = |nanoseconds: u64| nanoseconds as f64 * 1e-3;
        let seen = |(class, took): (&LinkClass, &[u64])| {
            let sharing = Rings::new(self.network.hosts(), *class).map_or(1, |rings| rings.sharing());
            (*class, Seen { small_us: us(took[0]), large_us: us(took[1]), bytes: large * sharing })
        };
        let seen: Vec<_> = classes.iter().zip(took.chunks(2)).map(seen).collect();
        let links = adapt::links(&self.network.links().links, &seen);
        let ranks = self.network.adapted(links, &classes);
        let hosts = self.local.as_ref().map(|local| ranks.between(local.across.world()));
        let measured = Levels { ranks: ranks.costs(), hosts: hosts.as_ref().map(|hosts| hosts.costs()) };
        let mut adaptation = self.adaptation.clone();
        if adaptation.decide(self.levels(), measured) {
            self.network = ranks;
            if let (Some(local), Some(hosts)) = (&mut self.local, hosts) {
                local.across = hosts;
            }
        }
        self.adaptation = adaptation;
        self.account_anew();
        Ok(())
    }

    /// Replaces each value by the largest of all ranks'.
    pub(super) fn agree_on_most(&mut self, values: &mut [u64]) -> Result<(), Failure> {
        let max = Reduction::new(DType::U64, ReduceOp::Max).expect("the largest of integers is defined");
        let data = Buffers::in_place(bytemuck::cast_slice_mut(values));
        let algorithm = self.choose(data.len(), &max);
        self.all_reduce_by(data, &max, algorithm, None)
    }
}
