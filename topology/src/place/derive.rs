//! A model's description as a workload.

use super::workload::{Attention, Block, Exchange, Keys, Kind, Part, Split, Work, Workload};
use crate::model::{self, Cache, Cut, ModelSpec, Stream, TensorSpec, Use};

/// Tokens of the text that cross-attention sees where nothing says how many: a T5's 512.
const TEXT_TOKENS: usize = 512;

impl Workload {
    /// A model as its files describe it. It makes tokens if it has logits.
    ///
    /// The encoder of a model that also decodes counts with its weights alone: it runs once a request, not in a step.
    /// Quantised heads that are only cut several at a time are counted singly, so that uneven shares of them may need a
    /// little more cache than is said here.
    pub fn of(spec: &ModelSpec) -> Workload {
        let deriver = Deriver { spec, element: spec.dtype.size() as u64, text: TEXT_TOKENS as f64 };
        deriver.workload()
    }
}

struct Deriver<'a> {
    spec: &'a ModelSpec,
    /// Bytes of an activation's element.
    element: u64,
    /// Tokens of the context that cross-attention sees.
    text: f64,
}

impl Deriver<'_> {
    fn workload(&self) -> Workload {
        let spec = self.spec;
        let mut of_layer: Vec<Vec<&TensorSpec>> = vec![Vec::new(); spec.layers.len()];
        let mut outside = Vec::new();
        for tensor in &spec.tensors {
            match tensor.layer {
                Some(layer) => of_layer[layer].push(tensor),
                None => outside.push(tensor),
            }
        }
        let [first, last] = self.ends(&outside);
        let tied_bytes = if spec.tie_word_embeddings { first.parts[0].cut.bytes } else { 0 };
        let mut blocks = vec![first];
        let mut order = vec![0];
        for (layer, tensors) in spec.layers.iter().zip(&of_layer) {
            let block = self.layer(layer, tensors);
            let known = blocks.iter().position(|b| *b == block);
            order.push(known.unwrap_or(blocks.len()));
            if known.is_none() {
                blocks.push(block);
            }
        }
        if let Some(last) = last.parts.first().is_some_and(|p| p.cut.reads > 0).then_some(last) {
            order.push(blocks.len());
            blocks.push(last);
        }
        let decodes = spec.logits.is_some();
        Workload {
            name: spec.architecture.model_type().to_owned(),
            kind: if decodes { Kind::Decoder } else { Kind::Forward { branches: 1, latent_bytes: 0 } },
            bits: self.bits(),
            stream_bytes: spec.hidden_size as u64 * self.element,
            blocks,
            order,
            tied_bytes,
        }
    }

    /// Bits of the operands of most products: those of 8-bit floats are multiplied as such, those of other quantised
    /// weights are unpacked first.
    fn bits(&self) -> u32 {
        let products =
            self.spec.tensors.iter().filter(|t| t.used == Use::Tokens && t.weights_an_element == 1);
        let narrow = products.filter(|t| t.stored.size() == 1).map(TensorSpec::bytes).sum::<u64>();
        if 2 * narrow > self.spec.weight_bytes() { 8 } else { 8 * self.element.clamp(2, 4) as u32 }
    }

    /// The embedding with all else outside the layers, and the output head.
    fn ends(&self, tensors: &[&TensorSpec]) -> [Block; 2] {
        let spec = self.spec;
        let rows = spec.vocab.map_or(Split::Whole, |v| Split::Rows { rows: spec.dims[v].size });
        let (mut embedding, mut head) = (Part::new("embedding", rows), Part::new("head", rows));
        if let Some(padded) = spec.vocab.map(|v| spec.dims[v].size as u64) {
            embedding.after = if spec.embeddings.is_empty() { Exchange::None } else { Exchange::Sum };
            head.after = Exchange::Gather { row_bytes: padded * self.element };
        }
        for tensor in tensors {
            let of_vocabulary = spec.vocab.is_some_and(|v| tensor.axes.iter().any(|a| a.has(v)));
            // Logits are made of one token of each sequence.
            let logits = Work {
                bytes: tensor.bytes(),
                reads: tensor.bytes(),
                flops_per_token: 0.0,
                flops_per_sequence: 2.0 * tensor.parameters() as f64,
            };
            match (of_vocabulary, tensor.used) {
                (true, Use::Tokens) if spec.tie_word_embeddings => {
                    add(&mut embedding.cut, &Work { bytes: tensor.bytes(), ..Work::default() });
                    add(&mut head.cut, &Work { bytes: 0, ..logits });
                    embedding.largest[0] = embedding.largest[0].max(tensor.bytes());
                }
                (true, Use::Lookup) => {
                    add(&mut embedding.cut, &Work { bytes: tensor.bytes(), ..Work::default() });
                    embedding.largest[0] = embedding.largest[0].max(tensor.bytes());
                }
                (true, _) => {
                    add(&mut head.cut, &logits);
                    head.largest[0] = head.largest[0].max(tensor.bytes());
                }
                (false, _) => {
                    add(&mut embedding.whole, &self.work(tensor, 1.0));
                    embedding.largest[1] = embedding.largest[1].max(tensor.bytes());
                }
            }
        }
        let block = |name: &str, part| Block { name: name.to_owned(), parts: vec![part] };
        [block("embedding", embedding), block("head", head)]
    }

    fn layer(&self, layer: &model::LayerSpec, tensors: &[&TensorSpec]) -> Block {
        let prefix = format!("{}.", layer.name);
        let mut parts: Vec<Vec<Part>> = layer.blocks.iter().map(|b| self.parts(b, layer.stream)).collect();
        for tensor in tensors {
            let rest = tensor.name.strip_prefix(&prefix).unwrap_or(&tensor.name);
            let at = self.block_of(layer, rest, tensor);
            if let Some(parts) = parts.get_mut(at) {
                self.place(tensor, &layer.blocks[at], parts);
            }
        }
        let mut parts: Vec<Part> = parts.into_iter().flatten().collect();
        for part in &mut parts {
            // A gated layer has three matrices, and two values between them for each column.
            if let Split::Columns { .. } | Split::Shared { .. } = part.split {
                part.wide_bytes = self.wide(part.cut.flops_per_token / 2.0, part.wide_bytes);
            }
            if layer.stream == Stream::Context && self.spec.logits.is_some() {
                for work in [&mut part.cut, &mut part.kv, &mut part.whole] {
                    *work = Work { bytes: work.bytes, ..Work::default() };
                }
                (part.attention, part.wide_bytes, part.after) = (None, 0, Exchange::None);
            }
        }
        Block { name: "layer".to_owned(), parts }
    }

    /// Bytes a token between the products of a feed-forward layer of `columns` columns and so many elements.
    fn wide(&self, elements: f64, columns: u64) -> u64 {
        let each = columns as f64 * self.spec.hidden_size as f64;
        let between = if each > 0.0 { (elements / each).round() as u64 } else { 0 };
        columns * between.saturating_sub(1).max(1) * self.element
    }

    /// A block's parts: attention, dense columns, experts; the sums come after the last.
    fn parts(&self, block: &model::Block, stream: Stream) -> Vec<Part> {
        let dims = &self.spec.dims;
        let mut parts = Vec::new();
        if let Some(a) = &block.attention {
            let (q, kv) = (dims[a.heads].size, dims[a.kv_heads].size);
            let mut part = Part::new("attention", Split::Heads { q, kv });
            let kv_elements = match a.cache {
                Cache::Latent { elements } => elements,
                Cache::None | Cache::Heads => kv * (a.head_dim + a.v_head_dim),
            };
            let query_bytes = (q * a.head_dim) as u64 * self.element;
            let kv_bytes = kv_elements as u64 * self.element;
            let keys = match a.cache {
                _ if a.cross => Keys::Other { tokens: self.text as usize },
                Cache::None => Keys::All,
                Cache::Heads | Cache::Latent { .. } => Keys::Causal { window: a.window },
            };
            part.attention = Some(Attention {
                flops_per_pair: 2.0 * (q * (a.head_dim + a.v_head_dim)) as f64,
                keys,
                query_bytes,
                kv_bytes,
                kv_whole: matches!(a.cache, Cache::Latent { .. }),
            });
            part.wide_bytes = 2 * query_bytes + if a.cross { 0 } else { kv_bytes };
            parts.push(part);
        }
        if let Some(ffn) = block.ffn {
            let mut part = Part::new("mlp", Split::Columns { units: dims[ffn].units() });
            // The number of columns, until their weights are known.
            part.wide_bytes = dims[ffn].size as u64;
            parts.push(part);
        }
        if let Some(e) = block.experts {
            if let Some(shared) = e.shared {
                let mut part = Part::new("shared expert", Split::Shared { units: dims[shared].units() });
                part.wide_bytes = dims[shared].size as u64;
                parts.push(part);
            }
            let (count, units) = (dims[e.experts].size, dims[e.ffn].units());
            let mut part = Part::new("experts", Split::Experts { count, per_token: e.per_token, units });
            part.wide_bytes = 2 * (e.per_token * dims[e.ffn].size) as u64 * self.element;
            parts.push(part);
        }
        if parts.is_empty() {
            parts.push(Part::new("other", Split::Whole));
        }
        let sums = block.sums.iter().filter(|s| s.stream == stream).count();
        for n in 0..sums {
            match parts.last_mut() {
                Some(last) if n == 0 => last.after = Exchange::Sum,
                _ => {
                    let mut more = Part::new("sum", parts[0].split);
                    more.after = Exchange::Sum;
                    parts.push(more);
                }
            }
        }
        parts
    }

    /// Which block a tensor belongs to: the one whose product has its name's first part, or that shares what it has.
    fn block_of(&self, layer: &model::LayerSpec, name: &str, tensor: &TensorSpec) -> usize {
        let first = name.split('.').next().unwrap_or(name);
        let named = |b: &model::Block| b.sums.iter().any(|s| s.after.split('.').next() == Some(first));
        let shares = |b: &model::Block| {
            let attention = b.attention.iter().flat_map(|a| [a.heads, a.kv_heads]);
            let experts = b.experts.iter().flat_map(|e| [Some(e.experts), Some(e.ffn), e.shared]).flatten();
            let mut dims = attention.chain(b.ffn).chain(experts);
            dims.any(|d| tensor.axes.iter().any(|a| a.has(d)) || tensor.owner.is_some_and(|o| o.dim == d))
        };
        let blocks = &layer.blocks;
        let both = blocks.iter().position(|b| named(b) && shares(b));
        both.or_else(|| blocks.iter().position(shares)).or_else(|| blocks.iter().position(named)).unwrap_or(0)
    }

    /// Adds a tensor to the part that shares it.
    fn place(&self, tensor: &TensorSpec, block: &model::Block, parts: &mut [Part]) {
        let axis = tensor.axes.iter().find(|a| !a.is_whole());
        let of_experts = |d: usize| matches!(self.spec.dims[d].cut, Cut::Experts | Cut::ExpertColumns);
        let owned = tensor.owner.is_some_and(|o| of_experts(o.dim))
            || tensor.axes.iter().flat_map(|a| &a.segments).any(|s| of_experts(s.dim));
        if owned {
            let found = parts.iter_mut().find_map(|p| match p.split {
                Split::Experts { count, per_token, .. } => Some((p, per_token as f64 / count as f64)),
                _ => None,
            });
            if let Some((part, routed)) = found {
                add(&mut part.cut, &self.work(tensor, routed));
                part.largest[0] = part.largest[0].max(tensor.bytes());
            }
            return;
        }
        let Some(axis) = axis else {
            let part = &mut parts[0];
            add(&mut part.whole, &self.work(tensor, 1.0));
            part.largest[1] = part.largest[1].max(tensor.bytes());
            return;
        };
        // Fused tensors have several things along one axis.
        let all: usize = axis.segments.iter().map(model::Segment::len).sum();
        let kinds: std::collections::BTreeSet<usize> = axis.segments.iter().map(|s| s.dim).collect();
        for dim in kinds {
            let len: usize = axis.segments.iter().filter(|s| s.dim == dim).map(model::Segment::len).sum();
            let work = part_of(&self.work(tensor, 1.0), len, all);
            let is_kv = matches!(self.spec.dims[dim].cut, Cut::KvHeads { .. });
            let is_heads = is_kv || matches!(self.spec.dims[dim].cut, Cut::Heads { .. });
            let shared = block.experts.and_then(|e| e.shared) == Some(dim);
            let fits = |p: &Part| match p.split {
                Split::Heads { .. } => is_heads,
                Split::Shared { .. } => shared,
                Split::Columns { .. } => !is_heads && !shared,
                _ => false,
            };
            let at = parts.iter().position(fits).unwrap_or(0);
            let part = &mut parts[at];
            add(if is_kv { &mut part.kv } else { &mut part.cut }, &work);
            part.largest[0] = part.largest[0].max(work.bytes);
        }
    }

    fn work(&self, tensor: &TensorSpec, routed: f64) -> Work {
        let (bytes, flops) = (tensor.bytes(), 2.0 * tensor.parameters() as f64);
        let work = Work { bytes, reads: bytes, flops_per_token: 0.0, flops_per_sequence: 0.0 };
        match tensor.used {
            Use::Vector => work,
            Use::Lookup => Work { reads: 0, ..work },
            Use::Tokens => Work { flops_per_token: flops, ..work },
            Use::Routed => Work { flops_per_token: flops * routed, ..work },
            Use::Context => Work { flops_per_sequence: flops * self.text, ..work },
            Use::Call => Work { flops_per_sequence: flops, ..work },
        }
    }
}

fn add(all: &mut Work, one: &Work) {
    all.bytes += one.bytes;
    all.reads += one.reads;
    all.flops_per_token += one.flops_per_token;
    all.flops_per_sequence += one.flops_per_sequence;
}

fn part_of(work: &Work, of: usize, all: usize) -> Work {
    let part = |bytes: u64| (u128::from(bytes) * of as u128 / all.max(1) as u128) as u64;
    let fraction = of as f64 / all.max(1) as f64;
    Work {
        bytes: part(work.bytes),
        reads: part(work.reads),
        flops_per_token: work.flops_per_token * fraction,
        flops_per_sequence: work.flops_per_sequence * fraction,
    }
}
