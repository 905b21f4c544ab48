//! From measured times to choices. Times are compared by their logarithms, so that each size counts alike.

/// The gain, in all sizes together, that a choice other than the built-in one must promise: below it, it is noise.
const WORTH: f64 = 0.03;

/// The largest of `sizes`, in ascending order, at which what takes `small` seconds is to be chosen before what takes
/// `large`, where one threshold holds for all sizes; 0 if none is. `built_in` itself where no other is clearly
/// better.
///
/// The threshold is the one with which the times chosen at all sizes have the least product. A single size that was
/// measured wrongly can't move it far, as a first or last crossing could.
///
/// ```
/// use tensorwire_topology::table::fit::crossover;
///
/// let sizes = [1 << 10, 2 << 10, 4 << 10, 8 << 10];
/// // One step that costs as much as all the bytes, or two steps that cost half.
/// assert_eq!(crossover(&sizes, &[1.0, 2.0, 4.0, 8.0], &[3.0, 3.0, 4.5, 5.0], 1 << 10), 4 << 10);
/// ```
///
/// # Panics
/// If there aren't as many times as sizes.
pub fn crossover(sizes: &[usize], small: &[f64], large: &[f64], built_in: usize) -> usize {
    assert!(sizes.len() == small.len() && sizes.len() == large.len());
    let cost = |count: usize| -> f64 {
        small[..count].iter().chain(&large[count..]).map(|seconds| seconds.ln()).sum()
    };
    let known = sizes.partition_point(|size| *size <= built_in);
    let best = (0..=sizes.len()).min_by(|a, b| cost(*a).total_cmp(&cost(*b))).unwrap_or(known);
    if best == known || cost(best) > cost(known) - WORTH {
        return built_in;
    }
    best.checked_sub(1).map_or(0, |last| sizes[last])
}

/// Which of several candidates is the fastest over all cases, and candidate `built_in` where no other is clearly
/// faster. `times[i]` are candidate `i`'s seconds, a case each.
pub fn fastest(times: &[Vec<f64>], built_in: usize) -> usize {
    let cost = |i: usize| times[i].iter().map(|s| s.ln()).sum::<f64>() / times[i].len().max(1) as f64;
    let best = (0..times.len()).min_by(|a, b| cost(*a).total_cmp(&cost(*b))).unwrap_or(built_in);
    if cost(best) < cost(built_in) - WORTH { best } else { built_in }
}

/// The latency and the time a byte of a link, by what messages of some bytes took: of the lines through two of the points
/// `(bytes, time)`, the one that all of them are nearest to. Nothing if no two points have a line that grows from a time
/// that isn't negative.
///
/// Nearest is, as above, where the factors by which the points miss it have the least product: small messages count as
/// large ones do, and up to half of the points may be measured wrongly.
///
/// ```
/// use tensorwire_topology::table::fit::line;
///
/// // 10 us and 2 ns a byte, with one message that something came between.
/// let points = [(8.0, 10.016), (1e3, 12.0), (1e4, 95.0), (1e5, 210.0), (1e6, 2010.0)];
/// let (fixed, a_byte) = line(&points).unwrap();
/// assert!((fixed - 10.0).abs() < 1e-3 && (a_byte - 2e-3).abs() < 1e-6);
/// ```
pub fn line(points: &[(f64, f64)]) -> Option<(f64, f64)> {
    let misses = |(fixed, slope): &(f64, f64)| -> f64 {
        points.iter().map(|(bytes, time)| ((fixed + slope * bytes) / time).ln().abs()).sum()
    };
    let pairs = points.iter().enumerate().flat_map(|(i, a)| points[..i].iter().map(move |b| (a, b)));
    let lines = pairs.map(|(a, b)| {
        let slope = (a.1 - b.1) / (a.0 - b.0);
        (a.1 - slope * a.0, slope)
    });
    let possible = lines.filter(|(fixed, slope)| *fixed >= 0.0 && *slope > 0.0 && slope.is_finite());
    possible.min_by(|a, b| misses(a).total_cmp(&misses(b)))
}

/// The middle of some numbers: of an even count, the upper of the two.
pub fn median(numbers: &mut [f64]) -> Option<f64> {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied()
}

/// The middle of some times: of an even count the lower of the two, as what comes between makes times longer.
pub fn typical(times: &mut [f64]) -> Option<f64> {
    times.sort_by(f64::total_cmp);
    times.get(times.len().saturating_sub(1) / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sizes() -> Vec<usize> {
        (10..21).map(|shift| 1usize << shift).collect()
    }

    #[test]
    fn one_side_may_win_everywhere() {
        let sizes = sizes();
        let (fast, slow) = (vec![1.0; sizes.len()], vec![2.0; sizes.len()]);
        assert_eq!(crossover(&sizes, &fast, &slow, 4096), 1 << 20);
        assert_eq!(crossover(&sizes, &slow, &fast, 4096), 0);
        // What is built in and lies beyond all sizes stays.
        assert_eq!(crossover(&sizes, &fast, &slow, 9 << 20), 9 << 20);
    }

    #[test]
    fn differences_within_noise_change_nothing() {
        let sizes = sizes();
        let a = vec![1.0; sizes.len()];
        let b: Vec<f64> = (0..sizes.len()).map(|i| if i % 2 == 0 { 1.005 } else { 0.995 }).collect();
        assert_eq!(crossover(&sizes, &a, &b, 43_690), 43_690);
        assert_eq!(fastest(&[vec![1.0, 1.0], vec![0.98, 1.0]], 0), 0);
        assert_eq!(fastest(&[vec![1.0, 1.0], vec![0.9, 0.9], vec![0.5, 2.0]], 0), 1);
    }

    #[test]
    fn medians() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!((median(&mut []), typical(&mut [])), (None, None));
        assert_eq!((typical(&mut [3.0, 1.0, 2.0]), typical(&mut [4.0, 1.0])), (Some(2.0), Some(1.0)));
    }

    #[test]
    fn what_is_no_line_has_none() {
        assert_eq!(line(&[]), None);
        assert_eq!(line(&[(8.0, 1.0)]), None);
        assert_eq!(line(&[(8.0, 1.0), (8.0, 2.0)]), None);
        assert_eq!(line(&[(8.0, 2.0), (100.0, 1.0)]), None);
    }

    proptest! {
        /// Something came between at one of eight sizes, and the rest are within 5 %: what follows for those is within 20 %.
        #[test]
        fn a_line_is_found_through_noise(
            alpha in 1f64..100.0,
            gbps in 0.001f64..2.0,
            noise in proptest::collection::vec(0.95f64..1.05, 8),
            wrong in 0usize..8,
            factor in 1f64..20.0,
        ) {
            let time = |bytes: f64| alpha + bytes * 1e-3 / gbps;
            let sizes = (0..8).map(|i| 8.0 * 6.5f64.powi(i));
            let mut points: Vec<(f64, f64)> = sizes.zip(noise).map(|(b, noise)| (b, time(b) * noise)).collect();
            points[wrong].1 *= factor;
            let (fixed, a_byte) = line(&points).unwrap();
            points.remove(wrong);
            for (bytes, _) in points {
                let ratio = (fixed + a_byte * bytes) / time(bytes);
                prop_assert!((0.8..1.25).contains(&ratio), "{bytes}: {ratio}, {fixed} {a_byte}");
            }
        }

        /// Times that follow the alpha-beta model, within 10 % of it, with one size measured as three times what
        /// it is: the choice costs no more than the noise anywhere.
        #[test]
        fn the_crossover_is_found_through_noise(
            alpha in 0.2f64..5.0,
            beta in 1e-5f64..1e-3,
            gain in 0.3f64..0.8,
            noise in proptest::collection::vec(0.95f64..1.05, 22),
            outlier in 0usize..22,
        ) {
            let sizes = sizes();
            let small = |s: usize| alpha + beta * s as f64;
            let large = |s: usize| 2.0 * alpha + gain * beta * s as f64;
            let mut noise = noise;
            noise[outlier] *= 3.0;
            let n = sizes.len();
            let a: Vec<f64> = sizes.iter().enumerate().map(|(i, s)| small(*s) * noise[i]).collect();
            let b: Vec<f64> = sizes.iter().enumerate().map(|(i, s)| large(*s) * noise[n + i]).collect();
            let threshold = crossover(&sizes, &a, &b, 128 << 10);
            let chosen = |s: usize| if s <= threshold { small(s) } else { large(s) };
            let total: f64 = sizes.iter().map(|s| (chosen(*s) / small(*s).min(large(*s))).ln()).sum();
            // An outlier makes at most a factor of 3 of difference once, noise 10 % for each size.
            prop_assert!(total < 3f64.ln() + n as f64 * 0.11, "{total}");
        }

        #[test]
        fn without_noise_the_choice_is_the_best_everywhere(
            alpha in 0.2f64..5.0, beta in 1e-5f64..1e-3, gain in 0.3f64..0.8,
        ) {
            let sizes = sizes();
            let small: Vec<f64> = sizes.iter().map(|s| alpha + beta * *s as f64).collect();
            let large: Vec<f64> = sizes.iter().map(|s| 2.0 * alpha + gain * beta * *s as f64).collect();
            let threshold = crossover(&sizes, &small, &large, 128 << 10);
            for (i, s) in sizes.iter().enumerate() {
                let chosen = if *s <= threshold { small[i] } else { large[i] };
                prop_assert!(chosen <= small[i].min(large[i]) * 1.04, "{s} {threshold}");
            }
        }
    }
}
