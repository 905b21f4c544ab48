//! Collectives that move blocks: all-gather, gather, scatter, broadcast, all-to-all, reduce-scatter.

use std::ops::Range;

use tensorwire_core::Error;
use tensorwire_transports::shm::{Failure, INLINE};

use super::copy::{STREAM_FROM, copy_for, own_copy_for};
use super::single_copy::address;
use super::{Buffers, Engine, Reduction};
use crate::schedule::Pieces;

/// Bytes of a block from which a rank that gathers reads its own once, for its slot and for its place in the output. Of
/// less, its peers had rather not wait for the second.
const TOGETHER_FROM: usize = 64 << 10;

impl Engine {
    /// `block(r)` are the bytes of `output` that rank `r`'s `input` becomes, on every rank or on `root` alone,
    /// whose `output` alone is looked at then. Without an input, the rank's block of its `output` is it.
    pub(crate) fn all_gather(
        &mut self,
        input: Option<&[u8]>,
        output: &mut [u8],
        block: impl Fn(usize) -> Range<usize>,
        root: Option<usize>,
    ) -> Result<(), Failure> {
        let (rank, world) = (self.group.rank(), self.group.world());
        let wanted = root.is_none_or(|root| root == rank);
        let longest = (0..world).map(|r| block(r).len()).max().unwrap_or(0);
        if longest <= INLINE {
            let step = self.group.next_step()?;
            self.group.publish_inline(input.unwrap_or_else(|| &output[block(rank)]));
            if wanted {
                if let Some(input) = input {
                    output[block(rank)].copy_from_slice(input);
                }
                self.group.wait_all(step)?;
                for who in self.peers() {
                    let to = &mut output[block(who)];
                    to.copy_from_slice(&self.group.peer_inline(who, step)[..to.len()]);
                }
            }
            return Ok(());
        }
        // Those who gather nothing had rather not wait for the one who does.
        if root.is_none() && self.wants_single_copy(longest)? {
            return self.all_gather_single_copy(input, output, block);
        }
        self.all_gather_through_slots(input, output, block, root)
    }

    /// As [`all_gather`](Engine::all_gather), of blocks that ranks read where they lie.
    pub(super) fn all_gather_single_copy(
        &mut self,
        input: Option<&[u8]>,
        output: &mut [u8],
        block: impl Fn(usize) -> Range<usize>,
    ) -> Result<(), Failure> {
        let own = block(self.group.rank());
        let mine = address(input.unwrap_or_else(|| &output[own.clone()]));
        let copy_own = |output: &mut [u8]| {
            if let Some(input) = input {
                output[own].copy_from_slice(input);
            }
        };
        self.read_blocks(output, |_| mine, block, copy_own)
            .map(|read| debug_assert!(read, "all offer their block"))
    }

    /// As [`all_gather`](Engine::all_gather), of blocks that are copied into slots, in pieces, and from there.
    pub(super) fn all_gather_through_slots(
        &mut self,
        input: Option<&[u8]>,
        output: &mut [u8],
        block: impl Fn(usize) -> Range<usize>,
        root: Option<usize>,
    ) -> Result<(), Failure> {
        let (rank, world) = (self.group.rank(), self.group.world());
        let wanted = root.is_none_or(|root| root == rank);
        let longest = (0..world).map(|r| block(r).len()).max().unwrap_or(0);
        let (chunk, len) = (self.chunk, output.len());
        let (copy, copy_own) = (copy_for(len), own_copy_for(len));
        let pieces = |who: usize| Pieces::new(block(who).len(), 1, chunk);
        let together = longest >= TOGETHER_FROM && output.len() < STREAM_FROM;
        self.group.use_slots(chunk.min(longest));
        self.rounds(
            Pieces::new(longest, 1, chunk).count(),
            |_| wanted,
            |engine, output, write| {
                let (piece, start) = (pieces(rank).range(write), block(rank).start);
                let own = start + piece.start..start + piece.end;
                match input {
                    Some(input) if wanted && together => {
                        let Engine { group, writer, .. } = engine;
                        let slot = &mut group.slot()[..piece.len()];
                        writer.write_both(slot, &mut output[own], &input[piece]);
                    }
                    Some(input) => engine.write_slot(0, &input[piece]),
                    None => engine.write_slot(0, &output[own]),
                }
            },
            |output, written| {
                if let (true, Some(input)) = (wanted && !together, input) {
                    let (piece, start) = (pieces(rank).range(written), block(rank).start);
                    copy_own(&mut output[start + piece.start..start + piece.end], &input[piece]);
                }
            },
            |engine, output, read, step| {
                for who in engine.peers().filter(|_| wanted) {
                    let (piece, start) = (pieces(who).range(read), block(who).start);
                    let from = &engine.group.peer_slot(who, step)[..piece.len()];
                    copy(&mut output[start + piece.start..start + piece.end], from);
                }
            },
            output,
        )
    }

    /// `block(r)` are the bytes of `root`'s `input` that become rank `r`'s `output`; no other `input` is looked
    /// at. Without an input, the root's `output` is it, of which nothing changes.
    pub(crate) fn scatter(
        &mut self,
        input: Option<&[u8]>,
        output: &mut [u8],
        block: impl Fn(usize) -> Range<usize>,
        root: usize,
    ) -> Result<(), Failure> {
        let (rank, world) = (self.group.rank(), self.group.world());
        let longest = (0..world).map(|r| block(r).len()).max().unwrap_or(0);
        let (room, len) = (self.room(longest), output.len());
        let (copy, copy_own) = (copy_for(len), own_copy_for(len));
        let pieces = |who: usize| Pieces::new(block(who).len(), 1, room);
        self.rounds(
            Pieces::new(longest, 1, room).count(),
            |who| who == root,
            |engine, output, write| {
                let input = input.unwrap_or(output);
                for who in engine.peers().filter(|_| rank == root) {
                    let (piece, from) = (pieces(who).range(write), block(who).start);
                    engine.write_slot(place(rank, who) * room, &input[from + piece.start..from + piece.end]);
                }
            },
            |output, written| {
                if let (true, Some(input)) = (rank == root, input) {
                    let (piece, from) = (pieces(rank).range(written), block(rank).start);
                    copy_own(&mut output[piece.clone()], &input[from + piece.start..from + piece.end]);
                }
            },
            |engine, output, read, step| {
                if rank != root {
                    let to = &mut output[pieces(rank).range(read)];
                    copy(to, &engine.group.peer_slot(root, step)[place(root, rank) * room..][..to.len()]);
                }
            },
            output,
        )
    }

    /// `sends(r)` are the bytes of `input` that go to rank `r`, `receives(r)` those of `output` that come from
    /// it; `longest` is the most that any rank sends to any. Without an input, `output` is it, and `receives` what
    /// `sends` is.
    pub(crate) fn all_to_all(
        &mut self,
        input: Option<&[u8]>,
        output: &mut [u8],
        sends: impl Fn(usize) -> Range<usize>,
        receives: impl Fn(usize) -> Range<usize>,
        longest: usize,
    ) -> Result<(), Failure> {
        let rank = self.group.rank();
        if longest.saturating_mul(self.group.world() - 1) <= INLINE {
            let from = input.unwrap_or(output);
            let step = self.publish_blocks(longest, |who| &from[sends(who)])?;
            if let Some(input) = input {
                output[receives(rank)].copy_from_slice(&input[sends(rank)]);
            }
            self.group.wait_all(step)?;
            for who in self.peers() {
                let to = &mut output[receives(who)];
                to.copy_from_slice(
                    &self.group.peer_inline(who, step)[place(who, rank) * longest..][..to.len()],
                );
            }
            return Ok(());
        }
        if self.wants_single_copy(longest)? {
            // In place, a rank would write over what its peers are to read.
            let offer = |who: usize| input.map_or(0, |input| address(&input[sends(who)]));
            let own = |output: &mut [u8]| {
                if let Some(input) = input {
                    output[receives(rank)].copy_from_slice(&input[sends(rank)]);
                }
            };
            if self.read_blocks(output, offer, &receives, own)? {
                return Ok(());
            }
        }
        let (room, len) = (self.room(longest), output.len());
        let (copy, copy_own) = (copy_for(len), own_copy_for(len));
        self.rounds(
            Pieces::new(longest, 1, room).count(),
            |_| true,
            |engine, output, write| {
                let input = input.unwrap_or(output);
                for who in engine.peers() {
                    let block = sends(who);
                    let piece = Pieces::new(block.len(), 1, room).range(write);
                    engine.write_slot(
                        place(rank, who) * room,
                        &input[block.start + piece.start..block.start + piece.end],
                    );
                }
            },
            |output, written| {
                let Some(input) = input else { return };
                let (from, to) = (sends(rank).start, receives(rank).start);
                let piece = Pieces::new(sends(rank).len(), 1, room).range(written);
                let own = &input[from + piece.start..from + piece.end];
                copy_own(&mut output[to + piece.start..to + piece.end], own);
            },
            |engine, output, read, step| {
                for who in engine.peers() {
                    let block = receives(who);
                    let piece = Pieces::new(block.len(), 1, room).range(read);
                    let to = &mut output[block.start + piece.start..block.start + piece.end];
                    copy(to, &engine.group.peer_slot(who, step)[place(who, rank) * room..][..to.len()]);
                }
            },
            output,
        )
    }

    /// Tells every rank how many bytes this one sends to each, and checks what this one expects against what
    /// the others send. Returns the most that any rank sends to any.
    pub(crate) fn agree_on_counts(&mut self, sends: &[u64], expects: &[u64]) -> Result<u64, Failure> {
        let step = self.group.next_step()?;
        let bytes = bytemuck::cast_slice::<u64, u8>(sends);
        self.group.use_slots(bytes.len());
        self.write_slot(0, bytes);
        self.group.publish();
        self.group.wait_all(step)?;
        let mut most = sends.iter().copied().max().unwrap_or(0);
        for who in self.peers() {
            let theirs = &bytemuck::cast_slice::<u8, u64>(self.group.peer_slot(who, step))[..sends.len()];
            most = most.max(theirs.iter().copied().max().unwrap_or(0));
            let (sent, expected) = (theirs[self.group.rank()], expects[who]);
            if sent != expected {
                let rank = self.group.rank();
                let what = format!("rank {who} sends {sent} bytes to rank {rank}, which expects {expected}");
                return Err(self.group.fail(Error::InvalidArgument(what)));
            }
        }
        Ok(most)
    }

    /// Block `block(r)` of the input is reduced into rank `r`'s `output`. Without an input, `output` is it, and
    /// the rank's block of it is reduced where it lies.
    pub(crate) fn reduce_scatter(
        &mut self,
        input: Option<&[u8]>,
        output: &mut [u8],
        block: impl Fn(usize) -> Range<usize>,
        r: &Reduction,
    ) -> Result<(), Failure> {
        let (rank, world, size) = (self.group.rank(), self.group.world(), r.dtype.size());
        let longest = (0..world).map(|r| block(r).len()).max().unwrap_or(0);
        if longest.saturating_mul(world - 1) <= INLINE {
            let from = input.unwrap_or(output);
            let step = self.publish_blocks(longest, |who| &from[block(who)])?;
            self.group.wait_all(step)?;
            let Engine { group, sources, .. } = self;
            let own = block(rank);
            let mut data = match input {
                Some(input) => Buffers { input: Some(&input[own.clone()]), output },
                None => Buffers::in_place(&mut output[own.clone()]),
            };
            data.reduce(r, 0..own.len(), rank, sources, |peer, len| {
                &group.peer_inline(peer, step)[place(peer, rank) * longest..][..len]
            });
            return Ok(());
        }
        let room = self.room(longest);
        // The bytes of piece `i` of a block.
        let piece = |block: &Range<usize>, i: usize| {
            let p = Pieces::new(block.len() / size, size, room).range(i);
            p.start * size..p.end * size
        };
        self.rounds(
            Pieces::new(longest / size, size, room).count(),
            |_| true,
            |engine, output, write| {
                let input = input.unwrap_or(output);
                for who in engine.peers() {
                    let block = block(who);
                    let piece = piece(&block, write);
                    engine.write_slot(
                        place(rank, who) * room,
                        &input[block.start + piece.start..block.start + piece.end],
                    );
                }
            },
            |_, _| {},
            |engine, output, read, step| {
                let Engine { group, sources, .. } = engine;
                let own = piece(&block(rank), read);
                let mut data = match input {
                    Some(input) => Buffers { input: Some(&input[block(rank)]), output },
                    None => Buffers::in_place(&mut output[block(rank)]),
                };
                data.reduce(r, own, rank, sources, |peer, len| {
                    &group.peer_slot(peer, step)[place(peer, rank) * room..][..len]
                });
            },
            output,
        )
    }

    /// Copies `root`'s input, or without one its `output`, into every rank's `output`.
    pub(crate) fn broadcast(
        &mut self,
        input: Option<&[u8]>,
        output: &mut [u8],
        root: usize,
    ) -> Result<(), Failure> {
        let (pieces, len) = (Pieces::new(output.len(), 1, self.chunk), output.len());
        let copy = copy_for(len);
        self.group.use_slots(pieces.range(0).len());
        // An empty broadcast is a step too: it shows whether the ranks agree.
        for i in 0..pieces.count().max(1) {
            let own = input.map(|input| &input[pieces.range(i)]);
            let piece = &mut output[pieces.range(i)];
            let step = self.group.next_step()?;
            let inline = piece.len() <= INLINE;
            if self.group.rank() == root {
                let from = own.unwrap_or(piece);
                if inline {
                    self.group.publish_inline(from);
                } else {
                    self.write_slot(0, from);
                    self.group.publish();
                }
                if let Some(own) = own {
                    own_copy_for(len)(piece, own);
                }
            } else {
                self.group.publish();
                self.group.wait(root, step)?;
                let from = if inline {
                    &self.group.peer_inline(root, step)[..]
                } else {
                    self.group.peer_slot(root, step)
                };
                copy(piece, &from[..piece.len()]);
            }
        }
        Ok(())
    }

    /// Publishes a block of up to `longest` bytes for each peer in the flag's cache line, which has room for them all.
    #[inline]
    fn publish_blocks<'a>(
        &mut self,
        longest: usize,
        block: impl Fn(usize) -> &'a [u8],
    ) -> Result<u64, Failure> {
        let step = self.group.next_step()?;
        let (rank, mut all) = (self.group.rank(), [0; INLINE]);
        for who in self.peers() {
            let block = block(who);
            all[place(rank, who) * longest..][..block.len()].copy_from_slice(block);
        }
        self.group.publish_inline(&all);
        Ok(step)
    }

    /// Bytes of a slot for each peer, where a slot holds a piece of up to `longest` bytes for each, in whole cache
    /// lines. From here on the call uses slots of that many.
    fn room(&mut self, longest: usize) -> usize {
        let peers = (self.group.world() - 1).max(1);
        let most = (self.chunk / peers / 64 * 64).max(64);
        let room = longest.next_multiple_of(64).clamp(64, most);
        self.group.use_slots(room * peers);
        room
    }
}

/// Which piece of `rank`'s slot is for `peer`: it has none for itself.
fn place(rank: usize, peer: usize) -> usize {
    debug_assert_ne!(rank, peer);
    peer - usize::from(peer > rank)
}
