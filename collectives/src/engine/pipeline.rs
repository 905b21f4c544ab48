//! All-reduces that are under way at once over TCP: while the first waits, what the next ones send goes out behind it.
//!
//! A call begins as soon as those before it have asked for all that they send and receive, so that on each connection
//! frames keep the order of the calls: to a peer it looks as if each call had ended before the next, and it may well make
//! them in that way. Small all-reduces send all they have at once; as many as there may be then take the time of one.
//! What goes to and fro more than once overlaps its last message with the next call's first.

use std::collections::VecDeque;
use std::fmt::Debug;

use tensorwire_core::{Call, Error};
use tensorwire_transports::shm::Failure;
use tensorwire_transports::tcp::{Calls, Memory, Place, Span, UNDER_WAY};

use super::net::{NetEngine, copy, reduce};
use super::{Buffers, Reduction};
use crate::schedule::steps::{Step, Steps};
use crate::select::Algorithm;

/// The buffer of a call, which is reduced in place.
pub(crate) trait Owned: Debug + Send {
    fn bytes(&self) -> &[u8];

    fn bytes_mut(&mut self) -> &mut [u8];

    /// Gives the buffer back, or says why there is no result.
    fn settle(self: Box<Self>, result: Result<(), Error>);
}

/// An all-reduce to be made.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) call: Call,
    pub(crate) reduction: Reduction,
    pub(crate) buffer: Box<dyn Owned>,
}

/// An all-reduce that has begun.
#[derive(Debug)]
struct UnderWay {
    seq: u64,
    /// What its steps do.
    reduction: Reduction,
    /// What makes its result of that, where they add up sums of some ranks.
    finish: Option<Reduction>,
    buffer: Box<dyn Owned>,
    steps: Steps,
    /// The next step.
    at: usize,
    /// The step behind the last that sends or receives.
    asked_at: usize,
    /// How many receives and sends there were before it, and with it.
    before: (usize, usize),
    with: (usize, usize),
    /// In words, so that it is aligned for any type.
    scratch: Vec<u64>,
}

impl UnderWay {
    fn has_asked(&self) -> bool {
        self.at >= self.asked_at
    }
}

/// The calls that are under way, in their order.
#[derive(Debug, Default)]
pub(super) struct Pipeline {
    calls: VecDeque<UnderWay>,
    /// The steps and scratch memory of calls that are done, for others.
    spare: Vec<(Steps, Vec<u64>)>,
}

impl Pipeline {
    fn index(&self, call: u64) -> usize {
        (call - self.calls[0].seq) as usize
    }
}

impl Calls for Pipeline {
    fn read(&self, span: Span) -> &[u8] {
        let call = &self.calls[self.index(span.call)];
        let whole = match span.place {
            Place::Scratch => bytemuck::cast_slice(&call.scratch),
            Place::Input | Place::Output => call.buffer.bytes(),
        };
        &whole[span.start..span.end]
    }

    fn write(&mut self, span: Span) -> &mut [u8] {
        let index = self.index(span.call);
        let call = &mut self.calls[index];
        let whole = match span.place {
            Place::Scratch => bytemuck::cast_slice_mut(&mut call.scratch),
            Place::Input | Place::Output => call.buffer.bytes_mut(),
        };
        &mut whole[span.start..span.end]
    }
}

/// What a pipeline has come to.
#[derive(Debug)]
pub(crate) enum Progress {
    /// Its first call is complete.
    Done(Box<dyn Owned>),
    /// It was interrupted, or there is nothing to be done.
    Paused,
}

impl NetEngine {
    /// Goes on with the calls that are under way, and begins what `more` gives, as there is room; until the first is
    /// complete, or the group's handle interrupts it. After an error, none of them [is](NetEngine::abandon) under way.
    pub(crate) fn go_on(
        &mut self,
        more: &mut dyn FnMut(&NetEngine) -> Option<(Request, Algorithm)>,
    ) -> Result<Progress, Failure> {
        loop {
            let goal = match self.pipeline.calls.is_empty() {
                true => None,
                false => Some(self.advance(0)?),
            };
            let room = |calls: &VecDeque<UnderWay>| {
                calls.len() < UNDER_WAY && calls.back().is_none_or(UnderWay::has_asked)
            };
            let mut begun = false;
            // Links are measured when the call that says so is complete, before the next one.
            while !self.adaptation.is_due()
                && room(&self.pipeline.calls)
                && let Some((request, algorithm)) = more(self)
            {
                self.begin_behind(request, algorithm)?;
                begun = true;
            }
            let Some((received, sent)) = goal else {
                if begun {
                    continue;
                }
                return Ok(Progress::Paused);
            };
            let memory = &mut Memory { calls: Some(&mut self.pipeline), ..Memory::none() };
            if !self.group.wait_unless_interrupted(received, sent, memory)? {
                return Ok(Progress::Paused);
            }
            let first = &mut self.pipeline.calls[0];
            if first.at < first.steps.list().len() {
                first.at += 1;
                continue;
            }
            if self.adaptation.is_due() && self.pipeline.calls.len() == 1 {
                self.adapt()?;
            }
            self.group.end_first();
            return Ok(Progress::Done(self.finish_first()));
        }
    }

    /// Whether calls are under way.
    pub(crate) fn is_going_on(&self) -> bool {
        !self.pipeline.calls.is_empty()
    }

    /// The buffers of the calls that were under way when the group ended.
    pub(crate) fn abandon(&mut self) -> Vec<Box<dyn Owned>> {
        self.pipeline.calls.drain(..).map(|call| call.buffer).collect()
    }

    fn begin_behind(&mut self, request: Request, algorithm: Algorithm) -> Result<(), Failure> {
        let Request { call, reduction, mut buffer } = request;
        let (mut steps, mut scratch) = self.pipeline.spare.pop().unwrap_or_default();
        let len = buffer.bytes().len() / call.dtype.map_or(1, |dtype| dtype.size());
        self.note(buffer.bytes().len(), &reduction, algorithm);
        let partial = self.all_reduce_steps(&mut steps, len, &reduction, algorithm, None);
        if partial {
            reduction.alone(Buffers::in_place(buffer.bytes_mut()));
        }
        let words = steps.scratch().div_ceil(8);
        scratch.resize(words.max(scratch.len()), 0);
        let list = steps.list();
        let asks = |step: &Step| matches!(step, Step::Send { .. } | Step::Receive { .. });
        let asked_at = list.iter().rposition(asks).map_or(0, |last| last + 1);
        let receives = list.iter().filter(|s| matches!(s, Step::Receive { .. })).count();
        let sends = list.iter().filter(|s| matches!(s, Step::Send { .. })).count();
        // It is one of those that are under way also where it can't begin: it gets its error as they do.
        let begun = self.group.begin_behind(call);
        let before = *begun.as_ref().unwrap_or(&(0, 0));
        self.pipeline.calls.push_back(UnderWay {
            seq: self.group.seq(),
            reduction: if partial { reduction.partial() } else { reduction },
            finish: partial.then_some(reduction),
            buffer,
            steps,
            at: 0,
            asked_at,
            before,
            with: (before.0 + receives, before.1 + sends),
            scratch,
        });
        begun?;
        self.advance(self.pipeline.calls.len() - 1).map(drop)
    }

    /// Runs the steps of a call up to its next wait, or its end: how many receives and sends must be complete for it to
    /// go on.
    fn advance(&mut self, which: usize) -> Result<(usize, usize), Failure> {
        loop {
            let NetEngine { group, pipeline, sources, .. } = self;
            let call = &mut pipeline.calls[which];
            let Some(step) = call.steps.list().get(call.at).copied() else { return Ok(call.with) };
            let seq = call.seq;
            let output = call.buffer.bytes_mut();
            let scratch = bytemuck::cast_slice_mut(&mut call.scratch);
            let own = &mut Memory { output, scratch, ..Memory::none() };
            match step {
                Step::Send { to, span } => {
                    let memory = &mut Memory { calls: Some(pipeline), ..Memory::none() };
                    group.send(to, span.of(seq), memory)?;
                }
                Step::Receive { from, span } => group.receive(from, span.of(seq)),
                Step::Wait { received, sent } => {
                    let (r, s) = call.before;
                    return Ok((r + received, s + sent));
                }
                Step::Reduce { own: mine, at, count, into, theirs, stride } => {
                    let theirs = |k| theirs + k * stride;
                    reduce(own, &call.reduction, &mut sources.0[..count], at, mine, into, theirs);
                }
                Step::Copy { from, into } => copy(own, from, into),
            }
            pipeline.calls[which].at += 1;
        }
    }

    fn finish_first(&mut self) -> Box<dyn Owned> {
        let mut call = self.pipeline.calls.pop_front().expect("a call that is complete");
        if let Some(reduction) = call.finish {
            reduction.finish(call.buffer.bytes_mut(), self.group.world());
        }
        self.pipeline.spare.push((call.steps, call.scratch));
        call.buffer
    }
}
