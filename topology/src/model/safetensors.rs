//! The headers of safetensors files, read strictly.
//!
//! A file is eight bytes N, little endian; N bytes of JSON that give each tensor's type, shape and byte
//! range; then the bytes. Only the header is read here, and nothing in it is believed before it is checked:
//! the ranges must fill the rest of the file exactly, without gaps or overlaps, and each must be as long as
//! its type and shape say. The format is specified at <https://github.com/huggingface/safetensors>.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::marker::PhantomData;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;
use tensorwire_core::DType;

use super::tensors::Location;
use crate::{Error, Result};

/// A header is at most this long; the reference implementation has the same limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The type of a tensor's elements in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredType {
    name: &'static str,
    size: u64,
    dtype: Option<DType>,
}

const fn stored(name: &'static str, size: u64, dtype: Option<DType>) -> StoredType {
    StoredType { name, size, dtype }
}

/// The types of whole bytes that the format defines; those that a model can be computed with have a dtype.
const TYPES: [StoredType; 15] = [
    stored("F32", 4, Some(DType::F32)),
    stored("F16", 2, Some(DType::F16)),
    stored("BF16", 2, Some(DType::BF16)),
    stored("BOOL", 1, None),
    stored("U8", 1, None),
    stored("I8", 1, None),
    stored("F8_E5M2", 1, None),
    stored("F8_E4M3", 1, None),
    stored("U16", 2, None),
    stored("I16", 2, None),
    stored("U32", 4, None),
    stored("I32", 4, None),
    stored("U64", 8, None),
    stored("I64", 8, None),
    stored("F64", 8, None),
];

impl StoredType {
    /// Its name in the format, such as `BF16` or `I64`.
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// Bytes an element.
    pub const fn size(self) -> u64 {
        self.size
    }

    /// The type that the model's weights then have, if they can: F32, F16 or BF16.
    pub const fn dtype(self) -> Option<DType> {
        self.dtype
    }

    /// How weights of that type are stored.
    pub(super) fn of(dtype: DType) -> Option<StoredType> {
        TYPES.into_iter().find(|t| t.dtype == Some(dtype))
    }

    pub(super) fn named(name: &str) -> Option<StoredType> {
        TYPES.into_iter().find(|t| t.name == name)
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// A model's weight files and what is in them.
pub(super) struct Weights {
    pub(super) files: Vec<PathBuf>,
    pub(super) tensors: BTreeMap<String, Stored>,
    /// What to name when something isn't there: the only file, or the index.
    pub(super) root: PathBuf,
}

impl Weights {
    /// Whether a tensor's name ends so.
    pub(super) fn has_suffix(&self, suffix: &str) -> bool {
        self.tensors.keys().any(|name| name.ends_with(suffix))
    }
}

/// One tensor of a file.
pub(super) struct Stored {
    pub(super) dtype: StoredType,
    pub(super) shape: Vec<usize>,
    pub(super) location: Location,
}

/// Reads the headers of a directory's weights; none if it has no safetensors.
pub(super) fn open(dir: &Path) -> Result<Option<Weights>> {
    // As transformers names them, and as diffusers does.
    for name in ["model", "diffusion_pytorch_model"] {
        let single = dir.join(format!("{name}.safetensors"));
        let index = dir.join(format!("{name}.safetensors.index.json"));
        if single.exists() {
            let tensors = header(&single, 0)?;
            return Ok(Some(Weights { files: vec![single.clone()], tensors, root: single }));
        }
        if index.exists() {
            return sharded(dir, index).map(Some);
        }
    }
    Ok(None)
}

fn sharded(dir: &Path, root: PathBuf) -> Result<Weights> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: UniqueMap<String>,
    }
    let bad = |problem: String| Error::Safetensors { path: root.clone(), problem };
    let text = super::read_text(&root, MAX_HEADER_BYTES)?;
    let index: Index =
        serde_json::from_str(&text).map_err(|e| bad(format!("not an index of safetensors: {e}")))?;

    let mut names: Vec<&String> = index.weight_map.0.values().collect();
    names.sort();
    names.dedup();
    let mut files = Vec::new();
    let mut headers = Vec::new();
    for (i, name) in names.iter().enumerate() {
        // A file name alone, so that an index can't reach outside its directory.
        let mut parts = Path::new(name).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(p)), None) if p == name.as_str()) {
            return Err(bad(format!("names the file {name:?}, which is not a plain file name")));
        }
        let path = dir.join(name);
        headers.push(header(&path, i)?);
        files.push(path);
    }
    let mut tensors = BTreeMap::new();
    for (tensor, file) in &index.weight_map.0 {
        let found = names.binary_search(&file).ok().and_then(|i| headers[i].remove(tensor));
        let stored =
            found.ok_or_else(|| bad(format!("says that {file} holds tensor {tensor}, but it doesn't")))?;
        tensors.insert(tensor.clone(), stored);
    }
    Ok(Weights { files, tensors, root })
}

/// Reads and checks one file's header; `file` becomes the tensors' [`Location::file`].
fn header(path: &Path, file: usize) -> Result<BTreeMap<String, Stored>> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let bad = |problem: String| Error::Safetensors { path: path.to_owned(), problem };
    let mut input = File::open(path).map_err(io)?;
    let length = input.metadata().map_err(io)?.len();

    let mut prefix = [0u8; 8];
    if length < 8 {
        return Err(bad(format!("truncated: {length} of at least 8 bytes")));
    }
    input.read_exact(&mut prefix).map_err(io)?;
    let header_length = u64::from_le_bytes(prefix);
    if header_length > MAX_HEADER_BYTES {
        return Err(bad(format!(
            "not a safetensors file, or damaged: its header would be {header_length} bytes long, \
             more than the limit of {MAX_HEADER_BYTES}"
        )));
    }
    let data_start = 8 + header_length;
    if length < data_start {
        return Err(bad(format!("truncated: {length} of at least {data_start} bytes")));
    }
    let mut json = Vec::new();
    input.take(header_length).read_to_end(&mut json).map_err(io)?;
    let entries = entries(&json).map_err(bad)?;

    let mut tensors = BTreeMap::new();
    let mut ranges = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        let [start, end] = entry.data_offsets;
        let stored = entry.check(file, data_start).map_err(|what| bad(format!("tensor {name}: {what}")))?;
        ranges.push((start, end, name.clone()));
        tensors.insert(name, stored);
    }
    ranges.sort();
    let mut filled = 0;
    for (start, end, name) in ranges {
        if start != filled {
            let how = if start < filled { "overlaps another tensor" } else { "leaves a gap before it" };
            return Err(bad(format!("tensor {name} {how}: it starts at byte {start}, not {filled}")));
        }
        filled = end;
    }
    // Each range was checked to lie within 64 bits of the file's start, so this sum can't overflow.
    let expected = data_start + filled;
    if length < expected {
        return Err(bad(format!("truncated: {length} of {expected} bytes")));
    }
    if length > expected {
        return Err(bad(format!("damaged: {length} bytes, but its header accounts for {expected}")));
    }
    Ok(tensors)
}

/// The tensors of a header's JSON. `__metadata__` is the one key that isn't a tensor.
fn entries(json: &[u8]) -> std::result::Result<BTreeMap<String, Entry>, String> {
    let UniqueMap(mut items): UniqueMap<Value> = serde_json::from_slice(json)
        .map_err(|e| format!("not a safetensors file, or damaged: header: {e}"))?;
    items.remove("__metadata__");
    let entry = |(name, item)| match serde_json::from_value(item) {
        Ok(entry) => Ok((name, entry)),
        Err(e) => Err(format!("damaged: tensor {name}: {e}")),
    };
    items.into_iter().map(entry).collect()
}

/// One tensor of the header as it is written.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

impl Entry {
    fn check(self, file: usize, data_start: u64) -> std::result::Result<Stored, String> {
        let Some(dtype) = StoredType::named(&self.dtype) else {
            return Err(format!("type {} is not supported", self.dtype));
        };
        let expected = self
            .shape
            .iter()
            .try_fold(dtype.size, |bytes, &dim| bytes.checked_mul(dim as u64))
            .ok_or_else(|| format!("shape {:?} is beyond any file", self.shape))?;
        let [start, end] = self.data_offsets;
        if end.checked_sub(start) != Some(expected) {
            return Err(format!(
                "bytes {start}..{end} can't hold {dtype} {:?}, which takes {expected}",
                self.shape
            ));
        }
        let Some(offset) = data_start.checked_add(end).map(|_| data_start + start) else {
            return Err(format!("bytes {start}..{end} are beyond any file"));
        };
        Ok(Stored { dtype, shape: self.shape, location: Location { file, offset, bytes: expected } })
    }
}

/// A JSON object without duplicate keys: which of two tensors of one name is meant can't be known.
struct UniqueMap<T>(BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for UniqueMap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Unique<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Unique<T> {
            type Value = UniqueMap<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
                let mut items = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, T>()? {
                    if items.contains_key(&key) {
                        return Err(serde::de::Error::custom(format!("{key} appears twice")));
                    }
                    items.insert(key, value);
                }
                Ok(UniqueMap(items))
            }
        }
        deserializer.deserialize_map(Unique(PhantomData))
    }
}
