//! Golden cases, with the answers reasoned out, and properties.

use super::arrange::{Arranger, Task};
use super::degrees::{ContextBy, Degrees};
use super::machine::Machine;
use super::pass::Goal;
use super::predict::Cause;
use super::search::search;
use super::workload::{Attention, Block, Exchange, Keys, Kind, Part, Split, Work, Workload};
use crate::fabric::{self, Class, Device, DeviceModel, Fabric, Host, Link, Parts, Tflops};

/// A decoder as Llama's: bf16, an output head of its own.
fn llama(layers: usize, hidden: u64, heads: [usize; 2], ffn: u64, vocab: u64) -> Workload {
    let [q, kv] = heads;
    let head_dim = hidden / q as u64;
    let kv_width = 2 * kv as u64 * head_dim;
    let dense = |elements: u64| Work::dense(2 * elements, 2.0 * elements as f64);
    let attention = Part {
        cut: dense(2 * hidden * hidden),
        kv: dense(hidden * kv_width),
        whole: Work::dense(2 * hidden, 0.0),
        attention: Some(Attention {
            flops_per_pair: 4.0 * hidden as f64,
            keys: Keys::Causal { window: None },
            query_bytes: 2 * hidden,
            kv_bytes: 2 * kv_width,
            kv_whole: false,
        }),
        wide_bytes: 2 * (2 * hidden + kv_width),
        largest: [2 * hidden * hidden, 2 * hidden],
        after: Exchange::Sum,
        ..Part::new("attention", Split::Heads { q, kv })
    };
    let mlp = Part {
        cut: dense(3 * hidden * ffn),
        whole: Work::dense(2 * hidden, 0.0),
        wide_bytes: 4 * ffn,
        largest: [2 * hidden * ffn, 2 * hidden],
        after: Exchange::Sum,
        ..Part::new("mlp", Split::Columns { units: ffn as usize })
    };
    let rows = Split::Rows { rows: vocab as usize };
    let embedding = Part {
        cut: Work { bytes: 2 * vocab * hidden, ..Work::default() },
        largest: [2 * vocab * hidden, 0],
        after: Exchange::Sum,
        ..Part::new("embedding", rows)
    };
    let head = Part {
        cut: dense(vocab * hidden),
        largest: [2 * vocab * hidden, 0],
        after: Exchange::Gather { row_bytes: 2 * vocab },
        ..Part::new("head", rows)
    };
    let block = |name: &str, parts| Block { name: name.to_owned(), parts };
    Workload {
        name: "llama".to_owned(),
        kind: Kind::Decoder,
        bits: 16,
        stream_bytes: 2 * hidden,
        blocks: vec![
            block("embedding", vec![embedding]),
            block("layer", vec![attention, mlp]),
            block("head", vec![head]),
        ],
        order: [vec![0], vec![1; layers], vec![2]].concat(),
        tied_bytes: 0,
    }
}

fn llama_8b() -> Workload {
    llama(32, 4096, [32, 8], 14336, 128_256)
}

/// `hosts` hosts of `per_host` devices, which share a NUMA node, and a network interface for each.
fn cluster(hosts: u32, per_host: u32) -> Fabric {
    cluster_of(hosts, per_host, 80, [(3.0, 300.0), (10.0, 50.0)])
}

fn cluster_of(hosts: u32, per_host: u32, gib: u64, links: [(f64, f64); 2]) -> Fabric {
    let gpu = DeviceModel {
        memory_gbps: Some(3000.0),
        tflops: Tflops { f16: Some(900.0), ..Tflops::default() },
        ..DeviceModel::new("gpu", fabric::Kind::Gpu, Some(gib << 30))
    };
    let nic = |n| fabric::Nic { name: format!("nic{n}"), ..serde_json::from_str(r#"{"name": ""}"#).unwrap() };
    let host = |h| Host { nics: (0..per_host).map(nic).collect(), ..Host::new(format!("host{h}")) };
    let device = |h: u32, d: u32| Device { numa: Some(0), ..Device::new(format!("host{h}.{d}"), h, 0) };
    let [near, far] = links.map(|(alpha, gbps)| Link::rated(alpha, gbps));
    Fabric::new(Parts {
        name: "cluster".to_owned(),
        models: vec![gpu],
        hosts: (0..hosts).map(host).collect(),
        devices: (0..hosts).flat_map(|h| (0..per_host).map(move |d| device(h, d))).collect(),
        links: [(Class::Numa, near), (Class::Network, far)].into(),
        pairs: vec![],
    })
    .unwrap()
}

fn machine(fabric: &Fabric) -> Machine {
    Machine::of(fabric, &fabric.workers(), 16).0
}

#[test]
fn a_thousand_devices() {
    let (workload, fabric) = (llama(80, 8192, [64, 8], 28672, 128_256), cluster(128, 8));
    let machine = machine(&fabric);
    for goal in [Goal::Decode, Goal::Prefill, Goal::Memory] {
        let start = std::time::Instant::now();
        let task = Task { workload: &workload, machine: &machine, goal, context: 8192, batch: 256 };
        let found = search(task);
        let a = found.best.unwrap();
        eprintln!(
            "{goal:?}: {} {} us prefill {} us peak {} of {} tried in {:?}",
            a.degrees,
            a.step.total_us(),
            a.prefill.total_us(),
            a.peak_bytes(),
            found.tried.len(),
            start.elapsed()
        );
        for t in &found.tried[..10] {
            eprintln!("   {} {} {}", t.degrees, t.cost, t.lacks);
        }
    }
}
