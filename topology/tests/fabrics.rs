//! The presets, and what they say.

use std::path::Path;

use tensorwire_topology::Fabric;
use tensorwire_topology::fabric::Class;

fn preset(name: &str) -> Fabric {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/fabrics").join(name);
    Fabric::from_toml(&std::fs::read_to_string(&path).unwrap()).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// What the devices that a model would run on reach each other by, and how many sets of them that makes.
fn classes(fabric: &Fabric) -> Vec<(Class, f64, usize)> {
    let workers = fabric.workers();
    let islands = |class| fabric.islands(&workers, class).len();
    fabric.classes(&workers).iter().map(|hop| (hop.class, hop.link.gbps, islands(hop.class))).collect()
}

#[test]
fn each_preset_is_what_its_name_says() {
    use Class::*;
    for (name, devices, expected) in [
        ("two-cores.toml", 1, vec![]),
        ("dual-socket.toml", 2, vec![(Host, 20.0, 1)]),
        ("8-gpus-nvlink.toml", 8, vec![(NvLink, 240.0, 1)]),
        ("128-nodes.toml", 1024, vec![(NvLink, 370.0, 128), (Network, 48.0, 1)]),
        ("four-pcs.toml", 4, vec![(Network, 0.117, 1)]),
        ("8-accelerators.toml", 8, vec![(Card, 24.0, 2), (Numa, 12.0, 1)]),
        ("32-accelerators.toml", 32, vec![(Card, 24.0, 8), (Numa, 12.0, 2), (Host, 8.0, 1)]),
    ] {
        let fabric = preset(name);
        assert_eq!((fabric.workers().len(), classes(&fabric)), (devices, expected), "{name}");
        assert_eq!(Fabric::from_json(&fabric.to_json()).unwrap(), fabric, "{name}");
    }
}

#[test]
fn the_32_devices_have_the_distances_of_their_cards_and_nodes() {
    let fabric = preset("32-accelerators.toml");
    let distance = |a, b| fabric.between(a, b).link.alpha_us;
    for (a, b, expected) in
        [(0, 3, 4.0), (0, 4, 8.0), (0, 15, 8.0), (0, 16, 12.0), (15, 16, 12.0), (28, 31, 4.0)]
    {
        assert_eq!(distance(a, b), expected, "{a} {b}");
    }
    assert_eq!(fabric.model(0).memory_bytes, Some(16_857_746_636));
}

#[test]
fn every_preset_is_tested_here() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/fabrics");
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), 7);
}
