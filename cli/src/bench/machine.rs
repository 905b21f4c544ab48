//! What a measurement should say about where and when it was made.

use std::time::{SystemTime, UNIX_EPOCH};

/// The processor, how many of them this process may use, and the system.
pub(super) fn description() -> String {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    let model = field(&read("/proc/cpuinfo"), "model name").unwrap_or(std::env::consts::ARCH.to_owned());
    let plural = if cpus == 1 { "" } else { "s" };
    let kernel = kernel.split(['-', '+']).next().unwrap_or_default().trim();
    format!("{model}, {cpus} processor{plural}, Linux {kernel}")
}

/// Bytes of memory that can be used without swapping, where the system tells.
pub(super) fn available_memory() -> Option<u64> {
    let available = field(&read("/proc/meminfo"), "MemAvailable")?;
    available.strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Today, in UTC, as 2026-01-31.
pub(super) fn today() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    date(since.as_secs() / 86_400)
}

/// The date that many days after 1970-01-01.
fn date(mut days: u64) -> String {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= if leap(year) { 366 } else { 365 } {
        days -= if leap(year) { 366 } else { 365 };
        year += 1;
    }
    let february = if leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!("{year}-{month:02}-{:02}", days + 1)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// The value behind `name:` in a file of such lines.
fn field(text: &str, name: &str) -> Option<String> {
    let values = text.lines().filter_map(|line| line.split_once(':'));
    values.into_iter().find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (days, expected) in [
            (0, "1970-01-01"),
            (58, "1970-02-28"),
            (59, "1970-03-01"),
            (11_016, "2000-02-29"),
            (11_017, "2000-03-01"),
            (20_453, "2025-12-31"),
            (20_454, "2026-01-01"),
            (47_541, "2100-03-01"),
        ] {
            assert_eq!(date(days), expected);
        }
    }

    #[test]
    fn fields() {
        let text = "processor\t: 0\nmodel name\t: Some CPU: fast\nmodel name : other\n\nnonsense\n";
        assert_eq!(field(text, "model name").unwrap(), "Some CPU: fast");
        assert_eq!(field(text, "flags"), None);
        assert!(available_memory().unwrap() > 1 << 20);
        assert!(description().contains("Linux "));
    }
}
