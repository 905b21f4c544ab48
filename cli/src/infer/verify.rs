//! Is the sharded run's result that of the unsharded one?

use std::fs::File;
use std::os::unix::fs::FileExt;

use tensorwire::Wire;

use super::group::Run;
use crate::failure::Failure;

/// Elements of unit-length embeddings may differ by this much: far above what summing in another order
/// changes, far below what a wrong shard would.
const EMBEDDING_TOLERANCE: f32 = 1e-4;

/// What a comparison has found.
pub(super) struct Verified {
    /// The largest difference between corresponding numbers: logits of each step up to the first whose tokens
    /// differ, or embeddings. NaN if there was one.
    pub(super) max_abs_diff: f32,
    /// Rows of numbers that were compared.
    pub(super) rows: usize,
    /// The first step whose tokens differ.
    first_different: Option<Step>,
    /// Generated tokens before that one, or all.
    pub(super) equal: usize,
    /// In how few bits ranks exchanged what they computed: then nothing is promised but numbers.
    pub(super) wire: Option<Wire>,
    embeds: bool,
}

struct Step {
    index: usize,
    sharded: Option<u32>,
    unsharded: Option<u32>,
}

/// Compares a run, whose ranks exchanged what they computed as `wire`, with the reference.
pub(super) fn compare(run: &Run, reference: &Run, wire: Option<Wire>) -> Result<Verified, Failure> {
    let (ours, theirs) = (&run.tokens, &reference.tokens);
    let first_different =
        (0..ours.len().max(theirs.len())).find(|&i| ours.get(i) != theirs.get(i)).map(|index| Step {
            index,
            sharded: ours.get(index).copied(),
            unsharded: theirs.get(index).copied(),
        });
    if run.width != reference.width {
        return Err(Failure::run(format!(
            "the sharded run gave rows of {} numbers, the unsharded one of {}",
            run.width, reference.width
        )));
    }
    // After different tokens, logits are of different texts.
    let comparable = first_different.as_ref().map_or(usize::MAX, |step| step.index + 1);
    let rows = run.rows.min(reference.rows).min(comparable);
    let mut max_abs_diff = 0f32;
    for row in 0..rows {
        let (a, b) = (run.row(row)?, reference.row(row)?);
        for (a, b) in a.iter().zip(&b) {
            let diff = (a - b).abs();
            // A NaN stays.
            if diff > max_abs_diff || diff.is_nan() {
                max_abs_diff = diff;
            }
        }
        if max_abs_diff.is_nan() {
            break;
        }
    }
    let equal = first_different.as_ref().map_or(ours.len(), |step| step.index);
    Ok(Verified { max_abs_diff, rows, first_different, equal, wire, embeds: ours.is_empty() })
}

impl Verified {
    pub(super) fn equal_tokens(&self) -> bool {
        self.first_different.is_none()
    }

    /// A difference that counts makes the run a failed one.
    pub(super) fn verdict(&self) -> Result<(), Failure> {
        if let Some(wire) = self.wire {
            return match self.max_abs_diff.is_nan() {
                true => Err(Failure::run(format!("the run over {wire} gave what is not a number"))),
                false => Ok(()),
            };
        }
        if let Some(Step { index, sharded, unsharded }) = &self.first_different {
            let name = |token: &Option<u32>| token.map_or("none".to_owned(), |id| id.to_string());
            return Err(Failure::run(format!(
                "the sharded run differs from the unsharded one: generated token {index} is {}, unsharded {} \
                 (largest logit difference {:e})",
                name(sharded),
                name(unsharded),
                self.max_abs_diff
            )));
        }
        // Written so that a NaN fails.
        let within = self.max_abs_diff <= EMBEDDING_TOLERANCE;
        if self.embeds && !within {
            return Err(Failure::run(format!(
                "the sharded run differs from the unsharded one: embeddings by up to {:e}, more than {:e}",
                self.max_abs_diff, EMBEDDING_TOLERANCE
            )));
        }
        Ok(())
    }
}

impl Run {
    /// One row of the run's numbers.
    pub(super) fn row(&self, row: usize) -> Result<Vec<f32>, Failure> {
        let mut bytes = vec![0; self.width * 4];
        let read = |file: &File| file.read_exact_at(&mut bytes, (row * self.width * 4) as u64);
        match self.numbers.as_ref().map(read) {
            Some(Ok(())) => {}
            _ => return Err(Failure::run(format!("rank 0 has not written row {row} of its numbers"))),
        }
        Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    fn run(tokens: &[u32], rows: &[[f32; 2]]) -> Run {
        let file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
        let bytes: Vec<u8> = rows.as_flattened().iter().flat_map(|x| x.to_le_bytes()).collect();
        file.write_all_at(&bytes, 0).unwrap();
        Run { tokens: tokens.to_vec(), numbers: Some(file), width: 2, rows: rows.len(), ..Run::default() }
    }

    #[test]
    fn equal_tokens_pass_and_the_largest_difference_is_told() {
        let (a, b) = (run(&[1, 2], &[[0.5, 1.0], [2.0, 3.0]]), run(&[1, 2], &[[0.5, 1.25], [2.0, 2.9]]));
        let v = compare(&a, &b, None).unwrap();
        assert!(v.equal_tokens() && v.verdict().is_ok());
        assert_eq!((v.max_abs_diff, v.rows, v.equal), (0.25, 2, 2));
    }

    #[test]
    fn a_different_token_or_length_fails_and_later_rows_do_not_count() {
        let a = run(&[1, 2, 3], &[[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]]);
        let b = run(&[1, 5, 3], &[[0.0, 0.0], [1.0, 1.5], [0.0, 0.0]]);
        let v = compare(&a, &b, None).unwrap();
        assert!(!v.equal_tokens());
        assert_eq!((v.max_abs_diff, v.rows, v.equal), (0.5, 2, 1));
        assert!(v.verdict().is_err());
        let shorter = compare(&run(&[1], &[[0.0, 0.0]]), &run(&[1, 2], &[[0.0, 0.0]; 2]), None).unwrap();
        assert!(shorter.verdict().is_err());
    }

    #[test]
    fn in_fewer_bits_only_numbers_are_promised() {
        let (a, b) = (run(&[1, 2], &[[0.0, 0.5], [1.0, 1.0]]), run(&[1, 5], &[[0.0, 0.0], [1.0, 1.0]]));
        let v = compare(&a, &b, Some(Wire::Q8)).unwrap();
        assert!(v.verdict().is_ok());
        assert_eq!((v.max_abs_diff, v.equal), (0.5, 1));
        let nan = run(&[1, 2], &[[0.0, f32::NAN], [1.0, 1.0]]);
        assert!(compare(&nan, &b, Some(Wire::Q8)).unwrap().verdict().is_err());
    }

    #[test]
    fn embeddings_must_be_close_and_numbers() {
        let unit = run(&[], &[[0.6, 0.8]]);
        let near = |row| compare(&unit, &run(&[], &[row]), None).unwrap().verdict().is_ok();
        assert!(near([0.6, 0.800_01]));
        assert!(!near([0.6, 0.81]) && !near([f32::NAN, 0.8]));
    }

    #[test]
    fn a_row_that_was_not_written_is_an_error() {
        let mut short = run(&[1], &[[0.0, 0.0]]);
        short.rows = 2;
        assert!(compare(&short, &short, None).is_err());
    }
}
