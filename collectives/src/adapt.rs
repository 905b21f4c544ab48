//! When links are measured again while a group runs, and when the choice of algorithms follows them.
//!
//! Every rank keeps the same account: what its all-reduces are expected to take by the links in force. When that has come
//! to a hundred times what measuring is expected to take (at 1 %), the ranks measure, at the end of that call, and agree
//! on the slowest rank's times. From those, each computes the same links and, with the sizes that were reduced since,
//! what other algorithms would gain. Everything that decides is the same on every rank: the calls, the links, the agreed
//! times; clocks are not, and nothing here is given one. There is no function here whose result differs between machines.
//!
//! Links are taken over if by them the calls made since would take a sixth less with what would be chosen then, and if the
//! next measurement, which comes soon, says so too: what happens once, and differences within noise, change nothing.

use std::ops::RangeInclusive;

use tensorwire_core::Link;

use crate::network::{LinkClass, Links, LinksInForce, Source};
use crate::schedule::around::Rings;
use crate::schedule::cost::Costs;
use crate::schedule::hierarchy::Hosts;
use crate::select::Algorithm;

/// How many times longer what is chosen must take than what would be, for links to be taken over.
const WORTH: f64 = 1.2;

/// How much of a small message's time noise can add to a large one, or hide of it: a tenth of each, and some.
const HIDDEN: f64 = 0.25;

/// How much sooner links are measured again where others promise a gain.
const SOON: f64 = 8.0;

/// Messages of few bytes, in turn, of which the first makes the connection, and of many.
pub(crate) const SMALL: usize = 8;
pub(crate) const SMALL_TIMES: usize = 6;
pub(crate) const LARGE_TIMES: usize = 3;

/// The bytes of a large message: those that a rank sends at most in the largest all-reduce, within these limits. In fewer, a
/// bandwidth that makes a difference there couldn't be told from noise.
const LARGE: RangeInclusive<usize> = 16 << 10..=256 << 10;

/// What a link was seen to take, in microseconds on the slowest rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Seen {
    /// A message of few bytes each way.
    pub(crate) small_us: f64,
    /// Messages of so many bytes together each way.
    pub(crate) large_us: f64,
    pub(crate) bytes: usize,
}

impl Seen {
    /// The link, of which `known` says what keeps a processor busy.
    fn link(&self, known: &Link) -> Link {
        let small_us = self.small_us.max(1e-3);
        let overhead_us = known.overhead_us.min(small_us / 4.0);
        // Where the bytes make no difference that noise couldn't make, it is what was known, as far as that is hidden too.
        let (seen_us, hidden_us) = (self.large_us - small_us, small_us * HIDDEN);
        let bytes = self.bytes.max(1) as f64;
        let bytes_us = if seen_us > hidden_us { seen_us } else { (known.us_a_byte() * bytes).min(hidden_us) };
        let us_a_byte = bytes_us.max(1e-3 * small_us) / bytes;
        Link {
            alpha_us: (small_us - 2.0 * overhead_us).min(1e9),
            gbps: (1e-3 / us_a_byte).clamp(1e-6, 1e6),
            overhead_us,
        }
    }
}

/// What a network's choices are made by: where all ranks take part, or one of each host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    Ranks,
    Hosts,
}

/// The costs at both levels; where ranks share no memory there is no choice at the second.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Levels<'a> {
    pub(crate) ranks: &'a Costs,
    pub(crate) hosts: Option<&'a Costs>,
}

impl<'a> Levels<'a> {
    pub(crate) fn of(&self, level: Level) -> &'a Costs {
        match level {
            Level::Ranks => self.ranks,
            Level::Hosts => self.hosts.unwrap_or(self.ranks),
        }
    }
}

/// Algorithms, as bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Allowed(u16);

impl Allowed {
    pub(crate) fn new(allowed: impl Fn(Algorithm) -> bool) -> Allowed {
        Allowed(Algorithm::ALL.iter().filter(|a| allowed(**a)).fold(0, |bits, a| bits | 1 << *a as u16))
    }

    fn has(self, algorithm: Algorithm) -> bool {
        self.0 >> algorithm as u16 & 1 == 1
    }
}

/// All-reduces of about a size, of which one stands for all.
#[derive(Clone, Copy, Debug)]
struct Used {
    level: Level,
    bytes: usize,
    allowed: Allowed,
    calls: u32,
}

/// The account of one group: the same on every rank.
#[derive(Clone, Debug)]
pub(crate) struct Adaptation {
    /// Of the time of all-reduces, what measuring may take; none where links are never measured.
    share: f64,
    /// What they are expected to have taken since the links were measured, and when they are again; microseconds.
    spent_us: f64,
    due_us: Option<f64>,
    used: Vec<Used>,
    /// Whether the last measurement promised a gain.
    promised: bool,
    measured: u64,
}

impl Adaptation {
    /// `percent` of the time of all-reduces is for measuring.
    pub(crate) fn new(percent: f64) -> Adaptation {
        let share = percent / 100.0;
        Adaptation { share, spent_us: 0.0, due_us: None, used: Vec::new(), promised: false, measured: 0 }
    }

    /// How often links were measured.
    pub(crate) fn measured(&self) -> u64 {
        self.measured
    }

    /// Whether links are ever measured.
    pub(crate) fn is_on(&self) -> bool {
        self.share > 0.0
    }

    /// Whether [`begin`](Adaptation::begin) was called.
    pub(crate) fn has_begun(&self) -> bool {
        self.due_us.is_some()
    }

    /// Notes an all-reduce that was chosen by the links, and that they expect to take `us`.
    pub(crate) fn note(&mut self, level: Level, bytes: usize, allowed: Allowed, us: f64) {
        self.spent_us += us;
        let class = |bytes: usize| bytes.max(1).ilog2();
        let alike =
            |u: &&mut Used| u.level == level && u.allowed == allowed && class(u.bytes) == class(bytes);
        match self.used.iter_mut().find(alike) {
            Some(used) => used.calls = used.calls.saturating_add(1),
            None => self.used.push(Used { level, bytes, allowed, calls: 1 }),
        }
    }

    /// Whether the links are to be measured now.
    #[inline]
    pub(crate) fn is_due(&self) -> bool {
        self.due_us.is_some_and(|due| self.spent_us > due)
    }

    /// Bytes of the large messages by which `world` ranks do.
    pub(crate) fn large(&self, world: usize) -> usize {
        let largest = self.used.iter().map(|u| u.bytes).max().unwrap_or(0);
        largest.saturating_mul(world - 1).clamp(*LARGE.start(), *LARGE.end())
    }

    /// Begins to account anew, where measuring is expected to take `us`.
    pub(crate) fn begin(&mut self, us: f64) {
        let soon = if self.promised { SOON } else { 1.0 };
        (self.spent_us, self.due_us) = (0.0, Some(us / self.share / soon));
        self.used.clear();
    }

    /// Whether links that were measured are to be taken over: by the costs in force, and by those that follow from them.
    pub(crate) fn decide(&mut self, in_force: Levels<'_>, measured: Levels<'_>) -> bool {
        self.measured += 1;
        let confirms = self.promised;
        let promises = self.gain(in_force, measured) >= WORTH;
        self.promised = promises && !confirms;
        promises && confirms
    }

    /// By how many times the calls since the last measurement would be faster, by the measured costs, with what those choose.
    fn gain(&self, in_force: Levels<'_>, measured: Levels<'_>) -> f64 {
        let (mut now, mut then) = (0.0, 0.0);
        for u in &self.used {
            let costs = measured.of(u.level);
            let us = |by: Levels<'_>| {
                let chosen = by.of(u.level).choose(u.bytes, |a| u.allowed.has(a));
                costs.us(chosen, u.bytes) * f64::from(u.calls)
            };
            now += us(in_force);
            then += us(measured);
        }
        if then > 0.0 { now / then } else { 1.0 }
    }
}

/// What the classes of links in `classes` are measured to be; the others stay as they are.
pub(crate) fn links(known: &Links, seen: &[(LinkClass, Seen)]) -> Links {
    let mut links = *known;
    for (class, seen) in seen {
        match class {
            LinkClass::Intra => links.intra = seen.link(&known.intra),
            LinkClass::Inter => links.inter = seen.link(&known.inter),
        }
    }
    links
}

/// The classes of links between `hosts` that are measured: not those that were given. Where ranks `share` memory, those
/// between hosts alone.
pub(crate) fn classes(hosts: &Hosts, links: &LinksInForce, share: bool) -> Vec<LinkClass> {
    let is_measured = |class: &LinkClass| {
        Rings::new(hosts, *class).is_some()
            && links.source(*class) != Source::Given
            && !(share && *class == LinkClass::Intra)
    };
    LinkClass::ALL.into_iter().filter(is_measured).collect()
}

/// What measuring these classes takes, by the links in force, in microseconds; `agreeing_us` is what it takes to agree.
pub(crate) fn measuring_us(
    hosts: &Hosts,
    links: &Links,
    classes: &[LinkClass],
    large: usize,
    agreeing_us: f64,
) -> f64 {
    let of = |class: &LinkClass| {
        let link = links.of(*class);
        let bytes = Rings::new(hosts, *class).map_or(0, |rings| rings.sharing() * large);
        let each = link.alpha_us + 2.0 * link.overhead_us;
        each * (SMALL_TIMES + LARGE_TIMES) as f64 + LARGE_TIMES as f64 * bytes as f64 * link.us_a_byte()
    };
    agreeing_us + classes.iter().map(of).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;
    use tensorwire_core::{DType, ReduceOp};

    /// One rank's view of a run: all have the same.
    #[derive(Clone, Debug)]
    struct Run {
        hosts: Hosts,
        links: Links,
        account: Adaptation,
        calls: usize,
        measured: usize,
        changes: usize,
    }

    impl Run {
        fn new(names: &[u8], links: Links) -> Run {
            let (hosts, account) = (Hosts::new(names), Adaptation::new(1.0));
            let mut run = Run { hosts, links, account, calls: 0, measured: 0, changes: 0 };
            run.begin();
            run
        }

        fn costs(&self, links: &Links) -> Costs {
            Costs::new(&self.hosts, links)
        }

        fn classes(&self) -> Vec<LinkClass> {
            classes(&self.hosts, &LinksInForce::default(), false)
        }

        fn begin(&mut self) {
            let agreeing = self.links.inter.alpha_us;
            let large = self.account.large(self.hosts.world());
            self.account.begin(measuring_us(&self.hosts, &self.links, &self.classes(), large, agreeing));
        }

        /// Calls of `bytes` until links that are `truth` were measured, each time times a factor of `noise`.
        fn until_measured(
            &mut self,
            bytes: usize,
            allowed: Allowed,
            truth: &Links,
            noise: &mut dyn FnMut() -> f64,
        ) {
            let costs = self.costs(&self.links);
            let us = costs.us(costs.choose(bytes, |a| allowed.has(a)), bytes);
            while !self.account.is_due() {
                self.account.note(Level::Ranks, bytes, allowed, us);
                self.calls += 1;
            }
            let large = self.account.large(self.hosts.world());
            let seen = |class: LinkClass| {
                let (link, carried) =
                    (truth.of(class), Rings::new(&self.hosts, class).unwrap().sharing() * large);
                let small_us = (link.alpha_us + 2.0 * link.overhead_us) * noise();
                let large_us =
                    (link.alpha_us + 2.0 * link.overhead_us + carried as f64 * link.us_a_byte()) * noise();
                (class, Seen { small_us, large_us, bytes: carried })
            };
            let seen: Vec<_> = self.classes().into_iter().map(seen).collect();
            let links = super::links(&self.links, &seen);
            let new = self.costs(&links);
            let levels = |ranks| Levels { ranks, hosts: None };
            if self.account.decide(levels(&costs), levels(&new)) {
                (self.links, self.changes) = (links, self.changes + 1);
            }
            self.measured += 1;
            self.begin();
        }

        /// How many times longer the choice takes than the best one.
        fn regret(&self, bytes: usize, allowed: Allowed, truth: &Links) -> f64 {
            let truth = self.costs(truth);
            let us = |by: &Costs| truth.us(by.choose(bytes, |a| allowed.has(a)), bytes);
            us(&self.costs(&self.links)) / us(&truth)
        }
    }

    fn exactly() -> f64 {
        1.0
    }

    fn slower(link: Link, latency: f64, bandwidth: f64) -> Link {
        Link { alpha_us: link.alpha_us * latency, gbps: link.gbps / bandwidth, ..link }
    }

    fn allowed() -> impl Strategy<Value = Allowed> {
        any::<bool>().prop_map(|any| Allowed::new(|a| any || a.keeps_order(DType::F32, ReduceOp::Sum)))
    }

    fn names() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(0u8..4, 2..16)
    }

    proptest! {
        /// Links become ten times slower, or faster again: two measurements later the choice is right for what they are
        /// now. How many calls that is at most doesn't depend on how slow they are.
        #[test]
        fn ten_times_slower_links_change_the_choice_within_two_measurements(
            names in names(),
            allowed in allowed(),
            bytes in prop_oneof![1usize..65536, 1usize..64 << 20],
            latency in prop_oneof![Just(1.0), Just(10.0)],
            bandwidth in prop_oneof![Just(1.0), Just(10.0)],
            before in 0usize..3,
        ) {
            let healthy = Links::default();
            let slow = Links {
                intra: slower(healthy.intra, latency, bandwidth),
                inter: slower(healthy.inter, latency, bandwidth),
            };
            let mut run = Run::new(&names, healthy);
            for _ in 0..before {
                run.until_measured(bytes, allowed, &healthy, &mut exactly);
            }
            prop_assert_eq!(run.changes, 0);
            for (truth, changes) in [(&slow, 1), (&healthy, 2)] {
                let calls = run.calls;
                run.until_measured(bytes, allowed, truth, &mut exactly);
                run.until_measured(bytes, allowed, truth, &mut exactly);
                prop_assert!(run.changes <= changes);
                prop_assert!(run.regret(bytes, allowed, truth) < WORTH, "{run:?}");
                prop_assert!(run.calls - calls <= 4100, "{} calls", run.calls - calls);
            }
        }

        /// What is measured is off by up to 10 %, wherever the crossing is: at most two changes, to a choice that is no
        /// worse than what noise hides.
        #[test]
        fn noise_around_a_crossing_is_no_reason_to_change(
            names in names(),
            allowed in allowed(),
            bytes in prop_oneof![1usize..65536, 1usize..64 << 20],
            latency in 0.1f64..10.0,
            bandwidth in 0.1f64..10.0,
            noise in proptest::collection::vec(0.9f64..1.1, 64),
        ) {
            let healthy = Links::default();
            let truth = Links {
                intra: slower(healthy.intra, latency, bandwidth),
                inter: slower(healthy.inter, latency, bandwidth),
            };
            let mut run = Run::new(&names, healthy);
            let mut noise = noise.iter().cycle();
            for _ in 0..101 {
                run.until_measured(bytes, allowed, &truth, &mut || *noise.next().unwrap());
            }
            prop_assert!(run.changes <= 2, "{} changes", run.changes);
            prop_assert!(run.regret(bytes, allowed, &truth) < 1.6, "{run:?}");
        }

        /// Whatever single measurements say: one after the other have to, for a change. And the same measurements are the
        /// same change everywhere.
        #[test]
        fn what_happens_once_changes_nothing(
            names in names(),
            allowed in allowed(),
            bytes in 1usize..1 << 20,
            odd in proptest::collection::vec(prop_oneof![0.01f64..1.0, 1f64..1000.0], 4),
        ) {
            let healthy = Links::default();
            let mut run = Run::new(&names, healthy);
            let mut other = run.clone();
            for i in 0..12 {
                let mut odd = odd.iter().cycle();
                let mut noise = || if i % 3 == 1 { *odd.next().unwrap() } else { 1.0 };
                run.until_measured(bytes, allowed, &healthy, &mut noise);
            }
            prop_assert_eq!((run.changes, run.links), (0, healthy));
            for i in 0..12 {
                let mut odd = odd.iter().cycle();
                let mut noise = || if i % 3 == 1 { *odd.next().unwrap() } else { 1.0 };
                other.until_measured(bytes, allowed, &healthy, &mut noise);
            }
            prop_assert_eq!(format!("{run:?}"), format!("{other:?}"));
        }
    }

    #[test]
    fn what_was_given_is_not_measured() {
        let hosts = Hosts::new(b"aabb");
        let of = |intra, inter, share| {
            classes(&hosts, &LinksInForce { intra, inter, ..Default::default() }, share)
        };
        use LinkClass::{Inter, Intra};
        use Source::{Adapted, BuiltIn, Given, Table};
        assert_eq!(of(BuiltIn, Table, false), [Intra, Inter]);
        assert_eq!(of(Given, Adapted, false), [Inter]);
        assert_eq!(of(BuiltIn, Table, true), [Inter], "memory is no link");
        assert_eq!(of(BuiltIn, Given, true), []);
        assert_eq!(classes(&Hosts::new(b"ab"), &LinksInForce::default(), false), [Inter]);
    }

    #[test]
    fn a_link_is_sound_whatever_was_seen() {
        let known = Links::default().intra;
        for (small_us, large_us) in [(0.0, 0.0), (10.0, 5.0), (1e12, 1e15), (14.0, 120.0)] {
            let link = Seen { small_us, large_us, bytes: 1 << 18 }.link(&known);
            assert!(link.is_sound(), "{link} from {small_us}, {large_us}");
        }
        let link = Seen { small_us: 16.0, large_us: 16.0 + 104.8576, bytes: 1 << 18 }.link(&known);
        assert!((link.alpha_us - 12.0).abs() < 1e-9 && (link.gbps - 2.5).abs() < 1e-9, "{link}");
    }
}
