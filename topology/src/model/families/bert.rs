//! BERT: an encoder with learned positions and LayerNorm after each block.

use super::super::config::{Fields, LLAMA_NAMES, Names, standard};
use super::{
    BlockRule, Draft, FFN, Family, HEADS, HIDDEN, KV, Stack, Use, VOCAB, When, Whole, embedding, linear,
    norm, tensor,
};
use crate::Result;
use crate::model::layer::Stream;
use crate::model::{Architecture, MAX_DIM};

pub(in crate::model) const BERT: Family = Family {
    architecture: Architecture::Bert,
    read,
    // A BertModel's own file has no prefix; inside a model with a head it is `bert`.
    prefixes: &["", "bert."],
    stem: &[
        embedding("embeddings.word_embeddings.weight"),
        tensor("embeddings.position_embeddings.weight", &[Whole("positions"), HIDDEN], Use::Lookup),
        tensor("embeddings.token_type_embeddings.weight", &[Whole("token_types"), HIDDEN], Use::Lookup),
        norm("embeddings.LayerNorm.weight"),
        norm("embeddings.LayerNorm.bias"),
        tensor("pooler.dense.weight", &[HIDDEN, HIDDEN], Use::Call).when(When::Unused),
        norm("pooler.dense.bias").when(When::Unused),
    ],
    stacks: &[Stack {
        name: "",
        list: "encoder.layer",
        stream: Stream::Tokens,
        kinds: &[&[
            BlockRule {
                rules: &[
                    linear("attention.self.query", HEADS, HIDDEN, When::Always),
                    linear("attention.self.key", KV, HIDDEN, When::Always),
                    linear("attention.self.value", KV, HIDDEN, When::Always),
                    linear("attention.output.dense", HIDDEN, HEADS, When::Always),
                    norm("attention.output.LayerNorm.weight"),
                    norm("attention.output.LayerNorm.bias"),
                ],
                sums: &[("attention.output.dense", Stream::Tokens)],
                cross: false,
            },
            BlockRule {
                rules: &[
                    linear("intermediate.dense", FFN, HIDDEN, When::Always),
                    linear("output.dense", HIDDEN, FFN, When::Always),
                    norm("output.LayerNorm.weight"),
                    norm("output.LayerNorm.bias"),
                ],
                sums: &[("output.dense", Stream::Tokens)],
                cross: false,
            },
        ]],
    }],
    // The masked-language-model head: like the pooler, no part of an embedding.
    head: &[
        tensor("cls.predictions.decoder.weight", &[VOCAB, HIDDEN], Use::Tokens).when(When::Unused),
        tensor("cls.predictions.decoder.bias", &[VOCAB], Use::Vector).when(When::Unused),
        tensor("cls.predictions.bias", &[VOCAB], Use::Vector).when(When::Unused),
    ],
    embeddings: &[("embeddings.word_embeddings", Stream::Tokens)],
    logits: None,
};

fn read(f: &Fields) -> Result<Draft> {
    if let Some(kind) = f.text("position_embedding_type")?.filter(|k| *k != "absolute") {
        return Err(
            f.unsupported(format!("position_embedding_type \"{kind}\" is not supported, only \"absolute\""))
        );
    }
    if f.flag("is_decoder")? == Some(true) {
        return Err(f.unsupported("BERT as a decoder (is_decoder) is not supported, only as an encoder"));
    }
    let names = Names {
        kv_heads: "",
        head_dim: "",
        act: ("hidden_act", "gelu"),
        eps: ("layer_norm_eps", 1e-12),
        default_positions: 512,
        rope: false,
        ..LLAMA_NAMES
    };
    let mut draft = standard(f, Architecture::Bert, &names)?;
    draft.spec.type_vocab_size = f.size("type_vocab_size", MAX_DIM)?.unwrap_or(2);
    draft.sizes[0].set("token_types", draft.spec.type_vocab_size, "type_vocab_size");
    draft.spec.tie_word_embeddings = false;
    draft.flags.remove("tied");
    draft.bias(true, true, true);
    Ok(draft)
}
