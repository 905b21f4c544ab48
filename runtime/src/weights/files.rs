//! Weights in safetensors files, read by mapping only what is wanted.

use std::fs::File;
use std::path::{Path, PathBuf};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use memmap2::{Mmap, MmapOptions};
use tensorwire::DType;
use tensorwire::topology::model::{ModelSpec, TensorSpec};

use super::Region;
use crate::{Error, Result};

/// Bytes of a file mapped at a time. A mapping counts as resident memory once it is read, so a tensor is read
/// through small ones: at most this much is held beside the copies.
const WINDOW: usize = 8 << 20;

/// Appends the values that some bytes of a file hold.
type Decode = fn(&[u8], &mut Vec<f32>);

/// The weight files of a model, in the order in which its tensors' locations count them.
pub(super) struct Files(Vec<WeightFile>);

impl Files {
    pub(super) fn open(spec: &ModelSpec) -> Result<Files> {
        Ok(Files(spec.weight_files()?.iter().map(|path| WeightFile::open(path)).collect::<Result<_>>()?))
    }

    /// Appends the region's elements to `out`, as f32.
    pub(super) fn read(&self, tensor: &TensorSpec, region: &Region, out: &mut Vec<f32>) -> Result<()> {
        let (size, decode): (usize, Decode) = match tensor.stored.dtype() {
            Some(DType::F32) => (4, decode_f32),
            Some(DType::F16) => (2, decode_f16),
            Some(DType::BF16) => (2, decode_bf16),
            _ => return Err(Error::DType { name: tensor.name.clone(), dtype: tensor.stored.name() }),
        };
        let missing = || Error::MissingTensor(tensor.name.clone());
        let location = tensor.location.ok_or_else(missing)?;
        let file = self.0.get(location.file).ok_or_else(missing)?;
        // The whole tensor lies in the file, or its header would have been refused: nothing here overflows.
        let row_bytes = region.width * size;
        let (skip, take) = (region.cols.0 * size, (region.cols.1 - region.cols.0) * size);
        let rows_at_once = (WINDOW / row_bytes.max(1)).max(1);
        let mut row = region.rows.0;
        while row < region.rows.1 && take > 0 {
            let rows = rows_at_once.min(region.rows.1 - row);
            let start = location.offset + (row * row_bytes + skip) as u64;
            let window = file.window(start, (rows - 1) * row_bytes + take)?;
            if take == row_bytes {
                decode(&window, out);
            } else {
                window.chunks(row_bytes).for_each(|row| decode(&row[..take], out));
            }
            row += rows;
        }
        Ok(())
    }
}

/// An open weight file.
struct WeightFile {
    path: PathBuf,
    file: File,
}

impl WeightFile {
    fn open(path: &Path) -> Result<WeightFile> {
        let file = File::open(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        Ok(WeightFile { path: path.to_owned(), file })
    }

    /// Maps some bytes, for as long as the result lives.
    fn window(&self, start: u64, bytes: usize) -> Result<Mmap> {
        let io = |source| Error::Io { path: self.path.clone(), source };
        // The header was checked against the length the file had then. Reading a page behind the end would
        // kill the process, so the end is looked at again.
        let length = self.file.metadata().map_err(io)?.len();
        if start.checked_add(bytes as u64).is_none_or(|end| end > length) {
            return Err(Error::Truncated { path: self.path.clone(), bytes: length });
        }
        // SAFETY: 1. The range lies within the file as it is now, checked above, so no page of it faults
        // unless another program truncates the file while it is read. 2. The mapping is only read. A program
        // that writes to a weight file meanwhile gives wrong weights, as it would with read(2).
        unsafe { MmapOptions::new().offset(start).len(bytes).map(&self.file) }.map_err(io)
    }
}

fn decode_f32(bytes: &[u8], out: &mut Vec<f32>) {
    out.extend(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)));
}

fn decode_bf16(bytes: &[u8], out: &mut Vec<f32>) {
    out.extend(bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()));
}

/// In blocks, as half converts a slice of f16 many times faster than single numbers.
fn decode_f16(bytes: &[u8], out: &mut Vec<f32>) {
    let (mut half, mut full) = ([f16::ZERO; 1024], [0.0; 1024]);
    for block in bytes.chunks(2 * half.len()) {
        let values = block.as_chunks().0;
        let n = values.len();
        for (to, &from) in half.iter_mut().zip(values) {
            *to = f16::from_le_bytes(from);
        }
        half[..n].convert_to_f32_slice(&mut full[..n]);
        out.extend_from_slice(&full[..n]);
    }
}
