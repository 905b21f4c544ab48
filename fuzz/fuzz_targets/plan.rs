//! Any text as a plan, drawn and compared with itself.
#![no_main]

use tensorwire_topology::Plan;

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(plan) = Plan::from_json(text) {
        let _ = plan.diff(&plan);
        (plan.svg(), plan.summary());
        assert_eq!(Plan::from_json(&plan.to_json()).expect("what was accepted is read again"), plan);
    }
});
