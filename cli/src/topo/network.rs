//! What a probe measures of a network: the links between ranks of one host, and those between hosts.

use serde::{Deserialize, Serialize};
use tensorwire::collectives::network::LinkClass;
use tensorwire::topology::table::fit::{line, median};
use tensorwire::{Communicator, Link, Result};

use crate::failure::Failure;

/// Sizes of messages, from those that the latency decides about to those that the bandwidth does.
const SIZES: [usize; 8] = [8, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20];

/// Messages of which each rank sends many at once, for what each keeps a processor busy.
const BURST: usize = 32;

/// How long a batch is meant to take, in microseconds.
const BATCH_US: f64 = 10_000.0;

/// Batches of each, one of each in turn, so that what else happens meanwhile meets all of them alike.
const ROUNDS: usize = 9;

/// Where an exchange takes longer than this, in microseconds, larger ones are left out: the link is slow enough to have
/// been seen.
const LONG_US: f64 = 200_000.0;

/// One measurement: every rank sent the next one some messages, all at once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Sample {
    /// `intra` or `inter`.
    pub(super) link: String,
    /// Messages that a rank sent and received at once.
    pub(super) messages: usize,
    /// Bytes that the link carried each way.
    pub(super) bytes: usize,
    /// Of the slowest rank's mean times, the median of the rounds.
    pub(super) median_us: f64,
}

/// Measures each class of links that there is. Every rank gets the same.
pub(super) fn measure(comm: &Communicator) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for class in LinkClass::ALL {
        samples.extend(measure_class(comm, class)?);
    }
    Ok(samples)
}

fn measure_class(comm: &Communicator, class: LinkClass) -> Result<Vec<Sample>> {
    // Connections are made by the first exchange.
    if comm.measure_link(class, 8, 1, 1)?.is_none() {
        return Ok(Vec::new());
    }
    let mut ways = Vec::new();
    for (bytes, messages) in [(8, BURST)].into_iter().chain(SIZES.map(|bytes| (bytes, 1))) {
        let Some(once) = comm.measure_link(class, bytes, messages, 2)? else { break };
        // The same on every rank, for each got the same time.
        let times = (BATCH_US / once.us).clamp(1.0, 10_000.0) as usize;
        ways.push((bytes, messages, times, once.bytes, Vec::new()));
        if once.us > LONG_US {
            break;
        }
    }
    for _ in 0..ROUNDS {
        for (bytes, messages, times, _, taken) in &mut ways {
            taken.extend(comm.measure_link(class, *bytes, *messages, *times)?.map(|e| e.us));
        }
    }
    let sample = |(_, messages, _, bytes, mut taken): (usize, usize, usize, usize, Vec<f64>)| Sample {
        link: class.name().to_owned(),
        messages,
        bytes,
        median_us: (median(&mut taken).unwrap_or_default() * 1e3).round() / 1e3,
    };
    Ok(ways.into_iter().map(sample).collect())
}

/// A link that follows from measurements, and the factor by which it misses the one that it fits worst.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Fitted {
    pub(super) link: Link,
    pub(super) misses: f64,
}

/// What messages over a class of links cost; nothing if there is none.
///
/// # Errors
/// Times that no latency and bandwidth explain.
pub(super) fn fit(samples: &[Sample], class: LinkClass) -> Result<Option<Fitted>, Failure> {
    let of = || samples.iter().filter(|s| s.link == class.name());
    if of().next().is_none() {
        return Ok(None);
    }
    let points: Vec<(f64, f64)> =
        of().filter(|s| s.messages == 1).map(|s| (s.bytes as f64, s.median_us)).collect();
    let burst = of().find(|s| s.messages > 1);
    let fitted = line(&points).zip(burst).map(|((fixed, us_a_byte), burst)| {
        // Beside what its bytes take, each message more keeps a rank busy once to send it and once to receive one.
        let of_bytes = us_a_byte * burst.bytes as f64;
        let more = (burst.median_us - fixed - of_bytes) / (2 * (burst.messages - 1)) as f64;
        let overhead_us = more.clamp(0.0, fixed / 2.0);
        // No more digits than were measured.
        let rounded = |x: f64| format!("{x:.3e}").parse().unwrap_or(x);
        let link = Link {
            alpha_us: rounded(fixed - 2.0 * overhead_us),
            gbps: rounded(1e-3 / us_a_byte),
            overhead_us: rounded(overhead_us),
        };
        let miss = |(bytes, us): &(f64, f64)| ((fixed + us_a_byte * bytes) / us).ln().abs();
        Fitted { link, misses: points.iter().map(miss).fold(0.0, f64::max).exp() }
    });
    match fitted.filter(|f| f.link.is_sound()) {
        Some(fitted) => Ok(Some(fitted)),
        None => Err(Failure::run(format!(
            "topo --probe: no latency and bandwidth explain what was measured of {} links: let nothing else run \
             meanwhile, and try again",
            class.name()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What ranks would measure over a link that `sharing` of each host use at once.
    fn measured(class: LinkClass, link: Link, sharing: usize) -> Vec<Sample> {
        let sizes = SIZES.map(|bytes| (bytes, 1)).into_iter().chain([(8, BURST)]);
        let sample = |(bytes, messages): (usize, usize)| {
            let carried = bytes * messages * sharing;
            let busy = 2.0 * messages as f64 * link.overhead_us;
            let median_us = link.alpha_us + busy + carried as f64 * link.us_a_byte();
            Sample { link: class.name().into(), messages, bytes: carried, median_us }
        };
        sizes.map(sample).collect()
    }

    #[test]
    fn a_link_is_found_by_what_messages_take() {
        let (near, far): (Link, Link) = ("5,10,1.5".parse().unwrap(), "40,0.125,3".parse().unwrap());
        let mut samples = measured(LinkClass::Intra, near, 1);
        samples.extend(measured(LinkClass::Inter, far, 4));
        // Something came between.
        samples[3].median_us *= 10.0;
        for (class, link) in [(LinkClass::Intra, near), (LinkClass::Inter, far)] {
            let found = fit(&samples, class).unwrap().unwrap().link;
            for (got, right) in [
                (found.alpha_us, link.alpha_us),
                (found.gbps, link.gbps),
                (found.overhead_us, link.overhead_us),
            ] {
                assert!((got / right - 1.0).abs() < 0.02, "{found} for {link}");
            }
        }
        assert_eq!(fit(&samples[..SIZES.len()], LinkClass::Inter).unwrap(), None);
        assert!(fit(&samples[..1], LinkClass::Intra).is_err());
    }
}
