//! Which model goes on which group, so that all fit together.
//!
//! Branch and bound: models in the order of their time, the longest first; each on the group and in the way that is
//! fastest and fits beside those placed before. A branch ends where the time so far and the least time of the models
//! left exceed the best placement found. Of groups that are alike, two are tried: the one with most memory left, and
//! the one with least that suffices.

use super::options::{Choice, Class};

/// Branches looked at, at most: then the best so far is taken. The first branch takes the fastest way of each model
/// that fits, so there is a good one early.
pub(super) const MAX_BRANCHES: usize = 20_000;

/// Where a model goes: which of its choices, and which group of the choice's class.
pub(super) type Seat = (usize, usize);

/// What the solver found.
pub(super) struct Solution {
    /// Of each model.
    pub(super) seats: Vec<Seat>,
    /// Branches that were looked at.
    pub(super) branches: usize,
}

struct Solver<'a> {
    classes: &'a [Class],
    choices: &'a [Vec<Choice>],
    /// Models, the one that takes longest first.
    order: Vec<usize>,
    /// The least time of the models from this place in the order on.
    least_from: Vec<f64>,
    /// Bytes of each device.
    has: &'a [u64],
    /// Of each device: bytes of weights, and the most that is beside them at any time.
    used: Vec<[u64; 2]>,
    seats: Vec<Seat>,
    best: Option<(f64, Vec<Seat>)>,
    branches: usize,
}

/// Seats for all models on devices with so much memory; nothing if they don't fit together.
pub(super) fn solve(choices: &[Vec<Choice>], classes: &[Class], has: &[u64]) -> Option<Solution> {
    let least = |m: &usize| choices[*m].first().map_or(0.0, |c| c.us);
    let mut order: Vec<usize> = (0..choices.len()).collect();
    order.sort_by(|a, b| least(b).total_cmp(&least(a)).then(a.cmp(b)));
    let mut least_from = vec![0.0; order.len() + 1];
    for (at, model) in order.iter().enumerate().rev() {
        least_from[at] = least_from[at + 1] + least(model);
    }
    let used = vec![[0, 0]; has.len()];
    let seats = vec![(0, 0); choices.len()];
    let mut solver =
        Solver { classes, choices, order, least_from, has, used, seats, best: None, branches: 0 };
    solver.place(0, 0.0);
    let Solver { best, branches, .. } = solver;
    best.map(|(_, seats)| Solution { seats, branches })
}

impl Solver<'_> {
    fn place(&mut self, at: usize, us: f64) {
        let Some(&model) = self.order.get(at) else {
            if self.best.as_ref().is_none_or(|(best, _)| us < *best) {
                self.best = Some((us, self.seats.clone()));
            }
            return;
        };
        for (c, choice) in self.choices[model].iter().enumerate() {
            let bound = us + choice.us + self.least_from[at + 1];
            // Choices come in the order of their time.
            if self.best.as_ref().is_some_and(|(best, _)| bound >= *best) {
                return;
            }
            for group in self.groups(choice) {
                self.branches += 1;
                if self.branches > MAX_BRANCHES {
                    return;
                }
                let before = self.occupy(choice, group);
                self.seats[model] = (c, group);
                self.place(at + 1, us + choice.us);
                for (device, used) in self.classes[choice.class].groups[group].iter().zip(before) {
                    self.used[*device] = used;
                }
            }
        }
    }

    /// The groups to try a choice on.
    fn groups(&self, choice: &Choice) -> Vec<usize> {
        let groups = self.classes[choice.class].groups.iter().enumerate();
        let spare = groups.filter_map(|(g, devices)| Some((self.spare(choice, devices)?, g)));
        let mut spare: Vec<(u64, usize)> = spare.collect();
        // The emptiest first; of equals, the first.
        spare.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        match spare.as_slice() {
            [first, .., last] if first.0 > last.0 => vec![first.1, last.1],
            [first, ..] => vec![first.1],
            [] => Vec::new(),
        }
    }

    /// What the fullest device of a group would have left; nothing if it isn't enough.
    fn spare(&self, choice: &Choice, devices: &[usize]) -> Option<u64> {
        let left = devices.iter().zip(&choice.needs).map(|(device, [weights, beside])| {
            let [stays, at_most] = self.used[*device];
            let peak = stays.saturating_add(*weights).saturating_add(at_most.max(*beside));
            self.has[*device].checked_sub(peak)
        });
        left.min().flatten()
    }

    /// Puts a choice on a group, and gives what was used before.
    fn occupy(&mut self, choice: &Choice, group: usize) -> Vec<[u64; 2]> {
        let devices = &self.classes[choice.class].groups[group];
        let mut before = Vec::new();
        for (device, [weights, beside]) in devices.iter().zip(&choice.needs) {
            let used = &mut self.used[*device];
            before.push(*used);
            *used = [used[0] + weights, used[1].max(*beside)];
        }
        before
    }
}
