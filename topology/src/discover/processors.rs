//! Processors and their caches.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use tensorwire_core::JOB_PROCESSORS_VAR;

use super::{Root, cgroup, field, list};

/// The processors that this process may use.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Processors {
    /// What the processor calls itself.
    pub model: String,
    /// The processors in the affinity mask, as Linux numbers them.
    pub allowed: Vec<usize>,
    /// How many of them the control groups' quota allows on average, where there is one.
    pub quota: Option<f64>,
    /// How many ranks can run at once: the mask, or the quota if it is less.
    pub usable: usize,
    /// Cores that the allowed processors are threads of.
    pub cores: usize,
    /// The sockets of the allowed processors, one for each of them, where they are known.
    pub sockets: Vec<Option<usize>>,
    /// Caches of the allowed processors, the nearest first.
    pub caches: Vec<Cache>,
}

/// A cache.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Cache {
    /// Its level, from 1.
    pub level: u32,
    /// What it holds: `Data`, `Instruction` or `Unified`.
    pub kind: String,
    /// Its size, as the system says it, such as `1024K`.
    pub size: String,
    /// The processors that share it.
    pub shared_by: Vec<usize>,
}

/// What a measurement holds for: one kind of machine, used in one way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// What the processor calls itself.
    pub processor: String,
    /// How many may be used at once.
    pub processors: usize,
    /// The caches of the first of them.
    pub caches: Vec<String>,
}

impl Processors {
    pub(super) fn read(root: Root<'_>) -> Processors {
        let (allowed, quota, usable) = usable(root, None);
        let core = |cpu: &usize| {
            let siblings =
                root.read(format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"));
            siblings.and_then(|text| list(&text)?.first().copied()).unwrap_or(*cpu)
        };
        let socket = |cpu: &usize| {
            root.number(format!("/sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id"))
        };
        let caches: BTreeSet<Cache> = allowed.iter().flat_map(|cpu| Cache::of(root, *cpu)).collect();
        Processors {
            model: model(root),
            cores: allowed.iter().map(core).collect::<BTreeSet<_>>().len(),
            sockets: allowed.iter().map(socket).collect(),
            caches: caches.into_iter().collect(),
            allowed,
            quota,
            usable,
        }
    }
}

impl Fingerprint {
    /// The fingerprint of the machine whose procfs and sysfs are below `root`. It takes a few small files. Of a rank that a
    /// launcher has bound to its share of the processors, that of all ranks' together.
    pub fn read(root: &std::path::Path) -> Fingerprint {
        let root = Root(root);
        let of_job = std::env::var(JOB_PROCESSORS_VAR).ok().and_then(|text| list(&text));
        let (allowed, _, processors) = usable(root, of_job);
        let caches = Cache::of(root, allowed.first().copied().unwrap_or(0));
        let name = |c: &Cache| format!("L{} {} {} for {}", c.level, c.kind, c.size, c.shared_by.len());
        Fingerprint { processor: model(root), processors, caches: caches.iter().map(name).collect() }
    }
}

impl Cache {
    /// The caches of a processor.
    fn of(root: Root<'_>, cpu: usize) -> Vec<Cache> {
        let folder = format!("/sys/devices/system/cpu/cpu{cpu}/cache");
        let cache = |index: &usize| {
            let of = |name| root.read(format!("{folder}/index{index}/{name}"));
            Some(Cache {
                level: of("level")?.parse().ok()?,
                kind: of("type")?,
                size: of("size")?,
                shared_by: list(&of("shared_cpu_list")?)?,
            })
        };
        root.numbered(&folder, "index").iter().filter_map(cache).collect()
    }
}

/// The processors in the affinity mask, unless they are `given`, the quota, and how many processors that makes.
fn usable(root: Root<'_>, given: Option<Vec<usize>>) -> (Vec<usize>, Option<f64>, usize) {
    let status = root.read("/proc/self/status").unwrap_or_default();
    let allowed = given.or_else(|| field(&status, "Cpus_allowed_list").and_then(list)).unwrap_or_default();
    let quota = cgroup::processors(root);
    // Half a processor more is none for a rank that spins.
    let most = quota.map_or(usize::MAX, |quota| quota as usize);
    let usable = allowed.len().min(most).max(1);
    (allowed, quota, usable)
}

fn model(root: Root<'_>) -> String {
    let info = root.read("/proc/cpuinfo").unwrap_or_default();
    match (field(&info, "model name"), field(&info, "CPU implementer"), field(&info, "CPU part")) {
        (Some(name), ..) => name.to_owned(),
        (None, Some(implementer), Some(part)) => format!("Arm implementer {implementer} part {part}"),
        _ => std::env::consts::ARCH.to_owned(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A folder with these files in it; a text that begins with `->` is where a link leads, from the folder.
    pub(in crate::discover) fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            match text.strip_prefix("->") {
                Some(target) => std::os::unix::fs::symlink(dir.path().join(target), path).unwrap(),
                None => std::fs::write(path, text).unwrap(),
            }
        }
        dir
    }

    /// Two cores of two threads each, of which three threads may be used.
    fn machine() -> tempfile::TempDir {
        let mut files = vec![
            ("proc/cpuinfo".to_owned(), "processor\t: 0\nmodel name\t: Some CPU 9000\n".to_owned()),
            (
                "proc/self/status".to_owned(),
                "Name:\tx\nCpus_allowed:\t7\nCpus_allowed_list:\t0-2\n".to_owned(),
            ),
        ];
        for cpu in 0..4 {
            let folder = format!("sys/devices/system/cpu/cpu{cpu}");
            let core = if cpu % 2 == 0 { "0,2" } else { "1,3" };
            files.push((format!("{folder}/topology/thread_siblings_list"), format!("{core}\n")));
            for (index, level, kind, size, shared) in [
                (0, 1, "Data", "32K", core),
                (2, 2, "Unified", "1024K", core),
                (3, 3, "Unified", "32768K", "0-3"),
            ] {
                for (name, value) in [
                    ("level", &*level.to_string()),
                    ("type", kind),
                    ("size", size),
                    ("shared_cpu_list", shared),
                ] {
                    files.push((format!("{folder}/cache/index{index}/{name}"), format!("{value}\n")));
                }
            }
        }
        let files: Vec<_> = files.iter().map(|(path, text)| (&**path, &**text)).collect();
        tree(&files)
    }

    #[test]
    fn processors_share_cores_and_caches() {
        let dir = machine();
        let p = Processors::read(Root(dir.path()));
        assert_eq!((&*p.model, &*p.allowed, p.usable, p.cores), ("Some CPU 9000", &[0, 1, 2][..], 3, 2));
        let caches: Vec<_> = p.caches.iter().map(|c| (c.level, &*c.size, &*c.shared_by)).collect();
        assert_eq!(
            caches,
            [
                (1, "32K", &[0, 2][..]),
                (1, "32K", &[1, 3]),
                (2, "1024K", &[0, 2]),
                (2, "1024K", &[1, 3]),
                (3, "32768K", &[0, 1, 2, 3]),
            ]
        );
        let print = Fingerprint::read(dir.path());
        assert_eq!((&*print.processor, print.processors), ("Some CPU 9000", 3));
        assert_eq!(print.caches, ["L1 Data 32K for 2", "L2 Unified 1024K for 2", "L3 Unified 32768K for 4"]);
    }

    #[test]
    fn a_quota_counts_whole_processors_and_one_at_least() {
        for (quota, usable) in
            [("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 3), ("max 100000", 3)]
        {
            let dir = machine();
            std::fs::create_dir_all(dir.path().join("sys/fs/cgroup")).unwrap();
            std::fs::write(dir.path().join("proc/self/cgroup"), "0::/\n").unwrap();
            std::fs::write(dir.path().join("sys/fs/cgroup/cpu.max"), quota).unwrap();
            assert_eq!(Fingerprint::read(dir.path()).processors, usable, "{quota}");
            assert_eq!(Processors::read(Root(dir.path())).usable, usable);
        }
    }

    #[test]
    fn an_arm_processor_has_numbers_for_a_name_and_an_unknown_one_its_architecture() {
        let arm = tree(&[("proc/cpuinfo", "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n")]);
        assert_eq!(Fingerprint::read(arm.path()).processor, "Arm implementer 0x41 part 0xd40");
        let nothing = Fingerprint::read(tree(&[]).path());
        assert_eq!((&*nothing.processor, nothing.processors), (std::env::consts::ARCH, 1));
    }

    #[test]
    fn this_machine_counts_as_the_standard_library_does() {
        let here = Fingerprint::read("/".as_ref());
        assert_eq!(here.processors, std::thread::available_parallelism().unwrap().get());
    }
}
