//! One rank of a model: loaded, and run.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rayon::{ThreadPool, ThreadPoolBuilder};
use tensorwire::topology::Plan;
use tensorwire::{Communicator, Wire};

use crate::bert::Bert;
use crate::comm::{Comm, Spent};
use crate::layers::Loader;
use crate::llama::Llama;
use crate::model::Kind;
use crate::text::Text;
use crate::{Error, Model, Result};

/// One rank of a model, ready to run.
///
/// Every rank must make the same calls with the same arguments.
pub struct Runtime {
    network: Network,
    text: Option<Arc<Text>>,
    max_tokens: usize,
    vocab: usize,
    eos: Vec<u32>,
    comm: Comm,
    /// Where the network runs. candle and its matrix products share work out by rayon; called on one of its
    /// own threads, they start at once instead of waking another for each operation.
    pool: ThreadPool,
    loaded: Loaded,
}

enum Network {
    Bert(Bert),
    Llama(Llama),
}

/// What loading took.
#[derive(Clone, Copy, Debug)]
pub struct Loaded {
    /// Bytes of the weights that this rank holds, measured from its tensors. They are held as f32 whatever
    /// the file stores, so this is the plan's `weight_bytes` for an f32 model and twice that for one in f16
    /// or bf16.
    pub weight_bytes: u64,
    /// Growth of the process's resident memory from before to after loading; `None` where /proc is missing.
    pub resident_bytes: Option<u64>,
    /// Seconds that loading took.
    pub load_s: f64,
}

/// One generated token, as it is generated.
#[derive(Clone, Copy, Debug)]
pub struct Token<'a> {
    /// Its place among the generated tokens, from 0.
    pub step: usize,
    /// Its id in the vocabulary.
    pub id: u32,
    /// The text that became complete with it: empty while a character is incomplete, always empty where the
    /// model has no tokenizer.
    pub text: &'a str,
    /// The logits it was chosen from, over the whole vocabulary; the same bits on every rank.
    pub logits: &'a [f32],
    /// What the embedding, each layer and the head took for it on this rank, in that order.
    pub parts: &'a [Spent],
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model generated one of its end-of-sequence tokens.
    EndOfSequence,
    /// The requested number of tokens was generated.
    Length,
}

/// What a decoder generated.
#[derive(Clone, Debug)]
pub struct Generation {
    /// The ids of the generated tokens, without the prompt; an end-of-sequence token is the last one.
    pub tokens: Vec<u32>,
    /// Their text; `None` where the model has no tokenizer.
    pub text: Option<String>,
    /// Why it ended.
    pub finish: Finish,
    /// Seconds from the start to the first token.
    pub prefill_s: f64,
    /// Seconds that the tokens after the first took, the callback's time not included.
    pub decode_s: f64,
    /// Seconds of the two that this rank spent in collectives, waiting for its peers included.
    pub comm_s: f64,
}

impl Generation {
    /// Tokens a second after the first; `None` where there is no second token.
    pub fn decode_tokens_per_s(&self) -> Option<f64> {
        let after_first = self.tokens.len().checked_sub(1).filter(|&n| n > 0)?;
        Some(after_first as f64 / self.decode_s)
    }
}

/// Sentence embeddings.
#[derive(Clone, Debug)]
pub struct Embeddings {
    /// One vector a text, of unit length: their dot products are the cosine similarities.
    pub vectors: Vec<Vec<f32>>,
    /// Tokens in all texts together.
    pub tokens: usize,
    /// Seconds that it took.
    pub seconds: f64,
    /// Seconds of these that this rank spent in collectives.
    pub comm_s: f64,
}

impl Runtime {
    /// Loads the slices that `plan` gives to `comm`'s rank. Nothing is exchanged. A plan that isn't right for
    /// the model is an error.
    pub fn load(model: &Model, plan: &Plan, comm: impl Into<Arc<Communicator>>) -> Result<Runtime> {
        let (start, resident) = (Instant::now(), resident_bytes());
        let comm = Comm::new(comm.into());
        if plan.world != comm.world() {
            return Err(Error::Plan(format!("it is for {} ranks, there are {}", plan.world, comm.world())));
        }
        let spec = model.spec();
        plan.check(spec)?;
        let mut loader = Loader { spec, weights: &model.weights, plan, rank: comm.rank(), bytes: 0 };
        let network = match model.kind() {
            Kind::Encoder => Network::Bert(Bert::load(&mut loader)?),
            Kind::Decoder => Network::Llama(Llama::load(&mut loader)?),
        };
        let loaded = Loaded {
            weight_bytes: loader.bytes,
            resident_bytes: resident_bytes()
                .zip(resident)
                .map(|(after, before)| after.saturating_sub(before)),
            load_s: start.elapsed().as_secs_f64(),
        };
        Ok(Runtime {
            network,
            text: model.text.clone(),
            max_tokens: model.max_tokens(),
            vocab: spec.vocab_size,
            eos: model.eos.clone(),
            comm,
            pool: ThreadPoolBuilder::new().build()?,
            loaded,
        })
    }

    /// Sends what the ranks exchange in fewer bits where they are connected by a network, or as it is: what a slow link
    /// gains is paid for in precision (see [`Wire`]). Every rank must be given the same, and gets the same results.
    pub fn set_wire(&mut self, wire: Option<Wire>) {
        self.comm.wire = wire;
    }

    /// What loading took.
    pub fn loaded(&self) -> Loaded {
        self.loaded
    }

    /// Generates up to `max_tokens` tokens after `prompt` greedily: the largest logit, the lowest id in a
    /// tie. Ends early at an end-of-sequence token. Calls `on_token` for each.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        max_tokens: usize,
        mut on_token: impl FnMut(Token<'_>),
    ) -> Result<Generation> {
        let Network::Llama(llama) = &self.network else {
            return Err(Error::WrongKind { does: "embeds texts", instead: "give it texts, not a prompt" });
        };
        let limit = self.max_tokens;
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        if let Some(&id) = prompt.iter().find(|&&id| id as usize >= self.vocab) {
            return Err(Error::TokenOutOfRange { id, vocab: self.vocab });
        }
        let room = prompt.len().checked_add(max_tokens).filter(|&n| n <= limit);
        let room = room.ok_or(Error::ContextTooLong { prompt: prompt.len(), max_tokens, limit })?;

        let comm_before = self.comm.spent();
        let mut start = Instant::now();
        let mut stream = self.text.as_ref().map(|text| text.stream());
        let mut cache = llama.cache(room)?;
        let mut tokens = Vec::new();
        let mut finish = Finish::Length;
        let (mut prefill, mut decode) = (Duration::ZERO, Duration::ZERO);
        while tokens.len() < max_tokens {
            let next = tokens.last().map_or(prompt, std::slice::from_ref);
            let (logits, parts) = self.pool.install(|| llama.forward(next, &mut cache, &self.comm))?;
            let id = argmax(&logits)?;
            let text = stream.as_mut().map_or(Ok(String::new()), |next| next(id))?;
            *(if tokens.is_empty() { &mut prefill } else { &mut decode }) += start.elapsed();
            on_token(Token { step: tokens.len(), id, text: &text, logits: &logits, parts: &parts });
            start = Instant::now();
            tokens.push(id);
            if self.eos.contains(&id) {
                finish = Finish::EndOfSequence;
                break;
            }
        }
        Ok(Generation {
            text: self.text.as_ref().map(|text| text.decode(&tokens)).transpose()?,
            tokens,
            finish,
            prefill_s: prefill.as_secs_f64(),
            decode_s: decode.as_secs_f64(),
            comm_s: (self.comm.spent() - comm_before).as_secs_f64(),
        })
    }

    /// Embeds each text: the mean of its last hidden states, scaled to unit length.
    pub fn embed(&mut self, texts: &[impl AsRef<str>]) -> Result<Embeddings> {
        let Network::Bert(bert) = &self.network else {
            return Err(Error::WrongKind {
                does: "continues a prompt",
                instead: "give it a prompt, not texts to embed",
            });
        };
        let (start, comm_before) = (Instant::now(), self.comm.spent());
        let text = self.text.as_ref().ok_or(Error::NoTokenizer)?;
        // All texts are checked before the first is run.
        let ids: Vec<Vec<u32>> = texts.iter().map(|t| text.encode(t.as_ref())).collect::<Result<_>>()?;
        if let Some((index, ids)) = ids.iter().enumerate().find(|(_, ids)| ids.len() > self.max_tokens) {
            return Err(Error::TextTooLong { index, tokens: ids.len(), limit: self.max_tokens });
        }
        Ok(Embeddings {
            vectors: self
                .pool
                .install(|| ids.iter().map(|ids| bert.embed(ids, &self.comm)).collect::<Result<_>>())?,
            tokens: ids.iter().map(Vec::len).sum(),
            seconds: start.elapsed().as_secs_f64(),
            comm_s: (self.comm.spent() - comm_before).as_secs_f64(),
        })
    }
}

/// The place of the largest; the first of several.
fn argmax(logits: &[f32]) -> Result<u32> {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &logit) in logits.iter().enumerate() {
        if !logit.is_finite() {
            return Err(Error::NotFinite);
        }
        if logit > best.1 {
            best = (id, logit);
        }
    }
    Ok(best.0 as u32)
}

/// This process's resident memory.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}
