//! What a collective takes, by its size: alpha-beta in pieces.
//!
//! One latency and one bandwidth hold over a part of the sizes alone: a collective changes its algorithm, and its data
//! falls out of a cache. Over each part, time is a line, `alpha + bytes / bandwidth`; the parts are found from the
//! measurements, not assumed:
//!
//! 1. A size's time is the median of its measurements.
//! 2. Times that fall while the size grows are noise, or an exception at one size: they are replaced by the nearest
//!    that don't fall, by isotonic median regression (pool adjacent violators: Barlow, Bartholomew, Bremner and Brunk,
//!    1972). So no prediction for more bytes is less than one for fewer.
//! 3. The sizes are cut into runs, each a line by least squares of relative errors, so that the errors and a price for
//!    each breakpoint are least in all: segmented least squares by dynamic programming (Bellman, 1961). Between two
//!    runs, the line that joins their ends.
//! 4. The band is by what factor most measurements miss a curve that was fitted without their size: it holds for the
//!    sizes between as for those measured.

use serde::{Deserialize, Serialize};

/// The sum of squared relative errors that a breakpoint must save: a size that a line misses by 7 % gets one.
const BREAKPOINT: f64 = 0.005;

/// The part of measurements that lie within the band.
const WITHIN: f64 = 0.9;

/// The most breakpoints of a curve in a file.
const MOST_KNOTS: usize = 128;

/// Time against size: a line between each two breakpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// Breakpoints: bytes, and microseconds; both ascend.
    knots: Vec<(u64, f64)>,
    band: f64,
}

/// A piece of a curve.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Piece {
    /// The bytes from which it holds.
    pub from: u64,
    /// The bytes up to which it holds.
    pub to: u64,
    /// Where its line begins at 0 bytes: a latency, unless it is less than nothing, as after data has fallen out of a
    /// cache.
    pub alpha_us: f64,
    /// Its bandwidth in GB/s; infinite where size makes no difference.
    pub gbps: f64,
}

impl Curve {
    /// The curve of some measurements, `(bytes, microseconds)` in any order, several of a size or one. Nothing without
    /// any, or of times that aren't above 0.
    ///
    /// ```
    /// use tensorwire_topology::table::Curve;
    ///
    /// // 2 us and 10 GB/s, from 1 MiB on 5 GB/s.
    /// let time = |bytes: u64| 2.0 + bytes as f64 / 10e3 + bytes.saturating_sub(1 << 20) as f64 / 10e3;
    /// let measured: Vec<(u64, f64)> = (10..25).map(|i| (1 << i, time(1 << i))).collect();
    /// let curve = Curve::fit(&measured).unwrap();
    /// assert!((curve.us(3 << 20) / time(3 << 20) - 1.0).abs() < 0.01);
    /// assert!((2..=3).contains(&curve.pieces().count()));
    /// ```
    pub fn fit(samples: &[(u64, f64)]) -> Option<Curve> {
        let sizes = by_size(samples)?;
        let knots = knots(&sizes.iter().map(Size::point).collect::<Vec<_>>());
        Some(Curve { knots, band: band(&sizes) })
    }

    /// What `bytes` take, in microseconds. Below the least size as that; beyond the largest it grows
    /// as it does on average.
    pub fn us(&self, bytes: u64) -> f64 {
        at(&self.knots, bytes)
    }

    /// By what factor, at least 1, nine measurements in ten miss the curve at most, up or down.
    pub fn band(&self) -> f64 {
        self.band
    }

    /// Its pieces in ascending order; none where one size was measured.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> {
        self.knots.windows(2).map(|pair| {
            let ((from, first), (to, last)) = (pair[0], pair[1]);
            let us_a_byte = (last - first) / (to - from) as f64;
            Piece { from, to, alpha_us: first - us_a_byte * from as f64, gbps: 1e-3 / us_a_byte }
        })
    }

    /// Whether it can be used: times above 0 that never fall, for sizes that grow, and a band.
    pub(super) fn is_sound(&self) -> bool {
        let usable = |us: f64| us.is_finite() && us > 0.0;
        (1..=MOST_KNOTS).contains(&self.knots.len())
            && self.knots.iter().all(|(_, us)| usable(*us))
            && self.knots.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1)
            && usable(self.band)
            && self.band >= 1.0
    }
}

/// All measurements of a size.
struct Size {
    bytes: u64,
    us: Vec<f64>,
    median: f64,
}

impl Size {
    fn point(&self) -> (u64, f64) {
        (self.bytes, self.median)
    }
}

/// The measurements by size; nothing if there are none, or a time makes no sense.
fn by_size(samples: &[(u64, f64)]) -> Option<Vec<Size>> {
    if samples.is_empty() || samples.iter().any(|(_, us)| !us.is_finite() || *us <= 0.0) {
        return None;
    }
    let mut sorted = samples.to_vec();
    sorted.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let size = |of: &[(u64, f64)]| {
        let us: Vec<f64> = of.iter().map(|(_, us)| *us).collect();
        Size { bytes: of[0].0, median: lower_median(&us), us }
    };
    Some(sorted.chunk_by(|a, b| a.0 == b.0).map(size).collect())
}

/// A curve's time at a size.
fn at(knots: &[(u64, f64)], bytes: u64) -> f64 {
    let (first, last) = (knots[0], knots[knots.len() - 1]);
    let on = |((from, low), (to, high)): ((u64, f64), (u64, f64))| {
        low + (high - low) * (bytes - from) as f64 / (to - from) as f64
    };
    match knots.partition_point(|(at, _)| *at < bytes) {
        0 => first.1,
        after if after < knots.len() => on((knots[after - 1], knots[after])),
        _ if knots.len() == 1 => last.1,
        // Not along the last piece, whose slope a single disturbed size makes.
        _ => on((first, last)),
    }
}

/// The breakpoints of the best runs of lines through points in ascending order of size.
fn knots(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let points = never_falling(points);
    // The best way to cut the first so many points: what it costs, and where its last run begins.
    let mut best: Vec<(f64, usize)> = vec![(0.0, 0)];
    for end in 1..=points.len() {
        let ways = (0..end).map(|start| (best[start].0 + price(&points[start..end]), start));
        let way = ways.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((0.0, 0));
        best.push(way);
    }
    let mut knots = Vec::new();
    let mut end = points.len();
    while end > 0 {
        let start = best[end].1;
        let run = &points[start..end];
        let line = Line::through(run);
        knots.extend([run.len() - 1, 0].iter().map(|i| (run[*i].0, line.at(run[*i].0))));
        end = start;
    }
    knots.reverse();
    // A run of one point begins where it ends.
    knots.dedup_by_key(|knot| knot.0);
    let mut highest = 0.0;
    for knot in &mut knots {
        // Where one run's line ends above the next one's beginning.
        highest = f64::max(highest, rounded(knot.1));
        knot.1 = highest;
    }
    knots
}

/// No more digits than were measured, so that a file holds the same number.
fn rounded(x: f64) -> f64 {
    format!("{x:.4e}").parse().unwrap_or(x)
}

/// What a run costs: its squared relative errors, and its ends.
fn price(run: &[(u64, f64)]) -> f64 {
    let line = Line::through(run);
    if line.at(run[0].0) <= 0.0 {
        return f64::INFINITY;
    }
    let error = |(bytes, us): &(u64, f64)| (line.at(*bytes) / us - 1.0).powi(2);
    let ends = if run.len() == 1 { 1.0 } else { 2.0 };
    run.iter().map(error).sum::<f64>() + ends * BREAKPOINT
}

/// Microseconds by bytes.
struct Line {
    /// The place and height of its middle, which keeps the digits that its beginning would lose.
    middle: (f64, f64),
    us_a_byte: f64,
}

impl Line {
    /// The line that never falls with the least squares of relative errors.
    fn through(run: &[(u64, f64)]) -> Line {
        let weighted = |of: &dyn Fn(f64, f64) -> f64| -> f64 {
            run.iter().map(|(bytes, us)| of(*bytes as f64, *us) / (us * us)).sum()
        };
        let weight = weighted(&|_, _| 1.0);
        let middle = (weighted(&|x, _| x) / weight, weighted(&|_, y| y) / weight);
        let spread = weighted(&|x, _| (x - middle.0).powi(2));
        let rise = weighted(&|x, y| (x - middle.0) * (y - middle.1));
        Line { middle, us_a_byte: if spread > 0.0 { (rise / spread).max(0.0) } else { 0.0 } }
    }

    fn at(&self, bytes: u64) -> f64 {
        self.middle.1 + self.us_a_byte * (bytes as f64 - self.middle.0)
    }
}

/// The nearest times that never fall: where some do, the median of as many neighbours as it takes, which a single one that
/// something came between can't move far.
fn never_falling(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let mut pools: Vec<Vec<f64>> = Vec::new();
    for (_, us) in points {
        let mut pool = vec![*us];
        while let Some(before) = pools.pop_if(|before| lower_median(before) > lower_median(&pool)) {
            pool.extend(before);
            pool.sort_by(f64::total_cmp);
        }
        pools.push(pool);
    }
    let times = pools.iter().flat_map(|pool| std::iter::repeat_n(lower_median(pool), pool.len()));
    points.iter().zip(times).map(|((bytes, _), us)| (*bytes, us)).collect()
}

/// The middle of some numbers in ascending order; of an even count the lower one, as what comes between makes times longer.
fn lower_median(sorted: &[f64]) -> f64 {
    sorted[(sorted.len() - 1) / 2]
}

/// The factor by which most measurements miss what the other sizes say of theirs; the least and the largest size have
/// others on one side alone, and count by their own spread.
fn band(sizes: &[Size]) -> f64 {
    let points: Vec<(u64, f64)> = sizes.iter().map(Size::point).collect();
    let last = sizes.len() - 1;
    let misses = sizes.iter().enumerate().flat_map(|(i, size)| {
        let expected = if i == 0 || i == last {
            size.median
        } else {
            let others: Vec<_> = points.iter().copied().filter(|(bytes, _)| *bytes != size.bytes).collect();
            at(&knots(&others), size.bytes)
        };
        size.us.iter().map(move |us| (us / expected).ln().abs())
    });
    let mut misses: Vec<f64> = misses.collect();
    misses.sort_by(f64::total_cmp);
    // Rounded up: of few measurements, the band holds more than that part.
    let within = (misses.len() as f64 * WITHIN).ceil() as usize;
    rounded(misses[within.clamp(1, misses.len()) - 1].exp()).max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Two sizes an octave from 1 KiB to 64 MiB.
    fn grid() -> Vec<u64> {
        (20..53).map(|i| 2f64.powf(f64::from(i) / 2.0) as u64 / 64 * 64).collect()
    }

    fn measured(time: impl Fn(u64) -> f64) -> Vec<(u64, f64)> {
        grid().into_iter().map(|bytes| (bytes, time(bytes))).collect()
    }

    #[test]
    fn an_algorithm_and_a_cache_are_breakpoints() {
        // 1 us and 20 GB/s; from 64 KiB on 4 us and 40 GB/s; from 4 MiB on, where a cache ends, 8 GB/s.
        let time = |bytes: u64| {
            let b = bytes as f64;
            let first = 1.0 + b / 20e3;
            first.min(4.0 + b / 40e3) + (b - 4e6).max(0.0) / 10e3
        };
        let curve = Curve::fit(&measured(time)).unwrap();
        for bytes in grid() {
            for between in [bytes, bytes * 5 / 4] {
                let ratio = curve.us(between) / time(between);
                assert!((0.88..1.14).contains(&ratio), "{between}: {ratio}");
            }
        }
        let pieces: Vec<Piece> = curve.pieces().collect();
        assert!((3..=5).contains(&pieces.len()), "{pieces:?}");
        let (first, last) = (pieces[0], pieces[pieces.len() - 1]);
        assert!((first.alpha_us - 1.0).abs() < 0.05 && (first.gbps - 20.0).abs() < 1.0, "{first:?}");
        assert!(last.alpha_us < 0.0 && (last.gbps - 8.0).abs() < 0.4, "{last:?}");
        assert!(curve.band() < 1.1);
    }

    #[test]
    fn one_size_and_none() {
        assert_eq!(Curve::fit(&[]), None);
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(Curve::fit(&[(8, 1.0), (16, bad)]), None);
        }
        let barrier = Curve::fit(&[(0, 3.0), (0, 1.0), (0, 2.0)]).unwrap();
        assert_eq!((barrier.us(0), barrier.us(1 << 30), barrier.pieces().count()), (2.0, 2.0, 0));
        assert!(barrier.is_sound() && barrier.band() == 2.0);
    }

    #[test]
    fn sizes_outside_are_as_the_nearest_piece() {
        let curve = Curve::fit(&measured(|bytes| 2.0 + bytes as f64 / 1e3)).unwrap();
        assert_eq!(curve.us(0), curve.us(1024));
        let far = curve.us(1 << 30) / (2.0 + (1u64 << 30) as f64 / 1e3);
        assert!((far - 1.0).abs() < 1e-3, "{far}");
    }

    #[test]
    fn what_falls_is_no_line_and_makes_the_band_wide() {
        let curve = Curve::fit(&[(1, 4.0), (2, 1.0), (4, 4.0), (8, 1.0)]).unwrap();
        assert!(curve.is_sound() && curve.band() >= 2.0, "{curve:?}");
        assert_eq!((curve.us(1), curve.us(8)), (1.0, 1.0));
    }

    #[test]
    fn one_size_that_was_disturbed_moves_nothing() {
        let time = |bytes: u64| 0.3 + bytes as f64 / 20e3;
        let mut disturbed = measured(time);
        disturbed[5].1 = 217.0;
        let curve = Curve::fit(&disturbed).unwrap();
        for bytes in grid() {
            assert!((0.9..1.25).contains(&(curve.us(bytes) / time(bytes))), "{bytes}: {curve:?}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_not_sound() {
        let curve = |knots: &[(u64, f64)], band| Curve { knots: knots.to_vec(), band };
        assert!(curve(&[(8, 1.0), (16, 1.0)], 1.0).is_sound());
        for bad in [
            curve(&[], 1.1),
            curve(&[(8, 1.0), (8, 2.0)], 1.1),
            curve(&[(8, 2.0), (16, 1.0)], 1.1),
            curve(&[(8, 0.0)], 1.1),
            curve(&[(8, f64::NAN)], 1.1),
            curve(&[(8, 1.0)], 0.9),
            curve(&[(8, 1.0)], f64::INFINITY),
            curve(&(0..129).map(|i| (i, 1.0)).collect::<Vec<_>>(), 1.1),
        ] {
            assert!(!bad.is_sound(), "{bad:?}");
        }
    }

    #[test]
    fn few_measurements_are_all_within_the_band() {
        // One pass over three sizes: the others say 2 us of the middle one, which took 3.
        let curve = Curve::fit(&[(1000, 1.0), (2000, 3.0), (3000, 3.0)]).unwrap();
        assert_eq!(curve.band(), 1.5);
    }

    proptest! {
        /// Pieces of an alpha-beta model, each size measured five times within 10 % and once as three times what it is:
        /// the curve is within 15 % of the truth at all sizes, also between those measured, and within its own band at
        /// most of them.
        #[test]
        fn the_truth_is_found_through_noise(
            alpha in 0.2f64..20.0,
            gbps in 1f64..40.0,
            slower in 1.2f64..4.0,
            cache in 12u32..24,
            noise in proptest::collection::vec(0.9f64..1.1, 33 * 5),
            outlier in 0usize..33 * 5,
        ) {
            let time = |bytes: u64| {
                let beyond = bytes.saturating_sub(1 << cache) as f64;
                alpha + bytes as f64 / (gbps * 1e3) + beyond * (slower - 1.0) / (gbps * 1e3)
            };
            let mut samples: Vec<(u64, f64)> =
                grid().iter().flat_map(|b| [(*b, time(*b)); 5]).zip(&noise).map(|((b, t), n)| (b, t * n)).collect();
            samples[outlier].1 *= 3.0;
            let curve = Curve::fit(&samples).unwrap();
            prop_assert!(curve.is_sound() && curve.band() < 1.25, "{}", curve.band());
            for bytes in grid() {
                for between in [bytes, bytes * 6 / 5] {
                    let ratio = curve.us(between) / time(between);
                    prop_assert!((0.85..1.15).contains(&ratio), "{between}: {ratio}, {curve:?}");
                }
            }
        }

        /// Whatever was measured: more bytes never take less, and what is written can be read.
        #[test]
        fn no_curve_falls(
            samples in proptest::collection::vec((0u64..1 << 28, 1e-3f64..1e9), 1..60),
            sizes in proptest::collection::vec(0u64..1 << 32, 2..40),
        ) {
            let curve = Curve::fit(&samples).unwrap();
            prop_assert!(curve.is_sound(), "{curve:?}");
            let mut sizes = sizes;
            sizes.extend(samples.iter().map(|(bytes, _)| *bytes));
            sizes.sort_unstable();
            for pair in sizes.windows(2) {
                prop_assert!(curve.us(pair[0]) <= curve.us(pair[1]) * (1.0 + 1e-12), "{pair:?} {curve:?}");
            }
            let json = serde_json::to_string(&curve).unwrap();
            prop_assert_eq!(serde_json::from_str::<Curve>(&json).unwrap(), curve);
        }

        /// The order in which measurements come makes no difference.
        #[test]
        fn the_order_makes_no_difference(
            samples in proptest::collection::vec((0u64..50, 0.1f64..100.0), 1..30).prop_shuffle(),
        ) {
            let mut sorted = samples.clone();
            sorted.sort_by(|a, b| b.partial_cmp(a).unwrap());
            prop_assert_eq!(Curve::fit(&samples), Curve::fit(&sorted));
        }
    }
}
