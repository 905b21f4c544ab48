//! The parsers on mutated examples: the same inputs every time, so that a failure stays one. Each must refuse what makes no
//! sense, and what it takes must survive being used. `fuzz/` has the same as targets that go on for as long as one likes.

use std::path::Path;

use tensorwire_topology::cost::CostModel;
use tensorwire_topology::discover::Fingerprint;
use tensorwire_topology::pipeline::Pipeline;
use tensorwire_topology::table::{Curve, Profile, Reading, Step, Table, Timing};
use tensorwire_topology::{Fabric, ModelSpec, Plan, Planner};

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n.max(1) as u64) as usize
    }
}

/// What a text is likely to be broken by.
const ODD: [&str; 12] = [
    "-1",
    "0",
    "1e999",
    "18446744073709551616",
    "4294967295",
    "9223372036854775807",
    "null",
    "[]",
    "{}",
    "\"",
    "\u{0}",
    "<",
];

/// One change or a few: bytes, numbers, pieces cut out, doubled or taken from elsewhere.
fn mutate(random: &mut Random, examples: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = examples[random.below(examples.len())].clone();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len());
        let most = random.below(200);
        let to = (at + random.below(1 + most)).min(bytes.len());
        match random.below(7) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            1 => drop(bytes.drain(at..to)),
            2 => bytes.truncate(at),
            3 => {
                let piece = bytes[at..to].to_vec();
                bytes.splice(at..at, piece);
            }
            4 => {
                let other = &examples[random.below(examples.len())];
                let from = random.below(other.len());
                let piece = other[from..(from + random.below(200)).min(other.len())].to_vec();
                bytes.splice(at..to, piece);
            }
            // A number in the place of another: where most that is declared too large comes from.
            _ => {
                let digit = |b: &u8| b.is_ascii_digit();
                let Some(first) = bytes[at..].iter().position(digit).map(|i| at + i) else { continue };
                let after = bytes[first..].iter().position(|b| !digit(b)).map_or(bytes.len(), |i| first + i);
                bytes.splice(first..after, ODD[random.below(ODD.len())].bytes());
            }
        }
    }
    bytes.truncate(1 << 16);
    bytes
}

fn run(rounds: usize, target: impl Fn(&[u8]), examples: &[Vec<u8>]) {
    examples.iter().for_each(|example| target(example));
    let mut random = Random(0x5eed_5eed_5eed_5eed);
    for _ in 0..rounds {
        target(&mutate(&mut random, examples));
    }
}

/// The files of a folder of the repository, by their ends.
fn files(folder: &str, ends: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let files: Vec<Vec<u8>> = paths
        .iter()
        .filter(|p| p.to_string_lossy().ends_with(ends))
        .map(|p| std::fs::read(p).unwrap())
        .collect();
    assert!(!files.is_empty(), "{ends}");
    files
}

/// Any text as a fabric, in the format that it seems to have; and what a planner asks of it.
fn fabric(bytes: &[u8]) {
    let Ok(fabric) = Fabric::from_text(&String::from_utf8_lossy(bytes)) else { return };
    assert_eq!(Fabric::from_json(&fabric.to_json()).expect("what was accepted is read again"), fabric);
    // Large ones take long, and aren't different.
    if fabric.devices().len() > 2000 {
        return;
    }
    for hop in fabric.classes(&fabric.all()) {
        fabric.islands(&fabric.all(), hop.class);
    }
    fabric.to_svg();
}

#[test]
fn fabrics_in_toml() {
    run(4000, fabric, &files("../examples/fabrics", ".toml"));
}

#[test]
fn fabrics_in_json() {
    let fabrics = ["two-cores", "8-accelerators", "four-pcs"].map(|name| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../examples/fabrics/{name}.toml"));
        Fabric::load(&path).unwrap().to_json().into_bytes()
    });
    run(4000, fabric, &fabrics);
}

#[test]
fn fabrics_of_nccl_and_hwloc() {
    run(6000, fabric, &files("tests/fixtures/fabrics", ".xml"));
}

#[test]
fn fabrics_of_nvidia_smi() {
    run(4000, fabric, &files("tests/fixtures/fabrics", ".txt"));
}

#[test]
fn models_configurations() {
    let target = |bytes: &[u8]| {
        let Ok(spec) = ModelSpec::from_config(&String::from_utf8_lossy(bytes)) else { return };
        if spec.tensors.len() > 20_000 {
            return;
        }
        if let Ok(plan) = Planner::new(&spec).outline(3) {
            plan.validate().expect("a plan that was made is one");
        }
    };
    run(4000, target, &files("tests/fixtures", ".json"));
}

#[test]
fn safetensors_headers() {
    let config =
        br#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_hidden_layers": 1, "vocab_size": 64, "torch_dtype": "float32"}"#;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let spec = ModelSpec::load(folder.path()).unwrap();
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for tensor in &spec.tensors {
        let start = end;
        end += tensor.bytes();
        let entry = serde_json::json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.clone(), entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    let file = [&(header.len() as u64).to_le_bytes(), &header[..], &vec![0; end as usize]].concat();
    let path = folder.path().join("model.safetensors");
    let target = |bytes: &[u8]| {
        // The header is mutated, and what it says of the data must still be in the file.
        std::fs::write(&path, [bytes, &vec![0; end as usize]].concat()).unwrap();
        if let Ok(spec) = ModelSpec::load(folder.path()) {
            let size = std::fs::metadata(&path).unwrap().len();
            let ends = spec.tensors.iter().filter_map(|t| t.location).map(|l| l.offset + l.bytes);
            assert!(ends.max().unwrap() <= size);
        }
    };
    run(2000, target, &[file[..8 + header.len()].to_vec()]);
}

#[test]
fn plans() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mixtral-8x7b.json");
    let mut small = Planner::new(&ModelSpec::load(&path).unwrap()).outline(4).unwrap();
    // A few layers say all there is to be said.
    small.layers.truncate(2);
    small.model.num_layers = small.layers.len();
    small.validate().unwrap();
    let target = |bytes: &[u8]| {
        if let Ok(plan) = Plan::from_json(&String::from_utf8_lossy(bytes)) {
            let _ = plan.diff(&plan);
            let _ = (plan.svg(), plan.summary());
        }
    };
    run(3000, target, &[small.to_json().into_bytes()]);
}

#[test]
fn pipelines() {
    let target = |bytes: &[u8]| {
        let Ok(text) = std::str::from_utf8(bytes) else { return };
        for read in [Pipeline::from_toml, Pipeline::from_json] {
            let Ok(pipeline) = read(text) else { continue };
            let _ = pipeline.order();
            for stage in &pipeline.stages {
                let _ = pipeline.workload(stage);
            }
        }
    };
    run(2000, target, &files("../examples/pipelines", ".toml"));
}

#[test]
fn tables() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table.json");
    let machine = Fingerprint::read("/".as_ref());
    let curve = Curve::fit(&[(1_000, 9.0), (1_000, 10.0), (1_000, 11.0), (2_000, 20.0)]).unwrap();
    let timing = Timing {
        collective: "all_reduce".into(),
        transport: "shm".into(),
        ranks: 2,
        contended: false,
        p50: curve.clone(),
        p99: curve,
        measured_at: 1,
    };
    let mut table = Table::empty(machine.clone());
    table.set_profile(Profile {
        distance_ns: Some(100),
        timings: vec![timing],
        steps: vec![Step { ranks: 2, layer_us: 10.0, gbps: 2.0, band: 1.2, measured_at: 1 }],
        reads: vec![Reading { processors: 2, bytes: 1 << 28, gbps: 5.0 }],
    });
    table.save(&path).unwrap();
    let example = std::fs::read(&path).unwrap();
    let target = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let Ok(table) = Table::load(&path, &machine) else { return };
        if let Some(profile) = table.profile(Some(100)) {
            let costs = CostModel::measured(profile, "shm");
            assert!(costs.all_reduce_us(8192, 2).is_finite() && costs.step(3, 4_000, 2).us.is_finite());
        }
    };
    run(3000, target, &[example]);
}
