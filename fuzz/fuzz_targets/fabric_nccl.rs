//! Any text as NCCL's topology, and what is written of it read again.
#![no_main]

use tensorwire_topology::Fabric;

libfuzzer_sys::fuzz_target!(|text: &str| {
    let Ok(fabric) = Fabric::from_nccl(text) else { return };
    let Ok(written) = fabric.to_nccl() else { return };
    let read = Fabric::from_nccl(&written).expect("what was written is read again");
    assert_eq!(read.workers().len(), fabric.workers().len());
});
