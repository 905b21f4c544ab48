//! Proof in numbers that a sharded model computes what the whole one does.
//!
//! Each family's forward is written once, over a group of ranks in lock step. Computed by one rank with whole
//! tensors it is the reference; computed by a plan's ranks, each with exactly the slices that the plan names
//! and with exactly the exchanges that it names, in its order, it must give the same numbers on every rank.
//! All is in f64, where the order of a sum is worth about 1e-15, so that a rule that is wrong anywhere shows:
//! `mutations` makes each wrong on purpose.

mod attention;
mod conv;
mod decoders;
mod diffusion;
mod encoders;
mod group;
mod moe;
mod mutations;
mod quant;
mod tensor;
mod toys;
mod weights;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use group::{Config, Fault, Group};
use tensor::Tensor;
use tensorwire_topology::shard::Experts;
use tensorwire_topology::{ModelSpec, Plan, Planner};
use toys::{TOYS, Toy};

/// Relative to the largest number of the result.
const TOLERANCE: f64 = 1e-11;

/// A toy and what it computes as one rank.
struct Whole {
    toy: &'static Toy,
    config: Config,
    spec: ModelSpec,
    tensors: BTreeMap<String, Tensor>,
    result: Tensor,
}

impl Whole {
    fn of(toy: &'static Toy) -> Whole {
        // Shown where a test fails.
        println!("{}", toy.name);
        let config = Config::parse(toy.config);
        let spec = ModelSpec::from_config(toy.config).unwrap_or_else(|e| panic!("{}: {e}", toy.name));
        let tensors = spec.tensors.iter().map(|t| (t.name.clone(), weights::seeded(&config, t))).collect();
        let group = Group::whole(&config, &tensors);
        let result = (toy.forward)(&group).0.remove(0);
        group.finish();
        assert!(result.data.iter().all(|x| x.is_finite()), "{}", toy.name);
        Whole { toy, config, spec, tensors, result }
    }

    /// How far what a plan's ranks compute is from what one rank does, relative to its largest number.
    fn difference(&self, plan: &Plan, fault: Option<Fault>) -> f64 {
        let mut group = Group::sharded(&self.config, &self.tensors, plan);
        group.fault = fault;
        let found = (self.toy.forward)(&group);
        group.finish();
        let largest = self.result.data.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        let mut apart: f64 = 0.0;
        for rank in &found.0 {
            assert_eq!(rank.shape, self.result.shape);
            for (a, b) in rank.data.iter().zip(&self.result.data) {
                // What isn't a number is as far from right as can be.
                apart = if a.is_nan() { f64::INFINITY } else { apart.max((a - b).abs()) };
            }
        }
        apart / largest
    }

    /// Every plan there is for a number of ranks, with what is chosen.
    fn plans(&self, world: usize) -> Vec<(String, Plan)> {
        let has_experts = self.spec.layers.iter().flat_map(|l| &l.blocks).any(|b| b.experts.is_some());
        // All columns, all experts, and every mixture.
        let groups = (1..=world).filter(|groups| world.is_multiple_of(*groups));
        let choices: Vec<Experts> = match has_experts {
            true => groups.map(|groups| Experts::in_groups(groups, world)).collect(),
            false => vec![Experts::Auto],
        };
        let all = choices.iter().flat_map(|&experts| [false, true].map(|sequence| (experts, sequence)));
        all.filter_map(|(experts, sequence)| {
            let planner = Planner::new(&self.spec).experts(experts).sequence_parallel(sequence);
            let name = format!("{} over {world}, experts {experts:?}, sequence {sequence}", self.toy.name);
            // More ranks than experts, or than groups of an expert's columns.
            let plan = planner.plan(world).ok()?;
            plan.check(&self.spec).unwrap_or_else(|e| panic!("{name}: {e}"));
            Some((name, plan))
        })
        .collect()
    }
}

#[test]
fn sharded_equals_whole() {
    for toy in TOYS {
        let whole = Whole::of(toy);
        for &world in toy.worlds {
            let plans = whole.plans(world);
            assert!(!plans.is_empty(), "{} can't be split over {world}", toy.name);
            for (name, plan) in plans {
                println!("{name}");
                let apart = whole.difference(&plan, None);
                assert!(apart < TOLERANCE, "{name}: apart by {apart:.1e}");
            }
        }
    }
}

#[test]
fn one_rank_is_the_whole() {
    for toy in TOYS {
        let whole = Whole::of(toy);
        let plan = Planner::new(&whole.spec).plan(1).unwrap();
        assert_eq!(whole.difference(&plan, None), 0.0, "{}", toy.name);
    }
}

/// Writes each toy and what the executor makes of it into the directory that PROOF_TOYS names, for
/// reference.py to compute with other programs.
#[test]
#[ignore = "writes files for reference.py"]
fn toys_for_reference() {
    let root = std::env::var("PROOF_TOYS").expect("PROOF_TOYS names a directory");
    for toy in TOYS {
        let whole = Whole::of(toy);
        let dir = Path::new(&root).join(toy.name.replace(' ', "_"));
        fs::create_dir_all(&dir).unwrap();
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for spec in &whole.spec.tensors {
            let (stored, start) = (spec.stored.name(), data.len());
            let values = &whole.tensors[&spec.name].data;
            let kind = match stored {
                "I32" | "U8" | "F8_E4M3" => stored,
                _ => "F64",
            };
            data.extend(values.iter().flat_map(|&v| match kind {
                "I32" => (v as u32).to_le_bytes().to_vec(),
                "F64" => v.to_le_bytes().to_vec(),
                _ => vec![v as u8],
            }));
            let entry =
                serde_json::json!({"dtype": kind, "shape": spec.shape, "data_offsets": [start, data.len()]});
            header.insert(spec.name.clone(), entry);
        }
        let header = serde_json::to_vec(&header).unwrap();
        let file = [&(header.len() as u64).to_le_bytes(), &header[..], &data[..]].concat();
        fs::write(dir.join("model.safetensors"), file).unwrap();
        fs::write(dir.join("config.json"), toy.config).unwrap();
        fs::write(dir.join("output.json"), serde_json::to_vec(&whole.result.data).unwrap()).unwrap();
    }
}
