//! Degrees laid on devices: who exchanges with whom, over which links.
//!
//! Large machines are regular: most replicas, stages and groups are like others, and are looked at once.

use std::collections::HashMap;
use std::rc::Rc;

use super::degrees::Degrees;
use super::layout::Layouts;
use super::machine::{Machine, Span};

/// Degrees laid on devices.
pub(super) struct Laid {
    /// The device of each rank, as places in [`Machine::workers`].
    pub(super) workers: Vec<usize>,
    /// Each kind of replica once. Replicas exchange nothing with each other.
    pub(super) replicas: Vec<Replica>,
    /// Each replica's kind.
    pub(super) which: Vec<usize>,
}

/// One replica's devices as groups that exchange.
pub(super) struct Replica {
    /// Each kind of stage once.
    pub(super) stages: Vec<StageGroups>,
    /// Each stage's kind.
    pub(super) which: Vec<usize>,
    /// From each stage to the next.
    pub(super) hops: Vec<Span>,
    /// Between the branches of guidance.
    pub(super) cfg: Span,
}

/// A pipeline stage's tensor-parallel groups.
pub(super) struct StageGroups {
    /// Each kind of group once.
    pub(super) groups: Vec<Group>,
    /// Each group's kind.
    pub(super) which: Vec<usize>,
}

/// A tensor-parallel group, and what it exchanges over with groups like it.
#[derive(Clone)]
pub(super) struct Group {
    /// The same for all groups of the [`Layer`] whose devices and links are alike.
    pub(super) kind: usize,
    /// Its devices, as places in [`Machine::workers`].
    pub(super) workers: Vec<usize>,
    pub(super) tp: Span,
    pub(super) cp: Span,
    pub(super) ep: Span,
}

/// Lays degrees on a machine.
pub(super) struct Layer<'a> {
    machine: &'a Machine,
    layouts: Layouts,
    /// Those with the same tensor- and context-parallel groups as the last.
    laid: HashMap<[usize; 7], Option<Rc<Laid>>>,
    /// The kind of each device, and of each group by what it is made of.
    makes: Vec<usize>,
    groups: HashMap<Vec<u64>, usize>,
}

impl<'a> Layer<'a> {
    pub(super) fn new(machine: &'a Machine) -> Layer<'a> {
        let mut firsts: Vec<usize> = Vec::new();
        let mut make = |at: usize| {
            let known = firsts.iter().position(|f| machine.workers[*f].is_like(&machine.workers[at]));
            known.unwrap_or_else(|| {
                firsts.push(at);
                firsts.len() - 1
            })
        };
        let makes = (0..machine.workers.len()).map(&mut make).collect();
        Layer { machine, layouts: Layouts::default(), laid: HashMap::new(), makes, groups: HashMap::new() }
    }

    /// Where ranks are, and what they exchange over; nothing if there aren't as many devices with paths to each other.
    pub(super) fn lay(&mut self, d: &Degrees) -> Option<Rc<Laid>> {
        let [tp, cp, cfg, sharing, pp, dp] = d.nested();
        // How far apart the ranks are that exchange experts' tokens.
        let apart = if d.ep > 1 { d.etp } else { 0 };
        let key = [tp, cp, cfg, sharing, pp, dp, apart];
        if let Some(laid) = self.laid.get(&key) {
            return laid.clone();
        }
        // Arrangements of the same groups follow each other.
        self.laid.retain(|known, _| known[..2] == [tp, cp]);
        let laid = self.lay_anew(d).map(Rc::new);
        self.laid.insert(key, laid.clone());
        laid
    }

    /// The kind of a group.
    fn kind(&mut self, group: &Group) -> usize {
        let mut made_of: Vec<u64> = group.workers.iter().map(|w| self.makes[*w] as u64).collect();
        for span in [&group.tp, &group.cp, &group.ep] {
            made_of.push(span.legs.len() as u64);
            for leg in &span.legs {
                let link = [leg.link.alpha_us.to_bits(), leg.link.bytes_per_us.to_bits()];
                made_of.extend([leg.ways as u64, link[0], link[1]]);
            }
        }
        let next = self.groups.len();
        *self.groups.entry(made_of).or_insert(next)
    }

    fn lay_anew(&mut self, d: &Degrees) -> Option<Laid> {
        let machine = self.machine;
        let workers = self.layouts.lay(machine, &d.nested())?;
        let mut active = vec![0; machine.interfaces.len()];
        workers.iter().for_each(|w| active[machine.workers[*w].host] += 1);
        let view = View { machine, active: &active, d };
        let ranks = d.ranks() / (d.dp / d.sharing_experts());
        let (mut replicas, which) = view.distinct(workers.chunks(ranks), |r| view.replica(r))?;
        for group in replicas.iter_mut().flat_map(|r| &mut r.stages).flat_map(|s| &mut s.groups) {
            group.kind = self.kind(group);
        }
        Some(Laid { workers, replicas, which })
    }
}

/// A machine while some devices use the network.
struct View<'a> {
    machine: &'a Machine,
    active: &'a [u32],
    d: &'a Degrees,
}

impl View<'_> {
    /// One of each kind of equally long lists of devices, and each list's kind.
    fn distinct<'r, T>(
        &self,
        lists: impl Iterator<Item = &'r [usize]>,
        mut make: impl FnMut(&'r [usize]) -> Option<T>,
    ) -> Option<(Vec<T>, Vec<usize>)> {
        let mut firsts: Vec<&[usize]> = Vec::new();
        let (mut made, mut which) = (Vec::new(), Vec::new());
        for list in lists {
            let known = firsts.iter().position(|first| self.machine.alike(first, list, self.active));
            if known.is_none() {
                firsts.push(list);
                made.push(make(list)?);
            }
            which.push(known.unwrap_or(firsts.len() - 1));
        }
        Some((made, which))
    }

    fn span(&self, group: &[usize]) -> Option<Span> {
        self.machine.span(group, self.active)
    }

    /// The slowest of `each` spans of `n` devices `each` apart, of so many that lie side by side.
    fn worst(&self, devices: &[usize], each: usize, n: usize) -> Option<Span> {
        if n == 1 {
            return Some(Span::default());
        }
        let mut worst: Option<Span> = None;
        for first in 0..each {
            let group: Vec<usize> = (0..n).map(|i| devices[first + i * each]).collect();
            let span = self.span(&group)?;
            if worst.as_ref().is_none_or(|w| span.us_of_mib() > w.us_of_mib()) {
                worst = Some(span);
            }
        }
        worst
    }

    fn replica(&self, ranks: &[usize]) -> Option<Replica> {
        let per_stage = ranks.len() / self.d.pp;
        let (stages, which) = self.distinct(ranks.chunks(per_stage), |s| self.stage(s))?;
        // Two neighbouring stages at a time.
        let pairs = (0..self.d.pp - 1).map(|s| &ranks[s * per_stage..(s + 2) * per_stage]);
        let (hops, hop_of) = self.distinct(pairs, |pair| self.worst(pair, per_stage, 2))?;
        let hops = hop_of.into_iter().map(|h| hops[h].clone()).collect();
        let branch = self.d.tp * self.d.cp;
        let cfg = self.worst(&ranks[..branch * self.d.cfg], branch, self.d.cfg)?;
        Some(Replica { stages, which, hops, cfg })
    }

    fn stage(&self, ranks: &[usize]) -> Option<StageGroups> {
        let Degrees { tp, cp, .. } = *self.d;
        // Experts are spread over groups of neighbours: those in the same place of each exchange.
        let spread = self.d.ep > 1;
        let shared = self.d.sharing_experts() > 1;
        let across = |ranks: &[usize]| self.worst(ranks, self.d.etp, ranks.len() / self.d.etp);
        let shared = if shared { Some(across(ranks)?) } else { None };
        // Each context-parallel group of tensor-parallel groups.
        let (blocks, which) = self.distinct(ranks.chunks(tp * cp), |block| {
            let context = self.worst(block, tp, cp)?;
            self.distinct(block.chunks(tp), |group| {
                let (workers, tp) = (group.to_vec(), self.span(group)?);
                let ep = match &shared {
                    Some(shared) => shared.clone(),
                    None if spread => across(group)?,
                    None => Span::default(),
                };
                Some(Group { kind: 0, workers, tp, cp: context.clone(), ep })
            })
        })?;
        let mut stage = StageGroups { groups: Vec::new(), which: Vec::new() };
        let starts: Vec<usize> = blocks
            .iter()
            .map(|(groups, _)| {
                stage.groups.extend_from_slice(groups);
                stage.groups.len() - groups.len()
            })
            .collect();
        for block in which {
            stage.which.extend(blocks[block].1.iter().map(|g| starts[block] + g));
        }
        Some(stage)
    }
}
