//! Any text as a fabric, in the format that it seems to have.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(fabric) = tensorwire_topology::Fabric::from_text(text) {
        let read = tensorwire_topology::Fabric::from_json(&fabric.to_json());
        assert_eq!(read.expect("what was accepted is read again"), fabric);
        // An island by island way through what a planner asks.
        for hop in fabric.classes(&fabric.all()) {
            fabric.islands(&fabric.all(), hop.class);
        }
        fabric.to_svg();
    }
});
