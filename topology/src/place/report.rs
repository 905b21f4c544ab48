//! The search's answer as data: what was chosen, what was rejected, and why.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::arrange::{Arrangement, Arranger, Memory, Misfit, Task};
use super::degrees::{ContextBy, Degrees, tp_limit};
use super::pass::Goal;
use super::predict::Cause;
use super::search::{Found, Tried};
use crate::plan::json::lines;
use crate::plan::notes::{size, time};
use crate::plan::{Explanation, Plan, Span};

/// The schema that [`Placement::schema`] names.
pub const SCHEMA: &str = "tensorwire.placement/v1";

/// How many of the next best a placement lists, besides those that [`Placement::rejected`] always has.
const NEXT_BEST: usize = 8;

/// Where a model goes on a fabric, and what else was considered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Placement {
    /// Always [`SCHEMA`].
    pub schema: String,
    /// The model.
    pub model: String,
    /// The fabric.
    pub fabric: String,
    /// What was to be best.
    pub goal: Goal,
    /// Tokens in each sequence.
    pub context: usize,
    /// Sequences at a time.
    pub batch: usize,
    /// How many arrangements were tried.
    pub explored: usize,
    /// The best.
    pub chosen: Alternative,
    /// What the chosen one asks of each device, in rank order.
    pub ranks: Vec<RankPlace>,
    /// Others, the best first and then those that don't fit: each axis alone by powers of two, the best of each
    /// tensor-parallel degree, the next best of all, the fastest that lack memory, and the first tensor-parallel degree
    /// that there is too little for.
    pub rejected: Vec<Rejected>,
    /// What a person should know: what was assumed, what was left out, that one device is fastest.
    pub notes: Vec<String>,
}

impl Placement {
    /// The placement as JSON, schema [`SCHEMA`]. The same placement gives the same bytes.
    pub fn to_json(&self) -> String {
        lines(self) + "\n"
    }

    /// The plan of the chosen tensor-parallel degree as JSON, as [`Plan::to_json`] writes it, with the placement in the
    /// field `placement`, and its explanation in `explain`.
    pub fn to_json_with(&self, plan: &Plan, explain: Option<&Explanation>) -> String {
        #[derive(Serialize)]
        struct Placed<'a> {
            #[serde(flatten)]
            plan: &'a Plan,
            placement: &'a Placement,
            #[serde(skip_serializing_if = "Option::is_none")]
            explain: Option<&'a Explanation>,
        }
        lines(&Placed { plan, placement: self, explain }) + "\n"
    }
}

/// One way to arrange the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Alternative {
    /// The degrees in words, such as `tp 4 x cfg 2`.
    pub name: String,
    /// The degrees.
    pub degrees: Degrees,
    /// Devices that it uses.
    pub devices: usize,
    /// What it costs.
    pub predicted: Cost,
    /// The device that has least memory to spare, or lacks most.
    pub tightest: DeviceMemory,
}

/// What an arrangement costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// One step: a token of each sequence; of a model that makes none, a pass with all its branches.
    pub step_us: f64,
    /// All prompts; the same as a step of a model that makes no tokens.
    pub prefill_us: f64,
    /// Tokens of prompts a second, over all devices.
    pub prefill_tokens_per_s: f64,
    /// Bytes on the fullest device at any time.
    pub peak_bytes: u64,
    /// What the step's time goes into, the longest first.
    pub step: Vec<Portion>,
    /// Bytes that a rank sends in a step.
    pub wire_bytes_per_rank_step: u64,
}

/// A part of a step's time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Portion {
    /// `memory` and `compute` on the device, or the axis whose ranks exchange: `tp`, `cp`, `cfg`, `ep`, `pp`.
    pub of: String,
    /// Microseconds.
    pub us: f64,
    /// Bytes that a rank sends.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub wire_bytes: u64,
    /// The class of the farthest links that it crosses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub links: Option<String>,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// A device's memory against what it would hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceMemory {
    /// The rank on it.
    pub rank: usize,
    /// The device's name.
    pub device: String,
    /// Bytes that it would hold at the highest point.
    pub needs_bytes: u64,
    /// Bytes that it has; none if that isn't known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub has_bytes: Option<u64>,
    /// What they are.
    pub of: Memory,
}

/// A rank on a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankPlace {
    /// The rank.
    pub rank: usize,
    /// The device, as a place in the fabric.
    pub device: usize,
    /// Its name.
    pub name: String,
    /// Its place along each axis.
    pub tp: usize,
    /// See `tp`.
    pub cp: usize,
    /// See `tp`.
    pub cfg: usize,
    /// See `tp`.
    pub pp: usize,
    /// See `tp`.
    pub dp: usize,
    /// The blocks that it runs, in the model's order: the embedding, the layers, the output head.
    pub blocks: Span,
    /// Sequences at a time.
    pub sequences: usize,
    /// How fast it is, relative to the fastest of its tensor-parallel group: its shares follow this.
    pub speed: f64,
    /// Its memory.
    pub memory: Memory,
    /// Bytes at the highest point.
    pub peak_bytes: u64,
}

/// What was not chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rejected {
    /// It.
    #[serde(flatten)]
    pub alternative: Alternative,
    /// Why not.
    pub reason: Reason,
}

/// Why an arrangement was not chosen: the constraint that binds it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "binding")]
pub enum Reason {
    /// Its tightest device lacks memory.
    Memory {
        /// So many bytes.
        short_bytes: u64,
    },
    /// It takes longer.
    Slower {
        /// So many times as long as the chosen one.
        times: f64,
        /// What of it takes most longer than it does in the chosen one.
        because: String,
        /// By how many microseconds.
        by_us: f64,
    },
    /// Its fullest device has more bytes.
    Fuller {
        /// So many more.
        by_bytes: u64,
    },
    /// It is no better, and uses more devices or more axes.
    NoBetter,
    /// Alone it would be as fast or faster, but the other models leave too little memory for it.
    Crowded,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Alternative { name, predicted, tightest, .. } = &self.alternative;
        write!(
            f,
            "{name}: {} a step, {} on the fullest device; ",
            time(predicted.step_us),
            size(predicted.peak_bytes)
        )?;
        match &self.reason {
            Reason::Memory { short_bytes } => {
                let has = tightest.has_bytes.map_or("unknown memory".to_owned(), size);
                let needs = size(tightest.needs_bytes);
                write!(f, "{} has {has} and would need {needs}, {} more", tightest.device, size(*short_bytes))
            }
            Reason::Slower { times, because, by_us } => {
                write!(f, "{times:.2} times as long, most of it {because} ({} more)", time(*by_us))
            }
            Reason::Fuller { by_bytes } => write!(f, "{} more", size(*by_bytes)),
            Reason::NoBetter => f.write_str("no better, with more devices or axes"),
            Reason::Crowded => f.write_str("the other models leave too little memory for it"),
        }
    }
}

/// Everything a [`Placement`] says of one task.
pub(crate) struct Reporter<'a> {
    pub(crate) task: Task<'a>,
    pub(crate) arranger: Arranger<'a>,
}

impl Reporter<'_> {
    pub(crate) fn alternative(&self, a: &Arrangement) -> Alternative {
        let machine = self.task.machine;
        let worker = &machine.workers[a.workers[a.tightest]];
        let of = a.memory().nth(a.tightest).copied().unwrap_or_default();
        let has = worker.memory_bytes;
        let tightest = DeviceMemory {
            rank: a.tightest,
            device: worker.name.clone(),
            needs_bytes: of.peak(),
            has_bytes: (has < u64::MAX).then_some(has),
            of,
        };
        let name = a.degrees.to_string();
        Alternative { name, degrees: a.degrees, devices: a.workers.len(), predicted: self.cost(a), tightest }
    }

    fn cost(&self, a: &Arrangement) -> Cost {
        let mut step: Vec<Portion> = Vec::new();
        for cause in Cause::ALL {
            let (us, wire) = (a.step.us[cause as usize], a.step.wire[cause as usize]);
            if us > 0.0 || wire > 0.0 {
                let level = a.levels[cause as usize];
                step.push(Portion {
                    of: cause.name().to_owned(),
                    us: rounded(us),
                    wire_bytes: wire.round() as u64,
                    links: level.map(|l| self.task.machine.levels[l].class.clone()),
                });
            }
        }
        step.sort_by(|x, y| y.us.total_cmp(&x.us));
        let prefill = a.prefill.total_us();
        let tokens = self.task.batch as f64 * self.task.context as f64;
        Cost {
            step_us: rounded(a.step.total_us()),
            prefill_us: rounded(prefill),
            prefill_tokens_per_s: rounded(tokens / prefill * 1e6),
            peak_bytes: a.peak_bytes(),
            step,
            wire_bytes_per_rank_step: a.step.total_wire().round() as u64,
        }
    }

    pub(crate) fn ranks(&self, a: &Arrangement) -> Vec<RankPlace> {
        let d = &a.degrees;
        let [tp, cp, cfg, sharing, pp, _] = d.nested();
        let stages = a.replicas.iter().flat_map(|kind| {
            let (stages, sequences) = &a.kinds[*kind];
            stages.iter().map(move |stage| (stage, *sequences))
        });
        let ranks = stages.flat_map(|(stage, sequences)| {
            let groups = stage.which.iter().flat_map(|group| &stage.groups[*group]);
            groups.map(move |needs| (stage.blocks.clone(), sequences, needs))
        });
        let place = |(rank, (blocks, sequences, needs)): (
            usize,
            (std::ops::Range<usize>, usize, &super::arrange::RankNeeds),
        )| {
            let worker = &self.task.machine.workers[a.workers[rank]];
            let outer = rank / (tp * cp * cfg);
            RankPlace {
                rank,
                device: worker.device,
                name: worker.name.clone(),
                tp: rank % tp,
                cp: rank / tp % cp,
                cfg: rank / (tp * cp) % cfg,
                pp: outer / sharing % pp,
                dp: outer / (sharing * pp) * sharing + outer % sharing,
                blocks: Span::new(blocks.start, blocks.end),
                sequences,
                speed: rounded(needs.speed),
                memory: needs.memory,
                peak_bytes: needs.memory.peak(),
            }
        };
        ranks.enumerate().map(place).collect()
    }

    /// The arrangements that are listed besides the best.
    pub(crate) fn rejected(&mut self, found: &Found, best: &Arrangement) -> Vec<Rejected> {
        let tried = &found.tried;
        let mut listed = BTreeSet::new();
        let alone = |t: &Tried| t.degrees.axes() <= 1 && !t.degrees.sp && t.degrees.ranks().is_power_of_two();
        listed.extend(
            (0..tried.len())
                .filter(|i| alone(&tried[*i]) && (tried[*i].degrees.ep == 1 || tried[*i].degrees.tp > 1)),
        );
        let degrees: BTreeSet<usize> = tried.iter().map(|t| t.degrees.tp).collect();
        listed.extend(degrees.iter().filter_map(|tp| tried.iter().position(|t| t.degrees.tp == *tp)));
        // Orders of the same axes differ little: one of each set of axes is enough to see what else was near.
        let fits = tried.iter().filter(|t| t.lacks == 0).count();
        listed.extend(1..fits.min(1 + NEXT_BEST));
        let mut faster: Vec<usize> = (fits..tried.len()).filter(|i| tried[*i].cost < tried[0].cost).collect();
        faster.sort_by(|a, b| tried[*a].cost.total_cmp(&tried[*b].cost).then(a.cmp(b)));
        listed.extend(faster.into_iter().take(NEXT_BEST / 2));
        listed.retain(|i| tried[*i].degrees != best.degrees);
        let mut rejected = Vec::new();
        for i in listed {
            if let Ok(a) = self.arranger.arrange(&tried[i].degrees) {
                rejected.push(Rejected { alternative: self.alternative(&a), reason: self.reason(&a, best) });
            }
        }
        rejected
    }

    fn reason(&self, a: &Arrangement, best: &Arrangement) -> Reason {
        let Task { goal, machine, .. } = self.task;
        let short_bytes = a.lacks(machine);
        if short_bytes > 0 {
            return Reason::Memory { short_bytes };
        }
        let (cost, least) = (a.cost(goal), best.cost(goal));
        if cost <= least {
            return Reason::NoBetter;
        }
        let (mine, its) = match goal {
            Goal::Memory => return Reason::Fuller { by_bytes: a.peak_bytes() - best.peak_bytes() },
            Goal::Prefill => (&a.prefill, &best.prefill),
            Goal::Decode | Goal::Request { .. } => (&a.step, &best.step),
        };
        let more = |cause: &Cause| mine.us[*cause as usize] - its.us[*cause as usize];
        let most = Cause::ALL.into_iter().max_by(|x, y| more(x).total_cmp(&more(y))).unwrap_or(Cause::Memory);
        let level = a.levels[most as usize].map(|l| machine.levels[l].class.as_str());
        let because = match (most.axis(), level) {
            (Some(axis), Some(class)) => format!("{axis} exchanges over {class} links"),
            _ => most.in_words().to_owned(),
        };
        Reason::Slower { times: rounded(cost / least), because, by_us: rounded(more(&most)) }
    }

    /// What is said besides.
    pub(crate) fn notes(&self, found: &Found, best: &Arrangement, assumed: Vec<String>) -> Vec<String> {
        let Task { workload, machine, goal, .. } = self.task;
        let mut notes = Vec::new();
        let used = best.workers.len();
        let next = found.tried.iter().find(|t| t.lacks == 0 && t.degrees.ranks() > 1);
        if let (1, Some(next)) = (used, next) {
            let (than, what) = (in_goal(goal, next.cost), in_goal(goal, best.cost(goal)));
            notes.push(format!(
                "one device is best: {what}, where the best of several, {}, has {than}",
                next.degrees
            ));
        }
        if used < machine.workers.len() {
            let idle = machine.workers.len() - used;
            notes.push(format!(
                "{idle} of {} devices are left idle: no arrangement with them is better",
                machine.workers.len()
            ));
        }
        if let Some((what, most)) = tp_limit(workload).filter(|(_, most)| *most < machine.workers.len()) {
            notes.push(format!("at most {most} tensor-parallel ranks: there are no more {what} than that"));
        }
        if best.degrees.cp > 1 && best.degrees.cp_by == ContextBy::Ring {
            notes.push("the ring's exchanges are taken to go on behind attention".to_owned());
        }
        if best
            .kinds
            .iter()
            .any(|(stages, _)| stages.iter().any(|s| s.groups.iter().flatten().any(|r| r.speed < 1.0)))
        {
            notes.push("shares follow the devices' speed".to_owned());
        }
        notes.extend(assumed);
        notes.push(
            "times are floors: devices at their rated speed, links at alpha + bytes/bandwidth".to_owned(),
        );
        notes
    }

    /// What would be needed at least, if nothing fits.
    pub(crate) fn nothing_fits(&mut self, found: &Found) -> String {
        let machine = self.task.machine;
        let nearest = found.tried.first().and_then(|t| self.arranger.arrange(&t.degrees).ok());
        let Some(nearest) = nearest else {
            return format!(
                "no arrangement of {} uses {} devices",
                self.task.workload.name,
                machine.workers.len()
            );
        };
        let Alternative { name, devices, tightest, .. } = self.alternative(&nearest);
        let Memory { weights, kv_cache, activations, buffers, loading } = tightest.of;
        format!(
            "{} doesn't fit on {} devices, whichever way it is divided. Nearest is {name} on {devices}: {} has {} and \
             needs {}, {} more (weights {}, KV cache {}, activations {}, buffers {}; {} while loading). Use a smaller \
             context or batch, more devices, or devices with more memory",
            self.task.workload.name,
            machine.workers.len(),
            tightest.device,
            size(tightest.has_bytes.unwrap_or(u64::MAX)),
            size(tightest.needs_bytes),
            size(tightest.needs_bytes.saturating_sub(tightest.has_bytes.unwrap_or(u64::MAX))),
            size(weights),
            size(kv_cache),
            size(activations),
            size(buffers),
            size(loading),
        )
    }

    /// Why degrees are no arrangement.
    pub(crate) fn misfit(&self, degrees: &Degrees, why: &Misfit) -> String {
        match why {
            Misfit::Devices => {
                format!("{degrees} needs {} devices with a path between them", degrees.ranks())
            }
            Misfit::TooFine(what) => format!("{degrees} leaves a rank without {what}"),
        }
    }
}

fn in_goal(goal: Goal, cost: f64) -> String {
    match goal {
        Goal::Memory => size(cost as u64),
        Goal::Decode => format!("{} a step", time(cost)),
        Goal::Prefill => format!("{} for all prompts", time(cost)),
        Goal::Request { .. } => format!("{} a request", time(cost)),
    }
}

/// To whole nanoseconds, or thousandths.
pub(crate) fn rounded(x: f64) -> f64 {
    (x * 1000.0).round() / 1000.0 + 0.0
}
