//! Where weights come from: safetensors files, or a seed. Either gives any slice of any tensor as f32.

mod files;
mod seeded;

use tensorwire::topology::model::{ModelSpec, TensorSpec};
use tensorwire::topology::plan::Slice;

use crate::{Error, Result};

/// A source of weights.
pub struct Weights(Source);

enum Source {
    Files(files::Files),
    Seed(u64),
}

impl Weights {
    /// The files that the model was read from. Opens them; reads no weight.
    pub fn open(spec: &ModelSpec) -> Result<Weights> {
        Ok(Weights(Source::Files(files::Files::open(spec)?)))
    }

    /// Weights that follow from `seed`, a tensor's name and an element's place in the whole tensor, so that
    /// any slice on any rank holds the numbers that the whole would.
    pub fn seeded(seed: u64) -> Weights {
        Weights(Source::Seed(seed))
    }

    /// Reads the given slices of a tensor of one or two dimensions, or all of it where none is given.
    ///
    /// Returns its elements in row-major order and its shape.
    pub fn read(&self, tensor: &TensorSpec, slices: &[Slice]) -> Result<(Vec<f32>, Vec<usize>)> {
        let region = Region::new(tensor, slices)?;
        let count = region.shape.iter().product();
        let mut out = Vec::new();
        out.try_reserve_exact(count).map_err(|_| Error::OutOfMemory {
            what: format!("tensor {}", tensor.name),
            bytes: size_of::<f32>().saturating_mul(count),
        })?;
        match &self.0 {
            Source::Files(files) => files.read(tensor, &region, &mut out)?,
            Source::Seed(seed) => seeded::fill(*seed, tensor, &region, &mut out),
        }
        Ok((out, region.shape))
    }
}

/// A part of a tensor seen as a matrix: some rows, and of each the same columns. A vector is a column.
struct Region {
    /// Columns of the whole tensor.
    width: usize,
    /// The rows: a half-open range.
    rows: (usize, usize),
    /// The columns: a half-open range.
    cols: (usize, usize),
    /// The part's own shape.
    shape: Vec<usize>,
}

impl Region {
    fn new(tensor: &TensorSpec, slices: &[Slice]) -> Result<Region> {
        let shape = &tensor.shape[..];
        let fail = |why: &str| Error::Plan(format!("tensor {} of shape {shape:?}: {why}", tensor.name));
        let mut ranges: Vec<(usize, usize)> = shape.iter().map(|&n| (0, n)).collect();
        for slice in slices {
            let range = ranges.get_mut(slice.dim).ok_or_else(|| fail("a slice of a dimension it hasn't"))?;
            if *range != (0, shape[slice.dim]) {
                return Err(fail("two slices of one dimension"));
            }
            if slice.range.start > slice.range.end || slice.range.end > range.1 {
                return Err(fail("a slice past its end"));
            }
            *range = (slice.range.start, slice.range.end);
        }
        let part = ranges.iter().map(|(start, end)| end - start).collect();
        match (shape, &ranges[..]) {
            (_, &[rows]) => Ok(Region { width: 1, rows, cols: (0, 1), shape: part }),
            (&[_, width], &[rows, cols]) => Ok(Region { width, rows, cols, shape: part }),
            _ => Err(fail("only one or two dimensions can be read")),
        }
    }
}
