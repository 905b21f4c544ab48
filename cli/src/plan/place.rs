//! `tensorwire plan --fabric`: where a model, or a pipeline of models, goes on devices.

use std::path::{Path, PathBuf};

use tensorwire::topology::cost::CostModel;
use tensorwire::topology::discover::Machine;
use tensorwire::topology::fabric::{Fabric, Kind};
use tensorwire::topology::pipeline::{self, Pipeline};
use tensorwire::topology::place::{Goal, Placement, Request, Workload, place};
use tensorwire::topology::shard::Experts;
use tensorwire::topology::table::{Profile, Table};
use tensorwire::topology::{ModelSpec, Plan, Planner};

use crate::failure::{Failure, print};

/// Where a model goes, if the number of ranks isn't given.
#[derive(clap::Args)]
pub(super) struct Where {
    /// The machines: a TOML or JSON file, schema tensorwire.fabric/v1. Without --tp, all ways to divide the model over
    /// its devices are compared
    #[arg(long, value_name = "FILE")]
    fabric: Option<PathBuf>,

    /// Instead of a model, a pipeline of models: a TOML or JSON file, schema tensorwire.pipeline/v1
    #[arg(long, value_name = "FILE", requires = "fabric", conflicts_with_all = ["model", "tp", "explain", "svg", "html"])]
    pipeline: Option<PathBuf>,

    /// What is to be best: the time of a step, of all prompts, or the bytes on the fullest device
    #[arg(long = "for", value_name = "GOAL", default_value = "decode", value_parser = goal)]
    goal: Goal,

    /// Tokens in each sequence, which the cache has to hold
    #[arg(long, value_name = "N", default_value_t = 2048)]
    context: usize,

    /// Sequences at a time
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: usize,
}

fn goal(name: &str) -> Result<Goal, String> {
    match name {
        "decode" => Ok(Goal::Decode),
        "prefill" => Ok(Goal::Prefill),
        "memory" => Ok(Goal::Memory),
        _ => Err("decode, prefill or memory".to_owned()),
    }
}

impl Where {
    /// Prints where a pipeline's models go.
    pub(super) fn pipeline(&self, json: bool) -> Result<(), Failure> {
        let (Some(fabric), Some(path)) = (&self.fabric, &self.pipeline) else {
            return Err(Failure::usage("a pipeline needs --fabric FILE"));
        };
        let text = read(path)?;
        let parsed = if is_json(path) { Pipeline::from_json(&text) } else { Pipeline::from_toml(&text) };
        let pipeline = parsed.map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
        let plan = pipeline::place(&pipeline, &Known::load(fabric)?.fabric).map_err(Failure::usage)?;
        let text = if json { plan.to_json() } else { plan.summary() };
        print(format_args!("{}\n", text.trim_end()))
    }

    /// Where a model goes.
    pub(super) fn model(&self, spec: &ModelSpec) -> Result<Placement, Failure> {
        let Some(fabric) = &self.fabric else {
            return Err(Failure::usage("plan needs --tp N, or --fabric FILE to find the best on it"));
        };
        let request = Request { goal: self.goal, context: self.context, batch: self.batch, devices: None };
        let Known { fabric, measured } = Known::load(fabric)?;
        let mut placement = place(&Workload::of(spec), &fabric, &request).map_err(Failure::usage)?;
        if measured.is_some() {
            placement
                .notes
                .push("the fabric is this machine: its memory's bandwidth was measured".to_owned());
        }
        Ok(placement)
    }

    /// What a plan over `tp` ranks is predicted by: with a fabric its links and devices, as the placement; where that is
    /// this machine, what was measured of it comes first.
    pub(super) fn costs(
        &self,
        spec: &ModelSpec,
        placement: Option<&Placement>,
        tp: usize,
    ) -> Result<CostModel, Failure> {
        let Some(path) = &self.fabric else { return Ok(CostModel::default()) };
        let Known { fabric, measured } = Known::load(path)?;
        let ranks = devices(&fabric, placement, tp);
        let costs = CostModel::on_fabric(&fabric, &ranks, tp, Workload::of(spec).bits);
        Ok(match measured.filter(|_| ranks.iter().all(|device| fabric.model(*device).kind == Kind::Cpu)) {
            Some(profile) => costs.with_measured(&profile, "shm"),
            None => costs,
        })
    }

    /// A plan's picture: with a fabric, on the devices of the placement's first tensor-parallel group, or on its first
    /// ones.
    pub(super) fn picture(&self, plan: &Plan, placement: Option<&Placement>) -> Result<String, Failure> {
        let Some(fabric) = &self.fabric else { return Ok(plan.svg()) };
        let fabric = Known::load(fabric)?.fabric;
        let devices = devices(&fabric, placement, plan.world);
        plan.svg_on(&fabric, &devices[..plan.world.min(devices.len())]).map_err(Failure::usage)
    }
}

/// What plans a placement's tensor-parallel groups, and how many ranks these have; nothing where several groups share
/// the experts, as a plan is of one.
pub(super) fn planner<'a>(spec: &'a ModelSpec, placement: &Placement) -> Option<(Planner<'a>, usize)> {
    let degrees = placement.chosen.degrees;
    let groups = if degrees.ep > 1 { degrees.expert_groups() } else { 1 };
    let experts = Experts::in_groups(groups, degrees.tp);
    let planner = Planner::new(spec).experts(experts).sequence_parallel(degrees.sp);
    (degrees.sharing_experts() == 1).then_some((planner, degrees.tp))
}

/// The devices of a placement's ranks, in order; without one, as many as there are to be ranks.
fn devices(fabric: &Fabric, placement: Option<&Placement>, tp: usize) -> Vec<usize> {
    match placement {
        Some(placement) => placement.ranks.iter().map(|rank| rank.device).collect(),
        None => fabric.workers().into_iter().take(tp).collect(),
    }
}

/// A fabric, and what was measured last where it is this machine.
struct Known {
    fabric: Fabric,
    measured: Option<Profile>,
}

impl Known {
    fn load(path: &Path) -> Result<Known, Failure> {
        let text = read(path)?;
        let fabric = if is_json(path) { Fabric::from_json(&text) } else { Fabric::from_toml(&text) };
        let fabric = fabric.map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
        let table = Table::in_force().ok();
        let profile = table.as_ref().and_then(|table| table.profile(None));
        let here = || Fabric::of_machine("this machine", &Machine::read(Path::new("/"))).ok();
        Ok(match profile.filter(|_| here().is_some_and(|here| is_same(&fabric, &here))) {
            Some(profile) => Known { fabric: with_memory(fabric, profile), measured: Some(profile.clone()) },
            None => Known { fabric, measured: None },
        })
    }
}

/// Whether two fabrics are one host with the same devices in the same places; names of devices and figures don't count,
/// since people may change them.
fn is_same(a: &Fabric, b: &Fabric) -> bool {
    let device = |fabric: &Fabric, at: usize| {
        let (device, model) = (fabric.devices()[at].clone(), fabric.model(at));
        let place = (device.socket, device.numa, device.bus, device.processors);
        (model.name.clone(), model.kind, model.ranks, place)
    };
    let one_host = a.hosts().len() == 1 && b.hosts().len() == 1;
    let count = a.devices().len();
    one_host && count == b.devices().len() && (0..count).all(|at| device(a, at) == device(b, at))
}

/// The same fabric whose processors read memory as fast as was measured, where nobody says how fast.
fn with_memory(fabric: Fabric, profile: &Profile) -> Fabric {
    let mut parts = fabric.parts().clone();
    for model in parts.models.iter_mut().filter(|m| m.kind == Kind::Cpu && m.memory_gbps.is_none()) {
        let each = profile.memory(model.ranks as usize);
        model.memory_gbps = each.map(|reading| reading.gbps * f64::from(model.ranks));
    }
    Fabric::new(parts).unwrap_or(fabric)
}

fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|e| Failure::usage(format!("can't read {}: {e}", path.display())))
}

fn is_json(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("json"))
}
