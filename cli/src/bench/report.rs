//! What a measurement says: rows, as JSON or as a table, beside the machine's floor.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::collective::Collective;
use super::{Args, Buffer};
use crate::failure::{Failure, print};

/// One line of the report. Its JSON form is a contract: fields are added, never renamed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) collective: String,
    pub(super) transport: String,
    pub(super) ranks: usize,
    pub(super) dtype: String,
    pub(super) op: String,
    pub(super) bytes: usize,
    pub(super) algorithm: String,
    /// Why that one, if it was asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(super) why: Option<String>,
    pub(super) buffer: String,
    /// In how few bits elements are sent, where it isn't as they are.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(super) wire: Option<String>,
    pub(super) touch: bool,
    pub(super) median_us: f64,
    pub(super) min_us: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) algbw_gbps: f64,
    pub(super) busbw_gbps: f64,
    pub(super) correct: bool,
    /// The machine's floor for this size, where it is known.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub(super) floor_us: Option<f64>,
}

/// The least time of an all-reduce at 2 ranks that `cargo bench --bench limit` found, by size.
#[derive(Debug, Default)]
pub(super) struct Floor(Vec<(usize, f64)>);

impl Floor {
    /// Reads the lines that the limit bench printed, for inputs that are rewritten before every call or not.
    pub(super) fn read(path: &Path, touch: bool) -> Result<Floor, Failure> {
        let refuse = |why: String| Failure::usage(format!("--limit {}: {why}", path.display()));
        let text = fs::read_to_string(path).map_err(|e| refuse(e.to_string()))?;
        let floor = Floor::parse(&text, touch).map_err(|e| refuse(e.to_string()))?;
        if floor.0.is_empty() {
            return Err(refuse("no two_shot in it: cargo bench --bench limit -- --json prints it".into()));
        }
        Ok(floor)
    }

    fn parse(text: &str, touch: bool) -> serde_json::Result<Floor> {
        #[derive(Deserialize)]
        struct Figure {
            figure: String,
            touch: Option<bool>,
            bytes: Option<usize>,
            us: Option<f64>,
        }
        let mut floor = Floor::default();
        for line in text.lines().filter(|l| !l.trim().is_empty()) {
            let f: Figure = serde_json::from_str(line)?;
            if let ("two_shot", Some(t), Some(bytes), Some(us)) = (&*f.figure, f.touch, f.bytes, f.us)
                && t == touch
            {
                floor.0.push((bytes, us));
            }
        }
        Ok(floor)
    }

    pub(super) fn at(&self, bytes: usize) -> Option<f64> {
        self.0.iter().find(|(b, _)| *b == bytes).map(|(_, us)| *us)
    }
}

/// The rows on standard output, one by one.
pub(super) struct Table<'a> {
    args: &'a Args,
    begun: bool,
}

impl<'a> Table<'a> {
    pub(super) fn new(args: &'a Args) -> Table<'a> {
        Table { args, begun: false }
    }

    pub(super) fn print(&mut self, row: &Row) -> Result<(), Failure> {
        if self.args.json {
            let json = serde_json::to_string(row).map_err(Failure::run)?;
            return print(format_args!("{json}\n"));
        }
        let floor = self.args.limit.is_some();
        if !std::mem::replace(&mut self.begun, true) {
            print(format_args!("{}\n{}\n", title(self.args), heading(floor)))?;
        }
        print(format_args!("{}\n", line(row, floor)))
    }
}

/// What is measured, in words.
pub(super) fn title(args: &Args) -> String {
    let mut what = args.collective.to_string();
    if args.collective != Collective::Barrier {
        what += &format!(" {}", args.dtype);
    }
    if args.collective.reduces() {
        what += &format!(" {}", args.op);
    }
    what +=
        &format!(" over {}, {} rank{}", args.transport, args.ranks, if args.ranks == 1 { "" } else { "s" });
    if let Buffer::Symmetric = args.buffer {
        what += ", symmetric buffers";
    }
    if let Some(wire) = args.wire.0 {
        what += &format!(", sent as {wire}");
    }
    if args.touch {
        what += ", input rewritten before every call";
    }
    what
}

fn heading(floor: bool) -> String {
    let mut names =
        vec!["bytes", "algorithm", "median us", "min us", "p50 us", "p99 us", "algbw GB/s", "busbw GB/s"];
    if floor {
        names.push("x floor");
    }
    let width = |name| if name == "algorithm" { 19 } else { 12 };
    names.into_iter().map(|n| format!("{n:>0$}", width(n))).collect()
}

fn line(row: &Row, floor: bool) -> String {
    let us = |x: f64| format!("{x:>12.*}", if x < 100.0 { 2 } else { 0 });
    let mut text = format!("{:>12}{:>19}", row.bytes, row.algorithm);
    for time in [row.median_us, row.min_us, row.p50_us, row.p99_us] {
        text += &us(time);
    }
    text += &format!("{:>12.2}{:>12.2}", row.algbw_gbps, row.busbw_gbps);
    match row.floor_us {
        Some(least) => text += &format!("{:>12.1}", row.median_us / least),
        None if floor => text += &format!("{:>12}", "-"),
        None => {}
    }
    if let Some(why) = &row.why {
        text += &format!("\n{:>14}{why}", "");
    }
    text
}

#[cfg(test)]
pub(super) fn example(bytes: usize, median_us: f64) -> Row {
    Row {
        collective: "all_reduce".into(),
        transport: "shm".into(),
        ranks: 2,
        dtype: "f32".into(),
        op: "sum".into(),
        bytes,
        algorithm: "two_shot".into(),
        why: None,
        buffer: "user".into(),
        wire: None,
        touch: false,
        median_us,
        min_us: median_us * 0.9,
        p50_us: median_us,
        p99_us: median_us * 2.0,
        algbw_gbps: bytes as f64 / median_us / 1e3,
        busbw_gbps: bytes as f64 / median_us / 1e3,
        correct: true,
        floor_us: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut row = example(1 << 20, 123.4);
        assert_eq!(line(&row, false).len(), heading(false).len());
        assert_eq!(line(&row, true).len(), heading(true).len());
        row.floor_us = Some(12.34);
        assert_eq!(line(&row, true).len(), heading(true).len());
        assert!(line(&row, true).ends_with(" 10.0"));
    }

    #[test]
    fn rows_survive_json() {
        let mut row = example(8, 0.5);
        let json = serde_json::to_string(&row).unwrap();
        assert!(!json.contains("floor_us"));
        assert_eq!(serde_json::from_str::<Row>(&json).unwrap(), row);
        row.floor_us = Some(0.25);
        assert_eq!(serde_json::from_str::<Row>(&serde_json::to_string(&row).unwrap()).unwrap(), row);
    }

    #[test]
    fn the_floor_is_told_apart_by_touch() {
        let text = r#"{"figure":"round_trip","processors":[0,1],"ns":86.0}

            {"figure":"two_shot","touch":false,"bytes":4096,"us":0.13}
            {"figure":"two_shot","touch":true,"bytes":4096,"us":0.29}"#;
        assert_eq!(Floor::parse(text, false).unwrap().at(4096), Some(0.13));
        assert_eq!(Floor::parse(text, true).unwrap().at(4096), Some(0.29));
        assert_eq!(Floor::parse(text, true).unwrap().at(8), None);
        assert!(Floor::parse("two_shot 4096 0.13", true).is_err());
    }
}
