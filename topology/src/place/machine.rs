//! What the search runs a model on: devices in the order in which ranks are laid on them, and islands of links.

use std::collections::BTreeSet;

use crate::fabric::{Fabric, Kind};

/// Devices, and the islands that their links form.
///
/// Devices are in the order in which ranks are laid on them: members of an island are neighbours, and among equals
/// the faster comes first, then the one with more memory, then the one that comes first in the fabric.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    /// The devices.
    pub workers: Vec<Worker>,
    /// From the nearest links to the farthest: each level's islands are made of the islands of the level before it.
    pub levels: Vec<Level>,
    /// Interfaces of each host to the network, which its devices share.
    pub interfaces: Vec<u32>,
}

/// One device, which runs one rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Worker {
    /// Its place in the fabric.
    pub device: usize,
    /// Its name.
    pub name: String,
    /// Its host, as a place in [`Machine::interfaces`].
    pub host: usize,
    /// Its memory.
    pub memory_bytes: u64,
    /// What it reads of its memory in a microsecond (MB/s).
    pub bytes_per_us: f64,
    /// Operations that it computes in a microsecond; 1e6 of them are 1 TFLOP/s.
    pub flops_per_us: f64,
}

/// The islands that links of one class and nearer ones form.
#[derive(Clone, Debug, PartialEq)]
pub struct Level {
    /// The class of its links, such as `card` or `network`.
    pub class: String,
    /// The island that each device is on.
    pub island_of: Vec<usize>,
    /// The slowest link of the class in each island.
    pub links: Vec<Link>,
    /// Whether these links are the network, whose interfaces the devices of a host share.
    pub network: bool,
}

/// What a message costs: `alpha_us + bytes / bytes_per_us`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Latency, in microseconds.
    pub alpha_us: f64,
    /// Bytes in a microsecond (MB/s).
    pub bytes_per_us: f64,
}

impl Link {
    /// The link whose every message takes as long as the slower of two.
    pub fn slower(self, other: Link) -> Link {
        Link {
            alpha_us: self.alpha_us.max(other.alpha_us),
            bytes_per_us: self.bytes_per_us.min(other.bytes_per_us),
        }
    }

    /// What a message takes, in microseconds.
    pub fn us(self, bytes: f64) -> f64 {
        self.alpha_us + bytes / self.bytes_per_us
    }
}

/// How a group of ranks lies over the levels: `ways` islands of the level before, in each island of this one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Span {
    /// From the nearest links to the farthest. The product of their ways is the group's size; none for one rank.
    pub legs: Vec<Leg>,
}

/// A level's part of a [`Span`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Leg {
    /// Which of [`Machine::levels`].
    pub level: usize,
    /// How many exchange with each other here.
    pub ways: usize,
    /// Over which links: the slowest of those that are used.
    pub link: Link,
}

/// What is taken of a kind of device of which nothing is known: `(GB/s, TFLOP/s)`. Round figures of the right order of
/// magnitude: a socket's memory and vector units, a present accelerator's.
fn assumed(kind: Kind) -> (f64, f64) {
    match kind {
        Kind::Cpu => (100.0, 2.0),
        Kind::Gpu | Kind::Accelerator => (1000.0, 100.0),
    }
}

impl Machine {
    /// Some devices of a fabric, for operands of 8, 16 or 32 bits; and what had to be assumed of them.
    ///
    /// A device is one rank: several on one would share its memory and its speed, and gain nothing.
    ///
    /// # Panics
    /// If there is no such device.
    pub fn of(fabric: &Fabric, devices: &[usize], bits: u32) -> (Machine, Vec<String>) {
        let mut unknown = BTreeSet::new();
        let worker = |device: &usize| {
            let model = fabric.model(*device);
            let (gbps, tflops) = assumed(model.kind);
            let mut or = |known: Option<f64>, what: &str, assumed: f64, unit: &str| {
                known.unwrap_or_else(|| {
                    unknown
                        .insert(format!("{what} of {} isn't known: {assumed} {unit} is assumed", model.name));
                    assumed
                })
            };
            let bytes_per_us = 1e3 * or(model.memory_gbps, "the memory's bandwidth", gbps, "GB/s");
            // Wider operands than those with a figure take twice as long.
            let wider = model.tflops.f16.map(|half| half / 2.0);
            let known = model.tflops.of_bits(bits).or(wider);
            let flops_per_us = 1e6 * or(known, "the speed", tflops, "TFLOP/s");
            let memory_bytes = model.memory_bytes.unwrap_or_else(|| {
                unknown.insert(format!(
                    "how much memory {} has isn't known: any amount is taken to fit",
                    model.name
                ));
                u64::MAX
            });
            if model.ranks > 1 {
                unknown.insert(format!(
                    "{} can run {} ranks, which would share its memory and its speed: it is taken as one",
                    model.name, model.ranks
                ));
            }
            let at = &fabric.devices()[*device];
            let (name, host) = (at.name.clone(), at.host as usize);
            Worker { device: *device, name, host, memory_bytes, bytes_per_us, flops_per_us }
        };
        let workers: Vec<Worker> = devices.iter().map(worker).collect();
        let mut place = vec![0; fabric.devices().len()];
        devices.iter().enumerate().for_each(|(at, d)| place[*d] = at);
        let levels = fabric.classes(devices).into_iter().map(|hop| {
            let islands = fabric.islands(devices, hop.class);
            let mut island_of = vec![0; devices.len()];
            let mut links = Vec::new();
            for (i, island) in islands.iter().enumerate() {
                island.iter().for_each(|d| island_of[place[*d]] = i);
                let own = fabric.classes(island).into_iter().find(|h| h.class == hop.class).unwrap_or(hop);
                links.push(Link { alpha_us: own.link.alpha_us, bytes_per_us: 1e3 * own.link.gbps });
            }
            Level { class: hop.class.name().to_owned(), island_of, links, network: hop.class.is_network() }
        });
        let levels = levels.collect();
        let interfaces = fabric.hosts().iter().map(|h| h.nics.len().max(1) as u32).collect();
        (Machine::new(workers, levels, interfaces), unknown.into_iter().collect())
    }

    /// Puts devices into the order in which ranks are laid on them. Before, `levels` count them as they come.
    pub fn new(workers: Vec<Worker>, levels: Vec<Level>, interfaces: Vec<u32>) -> Machine {
        // The best device of each island, so that whole islands are sorted by it: from the farthest level in.
        let order = |a: &usize, b: &usize| {
            let (x, y) = (&workers[*a], &workers[*b]);
            let speed =
                y.flops_per_us.total_cmp(&x.flops_per_us).then(y.bytes_per_us.total_cmp(&x.bytes_per_us));
            speed.then(y.memory_bytes.cmp(&x.memory_bytes)).then(a.cmp(b))
        };
        let mut best_first: Vec<usize> = (0..workers.len()).collect();
        best_first.sort_by(order);
        let mut place = vec![0; workers.len()];
        best_first.iter().enumerate().for_each(|(at, d)| place[*d] = at);
        let best_of = |level: &Level| {
            let mut best = vec![usize::MAX; level.links.len()];
            level.island_of.iter().zip(&place).for_each(|(i, p)| best[*i] = best[*i].min(*p));
            best
        };
        let best: Vec<Vec<usize>> = levels.iter().map(best_of).collect();
        let key = |d: usize| -> Vec<usize> {
            let islands = levels.iter().zip(&best).rev().map(|(l, best)| best[l.island_of[d]]);
            islands.chain([place[d]]).collect()
        };
        let mut sorted: Vec<usize> = (0..workers.len()).collect();
        sorted.sort_by_cached_key(|d| key(*d));
        let levels = levels
            .into_iter()
            .map(|l| Level { island_of: sorted.iter().map(|d| l.island_of[*d]).collect(), ..l })
            .collect();
        let workers = sorted.iter().map(|d| workers[*d].clone()).collect();
        Machine { workers, levels, interfaces }
    }

    /// How a group of devices lies over the levels, while each host has `active` devices that use the network at the
    /// same time; nothing if there is no path between two of them.
    ///
    /// A group that lies on the islands unevenly exchanges flatly, over the slowest of the links it needs.
    pub fn span(&self, group: &[usize], active: &[u32]) -> Option<Span> {
        let mut legs: Vec<Leg> = Vec::new();
        let mut even = true;
        // One device of each island of the level before.
        let mut heads = group.to_vec();
        let mut worst: Option<Leg> = None;
        for (level, at) in self.levels.iter().enumerate() {
            if heads.len() < 2 {
                break;
            }
            heads.sort_by_key(|d| at.island_of[*d]);
            let islands: Vec<&[usize]> =
                heads.chunk_by(|a, b| at.island_of[*a] == at.island_of[*b]).collect();
            let ways = islands[0].len();
            even &= islands.iter().all(|i| i.len() == ways);
            let used = islands.iter().filter(|i| i.len() > 1).map(|i| self.link(level, i, active));
            if let Some(link) = used.reduce(Link::slower) {
                legs.push(Leg { level, ways, link });
                let ways = group.len();
                worst = Some(worst.map_or(Leg { level, ways, link }, |w| Leg {
                    level,
                    ways,
                    link: w.link.slower(link),
                }));
            }
            heads = islands.iter().map(|i| i[0]).collect();
        }
        match (heads.len() < 2, even, worst) {
            (false, ..) => None,
            (true, false, Some(worst)) => Some(Span { legs: vec![worst] }),
            (true, ..) => Some(Span { legs }),
        }
    }

    fn link(&self, level: usize, devices: &[usize], active: &[u32]) -> Link {
        let at = &self.levels[level];
        let Link { alpha_us, bytes_per_us } = at.links[at.island_of[devices[0]]];
        let crowd = |d: &usize| {
            let host = self.workers[*d].host;
            (f64::from(active[host]) / f64::from(self.interfaces[host].max(1))).max(1.0)
        };
        let shared = if at.network { devices.iter().map(crowd).fold(1.0, f64::max) } else { 1.0 };
        Link { alpha_us, bytes_per_us: bytes_per_us / shared }
    }

    /// Whether two lists of devices are alike place by place, in speed and memory and in the links between them.
    pub fn alike(&self, a: &[usize], b: &[usize], active: &[u32]) -> bool {
        let crowd = |d: usize| {
            let host = self.workers[d].host;
            (active[host], self.interfaces[host])
        };
        let mut pairs = a.iter().zip(b);
        // Islands, numbered as they first appear in each list.
        let mut numbers: Vec<[usize; 2]> = Vec::new();
        pairs.all(|(a, b)| self.workers[*a].is_like(&self.workers[*b]) && crowd(*a) == crowd(*b))
            && self.levels.iter().all(|level| {
                numbers.clear();
                a.iter().zip(b).all(|(a, b)| {
                    let pair = [level.island_of[*a], level.island_of[*b]];
                    // Neighbours are mostly on the island that was seen last.
                    let known = numbers.iter().rev().find(|known| known[0] == pair[0] || known[1] == pair[1]);
                    if let Some(known) = known {
                        return *known == pair;
                    }
                    numbers.push(pair);
                    level.links[pair[0]] == level.links[pair[1]]
                })
            })
    }
}

impl Worker {
    /// Whether another is as fast and has as much memory.
    pub fn is_like(&self, other: &Worker) -> bool {
        (self.memory_bytes, self.bytes_per_us, self.flops_per_us)
            == (other.memory_bytes, other.bytes_per_us, other.flops_per_us)
    }
}

impl Span {
    /// Ranks in the group.
    pub fn ranks(&self) -> usize {
        self.legs.iter().map(|l| l.ways).product()
    }

    /// The slowest of its links; none for one rank.
    pub fn slowest(&self) -> Option<Link> {
        self.legs.iter().map(|l| l.link).reduce(Link::slower)
    }

    /// What a mebibyte takes over the slowest of its links: by this, spans are compared.
    pub fn us_of_mib(&self) -> f64 {
        self.slowest().map_or(0.0, |link| link.us(1_048_576.0))
    }

    /// The level of its farthest links.
    pub fn level(&self) -> Option<usize> {
        self.legs.last().map(|l| l.level)
    }
}
