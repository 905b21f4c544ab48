//! One rank of `infer`: loads its share of the model and runs it with its peers.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::sync::Arc;

use tensorwire::Communicator;
use tensorwire::topology::Planner;
use tensorwire::transports::launch::LOST_PEER_STATUS;
use tensorwire_runtime::{Error, Runtime};

use super::Args;
use super::event::{Event, NUMBERS_FD, TEXT_PIECE};
use super::input::{Input, Task};
use crate::failure::Failure;

/// Bytes of logits that are kept for the comparison.
const MAX_NUMBERS: usize = 256 << 20;

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    let comm = Arc::new(Communicator::from_env().map_err(|e| failure(e.into()))?);
    let (rank, world) = (comm.rank(), comm.world());
    let input = Input::of(args)?;
    let plan = Planner::new(input.model.spec()).plan(world).map_err(Failure::usage)?;
    let mut runtime = Runtime::load(&input.model, &plan, comm.clone()).map_err(failure)?;
    runtime.set_wire(args.wire.0);
    let mut weight_bytes = vec![0; world];
    let held = comm.all_gather(&[runtime.loaded().weight_bytes], &mut weight_bytes);
    held.map_err(|e| failure(e.into()))?;
    if rank == 0 {
        send(&Event::Loaded { weight_bytes })?;
    }

    let mut numbers = Numbers::open(rank)?;
    let done = match &input.task {
        Task::Embed(texts) => {
            let embeddings = runtime.embed(texts).map_err(failure)?;
            for vector in &embeddings.vectors {
                numbers.row(vector)?;
            }
            Event::Done {
                width: numbers.width,
                rows: numbers.rows,
                prefill_s: embeddings.seconds,
                decode_tokens_per_s: None,
                comm_share: share(embeddings.comm_s, embeddings.seconds),
            }
        }
        Task::Generate { ids, max_tokens, .. } => {
            let mut broken = None;
            let generation = runtime
                .generate(ids, *max_tokens, |token| {
                    if rank == 0 && broken.is_none() {
                        let event = Event::Token { id: token.id, text: token.text.to_owned() };
                        broken = numbers.row(token.logits).and_then(|()| send(&event)).err();
                    }
                })
                .map_err(failure)?;
            if let Some(broken) = broken {
                return Err(broken);
            }
            if rank == 0 {
                for piece in generation.text.as_deref().map(pieces).into_iter().flatten() {
                    send(&Event::Text(piece.to_owned()))?;
                }
            }
            Event::Done {
                width: numbers.width,
                rows: numbers.rows,
                prefill_s: generation.prefill_s,
                decode_tokens_per_s: generation.decode_tokens_per_s(),
                comm_share: share(generation.comm_s, generation.prefill_s + generation.decode_s),
            }
        }
    };
    if rank == 0 {
        numbers.flush()?;
        send(&done)?;
    }
    Ok(())
}

/// The status tells the parent what kind of failure it was.
fn failure(error: Error) -> Failure {
    use tensorwire::Error::{Aborted, Config, PeerLost};
    match error {
        Error::Comm(Config(_)) => Failure::usage(error),
        Error::Comm(PeerLost { .. } | Aborted { .. }) => Failure::with_status(LOST_PEER_STATUS, error),
        Error::Comm(_) | Error::Compute(_) | Error::NotFinite | Error::OutOfMemory { .. } => {
            Failure::run(error)
        }
        _ => Failure::usage(error),
    }
}

fn share(part_s: f64, whole_s: f64) -> f64 {
    if whole_s > 0.0 { part_s / whole_s } else { 0.0 }
}

fn send(event: &Event) -> Result<(), Failure> {
    let mut line = serde_json::to_vec(event).map_err(io::Error::from)?;
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line)?;
    Ok(out.flush()?)
}

/// The text in pieces of at most [`TEXT_PIECE`] bytes; an empty text is one piece.
fn pieces(mut text: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    loop {
        let end = (0..=text.len().min(TEXT_PIECE))
            .rev()
            .find(|&at| text.is_char_boundary(at))
            .unwrap_or(text.len());
        let (piece, rest) = text.split_at(end);
        pieces.push(piece);
        if rest.is_empty() {
            return pieces;
        }
        text = rest;
    }
}

/// The numbers that the parent compares: rows of little-endian f32 in a memory file it has handed to rank 0.
struct Numbers {
    file: Option<BufWriter<File>>,
    width: usize,
    rows: usize,
    bytes: usize,
}

impl Numbers {
    fn open(rank: usize) -> Result<Numbers, Failure> {
        let file = match std::env::var(NUMBERS_FD) {
            Ok(fd) if rank == 0 => {
                let file = OpenOptions::new().write(true).open(format!("/proc/self/fd/{fd}"));
                Some(BufWriter::new(
                    file.map_err(|e| Failure::run(format!("cannot open the parent's memory file: {e}")))?,
                ))
            }
            _ => None,
        };
        Ok(Numbers { file, width: 0, rows: 0, bytes: 0 })
    }

    fn row(&mut self, numbers: &[f32]) -> Result<(), Failure> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        if self.bytes > 0 && self.bytes.saturating_add(bytes.len()) > MAX_NUMBERS {
            return Ok(());
        }
        file.write_all(&bytes).map_err(numbers_lost)?;
        self.bytes += bytes.len();
        self.width = numbers.len();
        self.rows += 1;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Failure> {
        self.file.as_mut().map_or(Ok(()), |file| file.flush().map_err(numbers_lost))
    }
}

fn numbers_lost(e: io::Error) -> Failure {
    Failure::run(format!("cannot write to the parent's memory file: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_small_whole_characters_and_lose_nothing() {
        for text in ["", "short", &"ä€😀".repeat(5000)] {
            let pieces = pieces(text);
            assert_eq!(pieces.concat(), text);
            assert!(pieces.iter().all(|p| p.len() <= TEXT_PIECE));
        }
        assert_eq!(pieces(""), [""]);
    }
}
