//! Measures links: how long exchanges over them take.

use std::time::Instant;

use tensorwire_core::{Call, DType, Op, ReduceOp};
use tensorwire_transports::shm::Failure;

use super::{Buffers, NetEngine, Reduction};
use crate::network::{Exchange, LinkClass};
use crate::schedule::around::Rings;

impl NetEngine {
    /// See [`Communicator::measure_link`](crate::Communicator::measure_link).
    pub(crate) fn measure_link(
        &mut self,
        class: LinkClass,
        bytes: usize,
        messages: usize,
        times: usize,
    ) -> Result<Option<Exchange>, Failure> {
        let rings = Rings::new(self.network.hosts(), class);
        let Some(sharing) = rings.map(|rings| rings.sharing()) else { return Ok(None) };
        let call = Call {
            op: Op::MeasureLink,
            dtype: Some(DType::U8),
            reduce: None,
            count: bytes as u64,
            root: Some(messages as u32),
            layout: (times as u32) << 1 | class as u32,
        };
        let mut slowest = [0u64];
        self.run(call, |engine| {
            let took = engine.time_exchanges(class, bytes, messages, times)?;
            slowest[0] = took.iter().sum();
            engine.agree_on_most(&mut slowest)
        })?;
        let us = slowest[0] as f64 * 1e-3 / times.max(1) as f64;
        Ok(Some(Exchange { us, bytes: bytes * messages * sharing }))
    }

    /// Exchanges `messages` of `bytes` with this rank's neighbours over a class of links, one time after the other: the
    /// nanoseconds of each; no time is noticed where there is no such link, or none of this rank.
    pub(super) fn time_exchanges(
        &mut self,
        class: LinkClass,
        bytes: usize,
        messages: usize,
        times: usize,
    ) -> Result<Vec<u64>, Failure> {
        let Some(rings) = Rings::new(self.network.hosts(), class) else { return Ok(Vec::new()) };
        rings.exchange(&mut self.steps, self.group.rank(), bytes, messages);
        let (input, mut output) = (vec![0; bytes], vec![0; bytes]);
        let mut took = Vec::with_capacity(times);
        for _ in 0..times {
            let start = Instant::now();
            self.execute(Buffers { input: Some(&input), output: &mut output }, None)?;
            took.push(start.elapsed().as_nanos() as u64);
        }
        Ok(took)
    }

    /// Replaces each value by the largest of all ranks'.
    pub(super) fn agree_on_most(&mut self, values: &mut [u64]) -> Result<(), Failure> {
        let max = Reduction::new(DType::U64, ReduceOp::Max).expect("the largest of integers is defined");
        let data = Buffers::in_place(bytemuck::cast_slice_mut(values));
        let algorithm = self.choose(data.len(), &max);
        self.all_reduce(data, &max, algorithm, None)
    }
}
