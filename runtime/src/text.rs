//! Text to token ids and back, by the model's own `tokenizer.json`.

use std::path::Path;

use tokenizers::Tokenizer;

use crate::{Error, Result};

/// A model's tokenizer.
pub(crate) struct Text(Tokenizer);

impl Text {
    /// Reads `tokenizer.json`.
    pub(crate) fn open(path: &Path) -> Result<Text> {
        let malformed = |e: tokenizers::Error| Error::Malformed { path: path.to_owned(), why: e.to_string() };
        let mut tokenizer = Tokenizer::from_file(path).map_err(malformed)?;
        // Files often carry the settings of their last training run. Nothing is cut silently here, and one
        // text at a time needs no padding.
        tokenizer.with_truncation(None).map_err(malformed)?;
        tokenizer.with_padding(None);
        Ok(Text(tokenizer))
    }

    /// The text's token ids, with the special tokens that the model expects around it.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.0.encode(text, true).map_err(tokenizer_error)?.get_ids().to_vec())
    }

    /// The ids' text, without special tokens.
    pub(crate) fn decode(&self, ids: &[u32]) -> Result<String> {
        self.0.decode(ids, true).map_err(tokenizer_error)
    }

    /// Decodes ids one by one: each call gives the text that became complete, empty inside a character.
    pub(crate) fn stream(&self) -> impl FnMut(u32) -> Result<String> {
        let mut stream = self.0.decode_stream(true);
        move |id| Ok(stream.step(id).map_err(tokenizer_error)?.unwrap_or_default())
    }
}

fn tokenizer_error(e: tokenizers::Error) -> Error {
    Error::Tokenizer(e.to_string())
}
