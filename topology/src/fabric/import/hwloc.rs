//! hwloc's XML: what `lstopo --of xml` writes, of hwloc 2 and later (`hwloc2.dtd`).
//!
//! A device is made of each `NUMANode` with processors, and of each `PCIDev` that is a GPU or another accelerator. Where
//! it hangs follows from the `nodeset` of what it is in, and from the `Bridge`s around it: with a root port and two ports of
//! a switch between it and the host bridge, it is on a switch. A GPU's memory is what CUDA said
//! (`CUDAGlobalMemorySize`), and NVLinks are the matrix `NVLinkBandwidth`, in MB/s.
//!
//! `pci_link_speed` is what the link carried when hwloc looked, in GB/s: a GPU at rest may talk slowly. Of it, as much is left for
//! data as NCCL counts: see [`Fabric::from_nccl`].

use std::collections::BTreeMap;

use super::super::machine::accelerator;
use super::super::{Device, DeviceModel, Kind, clean};
use super::xml::{self, Element};
use super::{Class, Fabric, Found, MAX_THINGS, Models, Nic, assemble, bus, mask, refused};
use crate::Result;
use crate::discover::{PciKind, as_list, pci_kind};

const WHAT: &str = "hwloc's topology";

/// The part of PCIe's encoded bytes that NCCL counts as data: 12 GB/s of 15.75.
const DATA: f64 = 12.0 / 15.753846;

impl Fabric {
    /// Reads hwloc's XML, of one host.
    ///
    /// # Errors
    /// [`Error::Fabric`](crate::Error::Fabric) for what is no such file.
    pub fn from_hwloc(text: &str) -> Result<Fabric> {
        let topology = xml::parse(text).map_err(|why| refused(WHAT, why))?;
        if topology.name != "topology" {
            return Err(refused(WHAT, "it doesn't begin with <topology>"));
        }
        // hwloc 1 has no version, and memory where hwloc 2 has nodes.
        let major = topology.get("version").and_then(|v| v.split('.').next()?.parse::<u32>().ok());
        if major.is_none_or(|major| major < 2) {
            return Err(refused(WHAT, "it is of hwloc 1: make it with hwloc 2 or later"));
        }
        let mut reading = Reading::default();
        for object in topology.all("object") {
            reading.object(object, &At::default()).map_err(|why| refused(WHAT, why))?;
        }
        let (mut found, models, numbers) = reading.finish();
        for distances in topology.all("distances2").chain(topology.all("distances2hetero")) {
            if distances.get("name") == Some("NVLinkBandwidth") {
                nvlinks(distances, &numbers, &mut found).map_err(|why| refused(WHAT, why))?;
            }
        }
        assemble("hwloc's topology", vec![found], models)
    }
}

/// What an object is in.
#[derive(Clone, Default)]
struct At {
    socket: Option<u32>,
    processor: Option<String>,
    numa: Option<u32>,
    /// Bridges between it and the host bridge.
    bridges: Vec<String>,
}

#[derive(Default)]
struct Reading {
    found: Found,
    models: Models,
    accelerators: Vec<Device>,
    /// What objects are: devices by their place among accelerators, or switches of NVLinks.
    numbers: BTreeMap<u64, End>,
    sockets: BTreeMap<u32, u32>,
}

#[derive(Clone, Copy)]
enum End {
    Device(usize),
    NvSwitch,
}

impl Reading {
    fn object(&mut self, object: &Element, outer: &At) -> std::result::Result<(), String> {
        if self.found.devices.len() + self.accelerators.len() + self.found.nics.len() > MAX_THINGS {
            return Err(format!("it has more than {MAX_THINGS} devices"));
        }
        let mut at = outer.clone();
        // I/O has no nodes of its own: it is where what holds it is.
        if let Some(nodes) = object.get("nodeset").and_then(mask) {
            at.numa = if let [node] = nodes[..] { Some(node as u32) } else { None };
        }
        match object.get("type").unwrap_or_default() {
            "Package" => {
                at.socket = object.number("os_index");
                at.processor = info(object, "CPUModel").and_then(clean);
            }
            "NUMANode" => return self.node(object, &at),
            "Bridge" if object.get("bridge_type") == Some("0-1") => at.bridges.clear(),
            "Bridge" => at.bridges.push(object.get("pci_busid").unwrap_or_default().to_owned()),
            "PCIDev" => return self.pci(object, &at),
            _ => {}
        }
        object.all("object").try_for_each(|child| self.object(child, &at))
    }

    fn node(&mut self, node: &Element, at: &At) -> std::result::Result<(), String> {
        let text = node.get("cpuset").unwrap_or_default();
        let processors = mask(text).ok_or_else(|| format!("a node has cpuset = {text:.40?}, no mask"))?;
        // Memory without processors, of a GPU say.
        if processors.is_empty() {
            return Ok(());
        }
        let numa: u32 = node.number("os_index").ok_or("a node has no os_index")?;
        let name = at.processor.clone().unwrap_or_else(|| "processors".to_owned());
        let memory = node.number("local_memory").filter(|bytes| (1..=1 << 50).contains(bytes));
        let ranks = processors.len() as u32;
        let model = self.models.add(DeviceModel { ranks, ..DeviceModel::new(name, Kind::Cpu, memory) });
        let device = Device::new(format!("cpu{}", self.found.devices.len()), 0, model);
        if let Some(socket) = at.socket {
            self.sockets.entry(numa).or_insert(socket);
        }
        let (numa, processors) = (Some(numa), Some(as_list(&processors)));
        self.found.devices.push(Device { socket: at.socket, numa, processors, ..device });
        Ok(())
    }

    fn pci(&mut self, pci: &Element, at: &At) -> std::result::Result<(), String> {
        let text = pci.get("pci_busid").unwrap_or_default();
        let address =
            bus(text).ok_or_else(|| format!("a PCIDev has pci_busid = {text:.40?}, no PCI address"))?;
        // Class, and maker and number: "0302 [10de:1db8] [10de:131d] a1 00".
        let kinds = pci.get("pci_type").unwrap_or_default();
        let hex = |text: &str| u32::from_str_radix(text, 16).ok();
        let (class, rest) = kinds.split_once(" [").unwrap_or_default();
        let (vendor, rest) = rest.split_once(':').unwrap_or_default();
        let device = rest.split_once(']').unwrap_or_default().0;
        let (Some(class), Some(vendor), Some(number)) = (hex(class), hex(vendor), hex(device)) else {
            return Err(format!("the PCIDev {address} has pci_type = {kinds:.60?}"));
        };
        let kind = match pci.get("subtype") {
            Some("NVSwitch") => Some(PciKind::NvSwitch),
            _ => pci_kind(class, vendor),
        };
        let numbers = std::iter::once(pci).chain(pci.all("object")).filter_map(|o| o.number("gp_index"));
        let network = class >> 8 == 2;
        if kind.is_none() && !network {
            return Ok(());
        }
        let end = if kind == Some(PciKind::NvSwitch) {
            End::NvSwitch
        } else {
            End::Device(self.accelerators.len())
        };
        if !network {
            self.numbers.extend(numbers.map(|n: u64| (n, end)));
        }
        // A root port, the switch's port towards it, and one away from it.
        let place = match &at.bridges[..] {
            [_, up, _, ..] => Some(self.found.switch(up, at.numa)),
            _ => None,
        };
        let (switch, numa) = place.map_or((None, at.numa), |(number, numa)| (Some(number), numa));
        match kind {
            Some(PciKind::NvSwitch) => {}
            Some(kind) => {
                let gpu = kind == PciKind::Gpu;
                let told = |name| pci.all("object").find_map(|o| info(o, name));
                let kib = told("CUDAGlobalMemorySize").and_then(|kib| kib.parse::<u64>().ok());
                let bytes = kib.and_then(|kib| kib.checked_mul(1024));
                let (model, _) = accelerator((vendor, number), gpu, told("GPUModel"), bytes);
                // 0 where it isn't known.
                let gbps = pci.number::<f64>("pci_link_speed").filter(|s| (0.01..=1000.0).contains(s));
                if let Some(gbps) = gbps {
                    self.found.slower(Class::Numa, gbps * DATA);
                    if switch.is_some() {
                        self.found.slower(Class::Switch, gbps * DATA);
                    }
                }
                let name = format!("{}{}", if gpu { "gpu" } else { "accelerator" }, self.accelerators.len());
                let device = Device::new(name, 0, self.models.add(model));
                self.accelerators.push(Device { numa, switch, bus: Some(address), ..device });
            }
            None => {
                // A network has the type 2, or this bit since hwloc 3.
                let net = |o: &&Element| matches!(o.get("osdev_type"), Some("2" | "16"));
                let os = pci.all("object").find(net).or(pci.all("object").next());
                if let Some(name) = os.and_then(|os| os.get("name")).and_then(clean) {
                    self.found.nics.push(Nic { name, mbit_per_s: None, numa, switch, bus: Some(address) });
                }
            }
        }
        Ok(())
    }

    /// The accelerators after the processors, on the sockets of their nodes.
    fn finish(mut self) -> (Found, Models, BTreeMap<u64, End>) {
        let first = self.found.devices.len();
        for device in self.accelerators {
            let socket = device.numa.and_then(|numa| self.sockets.get(&numa).copied());
            self.found.devices.push(Device { socket, ..device });
        }
        for end in self.numbers.values_mut() {
            if let End::Device(at) = end {
                *at += first;
            }
        }
        (self.found, self.models, self.numbers)
    }
}

fn info<'a>(object: &'a Element, name: &str) -> Option<&'a str> {
    object.all("info").find(|info| info.get("name") == Some(name))?.get("value")
}

/// What NVLinks carry between objects: a matrix in rows, of which many values are left out for being 0.
fn nvlinks(
    distances: &Element,
    numbers: &BTreeMap<u64, End>,
    found: &mut Found,
) -> std::result::Result<(), String> {
    let words = |name: &'static str| distances.all(name).flat_map(|e| e.text.split_whitespace());
    // By their number, behind their type where objects differ in it.
    let index = |word: &str| word.rsplit(':').next()?.parse::<u64>().ok();
    let ends: Option<Vec<u64>> = words("indexes").map(index).collect();
    let values: std::result::Result<Vec<f64>, _> = words("u64values").map(str::parse::<f64>).collect();
    let (Some(ends), Ok(values)) = (ends, values) else {
        return Err("NVLinkBandwidth has what is no number".to_owned());
    };
    if ends.len() > MAX_THINGS || values.len() != ends.len() * ends.len() {
        return Err(format!("NVLinkBandwidth has {} values for {} objects", values.len(), ends.len()));
    }
    for (i, row) in values.chunks(ends.len().max(1)).enumerate() {
        for (j, mb_per_s) in row.iter().enumerate().filter(|(_, value)| **value > 0.0) {
            let gbps = mb_per_s / 1000.0;
            match (numbers.get(&ends[i]), numbers.get(&ends[j])) {
                (Some(End::Device(a)), Some(End::NvSwitch)) => {
                    *found.to_switches.entry(*a).or_default() += gbps;
                }
                // Each pair is there twice; what a device has to itself isn't a link.
                (Some(End::Device(a)), Some(End::Device(b))) if a < b => {
                    found.between.insert((*a, *b), gbps);
                }
                _ => {}
            }
        }
    }
    Ok(())
}
