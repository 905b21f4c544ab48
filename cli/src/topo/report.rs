//! What `topo` prints.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tensorwire::collectives::network::{LinkClass, LinksInForce, NetworkOptions, Source};
use tensorwire::topology::discover::{Fingerprint, Machine, as_list};
use tensorwire::topology::table::{Absent, Measured, Table};
use tensorwire::{Algorithm, Link, Tuning};

use super::network::{self, Fitted};
use super::sample::{BLOCKS, CHUNKS, SINGLE_COPY, SIZES, SLOTS, Samples};
use crate::failure::Failure;

/// The machine, a line or more for each of its parts.
pub(super) fn machine(m: &Machine) -> String {
    let mut text = String::new();
    let mut line = |name: &str, what: &str| {
        // Writing to a string can't fail.
        let _ = writeln!(text, "{name:<12}{what}");
    };
    let p = &m.processors;
    line("processor", &p.model);
    let mut allowed = format!("{} ({}) on {}", p.allowed.len(), as_list(&p.allowed), count(p.cores, "core"));
    if let Some(quota) = p.quota {
        allowed += &format!(", a quota of {quota}");
    }
    line("allowed", &format!("{allowed}: up to {} at once", count(p.usable, "rank")));
    for (i, same) in
        p.caches.chunk_by(|a, b| (a.level, &a.kind, &a.size) == (b.level, &b.kind, &b.size)).enumerate()
    {
        let shared: Vec<String> = same.iter().map(|c| as_list(&c.shared_by)).collect();
        let (level, kind) = (same[0].level, same[0].kind.to_lowercase());
        let what = format!("L{level} {kind} {} of processors {}", same[0].size, shared.join(" | "));
        line(if i == 0 { "caches" } else { "" }, &what);
    }
    let size = |bytes: Option<u64>| bytes.map_or("an unknown amount".into(), bytes_text);
    let mem = &m.memory;
    let limit = mem.limit.map_or("no limit".into(), |limit| format!("a limit of {}", bytes_text(limit)));
    line(
        "memory",
        &format!("{}, {} available, {limit} by control group", size(mem.total), size(mem.available)),
    );
    for node in &mem.nodes {
        let processors = as_list(&node.processors);
        let what = format!("processors {processors}, {}, {} free", size(node.total), size(node.free));
        line(&format!("node {}", node.node), &what);
    }
    let setting = |s: &Option<String>| s.clone().unwrap_or("unknown".into());
    let (own, shared) = (setting(&mem.huge_pages.anonymous), setting(&mem.huge_pages.shared));
    line("huge pages", &format!("{own}; for shared memory {shared}"));
    line("/dev/shm", &size(mem.dev_shm));
    for (i, interface) in m.interfaces.iter().enumerate() {
        let speed = interface.mbit_per_s.map_or("speed unknown".into(), |mbit| format!("{mbit} Mbit/s"));
        let what = format!("{}: {}, {speed}", interface.name, interface.state);
        line(if i == 0 { "network" } else { "" }, &what);
    }
    text
}

/// GPUs and other accelerators, a line each.
pub(super) fn accelerators(m: &Machine) -> String {
    let mut text = String::new();
    for a in &m.accelerators {
        let name = a.name.clone().unwrap_or_else(|| format!("{:04x}:{:04x}", a.vendor, a.device));
        let node = a.at.numa.map_or("node unknown".to_owned(), |node| format!("node {node}"));
        let kind = if a.gpu { "gpu" } else { "accelerator" };
        // Writing to a string can't fail.
        let _ = writeln!(text, "{kind:<12}{}: {name}, {node}", a.at.bus);
    }
    text
}

/// What was chosen for a number of ranks, and how the choices beside it fared.
pub(super) fn choice(t: &Tuning, samples: &Samples<'_>, processors: usize) -> String {
    let turns = if t.world > processors { ", taking turns" } else { "" };
    let mut text = format!("\nmeasured at {} ranks{turns}\n", t.world);
    let mut line = |name: &str, what: String| {
        let _ = writeln!(text, "  {name:<20}{what}");
    };
    for (name, buffer, large, threshold) in [
        ("all_reduce", "user", Algorithm::TwoShot, t.one_shot),
        ("  symmetric buffers", "symmetric", Algorithm::Symmetric, t.symmetric_one_shot),
    ] {
        line(name, format!("one_shot up to {}, then {large}", bytes_text(threshold as u64)));
        let (small, other) = (samples.by_size(Algorithm::OneShot, buffer), samples.by_size(large, buffer));
        let last = SIZES.partition_point(|size| *size <= threshold);
        let at = |i: usize| {
            let (mine, theirs, than) =
                if i < last { (small[i], other[i], large) } else { (other[i], small[i], Algorithm::OneShot) };
            format!(
                "at {} {mine:.2} us, {}",
                bytes_text(SIZES[i] as u64),
                compared(theirs / mine, than.name())
            )
        };
        let neighbours: Vec<String> = [last.checked_sub(1), Some(last)]
            .into_iter()
            .flatten()
            .filter(|i| *i < SIZES.len())
            .map(at)
            .collect();
        line("", neighbours.join("; "));
    }
    let times = samples.by_chunk();
    let mean = |i: usize| times[i].iter().map(|t| t.ln()).sum::<f64>() / times[i].len().max(1) as f64;
    if let Some(i) = CHUNKS.iter().position(|chunk| *chunk == t.chunk) {
        let beside = |j: usize| compared((mean(j) - mean(i)).exp(), &bytes_text(CHUNKS[j] as u64));
        let beside: Vec<String> = [i.checked_sub(1), Some(i + 1)]
            .into_iter()
            .flatten()
            .filter(|j| *j < CHUNKS.len())
            .map(beside)
            .collect();
        line("chunk", format!("{}, {}", bytes_text(t.chunk as u64), beside.join(", ")));
    }
    let (slots, single) = (samples.by_block(SLOTS), samples.by_block(SINGLE_COPY));
    let last = BLOCKS.partition_point(|bytes| *bytes <= t.single_copy_above);
    let neighbours: Vec<String> = [last.checked_sub(1), Some(last)]
        .into_iter()
        .flatten()
        .filter_map(|i| {
            let (slots, single) = (slots.get(i)?, single.get(i)?);
            let beside = if i < last {
                compared(single / slots, SINGLE_COPY)
            } else {
                compared(slots / single, SLOTS)
            };
            Some(format!("at {} {beside}", bytes_text(BLOCKS[i] as u64)))
        })
        .collect();
    if !neighbours.is_empty() {
        let above = bytes_text(t.single_copy_above as u64);
        line("all_gather", format!("blocks through slots up to {above}, then in a single copy"));
        line("", neighbours.join("; "));
    }
    text
}

fn compared(ratio: f64, than: &str) -> String {
    if ratio >= 1.0 {
        format!("{ratio:.2} x faster than {than}")
    } else {
        format!("{:.2} x slower than {than}", 1.0 / ratio)
    }
}

/// The links that follow from measurements, and how well.
pub(super) fn fitted(
    transport: &str,
    class: LinkClass,
    fitted: &Fitted,
    samples: &[network::Sample],
) -> String {
    let (place, sizes) = (place(class), samples.iter().filter(|s| s.link == class.name()).count() - 1);
    format!(
        "\nmeasured over {transport} {place}\n  {}, within {:.0} % of what messages of {sizes} sizes took\n",
        link_text(&fitted.link),
        (fitted.misses - 1.0) * 100.0
    )
}

fn place(class: LinkClass) -> &'static str {
    match class {
        LinkClass::Intra => "on a host",
        LinkClass::Inter => "between hosts",
    }
}

fn link_text(link: &Link) -> String {
    let Link { alpha_us, gbps, overhead_us } = link;
    format!("{alpha_us} us, {gbps} GB/s, {overhead_us} us a message at each end")
}

/// A link by which this machine's rank 0 would have all choose, and where it is from.
pub(super) struct LinkRow {
    transport: &'static str,
    class: LinkClass,
    link: Link,
    source: Source,
    measured_at: Option<u64>,
}

/// The links in force.
pub(super) fn links(table: &Result<Table, Absent>) -> Result<Vec<LinkRow>, Failure> {
    let options = NetworkOptions::from_env().map_err(Failure::usage)?;
    let of = |transport| {
        let LinksInForce { links, intra, inter } = LinksInForce::new(&options, transport);
        let measured = table.as_ref().ok().and_then(|table| table.network(transport));
        let row = |class, link, source, measured: Option<Measured>| LinkRow {
            transport,
            class,
            link,
            source,
            measured_at: measured.filter(|_| source == Source::Table).map(|m| m.measured_at),
        };
        [
            row(LinkClass::Intra, links.intra, intra, measured.and_then(|n| n.intra)),
            row(LinkClass::Inter, links.inter, inter, measured.and_then(|n| n.inter)),
        ]
    };
    Ok(["tcp", "tls", "quic"].into_iter().flat_map(of).collect())
}

pub(super) fn links_text(rows: &[LinkRow]) -> String {
    let mut text = "\nlinks       by which all-reduces over a network are chosen\n".to_owned();
    for row in rows {
        let source = match (row.source, row.measured_at) {
            (Source::Table, Some(then)) => format!("measured {} ago", age(seconds_since(then))),
            (Source::Given, _) => match row.class {
                LinkClass::Intra => "TENSORWIRE_INTRA".to_owned(),
                LinkClass::Inter => "TENSORWIRE_INTER".to_owned(),
            },
            _ => "built-in constants".to_owned(),
        };
        let _ = writeln!(
            text,
            "{:>10}  {:<15}{} ({source})",
            row.transport,
            place(row.class),
            link_text(&row.link)
        );
    }
    text
}

pub(super) fn links_json(rows: &[LinkRow]) -> Value {
    let row = |row: &LinkRow| {
        json!({
            "transport": row.transport,
            "link": row.class.name(),
            "alpha_us": row.link.alpha_us,
            "gbps": row.link.gbps,
            "overhead_us": row.link.overhead_us,
            "source": row.source.name(),
            "measured_at": row.measured_at,
        })
    };
    rows.iter().map(row).collect()
}

/// What is said where the processors were moved.
pub(super) fn moved(always: bool) -> String {
    let what = if always {
        "all passes: they count as of an unknown distance"
    } else {
        "some passes: those were left out"
    };
    format!("\nthe processors were moved during {what}\n")
}

/// What collectives take, a line each, for each distance.
pub(super) fn profiles(table: &Result<Table, Absent>) -> String {
    const SHOWN: [u64; 4] = [1 << 10, 32 << 10, 1 << 20, 32 << 20];
    let mut text = String::new();
    for profile in table.as_ref().map(|table| &table.profiles[..]).unwrap_or_default() {
        let at = profile.distance_ns.map_or("an unknown distance".into(), |ns| format!("{ns} ns"));
        let ago = age(seconds_since(profile.measured_at()));
        let _ = writeln!(
            text,
            "\nprofile     at {at} between processors, measured {ago} ago; median microseconds a call"
        );
        let sizes = SHOWN.map(|bytes| format!("{:>11}", bytes_text(bytes))).concat();
        let _ = writeln!(text, "{:>30}{sizes}{:>10}", "ranks", "within");
        for t in &profile.timings {
            let one = t.p50.pieces().next().is_none();
            let cell = |bytes: &u64| {
                if one && *bytes != SHOWN[0] { String::new() } else { format!("{:.2}", t.p50.us(*bytes)) }
            };
            let cells: String = SHOWN.iter().map(|bytes| format!("{:>11}", cell(bytes))).collect();
            let busy = if t.contended { ", memory busy" } else { "" };
            let within = format!("{:.0} %", (t.p50.band() - 1.0) * 100.0);
            let _ = writeln!(
                text,
                "  {:<14} {:<7}{:>6}{cells}{within:>10}{busy}",
                t.collective, t.transport, t.ranks
            );
        }
        for s in &profile.steps {
            let within = (s.band - 1.0) * 100.0;
            let ranks = count(s.ranks, "rank");
            let _ = writeln!(
                text,
                "  a decoder over {ranks}: {:.1} us a layer, {:.1} GB/s of weights a rank, within {within:.0} %",
                s.layer_us, s.gbps
            );
        }
        let reads: Vec<String> = profile
            .reads
            .iter()
            .map(|r| {
                let by =
                    if r.processors > 1 { format!(" by each of {}", r.processors) } else { String::new() };
                format!("{} {:.0}{by}", bytes_text(r.bytes), r.gbps)
            })
            .collect();
        if !reads.is_empty() {
            let _ = writeln!(text, "  memory read at GB/s: {}", reads.join(", "));
        }
    }
    text
}

/// Where measurements and sysfs disagree.
pub(super) fn notes(notes: &[String]) -> String {
    notes.iter().map(|note| format!("\nnote: {note}\n")).collect()
}

/// The table in force: where it is, how old, and what it says.
pub(super) fn table(table: &Result<Table, Absent>, machine: &Fingerprint) -> String {
    let mut text = String::new();
    let rows = match table {
        Ok(table) => {
            let place = Table::path(machine).map(|path| path.display().to_string()).unwrap_or_default();
            let _ = writeln!(
                text,
                "\ntable       {place}, measured {} ago",
                age(seconds_since(table.measured_at))
            );
            table.tunings.clone()
        }
        Err(why) => {
            let _ = writeln!(text, "\ntable       built-in constants: {why}");
            vec![Tuning::built_in(2), Tuning::built_in(4)]
        }
    };
    let _ = writeln!(
        text,
        "{:>10}{:>20}{:>25}{:>10}{:>20}",
        "ranks", "one_shot up to", "in symmetric buffers", "chunk", "slots for blocks to"
    );
    for t in rows {
        let cells =
            [t.one_shot, t.symmetric_one_shot, t.chunk, t.single_copy_above].map(|n| bytes_text(n as u64));
        let _ =
            writeln!(text, "{:>10}{:>20}{:>25}{:>10}{:>20}", t.world, cells[0], cells[1], cells[2], cells[3]);
    }
    let others = match table {
        Ok(_) => "other numbers of ranks: as the nearest, where a rank reads as many bytes of its peers",
        Err(_) => "other numbers of ranks: where a rank reads as many bytes of its peers",
    };
    let _ = writeln!(text, "{others}");
    text
}

pub(super) fn table_json(table: &Result<Table, Absent>, machine: &Fingerprint) -> Value {
    let world = |t: &Tuning| {
        json!({
            "ranks": t.world, "one_shot": t.one_shot, "symmetric_one_shot": t.symmetric_one_shot, "chunk": t.chunk,
            "single_copy_above": t.single_copy_above,
        })
    };
    let path = Table::path(machine).ok();
    match table {
        Ok(table) => json!({
            "source": "measured",
            "path": path,
            "measured_at": table.measured_at,
            "age_s": seconds_since(table.measured_at),
            "worlds": table.tunings.iter().map(world).collect::<Vec<_>>(),
        }),
        Err(why) => json!({
            "source": "built_in",
            "path": path,
            "why": why.to_string(),
            "worlds": ([2, 4].map(|n| world(&Tuning::built_in(n)))),
        }),
    }
}

pub(crate) fn seconds_since(then: u64) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    now.saturating_sub(then)
}

pub(crate) fn age(seconds: u64) -> String {
    match seconds {
        0..120 => count(seconds as usize, "second"),
        120..7200 => format!("{} minutes", seconds / 60),
        7200..172_800 => format!("{} hours", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

pub(super) fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// Bytes in the largest unit of 1024 that leaves a whole number, or about that.
pub(super) fn bytes_text(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (bytes.max(1).ilog2() as usize / 10).min(UNITS.len() - 1);
    let scaled = bytes as f64 / (1u64 << (10 * unit)) as f64;
    let decimals = usize::from(scaled.fract() > 0.05 && scaled < 100.0);
    format!("{scaled:.decimals$} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topo::probe::tests::measured;

    #[test]
    fn sizes_and_ages_are_read_easily() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (128 << 10, "128 KiB"),
            (43_690, "42.7 KiB"),
            (47 << 30, "47 GiB"),
            (25_276_502_016, "23.5 GiB"),
            (u64::MAX, "16777216 TiB"),
        ] {
            assert_eq!(bytes_text(bytes), text);
        }
        for (seconds, text) in
            [(1, "1 second"), (119, "119 seconds"), (180, "3 minutes"), (86_400 * 3, "3 days")]
        {
            assert_eq!(age(seconds), text);
        }
    }

    #[test]
    fn a_choice_is_compared_with_its_neighbours() {
        let samples = measured(2, 32 << 10, 64 << 10);
        let tuning = Tuning {
            world: 2,
            one_shot: 32 << 10,
            symmetric_one_shot: 1 << 20,
            chunk: 64 << 10,
            single_copy_above: 8 << 10,
        };
        let text = choice(&tuning, &Samples(&samples), 2);
        assert!(text.contains("one_shot up to 32 KiB, then two_shot"), "{text}");
        assert!(text.contains("at 32 KiB 8.00 us, 1.25 x faster than two_shot"), "{text}");
        assert!(text.contains("at 64 KiB 10.00 us, 1.20 x faster than one_shot"), "{text}");
        // One shot at all sizes was forced on this one, and loses at the largest.
        assert!(text.contains("at 1 MiB 12.00 us, 1.20 x slower than symmetric\n"), "{text}");
        assert!(text.contains("64 KiB, 1.69 x faster than 32 KiB, 1.69 x faster than 128 KiB"), "{text}");
        assert!(text.contains("blocks through slots up to 8 KiB, then in a single copy"), "{text}");
        assert!(
            text.contains("at 8 KiB 1.25 x faster than single_copy; at 16 KiB 1.25 x slower than slots"),
            "{text}"
        );
        assert!(
            !text.contains("taking turns") && choice(&tuning, &Samples(&samples), 1).contains("taking turns")
        );
    }

    #[test]
    fn without_a_table_the_constants_are_shown_with_why() {
        let machine = Fingerprint { processor: "x".into(), processors: 2, caches: vec![] };
        let text = table(&Err(Absent::Missing), &machine);
        assert!(
            text.contains("built-in constants: nothing measured yet") && text.contains("4 MiB"),
            "{text}"
        );
        let json = table_json(&Err(Absent::Off), &machine);
        assert_eq!(
            (&json["source"], &json["worlds"][0]["one_shot"]),
            (&"built_in".into(), &(4 << 20).into())
        );
    }
}
