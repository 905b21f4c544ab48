//! Plans a small model for a machine, says why, loads each rank's part and generates tokens with it.
//!
//! ```sh
//! cargo run --release -p tensorwire-runtime --example plan_and_run
//! ```
//!
//! The model's weights are made from a seed, and the ranks are threads of this process, so that it runs anywhere. With
//! a model directory in the place of `Model::seeded` and `Communicator::from_env` in the place of
//! `Communicator::in_process`, it is a program for `tensorwire launch`.

use std::error::Error;

use tensorwire::Communicator;
use tensorwire::topology::place::{Request, Workload, place};
use tensorwire::topology::{Fabric, Plan, Planner};
use tensorwire_runtime::{Model, Runtime};

/// Nine query heads that read three key/value heads: not what two ranks divide evenly.
const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 72, "num_hidden_layers": 3, "num_attention_heads": 9,
    "num_key_value_heads": 3, "intermediate_size": 160, "vocab_size": 509, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "torch_dtype": "float32"}"#;

/// A machine by hand: two devices of so little memory that the model doesn't fit on one.
const MACHINE: &str = r#"
name = "two small devices"
[[model]]
name = "device"
kind = "accelerator"
memory = "1 MiB"
memory_gbps = 10
[[host]]
name = "host"
device = [{ model = "device", count = 2 }]
[links]
host = { alpha_us = 2, gbps = 8 }
"#;

fn main() -> Result<(), Box<dyn Error>> {
    let model = Model::seeded(CONFIG, 7)?;
    let spec = model.spec();

    // Where should it go? The search looks at every way to divide it that fits.
    let fabric = Fabric::from_toml(MACHINE)?;
    let placement = place(&Workload::of(spec), &fabric, &Request { context: 64, ..Request::default() })?;
    println!("on {}: {} on {} devices\n", fabric.name(), placement.chosen.name, placement.chosen.devices);

    // What does each rank hold, and why?
    let planner = Planner::new(spec);
    let plan = planner.plan(placement.chosen.degrees.tp)?;
    plan.check(spec)?;
    println!("{}", plan.summary_with(&planner.explain(&plan)?));

    // Load and run it; one rank alone must say the same.
    let tokens = generate(&model, &plan)?;
    let alone = generate(&model, &planner.plan(1)?)?;
    println!("{} ranks: {tokens:?}\n1 rank:  {alone:?}", plan.world);
    assert_eq!(tokens, alone);

    // And what would have to move for a third rank?
    print!("\n{}", plan.diff(&planner.plan(3)?)?.summary());
    Ok(())
}

/// Generates a few tokens on as many ranks as the plan has.
fn generate(model: &Model, plan: &Plan) -> Result<Vec<u32>, Box<dyn Error>> {
    let ranks = Communicator::in_process(plan.world)?;
    let tokens = std::thread::scope(|scope| {
        let run = |comm| {
            scope
                .spawn(move || Ok(Runtime::load(model, plan, comm)?.generate(&[1, 2, 3], 12, |_| ())?.tokens))
        };
        let running: Vec<_> = ranks.into_iter().map(run).collect();
        let tokens = running.into_iter().map(|rank| rank.join().unwrap());
        tokens.collect::<Result<Vec<_>, tensorwire_runtime::Error>>()
    })?;
    assert!(tokens.iter().all(|t| *t == tokens[0]), "every rank has the same");
    Ok(tokens[0].clone())
}
