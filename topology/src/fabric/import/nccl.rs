//! NCCL's topology: what `NCCL_TOPO_DUMP_FILE` writes, and `NCCL_TOPO_FILE` reads.
//!
//! ```xml
//! <system version="1">
//!   <cpu host_hash="0x1" numaid="0" affinity="ffffffff" arch="x86_64" vendor="AuthenticAMD" familyid="143" modelid="49">
//!     <pci busid="0000:01:00.0" class="0x060400" link_speed="16.0 GT/s PCIe" link_width="16">
//!       <pci busid="0000:07:00.0" class="0x030200" vendor="0x10de" device="0x20b2" link_speed="16.0 GT/s PCIe" link_width="16">
//!         <gpu dev="0" sm="80" rank="0" gdr="1"><nvlink target="0000:c7:00.0" count="12" tclass="0x068000"/></gpu>
//!       </pci>
//!     </pci>
//!   </cpu>
//! </system>
//! ```
//!
//! A `cpu` is a NUMA node, and a `pci` that holds others a switch. Bandwidths are those that NCCL itself counts with
//! (`src/graph/topo.cc`, `topo.h`): of PCIe by speed and width, of NVLink by count and compute capability, between
//! processors by their make. Sockets, names, memory and speeds of devices aren't in it: a GPU that is known by its PCI number
//! has its memory from a table, another one none.

use std::collections::BTreeMap;

use super::super::machine::accelerator;
use super::super::{Device, DeviceModel, Kind, clean};
use super::xml::{self, Element};
use super::{Class, Fabric, Found, MAX_THINGS, Models, Nic, assemble, bus, gpus, mask, refused};
use crate::Result;
use crate::discover::{as_list, number_of, pcie_gbps};

const WHAT: &str = "NCCL's topology";

/// The speeds of PCIe 1 to 6, in GT/s, as NCCL knows them.
const SPEEDS: [f64; 6] = [2.5, 5.0, 8.0, 16.0, 32.0, 64.0];

impl Fabric {
    /// Reads NCCL's topology, of one host or several.
    ///
    /// # Errors
    /// [`Error::Fabric`](crate::Error::Fabric) for what is no such file.
    pub fn from_nccl(text: &str) -> Result<Fabric> {
        let system = xml::parse(text).map_err(|why| refused(WHAT, why))?;
        if system.name != "system" || system.get("version") != Some("1") {
            return Err(refused(WHAT, "it doesn't begin with <system version=\"1\">"));
        }
        let mut models = Models::default();
        let mut hosts: Vec<(&str, Reading)> = Vec::new();
        for cpu in system.all("cpu") {
            let hash = cpu.get("host_hash").unwrap_or_default();
            let at = hosts.iter().position(|(known, _)| *known == hash).unwrap_or_else(|| {
                hosts.push((hash, Reading::default()));
                hosts.len() - 1
            });
            if hosts.len() > MAX_THINGS {
                return Err(refused(WHAT, format!("it has more than {MAX_THINGS} hosts")));
            }
            hosts[at].1.cpu(cpu, &mut models).map_err(|why| refused(WHAT, why))?;
        }
        let found = hosts.into_iter().map(|(_, host)| host.finish(&mut models)).collect();
        assemble("NCCL's topology", found, models)
    }
}

/// A host, while its part of the file is read.
#[derive(Default)]
struct Reading {
    found: Found,
    gpus: Vec<Gpu>,
    /// With the order that NCCL has them in.
    nics: Vec<(i64, Nic)>,
}

struct Gpu {
    /// In which order NCCL has it.
    rank: (i64, i64),
    device: Device,
    model: DeviceModel,
    /// To whom, and how many.
    links: Vec<(Target, u32)>,
}

enum Target {
    Switch,
    Gpu(String),
}

/// Where an element is: its node, the outermost switch around it, and what that switch's own link carries.
#[derive(Clone, Copy)]
struct At<'a> {
    numa: Option<u32>,
    switch: Option<&'a str>,
    uplink: f64,
}

impl Reading {
    fn cpu(&mut self, cpu: &Element, models: &mut Models) -> Result<(), String> {
        let numa: i64 = cpu.number("numaid").ok_or("a <cpu> has no numaid")?;
        // -1 where the firmware doesn't tell.
        let numa = u32::try_from(numa).ok();
        let processors = match cpu.get("affinity") {
            Some(text) => mask(text).ok_or_else(|| format!("a <cpu> has affinity = {text:.40?}, no mask"))?,
            None => Vec::new(),
        };
        if let Some(gbps) = between_processors(cpu) {
            self.found.slower(Class::Host, gbps);
        }
        let name = PROCESSOR.map(|key| cpu.get(key).and_then(clean).unwrap_or_default()).join(" ");
        let name = clean(&name).unwrap_or_else(|| "processors".to_owned());
        let ranks = processors.len().max(1) as u32;
        let model = models.add(DeviceModel { ranks, ..DeviceModel::new(name, Kind::Cpu, None) });
        let list = (!processors.is_empty()).then(|| as_list(&processors));
        let device = Device::new(format!("cpu{}", self.found.devices.len()), 0, model);
        self.found.devices.push(Device { numa, processors: list, ..device });
        self.inside(cpu, At { numa, switch: None, uplink: f64::INFINITY })
    }

    /// What a node or a switch holds.
    fn inside(&mut self, holder: &Element, at: At<'_>) -> Result<(), String> {
        for child in &holder.children {
            if self.gpus.len() + self.nics.len() + self.found.switches.len() > MAX_THINGS {
                return Err(format!("a host has more than {MAX_THINGS} devices"));
            }
            match &*child.name {
                "pci" => self.pci(child, at)?,
                "nic" => self.nic(child, at, None)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn pci(&mut self, pci: &Element, at: At<'_>) -> Result<(), String> {
        let text = pci.get("busid").ok_or("a <pci> has no busid")?;
        let address = bus(text).ok_or_else(|| format!("a <pci> has busid = {text:.40?}, no PCI address"))?;
        let gbps = link_gbps(pci);
        for gpu in pci.all("gpu") {
            self.gpu(pci, gpu, &address, gbps, at)?;
        }
        for nic in pci.all("nic") {
            self.nic(nic, at, Some(&address))?;
        }
        let outermost = At { switch: at.switch.or(Some(&address)), uplink: at.uplink.min(gbps), ..at };
        if pci.all("pci").next().is_some() { self.inside(pci, outermost) } else { Ok(()) }
    }

    fn gpu(
        &mut self,
        pci: &Element,
        gpu: &Element,
        address: &str,
        gbps: f64,
        at: At<'_>,
    ) -> Result<(), String> {
        let (switch, numa) = self.place(at);
        let ids = (pci.hex("vendor").unwrap_or(gpus::VENDOR), pci.hex("device").unwrap_or(0));
        let (mut model, _) = accelerator(ids, true, None, None);
        model.sm = gpu.number("sm").or(model.sm);
        if switch.is_some() {
            self.found.slower(Class::Switch, gbps);
        }
        self.found.slower(Class::Numa, gbps.min(at.uplink));
        let mut links = Vec::new();
        for nvlink in gpu.all("nvlink") {
            let count = nvlink.number::<u32>("count").filter(|n| (1..=1024).contains(n));
            let count = count.ok_or("an <nvlink> has no count from 1 to 1024")?;
            let class = nvlink.get("tclass").unwrap_or_default();
            let target = nvlink.get("target").unwrap_or_default();
            // Of what it leads to; another class is a processor's.
            if class.starts_with("0x03") {
                links.push((Target::Gpu(bus(target).unwrap_or_else(|| target.to_owned())), count));
            } else if class.starts_with("0x068000") {
                links.push((Target::Switch, count));
            }
        }
        let device = Device { numa, switch, bus: Some(address.to_owned()), ..Device::new("", 0, 0) };
        let rank = (gpu.number("rank").unwrap_or(i64::MAX), gpu.number("dev").unwrap_or(i64::MAX));
        self.gpus.push(Gpu { rank, device, model, links });
        Ok(())
    }

    fn nic(&mut self, nic: &Element, at: At<'_>, address: Option<&str>) -> Result<(), String> {
        for net in nic.all("net") {
            let (switch, numa) = self.place(at);
            let name = net.get("name").and_then(clean).ok_or("a <net> has no name")?;
            // -1 where the driver doesn't tell.
            let mbit_per_s = net.number::<u64>("speed").filter(|n| (1..=i32::MAX as u64).contains(n));
            let nic = Nic { name, mbit_per_s, numa, switch, bus: address.map(str::to_owned) };
            self.nics.push((net.number("dev").unwrap_or(i64::MAX), nic));
        }
        Ok(())
    }

    fn place(&mut self, at: At<'_>) -> (Option<u32>, Option<u32>) {
        match at.switch {
            Some(switch) => {
                let (number, numa) = self.found.switch(switch, at.numa);
                (Some(number), numa)
            }
            None => (None, at.numa),
        }
    }

    /// The GPUs in NCCL's order, after the processors, and their links.
    fn finish(mut self, models: &mut Models) -> Found {
        self.nics.sort_by_key(|(dev, _)| *dev);
        self.found.nics = self.nics.into_iter().map(|(_, nic)| nic).collect();
        self.gpus.sort_by_key(|gpu| gpu.rank);
        let first = self.found.devices.len();
        let mut places: BTreeMap<String, usize> = BTreeMap::new();
        for (i, gpu) in self.gpus.iter().enumerate() {
            places.entry(gpu.device.bus.clone().unwrap_or_default()).or_insert(first + i);
        }
        for (i, gpu) in self.gpus.into_iter().enumerate() {
            let each = gpus::nvlink_gbps(gpu.model.sm.unwrap_or(0));
            let mut to_switches = 0;
            for (target, count) in gpu.links {
                match target {
                    Target::Switch => to_switches += count,
                    Target::Gpu(address) => {
                        let Some(peer) = places.get(&address).filter(|peer| **peer != first + i) else {
                            continue;
                        };
                        let pair = (*peer.min(&(first + i)), *peer.max(&(first + i)));
                        self.found.between.entry(pair).or_insert(f64::from(count) * each);
                    }
                }
            }
            if to_switches > 0 {
                self.found.to_switches.insert(first + i, f64::from(to_switches) * each);
            }
            let model = models.add(gpu.model);
            self.found.devices.push(Device { name: format!("gpu{i}"), model, ..gpu.device });
        }
        self.found
    }
}

/// What a processor's name is made of, so that it can be taken apart again.
const PROCESSOR: [&str; 4] = ["arch", "vendor", "familyid", "modelid"];

/// What NCCL counts with between the processors of a host, in GB/s.
fn between_processors(cpu: &Element) -> Option<f64> {
    let number = |name| cpu.number::<u32>(name).unwrap_or(0);
    Some(match (cpu.get("arch")?, cpu.get("vendor").unwrap_or_default()) {
        ("ppc64", _) => 32.0,
        ("arm64", _) => 6.0,
        ("x86_64", "AuthenticAMD") => 16.0,
        ("x86_64", "GenuineIntel") => match (number("familyid"), number("modelid")) {
            (6, 0xcf..) => 40.0,
            (6, 0x8f..) => 22.0,
            (6, 0x55..) => 10.0,
            _ => 6.0,
        },
        _ => return None,
    })
}

/// What the link of a PCI device carries in GB/s, where NCCL takes PCIe 3.0 with 16 lanes for what isn't told.
fn link_gbps(pci: &Element) -> f64 {
    let speed =
        pci.get("link_speed").and_then(number_of).filter(|speed| SPEEDS.contains(speed)).unwrap_or(8.0);
    let lanes = pci.number("link_width").filter(|lanes| (1..=32).contains(lanes)).unwrap_or(16);
    pcie_gbps(speed, lanes)
}

impl Fabric {
    /// The fabric as NCCL's topology, for `NCCL_TOPO_FILE` of one host.
    ///
    /// It has the NUMA nodes, the PCIe switches, the GPUs with their NVLinks, and the network interfaces. NCCL finds its GPUs
    /// by their PCI addresses: devices without one have one made up from `ffff:00:00.0` on, and so have switches.
    ///
    /// # Errors
    /// [`Error::Fabric`](crate::Error::Fabric) for a fabric without GPUs.
    pub fn to_nccl(&self) -> Result<String> {
        let gpus: Vec<usize> =
            (0..self.devices().len()).filter(|d| self.model(*d).kind == Kind::Gpu).collect();
        if gpus.is_empty() {
            return Err(refused(
                &format!("the fabric {:?}", self.name()),
                "NCCL's topology is of GPUs, and it has none",
            ));
        }
        let mut system = Element::new("system").with("version", 1);
        for host in 0..self.hosts().len() as u32 {
            Writing::new(self, host, &gpus).add(&mut system);
        }
        let mut out = String::new();
        system.write(&mut out, 0);
        Ok(out)
    }
}

/// A NUMA node, and what hangs on it directly or on one of its switches.
struct Node {
    numa: Option<u32>,
    holds: Vec<(Option<u32>, Element)>,
}

/// A host, while its part of the file is made.
struct Writing<'a> {
    fabric: &'a Fabric,
    host: u32,
    gpus: &'a [usize],
    /// Addresses that were made up.
    made: u32,
}

impl<'a> Writing<'a> {
    fn new(fabric: &'a Fabric, host: u32, gpus: &'a [usize]) -> Writing<'a> {
        Writing { fabric, host, gpus, made: 0 }
    }

    fn address(&mut self) -> String {
        let n = self.made;
        self.made += 1;
        format!("{:04x}:{:02x}:{:02x}.{}", 0xffff - (n >> 16), n >> 8 & 0xff, n >> 3 & 0x1f, n & 7)
    }

    fn add(mut self, system: &mut Element) {
        let nics = &self.fabric.hosts()[self.host as usize].nics;
        let on_host = |d: &&usize| self.fabric.devices()[**d].host == self.host;
        let gpus: Vec<usize> = self.gpus.iter().filter(on_host).copied().collect();
        // Known before any is needed: links name their targets.
        let addresses: BTreeMap<usize, String> = gpus
            .iter()
            .map(|d| (*d, self.fabric.devices()[*d].bus.clone().unwrap_or_else(|| self.address())))
            .collect();
        let nvswitch = self.address();
        // Each device in its switch, or directly in its node, in the order of the fabric.
        let mut nodes: Vec<Node> = Vec::new();
        let mut put = |numa: Option<u32>, switch: Option<u32>, element: Option<Element>| {
            let at = nodes.iter().position(|node| node.numa == numa).unwrap_or_else(|| {
                nodes.push(Node { numa, holds: Vec::new() });
                nodes.len() - 1
            });
            nodes[at].holds.extend(element.map(|element| (switch, element)));
        };
        for device in self.fabric.devices().iter().filter(|d| d.host == self.host) {
            if self.fabric.parts().models[device.model as usize].kind == Kind::Cpu {
                put(device.numa, None, None);
            }
        }
        for d in &gpus {
            let device = &self.fabric.devices()[*d];
            put(device.numa, device.switch, Some(self.gpu(*d, &gpus, &addresses, &nvswitch)));
        }
        for (i, nic) in nics.iter().enumerate() {
            let net = Element::new("net").with("name", &nic.name).with("dev", i);
            let net = match nic.mbit_per_s {
                Some(speed) => net.with("speed", speed).with("port", 1),
                None => net.with("port", 1),
            };
            let inner = Element { children: vec![net], ..Element::new("nic") };
            if nic.bus.is_none() && nic.switch.is_none() {
                put(nic.numa, None, Some(inner));
                continue;
            }
            let address = nic.bus.clone().unwrap_or_else(|| self.address());
            let gbps = nic.mbit_per_s.map_or(0.0, |speed| speed as f64 / 8000.0);
            let pci = pci(&address, "0x020000", None, gbps.max(self.gbps(Class::Switch)));
            put(nic.numa, nic.switch, Some(Element { children: vec![inner], ..pci }));
        }
        let several = self.fabric.hosts().len() > 1;
        for Node { numa, holds } in nodes {
            let mut cpu = Element::new("cpu");
            if several {
                cpu = cpu.with("host_hash", format!("0x{:x}", self.host + 1));
            }
            cpu = cpu.with("numaid", numa.map_or(-1, i64::from));
            cpu = self.processors(cpu, numa);
            let mut switches: Vec<(u32, Element)> = Vec::new();
            for (switch, element) in holds {
                let Some(switch) = switch else {
                    cpu.children.push(element);
                    continue;
                };
                match switches.iter_mut().find(|(known, _)| *known == switch) {
                    Some((_, holder)) => holder.children.push(element),
                    None => {
                        let mut holder = pci(&self.address(), "0x060400", None, self.gbps(Class::Numa));
                        holder.children.push(element);
                        switches.push((switch, holder));
                    }
                }
            }
            cpu.children.extend(switches.into_iter().map(|(_, holder)| holder));
            system.children.push(cpu);
        }
    }

    /// What is known of a node's processors. Their make decides what NCCL counts with between nodes, and is left out unless
    /// it is known: NCCL then looks for itself.
    fn processors(&self, cpu: Element, numa: Option<u32>) -> Element {
        let here = |d: &&Device| {
            let cpu = self.fabric.parts().models[d.model as usize].kind == Kind::Cpu;
            d.host == self.host && d.numa == numa && cpu
        };
        let Some(device) = self.fabric.devices().iter().find(here) else { return cpu };
        let cpu = match device.processors.as_deref().and_then(crate::discover::list) {
            Some(list) => cpu.with("affinity", as_mask(&list)),
            None => cpu,
        };
        let words: Vec<&str> = self.fabric.parts().models[device.model as usize].name.split(' ').collect();
        match words[..] {
            [arch @ ("x86_64" | "arm64" | "ppc64"), ref rest @ ..] => {
                let rest = PROCESSOR[1..].iter().zip(rest);
                rest.fold(cpu.with("arch", arch), |cpu, (name, value)| cpu.with(name, value))
            }
            _ => cpu,
        }
    }

    fn gbps(&self, class: Class) -> f64 {
        let parts = self.fabric.parts();
        let links = &parts.hosts[self.host as usize].links;
        let link = links.get(&class).or(parts.links.get(&class)).copied();
        link.unwrap_or_else(|| super::Link::assumed(class)).gbps
    }

    fn gpu(&self, d: usize, gpus: &[usize], addresses: &BTreeMap<usize, String>, nvswitch: &str) -> Element {
        let (device, model) = (&self.fabric.devices()[d], self.fabric.model(d));
        let class = if device.switch.is_some() { Class::Switch } else { Class::Numa };
        let ids = model.pci.as_deref().and_then(|pci| pci.split_once(':'));
        let outer = pci(&addresses[&d], "0x030200", ids, self.gbps(class));
        let at = gpus.iter().position(|gpu| *gpu == d).unwrap_or(0);
        let rank = self.gpus.iter().position(|gpu| *gpu == d).unwrap_or(0);
        let mut gpu = Element::new("gpu").with("dev", at);
        if let Some(sm) = model.sm {
            gpu = gpu.with("sm", sm);
        }
        gpu = gpu.with("rank", rank).with("gdr", 1);
        let each = gpus::nvlink_gbps(model.sm.unwrap_or(0));
        let links = |gbps: f64| ((gbps / each).round() as u32).clamp(1, 1024);
        let link = |target: &str, gbps: f64, class: &str| {
            Element::new("nvlink").with("target", target).with("count", links(gbps)).with("tclass", class)
        };
        let domain = |d: &usize| self.fabric.devices()[*d].nvlink;
        let (mine, gbps) = (domain(&d), self.gbps(Class::NvLink));
        if mine.is_some() && gpus.iter().all(|peer| domain(peer).is_none_or(|theirs| Some(theirs) == mine)) {
            gpu.children.push(link(nvswitch, gbps, "0x068000"));
        } else if mine.is_some() {
            // To NCCL all NVSwitches of a host are one: sets that are apart are joined directly.
            let peers = gpus.iter().filter(|peer| **peer != d && domain(peer) == mine);
            gpu.children.extend(peers.map(|peer| link(&addresses[peer], gbps, "0x030200")));
        }
        for pair in self.fabric.parts().pairs.iter().filter(|pair| pair.class == Class::NvLink) {
            let (a, b) = (pair.a as usize, pair.b as usize);
            let peer = if a == d { b } else { a };
            if (a == d || b == d)
                && let Some(target) = addresses.get(&peer)
            {
                gpu.children.push(link(target, pair.link.gbps, "0x030200"));
            }
        }
        Element { children: vec![gpu], ..outer }
    }
}

/// A PCI device whose link carries about so much.
fn pci(address: &str, class: &str, ids: Option<(&str, &str)>, gbps: f64) -> Element {
    let lanes = [16, 8, 4, 2, 1];
    let all = SPEEDS.iter().flat_map(|speed| lanes.iter().map(move |lanes| (*speed, *lanes)));
    let off = |(speed, lanes): &(f64, u32)| (pcie_gbps(*speed, *lanes) - gbps).abs();
    // Of several that carry the same, the one with the most lanes.
    let nearest = all.min_by(|a, b| off(a).total_cmp(&off(b)).then(b.1.cmp(&a.1))).unwrap_or((8.0, 16));
    let mut pci = Element::new("pci").with("busid", address).with("class", class);
    if let Some((vendor, device)) = ids {
        pci = pci.with("vendor", format!("0x{vendor}")).with("device", format!("0x{device}"));
    }
    pci.with("link_speed", format!("{:.1} GT/s PCIe", nearest.0)).with("link_width", nearest.1)
}

/// Words of 32 bits in hexadecimal, the highest first.
fn as_mask(list: &[usize]) -> String {
    let mut words = vec![0u32; list.iter().max().map_or(1, |last| last / 32 + 1)];
    list.iter().for_each(|bit| words[bit / 32] |= 1 << (bit % 32));
    words.iter().rev().map(|word| format!("{word:08x}")).collect::<Vec<_>>().join(",")
}
