//! What exchanges cost over a [`Span`] of links: the alpha-beta model, level by level.
//!
//! With `n` ranks and a payload of `B` bytes, a rank sends as many bytes as it receives:
//!
//! | exchange | bytes a rank |
//! | --- | --- |
//! | all-reduce | `2 (n-1)/n B` |
//! | all-gather, reduce-scatter; `B` is the whole | `(n-1)/n B` |
//! | all-to-all; `B` is one rank's data | `(n-1)/n B` |
//!
//! An exchange over several levels of links takes the cheaper of two ways:
//!
//! * flatly: everybody with everybody, at the slowest link's latency and bandwidth. An all-reduce in one step moves
//!   `(n-1) B`, in two (reduce-scatter and all-gather) `2 (n-1)/n B`, as in [`cost`](crate::cost).
//! * by levels: a reduce-scatter over the nearest links leaves each rank `B/n1` to reduce over the farther ones, then
//!   an all-gather. This is what NCCL calls trees of rings and MPI a hierarchical all-reduce (Thakur, Rabenseifner and
//!   Gropp, "Optimization of Collective Communication Operations in MPICH", 2005).

use super::machine::{Link, Span};

/// An all-reduce of `bytes`, in microseconds.
pub fn all_reduce_us(span: &Span, bytes: f64) -> f64 {
    let Some(slowest) = span.slowest() else { return 0.0 };
    let flat = flat_all_reduce_us(slowest, span.ranks(), bytes);
    let (last, nearer) = match span.legs.split_last() {
        Some((last, nearer)) if !nearer.is_empty() => (last, nearer),
        _ => return flat,
    };
    let mut left = bytes;
    let mut by_levels = 0.0;
    for leg in nearer {
        by_levels += 2.0 * scatter_us(leg.link, leg.ways, left);
        left /= leg.ways as f64;
    }
    flat.min(by_levels + flat_all_reduce_us(last.link, last.ways, left))
}

/// An all-gather whose result, or a reduce-scatter whose input, is `bytes`, in microseconds.
pub fn all_gather_us(span: &Span, bytes: f64) -> f64 {
    let Some(slowest) = span.slowest() else { return 0.0 };
    let flat = scatter_us(slowest, span.ranks(), bytes);
    let mut left = bytes;
    let mut by_levels = 0.0;
    for leg in &span.legs {
        by_levels += scatter_us(leg.link, leg.ways, left);
        left /= leg.ways as f64;
    }
    flat.min(by_levels)
}

/// An all-to-all of which each rank gives `bytes`, in microseconds: every byte goes its own way, so each level carries
/// what goes to those that aren't nearer.
pub fn all_to_all_us(span: &Span, bytes: f64) -> f64 {
    let n = span.ranks() as f64;
    let mut nearer = 1.0;
    let mut us = 0.0;
    for leg in &span.legs {
        let reached = nearer * leg.ways as f64;
        us += leg.link.us(bytes * (reached - nearer) / n);
        nearer = reached;
    }
    us
}

/// Passing `bytes` once around, from each rank to the next until all have seen all: `n - 1` steps.
pub fn ring_us(span: &Span, bytes: f64) -> f64 {
    span.slowest().map_or(0.0, |link| (span.ranks() - 1) as f64 * link.us(bytes))
}

/// Bytes that a rank sends in an all-reduce of `bytes` over `n` ranks.
pub fn all_reduce_wire(n: usize, bytes: f64) -> f64 {
    2.0 * gather_wire(n, bytes)
}

/// Bytes that a rank sends in an all-gather, a reduce-scatter or an all-to-all of `bytes` over `n` ranks.
pub fn gather_wire(n: usize, bytes: f64) -> f64 {
    (n - 1) as f64 / n as f64 * bytes
}

fn flat_all_reduce_us(link: Link, n: usize, bytes: f64) -> f64 {
    let one_step = link.us((n - 1) as f64 * bytes);
    let two_steps = 2.0 * link.alpha_us + all_reduce_wire(n, bytes) / link.bytes_per_us;
    one_step.min(two_steps)
}

fn scatter_us(link: Link, n: usize, bytes: f64) -> f64 {
    link.us(gather_wire(n, bytes))
}

#[cfg(test)]
mod tests {
    use super::super::machine::Leg;
    use super::*;

    fn span(legs: &[(usize, f64, f64)]) -> Span {
        let leg = |(level, &(ways, alpha_us, bytes_per_us))| Leg {
            level,
            ways,
            link: Link { alpha_us, bytes_per_us },
        };
        Span { legs: legs.iter().enumerate().map(leg).collect() }
    }

    #[test]
    fn one_rank_exchanges_nothing() {
        let one = span(&[]);
        assert_eq!([all_reduce_us(&one, 1e9), all_gather_us(&one, 1e9), all_to_all_us(&one, 1e9)], [0.0; 3]);
    }

    #[test]
    fn small_all_reduces_take_one_step_and_large_ones_two() {
        // 4 ranks, alpha 2 us, 1000 bytes/us. 1000 bytes: 2 + 3 in one step, 4 + 1.5 in two. 100,000: 302 and 154.
        let four = span(&[(4, 2.0, 1000.0)]);
        assert_eq!([all_reduce_us(&four, 1e3), all_reduce_us(&four, 1e5)], [5.0, 154.0]);
    }

    #[test]
    fn large_all_reduces_go_by_levels() {
        // 4 near ranks (1 us, 10,000 bytes/us) on each of 2 hosts (10 us, 1000 bytes/us), 8 MB. Flatly 2 x 10 us +
        // 2 x 7/8 x 8000 us = 14,020. By levels: near 2 x (1 + 600), of the 2 MB left 10 + 1 x 2000 in one step.
        let both = span(&[(4, 1.0, 1e4), (2, 10.0, 1e3)]);
        assert_eq!(all_reduce_us(&both, 8e6), 1202.0 + 2010.0);
        // 8 bytes: flatly 10 us and 7 x 8 bytes, by levels two near steps more.
        assert_eq!(all_reduce_us(&both, 8.0), 10.056);
    }

    #[test]
    fn an_all_to_all_sends_each_byte_where_it_goes() {
        // Of 8 parts of 1000 bytes, one stays, 3 go near (1 us + 0.3), 4 far (10 us + 4).
        let both = span(&[(4, 1.0, 1e4), (2, 10.0, 1e3)]);
        assert!((all_to_all_us(&both, 8e3) - 15.3).abs() < 1e-9);
        assert_eq!(gather_wire(8, 8e3), 7e3);
    }
}
