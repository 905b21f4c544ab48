//! Pictures of a measurement: time and bus bandwidth against size, both axes logarithmic.

mod scale;

use tensorwire::topology::svg::{Anchor, Svg};

use super::report::Row;
use scale::{LogScale, bytes_label, number_label, powers_of_two, round_numbers};

const GROUND: &str = "#ffffff";
const INK: &str = "#24292f";
const FAINT: &str = "#57606a";
const GRID: &str = "#e4e7eb";
// Told apart with any colour vision.
const BLUE: &str = "#0072b2";
const ORANGE: &str = "#d55e00";
const GREY: &str = "#6e7781";

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 400.0;
const TOP: f64 = 92.0;
const BOTTOM: f64 = HEIGHT - 58.0;
const PANEL: f64 = 390.0;
const LEFTS: [f64; 2] = [66.0, 66.0 + PANEL + 84.0];

/// The most numbers beside an axis.
const LABELS: usize = 10;

/// One measured quantity over sizes.
struct Series<'a> {
    name: &'a str,
    colour: &'a str,
    dash: &'a str,
    points: Vec<(usize, f64)>,
}

impl<'a> Series<'a> {
    fn new(
        name: &'a str,
        colour: &'a str,
        dash: &'a str,
        rows: &[Row],
        value: impl Fn(&Row) -> Option<f64>,
    ) -> Series<'a> {
        let mut points: Vec<_> = rows.iter().filter_map(|row| Some((row.bytes, value(row)?))).collect();
        points.retain(|(bytes, value)| *bytes > 0 && *value > 0.0 && value.is_finite());
        points.sort_by_key(|(bytes, _)| *bytes);
        Series { name, colour, dash, points }
    }
}

/// Draws the rows under a title and a line that says where and when.
pub(super) fn draw(rows: &[Row], title: &str, subtitle: &str) -> String {
    let mut svg = Svg::new();
    svg.text((LEFTS[0], 30.0), 17.0, INK, Anchor::Start, title);
    svg.text((LEFTS[0], 50.0), 12.0, FAINT, Anchor::Start, subtitle);
    let times = [
        Series::new("median", BLUE, "", rows, |r| Some(r.median_us)),
        Series::new("p99 of single calls", ORANGE, "6 3", rows, |r| Some(r.p99_us)),
        Series::new("this machine's floor", GREY, "2 3", rows, |r| r.floor_us),
    ];
    panel(&mut svg, LEFTS[0], "time a call, µs", "µs", &times);
    let bandwidth = [Series::new("bus bandwidth", BLUE, "", rows, |r| Some(r.busbw_gbps))];
    panel(&mut svg, LEFTS[1], "bus bandwidth, GB/s", "GB/s", &bandwidth);
    svg.finish(WIDTH, HEIGHT, GROUND)
}

fn panel(svg: &mut Svg, left: f64, title: &str, unit: &str, series: &[Series<'_>]) {
    let right = left + PANEL;
    svg.text((left, TOP - 12.0), 13.0, INK, Anchor::Start, title);
    svg.text(((left + right) / 2.0, BOTTOM + 40.0), 12.0, FAINT, Anchor::Middle, "bytes");
    let points = || series.iter().flat_map(|s| &s.points);
    let values = || points().map(|(_, value)| *value);
    let sizes = points().map(|(bytes, _)| *bytes);
    let Some((least, most)) = sizes.clone().min().zip(sizes.max()) else {
        let middle = ((left + right) / 2.0, (TOP + BOTTOM) / 2.0);
        svg.text(middle, 12.0, FAINT, Anchor::Middle, "nothing to show");
        return;
    };
    let ticks = round_numbers(values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max), LABELS);
    let x = LogScale::new(least as f64, most as f64, (left + 8.0, right - 8.0));
    let y = LogScale::new(ticks[0], ticks[ticks.len() - 1], (BOTTOM, TOP));
    for tick in &ticks {
        let at = y.at(*tick);
        svg.line((left, at), (right, at), GRID, 1.0);
        svg.text((left - 7.0, at + 4.0), 11.0, FAINT, Anchor::End, &number_label(*tick));
    }
    let mut columns = powers_of_two(least, most, LABELS);
    if columns.is_empty() {
        columns.push(least);
    }
    for tick in columns {
        let at = x.at(tick as f64);
        svg.line((at, TOP), (at, BOTTOM), GRID, 1.0);
        svg.text((at, BOTTOM + 18.0), 11.0, FAINT, Anchor::Middle, &bytes_label(tick));
    }
    svg.line((left, BOTTOM), (right, BOTTOM), FAINT, 1.0);
    let shown: Vec<_> = series.iter().filter(|s| !s.points.is_empty()).collect();
    for s in shown.iter().rev() {
        let at: Vec<_> = s.points.iter().map(|(bytes, value)| (x.at(*bytes as f64), y.at(*value))).collect();
        svg.curve(&at, s.colour, s.dash);
        for (at, (bytes, value)) in at.into_iter().zip(&s.points) {
            svg.dot(at, s.colour, &format!("{} at {} bytes: {value:.3} {unit}", s.name, bytes_label(*bytes)));
        }
    }
    if shown.len() > 1 {
        for (i, s) in shown.iter().enumerate() {
            let middle = TOP + 16.0 + 18.0 * i as f64;
            svg.curve(&[(left + 12.0, middle), (left + 38.0, middle)], s.colour, s.dash);
            svg.text((left + 46.0, middle + 4.0), 12.0, INK, Anchor::Start, s.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::example;
    use super::*;

    fn sweep() -> Vec<Row> {
        [8, 4096, 1 << 20, 16 << 20].map(|bytes| example(bytes, 0.1 + bytes as f64 / 12_000.0)).into()
    }

    #[test]
    fn a_picture_has_a_point_a_size_and_series() {
        let mut rows = sweep();
        let dots = |rows: &[Row]| draw(rows, "t", "s").matches("<circle").count();
        assert_eq!(dots(&rows), 3 * rows.len());
        rows[2].floor_us = Some(13.0);
        assert_eq!(dots(&rows), 3 * rows.len() + 1);
        let svg = draw(&rows, "all_reduce & more", "somewhere, 2026-01-31");
        for text in ["all_reduce &amp; more", "somewhere, 2026-01-31", "time a call, µs", ">bytes<", ">32K<"]
        {
            assert!(svg.contains(text), "{text}");
        }
    }

    #[test]
    fn what_has_no_logarithm_is_left_out() {
        let mut rows = sweep();
        for row in &mut rows {
            row.busbw_gbps = 0.0;
        }
        let svg = draw(&rows, "one rank", "");
        assert!(svg.contains("nothing to show") && !svg.contains("NaN") && !svg.contains("inf"));
        assert!(!draw(&rows[..1], "one size", "").contains("NaN"));
        assert!(draw(&[], "no rows", "").contains("nothing to show"));
    }

    #[test]
    fn everything_stays_on_the_picture() {
        let svg = draw(&sweep(), "t", "s");
        let number = |text: &str, key: &str| -> Vec<f64> {
            let key = format!(" {key}=\"");
            text.split(&key).skip(1).filter_map(|v| v.split('"').next()?.parse().ok()).collect()
        };
        for (key, most) in [("cx", WIDTH), ("cy", HEIGHT), ("x", WIDTH), ("y", HEIGHT)] {
            let values = number(&svg, key);
            assert!(
                !values.is_empty() && values.iter().all(|v| (0.0..=most).contains(v)),
                "{key}: {values:?}"
            );
        }
    }
}
