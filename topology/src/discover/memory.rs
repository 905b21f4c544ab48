//! Memory: nodes, limits, huge pages, shared memory.

use serde::Serialize;

use super::{Root, cgroup, field, kilobytes, list};

/// The memory of a machine. Sizes are bytes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Memory {
    /// All of it.
    pub total: Option<u64>,
    /// What can be used without swapping.
    pub available: Option<u64>,
    /// The most that the control groups let this process use, where they limit it.
    pub limit: Option<u64>,
    /// The NUMA nodes.
    pub nodes: Vec<Node>,
    /// When memory comes in huge pages.
    pub huge_pages: HugePages,
    /// The size of `/dev/shm`. Nothing here needs it; MPI and NCCL do.
    pub dev_shm: Option<u64>,
}

/// A NUMA node.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Node {
    /// Its number.
    pub node: usize,
    /// Its processors.
    pub processors: Vec<usize>,
    /// Its memory.
    pub total: Option<u64>,
    /// What of it is free.
    pub free: Option<u64>,
    /// How far its memory is from the processors of each node, by the firmware: 10 is the node itself.
    pub distances: Vec<u32>,
}

/// When memory comes in huge pages: `always`, `never`, or as the program (`madvise`, `advise`) asks.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HugePages {
    /// A process's own memory.
    pub anonymous: Option<String>,
    /// Memory that processes share.
    pub shared: Option<String>,
}

impl Memory {
    pub(super) fn read(root: Root<'_>) -> Memory {
        let info = root.read("/proc/meminfo").unwrap_or_default();
        let size = |name| kilobytes(field(&info, name)?);
        Memory {
            total: size("MemTotal"),
            available: size("MemAvailable"),
            limit: cgroup::memory(root),
            nodes: Node::all(root),
            huge_pages: HugePages::read(root),
            dev_shm: dev_shm(&root.read("/proc/mounts").unwrap_or_default(), size("MemTotal")),
        }
    }
}

impl Node {
    fn all(root: Root<'_>) -> Vec<Node> {
        const NODES: &str = "/sys/devices/system/node";
        let node = |node: usize| {
            let info = root.read(format!("{NODES}/node{node}/meminfo")).unwrap_or_default();
            // Lines begin with "Node 0 ".
            let size = |name: &str| kilobytes(field(&info, &format!("Node {node} {name}"))?);
            let processors = root.read(format!("{NODES}/node{node}/cpulist"));
            Node {
                node,
                processors: processors.and_then(|text| list(&text)).unwrap_or_default(),
                total: size("MemTotal"),
                free: size("MemFree"),
                distances: distances(&root.read(format!("{NODES}/node{node}/distance")).unwrap_or_default()),
            }
        };
        root.numbered(NODES, "node").into_iter().map(node).collect()
    }
}

fn distances(text: &str) -> Vec<u32> {
    text.split_whitespace().map_while(|n| n.parse().ok()).collect()
}

impl HugePages {
    fn read(root: Root<'_>) -> HugePages {
        let setting = |name| {
            let text = root.read(format!("/sys/kernel/mm/transparent_hugepage/{name}"))?;
            // The one in brackets is in force.
            Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
        };
        HugePages { anonymous: setting("enabled"), shared: setting("shmem_enabled") }
    }
}

/// The size of `/dev/shm`, by the mounts: half of the memory where none is given.
fn dev_shm(mounts: &str, total: Option<u64>) -> Option<u64> {
    // The last one hides the others.
    let options = mounts.lines().rev().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        match (words.next()?, words.next()?, words.next()?) {
            ("/dev/shm", "tmpfs", options) => Some(options),
            _ => None,
        }
    })?;
    let Some(size) = options.split(',').find_map(|option| option.strip_prefix("size=")) else {
        return total.map(|total| total / 2);
    };
    match size.strip_suffix('k') {
        Some(kilobytes) => kilobytes.parse::<u64>().ok()?.checked_mul(1024),
        None => size.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discover::processors::tests::tree;

    #[test]
    fn two_nodes_with_their_memory() {
        let dir = tree(&[
            ("proc/meminfo", "MemTotal:       1000 kB\nMemFree: 1 kB\nMemAvailable:    400 kB\n"),
            ("proc/mounts", "tmpfs /dev/shm tmpfs rw,nosuid 0 0\n"),
            ("sys/devices/system/node/node0/cpulist", "0-1\n"),
            ("sys/devices/system/node/node0/distance", "10 21 31\n"),
            ("sys/devices/system/node/node0/meminfo", "Node 0 MemTotal: 600 kB\nNode 0 MemFree: 30 kB\n"),
            ("sys/devices/system/node/node10/cpulist", "\n"),
            ("sys/devices/system/node/node2/cpulist", "2-3\n"),
            ("sys/devices/system/node/online", "0,2,10\n"),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
            (
                "sys/kernel/mm/transparent_hugepage/shmem_enabled",
                "always within_size advise [never] deny force\n",
            ),
        ]);
        let m = Memory::read(Root(dir.path()));
        assert_eq!(
            (m.total, m.available, m.limit, m.dev_shm),
            (Some(1_024_000), Some(409_600), None, Some(512_000))
        );
        assert_eq!(m.nodes.iter().map(|n| n.node).collect::<Vec<_>>(), [0, 2, 10]);
        assert_eq!(
            (m.nodes[0].total, m.nodes[0].free, m.nodes[1].total),
            (Some(614_400), Some(30_720), None)
        );
        assert_eq!((&*m.nodes[1].processors, m.nodes[2].processors.len()), (&[2, 3][..], 0));
        assert_eq!((&*m.nodes[0].distances, m.nodes[1].distances.len()), (&[10, 21, 31][..], 0));
        assert_eq!(m.huge_pages.anonymous.as_deref(), Some("madvise"));
        assert_eq!(m.huge_pages.shared.as_deref(), Some("never"));
    }

    #[test]
    fn the_last_mount_of_dev_shm_counts() {
        let mounts = "tmpfs /dev/shm tmpfs rw,size=64k 0 0\nshm /dev/shm tmpfs rw,relatime,size=65536k 0 0\n";
        assert_eq!(dev_shm(mounts, None), Some(64 << 20));
        assert_eq!(dev_shm("tmpfs /dev/shm tmpfs size=1000 0 0", None), Some(1000));
        assert_eq!(dev_shm("tmpfs /dev/shm tmpfs size=big 0 0\nx", Some(1)), None);
        assert_eq!(dev_shm("", Some(10)), None);
    }

    #[test]
    fn an_empty_tree_says_nothing() {
        let m = Memory::read(Root(tree(&[]).path()));
        assert!(
            m.total.is_none() && m.nodes.is_empty() && m.huge_pages.shared.is_none() && m.dev_shm.is_none()
        );
    }
}
