//! What goes through a model at once.

use serde::{Deserialize, Serialize};

use super::degrees::ContextBy;
use super::workload::{Attention, Keys};

/// Tokens of prompts that are computed at once, unless a single sequence of a model that can't be cut has more. A
/// longer prompt goes through in pieces, so that its activations don't grow with it.
pub const CHUNK: usize = 2048;

/// What is to be as good as it can be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// The time of one step: a token of each sequence; of a model that makes none, a whole pass.
    #[default]
    Decode,
    /// Tokens of prompts a second, over all devices.
    Prefill,
    /// The fewest bytes on the fullest device.
    Memory,
    /// The time of a whole request: its prompt and then the tokens that are made; of a model that makes none, a whole
    /// pass.
    Request {
        /// Tokens to be made, the last ones of the context.
        new_tokens: usize,
    },
}

/// One wave through the model, as one data-parallel rank has it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pass {
    /// What kind of wave.
    pub phase: Phase,
    /// Tokens of it, before the context is divided.
    pub tokens: f64,
    /// Sequences that they are part of.
    pub sequences: f64,
    /// Tokens in each sequence so far.
    pub context: f64,
    /// Waves until all is done.
    pub waves: f64,
}

/// Which kind of wave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// A token of each sequence, which attend to the cache.
    Decode,
    /// Prompts.
    Prefill,
    /// Whole sequences, which attend to themselves.
    Forward,
}

impl Pass {
    /// A decode step of `sequences` with so many tokens each.
    pub fn decode(sequences: usize, context: usize) -> Pass {
        let (n, context) = (sequences as f64, context as f64);
        Pass { phase: Phase::Decode, tokens: n, sequences: n, context, waves: 1.0 }
    }

    /// So many prompts of so many tokens. Where the context is divided, a wave is a sequence.
    pub fn prefill(sequences: usize, context: usize, cp: usize) -> Pass {
        let all = sequences.saturating_mul(context);
        let tokens = if cp > 1 { context.max(CHUNK.min(all)) } else { CHUNK.min(all) };
        Pass::of(Phase::Prefill, tokens as f64, all as f64, context as f64)
    }

    /// So many sequences of so many tokens, whole ones at a time.
    pub fn forward(sequences: usize, tokens: usize) -> Pass {
        let at_once = (CHUNK / tokens.max(1)).clamp(1, sequences.max(1));
        let all = sequences as f64 * tokens as f64;
        Pass::of(Phase::Forward, (at_once * tokens) as f64, all, tokens as f64)
    }

    fn of(phase: Phase, tokens: f64, all: f64, context: f64) -> Pass {
        Pass { phase, tokens, sequences: (tokens / context).max(1.0), context, waves: (all / tokens).ceil() }
    }

    /// Tokens that a rank computes, of this wave: a context is divided except while decoding, where the cache is.
    pub fn local_tokens(&self, cp: usize) -> f64 {
        if self.phase == Phase::Decode { self.tokens } else { self.tokens / cp as f64 }
    }

    /// Keys that each token attends to, on average.
    pub fn keys(&self, keys: Keys) -> f64 {
        match (keys, self.phase) {
            (Keys::Other { tokens }, _) => tokens as f64,
            (Keys::All, _) | (Keys::Causal { window: None }, Phase::Decode) => self.context,
            (Keys::Causal { window }, phase) => {
                // A prompt's tokens have half of it before them.
                let before = if phase == Phase::Decode { self.context } else { self.context / 2.0 };
                window.map_or(before, |w| before.min(w as f64))
            }
        }
    }

    /// Operations of attention on a rank with all heads.
    pub fn attention_flops(&self, a: &Attention, cp: usize) -> f64 {
        a.flops_per_pair * self.tokens * self.keys(a.keys) / cp as f64
    }

    /// Bytes of cache that a rank with all heads reads.
    pub fn cache_reads(&self, a: &Attention, cp: usize) -> f64 {
        match self.phase {
            Phase::Forward => 0.0,
            Phase::Decode | Phase::Prefill => {
                self.sequences * self.keys(a.keys) * a.kv_bytes as f64 / cp as f64
            }
        }
    }

    /// Bytes that a rank with all heads gives to others to attend over a divided context: of queries and results, and
    /// of keys and values. Nothing for attention to another text, which every rank has whole.
    pub fn context_bytes(&self, a: &Attention, cp: usize, by: ContextBy) -> (f64, f64) {
        if cp == 1 || matches!(a.keys, Keys::Other { .. }) {
            return (0.0, 0.0);
        }
        let tokens = self.local_tokens(cp);
        match (self.phase, by) {
            // Each rank attends to its part of the cache; the results are merged.
            (Phase::Decode, _) => (tokens * a.query_bytes as f64, 0.0),
            (_, ContextBy::Ulysses) => (2.0 * tokens * a.query_bytes as f64, tokens * a.kv_bytes as f64),
            (_, ContextBy::Ring) => (0.0, tokens * a.kv_bytes as f64),
        }
    }
}
