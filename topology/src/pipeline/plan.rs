//! Where a pipeline's models go, as data.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::fabric::Fabric;
use crate::place::arrange::Arranger;
use crate::place::search::search;
use crate::place::{Alternative, Machine, RankPlace, Reason, Rejected, Reporter, Workload, rounded};
use crate::plan::json::lines;
use crate::plan::notes::{size, time};
use crate::{Error, Result};

use super::describe::{Model, Pipeline};
use super::options::{Choice, Unit, choices, classes};
use super::solve::{MAX_BRANCHES, solve};

/// The schema that [`PipelinePlan::schema`] names.
pub const PLAN_SCHEMA: &str = "tensorwire.pipeline-plan/v1";

/// Where a pipeline's models go, and what one request takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PipelinePlan {
    /// Always [`PLAN_SCHEMA`].
    pub schema: String,
    /// The pipeline.
    pub pipeline: String,
    /// The fabric.
    pub fabric: String,
    /// What one request takes, from the first stage's start to the last one's end.
    pub request_us: f64,
    /// The stages, in the order in which they run.
    pub stages: Vec<StagePlan>,
    /// The models, in the order of their first stages.
    pub models: Vec<ModelPlan>,
    /// What stages hand on.
    pub transfers: Vec<Transfer>,
    /// The devices that have a model.
    pub devices: Vec<DeviceUse>,
    /// Arrangements of single models that were tried, and combinations of them.
    pub explored: [usize; 2],
    /// What a person should know.
    pub notes: Vec<String>,
}

/// When a stage runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StagePlan {
    /// Its name.
    pub name: String,
    /// Its model; none for work on a processor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Calls, one after the other.
    pub calls: usize,
    /// When it starts, from the request's start.
    pub start_us: f64,
    /// What all its calls take.
    pub us: f64,
}

/// Where a model goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelPlan {
    /// Its name.
    pub name: String,
    /// Where its figures are from.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// Bytes of all its weights, once.
    pub weight_bytes: u64,
    /// What one call takes.
    pub call_us: f64,
    /// How it is divided. A step is one pass of a model that makes no tokens, with all its branches.
    pub chosen: Alternative,
    /// Its ranks.
    pub ranks: Vec<RankPlace>,
    /// Other ways, as if it had the whole fabric for itself.
    pub rejected: Vec<Rejected>,
}

/// What a stage hands on to another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Transfer {
    /// The stage.
    pub from: String,
    /// The one after it.
    pub to: String,
    /// Bytes.
    pub bytes: u64,
    /// What it takes.
    pub us: f64,
    /// The class of the link; none within a device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub links: Option<String>,
}

/// What a device holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceUse {
    /// The device, as a place in the fabric.
    pub device: usize,
    /// Its name.
    pub name: String,
    /// The models that it holds a part of.
    pub models: Vec<String>,
    /// Bytes of their weights, which stay.
    pub weight_bytes: u64,
    /// Bytes at the highest point: a device runs or loads one model at a time, so the most that any needs beside its
    /// weights is there once.
    pub peak_bytes: u64,
    /// Bytes that it has; none if that isn't known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub has_bytes: Option<u64>,
}

impl PipelinePlan {
    /// The plan as JSON, schema [`PLAN_SCHEMA`]. The same plan gives the same bytes.
    pub fn to_json(&self) -> String {
        lines(self) + "\n"
    }
}

/// Places a pipeline's models on a fabric's devices.
///
/// # Errors
/// [`Error::Pipeline`] for a description that can't be; [`Error::NoPlacement`] if a model fits on no group of devices, or
/// the models don't fit together, with the numbers.
pub fn place(pipeline: &Pipeline, fabric: &Fabric) -> Result<PipelinePlan> {
    let order = pipeline.order()?;
    let units = units(pipeline, &order)?;
    let classes = classes(fabric);
    let has: Vec<u64> =
        (0..fabric.devices().len()).map(|d| fabric.model(d).memory_bytes.unwrap_or(u64::MAX)).collect();
    let mut options: Vec<Vec<Choice>> = Vec::new();
    let mut tried = 0;
    for unit in &units {
        let (of_unit, explored) = choices(unit, &classes, fabric);
        if of_unit.is_empty() {
            return Err(fits_nowhere(unit, fabric));
        }
        tried += explored;
        options.push(of_unit);
    }
    let Some(solution) = solve(&options, &classes, &has) else {
        return Err(Error::NoPlacement(dont_fit_together(pipeline, fabric, &units, &options, &has)));
    };

    let placed: Vec<(&Choice, &[usize])> = solution
        .seats
        .iter()
        .zip(&options)
        .map(|((c, g), of_unit)| (&of_unit[*c], classes[of_unit[*c].class].groups[*g].as_slice()))
        .collect();
    let mut models = Vec::new();
    for (unit, (choice, group)) in units.iter().zip(&placed) {
        models.push(model(pipeline, unit, choice, group, fabric)?);
    }
    let (stages, transfers) = schedule(pipeline, &order, &units, &models, &placed, fabric);
    let request_us = stages.iter().map(|s| s.start_us + s.us).fold(0.0, f64::max);
    Ok(PipelinePlan {
        schema: PLAN_SCHEMA.to_owned(),
        pipeline: pipeline.name.clone(),
        fabric: fabric.name().to_owned(),
        request_us: rounded(request_us),
        stages,
        devices: devices(&models, &placed, fabric),
        notes: notes(pipeline, &units, &models, solution.branches, fabric),
        models,
        transfers,
        explored: [tried, solution.branches],
    })
}

/// The models in the order of their first stages, each with all stages that call it.
fn units(pipeline: &Pipeline, order: &[usize]) -> Result<Vec<Unit>> {
    let mut units: Vec<Unit> = Vec::new();
    let mut known: BTreeMap<&str, usize> = BTreeMap::new();
    for &s in order {
        let stage = &pipeline.stages[s];
        let (Some(workload), Some(model)) = (pipeline.workload(stage)?, stage.model.as_deref()) else {
            continue;
        };
        match known.get(model) {
            Some(unit) => units[*unit].add(s, stage),
            None => {
                known.insert(model, units.len());
                units.push(Unit::new(s, stage, workload));
            }
        }
    }
    Ok(units)
}

fn fits_nowhere(unit: &Unit, fabric: &Fabric) -> Error {
    let (machine, _) = Machine::of(fabric, &fabric.workers(), unit.workload.bits);
    let task = unit.task(&machine);
    let mut reporter = Reporter { task, arranger: Arranger::new(task) };
    Error::NoPlacement(reporter.nothing_fits(&search(task)))
}

fn dont_fit_together(
    pipeline: &Pipeline,
    fabric: &Fabric,
    units: &[Unit],
    options: &[Vec<Choice>],
    has: &[u64],
) -> String {
    let workers = fabric.workers();
    let weights: Vec<String> =
        units.iter().map(|u| format!("{} {}", u.workload.name, size(u.workload.weight_bytes()))).collect();
    let all: u64 = units.iter().map(|u| u.workload.weight_bytes()).sum();
    let there = workers.iter().map(|d| has[*d]).fold(0, u64::saturating_add);
    let smallest = |choices: &Vec<Choice>| choices.iter().map(Choice::peak).min().unwrap_or(0);
    let largest = options.iter().map(smallest).max().unwrap_or(0);
    format!(
        "the models of {} don't fit together on {} devices of {} with {} in all: their weights are {} ({}), each is \
         held once at least, and one of them needs {} on a device at the least. Use more devices, or devices with more \
         memory",
        pipeline.name,
        workers.len(),
        fabric.name(),
        size(there),
        size(all),
        weights.join(", "),
        size(largest),
    )
}

/// A model as it was placed.
fn model(
    pipeline: &Pipeline,
    unit: &Unit,
    choice: &Choice,
    group: &[usize],
    fabric: &Fabric,
) -> Result<ModelPlan> {
    let (machine, _) = Machine::of(fabric, group, unit.workload.bits);
    let task = unit.task(&machine);
    let mut reporter = Reporter { task, arranger: Arranger::new(task) };
    let arranged = reporter.arranger.arrange(&choice.degrees);
    let best = arranged.map_err(|why| Error::NoPlacement(reporter.misfit(&choice.degrees, &why)))?;
    let (chosen, ranks) = (reporter.alternative(&best), reporter.ranks(&best));

    // What else there is, with all devices for itself.
    let (everything, _) = Machine::of(fabric, &fabric.workers(), unit.workload.bits);
    let task = unit.task(&everything);
    let mut reporter = Reporter { task, arranger: Arranger::new(task) };
    let mut rejected = reporter.rejected(&search(task), &best);
    for one in &mut rejected {
        if one.reason == Reason::NoBetter {
            one.reason = Reason::Crowded;
        }
    }
    let name = unit.workload.name.clone();
    Ok(ModelPlan {
        source: pipeline.models.get(&name).map(|m| m.source.clone()).unwrap_or_default(),
        name,
        weight_bytes: unit.workload.weight_bytes(),
        call_us: rounded(best.cost(unit.goal)),
        chosen,
        ranks,
        rejected,
    })
}

/// Each stage as soon as those it needs are done and its devices are free.
fn schedule(
    pipeline: &Pipeline,
    order: &[usize],
    units: &[Unit],
    models: &[ModelPlan],
    placed: &[(&Choice, &[usize])],
    fabric: &Fabric,
) -> (Vec<StagePlan>, Vec<Transfer>) {
    let unit_of = |s: usize| units.iter().position(|u| u.stages.contains(&s));
    let by_name: BTreeMap<&str, usize> =
        pipeline.stages.iter().enumerate().map(|(i, s)| (s.name.as_str(), i)).collect();
    let mut free = vec![0.0f64; fabric.devices().len()];
    let mut end = vec![0.0f64; pipeline.stages.len()];
    let (mut stages, mut transfers) = (Vec::new(), Vec::new());
    for &s in order {
        let stage = &pipeline.stages[s];
        let unit = unit_of(s);
        let group = unit.map_or(&[][..], |u| placed[u].1);
        let mut start = group.iter().map(|d| free[*d]).fold(0.0, f64::max);
        for before in &stage.after {
            let from = by_name[before.as_str()];
            let bytes = pipeline.stages[from].sends_bytes;
            let ends = (unit_of(from).and_then(|u| placed[u].1.first()), group.first());
            let hop = match ends {
                (Some(a), Some(b)) if a != b => Some(fabric.between(*a, *b)),
                _ => None,
            };
            let us = hop.filter(|_| bytes > 0).map_or(0.0, |hop| hop.us(bytes));
            start = start.max(end[from] + us);
            if bytes > 0 {
                transfers.push(Transfer {
                    from: before.clone(),
                    to: stage.name.clone(),
                    bytes,
                    us: rounded(us),
                    links: hop.map(|h| h.class.name().to_owned()),
                });
            }
        }
        let us = unit.map_or(0.0, |u| models[u].call_us * stage.calls as f64);
        end[s] = start + us;
        group.iter().for_each(|d| free[*d] = end[s]);
        stages.push(StagePlan {
            name: stage.name.clone(),
            model: stage.model.clone(),
            calls: stage.calls,
            start_us: rounded(start),
            us: rounded(us),
        });
    }
    (stages, transfers)
}

fn devices(models: &[ModelPlan], placed: &[(&Choice, &[usize])], fabric: &Fabric) -> Vec<DeviceUse> {
    let mut used: BTreeMap<usize, DeviceUse> = BTreeMap::new();
    let mut beside: BTreeMap<usize, u64> = BTreeMap::new();
    for (model, (choice, group)) in models.iter().zip(placed) {
        for (device, [weights, more]) in group.iter().zip(&choice.needs) {
            let entry = used.entry(*device).or_insert_with(|| DeviceUse {
                device: *device,
                name: fabric.devices()[*device].name.clone(),
                models: Vec::new(),
                weight_bytes: 0,
                peak_bytes: 0,
                has_bytes: fabric.model(*device).memory_bytes,
            });
            entry.models.push(model.name.clone());
            entry.weight_bytes += weights;
            let most = beside.entry(*device).or_default();
            *most = (*most).max(*more);
        }
    }
    for (device, entry) in &mut used {
        entry.peak_bytes = entry.weight_bytes + beside[device];
    }
    used.into_values().collect()
}

/// Over how many of all devices a model that could be divided by height would be fastest, and what a call would take.
fn by_height(unit: &Unit, workload: Workload, fabric: &Fabric) -> Option<(usize, f64)> {
    let (machine, _) = Machine::of(fabric, &fabric.workers(), workload.bits);
    let divided = Unit { stages: Vec::new(), workload, ..*unit };
    let best = search(divided.task(&machine)).best?;
    Some((best.degrees.tp, best.cost(unit.goal))).filter(|(ways, _)| *ways > 1)
}

fn notes(
    pipeline: &Pipeline,
    units: &[Unit],
    models: &[ModelPlan],
    branches: usize,
    fabric: &Fabric,
) -> Vec<String> {
    let mut notes = Vec::new();
    for (unit, model) in units.iter().zip(models) {
        let described = pipeline.models.get(&model.name);
        if let Some(why) = described.and_then(|m| m.whole_because.as_ref()) {
            let n = model.ranks.len();
            let instead = described.and_then(Model::by_height).and_then(|w| by_height(unit, w, fabric));
            let instead = instead.map_or(String::new(), |(ways, us)| {
                let (us, whole) = (time(us), time(model.call_us));
                format!("; by height over {ways} devices a call is predicted to take {us} instead of {whole}")
            });
            notes.push(format!(
                "{} is whole on {n} {}: {why}{instead}",
                model.name,
                if n == 1 { "device" } else { "devices" }
            ));
        }
        let ways = model.chosen.degrees.tp;
        if let Some(height) = described.and_then(|m| m.height).filter(|_| ways > 1) {
            notes.push(format!(
                "{} is divided by height over {ways} devices, with whole weights on each: {} of halos from a neighbour in \
                 {} exchanges, {} sums of statistics and {} gathered, for each item",
                model.name,
                size(height.halo_bytes),
                height.exchanges,
                height.sums,
                size(height.gather_bytes)
            ));
        }
        if unit.stages.len() > 1 {
            let names: Vec<&str> = unit.stages.iter().map(|s| pipeline.stages[*s].name.as_str()).collect();
            notes.push(format!("{} is loaded once for {}", model.name, names.join(" and ")));
        }
    }
    let longest = units.iter().zip(models).max_by(|a, b| {
        let us = |(u, m): &(&Unit, &ModelPlan)| u.calls as f64 * m.call_us;
        us(a).total_cmp(&us(b))
    });
    if let Some((unit, model)) = longest {
        let us = unit.calls as f64 * model.call_us;
        notes.push(format!("most of a request's time is {}: {}", model.name, time(us)));
    }
    if branches > MAX_BRANCHES {
        notes.push(format!("the search ended after {MAX_BRANCHES} combinations: there may be a faster one"));
    }
    let bits: std::collections::BTreeSet<u32> = units.iter().map(|u| u.workload.bits).collect();
    let assumed = bits.into_iter().flat_map(|b| Machine::of(fabric, &fabric.workers(), b).1);
    notes.extend(assumed.collect::<std::collections::BTreeSet<String>>());
    notes.push("times are floors: devices at their rated speed, links at alpha + bytes/bandwidth".to_owned());
    notes
}
