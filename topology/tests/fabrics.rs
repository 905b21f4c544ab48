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
        (
            "leaf-spine.toml",
            1024,
            vec![(NvLink, 370.0, 128), (Rack, 48.0, 16), (Pod, 24.0, 4), (Network, 12.0, 1)],
        ),
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

/// The attribute of an element's text, as a number.
fn attribute(element: &str, name: &str) -> f64 {
    let value = element.split_once(&format!(" {name}=\"")).unwrap().1.split_once('"').unwrap().0;
    value.parse().unwrap()
}

/// The texts of a picture: where each begins, how far it reaches at most, and what it says.
fn texts(svg: &str) -> Vec<(f64, f64, f64, &str)> {
    let text = |element: &'_ str| {
        let (tag, rest) = element.split_once('>').unwrap();
        (attribute(tag, "x"), attribute(tag, "y"), rest.split_once("</text>").unwrap().0.len())
    };
    let all = svg.split("<text").skip(1);
    all.map(|element| {
        let (x, y, length) = text(element);
        let says = &element[element.find('>').unwrap() + 1..][..length];
        let letters = ["&quot;", "&lt;", "&gt;", "&amp;", "&apos;"]
            .iter()
            .fold(says.to_owned(), |s, e| s.replace(e, "x"));
        (x, y, letters.chars().count() as f64 * 7.4, says)
    })
    .collect()
}

#[track_caller]
fn is_a_clear_picture(fabric: &Fabric) -> String {
    let svg = fabric.to_svg();
    assert_eq!(svg, fabric.to_svg());
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    let (width, height) = (attribute(&svg, "width"), attribute(&svg, "height"));
    let texts = texts(&svg);
    for (i, a) in texts.iter().enumerate() {
        assert!(a.0 >= 0.0 && a.0 + a.2 <= width && a.1 <= height, "{a:?} is not in {width} x {height}");
        for b in &texts[..i] {
            let apart = (a.1 - b.1).abs() >= 13.0 || a.0 + a.2 <= b.0 || b.0 + b.2 <= a.0;
            assert!(apart, "{a:?} is over {b:?}");
        }
    }
    svg
}

#[test]
fn pictures_have_every_device_and_no_text_over_another() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    for folder in [folder.join("../examples/fabrics"), folder.join("tests/fixtures/fabrics")] {
        for file in std::fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            let fabric = Fabric::load(&path).unwrap();
            let svg = is_a_clear_picture(&fabric);
            let shown = if fabric.hosts().len() > 4 { 8 } else { fabric.devices().len() };
            for device in &fabric.devices()[..shown] {
                let name = device.name.rsplit('/').next().unwrap();
                assert!(svg.contains(&format!(">{name}<")), "{}: {name}", path.display());
            }
        }
    }
}

#[test]
fn a_picture_of_much_says_how_much_more_there_is() {
    let text = |count: u32, hosts: u32| {
        String::from(
            "name = \"<b>&\\\"\"\n[[model]]\nname = \"a <long> name that goes on & on for more letters than a line has\"
             kind = \"gpu\"\n[links]\nnetwork = { alpha_us = 1, gbps = 1 }\n"
        ) + &(0..hosts)
            .map(|i| {
                format!(
                    "[[host]]\nname = \"h{i}\"\ndevice = [{{ model = \"a <long> name that goes on & on for more letters than \
                     a line has\", count = {} }}]\n",
                    count + i % 2
                )
            })
            .collect::<String>()
    };
    let svg = is_a_clear_picture(&Fabric::from_toml(&text(1000, 1)).unwrap());
    assert!(svg.contains(">and 969 more<") && svg.contains("&lt;b&gt;&amp;"), "{svg}");
    let svg = is_a_clear_picture(&Fabric::from_toml(&text(1, 100)).unwrap());
    assert!(svg.contains(">and 69 more hosts<"), "{svg}");
    assert!(svg.len() < 1 << 20);
}

#[test]
fn every_preset_is_tested_here() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/fabrics");
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), 8);
}
