//! A fabric's file.

use std::io::{ErrorKind, Read};
use std::path::Path;
use std::{fs, io};

use super::Fabric;
use crate::{Error, Result};

/// The largest file that is read, in any format.
const MAX_BYTES: u64 = 64 << 20;

impl Fabric {
    /// Reads a fabric's file, in the format that it seems to have: see [`Format::of`](super::Format::of).
    ///
    /// # Errors
    /// [`Error::Io`] for what can't be read, and what the format's own function returns, with the file's name.
    pub fn load(path: &Path) -> Result<Fabric> {
        let text = read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        Fabric::from_text(&text).map_err(|e| match e {
            Error::Fabric { what, problem } => {
                Error::Fabric { what: format!("{}: {what}", path.display()), problem }
            }
            Error::Json { what, source } => {
                Error::Json { what: format!("{}: {what}", path.display()), source }
            }
            other => other,
        })
    }
}

/// The text of a file or of a pipe, as far as a fabric can be long.
fn read(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    let invalid = |what: &str| Err(io::Error::new(ErrorKind::InvalidData, what));
    if bytes.len() as u64 > MAX_BYTES {
        return invalid("it is too large for a fabric");
    }
    String::from_utf8(bytes).or_else(|_| invalid("it is no text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_named_in_what_is_wrong_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.toml");
        let refused = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            Fabric::load(&path).unwrap_err().to_string()
        };
        for (bytes, why) in [
            (&b"name = 1"[..], "a.toml: the fabric's TOML: TOML parse error"),
            (b"{", "a.toml: the fabric is not valid JSON"),
            (b"<system version='1'/>", "a.toml: the fabric \"NCCL's topology\": it has 0 hosts"),
            (b"\xff", "it is no text"),
        ] {
            let message = refused(bytes);
            assert!(message.contains(why), "{message}");
        }
        assert!(matches!(Fabric::load(folder.path()), Err(Error::Io { .. })));
        assert!(matches!(Fabric::load("/dev/zero".as_ref()), Err(Error::Io { .. })));
    }
}
