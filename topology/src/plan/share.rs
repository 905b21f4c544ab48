//! What each rank carries: bytes and operations.

use super::{LayerShare, RankShare, Slice};
use crate::model::{AttentionSpec, Block, Cache, LayerSpec, ModelSpec, Stream, TensorSpec, Use};
use crate::shard::Shares;

/// What all ranks carry.
pub(super) struct Carried {
    /// By layer, then by rank.
    pub(super) layers: Vec<Vec<LayerShare>>,
    /// Of what is in no layer, by rank.
    rest: Vec<LayerShare>,
    /// The largest part of a tensor that each rank reads.
    largest: Vec<u64>,
}

impl Carried {
    pub(super) fn of(spec: &ModelSpec, shares: &Shares) -> Carried {
        let none = vec![LayerShare::default(); shares.world];
        let mut carried = Carried {
            layers: vec![none.clone(); spec.layers.len()],
            rest: none,
            largest: vec![0; shares.world],
        };
        for tensor in &spec.tensors {
            for rank in 0..shares.world {
                let elements = shares.held(tensor, rank);
                let share = match tensor.layer {
                    Some(n) => &mut carried.layers[n][rank],
                    None => &mut carried.rest[rank],
                };
                add(share, spec, shares, tensor, elements);
                let largest = &mut carried.largest[rank];
                *largest = (*largest).max(elements * tensor.stored.size());
            }
        }
        for (layer, by_rank) in spec.layers.iter().zip(&mut carried.layers) {
            for (rank, share) in by_rank.iter_mut().enumerate() {
                for attention in layer.blocks.iter().filter_map(|b| b.attention.as_ref()) {
                    let q = shares.share(attention.heads, rank).len() as u64;
                    share.flops_per_pair += 2 * q * (attention.head_dim + attention.v_head_dim) as u64;
                    share.kv_bytes_per_token += kv_bytes(spec, shares, attention, rank);
                }
            }
        }
        carried
    }

    pub(super) fn rank(&self, spec: &ModelSpec, shares: &Shares, rank: usize) -> RankShare {
        let all = || self.layers.iter().map(|l| &l[rank]).chain([&self.rest[rank]]);
        let weight_bytes = all().map(|s| s.weight_bytes).sum();
        let widest = spec.layers.iter().map(|l| activations(l, shares, rank)).max().unwrap_or(0);
        let logits = match (&spec.logits, spec.vocab) {
            (Some(_), Some(dim)) => shares.dims[dim].padded,
            _ => 0,
        };
        // The residual stream and a block's input and output, what a layer computes, and the logits.
        let elements = (3 * spec.hidden_size + widest + logits) as u64;
        RankShare {
            rank,
            weight_bytes,
            kv_bytes_per_token: all().map(|s| s.kv_bytes_per_token).sum(),
            peak_bytes: weight_bytes + self.largest[rank] + elements * spec.dtype.size() as u64,
        }
    }

    /// Bytes of weights that one rank reads for a token of the model's own.
    pub(super) fn read_bytes(&self, spec: &ModelSpec, rank: usize) -> u64 {
        let own = spec.layers.iter().zip(&self.layers).filter(|(l, _)| l.stream != Stream::Context);
        own.map(|(_, by_rank)| by_rank[rank].read_bytes).sum::<u64>() + self.rest[rank].read_bytes
    }
}

fn add(share: &mut LayerShare, spec: &ModelSpec, shares: &Shares, tensor: &TensorSpec, elements: u64) {
    let bytes = elements * tensor.stored.size();
    let flops = 2 * elements * u64::from(tensor.weights_an_element);
    share.weight_bytes += bytes;
    match tensor.used {
        Use::Lookup => {}
        Use::Context => share.flops_per_context_token += flops,
        Use::Call => {
            share.flops_per_call += flops;
            share.read_bytes += bytes;
        }
        Use::Vector | Use::Tokens | Use::Routed => {
            let experts = tensor.layer.and_then(|n| spec.layers[n].blocks.iter().find_map(|b| b.experts));
            let routed = experts.filter(|_| tensor.owner.is_some() || tensor.used == Use::Routed);
            let (of, read) = match routed {
                // A token is at some of the experts. Where these are shared, the rank that has most of a token's
                // experts has at least its part of them rounded up.
                Some(e) => {
                    let all = spec.dims[e.experts].size as u64;
                    let per_token = (e.per_token as u64).min(all);
                    let groups = shares.experts.groups(shares.world) as u64;
                    ((per_token, all), ((per_token.div_ceil(groups) * groups).min(all), all))
                }
                None => ((1, 1), (1, 1)),
            };
            let part = |x: u64, (a, b): (u64, u64)| (u128::from(x) * u128::from(a) / u128::from(b)) as u64;
            share.read_bytes += part(bytes, read);
            if tensor.used != Use::Vector {
                share.flops_per_token += part(flops, of);
            }
        }
    }
}

/// Bytes that one rank keeps of a token, of one attention. What cross-attention keeps is of the context.
fn kv_bytes(spec: &ModelSpec, shares: &Shares, attention: &AttentionSpec, rank: usize) -> u64 {
    let elements = match attention.cache {
        _ if attention.cross => 0,
        Cache::None => 0,
        Cache::Heads => {
            shares.share(attention.kv_heads, rank).len() * (attention.head_dim + attention.v_head_dim)
        }
        Cache::Latent { elements } => elements,
    };
    (elements * spec.dtype.size()) as u64
}

/// Elements that a layer computes of one token on one rank: queries, keys, values and the attention's result; gate
/// and up of the feed-forward layer, of a token's experts and the shared one together.
fn activations(layer: &LayerSpec, shares: &Shares, rank: usize) -> usize {
    let width = |dim: usize| shares.share(dim, rank).len();
    let of = |block: &Block| {
        let attention = block
            .attention
            .as_ref()
            .map_or(0, |a| (width(a.heads) + width(a.kv_heads)) * (a.head_dim + a.v_head_dim));
        let experts = block.experts.map_or(0, |e| e.per_token * width(e.ffn) + e.shared.map_or(0, width));
        attention + 2 * (block.ffn.map_or(0, width) + experts)
    };
    layer.blocks.iter().map(of).sum()
}

impl Shares {
    /// Elements of a tensor that `rank` holds.
    pub(crate) fn held(&self, tensor: &TensorSpec, rank: usize) -> u64 {
        self.slices(tensor, rank).map_or(0, |slices| elements(tensor, &slices))
    }
}

/// Elements of the part of a tensor that these slices are.
pub(super) fn elements(tensor: &TensorSpec, slices: &[Slice]) -> u64 {
    let part = |(dim, &size): (usize, &usize)| {
        let mut own = slices.iter().filter(|s| s.dim == dim).peekable();
        if own.peek().is_some() { own.map(|s| s.range.len() as u64).sum() } else { size as u64 }
    };
    tensor.shape.iter().enumerate().map(part).product()
}
