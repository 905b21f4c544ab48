//! Attention over a range of heads, and how positions enter it.

use super::tensor::{Tensor, dot};

/// What attention does with a score, apart from who holds which head.
pub(crate) struct Scores {
    /// Elements of a query or key head.
    pub(crate) dim: usize,
    pub(crate) scale: f64,
    /// Scores are squeezed into `-cap..cap`.
    pub(crate) cap: Option<f64>,
    /// A query sees keys up to its own position alone.
    pub(crate) causal: bool,
    /// And of these only the last so many.
    pub(crate) window: Option<usize>,
}

impl Scores {
    /// Every query sees every key; scores are scaled by the root of the head's size.
    pub(crate) fn full(dim: usize) -> Scores {
        Scores { dim, scale: (dim as f64).powf(-0.5), cap: None, causal: false, window: None }
    }

    pub(crate) fn causal(dim: usize) -> Scores {
        Scores { causal: true, ..Scores::full(dim) }
    }

    fn sees(&self, query: usize, key: usize) -> bool {
        !self.causal || (key <= query && self.window.is_none_or(|w| query - key < w))
    }
}

/// Attention of the query heads side by side in `q`: head `i` reads key/value head `reads[i]` of `k` and `v`.
///
/// `bias` is added to a score `(head, query, key)`; a sink is one more score of its head, without a value.
pub(crate) fn attend(
    scores: &Scores,
    reads: &[usize],
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    bias: &dyn Fn(usize, usize, usize) -> f64,
    sinks: Option<&[f64]>,
) -> Tensor {
    let dim = scores.dim;
    assert_eq!(q.cols(), reads.len() * dim, "the queries are of {} heads", reads.len());
    let kv_heads = k.cols() / dim;
    assert_eq!(k.cols(), kv_heads * dim, "the keys are whole heads");
    let v_dim = v.cols() / kv_heads;
    assert_eq!(v.cols(), kv_heads * v_dim, "the values are whole heads");
    let heads = reads.iter().enumerate().map(|(head, &kv)| {
        assert!(kv < kv_heads, "key/value head {kv} of {kv_heads} is on another rank");
        let rows = (0..q.rows()).flat_map(|i| {
            let query = &q.row(i)[head * dim..][..dim];
            let score = |j: usize| {
                let s = dot(query, &k.row(j)[kv * dim..][..dim]) * scores.scale;
                scores.cap.map_or(s, |cap| cap * (s / cap).tanh()) + bias(head, i, j)
            };
            let seen: Vec<usize> = (0..k.rows()).filter(|&j| scores.sees(i, j)).collect();
            let all: Vec<f64> =
                seen.iter().map(|&j| score(j)).chain(sinks.map(|sinks| sinks[head])).collect();
            let weights = super::tensor::softmax(&all);
            (0..v_dim)
                .map(|c| {
                    let value = |&j: &usize| v.at(j, kv * v_dim + c);
                    seen.iter().map(value).zip(&weights).map(|(x, w)| x * w).sum()
                })
                .collect::<Vec<f64>>()
        });
        Tensor::new(&[q.rows(), v_dim], rows.collect())
    });
    Tensor::beside(&heads.collect::<Vec<_>>())
}

/// Which elements of a head rotate together.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Pairs {
    /// `i` and `i + n/2` (Llama as Hugging Face stores it).
    Halves,
    /// `2i` and `2i + 1` (GPT-J, DeepSeek, Flux).
    Neighbours,
}

/// Rotates the first `rotary` elements of each head of `dim` by the row's position.
pub(crate) fn rotate(x: &Tensor, dim: usize, rotary: usize, theta: f64, pairs: Pairs) -> Tensor {
    let half = rotary / 2;
    let angles = |position: usize| {
        (0..half).map(move |i| position as f64 * theta.powf(-(i as f64) / half as f64)).collect()
    };
    rotate_by(x, dim, &(0..x.rows()).map(angles).collect::<Vec<_>>(), pairs)
}

/// Rotates the first pairs of each head of `dim` by the angles of its row.
pub(crate) fn rotate_by(x: &Tensor, dim: usize, angles: &[Vec<f64>], pairs: Pairs) -> Tensor {
    let turned = angles.iter().enumerate().flat_map(|(row, angles)| {
        let mut row = x.row(row).to_vec();
        for head in row.chunks_mut(dim) {
            for (i, (sin, cos)) in angles.iter().map(|a| a.sin_cos()).enumerate() {
                let (a, b) = match pairs {
                    Pairs::Halves => (i, i + angles.len()),
                    Pairs::Neighbours => (2 * i, 2 * i + 1),
                };
                (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
            }
        }
        row
    });
    Tensor::new(&[x.rows(), x.cols()], turned.collect())
}

/// T5's bucket of a relative position (key minus query).
pub(crate) fn bucket(relative: i64, both_ways: bool, buckets: usize, farthest: usize) -> usize {
    let (start, buckets, distance) = if both_ways {
        (if relative > 0 { buckets / 2 } else { 0 }, buckets / 2, relative.unsigned_abs() as usize)
    } else {
        (0, buckets, (-relative.min(0)) as usize)
    };
    let exact = buckets / 2;
    if distance < exact {
        return start + distance;
    }
    let log = (distance as f64 / exact as f64).ln() / (farthest as f64 / exact as f64).ln();
    start + (exact + (log * (buckets - exact) as f64) as usize).min(buckets - 1)
}
