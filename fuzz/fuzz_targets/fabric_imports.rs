//! Any text as hwloc's XML, as what nvidia-smi prints, and as TOML.
#![no_main]

use tensorwire_topology::Fabric;

libfuzzer_sys::fuzz_target!(|text: &str| {
    for read in [Fabric::from_hwloc, Fabric::from_nvidia_smi, Fabric::from_toml] {
        if let Ok(fabric) = read(text) {
            fabric.to_json();
        }
    }
});
