//! Where measurements and what sysfs says disagree.
//!
//! Virtual machines copy the description of some processor, and interfaces tell a speed that the network behind them
//! hasn't. What sysfs says is believed until a measurement says otherwise; then a person should know.

use super::Table;
use crate::discover::{Cache, Machine};

/// A cache line's round trip, in nanoseconds, that processors which share a cache stay below: those of present servers
/// take 20 to 150, those of two sockets 300 and more.
const SHARED_NS: u32 = 200;

/// A cache is faster than memory by this factor at least.
const FASTER: f64 = 1.2;

/// The part of an interface's speed that a link reaches at least, or something is slower than it says.
const REACHED: f64 = 0.5;

/// What a person should know, a sentence each.
pub fn disagreements(machine: &Machine, table: &Table) -> Vec<String> {
    let mut found = Vec::new();
    found.extend(shared_cache(machine, table));
    found.extend(cache_size(machine, table));
    found.extend(interfaces(machine, table));
    found
}

/// Processors that share a cache, but are far apart.
fn shared_cache(machine: &Machine, table: &Table) -> Option<String> {
    let pair = machine.processors.allowed.get(..2)?;
    let shared = last_level(machine).filter(|cache| pair.iter().all(|cpu| cache.shared_by.contains(cpu)))?;
    let farthest = table.profiles.iter().filter_map(|p| p.distance_ns).max().filter(|ns| *ns > SHARED_NS)?;
    Some(format!(
        "sysfs says that processors {} and {} share an L{} cache, but a cache line took {farthest} ns from one to the \
         other and back, as between sockets: a host may move its virtual processors",
        pair[0], pair[1], shared.level
    ))
}

/// A cache half of which is no faster than memory.
fn cache_size(machine: &Machine, table: &Table) -> Option<String> {
    let cache = last_level(machine)?;
    let half = bytes(&cache.size)? / 2;
    table.profiles.iter().find_map(|profile| {
        let memory = profile.memory(1).filter(|memory| memory.bytes > 2 * half)?;
        let alone = profile.reads.iter().filter(|r| r.processors == 1 && r.bytes <= half);
        let inside = alone.max_by_key(|r| r.bytes).filter(|r| r.bytes > half / 4)?;
        (inside.gbps < FASTER * memory.gbps).then(|| {
            format!(
                "sysfs says that the L{} cache has {}, but {} KiB are read at {:.1} GB/s and memory at {:.1}: others may \
                 use it too",
                cache.level,
                cache.size,
                inside.bytes >> 10,
                inside.gbps,
                memory.gbps
            )
        })
    })
}

/// Links between hosts that no interface's speed explains.
fn interfaces(machine: &Machine, table: &Table) -> Vec<String> {
    let up = machine.interfaces.iter().filter(|i| i.state == "up");
    let Some((name, mbit)) = up.filter_map(|i| Some((&i.name, i.mbit_per_s?))).max_by_key(|(_, mbit)| *mbit)
    else {
        return Vec::new();
    };
    let said = mbit as f64 / 8e3;
    let of = |transport: &str, gbps: f64| {
        let why = match gbps / said {
            ratio if ratio > 1.0 / 0.9 => "no interface is as fast: the hosts have another way to each other",
            ratio if ratio < REACHED => "something between the hosts is slower, or shared",
            _ => return None,
        };
        Some(format!(
            "sysfs says that {name} carries {said:.2} GB/s, but {transport} between hosts was measured at {gbps:.2}: {why}"
        ))
    };
    table.networks.iter().filter_map(|n| of(&n.transport, n.inter?.link.gbps)).collect()
}

/// The cache of the highest level that the first processor uses.
fn last_level(machine: &Machine) -> Option<&Cache> {
    let first = machine.processors.allowed.first()?;
    let caches =
        machine.processors.caches.iter().filter(|c| c.kind != "Instruction" && c.shared_by.contains(first));
    caches.max_by_key(|c| c.level)
}

/// A size such as `1024K`.
fn bytes(text: &str) -> Option<u64> {
    let unit = match text.chars().last()? {
        'K' => 1 << 10,
        'M' => 1 << 20,
        'G' => 1 << 30,
        _ => return text.parse().ok(),
    };
    text[..text.len() - 1].parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use tensorwire_core::Link;

    use super::*;
    use crate::discover::{Fingerprint, Interface};
    use crate::table::{Measured, Network, Profile, Reading};

    /// A machine whose two processors share 32 MiB, with an interface of 10 Gbit/s.
    fn machine() -> Machine {
        let mut machine = Machine::read(tempfile::tempdir().unwrap().path());
        machine.processors.allowed = vec![0, 1];
        let cache = |level, kind: &str, size: &str, shared_by: &[usize]| Cache {
            level,
            kind: kind.into(),
            size: size.into(),
            shared_by: shared_by.to_vec(),
        };
        machine.processors.caches =
            vec![cache(2, "Unified", "1024K", &[0]), cache(3, "Unified", "32M", &[0, 1])];
        let interface = |name: &str, state: &str, mbit_per_s| Interface {
            name: name.into(),
            state: state.into(),
            mbit_per_s,
            mtu: None,
            at: None,
        };
        machine.interfaces = vec![
            interface("eth0", "up", Some(10_000)),
            interface("eth1", "down", Some(100_000)),
            interface("eth2", "up", None),
        ];
        machine
    }

    fn table(distance_ns: u32, cached: f64, gbps: f64) -> Table {
        let fingerprint = Fingerprint { processor: "x".into(), processors: 2, caches: vec![] };
        let read = |bytes, gbps| Reading { processors: 1, bytes, gbps };
        let reads = vec![read(1 << 18, 80.0), read(16 << 20, cached), read(256 << 20, 20.0)];
        let link = Measured { link: Link { alpha_us: 20.0, gbps, overhead_us: 1.0 }, measured_at: 0 };
        let mut table = Table::empty(fingerprint);
        table.profiles = vec![Profile { distance_ns: Some(distance_ns), reads, ..Profile::default() }];
        table.networks = vec![Network { transport: "tcp".into(), intra: Some(link), inter: Some(link) }];
        table
    }

    #[test]
    fn what_agrees_is_not_told() {
        assert_eq!(disagreements(&machine(), &table(100, 40.0, 1.1)), [""; 0]);
        assert_eq!(
            disagreements(&machine(), &Table { profiles: vec![], networks: vec![], ..table(0, 0.0, 0.0) }),
            [""; 0]
        );
    }

    #[test]
    fn each_claim_is_compared() {
        for (table, words) in [
            (table(480, 40.0, 1.1), ["processors 0 and 1 share an L3", "took 480 ns"]),
            (
                table(100, 22.0, 1.1),
                ["the L3 cache has 32M", "16384 KiB are read at 22.0 GB/s and memory at 20.0"],
            ),
            (
                table(100, 40.0, 0.3),
                ["eth0 carries 1.25 GB/s", "tcp between hosts was measured at 0.30: something"],
            ),
            (table(100, 40.0, 5.0), ["eth0 carries 1.25 GB/s", "another way"]),
        ] {
            let found = disagreements(&machine(), &table);
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(words.iter().all(|word| found[0].contains(word)), "{found:?}");
        }
    }

    #[test]
    fn processors_that_share_nothing_may_be_far_apart() {
        let mut apart = machine();
        apart.processors.caches[1].shared_by = vec![0];
        assert_eq!(disagreements(&apart, &table(480, 40.0, 1.1)), [""; 0]);
        apart.processors.caches = vec![];
        apart.interfaces = vec![];
        assert_eq!(disagreements(&apart, &table(480, 22.0, 9.0)), [""; 0]);
    }

    #[test]
    fn sizes() {
        assert_eq!((bytes("32768K"), bytes("32M"), bytes("7")), (Some(32 << 20), Some(32 << 20), Some(7)));
        for bad in ["", "K", "xK", "99999999999999999999K"] {
            assert_eq!(bytes(bad), None, "{bad}");
        }
    }
}
