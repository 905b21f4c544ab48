//! Ranks in lock step: each has its part of the weights, and what the plan names is all that they exchange.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use serde_json::Value;
use tensorwire_topology::plan::{Collective, Span, TensorShard};
use tensorwire_topology::{ModelSpec, Plan};

use super::attention::{Scores, attend};
use super::tensor::{Tensor, rms, standardise};
use super::weights::seeded;

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

/// Ranks that compute one model together; one that has it whole is the reference.
pub(crate) struct Group<'a> {
    pub(crate) config: &'a Config,
    plan: Option<&'a Plan>,
    weights: Vec<BTreeMap<String, Tensor>>,
    /// The tensors that were read.
    read: RefCell<BTreeSet<String>>,
    /// The places at which something was exchanged.
    exchanged: RefCell<BTreeSet<String>>,
}

impl<'a> Group<'a> {
    /// One rank with every tensor whole.
    pub(crate) fn whole(config: &'a Config, spec: &ModelSpec) -> Group<'a> {
        let all = spec.tensors.iter().map(|t| (t.name.clone(), seeded(t))).collect();
        Group::new(config, None, vec![all])
    }

    /// The plan's ranks, each with the slices that the plan names.
    pub(crate) fn sharded(config: &'a Config, spec: &ModelSpec, plan: &'a Plan) -> Group<'a> {
        let mut weights = vec![BTreeMap::new(); plan.world];
        for tensor in &spec.tensors {
            let whole = seeded(tensor);
            for (rank, held) in weights.iter_mut().enumerate() {
                if let Some(shard) = plan.tensor(&tensor.name, rank) {
                    held.insert(tensor.name.clone(), cut(&whole, shard));
                }
            }
        }
        Group::new(config, Some(plan), weights)
    }

    fn new(
        config: &'a Config,
        plan: Option<&'a Plan>,
        weights: Vec<BTreeMap<String, Tensor>>,
    ) -> Group<'a> {
        Group { config, plan, weights, read: RefCell::default(), exchanged: RefCell::default() }
    }

    /// Panics if a tensor wasn't read, or if the plan has an exchange for which the forward has no place.
    pub(crate) fn finish(&self) {
        let read = self.read.borrow();
        for name in self.weights.iter().flat_map(BTreeMap::keys) {
            assert!(read.contains(name), "{name} wasn't used");
        }
        for (place, _) in self.collectives() {
            assert!(self.exchanged.borrow().contains(&place), "the exchange after {place} wasn't made");
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
        self.weights[0].contains_key(name)
    }

    /// A rank's part of a tensor.
    pub(crate) fn tensor(&self, rank: usize, name: &str) -> &Tensor {
        self.read.borrow_mut().insert(name.to_owned());
        self.weights[rank].get(name).unwrap_or_else(|| panic!("rank {rank} has no {name}"))
    }

    /// A rank's part of a module's weight, `[output, input]`.
    pub(crate) fn weight(&self, rank: usize, module: &str) -> Tensor {
        self.tensor(rank, &format!("{module}.weight")).clone()
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

    /// A linear layer whose input is split: what is summed gets the bias once.
    pub(crate) fn row_linear(&self, module: &str, x: &Each) -> Each {
        self.bias(module, self.exchange(module, self.product(module, x)))
    }

    /// RMSNorm over the whole row; `from` is 1 where the weight is stored as its difference from 1.
    pub(crate) fn rms_norm(&self, module: &str, x: &Each, eps: f64, from: f64) -> Each {
        let weight = |rank| self.tensor(rank, &format!("{module}.weight")).map(|w| w + from);
        self.each(|rank| rms(&x.0[rank], x.0[rank].cols(), eps).mul(&weight(rank)))
    }

    /// RMSNorm of each head by itself, all with the same weight.
    pub(crate) fn head_norm(&self, module: &str, x: &Each, eps: f64, from: f64) -> Each {
        self.each(|rank| {
            let weight = self.tensor(rank, &format!("{module}.weight")).map(|w| w + from);
            let normed = rms(&x.0[rank], weight.data.len(), eps);
            Tensor::of(&normed.shape, |i| normed.data[i] * weight.data[i % weight.data.len()])
        })
    }

    pub(crate) fn layer_norm(&self, module: &str, x: &Each, eps: f64) -> Each {
        let normed = self.each(|rank| {
            standardise(&x.0[rank], eps).mul(self.tensor(rank, &format!("{module}.weight")))
        });
        self.bias(module, normed)
    }

    /// Rows of a table that ranks may have in parts: a token of another rank's part is zero here.
    pub(crate) fn embed(&self, module: &str, tokens: &[usize]) -> Each {
        let rows = self.each(|rank| {
            let table = self.tensor(rank, &format!("{module}.weight"));
            let held = self.vocab(rank, table.rows());
            let row = |&token: &usize| match held.contains(&token) {
                true => table.row(token - held.start).to_vec(),
                false => vec![0.0; table.cols()],
            };
            Tensor::new(&[tokens.len(), table.cols()], tokens.iter().flat_map(row).collect())
        });
        self.exchange(module, rows)
    }

    /// The output head: every rank gets the scores of all tokens, without those of padding.
    pub(crate) fn logits(&self, module: &str, weight: &str, x: &Each) -> Each {
        let vocab = self.config.get("vocab_size");
        let part = self.bias(module, self.product(weight, x));
        // Ranks whose part ends early send scores of padding, so that all send as many.
        let share = self.plan.filter(|p| p.vocab.padded != vocab).map(|p| p.vocab.padded / p.world);
        let padded = part.map(|t| {
            let missing = share.map_or(0, |share| share - t.cols());
            Tensor::beside(&[t.clone(), Tensor::matrix(t.rows(), missing, |_, _| f64::NAN)])
        });
        self.exchange("lm_head", padded).map(|t| t.columns(0..vocab))
    }

    /// The tokens that a rank has rows of.
    fn vocab(&self, rank: usize, rows: usize) -> Range<usize> {
        self.plan.map_or(0..rows, |plan| range(plan.vocab.ranges[rank]))
    }

    /// The local key/value head that each of the rank's query heads reads, in a layer.
    fn reads(&self, layer: &str, rank: usize, heads: usize, kv_heads: usize) -> Vec<usize> {
        let (q, kv) = match self.plan {
            None => (0..heads, 0..kv_heads),
            Some(plan) => {
                let attention = &plan.layers.iter().find(|l| l.name == layer).unwrap().attention;
                (range(attention.q_heads[rank]), range(attention.kv_heads[rank]))
            }
        };
        q.map(|head| head * kv_heads / heads - kv.start).collect()
    }

    /// Attention over the heads that each rank has of a layer.
    pub(crate) fn attention(
        &self,
        layer: &str,
        (heads, kv_heads): (usize, usize),
        scores: &Scores,
        (q, k, v): (&Each, &Each, &Each),
    ) -> Each {
        self.each(|rank| {
            let reads = self.reads(layer, rank, heads, kv_heads);
            attend(scores, &reads, (&q.0[rank], &k.0[rank], &v.0[rank]), &|_, _, _| 0.0, None)
        })
    }

    /// Every exchange of the plan, by its place: the full name of the module that it follows.
    fn collectives(&self) -> impl Iterator<Item = (String, &'a Collective)> {
        let plan = self.plan.into_iter();
        plan.flat_map(|plan| {
            let layers = plan.layers.iter().flat_map(|layer| {
                layer.collectives.iter().map(|c| (format!("{}.{}", layer.name, c.after), c))
            });
            let vocab = plan.vocab.collectives.iter().map(|c| (c.after.clone(), c));
            layers.chain(vocab)
        })
    }

    /// What the plan has the ranks exchange after a module; nothing where it names nothing.
    pub(crate) fn exchange(&self, place: &str, mut x: Each) -> Each {
        let here = |at: &str| at == place || place.strip_suffix(at).is_some_and(|p| p.ends_with('.'));
        for (at, collective) in self.collectives().filter(|(at, _)| here(at)) {
            self.exchanged.borrow_mut().insert(at);
            let result = match collective.op.as_str() {
                "all_reduce" => x.0.iter().skip(1).fold(x.0[0].clone(), |sum, part| sum.add(part)),
                "all_gather" => Tensor::beside(&x.0),
                other => panic!("what is {other}?"),
            };
            x = self.same(&result);
        }
        x
    }
}

fn range(span: Span) -> Range<usize> {
    span.start..span.end
}

/// The part of a tensor that a plan names.
fn cut(whole: &Tensor, shard: &TensorShard) -> Tensor {
    shard.slices.iter().fold(whole.clone(), |t, s| t.select(s.dim, &range(s.range).collect::<Vec<_>>()))
}
