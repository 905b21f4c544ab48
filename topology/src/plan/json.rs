//! The plan's JSON: one line for each layer, rank, tensor shard and note, in a fixed order.

use std::io;

use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter, Serializer};

use super::Plan;
use crate::{Error, Result};

impl Plan {
    /// The plan as JSON, schema [`SCHEMA`](super::SCHEMA). The same plan gives the same bytes.
    pub fn to_json(&self) -> String {
        lines(self)
    }

    /// Reads a plan's JSON and checks that it doesn't contradict itself.
    pub fn from_json(json: &str) -> Result<Plan> {
        let plan: Plan = serde_json::from_str(json)
            .map_err(|source| Error::Json { what: "the plan".to_owned(), source })?;
        plan.validate()?;
        Ok(plan)
    }
}

/// A value without maps that have keys other than strings, as JSON that is read and compared by lines.
pub(crate) fn lines(value: &impl Serialize) -> String {
    let mut out = Vec::new();
    let mut serializer =
        Serializer::with_formatter(&mut out, Lines { pretty: PrettyFormatter::new(), depth: 0 });
    // Writing to memory can't fail.
    let written = value.serialize(&mut serializer);
    debug_assert!(written.is_ok());
    String::from_utf8_lossy(&out).into_owned()
}

/// Indented down to this depth, and on one line below it.
const INDENTED: usize = 2;

/// Indentation for the outer levels alone, so that a plan of thousands of tensors can be read and compared by
/// lines.
struct Lines {
    pretty: PrettyFormatter<'static>,
    depth: usize,
}

impl Lines {
    fn indents(&self) -> bool {
        self.depth <= INDENTED
    }
}

macro_rules! forward {
    ($($method:ident($($arg:ident: $type:ty),*))*) => {
        $(fn $method<W: ?Sized + io::Write>(&mut self, writer: &mut W $(, $arg: $type)*) -> io::Result<()> {
            if self.indents() {
                self.pretty.$method(writer $(, $arg)*)
            } else {
                CompactFormatter.$method(writer $(, $arg)*)
            }
        })*
    };
}

impl Formatter for Lines {
    forward! {
        begin_array_value(first: bool)
        end_array_value()
        begin_object_key(first: bool)
        begin_object_value()
        end_object_value()
    }

    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.depth += 1;
        if self.indents() { self.pretty.begin_array(writer) } else { CompactFormatter.begin_array(writer) }
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        let indents = self.indents();
        self.depth -= 1;
        if indents { self.pretty.end_array(writer) } else { CompactFormatter.end_array(writer) }
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.depth += 1;
        if self.indents() { self.pretty.begin_object(writer) } else { CompactFormatter.begin_object(writer) }
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        let indents = self.indents();
        self.depth -= 1;
        if indents { self.pretty.end_object(writer) } else { CompactFormatter.end_object(writer) }
    }
}
