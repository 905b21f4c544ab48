//! A pipeline's description, and what is refused in one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::model::ModelSpec;
use crate::place::workload::{Block, Exchange, Kind, Part, Split, Work};
use crate::place::{MAX_BATCH, MAX_CONTEXT, Workload};
use crate::{Error, Result};

/// The schema that a pipeline's file names.
pub const SCHEMA: &str = "tensorwire.pipeline/v1";

/// Stages at most.
pub const MAX_STAGES: usize = 256;
/// Calls of a stage, and bytes and operations of a model, at most: far above what is real, and no sum of them
/// overflows.
const MAX_CALLS: usize = 1 << 24;
const MAX_BYTES: u64 = 1 << 50;
const MAX_FLOPS: f64 = 1e24;

/// A graph of stages, each of which calls a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pipeline {
    /// Always [`SCHEMA`].
    pub schema: String,
    /// What people call it.
    pub name: String,
    /// Where its figures come from.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// The models, by name. Stages that name the same model share its weights.
    #[serde(rename = "model")]
    pub models: BTreeMap<String, Model>,
    /// The stages.
    #[serde(rename = "stage")]
    pub stages: Vec<Stage>,
}

/// One stage: calls of one model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Its name, which no other stage has.
    pub name: String,
    /// The model that it calls; none for work on a processor that takes no device and no time worth counting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The stages whose results it needs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<String>,
    /// Calls, one after the other: of a diffusion model, its steps.
    #[serde(default = "one")]
    pub calls: usize,
    /// Items of a call that don't need each other, such as frames.
    #[serde(default = "one")]
    pub items: usize,
    /// Tokens of an item: of a model that makes tokens, those of the prompt.
    #[serde(default = "one")]
    pub tokens: usize,
    /// Tokens that it makes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub new_tokens: usize,
    /// Passes of a call that don't need each other and are combined afterwards: 2 with classifier-free guidance.
    #[serde(default = "one")]
    pub branches: usize,
    /// Bytes that those passes exchange.
    #[serde(default, skip_serializing_if = "no_bytes")]
    pub latent_bytes: u64,
    /// Bytes that it hands to each stage after it.
    #[serde(default, skip_serializing_if = "no_bytes")]
    pub sends_bytes: u64,
}

fn one() -> usize {
    1
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

fn no_bytes(n: &u64) -> bool {
    *n == 0
}

/// A model: as its config.json describes it; or known by its size alone, and then its weights are whole on each device, and
/// its items are divided among devices, or each by its height.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Where its figures are from.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// The content of its config.json.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<serde_json::Map<String, serde_json::Value>>,
    /// Without a configuration: how many parameters it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<u64>,
    /// Bytes of each of `parameters`: 1, 2 or 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_parameter: Option<u64>,
    /// Operations for an item.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flops_per_item: Option<f64>,
    /// Bytes of activations at the widest place, of one item.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activation_bytes: Option<u64>,
    /// Why it is whole on each device, also if it could be divided by height: a plan's notes then say what that would take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub whole_because: Option<String>,
    /// How an item of it, a picture or a film, can be divided by height.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub height: Option<Height>,
}

/// What dividing a convolutional model's items by height costs:
/// [`shard::by_height`](crate::shard::by_height) says which rows go where.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Height {
    /// Rows of its lowest activation: at most so many ranks can share an item.
    pub rows: usize,
    /// Convolutions along the rows, before each of which neighbours exchange rows.
    pub exchanges: usize,
    /// Bytes that a rank gets from one neighbour before all of these.
    pub halo_bytes: u64,
    /// Group norms, for each of which all ranks sum statistics.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub sums: usize,
    /// Bytes of one of these sums.
    #[serde(default, skip_serializing_if = "no_bytes")]
    pub sum_bytes: u64,
    /// Bytes of the keys and values of all rows, where attention within it gathers them.
    #[serde(default, skip_serializing_if = "no_bytes")]
    pub gather_bytes: u64,
}

impl Pipeline {
    /// Reads a pipeline's TOML, which may come from anywhere.
    ///
    /// # Errors
    /// [`Error::Pipeline`] for what isn't of this form, contradicts itself, or makes no sense.
    pub fn from_toml(text: &str) -> Result<Pipeline> {
        let pipeline: Pipeline =
            toml::from_str(text).map_err(|e| refused("the pipeline", e.to_string().trim_end()))?;
        pipeline.checked()
    }

    /// Reads a pipeline's JSON, which may come from anywhere.
    ///
    /// # Errors
    /// As [`from_toml`](Pipeline::from_toml).
    pub fn from_json(text: &str) -> Result<Pipeline> {
        let pipeline: Pipeline = serde_json::from_str(text).map_err(|e| refused("the pipeline", e))?;
        pipeline.checked()
    }

    fn checked(self) -> Result<Pipeline> {
        if self.schema != SCHEMA {
            return Err(refused(
                "the pipeline",
                format!("its schema is {:?}, and {SCHEMA:?} is read here", self.schema),
            ));
        }
        if self.stages.is_empty() || self.stages.len() > MAX_STAGES {
            return Err(refused(
                "the pipeline",
                format!("{} stages: 1 to {MAX_STAGES} can be placed", self.stages.len()),
            ));
        }
        for (name, model) in &self.models {
            model.check(name)?;
        }
        for stage in &self.stages {
            let what = format!("stage {:?}", stage.name);
            let model = stage.model.iter().find(|m| !self.models.contains_key(*m));
            if let Some(model) = model {
                return Err(refused(&what, format!("there is no model {model:?}")));
            }
            let counts = [
                ("calls", stage.calls, 1, MAX_CALLS),
                ("items", stage.items, 1, MAX_BATCH),
                ("tokens", stage.tokens, 1, MAX_CONTEXT / 2),
                ("new_tokens", stage.new_tokens, 0, MAX_CONTEXT / 2),
                ("branches", stage.branches, 1, 2),
            ];
            for (field, n, least, most) in counts {
                if n < least || n > most {
                    return Err(refused(&what, format!("{field} is {n}: {least} to {most} make sense")));
                }
            }
            if stage.latent_bytes.max(stage.sends_bytes) > MAX_BYTES {
                return Err(refused(&what, format!("it sends more than {MAX_BYTES} bytes")));
            }
        }
        self.order()?;
        Ok(self)
    }

    /// The stages in an order in which each comes after those it needs: of several that could be next, the one that is
    /// listed first.
    ///
    /// # Errors
    /// [`Error::Pipeline`] for a name that two stages have or that none has, and for stages that wait for each other.
    pub fn order(&self) -> Result<Vec<usize>> {
        let mut by_name = BTreeMap::new();
        for (i, stage) in self.stages.iter().enumerate() {
            if by_name.insert(stage.name.as_str(), i).is_some() {
                return Err(refused("the pipeline", format!("two stages are called {:?}", stage.name)));
            }
        }
        let mut needs: Vec<Vec<usize>> = Vec::new();
        for stage in &self.stages {
            let of = |name: &String| {
                let unknown = || {
                    refused(
                        &format!("stage {:?}", stage.name),
                        format!("there is no stage {name:?} to come after"),
                    )
                };
                by_name.get(name.as_str()).copied().ok_or_else(unknown)
            };
            needs.push(stage.after.iter().map(of).collect::<Result<_>>()?);
        }
        let mut order: Vec<usize> = Vec::new();
        let mut done = vec![false; self.stages.len()];
        while order.len() < self.stages.len() {
            let ready = (0..self.stages.len()).find(|s| !done[*s] && needs[*s].iter().all(|n| done[*n]));
            let Some(next) = ready else {
                return Err(refused("the pipeline", self.cycle(&needs, &done)));
            };
            done[next] = true;
            order.push(next);
        }
        Ok(order)
    }

    /// Stages that wait for each other, by name.
    fn cycle(&self, needs: &[Vec<usize>], done: &[bool]) -> String {
        // From any stage that is never ready, on to one that it waits for, until one comes again.
        let mut path: Vec<usize> = done.iter().position(|d| !d).into_iter().collect();
        while let Some(next) = path.last().and_then(|s| needs[*s].iter().find(|n| !done[**n])) {
            if let Some(start) = path.iter().position(|s| s == next) {
                path.drain(..start);
                path.push(*next);
                break;
            }
            path.push(*next);
        }
        let names: Vec<&str> = path.iter().map(|s| self.stages[*s].name.as_str()).collect();
        format!("its stages wait for each other: {}", names.join(", which comes after "))
    }

    /// The workload of a stage; nothing for one without a model.
    ///
    /// # Errors
    /// What reading its model's configuration refuses.
    pub fn workload(&self, stage: &Stage) -> Result<Option<Workload>> {
        let Some(name) = &stage.model else { return Ok(None) };
        let mut workload = match self.models.get(name) {
            Some(Model { config: Some(config), .. }) => {
                let json = serde_json::Value::Object(config.clone()).to_string();
                let spec =
                    ModelSpec::from_config(&json).map_err(|e| refused(&format!("model {name:?}"), e))?;
                Workload::of(&spec)
            }
            Some(sized) => sized.workload(),
            None => {
                return Err(refused(
                    &format!("stage {:?}", stage.name),
                    format!("there is no model {name:?}"),
                ));
            }
        };
        workload.name = name.clone();
        if let Kind::Forward { .. } = workload.kind {
            workload.kind = Kind::Forward { branches: stage.branches, latent_bytes: stage.latent_bytes };
            if stage.new_tokens > 0 {
                return Err(refused(
                    &format!("stage {:?}", stage.name),
                    format!("model {name:?} makes no tokens"),
                ));
            }
        } else if stage.branches > 1 {
            return Err(refused(
                &format!("stage {:?}", stage.name),
                "a model that makes tokens has one branch",
            ));
        }
        Ok(Some(workload))
    }
}

impl Model {
    fn check(&self, name: &str) -> Result<()> {
        let what = format!("model {name:?}");
        let sized = [
            ("parameters", self.parameters.is_some()),
            ("bytes_per_parameter", self.bytes_per_parameter.is_some()),
            ("flops_per_item", self.flops_per_item.is_some()),
            ("whole_because or height", self.whole_because.is_some() || self.height.is_some()),
        ];
        match (&self.config, sized.iter().find(|(_, is)| *is == self.config.is_some())) {
            (Some(_), Some((field, _))) => {
                return Err(refused(&what, format!("{field} follows from its config")));
            }
            (None, Some((field, _))) => {
                return Err(refused(&what, format!("it has no config, so it needs {field}")));
            }
            (_, None) => {}
        }
        if let Some(height) = self.height {
            let (rows, counts) = (height.rows, height.exchanges.max(height.sums));
            let bytes = height.halo_bytes.max(height.sum_bytes).max(height.gather_bytes);
            if !(1..=MAX_CALLS).contains(&rows) || counts > MAX_CALLS || bytes > MAX_BYTES {
                let sense = format!("1 to {MAX_CALLS} rows, as many exchanges, and 2^50 bytes at most");
                return Err(refused(&what, format!("its height makes no sense: {sense} can be placed")));
            }
        }
        let (parameters, each) = (self.parameters.unwrap_or(0), self.bytes_per_parameter.unwrap_or(2));
        let bytes = parameters.checked_mul(each).filter(|b| *b <= MAX_BYTES);
        let flops = (0.0..=MAX_FLOPS).contains(&self.flops_per_item.unwrap_or(0.0));
        let activations = self.activation_bytes.unwrap_or(0) <= MAX_BYTES;
        if bytes.is_none() || !flops || !activations || !matches!(each, 1 | 2 | 4) {
            let sense = "parameters of 1, 2 or 4 bytes, 2^50 bytes at most, and operations from 0 to 1e24";
            return Err(refused(&what, format!("its sizes make no sense: {sense} can be placed")));
        }
        Ok(())
    }

    /// The workload of the same model divided by height, if it is whole and could be.
    pub(super) fn by_height(&self) -> Option<Workload> {
        self.whole_because.as_ref()?;
        self.height.map(|_| Model { whole_because: None, ..self.clone() }.workload())
    }

    /// The workload of a model without a configuration.
    fn workload(&self) -> Workload {
        let each = self.bytes_per_parameter.unwrap_or(2);
        let bytes = self.parameters.unwrap_or(0) * each;
        let flops_per_sequence = self.flops_per_item.unwrap_or(0.0);
        let mut part = Part::new("model", Split::Whole);
        let weights = Work { bytes, reads: bytes, ..Work::default() };
        part.whole = Work { flops_per_sequence, ..weights };
        let height = self.height.filter(|_| self.whole_because.is_none());
        if let Some(Height { rows, exchanges, halo_bytes, sums, sum_bytes, gather_bytes }) = height {
            part.split = Split::Height { rows };
            (part.cut, part.whole) = (Work { flops_per_sequence, ..Work::default() }, weights);
            part.after = Exchange::Halo { exchanges, bytes: halo_bytes, sums, sum_bytes, gather_bytes };
        }
        part.item_bytes = self.activation_bytes.unwrap_or(0);
        // Of its tensors nothing is known: it may be one.
        part.largest[1] = bytes;
        Workload {
            name: String::new(),
            kind: Kind::Forward { branches: 1, latent_bytes: 0 },
            bits: 8 * each as u32,
            stream_bytes: 0,
            blocks: vec![Block { name: "model".to_owned(), parts: vec![part] }],
            order: vec![0],
            tied_bytes: 0,
        }
    }
}

pub(super) fn refused(what: &str, problem: impl std::fmt::Display) -> Error {
    Error::Pipeline { what: what.to_owned(), problem: problem.to_string() }
}
