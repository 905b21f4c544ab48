//! The network that a group's ranks are on: the same for all of them.

use std::fmt::Write;

use crate::network::{Links, NetworkOptions};
use crate::schedule::cost::Costs;
use crate::schedule::hierarchy::Hosts;
use crate::select::Algorithm;

#[derive(Clone, Debug)]
pub(crate) struct Network {
    links: Links,
    any_order: bool,
    /// Each rank's host, by a number.
    numbers: Vec<usize>,
    hosts: Hosts,
    costs: Costs,
}

impl Network {
    /// Of ranks on these hosts, by any numbers.
    pub(crate) fn new(numbers: &[usize], options: &NetworkOptions) -> Network {
        let hosts = Hosts::new(numbers);
        let costs = Costs::new(&hosts, &options.links);
        Network {
            links: options.links,
            any_order: options.any_order,
            numbers: numbers.to_vec(),
            hosts,
            costs,
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
        let options = NetworkOptions { links: self.links, any_order: self.any_order, host: None };
        Network::new(&(0..hosts).collect::<Vec<_>>(), &options)
    }

    /// Whether an algorithm may be chosen that doesn't keep the order.
    pub(crate) fn any_order(&self) -> bool {
        self.any_order
    }

    /// The network of some of the ranks.
    pub(crate) fn part(&self, ranks: &[usize]) -> Network {
        let numbers: Vec<usize> = ranks.iter().map(|r| self.numbers[*r]).collect();
        let options = NetworkOptions { links: self.links, any_order: self.any_order, host: None };
        Network::new(&numbers, &options)
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
        let mut text = format!("{} {} {}", self.links.intra, self.links.inter, u8::from(self.any_order));
        for host in &self.numbers {
            let _ = write!(text, " {host}");
        }
        text
    }

    /// What [`to_text`](Network::to_text) wrote.
    pub(crate) fn from_text(text: &str) -> Option<Network> {
        let mut words = text.split(' ');
        let links = Links { intra: words.next()?.parse().ok()?, inter: words.next()?.parse().ok()? };
        let any_order = match words.next()? {
            "0" => false,
            "1" => true,
            _ => return None,
        };
        let numbers: Option<Vec<usize>> = words.map(|w| w.parse().ok()).collect();
        Some(Network::new(&numbers?, &NetworkOptions { links, any_order, host: None }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_reads_what_rank_0_wrote() {
        let links = Links { intra: "1,2,0.1".parse().unwrap(), inter: "33.3,0.125".parse().unwrap() };
        let options = NetworkOptions { links, any_order: true, host: Some("unused".into()) };
        let network = Network::new(&[0, 0, 2, 0, 2], &options);
        let read = Network::from_text(&network.to_text()).unwrap();
        assert_eq!((read.links, read.any_order, &read.hosts), (links, true, &network.hosts));
        for bytes in [0, 1 << 10, 1 << 20, 1 << 30] {
            assert_eq!(read.choose(bytes, |_| false), network.choose(bytes, |_| false));
        }
        let part = network.part(&[4, 1, 2]);
        assert_eq!(part.hosts, Hosts::new(&["b", "a", "b"]));
        for text in ["", "1,2 3,4", "1,2 3,4 2 0", "1,2 3,4 0 x", "1 3,4 0 0"] {
            assert!(Network::from_text(text).is_none(), "{text}");
        }
    }
}
