//! What messages between ranks cost, which ranks share a host, and what may be done about it.

use std::fmt;
use std::str::FromStr;

use tensorwire_core::{Error, Result};
use tensorwire_topology::table::{Measured, Network, Table};

pub use crate::schedule::timed::{Prediction, Simulation};
pub use tensorwire_core::Link;

/// A class of links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum LinkClass {
    /// Between ranks of one host.
    Intra = 0,
    /// Between ranks of different hosts.
    Inter = 1,
}

impl LinkClass {
    /// Both.
    pub const ALL: [LinkClass; 2] = [LinkClass::Intra, LinkClass::Inter];

    /// Its name in reports, such as `intra`.
    pub const fn name(self) -> &'static str {
        match self {
            LinkClass::Intra => "intra",
            LinkClass::Inter => "inter",
        }
    }
}

/// What it took to use all links of a class at once: see
/// [`Communicator::measure_link`](crate::Communicator::measure_link).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exchange {
    /// Microseconds, on the rank where it took longest.
    pub us: f64,
    /// Bytes that a link carried each way.
    pub bytes: usize,
}

/// The links of a network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Links {
    /// Between ranks of one host.
    pub intra: Link,
    /// Between ranks of different hosts.
    pub inter: Link,
}

impl Links {
    /// The links of a class.
    pub fn of(&self, class: LinkClass) -> &Link {
        match class {
            LinkClass::Intra => &self.intra,
            LinkClass::Inter => &self.inter,
        }
    }
}

impl Default for Links {
    /// TCP over loopback as measured on two cores of an EPYC, and over a 10 Gbit/s Ethernet.
    fn default() -> Links {
        Links {
            intra: Link { alpha_us: 12.0, gbps: 2.5, overhead_us: 2.0 },
            inter: Link { alpha_us: 30.0, gbps: 1.2, overhead_us: 2.0 },
        }
    }
}

/// Where what is known of a link is from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// Constants: nothing is known of it.
    #[default]
    BuiltIn,
    /// The table that `tensorwire topo --probe` made on rank 0's machine.
    Table,
    /// It was given to rank 0, in its options or its environment.
    Given,
    /// It was measured while the group ran: see [`NetworkOptions::adapt_percent`].
    Adapted,
}

impl Source {
    const ALL: [Source; 4] = [Source::BuiltIn, Source::Table, Source::Given, Source::Adapted];

    /// Its name in reports, such as `built_in`.
    pub const fn name(self) -> &'static str {
        match self {
            Source::BuiltIn => "built_in",
            Source::Table => "table",
            Source::Given => "given",
            Source::Adapted => "adapted",
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Source {
    type Err = Error;

    fn from_str(text: &str) -> Result<Source> {
        let known = Source::ALL.into_iter().find(|source| source.name() == text);
        known.ok_or_else(|| Error::InvalidArgument(format!("'{text}' is no source of links")))
    }
}

/// The links by which a group's all-reduces are chosen, the same on every rank, and where they are from.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LinksInForce {
    /// What messages cost.
    pub links: Links,
    /// Where [`Links::intra`] is from.
    pub intra: Source,
    /// Where [`Links::inter`] is from.
    pub inter: Source,
}

impl LinksInForce {
    /// Where a class of links is from.
    pub fn source(&self, class: LinkClass) -> Source {
        match class {
            LinkClass::Intra => self.intra,
            LinkClass::Inter => self.inter,
        }
    }

    /// Of a rank 0 with these options, over `transport`, such as `tcp`.
    pub fn new(options: &NetworkOptions, transport: &str) -> LinksInForce {
        let given = options.intra.is_some() && options.inter.is_some();
        let table = if given { None } else { Table::links_in_force(transport) };
        let of = |given: Option<Link>, measured: Option<Link>, built_in: Link| match (given, measured) {
            (Some(link), _) => (link, Source::Given),
            (None, Some(link)) => (link, Source::Table),
            (None, None) => (built_in, Source::BuiltIn),
        };
        let built_in = Links::default();
        let measured = |of: fn(&Network) -> Option<Measured>| Some(of(table.as_ref()?)?.link);
        let intra = of(options.intra, measured(|n| n.intra), built_in.intra);
        let inter = of(options.inter, measured(|n| n.inter), built_in.inter);
        LinksInForce { links: Links { intra: intra.0, inter: inter.0 }, intra: intra.1, inter: inter.1 }
    }
}

/// The network that a group is on, the same on every rank: see [`Communicator::network`](crate::Communicator::network).
#[derive(Clone, Debug, PartialEq)]
pub struct NetworkInUse {
    /// What carries the data: `tcp` or `tls`.
    pub transport: &'static str,
    /// Each rank's host, by a number: ranks with the same one are on one host.
    pub hosts: Vec<usize>,
    /// The links by which all-reduces are chosen.
    pub links: LinksInForce,
    /// How often they have been measured since the group was formed, or an algorithm was set last.
    pub measured: u64,
    /// How often they have changed.
    pub changes: u64,
    /// Whether they may be done in any order: see [`NetworkOptions::any_order`].
    pub any_order: bool,
}

/// What can be set about how collectives use a network.
///
/// Rank 0's links, `any_order` and `adapt_percent` hold for all ranks, so that all choose alike.
#[derive(Clone, Debug, PartialEq)]
pub struct NetworkOptions {
    /// The link between ranks of one host, by which all-reduces are chosen; `TENSORWIRE_INTRA`, as [`Link`] reads it.
    /// Without it, what `tensorwire topo --probe --transport tcp` measured on this machine, or a constant.
    pub intra: Option<Link>,
    /// The link between ranks of different hosts, likewise; `TENSORWIRE_INTER`.
    pub inter: Option<Link>,
    /// Whether an all-reduce of floating-point sums may be chosen that reduces in another order than the ranks', where
    /// that is faster: see [`Algorithm::keeps_order`](crate::Algorithm::keeps_order). `TENSORWIRE_ANY_ORDER`, 1 or 0.
    pub any_order: bool,
    /// How much of the time of all-reduces may go into measuring the links again while the group runs, from 0, never, to 50:
    /// where they have become slower or faster, the ranks change their choice, all at the same call. Links that are given
    /// are never measured. `TENSORWIRE_ADAPT`; without it, 1.
    ///
    /// Without `any_order` it changes no result. With it, sums of floating-point numbers may differ from run to run in how
    /// they are rounded, since times do: 0 keeps to one choice, which follows from the links that the group begins with.
    pub adapt_percent: f64,
    /// What this rank calls its host: ranks that say the same count as on one. Without it, the number that the kernel got
    /// when it started. `TENSORWIRE_HOST`.
    pub host: Option<String>,
}

impl Default for NetworkOptions {
    fn default() -> NetworkOptions {
        NetworkOptions { intra: None, inter: None, any_order: false, adapt_percent: 1.0, host: None }
    }
}

impl NetworkOptions {
    /// The defaults, with what the environment sets.
    ///
    /// # Errors
    /// [`Error::Config`] names the variable and what is wrong with it.
    pub fn from_env() -> Result<NetworkOptions> {
        NetworkOptions::from_lookup(|name| std::env::var(name).ok().filter(|v| !v.is_empty()))
    }

    fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<NetworkOptions> {
        let link = |name: &str| {
            let read = |text: String| text.parse().map_err(|e: Error| Error::Config(format!("{name}: {e}")));
            lookup(name).map(read).transpose()
        };
        let (intra, inter) = (link("TENSORWIRE_INTRA")?, link("TENSORWIRE_INTER")?);
        let any_order = match lookup("TENSORWIRE_ANY_ORDER").as_deref() {
            None | Some("0") => false,
            Some("1") => true,
            Some(other) => {
                return Err(Error::Config(format!("TENSORWIRE_ANY_ORDER is '{other}': give 1 or 0")));
            }
        };
        let adapt_percent = match lookup("TENSORWIRE_ADAPT") {
            None => NetworkOptions::default().adapt_percent,
            Some(text) => text.parse().map_err(|_| {
                Error::Config(format!("TENSORWIRE_ADAPT is '{text}': give a percentage from 0 to 50"))
            })?,
        };
        let options =
            NetworkOptions { intra, inter, any_order, adapt_percent, host: lookup("TENSORWIRE_HOST") };
        options.check().map(|()| options)
    }

    /// # Errors
    /// [`Error::Config`] for a number that can't be used.
    pub(crate) fn check(&self) -> Result<()> {
        let adapt = self.adapt_percent;
        if let Some(link) = [self.intra, self.inter].into_iter().flatten().find(|link| !link.is_sound()) {
            return Err(Error::Config(format!("{link} is no link: give times from 0 up, and GB/s")));
        }
        match (0.0..=50.0).contains(&adapt) {
            true => Ok(()),
            false => {
                Err(Error::Config(format!("TENSORWIRE_ADAPT is {adapt}: give a percentage from 0 to 50")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_come_from_the_environment_or_say_why_not() {
        let set = |name: &'static str, value: &'static str| {
            NetworkOptions::from_lookup(move |n| (n == name).then(|| value.to_owned()))
        };
        assert_eq!(set("", "").unwrap(), NetworkOptions::default());
        assert!(set("TENSORWIRE_ANY_ORDER", "1").unwrap().any_order);
        assert_eq!(set("TENSORWIRE_HOST", "a").unwrap().host.as_deref(), Some("a"));
        assert_eq!(set("TENSORWIRE_INTER", "50,0.1").unwrap().inter.unwrap().gbps, 0.1);
        assert_eq!(set("TENSORWIRE_ADAPT", "0").unwrap().adapt_percent, 0.0);
        for (name, value) in [
            ("TENSORWIRE_ANY_ORDER", "yes"),
            ("TENSORWIRE_INTRA", "fast"),
            ("TENSORWIRE_ADAPT", "no"),
            ("TENSORWIRE_ADAPT", "NaN"),
            ("TENSORWIRE_ADAPT", "51"),
            ("TENSORWIRE_ADAPT", "-1"),
        ] {
            assert!(set(name, value).unwrap_err().to_string().contains(name), "{name}");
        }
    }
}
