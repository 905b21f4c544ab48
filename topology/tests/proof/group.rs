//! Ranks in lock step: each has its part of the weights, and what the plan names is all that they exchange.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use serde_json::Value;
use tensorwire_topology::Plan;
use tensorwire_topology::plan::{Collective, Layer, Span, TensorShard};

use super::attention::{Scores, attend};
use super::quant;
use super::tensor::{Tensor, dot, rms, standardise};

/// What the tensor of a module's weight may be called.
const WEIGHTS: [&str; 2] = ["weight", "qweight"];

/// A model's config.json.
pub(crate) struct Config(pub(crate) Value);

impl Config {
    pub(crate) fn parse(json: &str) -> Config {
        Config(serde_json::from_str(json).unwrap())
    }

    pub(crate) fn get(&self, field: &str) -> usize {
        self.find(field).unwrap_or_else(|| panic!("the toy has no {field}"))
    }

    pub(crate) fn find(&self, field: &str) -> Option<usize> {
        self.0.get(field)?.as_u64().map(|n| n as usize)
    }

    pub(crate) fn real(&self, field: &str) -> f64 {
        self.0[field].as_f64().unwrap_or_else(|| panic!("the toy has no {field}"))
    }

    pub(crate) fn is(&self, field: &str) -> bool {
        self.0[field].as_bool().unwrap_or(false)
    }

    pub(crate) fn text(&self, field: &str) -> &str {
        self.0[field].as_str().unwrap_or_default()
    }

    pub(crate) fn reals(&self, field: &str) -> Vec<f64> {
        self.0[field].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
    }

    pub(crate) fn list(&self, field: &str) -> Vec<usize> {
        self.reals(field).into_iter().map(|v| v as usize).collect()
    }
}

/// The heads of one attention, over all ranks.
pub(crate) struct Heads {
    /// The layer that it is in.
    layer: String,
    q: usize,
    kv: usize,
    /// Elements of a query and of a key.
    dim: usize,
    /// Whether it is the layer's attention to the context.
    cross: bool,
}

impl Heads {
    pub(crate) fn new(layer: String, q: usize, kv: usize, dim: usize) -> Heads {
        Heads { layer, q, kv, dim, cross: false }
    }

    /// The same of the layer's attention to the context.
    pub(crate) fn cross(self) -> Heads {
        Heads { cross: true, ..self }
    }

    /// Which key/value head a query head reads.
    fn read_by(&self, q: usize) -> usize {
        q * self.kv / self.q
    }
}

/// A value as each rank has it.
#[derive(Clone)]
pub(crate) struct Each(pub(crate) Vec<Tensor>);

impl Each {
    pub(crate) fn map(&self, f: impl Fn(&Tensor) -> Tensor) -> Each {
        Each(self.0.iter().map(f).collect())
    }

    pub(crate) fn with(&self, other: &Each, f: impl Fn(&Tensor, &Tensor) -> Tensor) -> Each {
        Each(self.0.iter().zip(&other.0).map(|(a, b)| f(a, b)).collect())
    }

    pub(crate) fn add(&self, other: &Each) -> Each {
        self.with(other, Tensor::add)
    }

    pub(crate) fn mul(&self, other: &Each) -> Each {
        self.with(other, Tensor::mul)
    }
}

/// What a runtime may do wrong with a right plan.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fault {
    /// A bias of a row-parallel layer is added by every rank before the sum.
    BiasOnEveryRank,
    /// A token of another rank's vocabulary is looked up as if it were this rank's nearest one.
    NoMask,
    /// What every rank computes whole of a shared expert is summed over the ranks.
    SharedOnEveryRank,
}

/// Ranks that compute one model together; one that has it whole is the reference.
pub(crate) struct Group<'a> {
    pub(crate) config: &'a Config,
    plan: Option<&'a Plan>,
    pub(crate) fault: Option<Fault>,
    weights: Vec<BTreeMap<String, Tensor>>,
    /// The tensors that were read.
    read: RefCell<BTreeSet<String>>,
    /// How many exchanges of each layer, and of the vocabulary, were made.
    made: RefCell<BTreeMap<String, usize>>,
}

impl<'a> Group<'a> {
    /// One rank with every tensor whole.
    pub(crate) fn whole(config: &'a Config, tensors: &BTreeMap<String, Tensor>) -> Group<'a> {
        Group::new(config, None, vec![tensors.clone()])
    }

    /// The plan's ranks, each with the slices that the plan names.
    pub(crate) fn sharded(
        config: &'a Config,
        tensors: &BTreeMap<String, Tensor>,
        plan: &'a Plan,
    ) -> Group<'a> {
        let mut weights = vec![BTreeMap::new(); plan.world];
        for shard in &plan.tensors {
            weights[shard.rank].insert(shard.name.clone(), cut(&tensors[&shard.name], shard));
        }
        Group::new(config, Some(plan), weights)
    }

    fn new(config: &'a Config, plan: Option<&'a Plan>, weights: Vec<BTreeMap<String, Tensor>>) -> Group<'a> {
        Group { config, plan, fault: None, weights, read: RefCell::default(), made: RefCell::default() }
    }

    /// Panics if the whole model has a tensor that wasn't read, or if the plan has an exchange for which the
    /// forward has no place.
    pub(crate) fn finish(&self) {
        let Some(plan) = self.plan else {
            let unread = self.weights[0].keys().find(|name| !self.read.borrow().contains(*name));
            assert_eq!(unread, None, "is part of the model, but wasn't used");
            return;
        };
        let layers = plan.layers.iter().map(|layer| (layer.name.as_str(), &layer.collectives));
        for (name, all) in layers.chain([("", &plan.vocab.collectives)]) {
            let made = self.made.borrow().get(name).copied().unwrap_or(0);
            assert_eq!(made, all.len(), "exchanges that were made of {all:?} of {name:?}");
        }
    }

    /// What `of` makes on each rank.
    pub(crate) fn each(&self, of: impl Fn(usize) -> Tensor) -> Each {
        Each((0..self.weights.len()).map(of).collect())
    }

    /// The same value on every rank.
    pub(crate) fn same(&self, value: &Tensor) -> Each {
        self.each(|_| value.clone())
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.weights.iter().any(|held| held.contains_key(name))
    }

    pub(crate) fn has_module(&self, module: &str) -> bool {
        WEIGHTS.iter().any(|name| self.has(&format!("{module}.{name}")))
    }

    /// A rank's part of a tensor.
    pub(crate) fn tensor(&self, rank: usize, name: &str) -> &Tensor {
        self.read.borrow_mut().insert(name.to_owned());
        self.weights[rank].get(name).unwrap_or_else(|| panic!("rank {rank} has no {name}"))
    }

    /// A rank's part of a module's weight, `[output, input]`.
    pub(crate) fn weight(&self, rank: usize, module: &str) -> Tensor {
        let part = |name: &str| self.tensor(rank, &format!("{module}.{name}"));
        let quantization = &self.config.0["quantization_config"];
        if self.has(&format!("{module}.weight_scale_inv")) {
            let block = [0, 1].map(|i| quantization["weight_block_size"][i].as_u64().unwrap() as usize);
            return quant::fp8(part("weight"), part("weight_scale_inv"), block);
        }
        if self.has(&format!("{module}.qweight")) {
            let (words, zeros, scales) = (part("qweight"), part("qzeros"), part("scales"));
            let group = quantization["group_size"].as_u64().unwrap() as usize;
            if quantization["quant_method"] == "awq" {
                return quant::awq(words, zeros, scales, group);
            }
            // Groups are numbered over all ranks. Where inputs of all groups are everywhere, scales are too.
            let first = self.first(rank, &format!("{module}.scales"));
            let groups: Vec<usize> = part("g_idx").data.iter().map(|g| *g as usize - first).collect();
            return quant::gptq(words, zeros, scales, &groups);
        }
        let weight = part("weight");
        match self.config.text("model_type") {
            "gpt2" if module.contains(".c_") => weight.transpose(),
            _ => weight.reshape(&[weight.rows(), weight.cols()]),
        }
    }

    /// Where a rank's part of a tensor's first dimension begins.
    fn first(&self, rank: usize, name: &str) -> usize {
        let shard = self.plan.and_then(|plan| plan.tensor(name, rank));
        shard.and_then(|s| s.slices.iter().find(|s| s.dim == 0)).map_or(0, |s| s.range.start)
    }

    /// `x` times the module's weight: a part of the output, or a part of the sum.
    pub(crate) fn product(&self, module: &str, x: &Each) -> Each {
        self.each(|rank| x.0[rank].times(&self.weight(rank, module)))
    }

    /// Adds the module's bias, if it has one.
    pub(crate) fn bias(&self, module: &str, x: Each) -> Each {
        let name = format!("{module}.bias");
        if !self.has(&name) {
            return x;
        }
        self.each(|rank| x.0[rank].add(self.tensor(rank, &name)))
    }

    /// A linear layer whose output is split, or that every rank computes whole.
    pub(crate) fn linear(&self, module: &str, x: &Each) -> Each {
        self.bias(module, self.product(module, x))
    }

    /// A linear layer whose input is split.
    pub(crate) fn row_linear(&self, module: &str, x: &Each) -> Each {
        self.row_end(module, self.product(module, x))
    }

    /// The end of a linear layer whose input is split: what is summed gets the bias once.
    pub(crate) fn row_end(&self, module: &str, part: Each) -> Each {
        self.row_end_with(module, &[module], part)
    }

    /// The same where several layers' parts are one sum.
    pub(crate) fn row_end_with(&self, place: &str, modules: &[&str], part: Each) -> Each {
        let biased = |x: Each| modules.iter().fold(x, |x, module| self.bias(module, x));
        match self.fault {
            Some(Fault::BiasOnEveryRank) => self.exchange(place, biased(part)),
            _ => biased(self.exchange(place, part)),
        }
    }

    /// RMSNorm over the whole row; `from` is 1 where the weight is stored as its difference from 1.
    pub(crate) fn rms_norm(&self, module: &str, x: &Each, eps: f64, from: f64) -> Each {
        let weight = |rank| self.tensor(rank, &format!("{module}.weight")).map(|w| w + from);
        self.each(|rank| rms(&x.0[rank], x.0[rank].cols(), eps).mul(&weight(rank)))
    }

    /// RMSNorm of each head by itself, all with the same weight.
    pub(crate) fn head_norm(&self, module: &str, x: &Each, eps: f64, from: f64) -> Each {
        self.each(|rank| {
            let weight = self.tensor(rank, &format!("{module}.weight")).map(|w| w + from).data;
            let normed = rms(&x.0[rank], weight.len(), eps);
            Tensor::of(&normed.shape, |i| normed.data[i] * weight[i % weight.len()])
        })
    }

    /// RMSNorm of queries and keys over the heads of all ranks, `width` elements in all: the ranks sum their
    /// squares, of both in one exchange.
    pub(crate) fn norm_across(
        &self,
        attention: &str,
        layer: &str,
        qk: [Each; 2],
        width: usize,
        eps: f64,
    ) -> [Each; 2] {
        let squares = |t: &Tensor| t.each_row(|row| vec![dot(row, row)]);
        let both = qk[0].with(&qk[1], |q, k| Tensor::below(&[squares(q), squares(k)]));
        let both = self.exchange(&format!("{layer}.sum of squares"), both);
        let normed = |x: &Each, norm: &str, first: usize| {
            self.each(|rank| {
                let (x, squares) = (&x.0[rank], &both.0[rank]);
                let scale = |row| 1.0 / (squares.at(first + row, 0) / width as f64 + eps).sqrt();
                let normed = Tensor::matrix(x.rows(), x.cols(), |r, c| x.at(r, c) * scale(r));
                normed.mul(self.tensor(rank, &format!("{attention}.{norm}.weight")))
            })
        };
        [normed(&qk[0], "norm_q", 0), normed(&qk[1], "norm_k", qk[0].0[0].rows())]
    }

    pub(crate) fn layer_norm(&self, module: &str, x: &Each, eps: f64) -> Each {
        let normed = self
            .each(|rank| standardise(&x.0[rank], eps).mul(self.tensor(rank, &format!("{module}.weight"))));
        self.bias(module, normed)
    }

    /// Rows of a table that ranks may have in parts: a token of another rank's part is zero here.
    pub(crate) fn embed(&self, module: &str, tokens: &[usize]) -> Each {
        let rows = self.each(|rank| {
            let table = self.tensor(rank, &format!("{module}.weight"));
            let held = self.vocab(rank, table.rows());
            let row = |&token: &usize| match held.contains(&token) {
                true => table.row(token - held.start).to_vec(),
                false if self.fault == Some(Fault::NoMask) => {
                    table.row(token.clamp(held.start, held.end - 1) - held.start).to_vec()
                }
                false => vec![0.0; table.cols()],
            };
            Tensor::new(&[tokens.len(), table.cols()], tokens.iter().flat_map(row).collect())
        });
        self.exchange(module, rows)
    }

    /// The output head: every rank gets the scores of all tokens, without those of padding.
    pub(crate) fn logits(&self, place: &str, weight: &str, x: &Each) -> Each {
        let vocab = self.config.get("vocab_size");
        let part = self.linear(weight, x);
        // Ranks whose part ends early send scores of padding, so that all send as many.
        let share = self.plan.filter(|p| p.vocab.padded != vocab).map(|p| p.vocab.padded / p.world);
        let padded = part.map(|t| {
            let missing = share.map_or(0, |share| share - t.cols());
            Tensor::beside(&[t.clone(), Tensor::matrix(t.rows(), missing, |_, _| f64::NAN)])
        });
        self.exchange_as(place, padded, Tensor::beside).map(|t| t.columns(0..vocab))
    }

    /// The tokens that a rank has rows of.
    fn vocab(&self, rank: usize, rows: usize) -> Range<usize> {
        self.plan.map_or(0..rows, |plan| range(plan.vocab.ranges[rank]))
    }

    fn layer(&self, name: &str) -> Option<&'a Layer> {
        self.plan?.layers.iter().find(|l| l.name == name)
    }

    /// The query and the key/value heads that a rank has.
    fn held(&self, heads: &Heads, rank: usize) -> (Range<usize>, Range<usize>) {
        // What the plan has no layer for every rank computes whole.
        let Some(layer) = self.layer(&heads.layer) else { return (0..heads.q, 0..heads.kv) };
        let attention = if heads.cross { layer.cross_attention.as_ref().unwrap() } else { &layer.attention };
        (range(attention.q_heads[rank]), range(attention.kv_heads[rank]))
    }

    /// The parts of a rank's `[Q|K|V]`.
    pub(crate) fn split_qkv(&self, heads: &Heads, fused: &Each) -> [Each; 3] {
        [0, 1, 2].map(|part| {
            self.each(|rank| {
                let (q, kv) = self.held(heads, rank);
                let (q, kv) = (q.len() * heads.dim, kv.len() * heads.dim);
                assert_eq!(fused.0[rank].cols(), q + 2 * kv, "the fused layer has the rank's heads");
                fused.0[rank].columns([0..q, q..q + kv, q + kv..q + 2 * kv][part].clone())
            })
        })
    }

    /// The parts of what has, for each key/value head, the rank's query heads that read it, a key and a value.
    pub(crate) fn split_groups(&self, heads: &Heads, fused: &Each) -> [Each; 3] {
        [0, 1, 2].map(|part| {
            self.each(|rank| {
                let (q, kv) = self.held(heads, rank);
                let group = |kv: usize| {
                    let readers = q.clone().filter(|&q| heads.read_by(q) == kv).count();
                    std::iter::repeat_n(0, readers).chain([1, 2])
                };
                let which: Vec<usize> = kv.clone().flat_map(group).collect();
                assert_eq!(
                    fused.0[rank].cols(),
                    which.len() * heads.dim,
                    "the fused layer has the rank's heads"
                );
                let columns = (0..fused.0[rank].cols()).filter(|c| which[c / heads.dim] == part);
                fused.0[rank].select(1, &columns.collect::<Vec<_>>())
            })
        })
    }

    /// Attention over the heads that each rank has.
    pub(crate) fn attention(&self, heads: &Heads, scores: &Scores, qkv: (&Each, &Each, &Each)) -> Each {
        self.attention_with(heads, scores, qkv, |_, _, _, _| 0.0, |_| None)
    }

    /// The same with a bias for each (rank, head of the rank, query, key), and with the sinks of a rank.
    pub(crate) fn attention_with(
        &self,
        heads: &Heads,
        scores: &Scores,
        (q, k, v): (&Each, &Each, &Each),
        bias: impl Fn(usize, usize, usize, usize) -> f64,
        sinks: impl Fn(usize) -> Option<Vec<f64>>,
    ) -> Each {
        self.each(|rank| {
            let (mine, kv) = self.held(heads, rank);
            let reads: Vec<usize> = mine.map(|q| heads.read_by(q) - kv.start).collect();
            let bias = |head, i, j| bias(rank, head, i, j);
            attend(scores, &reads, (&q.0[rank], &k.0[rank], &v.0[rank]), &bias, sinks(rank).as_deref())
        })
    }

    /// What the plan has the ranks exchange after a module; nothing where that isn't the next that it names.
    ///
    /// Parts of a sum are rows of all tokens; what is gathered are some tokens' rows.
    pub(crate) fn exchange(&self, place: &str, x: Each) -> Each {
        self.exchange_as(place, x, Tensor::below)
    }

    fn exchange_as(&self, place: &str, x: Each, gather: fn(&[Tensor]) -> Tensor) -> Each {
        let sum = || x.0.iter().skip(1).fold(x.0[0].clone(), |sum, part| sum.add(part));
        match self.next_exchange(place) {
            None => x,
            Some("all_reduce") => self.same(&sum()),
            Some("all_gather") => self.same(&gather(&x.0)),
            Some("reduce_scatter") => {
                // Between the two are norms, which take each token by itself.
                let sum = sum();
                let own = self.each(|rank| sum.select(0, &self.tokens_of(rank, sum.rows())));
                self.exchange_as(place, own, gather)
            }
            Some(other) => panic!("what is {other}?"),
        }
    }

    /// Every rank's messages to every rank, delivered; where the plan doesn't say so only those to itself.
    pub(crate) fn deliver(&self, place: &str, messages: Vec<Vec<Tensor>>) -> Vec<Vec<Tensor>> {
        let ranks = 0..messages.len();
        let next = self.peek(place).filter(|(_, next)| next.op == "all_to_all");
        // Ranks so far apart exchange with each other.
        let apart = next.map(|(_, next)| ranks.len().checked_div(next.among).unwrap_or(1));
        self.next_exchange(place);
        let received = |to: usize| {
            let exchange = |from: usize| apart.is_some_and(|apart| from % apart == to % apart);
            let from = |from: usize| match exchange(from) || from == to {
                true => messages[from][to].clone(),
                false => messages[from][to].map(|_| 0.0),
            };
            ranks.clone().map(from).collect()
        };
        ranks.clone().map(received).collect()
    }

    /// The experts that each rank has of a layer, where ranks have different ones; else none.
    pub(crate) fn experts(&self, layer: &str) -> Option<Vec<Range<usize>>> {
        let ranges: Vec<_> = self.layer(layer)?.mlp.experts.iter().map(|s| range(*s)).collect();
        Some(ranges).filter(|ranges| !ranges.is_empty())
    }

    /// Whether ranks have different columns of a layer's shared expert.
    pub(crate) fn shares_expert(&self, layer: &str) -> bool {
        self.layer(layer).is_none_or(|layer| !layer.mlp.shared_ffn.is_empty())
    }

    /// The tokens that are a rank's own where ranks divide them.
    pub(crate) fn tokens_of(&self, rank: usize, tokens: usize) -> Vec<usize> {
        part(rank, self.weights.len(), tokens)
    }

    /// Whether the next exchange of a layer, or of the vocabulary, is this one.
    pub(crate) fn next_is(&self, place: &str, op: &str) -> bool {
        self.peek(place).is_some_and(|(_, next)| next.op == op)
    }

    /// The next exchange, if it is after this module; the caller makes it.
    fn next_exchange(&self, place: &str) -> Option<&'a str> {
        let (list, next) = self.peek(place)?;
        *self.made.borrow_mut().entry(list.to_owned()).or_default() += 1;
        Some(&next.op)
    }

    /// The list that a module's exchanges are in, by its layer's name, and the next one of it.
    fn peek(&self, place: &str) -> Option<(&'a str, &'a Collective)> {
        let plan = self.plan?;
        let layer =
            plan.layers.iter().find_map(|l| Some((l, place.strip_prefix(&l.name)?.strip_prefix('.')?)));
        let (list, all, module) = match layer {
            Some((layer, module)) => (layer.name.as_str(), &layer.collectives, module),
            None => ("", &plan.vocab.collectives, place),
        };
        let made = self.made.borrow().get(list).copied().unwrap_or(0);
        // The vocabulary's are named without the prefix that all names have.
        let here =
            |after: &str| module == after || (list.is_empty() && module.ends_with(&format!(".{after}")));
        let next = all.get(made).filter(|c| here(&c.after))?;
        Some((list, next))
    }
}

/// The `i`th of `parts` parts of some tokens.
pub(crate) fn part(i: usize, parts: usize, tokens: usize) -> Vec<usize> {
    let start = |i| i * tokens / parts;
    (start(i)..start(i + 1)).collect()
}

fn range(span: Span) -> Range<usize> {
    span.start..span.end
}

/// The part of a tensor that a plan names: along each dimension its slices, one after the other.
fn cut(whole: &Tensor, shard: &TensorShard) -> Tensor {
    (0..whole.shape.len()).fold(whole.clone(), |t, dim| {
        let mut slices = shard.slices.iter().filter(|s| s.dim == dim).peekable();
        match slices.peek() {
            None => t,
            Some(_) => t.select(dim, &slices.flat_map(|s| range(s.range)).collect::<Vec<_>>()),
        }
    })
}
