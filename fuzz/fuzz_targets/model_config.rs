#![no_main]

use tensorwire_topology::{ModelSpec, Planner};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(spec) = ModelSpec::from_config(&String::from_utf8_lossy(bytes)) {
        let _ = Planner::new(&spec).plan(3);
    }
});
