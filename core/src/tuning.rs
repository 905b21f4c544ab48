//! Where the collectives over shared memory change their algorithm.

/// Where the collectives between ranks of one host change their algorithm, at one number of ranks: built in, or
/// measured on the machine (`tensorwire topo --probe`). It decides about speed, never about results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// The number of ranks that it is for.
    pub world: usize,
    /// The largest all-reduce of ordinary memory, in bytes, in which each rank reads all that its peers have;
    /// a larger one takes more steps and reads less.
    pub one_shot: usize,
    /// The same for symmetric buffers, for which the other way needs no copies.
    pub symmetric_one_shot: usize,
    /// Bytes that a rank puts into one step of a pipelined collective.
    pub chunk: usize,
    /// The largest block of an all-gather or all-to-all, in bytes, that goes through the ranks' shared memory; larger ones
    /// they read where they lie in each other's, if the system lets them.
    pub single_copy_above: usize,
}

/// Bytes that a rank reads in a one-shot all-reduce, beyond which a second step costs less than reading
/// them.
const ONE_SHOT_READS: usize = 128 << 10;

/// The same at two ranks, which read as much in one shot as in two: the second step saves half of the reduction
/// alone. Measured: see docs/measurements.
const ONE_SHOT_READS_OF_TWO: usize = 4 << 20;

/// Bytes of a symmetric buffer up to which copying costs less than the two meetings of ranks that it saves: measured
/// at two ranks.
const SYMMETRIC_ONE_SHOT: usize = 1 << 10;

/// Small enough for a step's copies to stay in the second-level cache, large enough for its latency not to
/// matter.
const CHUNK: usize = 256 << 10;

/// A block of more bytes the kernel copies from one process to another in less time than it takes to write it to a slot and
/// read it there: in half of it where a block is the same as in the last call, and in a little more where it was
/// written anew. Measured: see docs/measurements.
const SINGLE_COPY_ABOVE: usize = 64 << 10;

/// The same at two ranks, which wait for one peer.
const SINGLE_COPY_ABOVE_OF_TWO: usize = 16 << 10;

impl Tuning {
    /// The most ranks that a tuning can be for.
    const MAX_WORLD: usize = 1 << 16;

    /// What holds where nothing was measured.
    pub fn built_in(world: usize) -> Tuning {
        let (one_shot, single_copy_above) = match world {
            0..=2 => (ONE_SHOT_READS_OF_TWO, SINGLE_COPY_ABOVE_OF_TWO),
            _ => (ONE_SHOT_READS / (world - 1), SINGLE_COPY_ABOVE),
        };
        Tuning { world, one_shot, symmetric_one_shot: SYMMETRIC_ONE_SHOT, chunk: CHUNK, single_copy_above }
    }

    /// Whether its numbers can be used: 2 ranks and more, and chunks of whole pages from 4 KiB to 1 GiB. Any
    /// threshold can.
    pub fn is_sound(&self) -> bool {
        (2..=Tuning::MAX_WORLD).contains(&self.world)
            && (4 << 10..=1 << 30).contains(&self.chunk)
            && self.chunk.is_multiple_of(4 << 10)
    }

    /// Of what was measured, what is nearest to `world` ranks, of two that are equally near the larger; `None`
    /// if nothing was.
    pub fn nearest(measured: &[Tuning], world: usize) -> Option<Tuning> {
        measured.iter().copied().min_by_key(|t| (t.world.abs_diff(world), usize::MAX - t.world))
    }

    /// What holds for `world` ranks: what was measured nearest to it, with thresholds at which a rank reads as
    /// many bytes of its peers as it did there; or what is built in.
    pub fn for_world(measured: &[Tuning], world: usize) -> Tuning {
        let Some(near) = Tuning::nearest(measured, world) else { return Tuning::built_in(world) };
        let peers = world.saturating_sub(1).max(1);
        let scaled = |bytes: usize| bytes.saturating_mul(near.world.saturating_sub(1)) / peers;
        Tuning {
            world,
            one_shot: scaled(near.one_shot),
            symmetric_one_shot: scaled(near.symmetric_one_shot),
            chunk: near.chunk,
            single_copy_above: near.single_copy_above,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuning(world: usize, one_shot: usize) -> Tuning {
        Tuning {
            world,
            one_shot,
            symmetric_one_shot: one_shot / 2,
            chunk: 64 << 10,
            single_copy_above: 8 << 10,
        }
    }

    #[test]
    fn a_world_that_was_measured_has_what_was_measured() {
        let measured = [tuning(2, 1000), tuning(4, 900), tuning(8, 10)];
        for t in measured {
            assert_eq!(Tuning::for_world(&measured, t.world), t);
        }
    }

    #[test]
    fn other_worlds_read_as_much_as_the_nearest() {
        let measured = [tuning(2, 1200), tuning(4, 1000)];
        // 3 is as near to 2: the larger counts, at which a rank reads 3 x 1000 bytes.
        assert_eq!(Tuning::for_world(&measured, 3), Tuning { world: 3, ..tuning(3, 1500) });
        assert_eq!(Tuning::for_world(&measured, 31).one_shot, 100);
        assert_eq!(Tuning::for_world(&measured, 1).one_shot, 1200);
        assert_eq!(Tuning::for_world(&[tuning(2, usize::MAX)], 3).one_shot, usize::MAX / 2);
        assert_eq!(Tuning::for_world(&[], 5), Tuning::built_in(5));
        assert_eq!(Tuning::built_in(5).one_shot, 32 << 10);
    }

    #[test]
    fn what_would_break_a_collective_is_not_sound() {
        for world in [2, 3, 1024] {
            assert!(Tuning::built_in(world).is_sound());
        }
        let with = |world, chunk| Tuning { world, chunk, ..Tuning::built_in(2) };
        for bad in [with(1, CHUNK), with(0, CHUNK), with(usize::MAX, CHUNK), with(2, 0), with(2, 4097)] {
            assert!(!bad.is_sound(), "{bad:?}");
        }
        assert!(!with(2, 2 << 30).is_sound() && with(2, 4096).is_sound());
    }
}
