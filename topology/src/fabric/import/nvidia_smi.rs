//! What `nvidia-smi topo -m` prints: a matrix of how GPUs and network interfaces reach each other.
//!
//! | cell | what is between | here |
//! | --- | --- | --- |
//! | `NV4` | a bonded set of 4 NVLinks | `Class::NvLink` |
//! | `PIX`, `PXB` | one PCIe bridge, or several | one `Class::Switch` |
//! | `PHB`, `NODE` | PCIe host bridges of one NUMA node | one `Class::Numa` |
//! | `SYS`, of old `SOC` | the link between NUMA nodes | `Class::Host` |
//!
//! It tells neither what GPUs there are, nor their memory, nor how fast a link is: those are assumed, NVLinks at the 20 GB/s
//! that NCCL counts for one of V100 and A100.

use std::collections::BTreeMap;

use super::super::{Device, DeviceModel, Kind, clean};
use super::{Fabric, Found, MAX_THINGS, Models, Nic, assemble, gpus, refused};
use crate::Result;
use crate::discover::list;

const WHAT: &str = "nvidia-smi's topology";

/// Far above what a matrix of 256 takes.
const MAX_BYTES: usize = 4 << 20;

/// The most GPUs and interfaces of a host.
const MAX_COLUMNS: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cell {
    Itself,
    NvLink(u32),
    Switch,
    Numa,
    Host,
}

struct Row {
    cells: Vec<Cell>,
    processors: Option<String>,
    numa: Option<u32>,
}

impl Fabric {
    /// Reads what `nvidia-smi topo -m` printed.
    ///
    /// # Errors
    /// [`Error::Fabric`](crate::Error::Fabric) for what is no such text.
    pub fn from_nvidia_smi(text: &str) -> Result<Fabric> {
        if text.len() > MAX_BYTES {
            return Err(refused(WHAT, format!("it has {} bytes, more than {MAX_BYTES}", text.len())));
        }
        read(&without_escapes(text)).map_err(|why| refused(WHAT, why))?.fabric()
    }
}

/// A text without what colours and underlines it on a terminal.
fn without_escapes(text: &str) -> String {
    let mut plain = String::new();
    for (i, part) in text.split("\u{1b}[").enumerate() {
        // Parameters, and a letter.
        let end = part.find(|c: char| c.is_ascii_alphabetic()).map_or(part.len(), |at| at + 1);
        plain.push_str(if i == 0 { part } else { &part[end..] });
    }
    plain
}

struct Matrix {
    columns: Vec<String>,
    rows: BTreeMap<usize, Row>,
    /// What `NIC0` is called.
    names: BTreeMap<String, String>,
}

fn read(text: &str) -> std::result::Result<Matrix, String> {
    let mut lines = text.lines().skip_while(|line| line.split_whitespace().next() != Some("GPU0"));
    let header = lines.next().ok_or("it has no line that begins with GPU0")?;
    let columns: Vec<String> = header
        .split_whitespace()
        .take_while(|word| !matches!(*word, "CPU" | "NUMA" | "GPU"))
        .map(str::to_owned)
        .collect();
    if columns.len() > MAX_COLUMNS {
        return Err(format!("it has {} columns, at most {MAX_COLUMNS}", columns.len()));
    }
    let mut matrix = Matrix { columns, rows: BTreeMap::new(), names: BTreeMap::new() };
    for line in lines {
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some(first) = words.first() else { continue };
        if let (Some(nic), Some(name), None) = (first.strip_suffix(':'), words.get(1), words.get(2)) {
            matrix.names.insert(nic.to_owned(), (*name).to_owned());
        }
        let Some(at) = matrix.columns.iter().position(|column| column == first) else { continue };
        let cells =
            words.get(1..=matrix.columns.len()).ok_or_else(|| format!("the row {first} is too short"))?;
        let cells: Option<Vec<Cell>> = cells.iter().map(|word| cell(word)).collect();
        let cells = cells.ok_or_else(|| {
            format!("the row {first} has a cell that isn't one of X, NV#, PIX, PXB, PHB, NODE, SYS")
        })?;
        if cells[at] != Cell::Itself {
            return Err(format!("the row {first} doesn't have X in its own column"));
        }
        let rest = &words[matrix.columns.len() + 1..];
        let processors = rest.first().filter(|text| list(text).is_some_and(|l| !l.is_empty()));
        // "0", or "0-1" or "N/A" where it isn't one.
        let numa = rest.get(1).and_then(|text| text.parse().ok());
        matrix.rows.insert(at, Row { cells, processors: processors.map(|text| (*text).to_owned()), numa });
    }
    for (at, column) in matrix.columns.iter().enumerate() {
        if !matrix.rows.contains_key(&at) {
            return Err(format!("it has no row {column}"));
        }
    }
    Ok(matrix)
}

fn cell(word: &str) -> Option<Cell> {
    Some(match word {
        "X" => Cell::Itself,
        "PIX" | "PXB" => Cell::Switch,
        "PHB" | "NODE" => Cell::Numa,
        "SYS" | "SOC" => Cell::Host,
        _ => Cell::NvLink(word.strip_prefix("NV")?.parse().ok().filter(|n| (1..=1024).contains(n))?),
    })
}

impl Matrix {
    /// For each column the first that cells like these join it to, through others if need be.
    fn sets(&self, near: impl Fn(Cell) -> bool) -> Vec<usize> {
        let mut set: Vec<usize> = (0..self.columns.len()).collect();
        for (i, row) in &self.rows {
            for (j, _) in row.cells.iter().enumerate().filter(|(_, cell)| near(**cell)) {
                let (low, high) = (set[*i].min(set[j]), set[*i].max(set[j]));
                set.iter_mut().filter(|s| **s == high).for_each(|s| *s = low);
            }
        }
        set
    }

    fn fabric(self) -> Result<Fabric> {
        let switch = self.sets(|cell| cell == Cell::Switch);
        let node = self.sets(|cell| matches!(cell, Cell::Switch | Cell::Numa));
        // The node's number, where one of those that share it is told; where none is, one of its own.
        let told: BTreeMap<usize, u32> =
            self.rows.iter().rev().filter_map(|(i, row)| Some((node[*i], row.numa?))).collect();
        let unknown = told.values().max().map_or(0, |most| most.saturating_add(1));
        let numa = |i: usize| match (self.rows[&i].numa, told.get(&node[i])) {
            (Some(own), _) => Some(own),
            (None, Some(told)) => Some(*told),
            // Alone, it may be anywhere.
            (None, None) if node.iter().filter(|n| **n == node[i]).count() > 1 || self.columns.len() == 1 => {
                Some(unknown.saturating_add(node[i] as u32))
            }
            (None, None) => None,
        };
        let is_gpu =
            |i: &usize| self.columns[*i].strip_prefix("GPU").is_some_and(|n| n.parse::<u32>().is_ok());
        let gpus: Vec<usize> = (0..self.columns.len()).filter(is_gpu).collect();
        let mut found = Found { guessed_nvlink: true, ..Found::default() };
        let mut models = Models::default();
        // The processors near GPUs, of each node once.
        for i in &gpus {
            let Some(processors) = &self.rows[i].processors else { continue };
            let (processors, numa) = (Some(processors.clone()), numa(*i));
            if found.devices.iter().all(|d| d.numa != numa && d.processors != processors) {
                let ranks = processors.as_deref().and_then(list).map_or(1, |l| l.len()) as u32;
                let model =
                    models.add(DeviceModel { ranks, ..DeviceModel::new("processors", Kind::Cpu, None) });
                let device = Device::new(format!("cpu{}", found.devices.len()), 0, model);
                found.devices.push(Device { numa, processors, ..device });
            }
        }
        let first = found.devices.len();
        let mut place = |i: usize| {
            if switch.iter().filter(|s| **s == switch[i]).count() < 2 {
                return (None, numa(i));
            }
            let (number, numa) = found.switch(&self.columns[switch[i]], numa(i));
            (Some(number), numa)
        };
        let places: Vec<_> = (0..self.columns.len()).map(&mut place).collect();
        let model = models.add(DeviceModel::new("GPU", Kind::Gpu, None));
        for (at, i) in gpus.iter().enumerate() {
            let (switch, numa) = places[*i];
            found.devices.push(Device { numa, switch, ..Device::new(format!("gpu{at}"), 0, model) });
            for (other, j) in gpus.iter().enumerate().filter(|(other, _)| *other > at) {
                if let Cell::NvLink(count) = self.rows[i].cells[*j] {
                    found
                        .between
                        .insert((first + at, first + other), f64::from(count) * gpus::nvlink_gbps(80));
                }
            }
        }
        for i in (0..self.columns.len()).filter(|i| !is_gpu(i)) {
            let column = &self.columns[i];
            let name = self.names.get(column).unwrap_or(column);
            let name = clean(name).unwrap_or_else(|| "nic".to_owned());
            let (switch, numa) = places[i];
            found.nics.push(Nic { name, mbit_per_s: None, numa, switch, bus: None });
        }
        debug_assert!(found.devices.len() <= MAX_THINGS);
        assemble(WHAT, vec![found], models)
    }
}
