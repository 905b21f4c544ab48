//! Dense tensors of f64 and what layers are made of, written for reading and not for speed.

use std::ops::Range;

/// A row-major tensor. An activation has the shape `[tokens, width]`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<f64>,
}

impl Tensor {
    pub(crate) fn new(shape: &[usize], data: Vec<f64>) -> Tensor {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "{shape:?}");
        Tensor { shape: shape.to_vec(), data }
    }

    pub(crate) fn of(shape: &[usize], value: impl FnMut(usize) -> f64) -> Tensor {
        Tensor::new(shape, (0..shape.iter().product()).map(value).collect())
    }

    /// A matrix, element by element.
    pub(crate) fn matrix(rows: usize, cols: usize, mut value: impl FnMut(usize, usize) -> f64) -> Tensor {
        Tensor::of(&[rows, cols], |i| value(i / cols, i % cols))
    }

    /// The first dimension.
    pub(crate) fn rows(&self) -> usize {
        self.shape[0]
    }

    /// All dimensions but the first, as one.
    pub(crate) fn cols(&self) -> usize {
        self.shape[1..].iter().product()
    }

    pub(crate) fn row(&self, row: usize) -> &[f64] {
        &self.data[row * self.cols()..][..self.cols()]
    }

    pub(crate) fn at(&self, row: usize, col: usize) -> f64 {
        self.row(row)[col]
    }

    /// The same elements in another shape.
    pub(crate) fn reshape(&self, shape: &[usize]) -> Tensor {
        Tensor::new(shape, self.data.clone())
    }

    /// The entry `index` of the first dimension.
    pub(crate) fn index(&self, index: usize) -> Tensor {
        Tensor::new(&self.shape[1..], self.row(index).to_vec())
    }

    /// The elements at these indices of one dimension, in this order.
    pub(crate) fn select(&self, dim: usize, indices: &[usize]) -> Tensor {
        let inner: usize = self.shape[dim + 1..].iter().product();
        let outer: usize = self.shape[..dim].iter().product();
        let mut data = Vec::with_capacity(outer * indices.len() * inner);
        for o in 0..outer {
            for &i in indices {
                assert!(i < self.shape[dim], "index {i} of dimension {dim} of {:?}", self.shape);
                data.extend_from_slice(&self.data[(o * self.shape[dim] + i) * inner..][..inner]);
            }
        }
        let mut shape = self.shape.clone();
        shape[dim] = indices.len();
        Tensor { shape, data }
    }

    /// A range of columns.
    pub(crate) fn columns(&self, range: Range<usize>) -> Tensor {
        self.select(1, &range.collect::<Vec<_>>())
    }

    /// Beside each other: the columns of each.
    pub(crate) fn beside(parts: &[Tensor]) -> Tensor {
        let rows = parts[0].rows();
        let cols = parts.iter().map(Tensor::cols).sum();
        let data = (0..rows).flat_map(|r| parts.iter().flat_map(move |p| p.row(r).iter().copied()));
        Tensor::new(&[rows, cols], data.collect())
    }

    /// Below each other: the rows of each.
    pub(crate) fn below(parts: &[Tensor]) -> Tensor {
        let rows = parts.iter().map(Tensor::rows).sum();
        Tensor::new(&[rows, parts[0].cols()], parts.iter().flat_map(|p| p.data.iter().copied()).collect())
    }

    pub(crate) fn transpose(&self) -> Tensor {
        Tensor::matrix(self.cols(), self.rows(), |r, c| self.at(c, r))
    }

    pub(crate) fn map(&self, f: impl Fn(f64) -> f64) -> Tensor {
        Tensor { shape: self.shape.clone(), data: self.data.iter().map(|&x| f(x)).collect() }
    }

    /// Element by element with a tensor of the same shape, or with one row for all rows.
    pub(crate) fn zip(&self, other: &Tensor, f: impl Fn(f64, f64) -> f64) -> Tensor {
        let same = self.data.len() == other.data.len();
        assert!(
            same || other.data.len() == self.cols(),
            "{:?} doesn't go with {:?}",
            self.shape,
            other.shape
        );
        let n = other.data.len();
        Tensor::of(&self.shape, |i| f(self.data[i], other.data[i % n]))
    }

    pub(crate) fn add(&self, other: &Tensor) -> Tensor {
        self.zip(other, |a, b| a + b)
    }

    pub(crate) fn mul(&self, other: &Tensor) -> Tensor {
        self.zip(other, |a, b| a * b)
    }

    /// `self` times the transpose of `weight`, which is stored `[output, input]`.
    pub(crate) fn times(&self, weight: &Tensor) -> Tensor {
        assert_eq!(self.cols(), weight.cols(), "the input's width is not the weight's");
        Tensor::matrix(self.rows(), weight.rows(), |t, o| dot(self.row(t), weight.row(o)))
    }

    /// Each row by itself.
    pub(crate) fn each_row(&self, f: impl Fn(&[f64]) -> Vec<f64>) -> Tensor {
        let data: Vec<f64> = (0..self.rows()).flat_map(|r| f(self.row(r))).collect();
        Tensor::new(&[self.rows(), data.len() / self.rows()], data)
    }
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Each run of `width` elements of a row divided by its root mean square.
pub(crate) fn rms(x: &Tensor, width: usize, eps: f64) -> Tensor {
    x.each_row(|row| {
        let normed = |run: &[f64]| {
            let scale = 1.0 / (dot(run, run) / width as f64 + eps).sqrt();
            run.iter().map(|v| v * scale).collect::<Vec<_>>()
        };
        row.chunks(width).flat_map(normed).collect()
    })
}

/// Each row shifted to mean 0 and scaled to variance 1.
pub(crate) fn standardise(x: &Tensor, eps: f64) -> Tensor {
    let n = x.cols() as f64;
    x.each_row(|row| {
        let mean = row.iter().sum::<f64>() / n;
        let variance = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
        row.iter().map(|v| (v - mean) / (variance + eps).sqrt()).collect()
    })
}

pub(crate) fn softmax(row: &[f64]) -> Vec<f64> {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = row.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.iter().map(|e| e / sum).collect()
}

pub(crate) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

pub(crate) fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

/// GELU by the tanh formula, which every toy uses.
pub(crate) fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
}

pub(crate) fn relu(x: f64) -> f64 {
    x.max(0.0)
}
