//! The plan as a picture: ranks are columns, and a token passes from the top to the bottom.

use super::notes::{size, time};
use super::view::{Group, Row, groups, ranges};
use super::{Collective, Plan};
use crate::fabric::{Fabric, Hop};
use crate::svg::{Anchor, Rect, Svg, text_width};
use crate::{Error, Result};

const GROUND: &str = "#ffffff";
const INK: &str = "#24292f";
const FAINT: &str = "#57606a";
const SLOT: &str = "#f3f5f8";
const RULE: &str = "#afb8c1";
// Told apart with any colour vision, and in grey.
const OWN: &str = "#0072b2";
const COPY: &str = "#f7cf74";
const COPY_STRIPE: &str = "#e69f00";
const COPIES: &str = "url(#copies)";
const ISLAND: &str = "#d3e4d6";
const BAND: &str = "#fde9dc";
const TRAFFIC: &str = "#f0a878";

const LEFT: f64 = 216.0;
const RIGHT: f64 = 24.0;
/// Room for the ranks; with few, they aren't drawn wider than this each.
const COLUMNS: f64 = 1040.0;
const WIDEST: f64 = 260.0;
const GAP: f64 = 4.0;
/// Narrower columns than this have their titles at the left.
const NARROW: f64 = 56.0;
/// The smallest size of text.
const SMALLEST: f64 = 6.0;
/// Columns at most: more wouldn't be seen.
const MOST: usize = 64;

impl Plan {
    /// The plan as an SVG picture: a column a rank with what it holds, and between them what the ranks
    /// exchange for each token. Of more than 64 ranks the first 64 are drawn.
    pub fn svg(&self) -> String {
        self.draw(&[])
    }

    /// The [picture](Plan::svg) with what joins the ranks above them: a line for each class of links, in it a band
    /// for each set of ranks that reach each other by that class or nearer. Rank `i` runs on `devices[i]` of the
    /// fabric.
    ///
    /// Error: [`Error::InvalidPlan`] if there isn't a device for each rank.
    pub fn svg_on(&self, fabric: &Fabric, devices: &[usize]) -> Result<String> {
        if devices.len() != self.world || devices.iter().any(|d| *d >= fabric.devices().len()) {
            let (found, all) = (devices.len(), fabric.devices().len());
            let what = format!("it has {} ranks, and {found} of {all} devices to run on", self.world);
            return Err(Error::InvalidPlan(what));
        }
        Ok(self.draw(&levels(fabric, devices)))
    }

    fn draw(&self, levels: &[Level]) -> String {
        let drawn = self.world.min(MOST);
        let slot = (COLUMNS / drawn as f64).min(WIDEST);
        let traffic = (self.layers.iter().flat_map(|l| &l.collectives).chain(&self.vocab.collectives))
            .map(|c| c.bytes_per_token)
            .sum();
        let mut picture = Picture { svg: Svg::new(), y: 0.0, drawn, slot, world: self.world, traffic };
        picture.svg.stripes("copies", COPY, COPY_STRIPE);
        picture.heading(self);
        levels.iter().for_each(|level| picture.level(level));
        picture.shares(self);
        for group in groups(self) {
            picture.group(&group);
        }
        picture.legend();
        let (width, height) = (picture.right() + RIGHT, picture.y);
        picture.svg.finish(width, height, GROUND)
    }
}

/// A class of links, and the ranks that hang together by it.
struct Level {
    class: &'static str,
    cost: String,
    /// By rank: which island it is in, and what that is called.
    islands: Vec<(usize, String)>,
}

/// The classes of links between these devices, the farthest first.
fn levels(fabric: &Fabric, devices: &[usize]) -> Vec<Level> {
    let mut used = devices.to_vec();
    used.sort_unstable();
    used.dedup();
    let host_of = |device: usize| &fabric.hosts()[fabric.devices()[device].host as usize].name;
    let level = |hop: &Hop| {
        let islands = fabric.islands(&used, hop.class);
        let island = |device: &usize| {
            let found = islands.iter().position(|island| island.binary_search(device).is_ok()).unwrap_or(0);
            let hosts = islands[found].iter().map(|d| host_of(*d));
            let one_host = hosts.clone().all(|host| host == host_of(*device));
            (found, if one_host { host_of(*device).clone() } else { fabric.name().to_owned() })
        };
        Level {
            class: hop.class.name(),
            cost: format!("{} us, {} GB/s", significant(hop.link.alpha_us), significant(hop.link.gbps)),
            islands: devices.iter().map(island).collect(),
        }
    };
    fabric.classes(&used).iter().rev().map(level).collect()
}

struct Picture {
    svg: Svg,
    /// Where the next thing goes.
    y: f64,
    /// Ranks that are drawn.
    drawn: usize,
    /// The width of a rank's column, with the gap to the next.
    slot: f64,
    world: usize,
    /// Bytes that are exchanged for a token.
    traffic: u64,
}

impl Picture {
    fn right(&self) -> f64 {
        (LEFT + self.slot * self.drawn as f64).max(760.0)
    }

    fn left_of(&self, rank: usize) -> f64 {
        LEFT + self.slot * rank as f64
    }

    fn width(&self) -> f64 {
        self.slot - self.gap()
    }

    fn gap(&self) -> f64 {
        if self.slot < NARROW { GAP / 2.0 } else { GAP }
    }

    /// What is left free at both sides of a column.
    fn margin(&self) -> f64 {
        if self.slot < NARROW { 1.0 } else { GAP }
    }

    fn heading(&mut self, plan: &Plan) {
        let m = &plan.model;
        let ranks =
            if plan.world == 1 { "on one rank".to_owned() } else { format!("over {} ranks", plan.world) };
        let title = format!("{} of {} parameters {ranks}", m.model_type, parameters(m.parameters));
        self.svg.text((16.0, 32.0), 19.0, INK, Anchor::Start, &title);
        let line = format!(
            "{} layers, hidden {}, {} of weights, {}. Predicted: {} a token, {} of it exchanges.",
            m.num_layers,
            m.hidden_size,
            size(plan.ranks.iter().map(|r| r.weight_bytes).sum()),
            m.dtype,
            time(plan.predicted.decode_us_per_token),
            time(plan.predicted.comm_us_per_token)
        );
        let small = fitting(&line, self.right() - 16.0, 12.0).unwrap_or(SMALLEST);
        self.svg.text((16.0, 53.0), small, FAINT, Anchor::Start, &line);
        self.y = 76.0;
        if self.world > self.drawn {
            let line = format!("Ranks {} to {} are not drawn.", self.drawn, self.world - 1);
            self.svg.text((16.0, 70.0), 12.0, FAINT, Anchor::Start, &line);
            self.y += 16.0;
        }
    }

    /// A band over each island of a class of links.
    fn level(&mut self, level: &Level) {
        self.side(self.y + 9.0, &format!("{} links", level.class), 12.0, INK);
        self.side(self.y + 21.0, &level.cost, 10.5, FAINT);
        let mut start = 0;
        while start < self.drawn {
            let (island, name) = &level.islands[start];
            let run = level.islands[start..self.drawn].iter().take_while(|(i, _)| i == island).count();
            let width = self.slot * run as f64 - self.gap();
            let band = Rect { x: self.left_of(start), y: self.y, width, height: 20.0 };
            self.svg.rect(band, 3.0, ISLAND);
            if let Some(size) = fitting(name, width - 4.0, 11.0) {
                let at = (band.x + width / 2.0, self.y + 10.0 + size * 0.36);
                self.svg.text(at, size, INK, Anchor::Middle, name);
            }
            start += run;
        }
        self.y += 30.0;
    }

    /// The ranks' numbers, and the bytes that each holds.
    fn shares(&mut self, plan: &Plan) {
        for rank in 0..self.drawn {
            let middle = self.left_of(rank) + self.width() / 2.0;
            let text = if self.slot >= NARROW { format!("rank {rank}") } else { rank.to_string() };
            let size = fitting(&text, self.width(), 14.0).unwrap_or(SMALLEST);
            self.svg.text((middle, self.y + 10.0), size, INK, Anchor::Middle, &text);
        }
        if self.slot < NARROW {
            self.side(self.y + 10.0, "rank", 12.0, INK);
        }
        self.y += 18.0;
        self.amounts("weights", plan.ranks.iter().map(|r| r.weight_bytes));
        if plan.ranks.iter().any(|r| r.kv_bytes_per_token > 0) {
            self.amounts("KV cache a token", plan.ranks.iter().map(|r| r.kv_bytes_per_token));
        }
        self.y += 8.0;
    }

    /// A row of bars for bytes, in one unit.
    fn amounts(&mut self, what: &str, bytes: impl Iterator<Item = u64>) {
        let bytes: Vec<u64> = bytes.collect();
        let largest = bytes.iter().copied().max().unwrap_or(0).max(1);
        let (unit, by) = unit(largest);
        self.label(what, &format!("in {unit}"));
        for (rank, bytes) in bytes.iter().enumerate().take(self.drawn) {
            let value = significant(*bytes as f64 / by);
            let tip = format!("rank {rank}: {} of {what}", size(*bytes));
            self.bar(rank, *bytes as f64 / largest as f64, RULE, INK, &value, &tip);
        }
        self.y += 36.0;
    }

    fn group(&mut self, group: &Group<'_>) {
        let top = self.y;
        if !group.title.is_empty() {
            let title =
                if group.times > 1 { format!("{}, each:", group.title) } else { format!("{}:", group.title) };
            self.svg.text((28.0, self.y + 14.0), 13.0, INK, Anchor::Start, &title);
            self.y += 24.0;
        }
        for stage in &group.stages {
            for row in &stage.rows {
                self.row(row);
            }
            for exchange in &stage.exchanges {
                self.exchange(exchange, group.times);
            }
        }
        if !group.title.is_empty() {
            let bottom = self.y - 6.0;
            let bracket = [(22.0, top), (16.0, top), (16.0, bottom), (22.0, bottom)];
            self.svg.curve(&bracket, RULE, "");
        }
        self.y += 8.0;
    }

    /// What a row is, in two lines at the left.
    fn label(&mut self, what: &str, more: &str) {
        self.side(self.y + 13.0, what, 12.0, INK);
        self.side(self.y + 27.0, more, 10.5, FAINT);
    }

    /// A line of text at the left, small enough to stay there.
    fn side(&mut self, y: f64, text: &str, most: f64, colour: &str) {
        let size = fitting(text, LEFT - 32.0, most).unwrap_or(SMALLEST);
        self.svg.text((28.0, y), size, colour, Anchor::Start, text);
    }

    fn row(&mut self, row: &Row<'_>) {
        let (largest, smallest) = row.extremes();
        let copies = row.copies();
        let each = match (largest == smallest, copies) {
            (true, _) => format!("{largest} a rank"),
            (false, _) => format!("{smallest} to {largest} a rank"),
        };
        let copies = match copies {
            0 => String::new(),
            1 => ", 1 copy".to_owned(),
            n => format!(", {n} copies"),
        };
        self.label(row.what, &format!("{} in all, {each}{copies}", row.total));
        let grid = row.countable.then(|| Grid::new(largest, self.width() - 2.0 * self.margin())).flatten();
        let height = grid.as_ref().map_or(30.0, |g| (g.lines as f64 * g.side + 2.0 * GAP).max(30.0));
        for rank in 0..self.drawn {
            let held = row.held[rank];
            let place = Rect { x: self.left_of(rank), y: self.y, width: self.width(), height };
            match &grid {
                Some(grid) => self.cells(place, grid, row, rank),
                None => {
                    let tip = format!("rank {rank}: {} {}", row.what, ranges(held));
                    let share = held.len() as f64 / largest.max(1) as f64;
                    self.bar(rank, share, OWN, GROUND, &held.len().to_string(), &tip);
                }
            }
        }
        self.y += height + 6.0;
    }

    /// A square for each head.
    fn cells(&mut self, place: Rect, grid: &Grid, row: &Row<'_>, rank: usize) {
        self.svg.rect(place, 3.0, SLOT);
        let side = grid.side - 1.0;
        // All are numbered, or none.
        let numbers = fitting(&row.total.saturating_sub(1).to_string(), side, 9.5);
        let top = place.y + (place.height - grid.lines as f64 * grid.side) / 2.0;
        for (i, index) in (row.held[rank].start..row.held[rank].end).enumerate() {
            let (column, line) = ((i % grid.columns) as f64, (i / grid.columns) as f64);
            let (x, y) = (place.x + self.margin() + column * grid.side, top + line * grid.side);
            let holders = row.holders(index);
            let fill = if holders > 1 { COPIES } else { OWN };
            let also = if holders > 1 { format!(", on {holders} ranks") } else { String::new() };
            let tip = format!("rank {rank}: {} {index}{also}", row.what);
            self.svg.rect_with_tip(Rect { x, y, width: side, height: side }, 1.5, fill, &tip);
            if let Some(size) = numbers {
                let colour = if holders > 1 { INK } else { GROUND };
                let at = (x + side / 2.0, y + side / 2.0 + size * 0.36);
                self.svg.text(at, size, colour, Anchor::Middle, &index.to_string());
            }
        }
    }

    /// A bar in a rank's column: as long as its share of the largest, with its value in it.
    fn bar(&mut self, rank: usize, share: f64, fill: &str, ink: &str, value: &str, tip: &str) {
        let place = Rect { x: self.left_of(rank), y: self.y, width: self.width(), height: 30.0 };
        self.svg.rect(place, 3.0, SLOT);
        let width = (self.width() - 2.0 * self.margin()) * share;
        let bar = Rect { x: place.x + self.margin(), y: place.y + GAP, width, height: 22.0 };
        self.svg.rect_with_tip(bar, 1.5, fill, tip);
        if let Some(size) = fitting(value, width - 2.0, 12.0) {
            let at = (bar.x + width / 2.0, place.y + 15.0 + size * 0.36);
            self.svg.text(at, size, ink, Anchor::Middle, value);
        }
    }

    /// A band across all ranks, filled up to its part of all that is exchanged for a token.
    fn exchange(&mut self, exchange: &Collective, times: usize) {
        let Collective { op, after, bytes_per_token: bytes, predicted_us, among, stream } = exchange;
        let token = if stream.is_empty() { "a token" } else { "a token of the context" };
        self.side(self.y + 10.0, op, 12.0, INK);
        let some = if *among > 0 { format!(", {among} at a time") } else { String::new() };
        self.side(self.y + 22.0, &format!("after {after}{some}"), 10.5, FAINT);
        let width = self.right() - LEFT - self.gap();
        let band = Rect { x: LEFT, y: self.y, width, height: 24.0 };
        self.svg.rect(band, 3.0, BAND);
        let all = bytes * times as u64;
        let share = all as f64 / self.traffic.max(1) as f64;
        self.svg.rect(Rect { width: (width * share).max(2.0), ..band }, 3.0, TRAFFIC);
        let text = if times == 1 {
            format!("{} {token}, {}", size(*bytes), time(*predicted_us))
        } else {
            let us = predicted_us * times as f64;
            format!("{} x {times} layers = {} {token}, {}", size(*bytes), size(all), time(us))
        };
        self.svg.text((LEFT + width / 2.0, self.y + 16.0), 12.0, INK, Anchor::Middle, &text);
        self.y += 34.0;
    }

    fn legend(&mut self) {
        let items = [
            (OWN, "on this rank alone"),
            (COPIES, "on other ranks too"),
            (TRAFFIC, "exchanged between all ranks: its part of a token's bytes"),
        ];
        let mut x = 16.0;
        for (fill, text) in items {
            self.svg.rect(Rect { x, y: self.y + 4.0, width: 14.0, height: 14.0 }, 2.0, fill);
            self.svg.text((x + 20.0, self.y + 15.0), 11.0, FAINT, Anchor::Start, text);
            x += 20.0 + text_width(text, 11.0) + 16.0;
        }
        self.y += 32.0;
    }
}

/// How squares are laid out.
struct Grid {
    side: f64,
    columns: usize,
    lines: usize,
}

impl Grid {
    /// For `count` squares in this width: one line if they aren't too small then, else as large as four to
    /// six lines allow. None if they can't be seen.
    fn new(count: usize, width: f64) -> Option<Grid> {
        let in_a_line = (width / count.max(1) as f64).min(18.0);
        if in_a_line >= 11.0 {
            return Some(Grid { side: in_a_line, columns: count.max(1), lines: 1 });
        }
        (4..=14).rev().map(f64::from).find_map(|side| {
            let columns = (width / side) as usize;
            let lines = count.div_ceil(columns.max(1));
            (columns > 0 && lines as f64 * side <= 64.0).then_some(Grid { side, columns, lines })
        })
    }
}

/// The largest size up to `most` in which a text fits into a width; none if it can't be read then.
fn fitting(text: &str, width: f64, most: f64) -> Option<f64> {
    let size = (width / text_width(text, 1.0)).min(most);
    (size >= SMALLEST).then_some((size * 2.0).floor() / 2.0)
}

/// The unit in which all of several amounts are written, of which this is the largest.
fn unit(largest: u64) -> (&'static str, f64) {
    match largest {
        0..10_000 => ("B", 1.0),
        10_000..1_000_000 => ("kB", 1e3),
        1_000_000..1_000_000_000 => ("MB", 1e6),
        _ => ("GB", 1e9),
    }
}

/// Three digits, or all before the point.
fn significant(value: f64) -> String {
    match value {
        v if v >= 100.0 || v.fract() == 0.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// A number of parameters as models are named by.
fn parameters(count: u64) -> String {
    match count {
        0..1_000_000_000 => format!("{:.0} M", count as f64 / 1e6),
        _ => format!("{:.1} B", count as f64 / 1e9),
    }
}
