//! What a rank does in a collective, as a list of steps.

use std::ops::Range;

use tensorwire_transports::tcp::{Place, Span};

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
    /// Reduces `count` contributions, in order, into `into`: `own` is number `at`, and number `k` of the others is at
    /// byte `theirs + k * stride` of the scratch memory.
    Reduce { own: Span, at: usize, count: usize, into: Span, theirs: usize, stride: usize },
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

    /// Reduces what lies in the output at `own` with what came to byte `theirs` of the scratch memory, in place; that is
    /// the first operand if it is from `before` this rank.
    pub(super) fn fold(&mut self, own: Range<usize>, theirs: usize, before: bool) {
        let own = Span::new(Place::Output, own);
        self.list.push(Step::Reduce { own, at: usize::from(before), count: 2, into: own, theirs, stride: 0 });
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

    /// Waits for the sends before the `i`th mark.
    pub(super) fn wait_sends(&mut self, i: usize) {
        self.list.push(Step::Wait { received: 0, sent: self.marks[i].1 });
    }

    /// Waits for everything that was begun before the last mark.
    pub(super) fn wait_last(&mut self) {
        if let Some(last) = self.marks.len().checked_sub(1) {
            self.wait(last, true);
        }
    }
}

#[cfg(test)]
#[path = "simulate.rs"]
pub(super) mod simulate;
