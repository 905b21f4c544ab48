//! Attention over one rank's heads.

use candle_core::{D, Device, Tensor};
use tensorwire::topology::ModelSpec;
use tensorwire::topology::plan::Attention;

use crate::layers::mine;
use crate::{Error, Result};

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
#[derive(Debug, PartialEq)]
struct Batch {
    q_start: usize,
    kv_start: usize,
    kv_heads: usize,
    size: usize,
}

impl Heads {
    pub(crate) fn new(plan: &Attention, rank: usize, spec: &ModelSpec) -> Result<Heads> {
        let (q_heads, kv_heads) = (spec.num_attention_heads, spec.num_key_value_heads);
        let q = mine(&plan.q_heads, rank, "query heads")?;
        let kv = mine(&plan.kv_heads, rank, "key/value heads")?;
        if q.is_empty() || q.end > q_heads || kv.end > kv_heads {
            return Err(Error::Plan(format!("rank {rank} has query heads {q:?} and key/value heads {kv:?}")));
        }
        let mut batches: Vec<Batch> = Vec::new();
        let mut head = q.start;
        while head < q.end {
            let group = head * kv_heads / q_heads;
            let size = (head..q.end).take_while(|h| h * kv_heads / q_heads == group).count();
            let kv_start = match group.checked_sub(kv.start) {
                Some(local) if group < kv.end => local,
                _ => {
                    let why =
                        format!("rank {rank} computes query head {head} without key/value head {group}");
                    return Err(Error::Plan(why));
                }
            };
            match batches.last_mut() {
                Some(batch) if batch.size == size => batch.kv_heads += 1,
                _ => batches.push(Batch { q_start: head - q.start, kv_start, kv_heads: 1, size }),
            }
            head += size;
        }
        Ok(Heads { q: q.len(), kv: kv.len(), batches })
    }

    /// Softmax(q k^T / sqrt(width)) v.
    ///
    /// `q` is `[q heads, tokens, width]`, contiguous; `k` and `v` are `[kv heads, context, width]`, where only
    /// the last two dimensions need be dense. Each token sees the context up to its own place if `causal`, the
    /// tokens being the context's last; else all of it. Returns `[tokens, q heads * width]`.
    pub(crate) fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Result<Tensor> {
        let (_, tokens, width) = q.dims3()?;
        let context = k.dim(1)?;
        let q = (q / (width as f64).sqrt())?;
        // One token sees everything before it: nothing to mask.
        let mask = if causal && tokens > 1 { Some(causal_mask(tokens, context)?) } else { None };
        let mut out = Vec::with_capacity(self.batches.len());
        for b in &self.batches {
            let heads = b.kv_heads * b.size;
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

    fn heads(q: (usize, usize), kv: (usize, usize)) -> Result<Heads> {
        let plan = Attention { q_heads: vec![Span::new(q.0, q.1)], kv_heads: vec![Span::new(kv.0, kv.1)] };
        let config = r#"{"model_type": "llama", "hidden_size": 112, "num_hidden_layers": 1, "vocab_size": 10,
            "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 30}"#;
        Heads::new(&plan, 0, &ModelSpec::from_config(config).unwrap())
    }

    #[test]
    fn groups_cut_at_both_ends() {
        // Query heads 5..23 of groups of 7: 2 of group 0, all of 1 and 2, 2 of group 3.
        let batches = heads((5, 23), (0, 4)).unwrap().batches;
        let expected = [(0, 0, 1, 2), (2, 1, 2, 7), (16, 3, 1, 2)];
        let expected =
            expected.map(|(q_start, kv_start, kv_heads, size)| Batch { q_start, kv_start, kv_heads, size });
        assert_eq!(batches, expected);
    }

    #[test]
    fn a_plan_without_a_needed_head_is_refused() {
        assert!(matches!(heads((5, 23), (1, 4)), Err(Error::Plan(_))));
        assert!(matches!(heads((5, 23), (0, 3)), Err(Error::Plan(_))));
        assert!(matches!(heads((5, 5), (0, 1)), Err(Error::Plan(_))));
        assert!(matches!(heads((5, 29), (0, 4)), Err(Error::Plan(_))));
    }
}
