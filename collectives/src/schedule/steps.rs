//! What a rank does in a collective, as a list of steps.

use tensorwire_transports::tcp::Span;

/// A rank and its world.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rank {
    pub(crate) rank: usize,
    pub(crate) world: usize,
}

impl Rank {
    /// The others, from the next one on: where every rank sends in this order, each is sent to by one at a time.
    pub(crate) fn peers_ahead(self) -> impl Iterator<Item = usize> {
        (1..self.world).map(move |i| (self.rank + i) % self.world)
    }

    /// The others, in the order in which they send to this rank.
    pub(crate) fn peers_behind(self) -> impl Iterator<Item = usize> {
        (1..self.world).map(move |i| (self.rank + self.world - i) % self.world)
    }
}

/// A step. Sends and receives are begun, and go on while later steps wait; those of a pair of ranks keep their order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Step {
    /// Sends bytes to a rank.
    Send { to: usize, span: Span },
    /// Receives bytes from a rank.
    Receive { from: usize, span: Span },
    /// Waits until the first so many receives of the list, and sends, are complete.
    Wait { received: usize, sent: usize },
    /// Reduces every rank's contribution, in rank order, into `into`: this rank's from byte `own` of the input on, rank
    /// `r`'s from byte `theirs + r * stride` of the scratch memory on.
    Reduce { own: usize, into: Span, theirs: usize, stride: usize },
    /// Copies within this rank.
    Copy { from: Span, into: Span },
}

/// The steps of a call. After the last, whatever was begun is completed.
#[derive(Debug, Default)]
pub(crate) struct Steps {
    list: Vec<Step>,
    scratch: usize,
    sends: usize,
    receives: usize,
    /// How many receives and sends there were at each mark.
    marks: Vec<(usize, usize)>,
}

impl Steps {
    /// Begins anew, with so many bytes of scratch memory.
    pub(crate) fn begin(&mut self, scratch: usize) {
        self.list.clear();
        self.marks.clear();
        (self.scratch, self.sends, self.receives) = (scratch, 0, 0);
    }

    pub(crate) fn list(&self) -> &[Step] {
        &self.list
    }

    /// Bytes of scratch memory that the steps use.
    pub(crate) fn scratch(&self) -> usize {
        self.scratch
    }

    pub(super) fn push(&mut self, step: Step) {
        self.list.push(step);
    }

    pub(super) fn send(&mut self, to: usize, span: Span) {
        self.sends += 1;
        self.list.push(Step::Send { to, span });
    }

    pub(super) fn receive(&mut self, from: usize, span: Span) {
        self.receives += 1;
        self.list.push(Step::Receive { from, span });
    }

    /// Remembers this place for [`wait`](Steps::wait).
    pub(super) fn mark(&mut self) {
        self.marks.push((self.receives, self.sends));
    }

    /// Waits for the receives before the `i`th mark and, if `sends`, for the sends.
    pub(super) fn wait(&mut self, i: usize, sends: bool) {
        let (received, sent) = self.marks[i];
        self.list.push(Step::Wait { received, sent: if sends { sent } else { 0 } });
    }
}

#[cfg(test)]
#[path = "simulate.rs"]
mod simulate;
