//! One arrangement in full: which device has which blocks, what they take and what they need.

use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;

use serde::{Deserialize, Serialize};

use super::degrees::Degrees;
use super::groups::{Group, Laid, Layer, Replica};
use super::machine::{Machine, Span};
use super::pass::{Goal, Pass};
use super::predict::{Cause, Pricer, Tally};
use super::share::Memo;
use super::stages::{Counts, Fixed, GroupCost, StageCost, counts, cut};
use super::workload::{Kind, Workload};

/// What is to be placed, and for what.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Task<'a> {
    /// The model.
    pub workload: &'a Workload,
    /// The devices.
    pub machine: &'a Machine,
    /// What is to be best.
    pub goal: Goal,
    /// Tokens in each sequence.
    pub context: usize,
    /// Sequences at a time.
    pub batch: usize,
}

/// What one rank's memory holds at most, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Weights.
    pub weights: u64,
    /// Keys and values of all its sequences' contexts.
    pub kv_cache: u64,
    /// Activations of one wave.
    pub activations: u64,
    /// What exchanges and logits are received in.
    pub buffers: u64,
    /// The largest part of a tensor, which is read beside the weights while loading, before there is any cache.
    pub loading: u64,
}

impl Memory {
    /// What is there beside the weights while the model runs.
    pub fn running(&self) -> u64 {
        self.kv_cache.saturating_add(self.activations).saturating_add(self.buffers)
    }

    /// The most at any time: weights, and beside them what is read while loading or what is there while running.
    pub fn peak(&self) -> u64 {
        self.weights.saturating_add(self.loading.max(self.running()))
    }
}

/// What a pipeline stage of one replica has.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// Blocks, as a range of [`Workload::order`].
    pub blocks: Range<usize>,
    /// Of each kind of tensor-parallel group, its ranks.
    pub groups: Vec<Vec<RankNeeds>>,
    /// Each tensor-parallel group's kind, in rank order.
    pub which: Vec<usize>,
}

/// What a rank needs, whichever device it is on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RankNeeds {
    /// Its memory.
    pub memory: Memory,
    /// How fast it is, relative to the fastest of its tensor-parallel group: shares follow this.
    pub speed: f64,
}

/// One arrangement in full.
#[derive(Clone, Debug, PartialEq)]
pub struct Arrangement {
    /// The degrees.
    pub degrees: Degrees,
    /// The device of each rank, as places in [`Machine::workers`].
    pub workers: Vec<usize>,
    /// Of each kind of replica its stages, and the sequences of each of its data-parallel ranks. Replicas exchange
    /// nothing with each other.
    pub kinds: Vec<(Vec<Stage>, usize)>,
    /// Each replica's kind, in rank order.
    pub replicas: Vec<usize>,
    /// One step: a token of each sequence, or a pass with all its branches.
    pub step: Tally,
    /// All prompts; of a model that makes no tokens, the same as `step`.
    pub prefill: Tally,
    /// Whether it makes tokens after a prompt.
    pub makes_tokens: bool,
    /// The level of the farthest links of each exchange.
    pub levels: [Option<usize>; 7],
    /// The rank that has least memory to spare, or lacks most.
    pub tightest: usize,
    /// The rank with the most bytes.
    pub fullest: usize,
}

/// Why degrees are no arrangement at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// There aren't as many devices on connected islands.
    Devices,
    /// There is less of something than ranks.
    TooFine(&'static str),
}

impl Arrangement {
    /// What each rank needs, in rank order.
    pub fn ranks(&self) -> impl Iterator<Item = &RankNeeds> {
        let stages = self.replicas.iter().flat_map(|kind| &self.kinds[*kind].0);
        stages.flat_map(|stage| stage.which.iter().flat_map(|group| &stage.groups[*group]))
    }

    /// Each rank's memory, in rank order.
    pub fn memory(&self) -> impl Iterator<Item = &Memory> {
        self.ranks().map(|rank| &rank.memory)
    }

    /// The most bytes on any device.
    pub fn peak_bytes(&self) -> u64 {
        self.memory().map(Memory::peak).max().unwrap_or(0)
    }

    /// What is to be small, for this goal: microseconds, or bytes.
    pub fn cost(&self, goal: Goal) -> f64 {
        match goal {
            Goal::Decode => self.step.total_us(),
            Goal::Prefill => self.prefill.total_us(),
            Goal::Request { new_tokens } if self.makes_tokens => {
                self.prefill.total_us() + new_tokens as f64 * self.step.total_us()
            }
            Goal::Request { .. } => self.step.total_us(),
            Goal::Memory => self.peak_bytes() as f64,
        }
    }

    /// By how many bytes the tightest rank's device is too small; 0 if all fits.
    pub fn lacks(&self, machine: &Machine) -> u64 {
        let lack = |(m, w): (&Memory, &usize)| m.peak().saturating_sub(machine.workers[*w].memory_bytes);
        self.memory().zip(&self.workers).map(lack).max().unwrap_or(0)
    }
}

/// What a replica makes of its sequences.
struct Outcome {
    stages: Vec<Stage>,
    step: Tally,
    prefill: Tally,
    fits: bool,
}

/// Arranges one model on one machine in many ways.
pub struct Arranger<'a> {
    task: Task<'a>,
    memo: Memo,
    layer: Layer<'a>,
    /// What was found for the degrees that came last, by [`Group::kind`] and sequences.
    priced: HashMap<(usize, usize), Result<Rc<GroupCost>, Misfit>>,
    priced_for: Degrees,
}

impl<'a> Arranger<'a> {
    /// For this task.
    pub fn new(task: Task<'a>) -> Arranger<'a> {
        Arranger {
            task,
            memo: Memo::new(),
            layer: Layer::new(task.machine),
            priced: HashMap::new(),
            priced_for: Degrees::ONE,
        }
    }

    /// The arrangement of these degrees.
    pub fn arrange(&mut self, d: &Degrees) -> Result<Arrangement, Misfit> {
        let machine = self.task.machine;
        if d.of_group() != self.priced_for.of_group() {
            self.priced.clear();
            self.priced_for = *d;
        }
        let laid = self.layer.lay(d).ok_or(Misfit::Devices)?;
        let sequences = self.divide(d, &laid)?;
        let mut outcomes = Vec::new();
        for (replica, n) in laid.replicas.iter().zip(&sequences) {
            outcomes.push(self.run(d, replica, *n)?);
        }
        let slowest = |of: fn(&Outcome) -> &Tally| {
            let tallies = outcomes.iter().map(of);
            tallies
                .copied()
                .reduce(|a, b| if b.total_us() > a.total_us() { b } else { a })
                .unwrap_or_default()
        };
        let arrangement = Arrangement {
            degrees: *d,
            step: slowest(|o| &o.step),
            prefill: slowest(|o| &o.prefill),
            kinds: outcomes.iter().zip(sequences).map(|(o, n)| (o.stages.clone(), n)).collect(),
            replicas: laid.which.clone(),
            levels: levels(&laid.replicas),
            makes_tokens: self.task.workload.kind == Kind::Decoder,
            workers: laid.workers.clone(),
            tightest: 0,
            fullest: 0,
        };
        let spare = |(rank, m): (usize, &Memory)| {
            let has = machine.workers[arrangement.workers[rank]].memory_bytes;
            (i128::from(has) - i128::from(m.peak()), rank)
        };
        let tightest = arrangement.memory().enumerate().map(spare).min().map_or(0, |(_, rank)| rank);
        let peak = arrangement.peak_bytes();
        let fullest = arrangement.memory().position(|m| m.peak() == peak).unwrap_or(0);
        Ok(Arrangement { tightest, fullest, ..arrangement })
    }

    /// Sequences of a data-parallel rank in each kind of replica: as many as let all be done soonest.
    fn divide(&mut self, d: &Degrees, laid: &Laid) -> Result<Vec<usize>, Misfit> {
        let Laid { replicas, which, .. } = laid;
        let even = self.task.batch.div_ceil(d.dp);
        if replicas.len() == 1 {
            return Ok(vec![even]);
        }
        let mut count = vec![0; replicas.len()];
        which.iter().for_each(|w| count[*w] += d.sharing_experts());
        // A few at a time, so that large batches take no longer: whoever would be done first takes the next.
        let unit = even.div_ceil(16);
        let mut has = vec![unit; replicas.len()];
        let mut next = Vec::new();
        for replica in replicas {
            next.push(self.done(d, replica, 2 * unit)?);
        }
        while has.iter().zip(&count).map(|(n, c)| n * c).sum::<usize>() < self.task.batch {
            let first = (0..next.len()).min_by(|a, b| next[*a].total_cmp(&next[*b])).unwrap_or(0);
            has[first] += unit;
            next[first] = self.done(d, &replicas[first], has[first] + unit)?;
        }
        Ok(has)
    }

    /// When a replica is done with so many sequences; never, if it hasn't the memory.
    fn done(&mut self, d: &Degrees, replica: &Replica, sequences: usize) -> Result<f64, Misfit> {
        let outcome = self.run(d, replica, sequences)?;
        let us = if self.task.goal == Goal::Prefill { outcome.prefill } else { outcome.step }.total_us();
        // Those without memory last, so that there is an end; they are refused afterwards.
        Ok(if outcome.fits { us } else { f64::MAX })
    }

    /// What goes through at once of so many sequences: a step, and the prompt before it.
    fn passes(&self, d: &Degrees, sequences: usize) -> (Pass, Option<Pass>) {
        let Task { workload, goal, context, .. } = self.task;
        match workload.kind {
            Kind::Decoder => {
                let made = if let Goal::Request { new_tokens } = goal { new_tokens } else { 0 };
                let prompt = context.saturating_sub(made).max(1);
                (Pass::decode(sequences, context), Some(Pass::prefill(sequences, prompt, d.cp)))
            }
            Kind::Forward { .. } => (Pass::forward(sequences, context), None),
        }
    }

    /// What a group takes and needs for so many sequences.
    fn price(&mut self, d: &Degrees, group: &Group, sequences: usize) -> Result<Rc<GroupCost>, Misfit> {
        if let Some(known) = self.priced.get(&(group.kind, sequences)) {
            return known.clone();
        }
        let priced = self.price_anew(d, group, sequences).map(Rc::new);
        self.priced.insert((group.kind, sequences), priced.clone());
        priced
    }

    fn price_anew(&mut self, d: &Degrees, group: &Group, sequences: usize) -> Result<GroupCost, Misfit> {
        let Task { workload, machine, goal, context, .. } = self.task;
        let pricer = Pricer { workload, machine };
        let (main, prompt) = self.passes(d, sequences);
        let of_goal = if goal == Goal::Prefill { prompt.unwrap_or(main) } else { main };
        let cached = (sequences as u64).saturating_mul(context as u64);
        let speeds = pricer.speeds(&group.workers, &of_goal);
        let shares = pricer.shares(d, &group.workers, &speeds, &mut self.memo).map_err(Misfit::TooFine)?;
        let memory = |rank: &usize| machine.workers[group.workers[*rank]].memory_bytes;
        Ok(GroupCost {
            main: pricer.blocks(&shares, group, d, &main),
            prompt: prompt.map_or(Vec::new(), |prompt| pricer.blocks(&shares, group, d, &prompt)),
            needs: pricer.needs(&shares, d, &prompt.unwrap_or(main), cached),
            memory: shares.firsts.iter().map(memory).collect(),
            which: shares.which,
            speeds,
        })
    }

    /// What a replica takes and needs for so many sequences a data-parallel rank.
    fn run(&mut self, d: &Degrees, replica: &Replica, sequences: usize) -> Result<Outcome, Misfit> {
        let Task { workload, goal, .. } = self.task;
        let mut kinds = Vec::new();
        for stage in &replica.stages {
            let groups = stage.groups.iter().map(|group| self.price(d, group, sequences));
            kinds.push(StageCost::of(groups.collect::<Result<_, _>>()?));
        }
        let (main, prompt) = self.passes(d, sequences);
        let fixed = Fixed::of(workload, d, &prompt.unwrap_or(main));
        let ranges = cut(workload, &kinds, &replica.which, &fixed, goal);
        let counts: Vec<Counts> = ranges.iter().map(|r| counts(workload, r)).collect();
        let stages = || counts.iter().zip(&replica.which).map(|(counts, kind)| (counts, &kinds[*kind]));
        let last = |s: usize| s + 1 == d.pp;
        let fits = stages().enumerate().all(|(s, (counts, cost))| cost.fits(counts, last(s), &fixed));
        let through = |pass: &Pass, of_prompt: bool| {
            through(stages().map(|(n, cost)| cost.us(n, of_prompt)).collect(), replica, workload, d, pass)
        };
        let step = through(&main, false);
        let prefill = prompt.as_ref().map_or(step, |prompt| through(prompt, true));
        let stage = |(s, (blocks, (counts, cost))): (usize, (Range<usize>, (&Counts, &StageCost)))| Stage {
            blocks,
            groups: cost.ranks(counts, last(s), &fixed),
            which: replica.stages[replica.which[s]].which.clone(),
        };
        let stages = ranges.into_iter().zip(stages()).enumerate().map(stage).collect();
        Ok(Outcome { stages, step, prefill, fits })
    }
}

/// Waves through all stages, and what follows them.
fn through(
    mut stages: Vec<Tally>,
    replica: &Replica,
    workload: &Workload,
    d: &Degrees,
    pass: &Pass,
) -> Tally {
    let stream = pass.local_tokens(d.cp) * workload.stream_bytes as f64;
    for (stage, hop) in stages.iter_mut().zip(&replica.hops) {
        stage.add(Cause::Pp, hop.slowest().map_or(0.0, |link| link.us(stream)), stream);
    }
    let branches = match workload.kind {
        Kind::Decoder => 1,
        Kind::Forward { branches, .. } => branches.div_ceil(d.cfg),
    };
    let waves = pass.waves * branches as f64;
    let mut all = Tally::default();
    stages.iter().for_each(|s| all.plus(s, 1.0));
    let slowest = stages.iter().copied().reduce(|a, b| if b.total_us() > a.total_us() { b } else { a });
    all.plus(&slowest.unwrap_or_default(), waves - 1.0);
    // A rank sends what its own stage does: the busiest one's, in each wave.
    let busiest = stages.iter().copied().reduce(|a, b| if b.total_wire() > a.total_wire() { b } else { a });
    all.wire = busiest.unwrap_or_default().wire.map(|bytes| bytes * waves);
    if let (Kind::Forward { latent_bytes, .. }, true) = (workload.kind, d.cfg > 1) {
        let latent = latent_bytes as f64 / d.cp as f64 * pass.sequences * pass.waves;
        all.add(Cause::Cfg, replica.cfg.slowest().map_or(0.0, |link| link.us(latent)), latent);
    }
    all
}

/// The level of the farthest links of each exchange.
fn levels(replicas: &[Replica]) -> [Option<usize>; 7] {
    let mut found = [None; 7];
    let mut note = |cause: Cause, span: &Span| {
        let at = &mut found[cause as usize];
        *at = (*at).max(span.level());
    };
    for replica in replicas {
        for group in replica.stages.iter().flat_map(|s| &s.groups) {
            note(Cause::Tp, &group.tp);
            note(Cause::Cp, &group.cp);
            note(Cause::Ep, &group.ep);
        }
        note(Cause::Cfg, &replica.cfg);
        replica.hops.iter().for_each(|h| note(Cause::Pp, h));
    }
    found
}
