//! The search: every arrangement that is worth trying, and the best of them.

use super::arrange::{Arrangement, Arranger, Misfit, Task};
use super::degrees::{Degrees, candidates};

/// One arrangement that was tried.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tried {
    /// Its degrees.
    pub degrees: Degrees,
    /// What the goal wants to be small.
    pub cost: f64,
    /// By how many bytes a device is too small for it; 0 if it fits.
    pub lacks: u64,
    /// Bytes on its fullest device.
    pub peak: u64,
}

/// What the search found.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The best that fits; nothing if none does.
    pub best: Option<Arrangement>,
    /// Everything that was tried and is an arrangement, the best first and then, by what lacks, those that don't fit.
    pub tried: Vec<Tried>,
}

/// Tries all [`candidates`], and takes that of the least cost; among equals that with fewer bytes on its fullest device
/// if the goal is memory, then with fewer devices, then with the lowest degrees.
///
/// The number of arrangements grows with the product of each axis' choices: about 2,000 for a dense model on 1,024
/// devices. Each costs time for its ranks and for each kind of block, not for each layer.
pub fn search(task: Task<'_>) -> Found {
    let mut arranger = Arranger::new(task);
    let mut tried = Vec::new();
    let mut ties = Vec::new();
    let mut candidates = candidates(task.workload, task.machine, task.batch, task.goal);
    // What groups cost is computed once for all that follow each other.
    candidates.sort_by_key(Degrees::of_group);
    for degrees in candidates {
        match arranger.arrange(&degrees) {
            Ok(a) => {
                ties.push(a.step.total_us());
                let (cost, lacks) = (a.cost(task.goal), a.lacks(task.machine));
                tried.push(Tried { degrees, cost, lacks, peak: a.peak_bytes() });
            }
            Err(Misfit::Devices | Misfit::TooFine(_)) => {}
        }
    }
    let mut order: Vec<usize> = (0..tried.len()).collect();
    order.sort_by(|a, b| {
        let (x, y) = (&tried[*a], &tried[*b]);
        let by_cost =
            x.lacks.cmp(&y.lacks).then(x.cost.total_cmp(&y.cost)).then(ties[*a].total_cmp(&ties[*b]));
        let simpler = |t: &Tried| (t.degrees.ranks(), t.degrees.axes(), t.degrees);
        by_cost.then_with(|| simpler(x).cmp(&simpler(y)))
    });
    let tried: Vec<Tried> = order.into_iter().map(|i| tried[i]).collect();
    let best = tried.first().filter(|t| t.lacks == 0).and_then(|t| arranger.arrange(&t.degrees).ok());
    Found { best, tried }
}
