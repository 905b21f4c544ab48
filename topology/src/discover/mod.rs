//! What the machine is, as Linux tells in procfs and sysfs.
//!
//! Everything is read below a root, `/` but in tests. What isn't there, or isn't as expected, is left out: machines
//! and containers show different parts of it.

mod cgroup;
mod memory;
mod network;
mod pci;
mod processors;

use std::path::{Path, PathBuf};

use serde::Serialize;

pub use memory::{HugePages, Memory, Node};
pub use network::Interface;
pub use pci::{Accelerator, Slot};
pub(crate) use pci::{Kind as PciKind, is_bus, kind as pci_kind, number_of, pcie_gbps};
pub use processors::{Cache, Fingerprint, Processors};

/// A machine, as far as a process on it may use it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Machine {
    /// Its processors.
    pub processors: Processors,
    /// Its memory.
    pub memory: Memory,
    /// Its network interfaces, but for the loopback, by name.
    pub interfaces: Vec<Interface>,
    /// GPUs and other accelerators on PCI, by address.
    pub accelerators: Vec<Accelerator>,
    /// The switches between GPUs' NVLinks.
    pub nvswitches: usize,
}

impl Machine {
    /// The machine whose procfs and sysfs are below `root`: `/`, or a copy of some of it.
    ///
    /// ```
    /// let here = tensorwire_topology::discover::Machine::read("/".as_ref());
    /// assert!(here.processors.usable >= 1);
    /// ```
    pub fn read(root: &Path) -> Machine {
        let root = Root(root);
        let (accelerators, nvswitches) = pci::accelerators(root);
        Machine {
            processors: Processors::read(root),
            memory: Memory::read(root),
            interfaces: Interface::all(root),
            accelerators,
            nvswitches,
        }
    }
}

/// Where procfs and sysfs are.
#[derive(Clone, Copy)]
struct Root<'a>(&'a Path);

/// The most that is read of a file: `cpuinfo` repeats itself for each processor, and takes time.
const MOST: u64 = 64 << 10;

impl Root<'_> {
    fn path(self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.0.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The beginning of a file, without white space around it.
    fn read(self, path: impl AsRef<Path>) -> Option<String> {
        use std::io::Read;
        let mut bytes = Vec::new();
        // Some say only when they are read that there is nothing to read.
        std::fs::File::open(self.path(path)).ok()?.take(MOST).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    fn number<T: std::str::FromStr>(self, path: impl AsRef<Path>) -> Option<T> {
        self.read(path)?.parse().ok()
    }

    /// Names in a folder that are `prefix` and a number, by that number.
    fn numbered(self, folder: impl AsRef<Path>, prefix: &str) -> Vec<usize> {
        let names = self.names(folder);
        let mut numbers: Vec<usize> =
            names.iter().filter_map(|name| name.strip_prefix(prefix)?.parse().ok()).collect();
        numbers.sort_unstable();
        numbers
    }

    fn names(self, folder: impl AsRef<Path>) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(folder)).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort_unstable();
        names
    }
}

/// The value behind `name:` in a file of such lines.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut values = text.lines().filter_map(|line| line.split_once(':'));
    values.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim())
}

/// A size that is a number of `kB`.
fn kilobytes(text: &str) -> Option<u64> {
    text.strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The most processors that a list may name: more than Linux has.
const MOST_PROCESSORS: usize = 1 << 16;

/// The numbers in a list such as `0-3,8,10-11`.
pub(crate) fn list(text: &str) -> Option<Vec<usize>> {
    let mut numbers = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        if last >= MOST_PROCESSORS {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

/// Numbers in ascending order as a list such as `0-3,8`.
pub fn as_list(numbers: &[usize]) -> String {
    let mut text = String::new();
    for run in numbers.chunk_by(|a, b| a + 1 == *b) {
        let comma = if text.is_empty() { "" } else { "," };
        text += &match run {
            [one] => format!("{comma}{one}"),
            _ => format!("{comma}{}-{}", run[0], run[run.len() - 1]),
        };
    }
    text
}

#[cfg(test)]
mod machines;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lists() {
        assert_eq!(list("0-3,8,10-11\n").unwrap(), [0, 1, 2, 3, 8, 10, 11]);
        assert_eq!(list("").unwrap(), [0; 0]);
        for bad in ["a", "1-", "-1", "1-x", "0-99999999999", "0-4294967295", "1;2"] {
            assert_eq!(list(bad), None, "{bad}");
        }
        assert_eq!(as_list(&[0, 1, 2, 8, 10, 11]), "0-2,8,10-11");
        assert_eq!(as_list(&[]), "");
    }

    proptest! {
        #[test]
        fn lists_round_trip(numbers in proptest::collection::btree_set(0usize..500, 0..40)) {
            let numbers: Vec<usize> = numbers.into_iter().collect();
            prop_assert_eq!(list(&as_list(&numbers)).unwrap(), numbers);
        }

        #[test]
        fn no_text_is_a_panic(text in ".{0,40}") {
            let _ = (list(&text), kilobytes(&text), field(&text, "a"));
        }
    }

    #[test]
    fn fields() {
        let text = "processor\t: 0\nmodel name\t: Some CPU: fast\nmodel name : other\n\nnonsense\n";
        assert_eq!(field(text, "model name").unwrap(), "Some CPU: fast");
        assert_eq!(field(text, "flags"), None);
        assert_eq!(kilobytes("12 kB"), Some(12288));
        assert_eq!(kilobytes("12 MB"), None);
    }
}
