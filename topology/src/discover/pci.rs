//! GPUs and other accelerators on PCI, and where devices hang in its tree.
//!
//! Linux lays the tree out as folders: `/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0/...` are the root complex, a
//! root port, and what is behind it. A PCIe switch is an upstream port with downstream ports behind it, so that a device
//! with at least two bridges between it and its root port hangs on one.

use std::path::Path;

use serde::Serialize;

use super::Root;

const FOLDER: &str = "/sys/bus/pci/devices";

const NVIDIA: u32 = 0x10de;
const AMD: u32 = 0x1002;

/// The most devices that are looked at.
const MOST: usize = 4096;

/// A GPU or another accelerator.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Accelerator {
    /// Where it is.
    pub at: Slot,
    /// Who made it, by the number in PCI's register: 0x10de is NVIDIA.
    pub vendor: u32,
    /// Which one it is, by its maker's number.
    pub device: u32,
    /// Whether it is a GPU.
    pub gpu: bool,
    /// What its driver calls it.
    pub name: Option<String>,
    /// Its memory in bytes, where its driver tells.
    pub memory: Option<u64>,
    /// The fastest that it and the port it hangs on can talk, in transfers a second for each lane, of 1e9.
    pub gt_per_s: Option<f64>,
    /// The lanes that both have.
    pub lanes: Option<u32>,
}

/// Where in the machine a PCI device is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Slot {
    /// Its PCI address.
    pub bus: String,
    /// The NUMA node that it is nearest to.
    pub numa: Option<usize>,
    /// The address of the PCIe switch that it hangs on, the outermost of several.
    pub switch: Option<String>,
}

/// What NVIDIA's drivers and PCI say: accelerators in the order of their addresses, and how many NVSwitches there are.
pub(super) fn accelerators(root: Root<'_>) -> (Vec<Accelerator>, usize) {
    let (mut found, mut nvswitches) = (Vec::new(), 0);
    for bus in root.names(FOLDER).into_iter().take(MOST) {
        let number = |name| hex(root.read(format!("{FOLDER}/{bus}/{name}"))?);
        let (Some(class), Some(vendor), Some(device)) = (number("class"), number("vendor"), number("device"))
        else {
            continue;
        };
        // Without the interface.
        let gpu = match kind(class >> 8, vendor) {
            Some(Kind::Gpu) => true,
            Some(Kind::Accelerator) => false,
            Some(Kind::NvSwitch) => {
                nvswitches += 1;
                continue;
            }
            None => continue,
        };
        let Some(at) = Slot::of(root, Path::new(&format!("{FOLDER}/{bus}"))) else { continue };
        let driver = root.read(format!("/proc/driver/nvidia/gpus/{bus}/information")).unwrap_or_default();
        let least = |name: &str| {
            let of = |folder: String| number_of(&root.read(folder)?);
            let (own, port) = (of(format!("{FOLDER}/{bus}/{name}")), of(format!("{FOLDER}/{bus}/../{name}")));
            own.map(|own| port.map_or(own, |port| port.min(own)))
        };
        found.push(Accelerator {
            at,
            vendor,
            device,
            gpu,
            name: super::field(&driver, "Model").map(str::to_owned),
            memory: root.number(format!("{FOLDER}/{bus}/mem_info_vram_total")),
            gt_per_s: least("max_link_speed"),
            lanes: least("max_link_width").map(|lanes| lanes as u32).filter(|lanes| *lanes > 0),
        });
    }
    (found, nvswitches)
}

impl Slot {
    /// Where the device is whose folder, or link to it, this is.
    pub(super) fn of(root: Root<'_>, folder: &Path) -> Option<Slot> {
        let real = std::fs::canonicalize(root.path(folder)).ok()?;
        let names: Vec<&str> = real.iter().filter_map(|name| name.to_str()).collect();
        // A driver's folder may lie within the device's.
        let last = names.iter().rposition(|name| is_bus(name))?;
        let first = names[..=last].iter().rposition(|name| !is_bus(name)).map_or(0, |at| at + 1);
        let path = &names[first..=last];
        // The root port, the switch's port towards it and one away from it, and the device.
        let switch = if path.len() > 3 { Some(path[1].to_owned()) } else { None };
        let numa = root.number::<i64>(format!("{FOLDER}/{}/numa_node", names[last]));
        // -1 where the firmware doesn't tell.
        let numa = numa.and_then(|node| usize::try_from(node).ok());
        Some(Slot { bus: names[last].to_owned(), numa, switch })
    }
}

/// Whether this is a PCI address as Linux writes it, `0000:07:00.0`.
pub(crate) fn is_bus(text: &str) -> bool {
    let groups: Vec<&str> = text.split([':', '.']).collect();
    let separators: String = text.matches([':', '.']).collect();
    let hex = |group: &&str| group.chars().all(|c| matches!(c, '0'..='9' | 'a'..='f'));
    let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    separators == "::." && matches!(lengths[..], [4..=8, 2, 2, 1]) && groups.iter().all(hex)
}

fn hex(text: String) -> Option<u32> {
    u32::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// The number that a text such as `16.0 GT/s PCIe` begins with.
pub(crate) fn number_of(text: &str) -> Option<f64> {
    text.split(' ').next()?.parse::<f64>().ok().filter(|n| n.is_finite() && *n >= 0.0)
}

/// What a link of PCIe carries in GB/s, as NCCL counts it (`src/graph/topo.cc`): three quarters of its bits, and three
/// fifths of those of PCIe 1 and 2, which send ten bits for eight. That is 12 GB/s for 16 lanes of PCIe 3.0 (8 GT/s), and
/// twice as much for each later one.
pub(crate) fn pcie_gbps(gt_per_s: f64, lanes: u32) -> f64 {
    let part = if gt_per_s > 5.0 { 0.75 } else { 0.6 };
    gt_per_s * f64::from(lanes) * part / 8.0
}

/// What a PCI device is, by its base class and subclass and who made it, as far as it counts here.
pub(crate) fn kind(class: u32, vendor: u32) -> Option<Kind> {
    match class {
        // A bridge of another kind.
        0x0680 if vendor == NVIDIA => Some(Kind::NvSwitch),
        // Display controllers, with and without a screen; AMD has its own as other displays or accelerators.
        0x0300 | 0x0302 if vendor == NVIDIA => Some(Kind::Gpu),
        0x0302 | 0x0380 | 0x1200 if vendor == AMD => Some(Kind::Gpu),
        0x1200 => Some(Kind::Accelerator),
        _ => None,
    }
}

/// What a PCI device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Gpu,
    Accelerator,
    NvSwitch,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert!(is_bus("0000:07:00.0") && is_bus("10000:e1:1f.7") && is_bus("00000000:07:00.0"));
        for bad in
            ["", "0000:07:00", "0000:07:0g.0", "pci0000:00", "0000.07:00:0", "0000:07:00.0.0", "000:07:00.0"]
        {
            assert!(!is_bus(bad), "{bad}");
        }
    }

    #[test]
    fn speeds() {
        assert_eq!(number_of("16.0 GT/s PCIe"), Some(16.0));
        assert_eq!(number_of("Unknown"), None);
        assert_eq!(number_of("-1"), None);
        assert_eq!((pcie_gbps(2.5, 16), pcie_gbps(8.0, 16), pcie_gbps(32.0, 16)), (3.0, 12.0, 48.0));
    }
}
