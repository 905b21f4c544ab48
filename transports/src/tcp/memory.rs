//! The buffers of a call, and pieces of them.

use std::ops::Range;

/// One of a call's buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// What this rank contributes: its input, or its output where the call works in place.
    Input,
    /// Where the call's result goes.
    Output,
    /// Memory for what comes from peers to be reduced.
    Scratch,
}

/// Some bytes of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Which buffer.
    pub place: Place,
    /// Its first byte.
    pub start: usize,
    /// The byte after its last.
    pub end: usize,
    /// Of which call, where several are under way: its number.
    pub call: u64,
}

impl Span {
    /// The bytes `range` of `place`.
    #[inline]
    pub fn new(place: Place, range: Range<usize>) -> Span {
        Span { place, start: range.start, end: range.end, call: 0 }
    }

    /// The same bytes of call number `call` of several.
    #[inline]
    pub fn of(self, call: u64) -> Span {
        Span { call, ..self }
    }

    /// Its bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether it has none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }
}

/// The buffers of calls that are under way at once. What a span means is as for [`Memory`].
pub trait Calls: std::fmt::Debug {
    /// The bytes of a span.
    fn read(&self, span: Span) -> &[u8];

    /// The bytes of a span, to be written.
    fn write(&mut self, span: Span) -> &mut [u8];
}

/// The buffers of a call.
#[derive(Debug)]
pub struct Memory<'a> {
    /// This rank's contribution; `None` where it is the output.
    pub input: Option<&'a [u8]>,
    /// Where the result goes.
    pub output: &'a mut [u8],
    /// See [`Place::Scratch`].
    pub scratch: &'a mut [u8],
    /// In place of all these, those of several calls.
    pub calls: Option<&'a mut dyn Calls>,
}

impl<'a> Memory<'a> {
    /// No buffers, for what carries nothing.
    pub fn none() -> Memory<'a> {
        Memory { input: None, output: &mut [], scratch: &mut [], calls: None }
    }

    /// The bytes of a span.
    #[inline]
    pub fn read(&self, span: Span) -> &[u8] {
        if let Some(calls) = &self.calls {
            return calls.read(span);
        }
        let whole = match span.place {
            Place::Input => self.input.unwrap_or(self.output),
            Place::Output => self.output,
            Place::Scratch => self.scratch,
        };
        &whole[span.start..span.end]
    }

    /// The bytes of a span, to be written.
    #[inline]
    pub fn write(&mut self, span: Span) -> &mut [u8] {
        if let Some(calls) = &mut self.calls {
            return calls.write(span);
        }
        let whole = match span.place {
            Place::Scratch => &mut *self.scratch,
            // The input is written only where it is the output.
            Place::Input | Place::Output => &mut *self.output,
        };
        &mut whole[span.start..span.end]
    }
}
