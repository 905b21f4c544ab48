//! Convolutional autoencoders. Their weights are small and whole on every rank; what could be shared is the picture.

use super::super::config::{Fields, dtype};
use super::{Draft, Family, Sizes};
use crate::Result;
use crate::model::{Architecture, ModelSpec};

pub(in crate::model) const COSMOS_VAE: Family = Family {
    architecture: Architecture::CosmosAutoencoder,
    read,
    prefixes: &[""],
    stem: &[],
    stacks: &[],
    head: &[],
    embeddings: &[],
    logits: None,
};

fn read(f: &Fields) -> Result<Draft> {
    let spec = ModelSpec {
        dtype: dtype(f)?,
        source: f.file.into(),
        notes: vec![
            "whole on every rank: all weights, as convolutions over space and time are small beside what they \
             compute: to share the work, give each rank whole clips or a part of the height, with a halo of one row \
             of its neighbours' before each 3x3x3 convolution and a sum for each group norm's statistics (a pipeline's \
             `height`)"
                .to_owned(),
        ],
        ..ModelSpec::empty(Architecture::CosmosAutoencoder)
    };
    let mut draft = Draft::new(spec, Sizes::default(), 0);
    // Whatever the files hold.
    draft.whole = &[""];
    Ok(draft)
}
