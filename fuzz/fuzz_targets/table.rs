//! Any bytes as the file of what was measured on a machine.
#![no_main]

use tensorwire_topology::discover::Fingerprint;
use tensorwire_topology::table::Table;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("table.json");
    std::fs::write(&path, bytes).expect("written");
    let machine = Fingerprint { processor: "x".into(), processors: 2, caches: vec![] };
    if let Ok(table) = Table::load(&path, &machine) {
        table.save(&path).expect("what was read is saved");
    }
});
