//! How a replica's blocks are cut into pipeline stages, under memory.

use std::ops::Range;
use std::rc::Rc;

use super::arrange::{Memory, RankNeeds};
use super::degrees::Degrees;
use super::pass::{Goal, Pass};
use super::predict::{Needs, Tally};
use super::workload::{Kind, Workload};

/// A tensor-parallel group's costs by kind of block. Ranks that are alike are there once.
pub(super) struct GroupCost {
    pub(super) main: Vec<Tally>,
    /// Empty for a model that reads no prompt.
    pub(super) prompt: Vec<Tally>,
    /// `[kind of rank][block]`.
    pub(super) needs: Vec<Vec<Needs>>,
    /// What a device of each kind of rank has.
    pub(super) memory: Vec<u64>,
    /// Each rank's kind.
    pub(super) which: Vec<usize>,
    pub(super) speeds: Vec<f64>,
}

/// A stage's costs by kind of block: the slowest group's. Groups that are alike are there once.
pub(super) struct StageCost {
    main: Vec<Tally>,
    prompt: Vec<Tally>,
    groups: Vec<Rc<GroupCost>>,
}

/// What ranks need whichever blocks they have.
pub(super) struct Fixed {
    streams: u64,
    buffers: u64,
    /// A rank's part of a tensor that the first and the last stage hold, if these are two.
    tied: u64,
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
            let parts = workload.blocks.iter().flat_map(|b| &b.parts);
            let attention = parts.filter_map(|p| p.attention.as_ref());
            let bytes = attention.map(|a| pass.context_bytes(a, d.cp, d.cp_by)).map(|(q, kv)| q.max(kv));
            buffers += bytes.fold(0.0, f64::max);
        }
        if let (Kind::Forward { latent_bytes, .. }, true) = (workload.kind, d.cfg > 1) {
            buffers += latent_bytes as f64 / d.cp as f64 * pass.sequences;
        }
        let tied = if d.pp > 1 { workload.tied_bytes.div_ceil(d.tp as u64) } else { 0 };
        Fixed { streams: streams as u64, buffers: buffers as u64, tied }
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
    pub(super) fn of(groups: Vec<Rc<GroupCost>>) -> StageCost {
        let slowest = |of: fn(&GroupCost) -> &Vec<Tally>| {
            let mut all = of(&groups[0]).clone();
            for group in &groups[1..] {
                let slower = all.iter_mut().zip(of(group)).filter(|(a, b)| b.total_us() > a.total_us());
                slower.for_each(|(a, b)| *a = *b);
            }
            all
        };
        StageCost { main: slowest(|g| &g.main), prompt: slowest(|g| &g.prompt), groups }
    }

    /// What blocks of each kind take together, of a step or of a prompt.
    pub(super) fn us(&self, counts: &Counts, of_prompt: bool) -> Tally {
        let mut tally = Tally::default();
        let blocks = if of_prompt { &self.prompt } else { &self.main };
        blocks.iter().zip(counts).for_each(|(block, n)| tally.plus(block, *n as f64));
        tally
    }

    /// `[kind of group][rank]`.
    pub(super) fn ranks(&self, counts: &Counts, last: bool, fixed: &Fixed) -> Vec<Vec<RankNeeds>> {
        let group = |group: &Rc<GroupCost>| {
            let kinds: Vec<Memory> =
                group.needs.iter().map(|needs| rank_memory(needs, counts, last, fixed)).collect();
            let ranks = group.which.iter().zip(&group.speeds);
            ranks.map(|(kind, speed)| RankNeeds { memory: kinds[*kind], speed: *speed }).collect()
        };
        self.groups.iter().map(group).collect()
    }

    pub(super) fn fits(&self, counts: &Counts, last: bool, fixed: &Fixed) -> bool {
        let mut ranks = self.groups.iter().flat_map(|g| g.needs.iter().zip(&g.memory));
        ranks.all(|(needs, has)| rank_memory(needs, counts, last, fixed).peak() <= *has)
    }

    fn block(&self, goal: Goal, block: usize) -> f64 {
        match goal {
            Goal::Prefill if !self.prompt.is_empty() => self.prompt[block].total_us(),
            Goal::Memory => {
                let ranks = self.groups.iter().flat_map(|g| &g.needs).map(|needs| &needs[block]);
                ranks.map(|n| n.weights.saturating_add(n.cache)).max().unwrap_or(0) as f64
            }
            _ => self.main[block].total_us(),
        }
    }
}

fn rank_memory(needs: &[Needs], counts: &Counts, last: bool, fixed: &Fixed) -> Memory {
    let mut memory = Memory::default();
    let (mut wide, mut buffer) = (0, 0);
    for (needs, count) in needs.iter().zip(counts).filter(|(_, count)| **count > 0) {
        memory.weights = memory.weights.saturating_add(needs.weights.saturating_mul(*count));
        memory.kv_cache = memory.kv_cache.saturating_add(needs.cache.saturating_mul(*count));
        memory.loading = memory.loading.max(needs.largest);
        wide = wide.max(needs.wide);
        buffer = buffer.max(needs.buffer);
    }
    memory.weights = memory.weights.saturating_add(if last { fixed.tied } else { 0 });
    memory.activations = fixed.streams.saturating_add(wide);
    memory.buffers = fixed.buffers.saturating_add(buffer);
    memory
}

/// Cuts the blocks into one range for each stage, such that each has its memory and the slowest is as fast as can be.
/// Where memory doesn't suffice, blocks are cut evenly, to say what lacks. `kinds` are the costs of each kind of stage,
/// `which` each stage's kind.
pub(super) fn cut(
    workload: &Workload,
    kinds: &[StageCost],
    which: &[usize],
    fixed: &Fixed,
    goal: Goal,
) -> Vec<Range<usize>> {
    let (blocks, n) = (workload.order.len(), which.len());
    if n == 1 {
        return std::iter::once(0..blocks).collect();
    }
    let ranges = |ends: &[usize]| -> Vec<Range<usize>> {
        (0..n).map(|s| if s == 0 { 0 } else { ends[s - 1] }..ends[s]).collect()
    };
    let of = |cost: &StageCost| (0..workload.blocks.len()).map(|b| cost.block(goal, b)).collect();
    let cost: Vec<Vec<f64>> = kinds.iter().map(of).collect();
    let mut filler = Filler::new(workload, kinds, fixed);
    let mut fill = |limit: f64| -> Vec<usize> {
        let mut start = 0;
        let stage = |s: usize| {
            let most = blocks - (n - s - 1);
            start = filler.end(start, most, which[s], s == n - 1, &cost[which[s]], limit);
            start
        };
        (0..n).map(stage).collect()
    };
    let all_placed = |ends: &[usize]| ends.last() == Some(&blocks);
    let total = |cost: &Vec<f64>| workload.order.iter().map(|b| cost[*b]).sum::<f64>();
    let mut high = cost.iter().map(total).fold(0.0, f64::max) * 2.0;
    let mut best = fill(high);
    if !all_placed(&best) {
        return (0..n).map(|s| s * blocks / n..(s + 1) * blocks / n).collect();
    }
    let mut low = 0.0;
    // 2^-24 of the whole is less than any block.
    for _ in 0..24 {
        let middle = (low + high) / 2.0;
        let ends = fill(middle);
        if all_placed(&ends) {
            (best, high) = (ends, middle);
        } else {
            low = middle;
        }
    }
    ranges(&best)
}

/// Fills stages with blocks. How far memory reaches doesn't depend on the limit, so it is found once for each start.
struct Filler<'a> {
    workload: &'a Workload,
    kinds: &'a [StageCost],
    fixed: &'a Fixed,
    /// Where the run of blocks of one kind ends that each is part of.
    run_end: Vec<usize>,
    /// `[start][block]`: how many of each kind come before.
    before: Vec<Counts>,
    /// Where memory ends, by kind of stage, whether it is the last one, and start.
    reach: Vec<[Vec<Option<usize>>; 2]>,
}

impl<'a> Filler<'a> {
    fn new(workload: &'a Workload, kinds: &'a [StageCost], fixed: &'a Fixed) -> Filler<'a> {
        let order = &workload.order;
        let mut run_end = vec![order.len(); order.len()];
        for at in (1..order.len()).rev() {
            run_end[at - 1] = if order[at - 1] == order[at] { run_end[at] } else { at };
        }
        let mut before = vec![vec![0; workload.blocks.len()]];
        for block in order {
            let mut counts = before[before.len() - 1].clone();
            counts[*block] += 1;
            before.push(counts);
        }
        let unknown = vec![None; order.len()];
        let reach = vec![[unknown.clone(), unknown]; kinds.len()];
        Filler { workload, kinds, fixed, run_end, before, reach }
    }

    /// Where a stage ends that starts at `start`: it has one block at least, ends at `most` at the latest, costs no more
    /// than `limit`, and fits. Blocks of one kind that follow each other are taken together.
    fn end(&mut self, start: usize, most: usize, kind: usize, last: bool, cost: &[f64], limit: f64) -> usize {
        let most = most.min(self.reach(start, kind, last));
        let order = &self.workload.order;
        let (mut end, mut sum) = (start + 1, cost[order[start]]);
        while end < most {
            let each = cost[order[end]];
            let run = self.run_end[end].min(most) - end;
            let affordable = if each > 0.0 { (((limit - sum) / each).max(0.0)) as usize } else { run };
            let take = run.min(affordable);
            end += take;
            sum += take as f64 * each;
            if take < run {
                break;
            }
        }
        end
    }

    /// Where a stage ends at the latest that starts at `start`, so that it fits.
    fn reach(&mut self, start: usize, kind: usize, last: bool) -> usize {
        if let Some(known) = self.reach[kind][usize::from(last)][start] {
            return known;
        }
        let mut counts = self.before[0].clone();
        let mut fits = |end: usize| {
            let ends = self.before[end].iter().zip(&self.before[start]);
            counts.iter_mut().zip(ends).for_each(|(n, (to, from))| *n = to - from);
            self.kinds[kind].fits(&counts, last, self.fixed)
        };
        let all = self.workload.order.len();
        let end = if fits(all) {
            all
        } else {
            let (mut some, mut too_many) = (start + 1, all);
            while too_many - some > 1 {
                let middle = some.midpoint(too_many);
                if fits(middle) { some = middle } else { too_many = middle }
            }
            some
        };
        self.reach[kind][usize::from(last)][start] = Some(end);
        end
    }
}
