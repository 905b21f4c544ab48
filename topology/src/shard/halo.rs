//! Pictures cut by height: which rows of each activation a rank has, and which of its neighbours' it needs.
//!
//! A convolution along the rows needs, beside a rank's own, the rows that its kernel reaches beyond them: the halo, which
//! the neighbours send (Jin et al., "Spatially Parallel Convolutions", 2018). A group norm needs each group's sum and sum
//! of squares over all rows: an all-reduce of two numbers a group. All else acts on each row by itself.

use super::check_ranks;
use crate::Result;
use crate::plan::Span;

/// What changes rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A convolution with so many rows of weights, an odd number, and zeros beyond the picture's edges, so that with a
    /// stride of 1 there are as many rows afterwards.
    Convolution {
        /// Rows of weights.
        kernel: usize,
        /// How many rows it goes on by.
        stride: usize,
    },
    /// Each row so many times.
    Upsample {
        /// How many times.
        factor: usize,
    },
}

impl Step {
    /// Rows afterwards.
    pub fn makes(self, rows: usize) -> usize {
        match self {
            Step::Convolution { kernel, stride } => {
                (rows + 2 * (kernel / 2)).saturating_sub(kernel) / stride.max(1) + 1
            }
            Step::Upsample { factor } => rows * factor,
        }
    }

    /// The rows, of `rows`, of which these are made.
    pub fn needs(self, made: Span, rows: usize) -> Span {
        let (first, last) = match (self, made.end.checked_sub(1)) {
            (_, None) => return Span::default(),
            (Step::Convolution { kernel, stride }, Some(last)) => {
                let reach = kernel / 2;
                ((made.start * stride).saturating_sub(reach), last * stride + kernel - reach)
            }
            (Step::Upsample { factor }, Some(last)) => (made.start / factor.max(1), last / factor.max(1) + 1),
        };
        Span::new(first.min(rows), last.min(rows))
    }
}

/// Each rank's rows before and after a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepRows {
    /// The rows that a rank has before it; a partition.
    pub has: Vec<Span>,
    /// The rows that it needs: what it has not of them its neighbours send.
    pub needs: Vec<Span>,
    /// The rows that it makes; a partition, and what it has before the next step.
    pub makes: Vec<Span>,
}

impl StepRows {
    /// How many rows a rank gets from others.
    pub fn halo(&self, rank: usize) -> usize {
        let needs = self.needs[rank];
        needs.len() - needs.intersection(self.has[rank]).len()
    }
}

/// The rows of a picture of `rows` rows over `world` ranks, through these steps.
///
/// The activation with the fewest rows is cut as evenly as can be, and the others at the same heights.
///
/// ```
/// use tensorwire_topology::plan::Span;
/// use tensorwire_topology::shard::{Step, by_height};
///
/// let steps = [Step::Convolution { kernel: 3, stride: 1 }, Step::Upsample { factor: 2 }];
/// let rows = by_height(88, &steps, 8)?;
/// // Rank 1 has eleven rows, needs one of each neighbour's, and has twice as many afterwards.
/// assert_eq!((rows[0].has[1], rows[0].needs[1], rows[0].halo(1)), (Span::new(11, 22), Span::new(10, 23), 2));
/// assert_eq!((rows[1].makes[1], rows[1].halo(1)), (Span::new(22, 44), 0));
/// # Ok::<(), tensorwire_topology::Error>(())
/// ```
///
/// Errors: [`Error::NoRanks`](crate::Error::NoRanks), and [`Error::TooManyRanks`](crate::Error::TooManyRanks) for fewer
/// rows than ranks anywhere.
pub fn by_height(rows: usize, steps: &[Step], world: usize) -> Result<Vec<StepRows>> {
    let heights: Vec<usize> = std::iter::once(rows)
        .chain(steps.iter().scan(rows, |rows, step| {
            *rows = step.makes(*rows);
            Some(*rows)
        }))
        .collect();
    let fewest = heights.iter().copied().min().unwrap_or(rows);
    check_ranks("rows of the lowest activation", fewest, world)?;
    let evenest = super::even("rows of the lowest activation", fewest, world)?;
    let at = |height: usize| -> Vec<Span> {
        let scaled = |row: usize| (row as u128 * height as u128 / fewest as u128) as usize;
        evenest.iter().map(|s| Span::new(scaled(s.start), scaled(s.end))).collect()
    };
    let step = |(step, heights): (&Step, &[usize])| {
        let (has, makes) = (at(heights[0]), at(heights[1]));
        let needs = makes.iter().map(|made| step.needs(*made, heights[0])).collect();
        StepRows { has, needs, makes }
    };
    Ok(steps.iter().zip(heights.windows(2)).map(step).collect())
}
