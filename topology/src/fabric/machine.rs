//! The machine that was discovered, as a fabric of one host.

use std::collections::BTreeMap;

use super::{Class, Device, DeviceModel, Fabric, Host, Kind, Link, Nic, Parts, gpus, nic_link};
use crate::Result;
use crate::discover::{Accelerator, Machine, Slot, as_list, pcie_gbps};

impl Fabric {
    /// The machine as a host, with a device for the processors of each NUMA node and one for each accelerator.
    ///
    /// What Linux doesn't tell is left out or assumed: [`Basis`](super::Basis) says which.
    ///
    /// # Errors
    /// None for a machine that [`Machine::read`] found; of one that was made otherwise, what [`Fabric::new`] refuses.
    ///
    /// ```
    /// use tensorwire_topology::{Fabric, discover::Machine};
    ///
    /// let here = Fabric::of_machine("here", &Machine::read("/".as_ref()))?;
    /// assert!(!here.workers().is_empty());
    /// # Ok::<(), tensorwire_topology::Error>(())
    /// ```
    pub fn of_machine(name: &str, machine: &Machine) -> Result<Fabric> {
        let mut models = Models::default();
        let mut devices = processors(name, machine, &mut models);
        let switches = switches(machine);
        let at = |slot: &Slot| match slot
            .switch
            .as_ref()
            .and_then(|bus| switches.iter().enumerate().find(|(_, (known, _))| *known == bus))
        {
            // What hangs on a switch is where it is, even if the firmware doesn't agree with itself.
            Some((number, (_, numa))) => (*numa, Some(number as u32)),
            None => (slot.numa.map(|n| n as u32), None),
        };
        let mut host = Host::new(name);
        for (i, accelerator) in machine.accelerators.iter().enumerate() {
            let Accelerator { vendor, device, gpu, name: model, memory, .. } = accelerator;
            let (model, links) = self::accelerator((*vendor, *device), *gpu, model.as_deref(), *memory);
            let kind = if accelerator.gpu { "gpu" } else { "accelerator" };
            let (numa, switch) = at(&accelerator.at);
            let socket = devices.iter().find(|d| numa.is_some() && d.numa == numa).and_then(|d| d.socket);
            let joined = links > 0 && machine.nvswitches > 0;
            if let (true, Some(sm)) = (joined, model.sm) {
                let link = Link::rated(
                    Link::assumed(Class::NvLink).alpha_us,
                    f64::from(links) * gpus::nvlink_gbps(sm),
                );
                host.slower(Class::NvLink, link);
            }
            if let (Some(gt), Some(lanes)) = (accelerator.gt_per_s, accelerator.lanes)
                && gt > 0.0
            {
                for class in [Class::Switch, Class::Numa] {
                    host.slower(class, Link::rated(Link::assumed(class).alpha_us, pcie_gbps(gt, lanes)));
                }
            }
            devices.push(Device {
                socket,
                numa,
                switch,
                nvlink: joined.then_some(0),
                bus: Some(accelerator.at.bus.clone()),
                ..Device::new(format!("{name}/{kind}{i}"), 0, models.add(model))
            });
        }
        // Where some interfaces are hardware, the others are bridges and tunnels over them.
        let hardware = machine.interfaces.iter().any(|i| i.at.is_some());
        let real = |i: &&crate::discover::Interface| match hardware {
            true => i.at.is_some(),
            false => i.mbit_per_s.is_some(),
        };
        for interface in machine.interfaces.iter().filter(real) {
            let (numa, switch) = interface.at.as_ref().map_or((None, None), at);
            host.nics.push(Nic {
                name: interface.name.clone(),
                mbit_per_s: interface.mbit_per_s,
                numa,
                switch,
                bus: interface.at.as_ref().map(|slot| slot.bus.clone()),
            });
        }
        if let Some(link) = nic_link(&host.nics) {
            host.links.insert(Class::Network, link);
        }
        // The figures are the one host's, and so the fabric's.
        let links = std::mem::take(&mut host.links);
        let (models, pairs) = (models.0, Vec::new());
        Fabric::new(Parts { name: name.to_owned(), models, hosts: vec![host], devices, links, pairs })
    }
}

impl Host {
    /// Takes over a link unless it already has a slower one.
    pub(super) fn slower(&mut self, class: Class, link: Link) {
        self.links.entry(class).and_modify(|known| *known = known.slower(link)).or_insert(link);
    }
}

/// A name that somebody else gave, as far as it can be shown.
pub(super) fn clean(name: &str) -> Option<String> {
    let name: String = name.trim().chars().filter(|c| !c.is_control()).take(60).collect();
    (!name.is_empty()).then_some(name)
}

/// The different models of devices.
#[derive(Default)]
pub(super) struct Models(pub(super) Vec<DeviceModel>);

impl Models {
    pub(super) fn add(&mut self, model: DeviceModel) -> u32 {
        let at = self.0.iter().position(|known| *known == model).unwrap_or_else(|| {
            self.0.push(model);
            self.0.len() - 1
        });
        at as u32
    }
}

/// A device for each NUMA node with processors that may be used, or one for all where nodes aren't known.
fn processors(name: &str, machine: &Machine, models: &mut Models) -> Vec<Device> {
    let (p, memory) = (&machine.processors, &machine.memory);
    let whole = memory.limit.into_iter().chain(memory.total).min();
    let on =
        |list: &[usize]| -> Vec<usize> { list.iter().copied().filter(|c| p.allowed.contains(c)).collect() };
    let mut nodes: Vec<(Option<u32>, Vec<usize>, Option<u64>)> = memory
        .nodes
        .iter()
        .map(|node| (Some(node.node as u32), on(&node.processors), node.total))
        .filter(|(_, list, _)| !list.is_empty())
        .collect();
    if nodes.is_empty() {
        nodes.push((None, p.allowed.clone(), whole));
    }
    // A limit holds for all nodes together.
    let share = memory.limit.map(|limit| limit / nodes.len() as u64);
    let mut devices = Vec::new();
    for (numa, list, total) in nodes {
        let bytes = share.into_iter().chain(total).min().filter(|bytes| *bytes > 0);
        let ranks = list.len().clamp(1, p.usable) as u32;
        let model = clean(&p.model).unwrap_or_else(|| "processors".to_owned());
        let model = DeviceModel { ranks, ..DeviceModel::new(model, Kind::Cpu, bytes) };
        let first = p.allowed.iter().position(|c| list.first() == Some(c));
        let socket = first.and_then(|at| *p.sockets.get(at)?).map(|socket| socket as u32);
        let processors = (!list.is_empty()).then(|| as_list(&list));
        let device = Device::new(format!("{name}/cpu{}", devices.len()), 0, models.add(model));
        devices.push(Device { socket, numa, processors, ..device });
    }
    devices
}

/// The PCIe switches that something hangs on, by address, each with the node of the first that does.
fn switches(machine: &Machine) -> BTreeMap<&str, Option<u32>> {
    let slots = machine.accelerators.iter().map(|a| &a.at);
    let mut found = BTreeMap::new();
    for slot in slots.chain(machine.interfaces.iter().filter_map(|i| i.at.as_ref())) {
        if let Some(switch) = &slot.switch {
            found.entry(&**switch).or_insert(slot.numa.map(|n| n as u32));
        }
    }
    found
}

/// What an accelerator is, by its maker's and its own number on PCI, and its NVLinks where switches join them. What is
/// known of it comes from whoever made the file that is read: a name, and its memory in bytes.
pub(super) fn accelerator(
    (vendor, device): (u32, u32),
    gpu: bool,
    name: Option<&str>,
    memory: Option<u64>,
) -> (DeviceModel, u32) {
    // They have 16 bits.
    let pci = format!("{:04x}:{:04x}", vendor & 0xffff, device & 0xffff);
    let (mut model, links) = match gpus::nvidia(device).filter(|_| vendor == gpus::VENDOR) {
        Some(known) => known,
        None => {
            let kind = if gpu { Kind::Gpu } else { Kind::Accelerator };
            (DeviceModel::new(pci.clone(), kind, None), 0)
        }
    };
    if let Some(name) = name.and_then(clean) {
        model.name = name;
    }
    model.memory_bytes = memory.filter(|bytes| (1..=1 << 50).contains(bytes)).or(model.memory_bytes);
    model.pci = Some(pci);
    (model, links)
}
