//! Whether parts are a fabric.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use super::{Basis, Class, Device, DeviceModel, Host, Link, MAX_DEVICES, MAX_PAIRED_DEVICES, Parts};
use crate::discover::{is_bus, list};
use crate::{Error, Result};

/// The most network interfaces of a host.
const MAX_NICS: usize = 256;

/// The longest name, in bytes.
const MAX_NAME: usize = 256;

/// From a byte to what no device has: 1 PiB.
const MEMORY: RangeInclusive<u64> = 1..=1 << 50;

/// From 1 kB/s or 1 Mflop/s to a million times what there is.
const SPEED: RangeInclusive<f64> = 1e-6..=1e9;

/// Up to 1000 s.
const LATENCY: RangeInclusive<f64> = 0.0..=1e9;

pub(super) fn parts(parts: &Parts) -> Result<()> {
    find_problem(parts).map_or(Ok(()), |problem| {
        Err(Error::Fabric { what: format!("the fabric {:?}", short(&parts.name)), problem })
    })
}

/// As much of a name as a message holds.
fn short(name: &str) -> String {
    name.chars().take(60).collect()
}

fn find_problem(parts: &Parts) -> Option<String> {
    let Parts { name, models, hosts, devices, links, pairs } = parts;
    for (count, most, what) in [
        (hosts.len(), MAX_DEVICES, "hosts"),
        (devices.len(), MAX_DEVICES, "devices"),
        (models.len(), MAX_DEVICES, "models"),
    ] {
        if !(1..=most).contains(&count) {
            return Some(format!("it has {count} {what}, not 1 to {most}"));
        }
    }
    if !pairs.is_empty() && devices.len() > MAX_PAIRED_DEVICES {
        return Some(format!(
            "it has {} devices and links of single pairs, which at most {MAX_PAIRED_DEVICES} devices may have: \
             describe links by class",
            devices.len()
        ));
    }
    None.or_else(|| bad_name(name).map(|why| format!("its name {why}")))
        .or_else(|| models.iter().find_map(bad_model))
        .or_else(|| bad_links(links))
        .or_else(|| bad_hosts(parts))
        .or_else(|| bad_devices(parts))
        .or_else(|| bad_places(parts))
        .or_else(|| bad_pairs(parts))
        .or_else(|| no_path(parts))
}

fn bad_name(name: &str) -> Option<String> {
    if name.is_empty() {
        Some("is empty".to_owned())
    } else if name.len() > MAX_NAME {
        Some(format!("{:?}... is longer than {MAX_NAME} bytes", short(name)))
    } else if name.chars().any(char::is_control) {
        Some(format!("{:?} has control characters", short(name)))
    } else {
        None
    }
}

fn bad_model(model: &DeviceModel) -> Option<String> {
    if let Some(why) = bad_name(&model.name) {
        return Some(format!("a model's name {why}"));
    }
    let name = &model.name;
    if let Some(bytes) = model.memory_bytes.filter(|bytes| !MEMORY.contains(bytes)) {
        return Some(format!("the model {name:?} has {bytes} bytes of memory, not 1 to {}", MEMORY.end()));
    }
    let hex = |group: &str| group.len() == 4 && group.chars().all(|c| c.is_ascii_hexdigit());
    if let Some(pci) = &model.pci
        && !pci.split_once(':').is_some_and(|(vendor, device)| hex(vendor) && hex(device))
    {
        return Some(format!(
            "the model {name:?} has pci = {:?}, not two numbers such as 10de:2330",
            short(pci)
        ));
    }
    if !(1..=MAX_DEVICES as u32).contains(&model.ranks) {
        return Some(format!("the model {name:?} runs {} ranks, not 1 to {MAX_DEVICES}", model.ranks));
    }
    let tflops = &model.tflops;
    let speeds = [
        ("memory_gbps", model.memory_gbps),
        ("tflops.f32", tflops.f32),
        ("tflops.f16", tflops.f16),
        ("tflops.f8", tflops.f8),
        ("tflops.i8", tflops.i8),
    ];
    speeds.into_iter().find_map(|(what, speed)| {
        let speed = speed.filter(|speed| !SPEED.contains(speed))?;
        let (least, most) = (SPEED.start(), SPEED.end());
        Some(format!("the model {name:?} has {what} = {speed}, not {least} to {most}"))
    })
}

fn bad_links(links: &BTreeMap<Class, Link>) -> Option<String> {
    links.iter().find_map(|(class, link)| Some(format!("the link {class} {}", bad_link(link)?)))
}

fn bad_link(link: &Link) -> Option<String> {
    let is = |what: &str, value: f64, range: RangeInclusive<f64>| {
        let (least, most) = (range.start(), range.end());
        (!range.contains(&value)).then(|| format!("has {what} = {value}, not {least} to {most}"))
    };
    let band = match link.basis {
        Basis::Measured { error, .. } => is("error", error, 0.0..=1e6),
        Basis::Rated | Basis::Assumed => None,
    };
    is("alpha_us", link.alpha_us, LATENCY).or_else(|| is("gbps", link.gbps, SPEED)).or(band)
}

fn bad_hosts(parts: &Parts) -> Option<String> {
    let mut names = BTreeSet::new();
    let mut racks: BTreeMap<u32, &Host> = BTreeMap::new();
    for host in &parts.hosts {
        if let Some(rack) = host.rack {
            let known = racks.entry(rack).or_insert(host);
            if known.pod != host.pod {
                return Some(format!(
                    "hosts {:?} and {:?} are of rack {rack} but not of the same pod",
                    short(&known.name),
                    short(&host.name)
                ));
            }
        }
        if let Some(why) = bad_name(&host.name) {
            return Some(format!("a host's name {why}"));
        }
        let name = &host.name;
        if !names.insert(name) {
            return Some(format!("two hosts are named {name:?}"));
        }
        if let Some(why) = bad_links(&host.links) {
            return Some(format!("on host {name:?}, {why}"));
        }
        if host.nics.len() > MAX_NICS {
            return Some(format!(
                "host {name:?} has {} network interfaces, at most {MAX_NICS}",
                host.nics.len()
            ));
        }
        for nic in &host.nics {
            if let Some(why) = bad_name(&nic.name) {
                return Some(format!("on host {name:?}, a network interface's name {why}"));
            }
            if let Some(bus) = nic.bus.as_ref().filter(|bus| !is_bus(bus)) {
                return Some(format!("on host {name:?}, {:?} has {}", nic.name, not_bus(bus)));
            }
        }
    }
    None
}

fn bad_devices(parts: &Parts) -> Option<String> {
    let mut names = BTreeSet::new();
    for device in &parts.devices {
        if let Some(why) = bad_name(&device.name) {
            return Some(format!("a device's name {why}"));
        }
        let name = &device.name;
        if !names.insert(name) {
            return Some(format!("two devices are named {name:?}"));
        }
        if let Some(bus) = device.bus.as_ref().filter(|bus| !is_bus(bus)) {
            return Some(format!("device {name:?} has {}", not_bus(bus)));
        }
        if let Some(text) = device.processors.as_ref().filter(|text| list(text).is_none_or(|l| l.is_empty()))
        {
            return Some(format!(
                "device {name:?} has processors = {:?}, not a list such as 0-31,64-95",
                short(text)
            ));
        }
        for (what, at, count) in
            [("host", device.host, parts.hosts.len()), ("model", device.model, parts.models.len())]
        {
            if at as usize >= count {
                return Some(format!("device {name:?} has {what} = {at}, and there are {count}"));
            }
        }
    }
    let unordered = parts.devices.windows(2).find(|w| w[0].host > w[1].host)?;
    Some(format!(
        "device {:?} comes after {:?}, of a later host: devices come host by host",
        unordered[1].name, unordered[0].name
    ))
}

fn not_bus(text: &str) -> String {
    format!("bus = {:?}, not a PCI address such as 0000:07:00.0", short(text))
}

/// What holds a device lies within one thing of each wider class: a card under one switch, a switch in one node.
fn bad_places(parts: &Parts) -> Option<String> {
    type Number = fn(&Device) -> Option<u32>;
    let classes: [(&str, Number); 4] =
        [("card", |d| d.card), ("switch", |d| d.switch), ("numa", |d| d.numa), ("socket", |d| d.socket)];
    for (inner, (what, number)) in classes.iter().enumerate() {
        let mut first: BTreeMap<(u32, u32), &Device> = BTreeMap::new();
        for device in &parts.devices {
            let Some(n) = number(device) else { continue };
            let known = *first.entry((device.host, n)).or_insert(device);
            for (wider, holder) in &classes[inner + 1..] {
                if holder(known) != holder(device) {
                    return Some(format!(
                        "devices {:?} and {:?} are of {what} {n} but not of the same {wider}",
                        known.name, device.name
                    ));
                }
            }
        }
    }
    None
}

fn bad_pairs(parts: &Parts) -> Option<String> {
    let mut seen = BTreeSet::new();
    for pair in &parts.pairs {
        let (a, b) = (pair.a, pair.b);
        if a >= b || b as usize >= parts.devices.len() {
            return Some(format!(
                "the pair {a}, {b} is not a lower and a higher of {} devices",
                parts.devices.len()
            ));
        }
        if !seen.insert((a, b)) {
            return Some(format!("the pair {a}, {b} has two links"));
        }
        let across = parts.devices[a as usize].host != parts.devices[b as usize].host;
        let possible = match pair.class {
            Class::Device => false,
            Class::NvLink => true,
            Class::Rack | Class::Pod | Class::Network => across,
            _ => !across,
        };
        if !possible {
            return Some(format!("the pair {a}, {b} can't have a link of class {}", pair.class));
        }
        if let Some(why) = bad_link(&pair.link) {
            return Some(format!("the link of the pair {a}, {b} {why}"));
        }
    }
    None
}

/// Whether some host has no way to others.
fn no_path(parts: &Parts) -> Option<String> {
    let many = parts.devices.first()?.host != parts.devices.last()?.host;
    // One domain that all devices are in needs no network.
    let domain = parts.devices.first()?.nvlink;
    if !many || (domain.is_some() && parts.devices.iter().all(|d| d.nvlink == domain)) {
        return None;
    }
    let used: BTreeSet<u32> = parts.devices.iter().map(|d| d.host).collect();
    let hosts: Vec<&Host> = used.into_iter().map(|h| &parts.hosts[h as usize]).collect();
    // All are in one rack, or in one pod, or there is nothing nearer that holds them.
    let tier = hosts.iter().map(|host| host.tier(hosts[0])).max().unwrap_or(Class::Network);
    let alone = hosts.into_iter().find(|host| parts.given(host, tier).is_none())?;
    let what = if tier == Class::Network { String::new() } else { format!(" `{tier}` or") };
    Some(format!(
        "host {:?} has no path to the others: give a link{what} `network`, of the fabric or of each host",
        alone.name
    ))
}
