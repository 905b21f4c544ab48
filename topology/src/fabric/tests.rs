//! Answers about links against what follows from comparing each pair, and what is refused.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn number() -> impl Strategy<Value = Option<u32>> {
    proptest::option::weighted(0.8, 0u32..2)
}

/// Any fabric: up to 5 hosts of up to 9 devices in all, in racks, pods and places that are nested, with links of their
/// own here and there.
fn fabric() -> impl Strategy<Value = Fabric> {
    let device = (0u32..5, number(), number(), number(), number(), number());
    let link = (0u32..50, 1u32..50).prop_map(|(a, b)| Link::rated(a.into(), b.into()));
    let links = || proptest::collection::btree_map(0usize..Class::ALL.len(), link.clone(), 0..10);
    let pairs = proptest::collection::btree_map((0u32..6, 0u32..6), link.clone(), 0..4);
    let tiers = proptest::collection::vec((number(), number()), 5);
    (proptest::collection::vec(device, 1..10), links(), links(), any::<bool>(), pairs, tiers)
        .prop_map(|(mut places, all, one, paired, pairs, tiers)| {
            places.sort_unstable();
            // Numbers that count on: what lies within different things is different.
            let within = |outer: Option<u32>, inner: Option<u32>| {
                inner.map(|n| outer.map_or(2 * n, |outer| 2 * outer + n) * 2 + u32::from(outer.is_some()))
            };
            let devices: Vec<Device> = (places.iter().enumerate())
                .map(|(i, (host, socket, numa, switch, card, nvlink))| {
                    let numa = within(*socket, *numa);
                    let switch = within(numa, *switch);
                    Device {
                        socket: *socket,
                        numa,
                        switch,
                        card: within(switch, *card),
                        nvlink: *nvlink,
                        ..Device::new(format!("d{i}"), *host, 0)
                    }
                })
                .collect();
            let of = |links: &BTreeMap<usize, Link>| -> BTreeMap<Class, Link> {
                links.iter().map(|(class, link)| (Class::ALL[*class], *link)).collect()
            };
            let mut links = of(&all);
            links.entry(Class::Network).or_insert(Link::rated(10.0, 1.0));
            let mut hosts: Vec<Host> = ["a", "b", "c", "d", "e"].map(Host::new).into();
            for (host, (pod, rack)) in hosts.iter_mut().zip(tiers) {
                (host.pod, host.rack) = (pod, within(pod, rack));
            }
            hosts[1].links = of(&one);
            let count = devices.len() as u32;
            let pair = |((a, b), link): ((u32, u32), Link)| {
                (a < b && b < count).then_some(Pair { a, b, class: Class::NvLink, link })
            };
            let pairs: Vec<Pair> = pairs.into_iter().filter(|_| paired).filter_map(pair).collect();
            let models = vec![DeviceModel::new("m", Kind::Gpu, Some(1 << 30))];
            // Devices without a switch may hang elsewhere than others of the same card: such places contradict each other.
            let parts = Parts { name: "any".to_owned(), models, hosts, devices, links, pairs };
            Fabric::new(parts)
        })
        .prop_filter_map("contradictory places", |fabric| fabric.ok())
}

fn slowest_of(hops: impl Iterator<Item = Hop>) -> Option<Hop> {
    hops.reduce(|a, b| Hop { class: a.class.max(b.class), link: a.link.slower(b.link) })
}

fn pairs(devices: &[usize]) -> Vec<(usize, usize)> {
    devices.iter().flat_map(|a| devices.iter().filter(move |b| a < b).map(move |b| (*a, *b))).collect()
}

proptest! {
    #[test]
    fn a_group_is_as_slow_as_its_slowest_pair(fabric in fabric(), mask in any::<u16>()) {
        let devices: Vec<usize> = fabric.all().into_iter().filter(|d| mask >> d & 1 == 1).collect();
        let hops: Vec<Hop> = pairs(&devices).iter().map(|(a, b)| fabric.between(*a, *b)).collect();
        prop_assert_eq!(fabric.slowest(&devices), slowest_of(hops.iter().copied()));
        for class in Class::ALL {
            let expected = slowest_of(hops.iter().copied().filter(|hop| hop.class == class));
            let found = fabric.classes(&devices).into_iter().find(|hop| hop.class == class);
            prop_assert_eq!(found, expected, "{}", class);
        }
    }

    #[test]
    fn the_way_there_is_the_way_back(fabric in fabric()) {
        for (a, b) in pairs(&fabric.all()) {
            prop_assert_eq!(fabric.between(a, b), fabric.between(b, a));
        }
    }

    #[test]
    fn islands_are_a_partition_whose_pairs_hang_together(fabric in fabric()) {
        let all = fabric.all();
        for class in Class::ALL {
            let islands = fabric.islands(&all, class);
            let mut members: Vec<usize> = islands.concat();
            prop_assert!(islands.is_sorted() && islands.iter().all(|i| i.is_sorted()));
            members.sort_unstable();
            prop_assert_eq!(&members, &all);
            let island = |d: usize| islands.iter().position(|i| i.contains(&d));
            for (a, b) in pairs(&all) {
                if fabric.between(a, b).class <= class && class > Class::Device {
                    prop_assert_eq!(island(a), island(b), "{} {} {}", a, b, class);
                }
            }
        }
        prop_assert_eq!(fabric.islands(&all, Class::Network).len(), 1);
        prop_assert_eq!(fabric.islands(&all, Class::Device).len(), all.len());
        let fastest = pairs(&all).iter().map(|(a, b)| fabric.between(*a, *b).link.gbps).fold(0.0, f64::max);
        if all.len() > 1 {
            prop_assert!(fabric.islands_of(&all, fastest).len() < all.len());
        }
        prop_assert_eq!(fabric.islands_of(&all, 1e9).len(), all.len());
    }

    #[test]
    fn a_fabric_is_read_as_it_was_written(fabric in fabric()) {
        prop_assert_eq!(Fabric::from_json(&fabric.to_json()).unwrap(), fabric);
    }

    /// Damage anywhere: a fabric, or a reason.
    #[test]
    fn damage_is_no_panic(fabric in fabric(), at in 0usize..5000, bytes in proptest::collection::vec(any::<u8>(), 1..8)) {
        let mut text = fabric.to_json().into_bytes();
        let at = at % text.len();
        let end = (at + bytes.len()).min(text.len());
        text.splice(at..end, bytes);
        if let Ok(fabric) = Fabric::from_json(&String::from_utf8_lossy(&text)) {
            fabric.slowest(&fabric.all());
        }
    }
}

/// Six hosts of two devices each: racks 0 and 1 in pod 0, rack 2 in pod 1, and a host in neither.
fn tiers() -> Fabric {
    Fabric::from_toml(
        r#"
        name = "tiers"
        [[model]]
        name = "m"
        kind = "gpu"
        [[host]]
        name = "a"
        count = 5
        rack = [0, 0, 1, 2, 2]
        pod = [0, 0, 0, 1, 1]
        device = [{ model = "m", count = 2 }]
        nic = [{ name = "ib", mbit_per_s = 100000 }]
        [[host]]
        name = "b"
        device = [{ model = "m", count = 2 }]
        [links]
        rack = { alpha_us = 2, gbps = 40 }
        network = { alpha_us = 9, gbps = 5 }
        "#,
    )
    .unwrap()
}

#[test]
fn hosts_are_as_far_as_the_nearest_tier_that_holds_both() {
    let fabric = tiers();
    let class = |a, b| fabric.between(a, b).class;
    assert_eq!([class(0, 1), class(0, 2), class(0, 4)], [Class::Host, Class::Rack, Class::Pod]);
    assert_eq!([class(0, 6), class(6, 8), class(6, 10)], [Class::Network, Class::Rack, Class::Network]);
    // Nobody gave pods a link: they are as the network is.
    assert_eq!(fabric.between(0, 4).link, Link::rated(9.0, 5.0));
    assert_eq!(fabric.between(0, 2).link, Link::rated(2.0, 40.0));
    let islands = |class| fabric.islands(&fabric.all(), class).iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(islands(Class::Rack), [4, 2, 4, 2]);
    assert_eq!(islands(Class::Pod), [6, 4, 2]);
    assert_eq!(islands(Class::Network), [12]);
    let classes = |devices: &[usize]| fabric.classes(devices).iter().map(|h| h.class).collect::<Vec<_>>();
    assert_eq!(classes(&[0, 2, 4]), [Class::Rack, Class::Pod]);
    assert_eq!(classes(&[0, 10]), [Class::Network]);
}

#[test]
fn a_domain_that_spans_racks_leaves_the_tiers_to_the_others() {
    // Devices 0 and 4 are of one NVLink domain on racks 0 and 1: only the host in between reaches rack 1 by the pod.
    let mut parts = tiers().into_parts();
    parts.devices.retain(|d| d.name.ends_with('0'));
    for d in [0, 2] {
        parts.devices[d].nvlink = Some(0);
    }
    parts.hosts[0].links = [(Class::Pod, Link::rated(90.0, 5.0))].into();
    let fabric = Fabric::new(parts).unwrap();
    let hop =
        |class| fabric.classes(&[0, 1, 2]).into_iter().find(|h| h.class == class).map(|h| h.link.alpha_us);
    assert_eq!([hop(Class::NvLink), hop(Class::Rack), hop(Class::Pod)], [Some(2.5), Some(2.0), Some(9.0)]);
}

#[test]
fn tiers_that_contradict_themselves_or_lead_nowhere_are_refused() {
    let refused = |change: fn(&mut Parts)| {
        let mut parts = tiers().into_parts();
        change(&mut parts);
        Fabric::new(parts).unwrap_err().to_string()
    };
    let split = refused(|p| p.hosts[1].pod = Some(1));
    assert!(split.contains("hosts \"a0\" and \"a1\" are of rack 0 but not of the same pod"), "{split}");
    let nowhere = refused(|p| p.links.retain(|class, _| *class == Class::Rack));
    assert!(nowhere.contains("has no path to the others: give a link `network`"), "{nowhere}");
    // In one pod, of which nobody says what its links are.
    let pod = refused(|p| {
        p.links.retain(|class, _| *class == Class::Rack);
        p.devices.retain(|d| d.host < 3);
    });
    assert!(pod.contains("give a link `pod` or `network`"), "{pod}");
    // In one rack, whose link is there.
    let mut parts = tiers().into_parts();
    parts.links.retain(|class, _| *class == Class::Rack);
    parts.devices.retain(|d| d.host < 2);
    assert!(Fabric::new(parts).is_ok());
}

/// Two hosts of two sockets with a GPU each, and a third GPU beside the last.
fn parts() -> Parts {
    let device =
        |name: &str, host, at| Device { socket: Some(at), numa: Some(at), ..Device::new(name, host, 0) };
    let mut devices = vec![
        device("a0", 0, 0),
        device("a1", 0, 1),
        device("b0", 1, 0),
        device("b1", 1, 1),
        device("b2", 1, 1),
    ];
    devices[3].switch = Some(7);
    devices[4].switch = Some(7);
    Parts {
        name: "test".to_owned(),
        models: vec![DeviceModel::new("gpu", Kind::Gpu, Some(16 << 30))],
        hosts: vec![Host::new("a"), Host::new("b")],
        devices,
        links: [(Class::Host, Link::rated(5.0, 10.0)), (Class::Network, Link::rated(20.0, 1.0))].into(),
        pairs: vec![],
    }
}

#[test]
fn the_nearest_class_counts_and_the_slower_host() {
    let mut parts = parts();
    parts.hosts[1].links.insert(Class::Network, Link::rated(1.0, 0.5));
    let fabric = Fabric::new(parts).unwrap();
    let class = |a, b| fabric.between(a, b).class;
    assert_eq!((class(0, 1), class(3, 4), class(2, 3)), (Class::Host, Class::Switch, Class::Host));
    assert_eq!((class(0, 2), class(3, 3)), (Class::Network, Class::Device));
    assert_eq!(fabric.between(0, 2).link, Link::rated(20.0, 0.5));
    assert_eq!(fabric.between(3, 4).link, Link::assumed(Class::Switch));
    assert_eq!(fabric.islands(&fabric.all(), Class::Switch), [vec![0], vec![1], vec![2], vec![3, 4]]);
    assert_eq!(fabric.islands(&fabric.all(), Class::Host), [vec![0, 1], vec![2, 3, 4]]);
    assert_eq!(fabric.islands(&[4, 0, 3, 4], Class::Host), [vec![0], vec![3, 4]]);
}

#[test]
fn nvlink_may_span_hosts_and_need_no_network() {
    let mut parts = parts();
    parts.links.clear();
    let refused = Fabric::new(parts.clone()).unwrap_err().to_string();
    assert!(refused.contains("host \"a\" has no path"), "{refused}");
    parts.devices.iter_mut().for_each(|d| d.nvlink = Some(0));
    let fabric = Fabric::new(parts).unwrap();
    assert_eq!(fabric.slowest(&fabric.all()).unwrap().class, Class::NvLink);
    assert_eq!(fabric.islands(&fabric.all(), Class::NvLink).len(), 1);
}

#[test]
fn what_makes_no_sense_is_refused_and_says_why() {
    type Change = fn(&mut Parts);
    let cases: &[(Change, &str)] = &[
        (|p| p.name.clear(), "its name is empty"),
        (|p| p.name = "x".repeat(300), "longer than 256"),
        (|p| p.models.clear(), "0 models, not 1 to 65536"),
        (|p| p.devices.clear(), "0 devices"),
        (|p| p.hosts = vec![Host::new("h"); 65_537], "65537 hosts"),
        (|p| p.models[0].memory_bytes = Some(0), "0 bytes of memory"),
        (|p| p.models[0].pci = Some("10de".into()), "not two numbers such as"),
        (|p| p.models[0].ranks = 0, "0 ranks"),
        (|p| p.models[0].tflops.f16 = Some(-1.0), "tflops.f16 = -1, not"),
        (|p| p.models[0].memory_gbps = Some(f64::NAN), "memory_gbps = NaN"),
        (|p| p.hosts[1].name = "a".into(), "two hosts are named \"a\""),
        (|p| p.hosts[1].name = "a\u{1b}[2J".into(), "control characters"),
        (|p| p.devices[1].name = "a0".into(), "two devices are named \"a0\""),
        (|p| p.devices[4].host = 2, "host = 2, and there are 2"),
        (|p| p.devices[0].model = 1, "model = 1, and there are 1"),
        (|p| p.devices[0].host = 1, "comes after"),
        (|p| p.devices[4].numa = Some(0), "switch 7 but not of the same numa"),
        (|p| p.devices[1].numa = Some(0), "numa 0 but not of the same socket"),
        (|p| p.links = [(Class::Network, Link::rated(-1.0, 1.0))].into(), "link network has alpha_us = -1"),
        (|p| p.links = [(Class::Network, Link::rated(1.0, 0.0))].into(), "link network has gbps = 0"),
        (|p| p.devices[0].bus = Some("0000:07:00".into()), "not a PCI address"),
        (|p| p.devices[0].bus = Some("0000:07:0g.0".into()), "not a PCI address"),
        (|p| p.devices[0].processors = Some("0-".into()), "not a list such as"),
        (|p| p.devices[0].processors = Some(String::new()), "not a list such as"),
        (|p| p.hosts[0].nics = vec![nic("")], "interface's name is empty"),
        (|p| p.hosts[0].nics = vec![Nic { bus: Some("7".into()), ..nic("eth0") }], "not a PCI address"),
        (|p| p.hosts[0].nics = vec![nic("eth0"); 257], "257 network interfaces"),
        (|p| p.links.clear(), "host \"a\" has no path to the others"),
        (|p| p.pairs = vec![pair(1, 1)], "not a lower and a higher"),
        (|p| p.pairs = vec![pair(0, 9)], "not a lower and a higher"),
        (|p| p.pairs = vec![pair(0, 1), pair(0, 1)], "two links"),
        (|p| p.pairs = vec![Pair { class: Class::Numa, ..pair(0, 2) }], "can't have a link of class numa"),
        (|p| p.pairs = vec![Pair { class: Class::Device, ..pair(0, 1) }], "class device"),
    ];
    fn nic(name: &str) -> Nic {
        Nic { name: name.into(), mbit_per_s: None, numa: None, switch: None, bus: None }
    }
    fn pair(a: u32, b: u32) -> Pair {
        Pair { a, b, class: Class::NvLink, link: Link::rated(1.0, 1.0) }
    }
    for (change, why) in cases {
        let mut changed = parts();
        change(&mut changed);
        let refused = Fabric::new(changed).unwrap_err().to_string();
        assert!(refused.contains(why), "{why}: {refused}");
        assert!(refused.len() < 300, "{refused}");
    }
    let mut many = parts();
    many.devices = (0..2000).map(|i| Device::new(format!("d{i}"), 0, 0)).collect();
    many.pairs = vec![pair(0, 1)];
    assert!(Fabric::new(many).unwrap_err().to_string().contains("at most 1024"));
}

#[test]
fn json_that_is_none_of_ours_is_refused() {
    let json = Fabric::new(parts()).unwrap().to_json();
    for (from, to, why) in [
        ("fabric/v1", "fabric/v2", "\"tensorwire.fabric/v1\" is read here"),
        ("\"name\"", "\"nome\"", "unknown field `nome`"),
        ("\"alpha_us\":5.0", "\"alpha_us\":-5.0", "alpha_us = -5"),
        ("\"alpha_us\":5.0", "\"alpha_us\":5.0,\"error\":0.1", "both `error` and `measured_at`"),
        ("\"host\":0", "\"host\":-1", "invalid value"),
        ("\"host\":0", "\"host\":4294967295", "host = 4294967295, and there are 2"),
        ("17179869184", "1e300", "invalid type"),
        ("\"network\"", "\"wire\"", "unknown variant `wire`"),
        ("]\n}\n", "", "EOF"),
    ] {
        let bad = json.replacen(from, to, 1);
        assert_ne!(bad, json, "{from}");
        let refused = Fabric::from_json(&bad).unwrap_err().to_string();
        assert!(refused.contains(why), "{why}: {refused}");
    }
}

#[test]
fn measured_links_say_how_sure_and_how_old() {
    let mut parts = parts();
    let measured =
        Link { alpha_us: 1.5, gbps: 9.0, basis: Basis::Measured { error: 0.1, at: 1_795_000_000 } };
    parts.links.insert(Class::Host, measured);
    parts.links.insert(Class::Numa, Link::assumed(Class::Numa));
    let fabric = Fabric::new(parts).unwrap();
    let json = fabric.to_json();
    assert!(
        json.contains("\"error\":0.1,\"measured_at\":1795000000}") && json.contains("\"assumed\":true"),
        "{json}"
    );
    assert_eq!(Fabric::from_json(&json).unwrap(), fabric);
    assert_eq!(measured.slower(Link::rated(1.0, 10.0)), Link::rated(1.5, 9.0));
}

#[test]
fn a_thousand_devices_are_cheap() {
    let mut parts = parts();
    parts.hosts = (0..128).map(|h| Host::new(format!("h{h}"))).collect();
    parts.devices = (0..1024)
        .map(|i| Device {
            socket: Some(i % 8 / 4),
            numa: Some(i % 8 / 4),
            nvlink: Some(i / 8),
            ..Device::new(format!("d{i}"), i / 8, 0)
        })
        .collect();
    let fabric = Fabric::new(parts).unwrap();
    let all = fabric.all();
    assert_eq!(fabric.slowest(&all).unwrap().class, Class::Network);
    assert_eq!(fabric.islands(&all, Class::Host).len(), 128);
    assert_eq!(fabric.classes(&all).len(), 2);
    assert_eq!(Fabric::from_json(&fabric.to_json()).unwrap(), fabric);
}
