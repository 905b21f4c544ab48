//! Files that a command writes: known to be writable before there is anything to write.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::failure::Failure;

/// A file that was named on the command line and will be written whole.
pub(crate) struct OutputFile {
    path: PathBuf,
    file: File,
    /// Made by us and still empty.
    unused: bool,
}

impl OutputFile {
    /// Opens the file that was given as `option`, such as `--svg`, and leaves what it holds.
    pub(crate) fn open(option: &str, path: &Path) -> Result<OutputFile, Failure> {
        let file = match OpenOptions::new().write(true).create_new(true).open(path) {
            Ok(file) => Ok((file, true)),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                OpenOptions::new().write(true).open(path).map(|file| (file, false))
            }
            Err(e) => Err(e),
        };
        match file {
            Ok((file, unused)) => Ok(OutputFile { path: path.to_owned(), file, unused }),
            Err(e) => Err(Failure::usage(format!("{option} {}: {e}", path.display()))),
        }
    }

    /// Replaces what the file held.
    pub(crate) fn write(mut self, text: &str) -> Result<(), Failure> {
        self.replace(text).map_err(|e| Failure::run(format!("cannot write {}: {e}", self.path.display())))
    }

    fn replace(&mut self, text: &str) -> io::Result<()> {
        // A pipe or a terminal has no length.
        if self.file.metadata()?.is_file() {
            self.file.set_len(0)?;
        }
        self.file.write_all(text.as_bytes())?;
        self.unused = false;
        Ok(())
    }
}

impl Drop for OutputFile {
    /// A run that failed leaves no empty file behind.
    fn drop(&mut self) {
        if self.unused {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_only_by_a_whole_text() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new.svg");
        drop(OutputFile::open("--svg", &path).unwrap());
        assert!(!path.exists(), "nothing was drawn");
        OutputFile::open("--svg", &path).unwrap().write("a long first picture").unwrap();
        drop(OutputFile::open("--svg", &path).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "a long first picture");
        OutputFile::open("--svg", &path).unwrap().write("second").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "second");
        assert!(OutputFile::open("--svg", directory.path()).is_err());
        assert!(OutputFile::open("--svg", &directory.path().join("none/x.svg")).is_err());
    }
}
