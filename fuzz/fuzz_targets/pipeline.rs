//! Any text as the description of a pipeline, and the workload of each of its stages.
#![no_main]

use tensorwire_topology::pipeline::Pipeline;

libfuzzer_sys::fuzz_target!(|text: &str| {
    for read in [Pipeline::from_toml, Pipeline::from_json] {
        let Ok(pipeline) = read(text) else { continue };
        let _ = pipeline.order();
        for stage in &pipeline.stages {
            let _ = pipeline.workload(stage);
        }
    }
});
