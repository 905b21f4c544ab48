//! From a family's table and a configuration to dimensions, layers and tensors.

use std::collections::BTreeMap;

use super::dimension::{Axis, Cut, Dimension, Segment};
use super::families::{Ax, BlockRule, Draft, Family, Form, Part, Rule, Sizes, Stack, When};
use super::layer::{AttentionSpec, Block, Cache, ExpertsSpec, LayerSpec, Stream, Sum, Use};
use super::quantization::QuantFormat;
use super::safetensors::StoredType;
use super::tensors::Owner;
use crate::plan::Span;
use crate::{Error, Result};

/// Tensors at most; DeepSeek-V3 has 91 thousand.
const MAX_TENSORS: usize = 1 << 20;

/// A model as its table and its configuration imply it.
pub(super) struct Expanded {
    pub(super) dims: Vec<Dimension>,
    pub(super) layers: Vec<LayerSpec>,
    /// Also those that are not needed.
    pub(super) tensors: Vec<Expected>,
}

/// A tensor that the table knows.
pub(super) struct Expected {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) axes: Vec<Axis>,
    pub(super) stored: StoredType,
    pub(super) owner: Option<Owner>,
    pub(super) layer: Option<usize>,
    pub(super) used: Use,
    pub(super) weights_an_element: u32,
    /// Whether the model computes with it; else files may have it.
    pub(super) needed: bool,
}

/// Expands `family`'s table; `prefix` is what names start with.
pub(super) fn expand(family: &Family, draft: &Draft, prefix: &str) -> Result<Expanded> {
    let mut e = Expander {
        draft,
        dims: Vec::new(),
        ids: BTreeMap::new(),
        tensors: Vec::new(),
        file: draft.spec.source.display().to_string(),
        native: StoredType::of(draft.spec.dtype).ok_or_else(|| Error::Unsupported {
            file: draft.spec.source.display().to_string(),
            what: format!("{} weights are not supported: use F32, F16 or BF16", draft.spec.dtype),
        })?,
    };
    let mut layers = Vec::new();
    for (index, stack) in family.stacks.iter().enumerate() {
        let kinds = draft.kinds.get(index).map_or(&[][..], |k| k);
        for (n, &kind) in kinds.iter().enumerate() {
            let name = format!("{prefix}{}{}{n}", stack.list, if stack.list.is_empty() { "" } else { "." });
            let at = At { stack: index, layer: Some(layers.len()), first: n == 0 };
            let mut blocks = Vec::new();
            for block in stack.kinds[kind] {
                let first = e.tensors.len();
                for rule in block.rules {
                    e.rule(rule, at, &format!("{name}."))?;
                }
                let decodes = family.logits.is_some() && stack.stream == Stream::Tokens;
                blocks.push(e.block(block, index, first, decodes, draft.window(index, n)));
            }
            layers.push(LayerSpec { name, stream: draft.stream(stack.stream), blocks });
        }
    }
    // After the layers: of equal dimensions, an error names the heads rather than the vocabulary.
    for rule in family.stem {
        e.rule(rule, At { stack: 0, layer: None, first: false }, prefix)?;
    }
    for rule in family.head {
        e.rule(rule, At { stack: 0, layer: None, first: false }, "")?;
    }
    e.name_dimensions(family.stacks);
    e.set_granules()?;
    Ok(Expanded { dims: e.dims, layers, tensors: e.tensors })
}

struct Expander<'a> {
    draft: &'a Draft,
    dims: Vec<Dimension>,
    /// By stack and name.
    ids: BTreeMap<(usize, &'static str), usize>,
    tensors: Vec<Expected>,
    file: String,
    native: StoredType,
}

/// Where a rule is applied.
#[derive(Clone, Copy)]
struct At {
    stack: usize,
    layer: Option<usize>,
    /// Whether it is the first layer of its stack.
    first: bool,
}

/// An axis and its length.
#[derive(Clone)]
struct Side {
    size: usize,
    axis: Axis,
}

impl Side {
    fn whole(size: usize) -> Side {
        Side { size, axis: Axis::WHOLE }
    }

    /// The same indices with one element for every `n` of these.
    fn over(&self, n: usize) -> Side {
        let scale = |s: &Segment| {
            let per = s.per * n;
            let common = gcd(s.elements, per);
            Segment { elements: s.elements / common, per: per / common, ..*s }
        };
        Side {
            size: self.size.div_ceil(n),
            axis: Axis { segments: self.axis.segments.iter().map(scale).collect() },
        }
    }
}

/// One tensor of a linear layer: what its name ends with, its sides, type, use and weights an element.
type StoredPart = (&'static str, Vec<Side>, StoredType, Use, u32);

impl Expander<'_> {
    fn rule(&mut self, rule: &Rule, at: At, prefix: &str) -> Result<()> {
        if let Form::Group(rules) = rule.form {
            return rules.iter().try_for_each(|rule| self.rule(rule, at, prefix));
        }
        let needed = match rule.when {
            When::FirstLayerUnless(flag) => at.first || self.draft.flags.contains(flag),
            when => self.needs(when),
        };
        // What the model hasn't may be of a size that its configuration hasn't.
        if !needed && !self.has_sizes(&rule.form, at.stack) {
            return Ok(());
        }
        if rule.name.contains("{e}") {
            let experts = if needed { self.value(at.stack, "experts") } else { 0 };
            let dim = self.dimension(at.stack, "experts");
            for index in 0..experts {
                let name = format!("{prefix}{}", rule.name.replacen("{e}", &index.to_string(), 1));
                self.expand(rule, at, name, needed, Some(Owner { dim, index }))?;
            }
            return Ok(());
        }
        self.expand(rule, at, format!("{prefix}{}", rule.name), needed, None)
    }

    fn expand(
        &mut self,
        rule: &Rule,
        at: At,
        name: String,
        needed: bool,
        owner: Option<Owner>,
    ) -> Result<()> {
        let add = |e: &mut Self, name: String, sides: Vec<Side>, stored, used, weights, needed| {
            if e.tensors.len() >= MAX_TENSORS {
                let what = "the number of tensors".to_owned();
                return Err(Error::TooLarge {
                    what,
                    size: e.tensors.len() as u128 + 1,
                    limit: MAX_TENSORS as u128,
                });
            }
            let (shape, axes) = sides.into_iter().map(|s| (s.size, s.axis)).unzip();
            e.tensors.push(Expected {
                name,
                shape,
                axes,
                stored,
                owner,
                layer: at.layer,
                used,
                weights_an_element: weights,
                needed,
            });
            Ok(())
        };
        match rule.form {
            Form::Group(_) => Ok(()),
            Form::Tensor(axes) => {
                let sides: Vec<Side> = axes.iter().map(|&ax| self.side(at.stack, ax)).collect();
                // An embedding that is the output head too is multiplied with every token.
                let is_head = rule.used == Use::Lookup
                    && self.draft.flags.contains("tied")
                    && self.ids.get(&(0, "vocab")).is_some_and(|&v| sides.iter().any(|s| s.axis.has(v)));
                let used = if is_head { Use::Tokens } else { rule.used };
                add(self, name, sides, self.native, used, 1, needed)
            }
            Form::Stacked { experts, out, input } => {
                let [e, out, input] = [experts, out, input].map(|ax| self.side(at.stack, ax));
                let biases = vec![e.clone(), out.clone()];
                add(self, format!("{name}_bias"), biases, self.native, Use::Vector, 1, needed)?;
                match self.draft.spec.quantization.as_ref().map(|q| q.format) {
                    None => add(self, name, vec![e, input, out], self.native, rule.used, 1, needed),
                    Some(QuantFormat::Mxfp4) => {
                        let (u8, groups) = (StoredType::named("U8").unwrap_or(self.native), input.over(32));
                        let blocks = vec![e.clone(), out.clone(), groups.clone(), Side::whole(16)];
                        add(self, format!("{name}_blocks"), blocks, u8, rule.used, 2, needed)?;
                        let scales = vec![e, out, groups];
                        add(self, format!("{name}_scales"), scales, u8, Use::Vector, 0, needed)
                    }
                    Some(other) => Err(self.no_layout(&name, other)),
                }
            }
            Form::Linear { out, input, bias, transposed, quantised } => {
                let (out, input) = (self.side(at.stack, out), self.side(at.stack, input));
                let bias_side = out.clone();
                for (suffix, sides, stored, used, weights) in
                    self.linear(&name, rule.used, out, input, transposed, quantised)?
                {
                    add(self, format!("{name}.{suffix}"), sides, stored, used, weights, needed)?;
                }
                let has_bias = needed && self.needs(bias);
                add(self, format!("{name}.bias"), vec![bias_side], self.native, Use::Vector, 1, has_bias)
            }
        }
    }

    /// The tensors of one linear layer, without its bias.
    fn linear(
        &self,
        module: &str,
        used: Use,
        out: Side,
        input: Side,
        transposed: bool,
        quantised: bool,
    ) -> Result<Vec<StoredPart>> {
        let quantization = self.draft.spec.quantization.as_ref().filter(|q| quantised && q.covers(module));
        let named = |name| StoredType::named(name).unwrap_or(self.native);
        let (i32, f32, fp8) = (named("I32"), named("F32"), named("F8_E4M3"));
        Ok(match quantization.map(|q| q.format) {
            None if transposed => vec![("weight", vec![input, out], self.native, used, 1)],
            None => vec![("weight", vec![out, input], self.native, used, 1)],
            Some(QuantFormat::Mxfp4) => return Err(self.no_layout(module, QuantFormat::Mxfp4)),
            Some(format @ (QuantFormat::Fp8Blocks { .. } | QuantFormat::Fp8Tensor { .. })) if transposed => {
                return Err(self.no_layout(module, format));
            }
            Some(QuantFormat::Gptq { bits, group, scattered }) => {
                let pack = 32 / bits;
                let groups = match group {
                    0 => Side::whole(1),
                    _ if scattered => Side::whole(input.size.div_ceil(group)),
                    _ => input.over(group),
                };
                vec![
                    ("qweight", vec![input.over(pack), out.clone()], i32, used, pack as u32),
                    ("qzeros", vec![groups.clone(), out.over(pack)], i32, Use::Vector, 0),
                    ("scales", vec![groups, out], self.native, Use::Vector, 0),
                    ("g_idx", vec![input], i32, Use::Vector, 0),
                ]
            }
            Some(QuantFormat::Awq { bits, group }) => {
                let pack = 32 / bits;
                let groups = if group == 0 { Side::whole(1) } else { input.over(group) };
                vec![
                    ("qweight", vec![input, out.over(pack)], i32, used, pack as u32),
                    ("qzeros", vec![groups.clone(), out.over(pack)], i32, Use::Vector, 0),
                    ("scales", vec![groups, out], self.native, Use::Vector, 0),
                ]
            }
            Some(QuantFormat::Fp8Blocks { rows, columns }) => vec![
                ("weight", vec![out.clone(), input.clone()], fp8, used, 1),
                ("weight_scale_inv", vec![out.over(rows), input.over(columns)], f32, Use::Vector, 0),
            ],
            Some(QuantFormat::Fp8Tensor { fixed_input }) => {
                let mut parts = vec![
                    ("weight", vec![out, input], fp8, used, 1),
                    ("weight_scale", Vec::new(), f32, Use::Vector, 0),
                ];
                if fixed_input {
                    parts.push(("input_scale", Vec::new(), f32, Use::Vector, 0));
                }
                parts
            }
        })
    }

    /// Whether the configuration has every size that a rule asks for.
    fn has_sizes(&self, form: &Form, stack: usize) -> bool {
        let known = |name: &str| {
            let of = |sizes: Option<&Sizes>| sizes.is_some_and(|s| s.get(name).is_some());
            name.is_empty() || of(self.draft.sizes.get(stack)) || of(self.draft.sizes.first())
        };
        let has = |ax: &Ax| match ax {
            Ax::Whole(name) => known(name),
            Ax::Cut(parts) => parts.iter().all(|p| known(p.dim) && known(p.each)),
            Ax::ByGroup => known("heads") && known("kv_heads"),
        };
        match form {
            Form::Linear { out, input, .. } => has(out) && has(input),
            Form::Stacked { experts, out, input } => has(experts) && has(out) && has(input),
            Form::Tensor(axes) => axes.iter().all(has),
            Form::Group(_) => true,
        }
    }

    fn no_layout(&self, module: &str, format: QuantFormat) -> Error {
        let what = format!("{module} in {} has no known layout: use the unquantised weights", format.name());
        Error::Unsupported { file: self.file.clone(), what }
    }

    fn needs(&self, when: When) -> bool {
        match when {
            When::Always => true,
            When::If(flag) => self.draft.flags.contains(flag),
            When::Unless(flag) => !self.draft.flags.contains(flag),
            When::Unused | When::FirstLayerUnless(_) => false,
        }
    }

    /// The value of a size of this stack, or of the first.
    fn value(&self, stack: usize, name: &str) -> usize {
        let sizes = &self.draft.sizes;
        let own = sizes.get(stack).and_then(|s| s.get(name));
        let size = own.or_else(|| sizes.first().and_then(|s| s.get(name)));
        debug_assert!(size.is_some(), "no size {name}");
        size.map_or(0, |s| s.value)
    }

    fn side(&mut self, stack: usize, ax: Ax) -> Side {
        match ax {
            Ax::Whole(name) => Side::whole(if name.is_empty() { 1 } else { self.value(stack, name) }),
            Ax::Cut(parts) => {
                let segments: Vec<Segment> = parts.iter().map(|p| self.segment(stack, p)).collect();
                Side { size: segments.iter().map(Segment::len).sum(), axis: Axis { segments } }
            }
            Ax::ByGroup => {
                let (heads, kv) = (self.value(stack, "heads"), self.value(stack, "kv_heads"));
                let (q_dim, kv_dim) = (self.dimension(stack, "heads"), self.dimension(stack, "kv_heads"));
                let (width, group) = (self.value(stack, "head_dim"), heads / kv.max(1));
                let segments: Vec<Segment> = (0..kv)
                    .flat_map(|g| {
                        let q = Span::new(g * group, (g + 1) * group);
                        [
                            Segment { dim: q_dim, indices: q, elements: width, per: 1 },
                            Segment {
                                dim: kv_dim,
                                indices: Span::new(g, g + 1),
                                elements: 2 * width,
                                per: 1,
                            },
                        ]
                    })
                    .collect();
                Side { size: segments.iter().map(Segment::len).sum(), axis: Axis { segments } }
            }
        }
    }

    fn segment(&mut self, stack: usize, part: &Part) -> Segment {
        let each = if part.each.is_empty() { 1 } else { self.value(stack, part.each) };
        let dim = self.dimension(stack, part.dim);
        Segment { dim, indices: Span::new(0, self.dims[dim].size), elements: each * part.times, per: 1 }
    }

    /// The dimension of that name, made when it is first asked for, so that there are none that nothing uses.
    fn dimension(&mut self, stack: usize, name: &'static str) -> usize {
        // One vocabulary for all stacks.
        let stack = if name == "vocab" { 0 } else { stack };
        if let Some(&id) = self.ids.get(&(stack, name)) {
            return id;
        }
        let id = self.dims.len();
        // Query and key/value heads come together.
        let cut = match name {
            "heads" => Cut::Heads { kv: id + 1 },
            "kv_heads" => {
                self.dimension(stack, "heads");
                return id + 1;
            }
            "shared_ffn" => Cut::SharedColumns,
            "expert_ffn" => Cut::ExpertColumns,
            "experts" => Cut::Experts,
            "vocab" => Cut::Vocabulary,
            _ => Cut::Columns,
        };
        self.add_dimension(stack, name, cut);
        if name == "heads" {
            self.add_dimension(stack, "kv_heads", Cut::KvHeads { q: id });
        }
        id
    }

    fn add_dimension(&mut self, stack: usize, name: &'static str, cut: Cut) {
        let field = self.draft.sizes.get(stack).and_then(|s| s.get(name)).map_or("", |s| s.field);
        let size = self.value(stack, name);
        self.ids.insert((stack, name), self.dims.len());
        self.dims.push(Dimension { name: name.to_owned(), field, size, granule: 1, cut });
    }

    /// What a block's tensors, those from `first` on, make of it.
    fn block(
        &self,
        rule: &BlockRule,
        stack: usize,
        first: usize,
        decodes: bool,
        window: Option<usize>,
    ) -> Block {
        let dim = |name: &'static str| {
            let id = self.ids.get(&(stack, name)).copied()?;
            let uses =
                |t: &Expected| t.axes.iter().any(|a| a.has(id)) || t.owner.is_some_and(|o| o.dim == id);
            self.tensors[first..].iter().filter(|t| t.needed).any(uses).then_some(id)
        };
        let optional = |name| self.draft.sizes.get(stack).and_then(|s| s.get(name)).map(|s| s.value);
        let attention = dim("heads").map(|heads| {
            let head_dim = self.value(stack, "head_dim");
            AttentionSpec {
                heads,
                kv_heads: heads + 1,
                head_dim,
                v_head_dim: optional("v_head_dim").unwrap_or(head_dim),
                cache: match optional("latent") {
                    _ if !decodes => Cache::None,
                    Some(elements) => Cache::Latent { elements },
                    None => Cache::Heads,
                },
                window,
                cross: rule.cross,
                norm_across_heads: self.draft.flags.contains("norm_across_heads"),
            }
        });
        let experts = match (dim("experts"), dim("expert_ffn")) {
            (Some(experts), Some(ffn)) => {
                let per_token = self.value(stack, "experts_per_token");
                Some(ExpertsSpec { experts, ffn, per_token, shared: dim("shared_ffn") })
            }
            _ => None,
        };
        let sum =
            |&(after, stream): &(&str, _)| Sum { after: after.to_owned(), stream: self.draft.stream(stream) };
        let sums = rule.sums.iter().map(sum).collect();
        Block { attention, ffn: dim("ffn"), experts, sums }
    }

    /// Prefixes the dimensions of each stack with its name.
    fn name_dimensions(&mut self, stacks: &[Stack]) {
        for (&(stack, name), &id) in &self.ids {
            if name != "vocab" {
                self.dims[id].name = format!("{}{name}", stacks.get(stack).map_or("", |s| s.name));
            }
        }
    }

    /// Sets each dimension's granule from the segments that lay it out.
    fn set_granules(&mut self) -> Result<()> {
        let axes =
            || self.tensors.iter().filter(|t| t.needed).flat_map(|t| t.axes.iter().map(move |a| (t, a)));
        let mut granules = vec![1usize; self.dims.len()];
        for (_, axis) in axes() {
            for s in &axis.segments {
                // The length of every segment was computed, so these are small.
                let need = s.per / gcd(s.elements, s.per);
                granules[s.dim] = granules[s.dim] / gcd(granules[s.dim], need) * need;
            }
        }
        for (tensor, axis) in axes() {
            for (i, s) in axis.segments.iter().enumerate() {
                let last = i + 1 == axis.segments.len();
                let aligned = s.indices.start.is_multiple_of(granules[s.dim])
                    && (last || (s.indices.len() * s.elements).is_multiple_of(s.per));
                if !aligned {
                    let what = format!(
                        "tensor {}: its parts don't begin where a scale or a packed word does, so it can't be cut: \
                         use the unquantised weights",
                        tensor.name
                    );
                    return Err(Error::Unsupported { file: self.file.clone(), what });
                }
            }
        }
        for (dim, granule) in self.dims.iter_mut().zip(granules) {
            dim.granule = granule;
        }
        Ok(())
    }
}

pub(crate) fn gcd(mut a: usize, mut b: usize) -> usize {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}
