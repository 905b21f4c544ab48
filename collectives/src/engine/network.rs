//! The network that a group's ranks are on: the same for all of them.

use std::fmt::Write;

use crate::network::{Links, LinksInForce, NetworkInUse};
use crate::schedule::cost::Costs;
use crate::schedule::hierarchy::Hosts;
use crate::select::Algorithm;

#[derive(Clone, Debug)]
pub(crate) struct Network {
    links: LinksInForce,
    any_order: bool,
    /// Each rank's host, by a number.
    numbers: Vec<usize>,
    hosts: Hosts,
    costs: Costs,
}

impl Network {
    /// Of ranks on these hosts, by any numbers.
    pub(crate) fn new(numbers: &[usize], links: LinksInForce, any_order: bool) -> Network {
        let hosts = Hosts::new(numbers);
        let costs = Costs::new(&hosts, &links.links);
        Network { links, any_order, numbers: numbers.to_vec(), hosts, costs }
    }

    /// What it is, over `transport`.
    pub(crate) fn in_use(&self, transport: &'static str) -> NetworkInUse {
        let (hosts, links, any_order) = (self.numbers.clone(), self.links, self.any_order);
        NetworkInUse { transport, hosts, links, any_order }
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
        Network::new(&(0..hosts).collect::<Vec<_>>(), self.links, self.any_order)
    }

    /// Whether an algorithm may be chosen that doesn't keep the order.
    pub(crate) fn any_order(&self) -> bool {
        self.any_order
    }

    /// The network of some of the ranks.
    pub(crate) fn part(&self, ranks: &[usize]) -> Network {
        let numbers: Vec<usize> = ranks.iter().map(|r| self.numbers[*r]).collect();
        Network::new(&numbers, self.links, self.any_order)
    }

    /// The algorithm for an all-reduce of `bytes`; `keeps_order` says which ones give the bits of the rank order.
    #[inline]
    pub(crate) fn choose(&self, bytes: usize, keeps_order: impl Fn(Algorithm) -> bool) -> Algorithm {
        self.costs.choose(bytes, |a| self.any_order || keeps_order(a))
    }

    /// The algorithm for a reduction of `bytes` to one rank, which is a direct exchange.
    pub(crate) fn choose_rooted(&self, bytes: usize) -> Algorithm {
        self.costs.choose(bytes, Algorithm::is_shm)
    }

    /// For the other ranks.
    pub(crate) fn to_text(&self) -> String {
        let LinksInForce { links, intra, inter } = &self.links;
        let any_order = u8::from(self.any_order);
        let mut text = format!("{} {intra} {} {inter} {any_order}", links.intra, links.inter);
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
        let numbers: Option<Vec<usize>> = words.map(|w| w.parse().ok()).collect();
        Some(Network::new(&numbers?, links, any_order))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::Source;

    #[test]
    fn every_rank_reads_what_rank_0_wrote() {
        let links = Links { intra: "1,2,0.1".parse().unwrap(), inter: "33.3,0.125".parse().unwrap() };
        let links = LinksInForce { links, intra: Source::Table, inter: Source::Given };
        let network = Network::new(&[0, 0, 2, 0, 2], links, true);
        let read = Network::from_text(&network.to_text()).unwrap();
        assert_eq!((read.links, read.any_order, &read.hosts), (links, true, &network.hosts));
        for bytes in [0, 1 << 10, 1 << 20, 1 << 30] {
            assert_eq!(read.choose(bytes, |_| false), network.choose(bytes, |_| false));
        }
        let part = network.part(&[4, 1, 2]);
        assert_eq!(part.hosts, Hosts::new(&["b", "a", "b"]));
        for text in
            ["", "1,2 given 3,4 given", "1,2 given 3,4 2 0", "1,2 x 3,4 table 0 0", "1 given 3,4 given 0 0"]
        {
            assert!(Network::from_text(text).is_none(), "{text}");
        }
    }
}
