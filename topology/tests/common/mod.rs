//! What the tests share: the fixtures, and safetensors files of any shape.

#![allow(dead_code)] // each test file uses its own part

pub(crate) mod toys;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use tensorwire_topology::plan::Span;
use tensorwire_topology::{ModelSpec, Plan, Planner};

/// A fixture's path.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(format!("{name}.json"))
}

/// A fixture, read.
pub(crate) fn model(name: &str) -> ModelSpec {
    ModelSpec::load(&fixture(name)).unwrap()
}

/// A plan that has been checked against its model.
pub(crate) fn plan(spec: &ModelSpec, world: usize) -> Plan {
    let plan = Planner::new(spec).plan(world).unwrap();
    plan.check(spec).unwrap();
    plan
}

/// How long each span is.
pub(crate) fn lengths(spans: &[Span]) -> Vec<usize> {
    spans.iter().map(Span::len).collect()
}

/// Spans as pairs.
pub(crate) fn pairs(spans: &[Span]) -> Vec<[usize; 2]> {
    spans.iter().map(|s| [s.start, s.end]).collect()
}

/// The start of a safetensors file: the header's length, then the header.
pub(crate) fn framed(header: &str) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes
}

/// A tensor for [`write_safetensors`]: name, type and shape.
pub(crate) type Tensor = (String, &'static str, Vec<usize>);

/// Writes a safetensors file of zeros. The data is a hole, so even a large model takes no room.
pub(crate) fn write_safetensors(path: &Path, tensors: &[Tensor]) {
    let mut end = 0;
    let mut entries = vec![r#""__metadata__":{"format":"pt"}"#.to_owned()];
    for (name, dtype, shape) in tensors {
        let size = match *dtype {
            "F64" | "I64" => 8,
            "F32" => 4,
            "F16" | "BF16" => 2,
            "F8_E4M3" => 1,
            other => panic!("no size for {other}"),
        };
        let start = end;
        end += size * shape.iter().product::<usize>();
        entries.push(format!(
            r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        ));
    }
    let head = framed(&format!("{{{}}}", entries.join(",")));
    let mut file = File::create(path).unwrap();
    file.write_all(&head).unwrap();
    file.set_len((head.len() + end) as u64).unwrap();
}

/// Every tensor that a spec expects, as `dtype`.
pub(crate) fn tensors_of(spec: &ModelSpec, dtype: &'static str) -> Vec<Tensor> {
    spec.tensors.iter().map(|t| (t.name.clone(), dtype, t.shape.clone())).collect()
}

/// A model directory with this config and, where given, these weights.
pub(crate) fn model_dir(config: &str, tensors: Option<&[Tensor]>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config).unwrap();
    if let Some(tensors) = tensors {
        write_safetensors(&dir.path().join("model.safetensors"), tensors);
    }
    dir
}
