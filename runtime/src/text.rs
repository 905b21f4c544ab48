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

#[cfg(test)]
mod tests {
    use super::*;

    /// A tokenizer with a token for each byte, and settings that would cut and pad.
    fn bytes() -> Text {
        // Byte-level tokenizers write a byte as a printable character; these are those of the test's text.
        let vocab = ["h", "Ã", "©", "l", "o", "Ġ", "ä", "¸", "ĸ", "!"];
        let vocab: serde_json::Map<_, _> =
            vocab.iter().enumerate().map(|(i, c)| ((*c).to_owned(), i.into())).collect();
        let level = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true});
        let json = serde_json::json!({
            "version": "1.0",
            "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
            "padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "h"},
            "added_tokens": [], "normalizer": null, "pre_tokenizer": level, "post_processor": null,
            "decoder": level, "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), json.to_string()).unwrap();
        Text::open(file.path()).unwrap()
    }

    #[test]
    fn neither_cuts_nor_pads() {
        assert_eq!(bytes().encode("héllo 世!").unwrap(), [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9]);
    }

    #[test]
    fn streams_whole_characters() {
        let text = bytes();
        let ids = text.encode("héllo 世!").unwrap();
        assert_eq!(text.decode(&ids).unwrap(), "héllo 世!");
        let mut stream = text.stream();
        let pieces: Vec<String> = ids.iter().map(|&id| stream(id).unwrap()).collect();
        assert_eq!(pieces, ["h", "", "é", "l", "l", "o", " ", "", "", "世", "!"]);
    }

    #[test]
    fn streams_broken_characters_too() {
        // A model may generate bytes that are no character. Each shows as a replacement character, once.
        let text = bytes();
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % 10
        };
        for _ in 0..200 {
            let ids: Vec<u32> = (0..20).map(|_| next()).chain([9]).collect();
            let mut stream = text.stream();
            let streamed: String = ids.iter().map(|&id| stream(id).unwrap()).collect();
            assert_eq!(streamed, text.decode(&ids).unwrap(), "{ids:?}");
        }
    }
}
