//! The limits of the control groups that a process is in, of either version.

use std::path::{Path, PathBuf};

use super::Root;

/// The folders of this process's groups that a controller may limit, from its own up to the topmost that is seen.
fn folders(root: Root<'_>, controller: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for line in root.read("/proc/self/cgroup").unwrap_or_default().lines() {
        // ID:CONTROLLERS:PATH; version 2 has no controllers here.
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let base = match controllers {
            "" => PathBuf::from("/sys/fs/cgroup"),
            some if some.split(',').any(|c| c == controller) => Path::new("/sys/fs/cgroup").join(controller),
            _ => continue,
        };
        let path = path.trim_start_matches('/');
        found.extend(Path::new(path).ancestors().map(|group| base.join(group)));
    }
    found
}

/// Processors that may be used on average, by the tightest quota.
pub(super) fn processors(root: Root<'_>) -> Option<f64> {
    let quotas = folders(root, "cpu").into_iter().filter_map(|folder| {
        let (quota, period) = match root.read(folder.join("cpu.max")) {
            Some(max) => {
                let (quota, period) = max.split_once(' ')?;
                (quota.parse::<f64>().ok()?, period.parse::<f64>().ok()?)
            }
            // Without a quota it is -1.
            None => (
                root.number(folder.join("cpu.cfs_quota_us"))?,
                root.number(folder.join("cpu.cfs_period_us"))?,
            ),
        };
        Some(quota / period).filter(|n| *n > 0.0 && n.is_finite())
    });
    quotas.min_by(f64::total_cmp)
}

/// Bytes of memory that may be used, by the tightest limit.
pub(super) fn memory(root: Root<'_>) -> Option<u64> {
    // Without a limit, version 1 has a number that no machine's memory reaches.
    const NONE: u64 = 1 << 60;
    let limits = folders(root, "memory").into_iter().filter_map(|folder| {
        root.number(folder.join("memory.max")).or_else(|| root.number(folder.join("memory.limit_in_bytes")))
    });
    limits.filter(|limit| *limit < NONE).min()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discover::processors::tests::tree;

    #[test]
    fn version_2_limits_count_from_the_root_down() {
        let dir = tree(&[
            ("proc/self/cgroup", "0::/job/step\n"),
            ("sys/fs/cgroup/job/step/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/job/cpu.max", "250000 100000\n"),
            ("sys/fs/cgroup/job/step/memory.max", "2147483648\n"),
            ("sys/fs/cgroup/job/memory.max", "max\n"),
        ]);
        let root = Root(dir.path());
        assert_eq!((processors(root), memory(root)), (Some(2.5), Some(2 << 30)));
    }

    #[test]
    fn version_1_limits_are_by_controller() {
        let dir = tree(&[
            ("proc/self/cgroup", "4:memory:/a\n2:cpu,cpuacct:/b\n0::/\n"),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1000\n"),
            ("sys/fs/cgroup/cpu/b/cpu.cfs_quota_us", "150000\n"),
            ("sys/fs/cgroup/cpu/b/cpu.cfs_period_us", "100000\n"),
            ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n"),
            ("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"),
        ]);
        let root = Root(dir.path());
        assert_eq!((processors(root), memory(root)), (Some(1.5), Some(1000)));
    }

    #[test]
    fn nothing_and_nonsense_are_no_limit() {
        let dir = tree(&[
            ("proc/self/cgroup", "nonsense\n0::/x\n"),
            ("sys/fs/cgroup/x/cpu.max", "0 0\n"),
            ("sys/fs/cgroup/cpu.max", "many\n"),
            ("sys/fs/cgroup/memory.max", "-5\n"),
        ]);
        let root = Root(dir.path());
        assert_eq!((processors(root), memory(root)), (None, None));
    }
}
