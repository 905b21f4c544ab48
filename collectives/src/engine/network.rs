//! The network that a group's ranks are on: the same for all of them.

use std::fmt::Write;

use crate::network::{LinkClass, Links, LinksInForce, NetworkInUse, Source};
use crate::schedule::around::Rings;
use crate::schedule::cost::Costs;
use crate::schedule::hierarchy::Hosts;
use crate::select::Algorithm;

#[derive(Clone, Debug)]
pub(crate) struct Network {
    /// What the ranks agreed on when they formed the group.
    agreed: LinksInForce,
    links: LinksInForce,
    changes: u64,
    rules: Rules,
    /// Each rank's host, by a number.
    numbers: Vec<usize>,
    hosts: Hosts,
    costs: Costs,
}

/// What rank 0 has said about how all choose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Rules {
    /// Whether an algorithm may be chosen that doesn't keep the order.
    pub(crate) any_order: bool,
    /// See [`NetworkOptions::adapt_percent`](crate::network::NetworkOptions::adapt_percent).
    pub(crate) adapt_percent: f64,
}

impl Network {
    /// Of ranks on these hosts, by any numbers.
    pub(crate) fn new(numbers: &[usize], links: LinksInForce, rules: Rules) -> Network {
        let hosts = Hosts::new(numbers);
        let costs = Costs::new(&hosts, &links.links);
        Network { agreed: links, links, changes: 0, rules, numbers: numbers.to_vec(), hosts, costs }
    }

    /// What it is, over `transport`, its links `measured` so often.
    pub(crate) fn in_use(&self, transport: &'static str, measured: u64) -> NetworkInUse {
        let (links, changes, any_order) = (self.links, self.changes, self.any_order());
        NetworkInUse { transport, hosts: self.numbers.clone(), links, measured, changes, any_order }
    }

    /// The links by which it chooses.
    pub(crate) fn links(&self) -> &LinksInForce {
        &self.links
    }

    /// What the algorithms cost by them.
    pub(crate) fn costs(&self) -> &Costs {
        &self.costs
    }

    pub(crate) fn adapt_percent(&self) -> f64 {
        self.rules.adapt_percent
    }

    /// The same network, by links of which these classes were measured.
    pub(crate) fn adapted(&self, links: Links, measured: &[LinkClass]) -> Network {
        let source = |class| match measured.contains(&class) {
            true => Source::Adapted,
            false => self.links.source(class),
        };
        let (intra, inter) = (source(LinkClass::Intra), source(LinkClass::Inter));
        Network {
            links: LinksInForce { links, intra, inter },
            changes: self.changes + 1,
            costs: Costs::new(&self.hosts, &links),
            ..self.clone()
        }
    }

    pub(crate) fn world(&self) -> usize {
        self.numbers.len()
    }

    pub(crate) fn hosts(&self) -> &Hosts {
        &self.hosts
    }

    /// What a rank's host is called: the same for ranks that said the same.
    pub(crate) fn host(&self, rank: usize) -> usize {
        self.numbers[rank]
    }

    /// The network of one rank on each of `hosts` hosts.
    pub(crate) fn between(&self, hosts: usize) -> Network {
        Network::new(&(0..hosts).collect::<Vec<_>>(), self.links, self.rules)
    }

    /// Whether an algorithm may be chosen that doesn't keep the order.
    pub(crate) fn any_order(&self) -> bool {
        self.rules.any_order
    }

    /// The network of some of the ranks.
    pub(crate) fn part(&self, ranks: &[usize]) -> Network {
        self.part_by(ranks, self.links)
    }

    /// The network of those that are left, who may have failed before all of them knew of a change.
    pub(crate) fn survivors(&self, ranks: &[usize]) -> Network {
        self.part_by(ranks, self.agreed)
    }

    fn part_by(&self, ranks: &[usize], links: LinksInForce) -> Network {
        let numbers: Vec<usize> = ranks.iter().map(|r| self.numbers[*r]).collect();
        Network::new(&numbers, links, self.rules)
    }

    /// The algorithm for an all-reduce of `bytes`; `keeps_order` says which ones give the bits of the rank order.
    #[inline]
    pub(crate) fn choose(&self, bytes: usize, keeps_order: impl Fn(Algorithm) -> bool) -> Algorithm {
        self.costs.choose(bytes, |a| self.any_order() || keeps_order(a))
    }

    /// Why it chooses as it does, for a person: what each algorithm is expected to take, and by which links.
    pub(crate) fn explain(&self, bytes: usize, keeps_order: impl Fn(Algorithm) -> bool) -> String {
        let mut all: Vec<(Algorithm, f64)> = self.costs.predicted(bytes).collect();
        all.sort_by(|a, b| a.1.total_cmp(&b.1));
        let (allowed, other): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|(a, _)| self.any_order() || keeps_order(*a));
        let list = |all: Vec<(Algorithm, f64)>| {
            let each = all.into_iter().map(|(a, us)| format!("{a} {us:.1} us"));
            each.collect::<Vec<_>>().join(", ")
        };
        let mut text = format!("expected are {}", list(allowed));
        if !other.is_empty() {
            let _ = write!(text, "; were any order allowed, {}", list(other));
        }
        for class in LinkClass::ALL {
            if Rings::new(&self.hosts, class).is_some() {
                let (link, source) = (self.links.links.of(class), self.links.source(class));
                let _ = write!(text, "; {} links {link} ({source})", class.name());
            }
        }
        text
    }

    /// The algorithm for a reduction of `bytes` to one rank, which is a direct exchange.
    pub(crate) fn choose_rooted(&self, bytes: usize) -> Algorithm {
        self.costs.choose(bytes, Algorithm::is_shm)
    }

    /// For the other ranks.
    pub(crate) fn to_text(&self) -> String {
        let LinksInForce { links, intra, inter } = &self.links;
        let Rules { any_order, adapt_percent } = self.rules;
        let any_order = u8::from(any_order);
        let mut text = format!("{} {intra} {} {inter} {any_order} {adapt_percent}", links.intra, links.inter);
        for host in &self.numbers {
            let _ = write!(text, " {host}");
        }
        text
    }

    /// What [`to_text`](Network::to_text) wrote.
    pub(crate) fn from_text(text: &str) -> Option<Network> {
        let mut words = text.split(' ');
        let mut link = || Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?));
        let ((intra, intra_from), (inter, inter_from)) = (link()?, link()?);
        let links = LinksInForce { links: Links { intra, inter }, intra: intra_from, inter: inter_from };
        let any_order = match words.next()? {
            "0" => false,
            "1" => true,
            _ => return None,
        };
        let adapt_percent = words.next()?.parse().ok()?;
        let numbers: Option<Vec<usize>> = words.map(|w| w.parse().ok()).collect();
        Some(Network::new(&numbers?, links, Rules { any_order, adapt_percent }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_reads_what_rank_0_wrote() {
        let links = Links { intra: "1,2,0.1".parse().unwrap(), inter: "33.3,0.125".parse().unwrap() };
        let links = LinksInForce { links, intra: Source::Table, inter: Source::Given };
        let rules = Rules { any_order: true, adapt_percent: 2.5 };
        let network = Network::new(&[0, 0, 2, 0, 2], links, rules);
        let read = Network::from_text(&network.to_text()).unwrap();
        assert_eq!((read.links, read.rules, &read.hosts), (links, rules, &network.hosts));
        for bytes in [0, 1 << 10, 1 << 20, 1 << 30] {
            assert_eq!(read.choose(bytes, |_| false), network.choose(bytes, |_| false));
        }
        let faster = Links { intra: "1,20,0.1".parse().unwrap(), ..links.links };
        let adapted = network.adapted(faster, &[LinkClass::Intra]);
        assert_eq!((adapted.links.links, adapted.links.intra), (faster, Source::Adapted));
        assert_eq!((adapted.links.inter, adapted.changes), (Source::Given, 1));
        assert_eq!(adapted.part(&[0, 1]).links, adapted.links);
        assert_eq!(adapted.survivors(&[0, 1]).links, links);
        let part = network.part(&[4, 1, 2]);
        assert_eq!(part.hosts, Hosts::new(&["b", "a", "b"]));
        for text in [
            "",
            "1,2 given 3,4 given",
            "1,2 given 3,4 given 2 0 0",
            "1,2 x 3,4 table 0 0 0",
            "1 given 3,4 given 0 0 0",
            "1,2 given 3,4 given 0 x 0",
        ] {
            assert!(Network::from_text(text).is_none(), "{text}");
        }
    }
}
