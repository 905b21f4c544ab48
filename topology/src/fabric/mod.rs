//! What a plan runs on: hosts, devices, and what messages between them cost.
//!
//! A [`Fabric`] is checked data. [`Parts`] is the same as plain data, to be filled by hand or from a file; its JSON
//! is schema [`SCHEMA`]. Links are kept by [`Class`], the smallest thing that holds both ends, and not by pair, so
//! that 1,024 devices take a few kilobytes and a look-up takes a few comparisons:
//!
//! ```text
//! device < card < nvlink < switch < numa < socket < host < rack < pod < network      nearest to farthest
//! ```
//!
//! Racks and pods are the tiers of a network, where it has any: a leaf switch and what is below one spine, an island of
//! a cluster, a building. A tier without a link of its own is as the next farther one.
//!
//! A fabric has a link for each class, a host may have its own, and single pairs may differ ([`Pair`]), as those do
//! whose devices are joined by more NVLinks than others'.
//!
//! A message of `B` bytes takes `alpha_us + B / (1000 gbps)` microseconds (Hockney, "The communication challenge for
//! MPP", 1994), with `gbps` in 1e9 bytes a second.
//!
//! ```
//! use tensorwire_topology::fabric::{Class, Device, DeviceModel, Fabric, Host, Kind, Link, Parts};
//!
//! // Two hosts of two GPUs each.
//! let device = |host, name: &str| Device { numa: Some(0), ..Device::new(name, host, 0) };
//! let fabric = Fabric::new(Parts {
//!     name: "two hosts".to_owned(),
//!     models: vec![DeviceModel::new("gpu", Kind::Gpu, Some(80 << 30))],
//!     hosts: vec![Host::new("a"), Host::new("b")],
//!     devices: vec![device(0, "a0"), device(0, "a1"), device(1, "b0"), device(1, "b1")],
//!     links: [(Class::Numa, Link::rated(3.0, 20.0)), (Class::Network, Link::rated(10.0, 12.5))].into(),
//!     pairs: vec![],
//! })?;
//! assert_eq!(fabric.between(0, 1).class, Class::Numa);
//! assert_eq!(fabric.between(1, 2).us(12_500), 11.0);
//! assert_eq!(fabric.islands(&fabric.all(), Class::Host), [[0, 1], [2, 3]]);
//! assert_eq!(Fabric::from_json(&fabric.to_json())?, fabric);
//! # Ok::<(), tensorwire_topology::Error>(())
//! ```

mod check;
mod describe;
mod gpus;
mod import;
mod json;
mod link;
mod load;
mod lookup;
mod machine;
mod svg;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use import::Format;
pub use link::{Basis, Class, Hop, Link};
use machine::{Models, clean};

/// The schema that a fabric's JSON names.
pub const SCHEMA: &str = "tensorwire.fabric/v1";

/// The most hosts, and the most devices, that a fabric may have.
pub const MAX_DEVICES: usize = 65_536;

/// The most devices that a fabric may have in which single pairs have their own links.
pub const MAX_PAIRED_DEVICES: usize = 1_024;

/// What a plan runs on. [`Fabric::new`] makes one.
#[derive(Clone, Debug, PartialEq)]
pub struct Fabric {
    parts: Parts,
    index: lookup::Index,
}

/// A fabric as plain data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parts {
    /// What people call it.
    pub name: String,
    /// The kinds of devices.
    pub models: Vec<DeviceModel>,
    /// The hosts. Others name them by their place here.
    pub hosts: Vec<Host>,
    /// The devices, host by host. Others name them by their place here.
    pub devices: Vec<Device>,
    /// What messages cost, by the smallest thing that holds both ends.
    pub links: BTreeMap<Class, Link>,
    /// Pairs of devices with a link of their own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pairs: Vec<Pair>,
}

/// A computer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Its name, which no other host has.
    pub name: String,
    /// The rack, of the whole fabric: hosts of one reach each other by [`Class::Rack`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rack: Option<u32>,
    /// The pod, of the whole fabric: hosts of one reach each other by [`Class::Pod`], or nearer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<u32>,
    /// Its network interfaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<Nic>,
    /// What differs on this host from the fabric's links. Between hosts of different links, the slower counts.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub links: BTreeMap<Class, Link>,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nic {
    /// Its name.
    pub name: String,
    /// Its speed in megabits a second, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mbit_per_s: Option<u64>,
    /// The NUMA node that it hangs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa: Option<u32>,
    /// The PCIe switch that it hangs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switch: Option<u32>,
    /// Its PCI address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bus: Option<String>,
}

/// A kind of device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceModel {
    /// What it calls itself.
    pub name: String,
    /// What computes in it.
    pub kind: Kind,
    /// Its memory, in bytes, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// What it reads of its memory, in GB/s (1e9 bytes a second), where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_gbps: Option<f64>,
    /// What it computes at most, where it is known.
    #[serde(default, skip_serializing_if = "Tflops::is_empty")]
    pub tflops: Tflops,
    /// How many ranks it can run at once: the cores of processors, 1 of others.
    #[serde(default = "one")]
    pub ranks: u32,
    /// Its maker's and its own number on PCI, such as `10de:2330`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci: Option<String>,
    /// The compute capability of an NVIDIA GPU, such as 90 for 9.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sm: Option<u32>,
}

fn one() -> u32 {
    1
}

/// What computes in a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The processors of a socket or of a NUMA node.
    Cpu,
    /// A GPU.
    Gpu,
    /// Another accelerator.
    Accelerator,
}

/// Dense matrix products, in 1e12 operations a second, by the type of their operands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tflops {
    /// f32, or what stands in for it in matrix units.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub f32: Option<f64>,
    /// f16 and bf16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub f16: Option<f64>,
    /// Either 8-bit float.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub f8: Option<f64>,
    /// 8-bit integers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub i8: Option<f64>,
}

/// A device, and what it hangs on. Numbers are those that the host gives; `None` is what isn't known or isn't there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Its name, which no other device has.
    pub name: String,
    /// Its host, as a place in [`Parts::hosts`].
    pub host: u32,
    /// Its kind, as a place in [`Parts::models`].
    pub model: u32,
    /// The processor socket, of its host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<u32>,
    /// The NUMA node, of its host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numa: Option<u32>,
    /// The PCIe switch, of its host: the outermost one where they are cascaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switch: Option<u32>,
    /// The card, of its host, where cards hold several devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub card: Option<u32>,
    /// The set of devices, of the whole fabric, that reach each other by NVLink all alike: it may span hosts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvlink: Option<u32>,
    /// Its PCI address, such as `0000:07:00.0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bus: Option<String>,
    /// Its processors as Linux numbers them, such as `0-31,64-95`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub processors: Option<String>,
}

/// A link of two devices that is another than their class's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pair {
    /// The lower of the devices.
    pub a: u32,
    /// The higher of them.
    pub b: u32,
    /// What joins them.
    pub class: Class,
    /// What messages cost between them.
    pub link: Link,
}

impl Host {
    /// A host without network interfaces and without links of its own.
    pub fn new(name: impl Into<String>) -> Host {
        Host { name: name.into(), rack: None, pod: None, nics: Vec::new(), links: BTreeMap::new() }
    }

    /// The nearest tier of the network that holds two hosts.
    fn tier(&self, other: &Host) -> Class {
        let same = |of: fn(&Host) -> Option<u32>| of(self).is_some() && of(self) == of(other);
        if same(|h| h.rack) {
            Class::Rack
        } else if same(|h| h.pod) {
            Class::Pod
        } else {
            Class::Network
        }
    }
}

impl DeviceModel {
    /// A kind of device of unknown speed, for one rank.
    pub fn new(name: impl Into<String>, kind: Kind, memory_bytes: Option<u64>) -> DeviceModel {
        let (memory_gbps, tflops) = (None, Tflops::default());
        DeviceModel {
            name: name.into(),
            kind,
            memory_bytes,
            memory_gbps,
            tflops,
            ranks: 1,
            pci: None,
            sm: None,
        }
    }
}

impl Device {
    /// A device of which nothing is known but its host and its kind.
    pub fn new(name: impl Into<String>, host: u32, model: u32) -> Device {
        let (socket, numa, switch, card, nvlink) = (None, None, None, None, None);
        let (bus, processors) = (None, None);
        Device { name: name.into(), host, model, socket, numa, switch, card, nvlink, bus, processors }
    }
}

/// The network as a host's fastest interface is rated, with a latency that is usual.
fn nic_link(nics: &[Nic]) -> Option<Link> {
    let fastest = nics.iter().filter_map(|nic| nic.mbit_per_s).max()?;
    Some(Link::rated(Link::assumed(Class::Network).alpha_us, fastest as f64 / 8000.0))
}

impl Parts {
    /// What messages cost by a class of links on a host, as somebody gave it: a tier of the network that nobody did is
    /// as the next farther one.
    fn given(&self, host: &Host, class: Class) -> Option<Link> {
        let of = |class: Class| host.links.get(&class).or(self.links.get(&class)).copied();
        let farther = Class::TIERS.into_iter().filter(|tier| class.is_network() && *tier > class);
        of(class).or_else(|| farther.into_iter().find_map(of))
    }

    /// The same, or what is usual.
    fn link(&self, host: &Host, class: Class) -> Link {
        self.given(host, class).unwrap_or_else(|| Link::assumed(class))
    }
}

impl Tflops {
    fn is_empty(&self) -> bool {
        *self == Tflops::default()
    }

    /// What is reached with operands of `bits`, 8, 16 or 32: a device without a figure for narrow operands computes
    /// with wider ones.
    pub fn of_bits(&self, bits: u32) -> Option<f64> {
        let narrow = if bits <= 8 { self.f8.or(self.i8) } else { None };
        let half = if bits <= 16 { self.f16 } else { None };
        narrow.or(half).or(self.f32)
    }
}

impl Fabric {
    /// Checks that parts are a fabric.
    ///
    /// # Errors
    /// [`Error::Fabric`](crate::Error::Fabric) for what contradicts itself, for numbers that make no sense, and for
    /// devices that can't reach each other.
    pub fn new(parts: Parts) -> crate::Result<Fabric> {
        check::parts(&parts)?;
        let index = lookup::Index::new(&parts);
        Ok(Fabric { parts, index })
    }

    /// The plain data.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// The plain data, to be changed and made a fabric again.
    pub fn into_parts(self) -> Parts {
        self.parts
    }

    /// What people call it.
    pub fn name(&self) -> &str {
        &self.parts.name
    }

    /// The hosts.
    pub fn hosts(&self) -> &[Host] {
        &self.parts.hosts
    }

    /// The devices, host by host.
    pub fn devices(&self) -> &[Device] {
        &self.parts.devices
    }

    /// What a device is.
    ///
    /// # Panics
    /// If there is no such device.
    pub fn model(&self, device: usize) -> &DeviceModel {
        &self.parts.models[self.parts.devices[device].model as usize]
    }

    /// All devices.
    pub fn all(&self) -> Vec<usize> {
        (0..self.parts.devices.len()).collect()
    }

    /// The devices that a model would run on: GPUs and accelerators, or the processors where there are no such.
    pub fn workers(&self) -> Vec<usize> {
        let of = |processors: bool| -> Vec<usize> {
            (0..self.parts.devices.len())
                .filter(|d| (self.model(*d).kind == Kind::Cpu) == processors)
                .collect()
        };
        let accelerators = of(false);
        if accelerators.is_empty() { of(true) } else { accelerators }
    }
}
