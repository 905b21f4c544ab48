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
        // Base class, subclass, without the interface.
        let gpu = match class >> 8 {
            // A bridge of another kind.
            0x0680 if vendor == NVIDIA => {
                nvswitches += 1;
                continue;
            }
            // Display controllers, with and without a screen; AMD has its own as other displays or accelerators.
            0x0300 | 0x0302 if vendor == NVIDIA => true,
            0x0302 | 0x0380 | 0x1200 if vendor == AMD => true,
            0x1200 => false,
            _ => continue,
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

/// What a link of PCIe carries, in GB/s: its lanes, 8b/10b or 128b/130b encoding counted as NCCL does, of which three
/// quarters are left for data: 12 GB/s for 16 lanes of PCIe 3.0 (8 GT/s), and twice that for each later one.
pub(crate) fn pcie_gbps(gt_per_s: f64, lanes: u32) -> f64 {
    gt_per_s * f64::from(lanes) * 0.75 / 8.0
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
        assert_eq!((pcie_gbps(8.0, 16), pcie_gbps(32.0, 16)), (12.0, 48.0));
    }
}
