//! Proof in numbers that a sharded model computes what the whole one does.
//!
//! Each family's forward is written once, over a group of ranks in lock step. Computed by one rank with whole
//! tensors it is the reference; computed by a plan's ranks, each with exactly the slices that the plan names
//! and with exactly the exchanges that it names, it must give the same numbers on every rank. All is in f64,
//! where the order of a sum is worth about 1e-15, so that a rule that is wrong anywhere shows.

mod attention;
mod decoders;
mod encoders;
mod group;
mod tensor;
mod weights;

use group::{Config, Each, Group};
use tensorwire_topology::{ModelSpec, Plan, Planner};

/// Relative to the largest number of the result.
const TOLERANCE: f64 = 1e-10;

/// A family at toy size.
struct Toy {
    config: &'static str,
    forward: fn(&Group) -> Each,
    /// How many ranks it is split over.
    worlds: &'static [usize],
}

const LLAMA: Toy = Toy {
    config: r#"{"model_type": "llama", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 4, "intermediate_size": 37, "vocab_size": 155,
        "rms_norm_eps": 1e-6, "rope_theta": 100.0, "attention_bias": true, "mlp_bias": true}"#,
    forward: decoders::llama,
    worlds: &[2, 3, 4, 5],
};

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
    let spec = ModelSpec::from_config(LLAMA.config).unwrap();
    for &world in LLAMA.worlds {
        let plan = Planner::new(&spec).plan(world).unwrap();
        let d = difference(&LLAMA, &spec, &plan);
        assert!(d < TOLERANCE, "{world} {d}");
    }
}
