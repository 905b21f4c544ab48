//! Machines other than the one at hand, as they show in procfs and sysfs, and the fabrics that follow.

use super::processors::tests::tree;
use super::*;
use crate::fabric::{Class, Fabric, Kind};

/// The files of a machine.
#[derive(Default)]
struct Files(Vec<(String, String)>);

impl Files {
    fn add(&mut self, path: impl Into<String>, text: impl Into<String>) {
        self.0.push((path.into(), text.into()));
    }

    /// `sockets` of `nodes` NUMA nodes of `cores`, of two threads each: the second ones after all first ones.
    fn processors(&mut self, model: &str, sockets: usize, nodes: usize, cores: usize, node_kb: u64) {
        let all = sockets * nodes * cores;
        self.add("proc/cpuinfo", format!("processor\t: 0\nmodel name\t: {model}\n"));
        self.add("proc/self/status", format!("Cpus_allowed_list:\t0-{}\n", 2 * all - 1));
        self.add("proc/meminfo", format!("MemTotal: {} kB\n", node_kb * (sockets * nodes) as u64));
        for cpu in 0..2 * all {
            let core = cpu % all;
            let folder = format!("sys/devices/system/cpu/cpu{cpu}/topology");
            self.add(format!("{folder}/thread_siblings_list"), format!("{core},{}\n", core + all));
            self.add(format!("{folder}/physical_package_id"), format!("{}\n", core / cores / nodes));
        }
        for node in 0..sockets * nodes {
            let folder = format!("sys/devices/system/node/node{node}");
            let first = node * cores;
            let list = format!("{first}-{},{}-{}\n", first + cores - 1, first + all, first + all + cores - 1);
            self.add(format!("{folder}/cpulist"), list);
            self.add(format!("{folder}/meminfo"), format!("Node {node} MemTotal: {node_kb} kB\n"));
            let distance = |other: usize| match (other == node, other / nodes == node / nodes) {
                (true, _) => "10",
                (_, true) => "12",
                _ => "32",
            };
            let row: Vec<&str> = (0..sockets * nodes).map(distance).collect();
            self.add(format!("{folder}/distance"), row.join(" ") + "\n");
        }
    }

    /// A device at the end of a way through the tree, and what its folder says.
    fn pci(&mut self, way: &[&str], class: &str, ids: (&str, &str), numa: i32, link: Option<(&str, &str)>) {
        let root = &way[0][..7];
        let folder = format!("sys/devices/pci{root}/{}", way.join("/"));
        let bus = way[way.len() - 1];
        let mut say = |name: &str, text: &str| self.add(format!("{folder}/{name}"), format!("{text}\n"));
        say("class", class);
        say("vendor", ids.0);
        say("device", ids.1);
        say("numa_node", &numa.to_string());
        if let Some((speed, width)) = link {
            say("max_link_speed", speed);
            say("max_link_width", width);
        }
        self.add(format!("sys/bus/pci/devices/{bus}"), format!("->{folder}"));
    }

    fn nic(&mut self, name: &str, mbit: &str, way: Option<&[&str]>) {
        let folder = format!("sys/class/net/{name}");
        self.add(format!("{folder}/operstate"), "up\n");
        self.add(format!("{folder}/speed"), format!("{mbit}\n"));
        if let Some(way) = way {
            let target = format!("->sys/devices/pci{}/{}", &way[0][..7], way.join("/"));
            self.add(format!("{folder}/device"), target);
        }
    }

    fn tree(&self) -> tempfile::TempDir {
        tree(&self.0.iter().map(|(path, text)| (&**path, &**text)).collect::<Vec<_>>())
    }

    fn read(&self) -> Machine {
        Machine::read(self.tree().path())
    }
}

/// Two sockets of four NUMA nodes, 128 cores of two threads.
fn epyc() -> Files {
    let mut files = Files::default();
    files.processors("AMD EPYC 7763 64-Core Processor", 2, 4, 16, 64 << 20);
    files
}

/// Four switches of two H100 and an interface each, on two sockets, and four NVSwitches.
fn gpu_server() -> Files {
    let mut files = Files::default();
    files.processors("Intel(R) Xeon(R) Platinum 8480C", 2, 1, 56, 1 << 30);
    let link = Some(("32.0 GT/s PCIe", "16"));
    for switch in 0..4 {
        let numa = switch / 2;
        let bus = |offset: usize| format!("0000:{:02x}:00.0", 0x10 + 0x20 * switch + offset);
        let (port, up) = (format!("0000:{:02x}:01.0", 0x0f + 0x20 * switch), bus(0));
        let down = |i: usize| format!("0000:{:02x}:{i:02x}.0", 0x11 + 0x20 * switch);
        for (i, (class, ids)) in [
            ("0x030200", ("0x10de", "0x2330")),
            ("0x030200", ("0x10de", "0x2330")),
            ("0x020000", ("0x15b3", "0x1021")),
        ]
        .into_iter()
        .enumerate()
        {
            let (down, end) = (down(i), bus(2 + i));
            let way = [&*port, &*up, &*down, &*end];
            files.pci(&way, class, ids, numa as i32, link);
            // One of the ports is slower than what hangs on it.
            let speed = if switch == 3 && i == 1 { "16.0 GT/s PCIe" } else { "32.0 GT/s PCIe" };
            let folder = format!("sys/devices/pci{}/{}", &port[..7], way[..3].join("/"));
            files.add(format!("{folder}/max_link_speed"), speed);
            files.add(format!("{folder}/max_link_width"), "16");
            if class == "0x020000" {
                files.nic(&format!("eth{switch}"), "400000", Some(&way));
            } else {
                let path = format!("proc/driver/nvidia/gpus/{end}/information");
                files.add(path, "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n");
            }
        }
    }
    for i in 0..4 {
        let bus = format!("0000:{:02x}:00.0", 0xc1 + i);
        files.pci(&["0000:c0:01.0", &bus], "0x068000", ("0x10de", "0x22a3"), 1, None);
    }
    // A graphics adapter of the board, which computes nothing, and a bridge over the interfaces.
    files.pci(&["0000:00:1c.0", "0000:02:00.0"], "0x030000", ("0x1a03", "0x2000"), 0, None);
    files.nic("docker0", "10000", None);
    files
}

fn fabric(files: &Files) -> Fabric {
    Fabric::of_machine("host", &files.read()).unwrap()
}

#[test]
fn a_server_of_two_sockets_and_eight_nodes() {
    let machine = epyc().read();
    assert_eq!((machine.processors.usable, machine.processors.cores), (256, 128));
    assert_eq!(machine.memory.nodes[5].distances, [32, 32, 32, 32, 12, 10, 12, 12]);
    let fabric = fabric(&epyc());
    assert_eq!(fabric.devices().len(), 8);
    let last = &fabric.devices()[7];
    assert_eq!(
        (last.socket, last.numa, last.processors.as_deref()),
        (Some(1), Some(7), Some("112-127,240-255"))
    );
    let model = fabric.model(7);
    assert_eq!((model.kind, model.memory_bytes, model.ranks), (Kind::Cpu, Some(64 << 30), 32));
    assert_eq!(fabric.between(0, 3).class, Class::Socket);
    assert_eq!(fabric.between(3, 4).class, Class::Host);
    assert_eq!(fabric.islands(&fabric.all(), Class::Socket).len(), 2);
}

#[test]
fn a_server_of_eight_gpus_with_switches_and_interfaces() {
    let machine = gpu_server().read();
    assert_eq!((machine.accelerators.len(), machine.nvswitches), (8, 4));
    let gpu = &machine.accelerators[7];
    assert_eq!(
        (&*gpu.at.bus, gpu.at.numa, gpu.at.switch.as_deref()),
        ("0000:73:00.0", Some(1), Some("0000:70:00.0"))
    );
    assert_eq!(
        (gpu.gt_per_s, gpu.lanes, gpu.name.as_deref()),
        (Some(16.0), Some(16), Some("NVIDIA H100 80GB HBM3"))
    );

    let fabric = fabric(&gpu_server());
    let gpus = fabric.workers();
    assert_eq!(gpus, (2..10).collect::<Vec<_>>());
    let model = fabric.model(2);
    assert_eq!(
        (&*model.name, model.memory_bytes, model.sm),
        ("NVIDIA H100 80GB HBM3", Some(81_559 << 20), Some(90))
    );
    // 18 links of 20.6 GB/s; the slowest of the ports; 400 Gbit/s.
    let nvlink = fabric.slowest(&gpus).unwrap();
    assert_eq!((nvlink.class, nvlink.link.gbps), (Class::NvLink, 18.0 * 20.6));
    let mut parts = fabric.clone().into_parts();
    parts.devices.iter_mut().for_each(|d| d.nvlink = None);
    let pcie = Fabric::new(parts).unwrap();
    assert_eq!(pcie.between(2, 3).link.gbps, 24.0);
    let class = |a, b| pcie.between(a, b).class;
    assert_eq!((class(2, 3), class(2, 4), class(2, 6)), (Class::Switch, Class::Numa, Class::Host));
    let nics: Vec<_> = fabric.hosts()[0].nics.iter().map(|n| (&*n.name, n.numa, n.switch)).collect();
    assert_eq!(
        nics,
        [
            ("eth0", Some(0), Some(0)),
            ("eth1", Some(0), Some(1)),
            ("eth2", Some(1), Some(2)),
            ("eth3", Some(1), Some(3))
        ]
    );
    assert_eq!(fabric.parts().links[&Class::Network].gbps, 50.0);
    assert_eq!((fabric.devices()[2].socket, fabric.devices()[9].socket), (Some(0), Some(1)));
}

#[test]
fn an_arm_board_has_neither_nodes_nor_pci() {
    let mut files = Files::default();
    files.add("proc/cpuinfo", "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n");
    files.add("proc/self/status", "Cpus_allowed_list:\t0-3\n");
    files.add("proc/meminfo", "MemTotal: 8000000 kB\n");
    for cpu in 0..4 {
        let folder = format!("sys/devices/system/cpu/cpu{cpu}/topology");
        files.add(format!("{folder}/thread_siblings_list"), format!("{cpu}\n"));
        // Some kernels don't know.
        files.add(format!("{folder}/physical_package_id"), "-1\n");
    }
    files.nic("eth0", "1000", None);
    let fabric = fabric(&files);
    let device = &fabric.devices()[0];
    assert_eq!((fabric.devices().len(), device.numa, device.socket), (1, None, None));
    assert_eq!(device.processors.as_deref(), Some("0-3"));
    let model = fabric.model(0);
    assert_eq!((&*model.name, model.memory_bytes), ("Arm implementer 0x41 part 0xd0b", Some(8_192_000_000)));
    assert_eq!(fabric.parts().links[&Class::Network].gbps, 0.125);
}

#[test]
fn a_container_has_what_its_limits_leave() {
    let mut files = epyc();
    files.0.retain(|(path, _)| !path.contains("self/status") && !path.contains("node/node3"));
    files.add("proc/self/status", "Cpus_allowed_list:\t14-17\n");
    files.add("proc/self/cgroup", "0::/job\n");
    files.add("sys/fs/cgroup/job/cpu.max", "300000 100000\n");
    files.add("sys/fs/cgroup/job/memory.max", "8589934592\n");
    let machine = files.read();
    assert_eq!((machine.processors.usable, machine.memory.limit), (3, Some(8 << 30)));
    let fabric = fabric(&files);
    let seen: Vec<_> = fabric.devices().iter().map(|d| (d.numa, d.processors.as_deref().unwrap())).collect();
    assert_eq!(seen, [(Some(0), "14-15"), (Some(1), "16-17")]);
    assert_eq!((fabric.model(0).memory_bytes, fabric.model(0).ranks), (Some(4 << 30), 2));
}

#[test]
fn a_machine_that_shows_nothing_is_one_device_of_unknown_memory() {
    let fabric = fabric(&Files::default());
    assert_eq!((fabric.devices().len(), fabric.model(0).memory_bytes, fabric.model(0).ranks), (1, None, 1));
    assert!(fabric.hosts()[0].nics.is_empty());
}

#[test]
fn nonsense_of_firmware_and_drivers_is_left_out() {
    let mut files = gpu_server();
    for (path, text) in &mut files.0 {
        let name = path.rsplit('/').next().unwrap_or_default();
        match name {
            // The GPUs of a switch don't agree where it is.
            "numa_node" if path.contains("0000:12:00.0") => *text = "1\n".to_owned(),
            "numa_node" if path.contains("0000:32:00.0") => *text = "-1\n".to_owned(),
            "max_link_speed" => *text = "Unknown\n".to_owned(),
            "max_link_width" => *text = "255\n".to_owned(),
            "speed" => *text = "4294967295\n".to_owned(),
            "information" => *text = "Model: \u{1b}[2Jx\u{7}\n".to_owned(),
            "device" if path.contains("0000:13:00.0") => *text = "many\n".to_owned(),
            _ => {}
        }
    }
    let fabric = fabric(&files);
    assert_eq!(fabric.workers().len(), 7, "one has no number");
    assert_eq!(&*fabric.model(2).name, "[2Jx");
    assert!(!fabric.parts().links.contains_key(&Class::Network));
    assert_eq!(Fabric::from_json(&fabric.to_json()).unwrap(), fabric);
}
