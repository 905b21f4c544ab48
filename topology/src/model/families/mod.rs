//! The architectures as tables: every tensor's name and what its axes are made of.
//!
//! A table says what a linear layer's outputs and inputs are; how it is stored (transposed, with a bias,
//! quantised) is expanded from there. One whose outputs are shared is column-parallel, and its bias is cut
//! with it. One whose inputs are shared is row-parallel: each rank computes a partial sum, which its block
//! lists in [`BlockRule::sums`], and the bias is on every rank and added once after it.

mod bert;
mod classic;
mod diffusion;
mod llama;
mod moe;
mod t5;
mod vae;
mod vision;

use std::collections::{BTreeMap, BTreeSet};

use super::config::Fields;
use super::layer::{Stream, Use};
use super::{Architecture, MAX_DIM, ModelSpec};
use crate::Result;

pub(super) use Ax::{ByGroup, Cut, Whole};

pub(super) use llama::UNKNOWN;

/// Every family.
pub(super) const FAMILIES: &[&Family] = &[
    &bert::BERT,
    &llama::LLAMA,
    &llama::QWEN2,
    &llama::MISTRAL,
    &llama::QWEN3,
    &llama::GEMMA2,
    &llama::GEMMA3,
    &llama::PHI3,
    &moe::MIXTRAL,
    &moe::QWEN2_MOE,
    &moe::QWEN3_MOE,
    &moe::DEEPSEEK_V2,
    &moe::DEEPSEEK_V3,
    &moe::GPT_OSS,
    &classic::GPT2,
    &classic::GPT_NEOX,
    &classic::FALCON,
    &t5::T5,
    &t5::UMT5,
    &vision::SIGLIP_VISION,
    &vision::SIGLIP,
    &vision::VIT,
    &diffusion::COSMOS,
    &diffusion::FLUX,
    &diffusion::WAN,
    &vae::COSMOS_VAE,
];

/// An architecture.
pub(super) struct Family {
    pub(super) architecture: Architecture,
    /// Reads the configuration.
    pub(super) read: fn(&Fields) -> Result<Draft>,
    /// What the names of `stem` and of the layers may start with; the first is the usual one.
    pub(super) prefixes: &'static [&'static str],
    /// Tensors outside the layers. The first, which every model has, tells prefixes apart.
    pub(super) stem: &'static [Rule],
    /// Lists of layers.
    pub(super) stacks: &'static [Stack],
    /// Tensors without the prefix.
    pub(super) head: &'static [Rule],
    /// The modules that look up vocabulary rows, which are summed over the ranks.
    pub(super) embeddings: &'static [(&'static str, Stream)],
    /// The module that makes logits.
    pub(super) logits: Option<&'static str>,
}

/// A list of layers.
pub(super) struct Stack {
    /// What its dimensions' names start with, where there are several stacks: `encoder.`.
    pub(super) name: &'static str,
    /// The list's name.
    pub(super) list: &'static str,
    pub(super) stream: Stream,
    /// The kinds of layers in it; [`Draft::kinds`] says which layer is of which.
    pub(super) kinds: &'static [&'static [BlockRule]],
}

/// What is computed between two exchanges.
pub(super) struct BlockRule {
    pub(super) rules: &'static [Rule],
    /// The row-parallel products, each summed over the ranks by one collective at the end.
    pub(super) sums: &'static [(&'static str, Stream)],
    /// Whether its attention makes keys and values from the context.
    pub(super) cross: bool,
}

/// A module or a tensor.
pub(super) struct Rule {
    /// A linear layer's name without `.weight`, or a tensor's name. `{e}` stands for an expert's number.
    pub(super) name: &'static str,
    pub(super) form: Form,
    pub(super) when: When,
    pub(super) used: Use,
}

/// How a rule's tensors are stored.
pub(super) enum Form {
    /// `NAME.weight [out, in]` and perhaps `NAME.bias [out]`; `transposed`: `[in, out]`, as GPT-2's Conv1D.
    Linear { out: Ax, input: Ax, bias: When, transposed: bool, quantised: bool },
    /// A linear layer of all experts: `NAME [experts, in, out]` and `NAME_bias [experts, out]`; in MXFP4
    /// `NAME_blocks [experts, out, in / 32, 16]` and `NAME_scales [experts, out, in / 32]`.
    Stacked { experts: Ax, out: Ax, input: Ax },
    /// A tensor as it is.
    Tensor(&'static [Ax]),
    /// These.
    Group(&'static [Rule]),
}

/// What an axis counts. Names are those of [`Sizes`].
#[derive(Clone, Copy)]
pub(super) enum Ax {
    /// This many elements, never shared.
    Whole(&'static str),
    /// Segments, one after the other.
    Cut(&'static [Part]),
    /// For each key/value head its query heads, then itself with twice the elements: fused q, k and v.
    ByGroup,
}

/// A segment: all indices of a dimension.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub(super) dim: &'static str,
    /// Elements an index: the size of this name times `times`; 1 times for no name.
    pub(super) each: &'static str,
    pub(super) times: usize,
}

/// Which models of a family have a tensor.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    Always,
    /// Those with this flag: see [`Draft::flags`].
    If(&'static str),
    /// Those without it.
    Unless(&'static str),
    /// Those with this flag, and the first layer of each stack of the others.
    FirstLayerUnless(&'static str),
    /// Not needed, though files may have it.
    Unused,
}

pub(super) const fn part(dim: &'static str, each: &'static str) -> Part {
    Part { dim, each, times: 1 }
}

pub(super) const HIDDEN: Ax = Whole("hidden");
pub(super) const HEAD_DIM: Ax = Whole("head_dim");
pub(super) const HEADS: Ax = Cut(&[part("heads", "head_dim")]);
pub(super) const KV: Ax = Cut(&[part("kv_heads", "head_dim")]);
pub(super) const FFN: Ax = Cut(&[part("ffn", "")]);
pub(super) const SHARED_FFN: Ax = Cut(&[part("shared_ffn", "")]);
pub(super) const EXPERT_FFN: Ax = Cut(&[part("expert_ffn", "")]);
pub(super) const EXPERTS: Ax = Cut(&[part("experts", "")]);
/// Fused as blocks.
pub(super) const QKV: Ax =
    Cut(&[part("heads", "head_dim"), part("kv_heads", "head_dim"), part("kv_heads", "head_dim")]);
pub(super) const GATE_UP: Ax = Cut(&[part("ffn", ""), part("ffn", "")]);
pub(super) const VOCAB: Ax = Cut(&[part("vocab", "")]);

/// A linear layer of a block.
pub(super) const fn linear(name: &'static str, out: Ax, input: Ax, bias: When) -> Rule {
    let form = Form::Linear { out, input, bias, transposed: false, quantised: true };
    Rule { name, form, when: When::Always, used: Use::Tokens }
}

/// A norm's weight, or another vector that is whole on every rank.
pub(super) const fn norm(name: &'static str) -> Rule {
    tensor(name, &[HIDDEN], Use::Vector)
}

pub(super) const fn tensor(name: &'static str, axes: &'static [Ax], used: Use) -> Rule {
    Rule { name, form: Form::Tensor(axes), when: When::Always, used }
}

/// A linear layer that is never quantised.
pub(super) const fn plain(name: &'static str, out: Ax, input: Ax, bias: When) -> Rule {
    let form = Form::Linear { out, input, bias, transposed: false, quantised: false };
    Rule { name, form, when: When::Always, used: Use::Tokens }
}

impl Rule {
    pub(super) const fn group(rules: &'static [Rule]) -> Rule {
        Rule { name: "", form: Form::Group(rules), when: When::Always, used: Use::Vector }
    }

    pub(super) const fn used(self, used: Use) -> Rule {
        Rule { used, ..self }
    }

    pub(super) const fn when(self, when: When) -> Rule {
        Rule { when, ..self }
    }
}

/// The output head, and the embedding that it may be.
pub(super) const fn embedding(name: &'static str) -> Rule {
    tensor(name, &[VOCAB, HIDDEN], Use::Lookup)
}

pub(super) const LM_HEAD: Rule =
    tensor("lm_head.weight", &[VOCAB, HIDDEN], Use::Tokens).when(When::Unless("tied"));

/// What a family reads of a configuration: all that its table leaves open.
pub(super) struct Draft {
    /// Everything but the dimensions, layers and tensors.
    pub(super) spec: ModelSpec,
    /// What the table's names stand for, a stack; the first is the stem's and the head's too.
    pub(super) sizes: Vec<Sizes>,
    /// Which of [`Stack::kinds`] each layer of each stack is.
    pub(super) kinds: Vec<Vec<usize>>,
    /// What [`When::If`] asks for.
    pub(super) flags: BTreeSet<&'static str>,
    /// The attention windows of the first stack's layers; none where all layers see everything.
    pub(super) windows: Vec<Option<usize>>,
    /// What tensors' names start with that files may have and nothing here computes with.
    pub(super) ignored: Vec<String>,
    /// What tensors' names start with that every rank has whole, whatever they are.
    pub(super) whole: &'static [&'static str],
}

impl Draft {
    pub(super) fn new(spec: ModelSpec, sizes: Sizes, layers: usize) -> Draft {
        Draft {
            spec,
            sizes: vec![sizes],
            kinds: vec![vec![0; layers]],
            flags: BTreeSet::new(),
            windows: Vec::new(),
            ignored: Vec::new(),
            whole: &[],
        }
    }

    /// Windows of `sliding_window` tokens for the layers that `slides` says, if the field is there.
    pub(super) fn slide(&mut self, f: &Fields, slides: impl Fn(usize) -> bool) -> Result<()> {
        let Some(window) = f.size("sliding_window", MAX_DIM)? else { return Ok(()) };
        // Newer files say it themselves.
        let types: Option<Vec<bool>> = f.get("layer_types").and_then(|value| {
            let list = value.as_array().filter(|l| l.len() == self.kinds[0].len())?;
            Some(list.iter().map(|t| t.as_str() == Some("sliding_attention")).collect())
        });
        let slides = |n: usize| types.as_ref().map_or_else(|| slides(n), |t| t[n]);
        self.windows = (0..self.kinds[0].len()).map(|n| slides(n).then_some(window)).collect();
        Ok(())
    }

    pub(super) fn slide_all(&mut self, f: &Fields) -> Result<()> {
        self.slide(f, |_| true)?;
        self.spec.sliding_window = f.size("sliding_window", MAX_DIM)?;
        Ok(())
    }

    /// Qwen's: from layer `max_window_layers` on, if `use_sliding_window`.
    pub(super) fn slide_from(&mut self, f: &Fields) -> Result<()> {
        if self.spec.sliding_window.is_some() {
            let from = f.count("max_window_layers", MAX_DIM)?.unwrap_or(28);
            self.slide(f, |n| n >= from)?;
        }
        Ok(())
    }

    /// Which tokens a table's stream is: an encoder alone has its own.
    pub(super) fn stream(&self, stream: Stream) -> Stream {
        if self.flags.contains("encoder_only") { Stream::Tokens } else { stream }
    }

    /// How far a layer's attention looks back.
    pub(super) fn window(&self, stack: usize, layer: usize) -> Option<usize> {
        if stack == 0 { self.windows.get(layer).copied().flatten() } else { None }
    }
}

/// Sizes by name: dimensions (`heads`, `kv_heads`, `ffn`, `experts`, `expert_ffn`, `shared_ffn`, `vocab`) and what
/// else axes count.
#[derive(Clone, Debug, Default)]
pub(super) struct Sizes {
    sizes: BTreeMap<&'static str, Size>,
}

/// A size and where it is from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    pub(super) value: usize,
    /// The field of config.json.
    pub(super) field: &'static str,
    /// Whether the configuration leaves it out, so that it is a default.
    pub(super) assumed: bool,
}

impl Sizes {
    pub(super) fn set(&mut self, name: &'static str, value: usize, field: &'static str) {
        self.sizes.insert(name, Size { value, field, assumed: false });
    }

    pub(super) fn assume(&mut self, name: &'static str, value: usize, field: &'static str) {
        self.sizes.insert(name, Size { value, field, assumed: true });
    }

    /// Replaces a default; not a configured size, and not by itself.
    pub(super) fn learn(&mut self, name: &str, value: usize) -> bool {
        let size = self.sizes.get_mut(name).filter(|s| s.assumed && s.value != value);
        size.map(|s| (s.value, s.assumed) = (value, false)).is_some()
    }

    pub(super) fn get(&self, name: &str) -> Option<Size> {
        self.sizes.get(name).copied()
    }

    /// The value; 0 for a name that isn't set, which no model may have.
    pub(super) fn value(&self, name: &str) -> usize {
        self.get(name).map_or(0, |s| s.value)
    }
}
