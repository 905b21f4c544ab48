//! Proof in numbers that a sharded model computes what the whole one does.
//!
//! Each family's forward is written once, over a group of ranks in lock step. Computed by one rank with whole
//! tensors it is the reference; computed by a plan's ranks, each with exactly the slices that the plan names
//! and with exactly the exchanges that it names, it must give the same numbers on every rank. All is in f64,
//! where the order of a sum is worth about 1e-15, so that a rule that is wrong anywhere shows.

mod attention;
mod decoders;
mod encoders;
mod diffusion;
mod group;
mod moe;
mod tensor;
mod toys;
mod weights;

use group::{Config, Group};
use tensorwire_topology::{ModelSpec, Plan, Planner};
use toys::{TOYS, Toy};

/// Relative to the largest number of the result.
const TOLERANCE: f64 = 1e-10;

/// How far the plan's result is from the whole model's, relative to its largest number.
fn difference(toy: &Toy, spec: &ModelSpec, plan: &Plan) -> f64 {
    let config = Config::parse(toy.config);
    let whole = Group::whole(&config, spec);
    let expected = (toy.forward)(&whole).0.remove(0);
    whole.finish();
    let group = Group::sharded(&config, spec, plan);
    let found = (toy.forward)(&group);
    group.finish();
    let largest = expected.data.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    let apart = found.0.iter().map(|t| {
        assert_eq!(t.shape, expected.shape);
        t.data.iter().zip(&expected.data).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()))
    });
    apart.fold(0.0, f64::max) / largest
}

#[test]
fn llama() {
    let spec = ModelSpec::from_config(TOYS[0].config).unwrap();
    for &world in TOYS[0].worlds {
        let plan = Planner::new(&spec).plan(world).unwrap();
        let d = difference(&TOYS[0], &spec, &plan);
        assert!(d < TOLERANCE, "{world} {d}");
    }
}

#[test]
#[ignore]
fn dev_config() {
    for toy in TOYS {
        let dir = std::path::Path::new("/tmp/proof/toys").join(toy.name.replace(' ', "_"));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("config.json"), toy.config).unwrap();
    }
}

#[test]
#[ignore]
fn dev_run() {
    for toy in TOYS {
        let dir = std::path::Path::new("/tmp/proof/toys").join(toy.name.replace(' ', "_"));
        let Ok(text) = std::fs::read_to_string(dir.join("tensors.json")) else { continue };
        let list: std::collections::BTreeMap<String, Vec<usize>> = serde_json::from_str(&text).unwrap();
        let all: std::collections::BTreeMap<_, _> =
            list.iter().map(|(n, s)| (n.clone(), weights::seeded(n, s))).collect();
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        for (name, t) in &all {
            let start = data.len();
            data.extend(t.data.iter().flat_map(|v| v.to_le_bytes()));
            header.insert(
                name.clone(),
                serde_json::json!({"dtype": "F64", "shape": t.shape, "data_offsets": [start, data.len()]}),
            );
        }
        let header = serde_json::to_string(&header).unwrap().into_bytes();
        let file = [(header.len() as u64).to_le_bytes().to_vec(), header, data].concat();
        std::fs::write(dir.join("model.safetensors"), file).unwrap();
        let config = Config::parse(toy.config);
        let r = std::panic::catch_unwind(|| {
            let g = Group::new(&config, None, vec![all]);
            let out = (toy.forward)(&g).0.remove(0);
            g.finish();
            out
        });
        if let Ok(out) = r {
            println!("{} {:?}", toy.name, out.shape);
            std::fs::write(dir.join("output.json"), serde_json::to_string(&out.data).unwrap()).unwrap();
        } else { println!("{} PANIC", toy.name); }
    }
}
