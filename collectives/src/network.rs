//! What messages between ranks cost, which ranks share a host, and what may be done about it.

use std::fmt;
use std::str::FromStr;

use tensorwire_core::{Error, Result};

pub use crate::schedule::timed::{Prediction, Simulation};

/// What a message from one rank to another costs: the LogGP model of Alexandrov, Ionescu, Schauser and Scheiman, 1995.
///
/// It keeps its sender and its receiver busy for `overhead_us` each, and arrives `alpha_us` and its bytes over
/// `gbps` after it was sent, where what it shares a link with takes its turn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// The time that a message of no bytes takes, in microseconds.
    pub alpha_us: f64,
    /// Bytes that the link carries each way, in GB/s (1e9 bytes a second): inside a host for each rank; between hosts for
    /// each host, whose ranks share it.
    pub gbps: f64,
    /// Time of a processor for each message sent or received, in microseconds.
    pub overhead_us: f64,
}

impl Link {
    pub(crate) fn us_a_byte(&self) -> f64 {
        1e-3 / self.gbps
    }
}

impl FromStr for Link {
    type Err = Error;

    /// Reads `ALPHA_US,GBPS`, such as `20,1.25`, or `ALPHA_US,GBPS,OVERHEAD_US`; without it, the overhead is an eighth of
    /// the latency.
    fn from_str(text: &str) -> Result<Link> {
        let numbers: Option<Vec<f64>> = text.split(',').map(|n| n.trim().parse().ok()).collect();
        let link = match numbers.as_deref() {
            Some([alpha_us, gbps]) => Link { alpha_us: *alpha_us, gbps: *gbps, overhead_us: alpha_us / 8.0 },
            Some([alpha_us, gbps, overhead_us]) => {
                Link { alpha_us: *alpha_us, gbps: *gbps, overhead_us: *overhead_us }
            }
            _ => Link { alpha_us: -1.0, gbps: 0.0, overhead_us: 0.0 },
        };
        let time = 0.0..=1e9;
        let sound = time.contains(&link.alpha_us) && time.contains(&link.overhead_us);
        if sound && (1e-6..=1e6).contains(&link.gbps) {
            return Ok(link);
        }
        Err(Error::Config(format!(
            "'{text}' is no link: give its latency in microseconds and its GB/s, such as 20,1.25"
        )))
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{},{}", self.alpha_us, self.gbps, self.overhead_us)
    }
}

/// The links of a network.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Links {
    /// Between ranks of one host.
    pub intra: Link,
    /// Between ranks of different hosts.
    pub inter: Link,
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

/// What can be set about how collectives use a network.
///
/// Rank 0's links and `any_order` hold for all ranks, so that all choose alike.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NetworkOptions {
    /// By which all-reduces are chosen. `TENSORWIRE_INTRA` and `TENSORWIRE_INTER`, as [`Link`] reads them.
    pub links: Links,
    /// Whether an all-reduce of floating-point sums may be chosen that reduces in another order than the ranks', where
    /// that is faster: see [`Algorithm::keeps_order`](crate::Algorithm::keeps_order). `TENSORWIRE_ANY_ORDER`, 1 or 0.
    pub any_order: bool,
    /// What this rank calls its host: ranks that say the same count as on one. Without it, the number that the kernel got
    /// when it started. `TENSORWIRE_HOST`.
    pub host: Option<String>,
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
        let defaults = Links::default();
        let link = |name: &str, default: Link| match lookup(name) {
            None => Ok(default),
            Some(text) => text.parse().map_err(|e: Error| Error::Config(format!("{name}: {e}"))),
        };
        let links = Links {
            intra: link("TENSORWIRE_INTRA", defaults.intra)?,
            inter: link("TENSORWIRE_INTER", defaults.inter)?,
        };
        let any_order = match lookup("TENSORWIRE_ANY_ORDER").as_deref() {
            None | Some("0") => false,
            Some("1") => true,
            Some(other) => {
                return Err(Error::Config(format!("TENSORWIRE_ANY_ORDER is '{other}': give 1 or 0")));
            }
        };
        Ok(NetworkOptions { links, any_order, host: lookup("TENSORWIRE_HOST") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_read_or_refused() {
        let link: Link = "20,1.25".parse().unwrap();
        assert_eq!(link, Link { alpha_us: 20.0, gbps: 1.25, overhead_us: 2.5 });
        assert_eq!("0, 10, 1".parse::<Link>().unwrap(), Link { alpha_us: 0.0, gbps: 10.0, overhead_us: 1.0 });
        assert_eq!(link.to_string().parse::<Link>().unwrap(), link);
        for bad in ["", "20", "20,", "a,b", "-1,1", "1,0", "1,-2", "NaN,1", "1,inf", "1,2,3,4", "1,2,-3"] {
            assert!(bad.parse::<Link>().unwrap_err().to_string().contains("20,1.25"), "{bad}");
        }
    }

    #[test]
    fn options_come_from_the_environment_or_say_why_not() {
        let set = |name: &'static str, value: &'static str| {
            NetworkOptions::from_lookup(move |n| (n == name).then(|| value.to_owned()))
        };
        assert_eq!(set("", "").unwrap(), NetworkOptions::default());
        assert!(set("TENSORWIRE_ANY_ORDER", "1").unwrap().any_order);
        assert_eq!(set("TENSORWIRE_HOST", "a").unwrap().host.as_deref(), Some("a"));
        assert_eq!(set("TENSORWIRE_INTER", "50,0.1").unwrap().links.inter.gbps, 0.1);
        for (name, value) in [("TENSORWIRE_ANY_ORDER", "yes"), ("TENSORWIRE_INTRA", "fast")] {
            assert!(set(name, value).unwrap_err().to_string().contains(name), "{name}");
        }
    }
}
