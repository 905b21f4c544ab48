//! Attention over one rank's heads.

use candle_core::{D, Device, Tensor};
use tensorwire::topology::ModelSpec;
use tensorwire::topology::plan::Attention;

use crate::Result;

/// Which of its key/value heads each of a rank's query heads reads.
///
/// A rank's query heads may begin and end in the middle of a group that shares a key/value head, so groups
/// differ in size: all are full but the first and the last. Neighbours of one size are computed as one batch.
pub(crate) struct Heads {
    /// Query heads on this rank.
    pub(crate) q: usize,
    /// Key/value heads on this rank, other ranks' copies of them not counted.
    pub(crate) kv: usize,
    batches: Vec<Batch>,
}

/// Consecutive key/value heads, each read by `size` consecutive query heads.
struct Batch {
    q_start: usize,
    kv_start: usize,
    kv_heads: usize,
    size: usize,
}

impl Batch {
    fn q_heads(&self) -> usize {
        self.kv_heads * self.size
    }
}

impl Heads {
    /// The heads of one rank, as a checked plan has them.
    pub(crate) fn new(plan: &Attention, rank: usize, spec: &ModelSpec) -> Heads {
        let (q, kv) = (plan.q_heads[rank], plan.kv_heads[rank]);
        let kv_of = |head| head * spec.num_key_value_heads / spec.num_attention_heads;
        let mut batches: Vec<Batch> = Vec::new();
        for kv_head in kv.start..kv.end {
            let (q_start, kv_start) = (batches.iter().map(Batch::q_heads).sum(), kv_head - kv.start);
            let size = (q.start..q.end).filter(|&head| kv_of(head) == kv_head).count();
            match batches.last_mut() {
                Some(batch) if batch.size == size => batch.kv_heads += 1,
                _ => batches.push(Batch { q_start, kv_start, kv_heads: 1, size }),
            }
        }
        Heads { q: q.len(), kv: kv.len(), batches }
    }

    /// Softmax(q k^T / sqrt(width)) v.
    ///
    /// `q` is `[q heads, tokens, width]`, contiguous; `k` and `v` are `[kv heads, context, width]`, where
    /// only the last two dimensions need be dense. Each token sees the context up to its own place if
    /// `causal`, the tokens being the context's last; else all of it. Returns `[tokens, q heads * width]`.
    pub(crate) fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Result<Tensor> {
        let (_, tokens, width) = q.dims3()?;
        let context = k.dim(1)?;
        let q = (q / (width as f64).sqrt())?;
        // One token sees everything before it: nothing to mask.
        let mask = if causal && tokens > 1 { Some(causal_mask(tokens, context)?) } else { None };
        let mut out = Vec::with_capacity(self.batches.len());
        for b in &self.batches {
            let heads = b.q_heads();
            // The query heads of a group stand below one another, as more rows of one product.
            let q = q.narrow(0, b.q_start, heads)?.reshape((b.kv_heads, b.size * tokens, width))?;
            let k = k.narrow(0, b.kv_start, b.kv_heads)?;
            let v = v.narrow(0, b.kv_start, b.kv_heads)?;
            let mut scores = q.matmul(&k.transpose(1, 2)?)?;
            if let Some(mask) = &mask {
                let by_head = scores.reshape((heads, tokens, context))?.broadcast_add(mask)?;
                scores = by_head.reshape((b.kv_heads, b.size * tokens, context))?;
            }
            let mixed = candle_nn::ops::softmax_last_dim(&scores)?.matmul(&v)?;
            out.push(mixed.reshape((heads, tokens, width))?);
        }
        let out = if out.len() == 1 { out.swap_remove(0) } else { Tensor::cat(&out, 0)? };
        Ok(out.transpose(0, 1)?.flatten_from(D::Minus2)?)
    }
}

/// `x [tokens, heads * width]` as `[heads, tokens, width]`, contiguous.
pub(crate) fn split_heads(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (tokens, all) = x.dims2()?;
    Ok(x.reshape((tokens, heads, all / heads))?.transpose(0, 1)?.contiguous()?)
}

/// `[tokens, context]`: 0 where a token may look, minus infinity where not.
fn causal_mask(tokens: usize, context: usize) -> Result<Tensor> {
    let past = context - tokens;
    let row = |t| (0..context).map(move |c| if c > past + t { f32::NEG_INFINITY } else { 0.0 });
    Ok(Tensor::from_iter((0..tokens).flat_map(row), &Device::Cpu)?.reshape((tokens, context))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensorwire::topology::plan::Span;

    fn heads(q: (usize, usize), kv: (usize, usize)) -> Vec<[usize; 4]> {
        let plan = Attention { q_heads: vec![Span::new(q.0, q.1)], kv_heads: vec![Span::new(kv.0, kv.1)] };
        let config = r#"{"model_type": "llama", "hidden_size": 112, "num_hidden_layers": 1, "vocab_size": 10,
            "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 30}"#;
        let heads = Heads::new(&plan, 0, &ModelSpec::from_config(config).unwrap());
        heads.batches.iter().map(|b| [b.q_start, b.kv_start, b.kv_heads, b.size]).collect()
    }

    #[test]
    fn neighbours_of_one_size_are_one_batch() {
        assert_eq!(heads((0, 28), (0, 4)), [[0, 0, 4, 7]]);
        assert_eq!(heads((7, 14), (1, 2)), [[0, 0, 1, 7]]);
        assert_eq!(heads((8, 10), (1, 2)), [[0, 0, 1, 2]]);
        // Of groups of 7: two of group 0, all of 1 and 2, two of group 3.
        assert_eq!(heads((5, 23), (0, 4)), [[0, 0, 1, 2], [2, 1, 2, 7], [16, 3, 1, 2]]);
        // Groups cut to the same size.
        assert_eq!(heads((11, 17), (1, 3)), [[0, 0, 2, 3]]);
    }
}
