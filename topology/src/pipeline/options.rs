//! Ways to run one model on a group of devices, and the groups there are.

use std::collections::BTreeSet;

use crate::fabric::Fabric;
use crate::place::arrange::{Arrangement, Arranger, Task};
use crate::place::pass::CHUNK;
use crate::place::search::search;
use crate::place::workload::Kind;
use crate::place::{Degrees, Goal, Machine, Workload};

use super::describe::Stage;

/// Ways that are kept for one model on one kind of group: the fastest, and slower ones that need less memory; besides
/// these, the one that needs least.
const KEPT: usize = 4;

/// One model of a pipeline, with all stages that call it: its weights are loaded once, so it is placed once, for the
/// largest of what its stages ask.
pub(super) struct Unit {
    /// The stages, in the pipeline's order.
    pub(super) stages: Vec<usize>,
    pub(super) workload: Workload,
    pub(super) goal: Goal,
    pub(super) context: usize,
    pub(super) items: usize,
    /// Calls of all its stages.
    pub(super) calls: usize,
}

impl Unit {
    pub(super) fn new(index: usize, stage: &Stage, workload: Workload) -> Unit {
        let mut unit = Unit {
            stages: Vec::new(),
            workload,
            goal: Goal::Request { new_tokens: 0 },
            context: 1,
            items: 1,
            calls: 0,
        };
        unit.add(index, stage);
        unit
    }

    /// Another stage that calls the same model.
    pub(super) fn add(&mut self, index: usize, stage: &Stage) {
        let Goal::Request { new_tokens } = self.goal else { return };
        // A model without tokens takes an item at a time.
        let tokens = if self.workload.stream_bytes == 0 { CHUNK } else { stage.tokens };
        self.stages.push(index);
        self.goal = Goal::Request { new_tokens: new_tokens.max(stage.new_tokens) };
        self.context = self.context.max(tokens + stage.new_tokens);
        self.items = self.items.max(stage.items);
        self.calls += stage.calls;
        if let (Kind::Forward { branches, latent_bytes }, true) =
            (&mut self.workload.kind, stage.branches > 1)
        {
            *branches = stage.branches;
            *latent_bytes = stage.latent_bytes.max(*latent_bytes);
        }
    }

    pub(super) fn task<'a>(&'a self, machine: &'a Machine) -> Task<'a> {
        Task { workload: &self.workload, machine, goal: self.goal, context: self.context, batch: self.items }
    }
}

/// Groups of devices that are alike, each in the order in which ranks are laid on it.
pub(super) struct Class {
    pub(super) groups: Vec<Vec<usize>>,
}

/// The groups that a model may be placed on: islands of links, and of each its blocks of a power of two of devices.
pub(super) fn classes(fabric: &Fabric) -> Vec<Class> {
    let (machine, _) = Machine::of(fabric, &fabric.workers(), 16);
    let everything = 0..machine.workers.len();
    let mut ranges: BTreeSet<(usize, usize)> = [(0, everything.len())].into();
    for level in &machine.levels {
        let places: Vec<usize> = everything.clone().collect();
        let mut start = 0;
        // An island's devices are neighbours.
        for island in places.chunk_by(|a, b| level.island_of[*a] == level.island_of[*b]) {
            ranges.insert((start, island.len()));
            let sizes = std::iter::successors(Some(1usize), |n| n.checked_mul(2));
            for size in sizes.take_while(|n| *n <= island.len()) {
                ranges.extend((0..island.len() / size).map(|i| (start + i * size, size)));
            }
            start += island.len();
        }
    }
    let idle = vec![0; machine.interfaces.len()];
    let mut classes: Vec<(Vec<usize>, Class)> = Vec::new();
    for (start, len) in ranges {
        let places: Vec<usize> = (start..start + len).collect();
        let devices = places.iter().map(|w| machine.workers[*w].device).collect();
        let known =
            classes.iter_mut().find(|(first, _)| first.len() == len && machine.alike(first, &places, &idle));
        match known {
            Some((_, class)) => class.groups.push(devices),
            None => classes.push((places, Class { groups: vec![devices] })),
        }
    }
    classes.into_iter().map(|(_, class)| class).collect()
}

/// One way to run a model on a group.
pub(super) struct Choice {
    /// Which of the classes of groups.
    pub(super) class: usize,
    pub(super) degrees: Degrees,
    /// What all calls take.
    pub(super) us: f64,
    /// Of each device of a group, in the group's order: bytes that stay, and bytes beside them while it runs or loads.
    pub(super) needs: Vec<[u64; 2]>,
}

impl Choice {
    /// The most that any device has of it.
    pub(super) fn peak(&self) -> u64 {
        self.needs.iter().map(|[weights, beside]| weights.saturating_add(*beside)).max().unwrap_or(0)
    }

    fn of(unit: &Unit, class: usize, group: &[usize], machine: &Machine, a: &Arrangement) -> Choice {
        let mut needs = vec![[0, 0]; group.len()];
        for (memory, worker) in a.memory().zip(&a.workers) {
            let device = machine.workers[*worker].device;
            if let Some(at) = group.iter().position(|d| *d == device) {
                needs[at] = [memory.weights, memory.loading.max(memory.running())];
            }
        }
        Choice { class, degrees: a.degrees, us: unit.calls as f64 * a.cost(unit.goal), needs }
    }
}

/// The ways to run a model on the classes of groups, the fastest first; each uses all of its group's devices. Also how
/// many were tried.
pub(super) fn choices(unit: &Unit, classes: &[Class], fabric: &Fabric) -> (Vec<Choice>, usize) {
    let mut all: Vec<Choice> = Vec::new();
    let mut explored = 0;
    for (c, class) in classes.iter().enumerate() {
        let group = &class.groups[0];
        let (machine, _) = Machine::of(fabric, group, unit.workload.bits);
        let task = unit.task(&machine);
        let found = search(task);
        explored += found.tried.len();
        // Slower ones are of use only if they need less memory.
        let using_all = found.tried.iter().filter(|t| t.lacks == 0 && t.degrees.ranks() == group.len());
        let mut least = u64::MAX;
        let mut front = Vec::new();
        for tried in using_all {
            if tried.peak < least {
                least = tried.peak;
                front.push(tried);
            }
        }
        let (fastest, rest) = front.split_at(front.len().min(KEPT));
        let mut arranger = Arranger::new(task);
        for tried in fastest.iter().chain(rest.last()) {
            if let Ok(arrangement) = arranger.arrange(&tried.degrees) {
                all.push(Choice::of(unit, c, group, &machine, &arrangement));
            }
        }
    }
    all.sort_by(|a, b| a.us.total_cmp(&b.us).then(a.peak().cmp(&b.peak())).then(a.degrees.cmp(&b.degrees)));
    (all, explored)
}
