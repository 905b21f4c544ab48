//! Fabrics from the files of other tools, and into one of them. Each file may come from anywhere.

mod hwloc;
mod nccl;
mod nvidia_smi;
mod xml;

use std::collections::{BTreeMap, BTreeSet};

use super::{Basis, Class, Device, Fabric, Host, Link, Models, Nic, Pair, Parts, gpus, nic_link};
use crate::{Error, Result};

/// A file that a fabric can be read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// [`Fabric::to_json`]'s.
    Json,
    /// [`Fabric::from_toml`]'s.
    Toml,
    /// [`Fabric::from_nccl`]'s.
    Nccl,
    /// [`Fabric::from_hwloc`]'s.
    Hwloc,
    /// [`Fabric::from_nvidia_smi`]'s.
    NvidiaSmi,
}

impl Format {
    /// What a text seems to be, by what it begins with.
    pub fn of(text: &str) -> Format {
        let start = text.trim_start_matches('\u{feff}').trim_start();
        if start.starts_with('{') {
            return Format::Json;
        }
        // Colours and underlines of a terminal come before the first word.
        if start.starts_with('\u{1b}') || start.starts_with("GPU0") {
            return Format::NvidiaSmi;
        }
        if !start.starts_with('<') {
            return Format::Toml;
        }
        if start.contains("<topology") { Format::Hwloc } else { Format::Nccl }
    }
}

impl Fabric {
    /// Reads a fabric from a text, in the format that it seems to have: see [`Format::of`].
    ///
    /// # Errors
    /// What the format's own function returns.
    pub fn from_text(text: &str) -> Result<Fabric> {
        match Format::of(text) {
            Format::Json => Fabric::from_json(text),
            Format::Toml => Fabric::from_toml(text),
            Format::Nccl => Fabric::from_nccl(text),
            Format::Hwloc => Fabric::from_hwloc(text),
            Format::NvidiaSmi => Fabric::from_nvidia_smi(text),
        }
    }
}

/// The most of anything that an imported file may have before it is looked at closely.
const MAX_THINGS: usize = 4096;

/// The most devices of a host that are compared for NVLinks between each other.
const MAX_JOINED: usize = 256;

fn refused(what: &str, problem: impl Into<String>) -> Error {
    Error::Fabric { what: what.to_owned(), problem: problem.into() }
}

/// What a file says of a host, while it is read.
#[derive(Default)]
struct Found {
    devices: Vec<Device>,
    nics: Vec<Nic>,
    /// Switches by what the file calls them, each with the node of the first thing on it.
    switches: BTreeMap<String, (u32, Option<u32>)>,
    links: BTreeMap<Class, Link>,
    /// NVLinks of a device to switches, in GB/s altogether.
    to_switches: BTreeMap<usize, f64>,
    /// NVLinks between two devices, the lower first, in GB/s.
    between: BTreeMap<(usize, usize), f64>,
    /// Whether what an NVLink carries isn't known.
    guessed_nvlink: bool,
}

impl Found {
    /// The number of a switch, and the node of what hangs on it: the first one's, as one switch is in one place.
    fn switch(&mut self, name: &str, numa: Option<u32>) -> (u32, Option<u32>) {
        let next = self.switches.len() as u32;
        *self.switches.entry(name.to_owned()).or_insert((next, numa))
    }

    /// Numbers the switches in the order in which devices and then interfaces hang on them, whatever the file's order was.
    fn number_switches(&mut self) {
        let devices = self.devices.iter_mut().filter_map(|d| d.switch.as_mut());
        let nics = self.nics.iter_mut().filter_map(|n| n.switch.as_mut());
        let mut numbers: BTreeMap<u32, u32> = BTreeMap::new();
        for switch in devices.chain(nics) {
            let next = numbers.len() as u32;
            *switch = *numbers.entry(*switch).or_insert(next);
        }
    }

    /// Takes over a link unless a slower one is known.
    fn slower(&mut self, class: Class, gbps: f64) {
        let link = Link::rated(Link::assumed(class).alpha_us, gbps);
        if gbps > 0.0 {
            self.links.entry(class).and_modify(|known| *known = known.slower(link)).or_insert(link);
        }
    }
}

/// The fabric of some hosts.
fn assemble(name: &str, hosts: Vec<Found>, models: Models) -> Result<Fabric> {
    let mut parts = Parts { name: name.to_owned(), models: models.0, ..Parts::default() };
    let single = hosts.len() == 1;
    let mut domains = 0;
    for (number, mut found) in hosts.into_iter().enumerate() {
        found.number_switches();
        let mut host = Host::new(if single { "host".to_owned() } else { format!("host{number}") });
        let first = parts.devices.len() as u32;
        if let Some(link) = nic_link(&found.nics) {
            found.links.insert(Class::Network, link);
        }
        for set in alike(&found) {
            let (members, gbps) = set;
            found.slower(Class::NvLink, gbps);
            if found.guessed_nvlink
                && let Some(link) = found.links.get_mut(&Class::NvLink)
            {
                link.basis = Basis::Assumed;
            }
            for member in members {
                found.devices[member].nvlink = Some(domains);
                found.between.retain(|(a, b), _| *a != member && *b != member);
            }
            domains += 1;
        }
        for ((a, b), gbps) in found.between {
            let basis = if found.guessed_nvlink { Basis::Assumed } else { Basis::Rated };
            let link = Link { alpha_us: Link::assumed(Class::NvLink).alpha_us, gbps, basis };
            parts.pairs.push(Pair { a: first + a as u32, b: first + b as u32, class: Class::NvLink, link });
        }
        for device in found.devices {
            let name = format!("{}/{}", host.name, device.name);
            parts.devices.push(Device { name, host: number as u32, ..device });
        }
        host.nics = found.nics;
        host.links = found.links;
        parts.hosts.push(host);
    }
    // The figures of a single host are the fabric's.
    if let [host] = &mut parts.hosts[..] {
        parts.links = std::mem::take(&mut host.links);
    }
    Fabric::new(parts)
}

/// The sets of a host's devices that NVLinks join all alike, and with what: those that hang on NVSwitches, and those each of
/// which has the same links to each other one.
fn alike(found: &Found) -> Vec<(Vec<usize>, f64)> {
    let mut sets = Vec::new();
    if let Some(least) = found.to_switches.values().copied().reduce(f64::min) {
        sets.push((found.to_switches.keys().copied().collect(), least));
    }
    let mut peers: BTreeMap<usize, BTreeMap<usize, f64>> = BTreeMap::new();
    for ((a, b), gbps) in &found.between {
        for (from, to) in [(*a, *b), (*b, *a)] {
            if !found.to_switches.contains_key(&from) {
                peers.entry(from).or_default().insert(to, *gbps);
            }
        }
    }
    let mut left: BTreeSet<usize> = peers.keys().copied().collect();
    // More can't be joined one by one, and would take long to compare.
    while let Some(start) = left.first().copied().filter(|_| left.len() <= MAX_JOINED) {
        let gbps = peers[&start].values().copied().next().unwrap_or(0.0);
        let set: BTreeSet<usize> = peers[&start].keys().copied().chain([start]).collect();
        let same = |member: &usize| {
            peers.get(member).is_some_and(|theirs| {
                theirs.len() + 1 == set.len()
                    && theirs.iter().all(|(peer, speed)| set.contains(peer) && *speed == gbps)
            })
        };
        if set.iter().all(same) {
            left.retain(|member| !set.contains(member));
            sets.push((set.into_iter().collect(), gbps));
        } else {
            left.remove(&start);
        }
    }
    sets
}

/// The set bits of a mask in hexadecimal words of 32 bits, the highest first: `0x0000000f,0xffffffff` or `f,ffffffff`.
fn mask(text: &str) -> Option<Vec<usize>> {
    let words: Vec<&str> = text.trim().split(',').collect();
    if words.len() > MAX_THINGS {
        return None;
    }
    let mut bits = Vec::new();
    for (i, word) in words.iter().rev().enumerate() {
        let digits = word.strip_prefix("0x").unwrap_or(word);
        // hwloc leaves out words that are 0, and ends what is infinite with dots.
        let word = if digits.is_empty() { 0 } else { u32::from_str_radix(digits, 16).ok()? };
        bits.extend((0..32).filter(|bit| word >> bit & 1 == 1).map(|bit| 32 * i + bit));
    }
    Some(bits)
}

/// A PCI address as Linux writes it: lower case, and a domain of four digits where four are enough.
fn bus(text: &str) -> Option<String> {
    let text = text.trim().to_ascii_lowercase();
    let short = match text.split_once(':') {
        Some((domain, rest)) if domain.len() == 8 && domain.starts_with("0000") => {
            format!("{}:{rest}", &domain[4..])
        }
        _ => text,
    };
    crate::discover::is_bus(&short).then_some(short)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_apart_by_their_beginning() {
        for (text, format) in [
            (" {\"schema\"", Format::Json),
            ("name = \"x\"", Format::Toml),
            ("# <topology\n", Format::Toml),
            ("<system version=\"1\">", Format::Nccl),
            ("<?xml version=\"1.0\"?>\n<!DOCTYPE topology SYSTEM \"hwloc2.dtd\">\n<topology>", Format::Hwloc),
            ("\t\u{1b}[4mGPU0\tGPU1", Format::NvidiaSmi),
            ("        GPU0    GPU1", Format::NvidiaSmi),
            ("", Format::Toml),
        ] {
            assert_eq!(Format::of(text), format, "{text}");
        }
    }

    #[test]
    fn masks_and_addresses() {
        assert_eq!(mask("00000000,0000000f").unwrap(), [0, 1, 2, 3]);
        assert_eq!(mask("0x3,,0x80000000").unwrap(), [31, 64, 65]);
        assert_eq!(mask("0x0").unwrap(), [0; 0]);
        for bad in ["x", "123456789", "-1", "0xf...f", &",".repeat(5000)] {
            assert_eq!(mask(bad), None, "{bad}");
        }
        assert_eq!(bus("00000000:C1:00.0").as_deref(), Some("0000:c1:00.0"));
        assert_eq!(bus("00010000:c1:00.0").as_deref(), Some("00010000:c1:00.0"));
        assert_eq!(bus("fffffff:ffff:ff"), None);
    }

    #[test]
    fn devices_that_are_joined_all_alike_are_a_set() {
        let sets = |pairs: &[(usize, usize, f64)], switched: &[usize]| {
            let found = Found {
                between: pairs.iter().map(|(a, b, gbps)| ((*a, *b), *gbps)).collect(),
                to_switches: switched.iter().map(|d| (*d, 100.0 + *d as f64)).collect(),
                ..Found::default()
            };
            alike(&found)
        };
        assert_eq!(sets(&[(0, 1, 50.0), (2, 3, 25.0)], &[]), [(vec![0, 1], 50.0), (vec![2, 3], 25.0)]);
        assert_eq!(sets(&[(0, 1, 50.0), (0, 2, 50.0), (1, 2, 50.0)], &[]), [(vec![0, 1, 2], 50.0)]);
        assert_eq!(sets(&[(0, 1, 50.0), (0, 2, 25.0), (1, 2, 50.0)], &[]), []);
        assert_eq!(sets(&[(0, 1, 50.0), (1, 2, 50.0)], &[]), []);
        assert_eq!(sets(&[], &[4, 2]), [(vec![2, 4], 102.0)]);
    }
}
