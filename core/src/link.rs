//! What messages cost.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

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
    /// Microseconds that a message of `bytes` takes.
    pub fn us(&self, bytes: usize) -> f64 {
        self.alpha_us + bytes as f64 * self.us_a_byte()
    }

    /// Microseconds for each byte.
    pub fn us_a_byte(&self) -> f64 {
        1e-3 / self.gbps
    }

    /// Whether its numbers can be used: times from 0 to 1000 s, and from 1 kB/s to 1000 TB/s.
    pub fn is_sound(&self) -> bool {
        let time = 0.0..=1e9;
        time.contains(&self.alpha_us) && time.contains(&self.overhead_us) && (1e-6..=1e6).contains(&self.gbps)
    }
}

impl FromStr for Link {
    type Err = Error;

    /// Reads `ALPHA_US,GBPS`, such as `20,1.25`, or `ALPHA_US,GBPS,OVERHEAD_US`; without it, the overhead is an eighth of
    /// the latency.
    fn from_str(text: &str) -> Result<Link> {
        let numbers: Option<Vec<f64>> = text.split(',').map(|n| n.trim().parse().ok()).collect();
        let link = match numbers.as_deref() {
            Some([alpha_us, gbps]) => {
                Some(Link { alpha_us: *alpha_us, gbps: *gbps, overhead_us: alpha_us / 8.0 })
            }
            Some([alpha_us, gbps, overhead_us]) => {
                Some(Link { alpha_us: *alpha_us, gbps: *gbps, overhead_us: *overhead_us })
            }
            _ => None,
        };
        link.filter(Link::is_sound).ok_or_else(|| {
            Error::Config(format!(
                "'{text}' is no link: give its latency in microseconds and its GB/s, such as 20,1.25"
            ))
        })
    }
}

impl fmt::Display for Link {
    /// As it is read.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},{},{}", self.alpha_us, self.gbps, self.overhead_us)
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
}
