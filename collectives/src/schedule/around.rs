//! Every rank sends to the next one of a ring and receives from the one before it, all at once: what a link is measured by.
//!
//! Of the links on a host, the rings are each host's ranks. Of those between hosts, there is a ring over all hosts for each
//! rank that the smallest host has, so that a host's link carries as many messages at once each way.

use tensorwire_transports::tcp::{Place, Span};

use super::hierarchy::Hosts;
use super::steps::Steps;
use crate::network::LinkClass;

/// The rings over which a class of links is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rings<'a> {
    hosts: &'a Hosts,
    class: LinkClass,
}

impl<'a> Rings<'a> {
    /// `None` if there is no such link.
    pub(crate) fn new(hosts: &'a Hosts, class: LinkClass) -> Option<Rings<'a>> {
        let any = match class {
            LinkClass::Intra => hosts.members().iter().any(|ranks| ranks.len() > 1),
            LinkClass::Inter => hosts.count() > 1,
        };
        any.then_some(Rings { hosts, class })
    }

    /// How many messages a link carries at once each way.
    pub(crate) fn sharing(&self) -> usize {
        match self.class {
            LinkClass::Intra => 1,
            LinkClass::Inter => self.hosts.slices(),
        }
    }

    /// The ranks after and before `rank`, if it is in a ring.
    fn neighbours(&self, rank: usize) -> Option<(usize, usize)> {
        let host = self.hosts.of(rank);
        let here = &self.hosts.members()[host];
        let place = here.iter().position(|r| *r == rank)?;
        let ring: Vec<usize> = match self.class {
            LinkClass::Intra => here.clone(),
            LinkClass::Inter if place < self.hosts.slices() => {
                self.hosts.members().iter().map(|ranks| ranks[place]).collect()
            }
            LinkClass::Inter => return None,
        };
        let at = ring.iter().position(|r| *r == rank)?;
        let count = ring.len();
        (count > 1).then(|| (ring[(at + 1) % count], ring[(at + count - 1) % count]))
    }

    /// `messages` of `bytes` from the input of each rank in a ring to the output of the next one.
    pub(crate) fn exchange(&self, steps: &mut Steps, rank: usize, bytes: usize, messages: usize) {
        steps.begin(0);
        let Some((next, before)) = self.neighbours(rank) else { return };
        for _ in 0..messages {
            steps.send(next, Span::new(Place::Input, 0..bytes));
        }
        for _ in 0..messages {
            steps.receive(before, Span::new(Place::Output, 0..bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_lead_around_hosts_and_between_them() {
        let hosts = Hosts::new(b"aabbbc");
        let of = |class| {
            let rings = Rings::new(&hosts, class).unwrap();
            (0..6).map(|rank| rings.neighbours(rank)).collect::<Vec<_>>()
        };
        let intra = [Some((1, 1)), Some((0, 0)), Some((3, 4)), Some((4, 2)), Some((2, 3)), None];
        assert_eq!(of(LinkClass::Intra), intra);
        let inter = [Some((2, 5)), None, Some((5, 0)), None, None, Some((0, 2))];
        assert_eq!(of(LinkClass::Inter), inter);
        assert_eq!(Rings::new(&Hosts::new(b"abab"), LinkClass::Inter).unwrap().sharing(), 2);
        assert!(Rings::new(&Hosts::new(b"abc"), LinkClass::Intra).is_none());
        assert!(Rings::new(&Hosts::new(b"aaa"), LinkClass::Inter).is_none());
    }
}
