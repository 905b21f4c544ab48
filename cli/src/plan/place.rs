//! `tensorwire plan --fabric`: where a model, or a pipeline of models, goes on devices.

use std::path::{Path, PathBuf};

use tensorwire::topology::fabric::Fabric;
use tensorwire::topology::pipeline::{self, Pipeline};
use tensorwire::topology::place::{Goal, Placement, Request, Workload, place};
use tensorwire::topology::shard::Experts;
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
        let plan = pipeline::place(&pipeline, &load(fabric)?).map_err(Failure::usage)?;
        let text = if json { plan.to_json() } else { plan.summary() };
        print(format_args!("{}\n", text.trim_end()))
    }

    /// Where a model goes.
    pub(super) fn model(&self, spec: &ModelSpec) -> Result<Placement, Failure> {
        let Some(fabric) = &self.fabric else {
            return Err(Failure::usage("plan needs --tp N, or --fabric FILE to find the best on it"));
        };
        let request = Request { goal: self.goal, context: self.context, batch: self.batch, devices: None };
        place(&Workload::of(spec), &load(fabric)?, &request).map_err(Failure::usage)
    }

    /// A plan's picture: with a fabric, on the devices of the placement's first tensor-parallel group, or on its first
    /// ones.
    pub(super) fn picture(&self, plan: &Plan, placement: Option<&Placement>) -> Result<String, Failure> {
        let Some(fabric) = &self.fabric else { return Ok(plan.svg()) };
        let fabric = load(fabric)?;
        let devices: Vec<usize> = match placement {
            Some(placement) => placement.ranks.iter().take(plan.world).map(|r| r.device).collect(),
            None => fabric.workers().into_iter().take(plan.world).collect(),
        };
        plan.svg_on(&fabric, &devices).map_err(Failure::usage)
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

fn load(path: &Path) -> Result<Fabric, Failure> {
    let text = read(path)?;
    let fabric = if is_json(path) { Fabric::from_json(&text) } else { Fabric::from_toml(&text) };
    fabric.map_err(|e| Failure::usage(format!("{}: {e}", path.display())))
}

fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|e| Failure::usage(format!("can't read {}: {e}", path.display())))
}

fn is_json(path: &Path) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case("json"))
}
