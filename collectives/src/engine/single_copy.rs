//! Blocks that ranks read where they lie in each other's memory: each is copied once, by the kernel, and not into a slot and
//! out of it again.
//!
//! That takes two meetings of all ranks, and nothing is done while others read; from some size on it costs less. Where a
//! block has not been written since it was read last, it costs much less: the reader has it in its caches. How much the
//! kernel's copy costs differs between processors, and with where a hypervisor has put them: where no table says from which
//! size on it pays, a group tries it, now and then.

use std::ops::Range;
use std::time::Instant;

use tensorwire_transports::shm::{Failure, INLINE};

use super::Engine;
use super::copy::STREAM_FROM;

/// Bytes of the blocks of a trial.
const TRIAL: usize = 64 << 10;

/// How often each way is timed in a trial; the least time counts.
const ROUNDS: usize = 4;

/// Calls between two trials: enough for these to cost less than a hundredth of the time.
const EVERY: u32 = 4096;

/// The most ranks that try: each has a block of each.
const MOST: usize = 8;

/// Where a block lies, for its reader. The borrow that it was made from lasts until every rank has read.
pub(super) fn address(block: &[u8]) -> u64 {
    block.as_ptr().expose_provenance() as u64
}

impl Engine {
    /// Whether blocks of which the longest of any rank has `longest` bytes are to be read where they lie: the same on
    /// every rank. Outputs that are written past the caches go through slots: the kernel doesn't.
    #[inline]
    pub(super) fn wants_single_copy(&mut self, longest: usize) -> Result<bool, Failure> {
        let world = self.group.world();
        if longest <= self.single_copy_above || longest.saturating_mul(world) >= STREAM_FROM || world == 1 {
            return Ok(false);
        }
        if self.until_trial == 0 {
            self.until_trial = EVERY;
            self.single_copy_pays = self.group.reaches()?
                && (self.group.is_tuned() || world > MOST || self.single_copy_is_faster()?);
        }
        self.until_trial -= 1;
        Ok(self.single_copy_pays)
    }

    /// Times all-gathers both ways, of blocks that were written anew and of the same once more, and compares the means.
    #[cold]
    fn single_copy_is_faster(&mut self) -> Result<bool, Failure> {
        let world = self.group.world();
        let (mut mine, mut all) = (vec![0u8; TRIAL], vec![0u8; TRIAL * world]);
        let block = |r: usize| TRIAL * r..TRIAL * (r + 1);
        let mut least = [u64::MAX; 4];
        for round in 0..ROUNDS {
            for (i, least) in least.iter_mut().enumerate() {
                let (single, again) = (i >= 2, i % 2 == 1);
                if !again {
                    mine.fill(round as u8);
                }
                let begun = Instant::now();
                if single {
                    self.all_gather_single_copy(Some(&mine), &mut all, block)?;
                } else {
                    self.all_gather_through_slots(Some(&mine), &mut all, block, None)?;
                }
                *least = (begun.elapsed().as_nanos() as u64).min(*least);
            }
        }
        // A call takes as long as it takes the slowest, which is the same for all.
        let slowest =
            self.group.exchange::<32>(bytemuck::cast(least))?.into_iter().fold([1; 4], |slowest, theirs| {
                let theirs = bytemuck::cast::<_, [u64; 4]>(theirs);
                std::array::from_fn(|i| theirs[i].max(slowest[i]))
            });
        let [slots, slots_again, single, single_again] = slowest.map(|ns| ns as f64);
        Ok(single * single_again < slots * slots_again)
    }

    /// Reads from each peer `r` what it offers this rank, into `places(r)` of `output`. `offers(r)` is the address of what
    /// this rank offers `r`, of which nothing is written meanwhile; or 0 for every `r`, if it offers nothing. `meanwhile` does
    /// what needs no peer.
    ///
    /// False, and nothing was read, if any rank offers nothing.
    pub(super) fn read_blocks(
        &mut self,
        output: &mut [u8],
        offers: impl Fn(usize) -> u64,
        places: impl Fn(usize) -> Range<usize>,
        meanwhile: impl FnOnce(&mut [u8]),
    ) -> Result<bool, Failure> {
        let (rank, world) = (self.group.rank(), self.group.world());
        let step = self.group.next_step()?;
        self.offers.clear();
        self.offers.extend((0..world).map(offers));
        let offered: &[u8] = bytemuck::cast_slice(&self.offers);
        let inline = offered.len() <= INLINE;
        if inline {
            self.group.publish_inline(offered);
        } else {
            self.group.use_slots(offered.len());
            self.group.slot()[..offered.len()].copy_from_slice(offered);
            self.group.publish();
        }
        meanwhile(output);
        self.group.wait_all(step)?;
        let of = |engine: &Engine, who: usize| {
            let theirs: &[u8] = match inline {
                true => engine.group.peer_inline(who, step),
                false => engine.group.peer_slot(who, step),
            };
            bytemuck::pod_read_unaligned::<u64>(&theirs[size_of::<u64>() * rank..][..size_of::<u64>()])
        };
        let all = self.offers[rank] != 0 && self.peers().all(|who| of(self, who) != 0);
        // Each begins with another, so that no rank's memory is read by all at once.
        for who in (1..world).map(|k| (rank + k) % world).filter(|_| all) {
            let place = places(who);
            if !place.is_empty() {
                self.group.read_peer(who, of(self, who), &mut output[place])?;
            }
        }
        if all {
            let step = self.group.next_step()?;
            self.group.publish();
            self.group.wait_all(step)?;
        }
        Ok(all)
    }
}
