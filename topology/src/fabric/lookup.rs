//! Answers about links: between two devices, within a group, and which devices are near each other.

use std::collections::{BTreeMap, BTreeSet};

use super::{Class, Fabric, Hop, Link, Parts};

/// What is known of a fabric's links, made once so that answers are cheap.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Index {
    spots: Vec<Spot>,
    /// Of each host, a link for each class.
    links: Vec<[Link; Class::ALL.len()]>,
    /// Ascending.
    pairs: Vec<((u32, u32), Hop)>,
}

/// Where a device is, without its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Spot {
    host: u32,
    rack: Option<u32>,
    pod: Option<u32>,
    socket: Option<u32>,
    numa: Option<u32>,
    switch: Option<u32>,
    nvlink: Option<u32>,
    card: Option<u32>,
}

/// A thing that holds devices: the host unless it spans hosts, and its number.
type Holder = (Option<u32>, u32);

impl Spot {
    /// What of this class holds the device, if anything does.
    fn holder(&self, class: Class) -> Option<Holder> {
        let number = match class {
            // Devices have no number of their own here.
            Class::Device => None,
            Class::Card => self.card,
            Class::NvLink => return self.nvlink.map(|n| (None, n)),
            Class::Switch => self.switch,
            Class::Numa => self.numa,
            Class::Socket => self.socket,
            Class::Host => Some(0),
            Class::Rack => return self.rack.map(|n| (None, n)),
            Class::Pod => return self.pod.map(|n| (None, n)),
            Class::Network => return Some((None, 0)),
        };
        number.map(|n| (Some(self.host), n))
    }

    /// The largest thing below a tier of the network that holds the device: a pod, a rack or the host.
    fn below(&self, tier: Class) -> (Class, u32) {
        let narrower = [(Class::Pod, self.pod), (Class::Rack, self.rack), (Class::Host, Some(self.host))];
        let found = narrower.into_iter().find_map(|(c, n)| Some((c, n.filter(|_| c < tier)?)));
        found.unwrap_or((Class::Host, self.host))
    }

    /// The nearest class that two different devices share.
    fn class(&self, other: &Spot) -> Class {
        fn same(a: Option<u32>, b: Option<u32>) -> bool {
            a.is_some() && a == b
        }
        let here = self.host == other.host;
        if here && same(self.card, other.card) {
            Class::Card
        } else if same(self.nvlink, other.nvlink) {
            Class::NvLink
        } else if !here && same(self.rack, other.rack) {
            Class::Rack
        } else if !here && same(self.pod, other.pod) {
            Class::Pod
        } else if !here {
            Class::Network
        } else if same(self.switch, other.switch) {
            Class::Switch
        } else if same(self.numa, other.numa) {
            Class::Numa
        } else if same(self.socket, other.socket) {
            Class::Socket
        } else {
            Class::Host
        }
    }
}

impl Index {
    pub(super) fn new(parts: &Parts) -> Index {
        let spots = parts.devices.iter().map(|d| Spot {
            host: d.host,
            rack: parts.hosts[d.host as usize].rack,
            pod: parts.hosts[d.host as usize].pod,
            socket: d.socket,
            numa: d.numa,
            switch: d.switch,
            nvlink: d.nvlink,
            card: d.card,
        });
        let links = parts.hosts.iter().map(|host| Class::ALL.map(|class| parts.link(host, class)));
        let mut pairs: Vec<_> =
            parts.pairs.iter().map(|p| ((p.a, p.b), Hop { class: p.class, link: p.link })).collect();
        pairs.sort_by_key(|(pair, _)| *pair);
        Index { spots: spots.collect(), links: links.collect(), pairs }
    }

    fn link(&self, class: Class, a: u32, b: u32) -> Link {
        let of = |host: u32| self.links[host as usize][class as usize];
        if a == b { of(a) } else { of(a).slower(of(b)) }
    }

    fn between(&self, a: usize, b: usize) -> Hop {
        if !self.pairs.is_empty() {
            let pair = (a.min(b) as u32, a.max(b) as u32);
            if let Ok(at) = self.pairs.binary_search_by_key(&pair, |(pair, _)| *pair) {
                return self.pairs[at].1;
            }
        }
        let (from, to) = (&self.spots[a], &self.spots[b]);
        let class = if a == b { Class::Device } else { from.class(to) };
        Hop { class, link: self.link(class, from.host, to.host) }
    }

    /// Of the pairs that some different devices form, each class with its slowest link.
    fn classes(&self, devices: &[usize]) -> BTreeMap<Class, Link> {
        let mut found: BTreeMap<Class, Link> = BTreeMap::new();
        let mut add = |class, link: Link| {
            found.entry(class).and_modify(|known| *known = known.slower(link)).or_insert(link);
        };
        if !self.pairs.is_empty() {
            for (i, a) in devices.iter().enumerate() {
                for b in &devices[..i] {
                    let hop = self.between(*a, *b);
                    add(hop.class, hop.link);
                }
            }
            return found;
        }
        // Devices in one place are alike to all others: one stands for them, and two for them among themselves.
        let mut spots: Vec<Spot> = devices.iter().map(|d| self.spots[*d]).collect();
        spots.sort_unstable();
        let places: Vec<&[Spot]> = spots.chunk_by(|a, b| a == b).collect();
        let hosts = || places.chunk_by(|a, b| a[0].host == b[0].host);
        for host in hosts() {
            let mut within = |a: &Spot, b: &Spot| {
                let class = a.class(b);
                add(class, self.link(class, a.host, a.host));
            };
            for (i, place) in host.iter().enumerate() {
                if let [one, another, ..] = place {
                    within(one, another);
                }
                host[..i].iter().for_each(|other| within(&place[0], &other[0]));
            }
        }
        if hosts().nth(1).is_none() {
            return found;
        }
        for tier in Class::TIERS {
            let within = places.iter().filter_map(|p| Some((p[0].holder(tier)?, &p[0])));
            let mut tiers: BTreeMap<Holder, Vec<&Spot>> = BTreeMap::new();
            within.for_each(|(holder, spot)| tiers.entry(holder).or_default().push(spot));
            for spots in tiers.values() {
                for host in reaching(spots, tier) {
                    add(tier, self.link(tier, host, host));
                }
            }
        }
        let mut domains: BTreeMap<Option<u32>, BTreeSet<u32>> = BTreeMap::new();
        for place in &places {
            domains.entry(place[0].nvlink).or_default().insert(place[0].host);
        }
        for (_, hosts) in domains.iter().filter(|(domain, hosts)| domain.is_some() && hosts.len() > 1) {
            hosts.iter().for_each(|h| add(Class::NvLink, self.link(Class::NvLink, *h, *h)));
        }
        found
    }

    /// Sets of devices that hang together, by classes of a host that are near enough and pairs that are.
    fn islands(
        &self,
        devices: &[usize],
        near: impl Fn(Class, u32) -> bool,
        pair: impl Fn(&Hop) -> bool,
    ) -> Vec<Vec<usize>> {
        let mut devices = devices.to_vec();
        devices.sort_unstable();
        devices.dedup();
        let mut sets = Sets((0..devices.len()).collect());
        for class in Class::ALL {
            let mut first: BTreeMap<Holder, usize> = BTreeMap::new();
            for (i, device) in devices.iter().enumerate() {
                let spot = &self.spots[*device];
                if let Some(holder) = spot.holder(class).filter(|_| near(class, spot.host)) {
                    sets.join(*first.entry(holder).or_insert(i), i);
                }
            }
        }
        for ((a, b), _) in self.pairs.iter().filter(|(_, hop)| pair(hop)) {
            let at = |device: u32| devices.binary_search(&(device as usize));
            if let (Ok(a), Ok(b)) = (at(*a), at(*b)) {
                sets.join(a, b);
            }
        }
        let mut islands: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (i, device) in devices.iter().enumerate() {
            islands.entry(sets.root(i)).or_default().push(*device);
        }
        islands.into_values().collect()
    }
}

/// The hosts of those of a tier's places that have a device which reaches another by the tier and by nothing nearer.
fn reaching(spots: &[&Spot], tier: Class) -> BTreeSet<u32> {
    // Places by NVLink domain, in all and in each thing below the tier.
    let mut all: BTreeMap<Option<u32>, usize> = BTreeMap::new();
    let mut below: BTreeMap<_, usize> = BTreeMap::new();
    let mut near: BTreeMap<_, usize> = BTreeMap::new();
    for spot in spots {
        *all.entry(spot.nvlink).or_default() += 1;
        *below.entry((spot.below(tier), spot.nvlink)).or_default() += 1;
        *near.entry(spot.below(tier)).or_default() += 1;
    }
    // What is elsewhere and not in the device's own domain is reached by the tier.
    let reaches = |spot: &&&Spot| {
        let here = spot.below(tier);
        let joined = spot.nvlink.map_or(0, |_| all[&spot.nvlink] - below[&(here, spot.nvlink)]);
        spots.len() - near[&here] > joined
    };
    spots.iter().filter(reaches).map(|spot| spot.host).collect()
}

/// Disjoint sets: each member names one before it, the first of a set itself.
struct Sets(Vec<usize>);

impl Sets {
    fn root(&mut self, mut i: usize) -> usize {
        while self.0[i] != i {
            self.0[i] = self.0[self.0[i]];
            i = self.0[i];
        }
        i
    }

    fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.root(a), self.root(b));
        self.0[a.max(b)] = a.min(b);
    }
}

impl Fabric {
    /// The way from one device to another; from a device to itself, the one between two ranks on it.
    ///
    /// # Panics
    /// If there is no such device.
    pub fn between(&self, a: usize, b: usize) -> Hop {
        self.index.between(a, b)
    }

    /// The classes by which some devices reach each other, the nearest first, each with its highest latency and its
    /// lowest bandwidth.
    ///
    /// It takes time for each pair of places within a host, not for each pair of devices, unless the fabric has
    /// [`Pair`](super::Pair)s.
    ///
    /// # Panics
    /// If there is no such device.
    pub fn classes(&self, devices: &[usize]) -> Vec<Hop> {
        self.index.classes(devices).into_iter().map(|(class, link)| Hop { class, link }).collect()
    }

    /// What messages between any two of some devices take at most: the farthest class, the highest latency and the
    /// lowest bandwidth. Nothing for fewer than two.
    ///
    /// # Panics
    /// If there is no such device.
    pub fn slowest(&self, devices: &[usize]) -> Option<Hop> {
        let slower = |a: Hop, b: Hop| Hop { class: a.class.max(b.class), link: a.link.slower(b.link) };
        self.classes(devices).into_iter().reduce(slower)
    }

    /// The devices in sets that hang together by this class or nearer ones, each ascending.
    ///
    /// # Panics
    /// If there is no such device.
    pub fn islands(&self, devices: &[usize], class: Class) -> Vec<Vec<usize>> {
        self.index.islands(devices, |c, _| c <= class, |hop| hop.class <= class)
    }

    /// The devices in sets that hang together by links of at least `gbps` GB/s, each ascending.
    ///
    /// # Panics
    /// If there is no such device.
    pub fn islands_of(&self, devices: &[usize], gbps: f64) -> Vec<Vec<usize>> {
        let fast = |class, host| self.index.link(class, host, host).gbps >= gbps;
        self.index.islands(devices, fast, |hop| hop.link.gbps >= gbps)
    }
}
