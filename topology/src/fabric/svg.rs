//! A picture of a fabric, as SVG.
//!
//! Frames are drawn as things hold each other: pods, racks, hosts, sockets, NUMA nodes, PCIe switches, cards. Two devices reach each
//! other by the innermost frame around both, whose colour and speed the key repeats. Hosts that are alike are drawn once.
//!
//! Frames grow with what is written in them, and no text is longer than it was counted for: nothing overlaps.

mod tiers;

use std::fmt::Write;

use super::{Basis, Class, Device, DeviceModel, Fabric, Host, Kind, Link, Nic};

/// The most that a frame shows, before it says how much more there is.
const MOST: usize = 32;

/// The most devices whose links pair by pair are drawn as a table.
const MOST_PAIRED: usize = 24;

/// The most hosts that are all drawn, even if they are alike.
const FEW: usize = 4;

/// The width at which a new row begins.
const WIDTH: f64 = 1500.0;

const GAP: f64 = 10.0;
const PAD: f64 = 12.0;
const LINE: f64 = 16.0;

/// Lines are 12 pixels high; a letter of no common font without serifs is wider than this on average.
const LETTER: f64 = 7.4;

/// The longest text of a line, in letters.
const LETTERS: usize = 44;

/// Something that is drawn at some place.
enum Shape {
    /// Lines in a box, the first in bold.
    Cell { lines: Vec<String>, fill: &'static str, stroke: &'static str },
    /// A title above others, so many in a row.
    Frame { title: Vec<String>, class: Class, columns: usize, inside: Vec<Shape> },
    /// A table with names above its columns and before its rows.
    Table { title: String, names: Vec<String>, rows: Vec<Vec<String>> },
}

fn colour(class: Class) -> &'static str {
    match class {
        Class::Device => "#64748b",
        Class::Card => "#b45309",
        Class::NvLink => "#15803d",
        Class::Switch => "#7c3aed",
        Class::Numa => "#0369a1",
        Class::Socket => "#475569",
        Class::Host => "#0f172a",
        Class::Rack => "#9a3412",
        Class::Pod => "#86198f",
        Class::Network => "#be185d",
    }
}

/// What people call a class.
fn words(class: Class) -> &'static str {
    match class {
        Class::Device => "ranks on one device",
        Class::Card => "card",
        Class::NvLink => "NVLink",
        Class::Switch => "PCIe switch",
        Class::Numa => "NUMA node",
        Class::Socket => "socket",
        Class::Host => "host",
        Class::Rack => "rack",
        Class::Pod => "pod",
        Class::Network => "network",
    }
}

impl Fabric {
    /// The fabric as a picture, in SVG. The same fabric gives the same bytes.
    pub fn to_svg(&self) -> String {
        let (hosts, network) = tiers::Tiers::new(self).shapes();
        // As many hosts in a row as fit.
        let widest = hosts.iter().map(|host| host.size().0).fold(0.0, f64::max);
        let columns = ((WIDTH / (widest + 2.0 * GAP)) as usize).clamp(1, hosts.len().max(1));
        let rows: Vec<&[Shape]> = hosts.chunks(columns).collect();
        let key = self.key();
        let title = format!("{}: {}", clip(self.name(), LETTERS), self.summary());
        let (key_width, key_height) = key.size();
        let row_size = |row: &[Shape]| {
            let width: f64 = row.iter().map(|host| host.size().0 + 2.0 * GAP).sum();
            (width, row.iter().map(|host| host.size().1).fold(0.0, f64::max))
        };
        let below: f64 = if network { 44.0 } else { 2.0 * GAP };
        let width =
            rows.iter().map(|row| row_size(row).0).fold(key_width.max(text_width(&title) * 1.4), f64::max);
        let mut out = String::new();
        let mut y = 50.0;
        for row in &rows {
            let (_, height) = row_size(row);
            let mut x = PAD;
            for host in *row {
                let (host_width, host_height) = host.size();
                host.draw(&mut out, x + GAP, y);
                if network {
                    let middle = x + GAP + host_width / 2.0;
                    line(
                        &mut out,
                        (middle, y + host_height),
                        (middle, y + height + 14.0),
                        colour(Class::Network),
                    );
                }
                x += host_width + 2.0 * GAP;
            }
            y += height;
            if network {
                line(&mut out, (PAD, y + 14.0), (x, y + 14.0), colour(Class::Network));
                text(
                    &mut out,
                    (PAD + GAP, y + 14.0 + LINE),
                    words(Class::Network),
                    colour(Class::Network),
                    true,
                );
            }
            y += below;
        }
        key.draw(&mut out, PAD + GAP, y + GAP);
        let (width, height) = (width + 2.0 * PAD, y + GAP + key_height + 2.0 * PAD);
        let mut svg = String::new();
        // Writing to a string can't fail.
        let _ = writeln!(
            svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" viewBox=\"0 0 {width:.0} \
             {height:.0}\" font-family=\"DejaVu Sans, Helvetica, Arial, sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>"
        );
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"30\" font-size=\"17\" font-weight=\"bold\" fill=\"#0f172a\">{}</text>",
            PAD + GAP,
            escape(&title)
        );
        svg + &out + "</svg>\n"
    }

    /// How much there is of what.
    fn summary(&self) -> String {
        let count = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        let mut parts = vec![count(self.hosts().len(), "host")];
        for (kind, what) in
            [(Kind::Gpu, "GPU"), (Kind::Accelerator, "accelerator"), (Kind::Cpu, "processor device")]
        {
            let n = (0..self.devices().len()).filter(|d| self.model(*d).kind == kind).count();
            if n > 0 {
                parts.push(count(n, what));
            }
        }
        parts.join(", ")
    }

    /// What reaches what how fast.
    fn key(&self) -> Shape {
        let all = self.all();
        let mut hops = self.classes(&all);
        // Several ranks on a device are worth a line where nothing else is.
        if hops.is_empty() {
            hops.push(self.between(0, 0));
        }
        let cell = |class: Class, link: Link| Shape::Cell {
            lines: vec![words(class).to_owned(), speed(&link), known(&link)],
            fill: "#ffffff",
            stroke: colour(class),
        };
        let inside: Vec<Shape> = hops.iter().map(|hop| cell(hop.class, hop.link)).collect();
        let mut title = vec!["Links".to_owned(), "by the innermost frame around two devices".to_owned()];
        if hops.iter().any(|hop| hop.class == Class::NvLink) {
            title[1] =
                "by NVLink where both have it, or else by the innermost frame around two devices".to_owned();
        }
        title.push("the slowest of each kind".to_owned());
        Shape::Frame { title, class: Class::Device, columns: inside.len(), inside }
    }
}

/// A host and what it holds.
struct View<'a> {
    fabric: &'a Fabric,
    host: &'a Host,
    /// Places among the fabric's devices.
    first: usize,
    devices: &'a [Device],
}

impl<'a> View<'a> {
    fn new(fabric: &'a Fabric, host: usize) -> View<'a> {
        let all = fabric.devices();
        let first = all.partition_point(|d| (d.host as usize) < host);
        let end = all.partition_point(|d| (d.host as usize) <= host);
        View { fabric, host: &fabric.hosts()[host], first, devices: &all[first..end] }
    }

    fn pairs(&self) -> impl Iterator<Item = (usize, usize, &'a Link)> {
        let range = self.first..self.first + self.devices.len();
        let first = self.first;
        // A host without devices has none to look for.
        let all: &'a [super::Pair] = if range.is_empty() { &[] } else { &self.fabric.parts().pairs[..] };
        all.iter().filter_map(move |p| {
            let (a, b) = (p.a as usize, p.b as usize);
            (range.contains(&a) && range.contains(&b)).then(|| (a - first, b - first, &p.link))
        })
    }

    /// Whether two hosts differ in names and addresses alone, and in which NVLinks span.
    fn is_like(&self, other: &View<'_>) -> bool {
        let place = |d: &Device| (d.model, d.socket, d.numa, d.switch, d.card, d.nvlink.is_some());
        let nic = |n: &Nic| (n.mbit_per_s, n.numa, n.switch);
        self.devices.iter().map(place).eq(other.devices.iter().map(place))
            && self.host.nics.iter().map(nic).eq(other.host.nics.iter().map(nic))
            && self.host.links == other.host.links
            && self.pairs().eq(other.pairs())
    }

    fn link(&self, class: Class) -> Link {
        self.fabric.parts().link(self.host, class)
    }

    /// A frame's title: what it is, and how fast things in it reach each other, where some do by nothing nearer.
    fn title(&self, what: String, class: Class, matters: bool) -> Vec<String> {
        if matters { vec![what, speed(&self.link(class))] } else { vec![what] }
    }

    fn shape(&self, count: usize) -> Shape {
        let name = clip(&self.host.name, LETTERS / 2);
        let what = match count {
            1 if name == "host" => name,
            1 => format!("host {name}"),
            _ => format!("{name} and {} more hosts like it", count - 1),
        };
        let nodes = distinct(self.devices, |d| Some((d.socket, d.numa)));
        let sockets = distinct(self.devices, |d| d.socket.map(Some));
        let mut inside = Vec::new();
        for socket in &sockets {
            let here: Vec<usize> = self.of(|d| d.socket == *socket);
            let numas = distinct(here.iter().map(|i| &self.devices[*i]), |d| Some(d.numa));
            let frames: Vec<Shape> = numas.iter().map(|numa| self.node(*socket, *numa)).collect();
            let columns = fitting(&frames, 2);
            let title = self.title(
                format!("socket {}", socket.map_or("?".to_owned(), |s| s.to_string())),
                Class::Socket,
                numas.len() > 1,
            );
            inside.push(Shape::Frame { title, class: Class::Socket, columns, inside: capped(frames) });
        }
        // Of no known socket.
        let homeless: Vec<Option<u32>> =
            distinct(self.devices.iter().filter(|d| d.socket.is_none()), |d| Some(d.numa));
        inside.extend(homeless.iter().map(|numa| self.node(None, *numa)));
        let orphans: Vec<Shape> =
            self.host.nics.iter().filter(|nic| !self.is_near(nic)).map(|nic| self.nic(nic)).collect();
        inside.extend(capped(orphans));
        if let Some(table) = self.table() {
            inside.push(table);
        }
        let domains = distinct(self.devices, |d| d.nvlink.map(Some));
        for (i, domain) in domains.iter().enumerate().take(MOST) {
            let members = self.devices.iter().filter(|d| d.nvlink == *domain);
            let names: Vec<&str> = members.map(|d| self.short(d)).collect();
            let which = match names[..] {
                [one] => one.to_owned(),
                [first, .., last] => format!("{first} to {last}, {} devices", names.len()),
                [] => continue,
            };
            let title = if domains.len() > 1 { format!("NVLink {i}") } else { "NVLink".to_owned() };
            let lines = vec![title, clip(&which, LETTERS), speed(&self.link(Class::NvLink))];
            inside.push(Shape::Cell { lines, fill: "#f0fdf4", stroke: colour(Class::NvLink) });
        }
        let title = self.title(what, Class::Host, nodes.len() > 1);
        let inside = capped(inside);
        Shape::Frame { title, class: Class::Host, columns: fitting(&inside, 2), inside }
    }

    fn of(&self, keep: impl Fn(&Device) -> bool) -> Vec<usize> {
        (0..self.devices.len()).filter(|i| keep(&self.devices[*i])).collect()
    }

    /// Whether an interface is on a node that is drawn.
    fn is_near(&self, nic: &Nic) -> bool {
        nic.numa.is_some() && self.devices.iter().any(|d| d.numa == nic.numa)
    }

    /// What a NUMA node holds.
    fn node(&self, socket: Option<u32>, numa: Option<u32>) -> Shape {
        let here = self.of(|d| d.socket == socket && d.numa == numa);
        let nics: Vec<&Nic> = match numa {
            // A node's interfaces are drawn with the first of its sockets, if the fabric has it in several.
            Some(_) if self.devices.iter().find(|d| d.numa == numa).is_some_and(|d| d.socket == socket) => {
                self.host.nics.iter().filter(|nic| nic.numa == numa).collect()
            }
            _ => Vec::new(),
        };
        let direct = |i: &&usize| self.devices[**i].switch.is_none() && self.devices[**i].card.is_none();
        let processors = |i: &usize| self.fabric.model(self.first + i).kind == Kind::Cpu;
        let (cpus, others): (Vec<usize>, Vec<usize>) =
            here.iter().filter(direct).copied().partition(processors);
        let mut inside: Vec<Shape> = self.cells(&cpus);
        let switches = distinct(
            here.iter().map(|i| self.devices[*i].switch).chain(nics.iter().map(|n| n.switch)),
            |s| s.map(Some),
        );
        for switch in &switches {
            let below: Vec<usize> =
                here.iter().copied().filter(|i| self.devices[*i].switch == *switch).collect();
            let mut held = self.cards(&below);
            // A card's own switch needs no frame of its own.
            if !matches!(held[..], [Shape::Frame { .. }]) {
                let devices = held.len();
                held.extend(nics.iter().filter(|n| n.switch == *switch).map(|n| self.nic(n)));
                let title = self.title("PCIe switch".to_owned(), Class::Switch, devices > 1);
                let columns = columns(held.len());
                held = vec![Shape::Frame { title, class: Class::Switch, columns, inside: capped(held) }];
            }
            inside.append(&mut held);
        }
        let loose: Vec<usize> = here
            .iter()
            .copied()
            .filter(|i| self.devices[*i].switch.is_none() && self.devices[*i].card.is_some())
            .collect();
        inside.extend(self.cards(&loose));
        inside.extend(self.cells(&others));
        inside.extend(nics.iter().filter(|n| n.switch.is_none()).map(|n| self.nic(n)));
        // Devices of unknown nodes may be far from each other: their frame is no link.
        let (what, matters) = match numa {
            Some(numa) => (format!("NUMA node {numa}"), here.len() > 1),
            None => ("NUMA node unknown".to_owned(), false),
        };
        let columns = fitting(&inside, columns(inside.len()));
        Shape::Frame {
            title: self.title(what, Class::Numa, matters),
            class: Class::Numa,
            columns,
            inside: capped(inside),
        }
    }

    /// Devices, with a frame around those of a card.
    fn cards(&self, devices: &[usize]) -> Vec<Shape> {
        let mut shapes = Vec::new();
        for card in distinct(devices.iter().map(|i| self.devices[*i].card), |c| c.map(Some)) {
            let on: Vec<usize> = devices.iter().copied().filter(|i| self.devices[*i].card == card).collect();
            let title = format!("card {}", card.unwrap_or_default());
            let inside = self.cells(&on);
            let columns = columns(inside.len());
            let title = self.title(title, Class::Card, on.len() > 1);
            shapes.push(Shape::Frame { title, class: Class::Card, columns, inside });
        }
        let loose: Vec<usize> = devices.iter().copied().filter(|i| self.devices[*i].card.is_none()).collect();
        shapes.extend(self.cells(&loose));
        shapes
    }

    /// A device's name without its host's.
    fn short(&self, device: &'a Device) -> &'a str {
        let name = &device.name;
        name.strip_prefix(&*self.host.name).and_then(|rest| rest.strip_prefix('/')).unwrap_or(name)
    }

    fn cells(&self, devices: &[usize]) -> Vec<Shape> {
        let cell = |i: &usize| {
            let model = self.fabric.model(self.first + i);
            let device = &self.devices[*i];
            let mut lines = vec![clip(self.short(device), LETTERS)];
            lines.extend(about(model, device));
            let fill = match model.kind {
                Kind::Cpu => "#e0e7ff",
                Kind::Gpu => "#dcfce7",
                Kind::Accelerator => "#fef3c7",
            };
            let stroke = if device.nvlink.is_some() { colour(Class::NvLink) } else { colour(Class::Device) };
            Shape::Cell { lines, fill, stroke }
        };
        capped(devices.iter().map(cell).collect())
    }

    fn nic(&self, nic: &Nic) -> Shape {
        let speed = match nic.mbit_per_s {
            Some(mbit) if mbit >= 1000 => format!("{} Gbit/s", number(mbit as f64 / 1000.0)),
            Some(mbit) => format!("{mbit} Mbit/s"),
            None => "speed unknown".to_owned(),
        };
        let lines = vec![clip(&nic.name, LETTERS / 2), "network interface".to_owned(), speed];
        Shape::Cell { lines, fill: "#fdf2f8", stroke: colour(Class::Network) }
    }

    /// The links of single pairs.
    fn table(&self) -> Option<Shape> {
        let mut members: Vec<usize> = self.pairs().flat_map(|(a, b, _)| [a, b]).collect();
        members.sort_unstable();
        members.dedup();
        if members.is_empty() || members.len() > MOST_PAIRED {
            return (!members.is_empty())
                .then(|| note(format!("{} devices with links of their own", members.len())));
        }
        let names = members.iter().map(|m| clip(self.short(&self.devices[*m]), 12)).collect();
        let at = |m: usize| members.iter().position(|known| *known == m);
        let mut rows = vec![vec![String::new(); members.len()]; members.len()];
        for (a, b, link) in self.pairs() {
            if let (Some(a), Some(b)) = (at(a), at(b)) {
                rows[a][b] = number(link.gbps);
                rows[b][a] = number(link.gbps);
            }
        }
        Some(Shape::Table { title: "NVLink, GB/s by pair".to_owned(), names, rows })
    }
}

/// What is known of a device, in lines.
fn about(model: &DeviceModel, device: &Device) -> Vec<String> {
    let mut lines = vec![clip(&model.name, LETTERS)];
    if let Some(processors) = &device.processors {
        lines.push(clip(&format!("{} ranks, processors {processors}", model.ranks), LETTERS));
    } else if model.ranks > 1 {
        lines.push(format!("{} ranks", model.ranks));
    }
    let memory = model.memory_bytes.map_or("memory unknown".to_owned(), |bytes| {
        format!("{} GiB", number(bytes as f64 / (1u64 << 30) as f64))
    });
    lines.push(match model.memory_gbps {
        Some(gbps) => format!("{memory} at {} GB/s", number(gbps)),
        None => memory,
    });
    let tflops = model.tflops;
    let of = [("f32", tflops.f32), ("f16", tflops.f16), ("f8", tflops.f8), ("i8", tflops.i8)];
    let given: Vec<String> =
        of.iter().filter_map(|(what, n)| Some(format!("{what} {}", number((*n)?)))).collect();
    if !given.is_empty() {
        lines.push(format!("TFLOP/s: {}", given.join(", ")));
    }
    lines
}

/// The different values that some have, in the order in which they come.
fn distinct<T, V: PartialEq>(all: impl IntoIterator<Item = T>, of: impl Fn(T) -> Option<V>) -> Vec<V> {
    let mut found = Vec::new();
    for value in all.into_iter().filter_map(of) {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}

/// No more than a frame shows, and how many more there are.
fn capped(mut shapes: Vec<Shape>) -> Vec<Shape> {
    if shapes.len() > MOST {
        let more = shapes.len() - (MOST - 1);
        shapes.truncate(MOST - 1);
        shapes.push(note(format!("and {more} more")));
    }
    shapes
}

fn note(text: String) -> Shape {
    Shape::Cell { lines: vec![text], fill: "#ffffff", stroke: colour(Class::Device) }
}

/// As many in a row as fit, of at most so many.
fn fitting(shapes: &[Shape], most: usize) -> usize {
    let width = |columns: usize| {
        let rows =
            shapes.chunks(columns).map(|row| row.iter().map(|shape| shape.size().0 + GAP).sum::<f64>());
        rows.fold(0.0, f64::max)
    };
    (1..=most.min(shapes.len())).rev().find(|columns| width(*columns) <= WIDTH).unwrap_or(1)
}

/// So many in a row that the whole is about as wide as high.
fn columns(count: usize) -> usize {
    match count {
        0..=3 => count.max(1),
        4 => 2,
        5..=6 => 3,
        _ => 4,
    }
}

/// A number with as many digits as matter.
fn number(n: f64) -> String {
    let digits = if n >= 100.0 {
        0
    } else if n >= 10.0 {
        1
    } else if n >= 1.0 {
        2
    } else {
        3
    };
    let text = format!("{n:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

fn speed(link: &Link) -> String {
    let about = if link.basis == Basis::Assumed { "about " } else { "" };
    format!("{about}{} GB/s, {} us", number(link.gbps), number(link.alpha_us))
}

fn known(link: &Link) -> String {
    match link.basis {
        Basis::Measured { error, .. } => format!("measured, within {} %", number(100.0 * error)),
        Basis::Rated => "as rated".to_owned(),
        Basis::Assumed => "assumed".to_owned(),
    }
}

fn clip(text: &str, letters: usize) -> String {
    if text.chars().count() <= letters {
        return text.to_owned();
    }
    text.chars().take(letters - 1).chain(['…']).collect()
}

fn text_width(text: &str) -> f64 {
    // Letters of other scripts may be twice as wide.
    text.chars().map(|c| if c.is_ascii() { LETTER } else { 2.0 * LETTER }).sum()
}

fn escape(text: &str) -> String {
    quick_xml::escape::escape(text).into_owned()
}

fn line(out: &mut String, from: (f64, f64), to: (f64, f64), colour: &str) {
    let _ = writeln!(
        out,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\" stroke-width=\"2\"/>",
        from.0, from.1, to.0, to.1
    );
}

fn rectangle(
    out: &mut String,
    (x, y): (f64, f64),
    (width, height): (f64, f64),
    fill: &str,
    stroke: &str,
    rounded: f64,
) {
    let _ = writeln!(
        out,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" rx=\"{rounded}\" fill=\"{fill}\" \
         stroke=\"{stroke}\" stroke-width=\"1.5\"/>"
    );
}

fn text(out: &mut String, (x, y): (f64, f64), what: &str, colour: &str, bold: bool) {
    let weight = if bold { " font-weight=\"bold\"" } else { "" };
    let _ =
        writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" fill=\"{colour}\"{weight}>{}</text>", escape(what));
}

impl Shape {
    fn size(&self) -> (f64, f64) {
        let widest = |lines: &[String]| lines.iter().map(|line| text_width(line)).fold(0.0, f64::max);
        match self {
            Shape::Cell { lines, .. } => (widest(lines) + 2.0 * PAD, lines.len() as f64 * LINE + PAD),
            Shape::Frame { title, columns, inside, .. } => {
                let (mut width, mut height) = (0.0f64, 0.0);
                for row in inside.chunks((*columns).max(1)) {
                    let sizes: Vec<(f64, f64)> = row.iter().map(Shape::size).collect();
                    width = width.max(sizes.iter().map(|size| size.0 + GAP).sum::<f64>() - GAP);
                    height += sizes.iter().map(|size| size.1).fold(0.0, f64::max) + GAP;
                }
                let head = title.len() as f64 * LINE + PAD;
                (width.max(widest(title)) + 2.0 * PAD, head + height + PAD - GAP)
            }
            Shape::Table { title, names, rows } => {
                let column = widest(names).max(widest(&rows.concat())) + GAP;
                let width = column * (names.len() + 1) as f64;
                (width.max(text_width(title)) + 2.0 * PAD, (names.len() + 2) as f64 * LINE + 2.0 * PAD)
            }
        }
    }

    fn draw(&self, out: &mut String, x: f64, y: f64) {
        let size = self.size();
        match self {
            Shape::Cell { lines, fill, stroke } => {
                rectangle(out, (x, y), size, fill, stroke, 4.0);
                for (i, words) in lines.iter().enumerate() {
                    text(out, (x + PAD, y + (i + 1) as f64 * LINE), words, "#0f172a", i == 0);
                }
            }
            Shape::Frame { title, class, columns, inside } => {
                let fill = match class {
                    Class::Host => "#f8fafc",
                    Class::Numa => "#f0f9ff",
                    _ => "#ffffff",
                };
                rectangle(out, (x, y), size, fill, colour(*class), 7.0);
                for (i, words) in title.iter().enumerate() {
                    text(out, (x + PAD, y + (i + 1) as f64 * LINE + 2.0), words, colour(*class), i == 0);
                }
                let mut top = y + title.len() as f64 * LINE + PAD;
                for row in inside.chunks((*columns).max(1)) {
                    let mut left = x + PAD;
                    for shape in row {
                        shape.draw(out, left, top);
                        left += shape.size().0 + GAP;
                    }
                    top += row.iter().map(|shape| shape.size().1).fold(0.0, f64::max) + GAP;
                }
            }
            Shape::Table { title, names, rows } => {
                rectangle(out, (x, y), size, "#f0fdf4", colour(Class::NvLink), 4.0);
                text(out, (x + PAD, y + LINE), title, colour(Class::NvLink), true);
                let widest =
                    names.iter().chain(rows.iter().flatten()).map(|t| text_width(t)).fold(0.0, f64::max)
                        + GAP;
                for (i, name) in names.iter().enumerate() {
                    let across = x + PAD + (i + 1) as f64 * widest;
                    let down = y + (i + 3) as f64 * LINE;
                    text(out, (across, y + 2.0 * LINE), name, "#0f172a", true);
                    text(out, (x + PAD, down), name, "#0f172a", true);
                    for (j, value) in rows[i].iter().enumerate().filter(|(_, value)| !value.is_empty()) {
                        text(out, (x + PAD + (j + 1) as f64 * widest, down), value, "#0f172a", false);
                    }
                }
            }
        }
    }
}
