//! Logarithmic axes: where a value goes, and which values are written beside the axis.

/// Maps values from `low` to `high` to pixels, equal ratios to equal distances.
#[derive(Debug)]
pub(super) struct LogScale {
    low: f64,
    high: f64,
    pixels: (f64, f64),
}

impl LogScale {
    /// An axis that begins at `low` and ends at `high`, both above 0; a single value gets the middle.
    pub(super) fn new(low: f64, high: f64, pixels: (f64, f64)) -> LogScale {
        if low < high {
            LogScale { low, high, pixels }
        } else {
            LogScale { low: low / 2.0, high: low * 2.0, pixels }
        }
    }

    pub(super) fn at(&self, value: f64) -> f64 {
        let share = (value / self.low).ln() / (self.high / self.low).ln();
        self.pixels.0 + share * (self.pixels.1 - self.pixels.0)
    }
}

/// Powers of two, equally far apart, from the first not below `low` to `high`: at most `most`.
pub(super) fn powers_of_two(low: usize, high: usize, most: usize) -> Vec<usize> {
    let first = low.max(1).next_power_of_two();
    let all = || std::iter::successors(Some(first), |p| p.checked_mul(2)).take_while(|p| *p <= high);
    let step = all().count().div_ceil(most).max(1);
    all().step_by(step).collect()
}

/// Round numbers, of the form 1, 2 or 5 times a power of ten, that begin and end an axis for values from
/// `low` to `high`; powers of ten alone where there would be more than `most`.
pub(super) fn round_numbers(low: f64, high: f64, most: usize) -> Vec<f64> {
    let covering = |digits: &[f64]| -> Vec<f64> {
        let exponents = low.log10().floor() as i32 - 1..=high.log10().ceil() as i32 + 1;
        let all: Vec<f64> = exponents.flat_map(|e| digits.iter().map(move |d| d * 10f64.powi(e))).collect();
        // A value that is a tick but for rounding counts as that tick.
        let first = all.iter().rposition(|t| *t <= low * (1.0 + 1e-9)).unwrap_or(0);
        let last = all.iter().position(|t| *t >= high * (1.0 - 1e-9)).unwrap_or(all.len() - 1);
        all[first..=last.max(first)].to_vec()
    };
    let fine = covering(&[1.0, 2.0, 5.0]);
    if fine.len() <= most { fine } else { covering(&[1.0]) }
}

/// A number of bytes as people write it: 512, 4K, 64M.
pub(super) fn bytes_label(bytes: usize) -> String {
    match bytes {
        b if b >= 1 << 30 && b.is_multiple_of(1 << 30) => format!("{}G", b >> 30),
        b if b >= 1 << 20 && b.is_multiple_of(1 << 20) => format!("{}M", b >> 20),
        b if b >= 1 << 10 && b.is_multiple_of(1 << 10) => format!("{}K", b >> 10),
        b => b.to_string(),
    }
}

/// A round number without needless zeros: 0.05, 2, 10000.
pub(super) fn number_label(number: f64) -> String {
    let decimals = (-number.log10().floor()).max(0.0) as usize;
    format!("{number:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_ratios_are_equally_far() {
        let scale = LogScale::new(8.0, 512.0, (100.0, 400.0));
        assert!((scale.at(8.0) - 100.0).abs() < 1e-9 && (scale.at(512.0) - 400.0).abs() < 1e-9);
        assert!((scale.at(64.0) - 250.0).abs() < 1e-9);
        let upwards = LogScale::new(1.0, 100.0, (300.0, 0.0));
        assert!((upwards.at(10.0) - 150.0).abs() < 1e-9);
    }

    #[test]
    fn one_value_goes_to_the_middle() {
        assert!((LogScale::new(7.0, 7.0, (0.0, 100.0)).at(7.0) - 50.0).abs() < 1e-9);
    }

    #[test]
    fn powers_are_few_and_within() {
        assert_eq!(powers_of_two(8, 128, 9), [8, 16, 32, 64, 128]);
        assert_eq!(powers_of_two(8, 64 << 20, 9), [8, 64, 512, 4096, 32768, 1 << 18, 1 << 21, 1 << 24]);
        assert_eq!(powers_of_two(12, 100, 9), [16, 32, 64]);
        assert_eq!(powers_of_two(12, 12, 9), [] as [usize; 0]);
        for high in [1usize, 1000, 1 << 36, usize::MAX] {
            assert!(powers_of_two(1, high, 9).len() <= 9);
        }
    }

    #[test]
    fn round_numbers_cover_the_values() {
        assert_eq!(round_numbers(1.5, 7.0, 12), [1.0, 2.0, 5.0, 10.0]);
        assert_eq!(round_numbers(0.1, 0.5, 12).len(), 3);
        assert_eq!(round_numbers(0.09, 9000.0, 12).len(), 7);
        for (low, high) in [(0.086, 19_000.0), (3.0, 3.0), (1.0, 1.0), (999.0, 1001.0), (1e-6, 1e9)] {
            let ticks = round_numbers(low, high, 12);
            assert!(ticks[0] <= low * 1.000001 && *ticks.last().unwrap() >= high * 0.999999, "{low} {high}");
            assert!(ticks.windows(2).all(|w| w[0] < w[1]), "{ticks:?}");
        }
    }

    #[test]
    fn labels() {
        let bytes: Vec<_> = [8, 1000, 1024, 1536, 4096, 1 << 20, 3 << 30].map(bytes_label).into();
        assert_eq!(bytes, ["8", "1000", "1K", "1536", "4K", "1M", "3G"]);
        let numbers: Vec<_> = [0.01, 0.05, 0.2, 1.0, 50.0, 10_000.0].map(number_label).into();
        assert_eq!(numbers, ["0.01", "0.05", "0.2", "1", "50", "10000"]);
    }
}
