//! Files of NCCL, hwloc and nvidia-smi: what follows from them, and what is made of damaged ones.

use proptest::prelude::*;
use tensorwire_topology::Fabric;
use tensorwire_topology::fabric::{Basis, Class, Format, Kind};

const H100: &str = include_str!("fixtures/fabrics/nccl-8-h100.xml");
const CUBE: &str = include_str!("fixtures/fabrics/nccl-8-v100-cube.xml");
const HOSTS: &str = include_str!("fixtures/fabrics/nccl-2-hosts.xml");
const HWLOC: &str = include_str!("fixtures/fabrics/hwloc-4-a100.xml");
const SMI: &str = include_str!("fixtures/fabrics/nvidia-smi-8-nvswitch.txt");
const SMI_PCIE: &str = include_str!("fixtures/fabrics/nvidia-smi-4-pcie.txt");
const ALL: [&str; 6] = [H100, CUBE, HOSTS, HWLOC, SMI, SMI_PCIE];

/// The class and GB/s between two workers.
fn hop(fabric: &Fabric, a: usize, b: usize) -> (Class, f64) {
    let workers = fabric.workers();
    let hop = fabric.between(workers[a], workers[b]);
    (hop.class, hop.link.gbps)
}

#[test]
fn nccl_of_eight_h100_that_switches_join() {
    let fabric = Fabric::from_nccl(H100).unwrap();
    assert_eq!((fabric.devices().len(), fabric.workers().len()), (10, 8));
    let cpu = &fabric.devices()[1];
    assert_eq!((cpu.numa, cpu.processors.as_deref()), (Some(1), Some("56-111")));
    assert_eq!((&*fabric.model(1).name, fabric.model(1).ranks), ("x86_64 GenuineIntel 6 143", 56));
    let gpu = &fabric.devices()[9];
    assert_eq!((gpu.numa, gpu.switch, gpu.bus.as_deref()), (Some(1), Some(3), Some("0000:73:00.0")));
    let model = fabric.model(9);
    assert_eq!(
        (&*model.name, model.sm, model.memory_bytes),
        ("H100 80GB HBM3", Some(90), Some(81_559 << 20))
    );
    // 18 links of 20.6 GB/s.
    assert_eq!(fabric.slowest(&fabric.workers()).unwrap().link.gbps, 18.0 * 20.6);
    let nics: Vec<_> = fabric.hosts()[0].nics.iter().map(|n| (&*n.name, n.mbit_per_s, n.switch)).collect();
    assert_eq!(nics[1], ("mlx5_1", Some(400_000), Some(1)));
    let gbps = |class| fabric.parts().links[&class].gbps;
    // PCIe 5.0; Sapphire Rapids' UPI; 400 Gbit/s.
    assert_eq!((gbps(Class::Switch), gbps(Class::Host), gbps(Class::Network)), (48.0, 22.0, 50.0));
}

#[test]
fn nccl_of_eight_v100_that_are_joined_pair_by_pair() {
    let fabric = Fabric::from_nccl(CUBE).unwrap();
    assert_eq!(fabric.parts().pairs.len(), 16);
    assert_eq!(hop(&fabric, 0, 3), (Class::NvLink, 40.0));
    assert_eq!(hop(&fabric, 0, 1), (Class::NvLink, 20.0));
    // Without an NVLink: on another socket, Broadwell's QPI.
    assert_eq!(hop(&fabric, 0, 5), (Class::Host, 6.0));
    assert_eq!(hop(&fabric, 0, 7), (Class::Host, 6.0));
    let workers = fabric.workers();
    // Two links join a ring of all eight, or so many are left.
    assert_eq!(fabric.islands_of(&workers, 40.0).len(), 1);
    assert_eq!(fabric.islands(&workers, Class::NvLink).len(), 1);
    assert_eq!(fabric.slowest(&workers).unwrap().class, Class::Host);
}

#[test]
fn nccl_of_two_hosts_without_nodes() {
    let fabric = Fabric::from_nccl(HOSTS).unwrap();
    assert_eq!((fabric.hosts().len(), fabric.workers().len()), (2, 4));
    // Nothing is known of where the GPUs are: within a host they may be on different nodes.
    assert_eq!(hop(&fabric, 0, 1), (Class::Host, 16.0));
    assert_eq!(hop(&fabric, 1, 2), (Class::Network, 3.125));
    assert_eq!(fabric.model(1).memory_bytes, Some(15_360 << 20));
    assert_eq!(fabric.hosts()[1].nics[0].bus, None);
}

#[test]
fn hwloc_of_four_a100() {
    let fabric = Fabric::from_hwloc(HWLOC).unwrap();
    let places: Vec<_> =
        fabric.devices().iter().map(|d| (&*d.name, d.socket, d.numa, d.switch, d.nvlink)).collect();
    assert_eq!(
        places,
        [
            ("host/cpu0", Some(0), Some(0), None, None),
            ("host/cpu1", Some(1), Some(1), None, None),
            ("host/gpu0", Some(0), Some(0), Some(0), Some(0)),
            ("host/gpu1", Some(0), Some(0), Some(0), Some(0)),
            ("host/gpu2", Some(1), Some(1), None, Some(1)),
            ("host/gpu3", Some(1), Some(1), None, Some(1)),
        ]
    );
    let (cpu, gpu) = (fabric.model(0), fabric.model(2));
    assert_eq!(
        (&*cpu.name, cpu.memory_bytes, cpu.ranks),
        ("AMD EPYC 7543 32-Core Processor", Some(270_000_000_000), 4)
    );
    // What CUDA says is before what is usual.
    assert_eq!((&*gpu.name, gpu.memory_bytes), ("NVIDIA A100-PCIE-40GB", Some(41_480_192 << 10)));
    assert_eq!(hop(&fabric, 2, 3), (Class::NvLink, 200.0));
    assert_eq!(hop(&fabric, 1, 2).0, Class::Host);
    let pcie = fabric.parts().links[&Class::Switch].gbps;
    assert!((pcie - 24.0).abs() < 1e-3, "{pcie}");
    let nic = &fabric.hosts()[0].nics[0];
    assert_eq!(
        (fabric.hosts()[0].nics.len(), &*nic.name, nic.numa, nic.switch),
        (1, "enp16s0f0", Some(0), None)
    );
}

#[test]
fn nvidia_smi_of_eight_gpus_as_a_terminal_shows_it() {
    let fabric = Fabric::from_nvidia_smi(SMI).unwrap();
    assert_eq!((fabric.devices().len(), fabric.workers().len()), (10, 8));
    let link = fabric.between(2, 9);
    assert_eq!((link.class, link.link.gbps, link.link.basis), (Class::NvLink, 240.0, Basis::Assumed));
    assert_eq!(fabric.devices()[1].processors.as_deref(), Some("32-63,96-127"));
    let places: Vec<_> = fabric.devices()[2..].iter().map(|d| (d.numa, d.switch)).collect();
    assert_eq!(
        (places[1], places[2], places[7]),
        ((Some(0), Some(0)), (Some(0), Some(1)), (Some(1), Some(3)))
    );
    let nics: Vec<_> = fabric.hosts()[0].nics.iter().map(|n| (&*n.name, n.numa, n.switch)).collect();
    assert_eq!(nics[2], ("mlx5_2", Some(1), Some(2)));
    assert_eq!(fabric.model(2).memory_bytes, None);
}

#[test]
fn nvidia_smi_of_four_gpus_without_numbers_of_nodes() {
    let fabric = Fabric::from_nvidia_smi(SMI_PCIE).unwrap();
    assert_eq!(hop(&fabric, 0, 1), (Class::NvLink, 80.0));
    assert_eq!(hop(&fabric, 2, 3).0, Class::Switch);
    assert_eq!(hop(&fabric, 1, 2).0, Class::Host);
    // The interface is beside the first two.
    let (nic, gpu) = (&fabric.hosts()[0].nics[0], &fabric.devices()[fabric.workers()[0]]);
    assert_eq!((&*nic.name, nic.numa), ("mlx5_0", gpu.numa));
    let cpus = fabric.devices().iter().filter(|d| d.processors.is_some());
    assert_eq!(
        cpus.map(|d| d.processors.as_deref().unwrap()).collect::<Vec<_>>(),
        ["0-15,32-47", "16-31,48-63"]
    );
}

#[test]
fn the_format_is_seen_and_the_fabric_kept() {
    let formats = ALL.map(Format::of);
    use Format::{Hwloc, Nccl, NvidiaSmi};
    assert_eq!(formats, [Nccl, Nccl, Nccl, Hwloc, NvidiaSmi, NvidiaSmi]);
    for text in ALL {
        let fabric = Fabric::from_text(text).unwrap();
        assert_eq!(Fabric::from_text(&fabric.to_json()).unwrap(), fabric);
    }
}

#[test]
fn nccl_survives_its_file() {
    for text in [H100, CUBE, HOSTS] {
        let fabric = Fabric::from_nccl(text).unwrap();
        let written = fabric.to_nccl().unwrap();
        assert_eq!(Fabric::from_nccl(&written).unwrap(), fabric, "{written}");
    }
    // What others know besides, such as sockets, is lost; what reaches what, and how fast, isn't.
    for text in [HWLOC, SMI, SMI_PCIE] {
        let fabric = Fabric::from_text(text).unwrap();
        let read = Fabric::from_nccl(&fabric.to_nccl().unwrap()).unwrap();
        for a in 0..fabric.workers().len() {
            for b in 0..a {
                let (expected, found) = (hop(&fabric, a, b), hop(&read, a, b));
                assert_eq!(expected.0, found.0, "{a} {b}");
                if expected.0 == Class::NvLink {
                    // A whole number of links of what NCCL counts for one.
                    assert!((expected.1 - found.1).abs() <= 20.0, "{expected:?} {found:?}");
                }
            }
        }
    }
}

#[test]
fn a_fabric_without_gpus_has_no_file_for_nccl() {
    let text = "name = \"x\"\n[[model]]\nname = \"m\"\nkind = \"cpu\"\n[[host]]\nname = \"h\"\ndevice = [{ model = \"m\" }]";
    let refused = Fabric::from_toml(text).unwrap().to_nccl().unwrap_err().to_string();
    assert!(refused.contains("of GPUs, and it has none"), "{refused}");
}

#[test]
fn what_is_no_such_file_is_refused_and_says_why() {
    let nccl = |from: &str, to: &str| {
        let bad = H100.replacen(from, to, 1);
        assert_ne!(bad, H100, "{from}");
        Fabric::from_nccl(&bad)
    };
    let hwloc = |from: &str, to: &str| {
        let bad = HWLOC.replacen(from, to, 1);
        assert_ne!(bad, HWLOC, "{from}");
        Fabric::from_hwloc(&bad)
    };
    let smi = |from: &str, to: &str| {
        let bad = SMI_PCIE.replacen(from, to, 1);
        assert_ne!(bad, SMI_PCIE, "{from}");
        Fabric::from_nvidia_smi(&bad)
    };
    for (result, why) in [
        (nccl("version=\"1\"", "version=\"2\""), "<system version=\"1\">"),
        (nccl("numaid=\"0\"", "numaid=\"many\""), "no numaid"),
        (nccl("affinity=\"00ff", "affinity=\"zzff"), "no mask"),
        (nccl("busid=\"0000:12:00.0\"", "busid=\"0000:12:00\""), "no PCI address"),
        (nccl("count=\"4\"", "count=\"-4\""), "no count from 1 to 1024"),
        (nccl("count=\"4\"", "count=\"4000000000\""), "no count from 1 to 1024"),
        (nccl("</gpu>", "</gp>"), "no XML"),
        (nccl("</system>", ""), "ends early"),
        (Fabric::from_nccl("<system version=\"1\"/>"), "0 hosts"),
        (Fabric::from_nccl(HWLOC), "doesn't begin with <system"),
        (Fabric::from_nccl(&HOSTS.replace("<net ", "<wire ")), "no path to the others"),
        (hwloc("version=\"2.0\"", ""), "hwloc 1"),
        (hwloc("cpuset=\"0x0000000f\" nodeset=\"0x00000001\" gp_index=\"4\"", "cpuset=\"x\""), "no mask"),
        (hwloc("0302 [10de:20f1]", "gpu"), "pci_type = "),
        (hwloc("202 212 222 232", "202 212"), "16 values for 2 objects"),
        (hwloc("200000 0 0", "fast 0 0"), "no number"),
        (Fabric::from_hwloc(H100), "doesn't begin with <topology"),
        (smi("GPU0     X ", "GPU0    NV4"), "X in its own column"),
        (smi("PHB", "WAT"), "a cell that isn't one of"),
        (smi("NV4", "NV0"), "a cell that isn't one of"),
        (smi("GPU3    SYS     SYS     PIX      X      SOC     16-31,48-63", ""), "no row GPU3"),
        (smi("GPU3    SYS     SYS     PIX      X      SOC     16-31,48-63", "GPU3 X"), "GPU3 is too short"),
        (Fabric::from_nvidia_smi("Failed to initialize NVML"), "no line that begins with GPU0"),
        (Fabric::from_nvidia_smi(&format!("GPU0 {}", "NIC0 ".repeat(300))), "301 columns"),
    ] {
        let refused = result.unwrap_err().to_string();
        assert!(refused.contains(why), "{why}: {refused}");
        assert!(refused.len() < 300, "{refused}");
    }
}

proptest! {
    /// What reaches what and how fast is the same after a way through NCCL's file, and the file is then a fixed point.
    #[test]
    fn nccl_keeps_what_reaches_what(
        hosts in 1u32..4,
        gpus in 1u32..9,
        per_numa in 1u32..5,
        per_switch in proptest::option::of(1u32..3),
        nvlinks in proptest::option::of(1u32..19),
        pcie in 0usize..3,
        uplink in 0usize..3,
        nics in 1u32..3,
        mbit in 1u64..400_000,
    ) {
        let (per_numa, switch) = match per_switch {
            Some(n) => (n * per_numa, format!(", per_switch = {n}")),
            None => (per_numa, String::new()),
        };
        let (domain, link) = match nvlinks {
            Some(n) => (format!(", per_nvlink = {gpus}"), format!("nvlink = {{ alpha_us = 2.5, gbps = {} }}", f64::from(n) * 20.0)),
            None => Default::default(),
        };
        let speeds = [12.0, 24.0, 48.0];
        let (pcie, uplink) = (speeds[pcie.max(uplink)], speeds[uplink]);
        let text = format!(
            "name = \"any\"
             [[model]]
             name = \"gpu\"
             kind = \"gpu\"
             sm = 80
             [[host]]
             name = \"h\"
             count = {hosts}
             device = [{{ model = \"gpu\", count = {gpus}, per_numa = {per_numa}{switch}{domain} }}]
             nic = [{{ name = \"e\", count = {nics}, mbit_per_s = {mbit}, numa = 0 }}]
             [links]
             switch = {{ alpha_us = 4, gbps = {pcie} }}
             numa = {{ alpha_us = 4.5, gbps = {uplink} }}
             {link}"
        );
        let fabric = Fabric::from_toml(&text).unwrap();
        let written = fabric.to_nccl().unwrap();
        let read = Fabric::from_nccl(&written).unwrap();
        for a in 0..fabric.workers().len() {
            for b in 0..a {
                prop_assert_eq!(hop(&read, a, b), hop(&fabric, a, b), "{} {}: {}", a, b, &written);
            }
        }
        prop_assert_eq!(Fabric::from_nccl(&read.to_nccl().unwrap()).unwrap(), read);
    }

    /// Damage anywhere: a fabric that can be kept, or a reason.
    #[test]
    fn damage_is_no_panic(
        which in 0usize..6,
        cuts in proptest::collection::vec((any::<prop::sample::Index>(), "[ -~\\x1b\n]{0,6}", 0usize..12), 1..4),
    ) {
        let mut bytes = ALL[which].as_bytes().to_vec();
        for (at, with, length) in cuts {
            let at = at.index(bytes.len());
            let end = (at + length).min(bytes.len());
            bytes.splice(at..end, with.bytes());
        }
        let text = String::from_utf8_lossy(&bytes);
        if let Ok(fabric) = Fabric::from_text(&text) {
            prop_assert_eq!(&Fabric::from_json(&fabric.to_json()).unwrap(), &fabric);
            let gpus = fabric.devices().iter().any(|d| fabric.parts().models[d.model as usize].kind == Kind::Gpu);
            prop_assert_eq!(fabric.to_nccl().is_ok(), gpus);
        }
    }
}
