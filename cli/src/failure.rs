//! How a command fails: an exit status, and one line that says why.

use std::fmt::Display;
use std::io::{self, Write};

/// 128 + SIGPIPE: what a program that dies of a closed pipe is seen to exit with.
const OUTPUT_CLOSED: i32 = 141;

/// Why the process ends unsuccessfully.
#[derive(Debug)]
pub(crate) struct Failure {
    status: i32,
    line: Option<String>,
}

impl Failure {
    /// Bad usage or an impossible request: status 2.
    pub(crate) fn usage(why: impl Display) -> Failure {
        Failure::with_status(2, why)
    }

    /// A run that failed: status 1.
    pub(crate) fn run(why: impl Display) -> Failure {
        Failure::with_status(1, why)
    }

    /// A status of its own.
    pub(crate) fn with_status(status: i32, why: impl Display) -> Failure {
        Failure { status, line: Some(why.to_string()) }
    }

    /// Ends without a word.
    pub(crate) fn quiet(status: i32) -> Failure {
        Failure { status, line: None }
    }

    /// Nobody reads our output any more: nothing to say, and nobody to say it to.
    pub(crate) fn output_closed() -> Failure {
        Failure::quiet(OUTPUT_CLOSED)
    }

    /// Says why, and ends the process.
    pub(crate) fn exit(self) -> ! {
        if let Some(line) = self.line {
            let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
            // Where standard error is closed too, the status has to do.
            let _ = writeln!(io::stderr(), "tensorwire: {line}");
        }
        std::process::exit(self.status)
    }
}

impl From<io::Error> for Failure {
    /// A failure to write to standard output.
    fn from(e: io::Error) -> Failure {
        match e.kind() {
            io::ErrorKind::BrokenPipe => Failure::output_closed(),
            _ => Failure::run(format!("cannot write to standard output: {e}")),
        }
    }
}

/// Prints a text to standard output at once.
pub(crate) fn print(text: impl Display) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    write!(out, "{text}")?;
    Ok(out.flush()?)
}

/// A number of ranks on the command line.
pub(crate) fn ranks(text: &str) -> Result<usize, String> {
    const MOST: usize = 4096;
    match text.parse::<usize>() {
        Ok(0) => Err("there must be at least one rank".into()),
        Ok(n) if n > MOST => Err(format!("at most {MOST} ranks can run on one host")),
        Ok(n) => Ok(n),
        Err(_) => Err("not a number of ranks".into()),
    }
}
