//! How much memory could still be had. The kernel tells, in files.

use std::fs::read_to_string;
use std::path::Path;

/// Bytes that could still be had: on the machine, or under the limit of a control group if that is less.
pub(super) fn available_memory() -> Option<u64> {
    below(Path::new("/"))
}

fn below(root: &Path) -> Option<u64> {
    let info = read_to_string(root.join("proc/meminfo")).ok()?;
    let mut least = number(&info, "MemAvailable:")?.checked_mul(1024)?;
    // A line for each hierarchy of control groups: its number, its controllers, and this process's group in it.
    let groups = read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    for line in groups.lines() {
        let Some((controllers, path)) = line.split_once(':').and_then(|(_, rest)| rest.split_once(':'))
        else {
            continue;
        };
        let (base, files) = match controllers {
            "" => ("sys/fs/cgroup", &V2),
            some if some.split(',').any(|c| c == "memory") => ("sys/fs/cgroup/memory", &V1),
            _ => continue,
        };
        let base = root.join(base);
        let group = base.join(path.trim_start_matches('/'));
        // Each group is held to the limits of those that it lies in. In a container the path may be that of the
        // host, which isn't there, and the top one the container's.
        for group in group.ancestors().take_while(|g| g.starts_with(&base)) {
            least = least.min(files.left(group).unwrap_or(u64::MAX));
        }
    }
    Some(least)
}

/// What the files of a control group are called in one version of the interface.
struct Files {
    limit: &'static str,
    used: &'static str,
    /// In `memory.stat`: what is kept of files on disk, which goes when memory is asked for.
    cache: [&'static str; 2],
}

const V1: Files = Files {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    cache: ["total_inactive_file", "total_active_file"],
};
const V2: Files =
    Files { limit: "memory.max", used: "memory.current", cache: ["inactive_file", "active_file"] };

impl Files {
    /// Bytes that a group could still take; `None` without a limit.
    fn left(&self, group: &Path) -> Option<u64> {
        let read = |name: &str| read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
        // Without a limit, `memory.max` reads "max".
        let (limit, used) = (read(self.limit)?, read(self.used)?);
        let stat = read_to_string(group.join("memory.stat")).unwrap_or_default();
        let cache = self.cache.iter().filter_map(|name| number(&stat, name)).sum::<u64>();
        Some(limit.saturating_sub(used.saturating_sub(cache)))
    }
}

/// The number behind `name` at the start of a line.
fn number(text: &str, name: &str) -> Option<u64> {
    let mut fields = text.lines().map(str::split_whitespace);
    fields.find_map(|mut line| (line.next() == Some(name)).then(|| line.next())?)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is available where the kernel's files read so.
    fn with(files: &[(&str, &str)]) -> Option<u64> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        below(root.path())
    }

    const MACHINE: (&str, &str) = ("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n");

    #[test]
    fn the_tightest_limit_counts() {
        assert_eq!(with(&[]), None);
        assert_eq!(with(&[MACHINE]), Some(5000 << 10));
        let v2 = |outer, inner| {
            with(&[
                MACHINE,
                ("proc/self/cgroup", "0::/a/b\n"),
                ("sys/fs/cgroup/a/memory.max", outer),
                ("sys/fs/cgroup/a/memory.current", "700000\n"),
                ("sys/fs/cgroup/a/b/memory.max", inner),
                ("sys/fs/cgroup/a/b/memory.current", "600000\n"),
                ("sys/fs/cgroup/a/b/memory.stat", "anon 5\ninactive_file 1000\nactive_file 20\n"),
            ])
        };
        assert_eq!(v2("max\n", "max\n"), Some(5000 << 10));
        assert_eq!(v2("max\n", "1000000\n"), Some(401_020));
        assert_eq!(v2("1000000\n", "max\n"), Some(300_000));
        assert_eq!(v2("100\n", "max\n"), Some(0));
        // The first version, seen from a container, whose own group is the top one.
        let v1 = with(&[
            MACHINE,
            ("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/12ab\n0::/\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1000000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "900000\n"),
            ("sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 50000\n"),
        ]);
        assert_eq!(v1, Some(150_000));
    }

    #[test]
    fn this_machine_has_some() {
        assert!(available_memory().unwrap() > 1 << 20);
    }
}
