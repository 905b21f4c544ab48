//! How a replica's blocks are cut into pipeline stages, under memory.

use std::ops::Range;

use super::arrange::{Memory, RankNeeds};
use super::degrees::Degrees;
use super::pass::{Goal, Pass};
use super::predict::{Needs, Tally};
use super::workload::{Kind, Workload};

/// A stage's costs by kind of block. Groups that are alike are there once.
#[derive(Default)]
pub(super) struct StageCost {
    pub(super) main: Vec<Tally>,
    pub(super) prompt: Vec<Tally>,
    /// `[kind of group][block][rank]`.
    pub(super) needs: Vec<Vec<Vec<Needs>>>,
    /// `[kind of group][rank]`.
    pub(super) memory: Vec<Vec<u64>>,
    pub(super) speeds: Vec<Vec<f64>>,
}

/// What ranks need whichever blocks they have.
pub(super) struct Fixed {
    streams: u64,
    buffers: u64,
    /// A rank's part of a tensor that the first and the last stage hold, if these are two.
    tied: u64,
    last: usize,
}

impl Fixed {
    pub(super) fn of(workload: &Workload, d: &Degrees, pass: &Pass) -> Fixed {
        let stream = pass.local_tokens(d.cp) * workload.stream_bytes as f64;
        // The residual stream and a part's input and output; of sequence-parallel ranks, one of them whole at a time.
        let streams = if d.sp { stream + 2.0 * stream / d.tp as f64 } else { 3.0 * stream };
        let mut buffers = 0.0;
        for used in [d.tp > 1, d.pp > 1] {
            buffers += if used { stream } else { 0.0 };
        }
        if d.cp > 1 {
            let attention = workload.parts().filter_map(|p| p.attention.as_ref());
            let bytes = attention.map(|a| pass.context_bytes(a, d.cp, d.cp_by)).map(|(q, kv)| q.max(kv));
            buffers += bytes.fold(0.0, f64::max);
        }
        if let (Kind::Forward { latent_bytes, .. }, true) = (workload.kind, d.cfg > 1) {
            buffers += latent_bytes as f64 / d.cp as f64 * pass.sequences;
        }
        let tied = if d.pp > 1 { workload.tied_bytes.div_ceil(d.tp as u64) } else { 0 };
        Fixed { streams: streams as u64, buffers: buffers as u64, tied, last: d.pp - 1 }
    }
}

/// How many blocks of each kind a stage has.
pub(super) type Counts = Vec<u64>;

pub(super) fn counts(workload: &Workload, range: &Range<usize>) -> Counts {
    let mut counts = vec![0; workload.blocks.len()];
    workload.order[range.clone()].iter().for_each(|b| counts[*b] += 1);
    counts
}

impl StageCost {
    /// `[kind of group][rank]`.
    pub(super) fn ranks(&self, counts: &Counts, stage: usize, fixed: &Fixed) -> Vec<Vec<RankNeeds>> {
        let kinds = self.needs.iter().zip(&self.speeds);
        let group = |(needs, speeds): (&Vec<Vec<Needs>>, &Vec<f64>)| {
            let rank = |(r, speed): (usize, &f64)| {
                let memory = rank_memory(needs, r, counts, stage, fixed);
                RankNeeds { memory, speed: *speed }
            };
            speeds.iter().enumerate().map(rank).collect()
        };
        kinds.map(group).collect()
    }

    pub(super) fn fits(&self, counts: &Counts, stage: usize, fixed: &Fixed) -> bool {
        self.needs.iter().zip(&self.memory).all(|(needs, ranks)| {
            let mut ranks = ranks.iter().enumerate();
            ranks.all(|(r, has)| rank_memory(needs, r, counts, stage, fixed).peak() <= *has)
        })
    }

    fn block(&self, goal: Goal, block: usize) -> f64 {
        match goal {
            Goal::Prefill if !self.prompt.is_empty() => self.prompt[block].total_us(),
            Goal::Memory => {
                let ranks = self.needs.iter().flat_map(|n| &n[block]);
                ranks.map(|n| n.weights.saturating_add(n.cache)).max().unwrap_or(0) as f64
            }
            _ => self.main[block].total_us(),
        }
    }
}

fn rank_memory(needs: &[Vec<Needs>], rank: usize, counts: &Counts, stage: usize, fixed: &Fixed) -> Memory {
    let mut memory = Memory::default();
    let (mut wide, mut buffer) = (0, 0);
    for (needs, count) in needs.iter().zip(counts).filter(|(_, count)| **count > 0) {
        let needs = &needs[rank];
        memory.weights = memory.weights.saturating_add(needs.weights.saturating_mul(*count));
        memory.kv_cache = memory.kv_cache.saturating_add(needs.cache.saturating_mul(*count));
        memory.loading = memory.loading.max(needs.largest);
        wide = wide.max(needs.wide);
        buffer = buffer.max(needs.buffer);
    }
    memory.weights = memory.weights.saturating_add(if stage == fixed.last { fixed.tied } else { 0 });
    memory.activations = fixed.streams.saturating_add(wide);
    memory.buffers = fixed.buffers.saturating_add(buffer);
    memory
}

/// Cuts the blocks into one range for each stage, such that each has its memory and the slowest is as fast as can be.
/// Where memory doesn't suffice, blocks are cut evenly, to say what lacks.
pub(super) fn cut(workload: &Workload, costs: &[&StageCost], fixed: &Fixed, goal: Goal) -> Vec<Range<usize>> {
    let (blocks, n) = (workload.order.len(), costs.len());
    if n == 1 {
        return std::iter::once(0..blocks).collect();
    }
    let kinds = 0..workload.blocks.len();
    let cost: Vec<Vec<f64>> =
        costs.iter().map(|c| kinds.clone().map(|b| c.block(goal, b)).collect()).collect();
    let fill = |limit: f64| -> Vec<Range<usize>> {
        let mut start = 0;
        let stage = |s: usize| {
            let end = filled(workload, start, blocks - (n - s - 1), &cost[s], limit, |counts| {
                costs[s].fits(counts, s, fixed)
            });
            let range = start..end;
            start = end;
            range
        };
        (0..n).map(stage).collect()
    };
    let all_placed = |ranges: &[Range<usize>]| ranges.last().is_some_and(|r| r.end == blocks);
    let total = |s: usize| workload.order.iter().map(|b| cost[s][*b]).sum::<f64>();
    let mut high = (0..n).map(total).fold(0.0, f64::max) * 2.0;
    let mut best = fill(high);
    if !all_placed(&best) {
        return (0..n).map(|s| s * blocks / n..(s + 1) * blocks / n).collect();
    }
    let mut low = 0.0;
    // 2^-24 of the whole is less than any block.
    for _ in 0..24 {
        let middle = (low + high) / 2.0;
        let ranges = fill(middle);
        if all_placed(&ranges) {
            (best, high) = (ranges, middle);
        } else {
            low = middle;
        }
    }
    best
}

/// Where a stage ends that starts at `start`: it has one block at least, ends at `most` at the latest, costs no more
/// than `limit`, and fits. Blocks of one kind that follow each other are taken together.
fn filled(
    workload: &Workload,
    start: usize,
    most: usize,
    cost: &[f64],
    limit: f64,
    fits: impl Fn(&Counts) -> bool,
) -> usize {
    let order = &workload.order;
    let mut counts = vec![0; workload.blocks.len()];
    counts[order[start]] = 1;
    let (mut end, mut sum) = (start + 1, cost[order[start]]);
    while end < most {
        let kind = order[end];
        let run = order[end..most].iter().take_while(|b| **b == kind).count();
        let affordable =
            if cost[kind] > 0.0 { (((limit - sum) / cost[kind]).max(0.0)) as usize } else { run };
        let mut with = |more: usize| {
            counts[kind] += more as u64;
            let ok = fits(&counts);
            counts[kind] -= more as u64;
            ok
        };
        let mut take = run.min(affordable);
        if !with(take) {
            let (mut some, mut too_many) = (0, take);
            while too_many - some > 1 {
                let middle = some.midpoint(too_many);
                if with(middle) { some = middle } else { too_many = middle }
            }
            take = some;
        }
        counts[kind] += take as u64;
        end += take;
        sum += take as f64 * cost[kind];
        if take < run {
            break;
        }
    }
    end
}
