//! The collectives' other forms: those that exchange blocks in place, and those in place by nature with an input of
//! their own. On the other ranks, either form of a call may meet it.

use tensorwire_core::{Call, Element, Op, ReduceOp, Result};

use super::Communicator;
use super::collectives::{Blocks, call, equal};
use crate::engine::{Buffers, Reduction, with_engine};

impl Communicator {
    /// As [`reduce`](Communicator::reduce), from `input` into rank `root`'s `output`, of the same length; the
    /// others' `output` isn't looked at.
    ///
    /// # Errors
    /// As for [`reduce`](Communicator::reduce), and if the lengths differ.
    pub fn reduce_into<T: Element>(
        &self,
        input: &[T],
        output: &mut [T],
        op: ReduceOp,
        root: usize,
    ) -> Result<()> {
        let root = self.root("reduce_into", root)?;
        let output = if self.rank == root { output } else { &mut [] };
        if self.rank == root {
            self.expect("reduce_into: output", "as many as input", Some(input.len()), output.len())?;
        }
        let data =
            Buffers { input: Some(bytemuck::cast_slice(input)), output: bytemuck::cast_slice_mut(output) };
        self.reduce_bytes::<T>(data, op, root)
    }

    /// As [`broadcast`](Communicator::broadcast), from rank `root`'s `input` into every rank's `output`, the
    /// root's too, of the same length; the others' `input` isn't looked at.
    ///
    /// # Errors
    /// As for [`broadcast`](Communicator::broadcast), and if the lengths differ.
    pub fn broadcast_into<T: Element>(&self, input: &[T], output: &mut [T], root: usize) -> Result<()> {
        let root = self.root("broadcast_into", root)?;
        if self.rank == root {
            self.expect("broadcast_into: output", "as many as input", Some(input.len()), output.len())?;
        }
        if self.world == 1 {
            output.copy_from_slice(input);
            return Ok(());
        }
        let input = (self.rank == root).then(|| bytemuck::cast_slice(input));
        self.broadcast_bytes::<T>(input, bytemuck::cast_slice_mut(output), root)
    }

    /// As [`all_gather`](Communicator::all_gather), where rank `r`'s input is block `r` of its `buf`, of `world`
    /// equal blocks: the other blocks are filled in.
    ///
    /// ```
    /// # use tensorwire_collectives::Communicator;
    /// # std::thread::scope(|s| {
    /// #     for comm in Communicator::in_process(3)? {
    /// #         s.spawn(move || {
    /// let mut x = [0u32; 3];
    /// x[comm.rank()] = 10 + comm.rank() as u32;
    /// comm.all_gather_in_place(&mut x).unwrap();
    /// assert_eq!(x, [10, 11, 12]);
    /// #         });
    /// #     }
    /// #     Ok::<(), tensorwire_core::Error>(())
    /// # })?;
    /// # Ok::<(), tensorwire_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](tensorwire_core::Error::InvalidArgument) if the length isn't a multiple of the
    /// world; else see [`Communicator`].
    pub fn all_gather_in_place<T: Element>(&self, buf: &mut [T]) -> Result<()> {
        let count = self.block_of("all_gather_in_place", buf)?;
        let (call, buf) = (call::<T>(Op::AllGather, buf.len()), bytemuck::cast_slice_mut(buf));
        self.run(|state| {
            with_engine!(state.engine, |engine| engine.run(call, |engine| engine.all_gather(
                None,
                buf,
                equal::<T>(count),
                None
            )))
        })
    }

    /// As [`all_gather_in_place`](Communicator::all_gather_in_place), where block `r` has `counts[r]` elements.
    /// Every rank gives the same `counts`.
    ///
    /// # Errors
    /// As for [`all_gather_v`](Communicator::all_gather_v).
    pub fn all_gather_v_in_place<T: Element>(&self, buf: &mut [T], counts: &[usize]) -> Result<()> {
        let blocks = self.blocks_of("all_gather_v_in_place", buf, counts)?;
        let call = Call { layout: blocks.digest, ..call::<T>(Op::AllGather, buf.len()) };
        let buf = bytemuck::cast_slice_mut(buf);
        self.run(|state| {
            with_engine!(state.engine, |engine| engine.run(call, |engine| engine.all_gather(
                None,
                buf,
                |r| blocks.of(r),
                None
            )))
        })
    }

    /// As [`gather`](Communicator::gather), where rank `root`'s `buf` has `world` blocks, its own among them, and
    /// the others' `buf` is their block.
    ///
    /// # Errors
    /// As for [`gather`](Communicator::gather).
    pub fn gather_in_place<T: Element>(&self, buf: &mut [T], root: usize) -> Result<()> {
        let root = self.root("gather_in_place", root)?;
        if self.rank != root {
            return self.gather(buf, &mut [], root);
        }
        let count = self.block_of("gather_in_place", buf)?;
        let call = Call { root: Some(root as u32), ..call::<T>(Op::Gather, buf.len()) };
        let buf = bytemuck::cast_slice_mut(buf);
        self.run(|state| {
            with_engine!(state.engine, |engine| engine.run(call, |engine| engine.all_gather(
                None,
                buf,
                equal::<T>(count),
                Some(root)
            )))
        })
    }

    /// As [`gather_in_place`](Communicator::gather_in_place), where block `r` has `counts[r]` elements. Every rank
    /// gives the same `counts`.
    ///
    /// # Errors
    /// As for [`gather_v`](Communicator::gather_v).
    pub fn gather_v_in_place<T: Element>(&self, buf: &mut [T], counts: &[usize], root: usize) -> Result<()> {
        let root = self.root("gather_v_in_place", root)?;
        if self.rank != root {
            return self.gather_v(buf, &mut [], counts, root);
        }
        let blocks = self.blocks_of("gather_v_in_place", buf, counts)?;
        let call = call::<T>(Op::Gather, blocks.total);
        let call = Call { layout: blocks.digest, root: Some(root as u32), ..call };
        let buf = bytemuck::cast_slice_mut(buf);
        self.run(|state| {
            with_engine!(state.engine, |engine| engine.run(call, |engine| engine.all_gather(
                None,
                buf,
                |r| blocks.of(r),
                Some(root)
            )))
        })
    }

    /// As [`scatter`](Communicator::scatter), where rank `root`'s `buf` has `world` blocks, of which nothing
    /// changes, and the others' `buf` is where their block goes.
    ///
    /// # Errors
    /// As for [`scatter`](Communicator::scatter).
    pub fn scatter_in_place<T: Element>(&self, buf: &mut [T], root: usize) -> Result<()> {
        let root = self.root("scatter_in_place", root)?;
        if self.rank != root {
            return self.scatter(&[], buf, root);
        }
        let count = self.block_of("scatter_in_place", buf)?;
        let call = Call { root: Some(root as u32), ..call::<T>(Op::Scatter, buf.len()) };
        let buf = bytemuck::cast_slice_mut(buf);
        self.run(|state| {
            with_engine!(state.engine, |engine| engine.run(call, |engine| engine.scatter(
                None,
                buf,
                equal::<T>(count),
                root
            )))
        })
    }

    /// As [`scatter_in_place`](Communicator::scatter_in_place), where block `r` has `counts[r]` elements. Every
    /// rank gives the same `counts`.
    ///
    /// # Errors
    /// As for [`scatter_v`](Communicator::scatter_v).
    pub fn scatter_v_in_place<T: Element>(&self, buf: &mut [T], counts: &[usize], root: usize) -> Result<()> {
        let root = self.root("scatter_v_in_place", root)?;
        if self.rank != root {
            return self.scatter_v(&[], buf, counts, root);
        }
        let blocks = self.blocks_of("scatter_v_in_place", buf, counts)?;
        let call = call::<T>(Op::Scatter, blocks.total);
        let call = Call { layout: blocks.digest, root: Some(root as u32), ..call };
        let buf = bytemuck::cast_slice_mut(buf);
        self.run(|state| {
            with_engine!(state.engine, |engine| engine.run(call, |engine| engine.scatter(
                None,
                buf,
                |r| blocks.of(r),
                root
            )))
        })
    }

    /// As [`reduce_scatter`](Communicator::reduce_scatter), where the input is `buf`, of `world` equal blocks, and
    /// the result replaces its block `rank`; the other blocks stay as they are.
    ///
    /// # Errors
    /// As for [`reduce_scatter`](Communicator::reduce_scatter).
    pub fn reduce_scatter_in_place<T: Element>(&self, buf: &mut [T], op: ReduceOp) -> Result<()> {
        let count = self.block_of("reduce_scatter_in_place", buf)?;
        let call = Call { reduce: Some(op), ..call::<T>(Op::ReduceScatter, buf.len()) };
        let reduction = Reduction::new(T::DTYPE, op)?;
        let buf = bytemuck::cast_slice_mut(buf);
        if self.world == 1 {
            reduction.alone(Buffers::in_place(buf));
            return Ok(());
        }
        self.run(|state| {
            let block = equal::<T>(count);
            with_engine!(state.engine, |engine| engine
                .run(call, |engine| engine.reduce_scatter(None, buf, block, &reduction)))
        })
    }

    /// As [`reduce_scatter_in_place`](Communicator::reduce_scatter_in_place), where block `r` has `counts[r]`
    /// elements. Every rank gives the same `counts`.
    ///
    /// # Errors
    /// As for [`reduce_scatter_v`](Communicator::reduce_scatter_v).
    pub fn reduce_scatter_v_in_place<T: Element>(
        &self,
        buf: &mut [T],
        counts: &[usize],
        op: ReduceOp,
    ) -> Result<()> {
        let blocks = self.blocks_of("reduce_scatter_v_in_place", buf, counts)?;
        let call =
            Call { reduce: Some(op), layout: blocks.digest, ..call::<T>(Op::ReduceScatter, buf.len()) };
        let reduction = Reduction::new(T::DTYPE, op)?;
        let buf = bytemuck::cast_slice_mut(buf);
        if self.world == 1 {
            reduction.alone(Buffers::in_place(buf));
            return Ok(());
        }
        self.run(|state| {
            with_engine!(state.engine, |engine| engine.run(call, |engine| engine.reduce_scatter(
                None,
                buf,
                |r| blocks.of(r),
                &reduction
            )))
        })
    }

    /// As [`all_to_all`](Communicator::all_to_all), where block `r` of `buf` goes to rank `r`, and rank `r`'s block
    /// for this rank takes its place.
    ///
    /// # Errors
    /// As for [`all_to_all`](Communicator::all_to_all).
    pub fn all_to_all_in_place<T: Element>(&self, buf: &mut [T]) -> Result<()> {
        let count = self.block_of("all_to_all_in_place", buf)?;
        let (call, buf) = (call::<T>(Op::AllToAll, buf.len()), bytemuck::cast_slice_mut(buf));
        let (block, longest) = (equal::<T>(count), count * size_of::<T>());
        self.run(|state| {
            with_engine!(state.engine, |engine| engine
                .run(call, |engine| engine.all_to_all(None, buf, &block, &block, longest)))
        })
    }

    /// As [`all_to_all_in_place`](Communicator::all_to_all_in_place), with `counts[r]` elements to and from rank
    /// `r`: as many as that rank gives for this one.
    ///
    /// # Errors
    /// As for [`all_to_all_v`](Communicator::all_to_all_v).
    pub fn all_to_all_v_in_place<T: Element>(&self, buf: &mut [T], counts: &[usize]) -> Result<()> {
        let blocks = self.blocks_of("all_to_all_v_in_place", buf, counts)?;
        let call = Call { layout: 1, ..call::<T>(Op::AllToAll, 0) };
        let buf = bytemuck::cast_slice_mut(buf);
        self.run(|state| {
            with_engine!(state.engine, |engine| engine.run(call, |engine| {
                let lengths = blocks.lengths();
                let longest = engine.agree_on_counts(&lengths, &lengths)? as usize;
                engine.all_to_all(None, buf, |r| blocks.of(r), |r| blocks.of(r), longest)
            }))
        })
    }

    /// The elements of each of `buf`'s `world` equal blocks.
    fn block_of<T>(&self, what: &str, buf: &[T]) -> Result<usize> {
        let count = buf.len() / self.world;
        self.expect(what, "a multiple of the world", Some(count * self.world), buf.len())?;
        Ok(count)
    }

    fn blocks_of<T: Element>(&self, what: &str, buf: &[T], counts: &[usize]) -> Result<Blocks> {
        let blocks = Blocks::new::<T>(self, what, counts)?;
        self.expect(what, "the sum of counts", Some(blocks.total), buf.len())?;
        Ok(blocks)
    }
}
