//! What is written as JSON is what `docs/schema` says: all of it is described there, and nothing else is written.

mod common;

use common::{model, plan};
use serde_json::Value;
use tensorwire_topology::shard::Experts;
use tensorwire_topology::{Fabric, ModelSpec, Planner};

/// A published schema, made strict: what it doesn't name is refused, so that no field is left undescribed.
fn schema(name: &str) -> jsonschema::Validator {
    let path = format!("{}/../docs/schema/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let mut schema: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    strict(&mut schema);
    jsonschema::validator_for(&schema).unwrap()
}

fn strict(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            fields.values_mut().for_each(strict);
            if fields.contains_key("required") {
                fields.insert("additionalProperties".to_owned(), Value::Bool(false));
            }
        }
        Value::Array(items) => items.iter_mut().for_each(strict),
        _ => {}
    }
}

fn check(schema: &jsonschema::Validator, json: &str) {
    let value: Value = serde_json::from_str(json).unwrap();
    let problems: Vec<String> =
        schema.iter_errors(&value).map(|e| format!("{}: {e}", e.instance_path())).take(5).collect();
    assert!(problems.is_empty(), "{problems:#?}");
}

#[test]
fn plans_are_what_their_schema_says() {
    let plans = schema("plan-v1");
    let fixtures = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures")).unwrap();
    let mut checked = 0;
    for path in fixtures.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
        let spec = ModelSpec::load(&path).unwrap();
        for world in [1, 2, 3] {
            // A part of the layers has everything that all have.
            let Ok(outline) = Planner::new(&spec).outline(world) else { continue };
            check(&plans, &outline.to_json());
            checked += 1;
        }
    }
    assert!(checked > 20, "{checked}");
    let grouped = ModelSpec::load(&common::fixture("mixtral-8x7b")).unwrap();
    let grouped = Planner::new(&grouped).experts(Experts::Grouped { groups: 2 }).plan(4).unwrap();
    assert_eq!(tensorwire_topology::Plan::from_json(&grouped.to_json()).unwrap(), grouped);
    check(&plans, &grouped.to_json());
    for (name, world) in [("smollm2-135m", 2), ("smollm2-135m", 9), ("all-minilm-l6-v2", 5)] {
        let spec = model(name);
        let plan = plan(&spec, world);
        let why = Planner::new(&spec).explain(&plan).unwrap();
        check(&plans, &plan.to_json());
        check(&plans, &plan.to_json_with(&why));
    }
}

#[test]
fn differences_are_what_their_schema_says() {
    let spec = model("smollm2-135m");
    check(&schema("plan-diff-v1"), &plan(&spec, 4).diff(&plan(&spec, 3)).unwrap().to_json());
}

#[test]
fn fabrics_are_what_their_schema_says() {
    let fabrics = schema("fabric-v1");
    let examples = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/fabrics")).unwrap();
    let mut checked = 0;
    for path in examples.map(|entry| entry.unwrap().path()) {
        let toml = std::fs::read_to_string(path).unwrap();
        check(&fabrics, &Fabric::from_toml(&toml).unwrap().to_json());
        checked += 1;
    }
    assert!(checked > 1);
}

#[test]
fn what_is_wrong_is_refused() {
    let plans = schema("plan-v1");
    let json: Value = serde_json::from_str(&plan(&model("smollm2-135m"), 2).to_json()).unwrap();
    assert!(plans.is_valid(&json));
    for (place, wrong) in [
        ("/schema", Value::from("tensorwire.plan/v2")),
        ("/world", Value::from(0)),
        ("/ranks/1/weight_bytes", Value::from(-1)),
        ("/tensors/0/slices/0/range", Value::from(vec![1, 2, 3])),
        ("/layers/0/collectives/0/op", Value::from("all_reduec")),
    ] {
        let mut broken = json.clone();
        *broken.pointer_mut(place).unwrap() = wrong;
        assert!(!plans.is_valid(&broken), "{place}");
    }
    let mut more = json.clone();
    more["layers"][0]["undescribed"] = Value::from(1);
    assert!(!plans.is_valid(&more));
}
