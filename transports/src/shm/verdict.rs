//! Why a group ended: written once by the first rank that fails, read by all the others.

use std::time::Duration;

use tensorwire_core::{Call, Error};

/// Bytes of text that a verdict carries; the rest is cut.
const TEXT: usize = 256;
/// Ranks that a timeout names.
const WAITING: usize = 32;

const PEER_LOST: u32 = 1;
const TIMEOUT: u32 = 2;
const MISMATCH: u32 = 3;
const ABORTED: u32 = 4;
const CORRUPTED: u32 = 5;

/// An [`Error`] in plain words that every process reads alike, valid from any bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct Verdict {
    kind: u32,
    by: u32,
    /// The two ranks of a mismatch, the lost one, or between which something was damaged.
    ranks: [u32; 2],
    /// The calls of the two ranks of a mismatch, and their number.
    calls: [[u64; 4]; 2],
    seq: u64,
    waiting: [u16; WAITING],
    waiting_len: u32,
    text_len: u32,
    /// Nanoseconds that a timeout allowed.
    after: u64,
    text: [u8; TEXT],
}

#[cfg(feature = "tcp")]
impl Verdict {
    /// Bytes of a verdict on its way to another host.
    pub(crate) const BYTES: usize = size_of::<Verdict>();

    /// As it travels. The numbers are little-endian, as this machine's are.
    pub(crate) fn bytes(&self) -> &[u8; Verdict::BYTES] {
        // SAFETY: a verdict has no padding (checked below), so that all of its bytes are initialised.
        unsafe { &*std::ptr::from_ref(self).cast() }
    }

    /// The verdict that these bytes are; any will do, if there are enough.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Verdict {
        let bytes: &[u8; Verdict::BYTES] = bytes.first_chunk().expect("as many bytes as a verdict has");
        // SAFETY: 1. all bytes are a verdict, which is made of integers; 2. the read asks for no alignment.
        unsafe { bytes.as_ptr().cast::<Verdict>().read_unaligned() }
    }
}

#[cfg(feature = "tcp")]
const _: () = assert!(
    size_of::<Verdict>() == 4 * 4 + 2 * 4 * 8 + 8 + 2 * WAITING + 2 * 4 + 8 + TEXT
        && cfg!(target_endian = "little")
);

impl Verdict {
    /// The verdict that tells peers of `error`, which `by` met. Anything that isn't about the group itself
    /// becomes an abort.
    pub(crate) fn new(by: usize, error: &Error) -> Verdict {
        let mut v = Verdict {
            kind: ABORTED,
            by: by as u32,
            ranks: [0; 2],
            calls: [[0; 4]; 2],
            seq: 0,
            waiting: [0; WAITING],
            waiting_len: 0,
            text_len: 0,
            after: 0,
            text: [0; TEXT],
        };
        match error {
            Error::PeerLost { peer, how, .. } => {
                v.kind = PEER_LOST;
                v.ranks[0] = *peer as u32;
                v.set_text(how);
            }
            Error::Timeout { waiting_for, after, instead, .. } => {
                v.kind = TIMEOUT;
                v.after = u64::try_from(after.as_nanos()).unwrap_or(u64::MAX);
                v.set_text(instead);
                v.waiting_len = waiting_for.len().min(WAITING) as u32;
                for (to, from) in v.waiting.iter_mut().zip(waiting_for) {
                    *to = *from as u16;
                }
            }
            Error::Mismatch { seq, a, a_call, b, b_call, .. } => {
                v.kind = MISMATCH;
                v.ranks = [*a as u32, *b as u32];
                v.seq = *seq;
                v.calls = [a_call.to_words(), b_call.to_words()];
            }
            Error::Corrupted { from, to, what, .. } => {
                v.kind = CORRUPTED;
                v.ranks = [*from as u32, *to as u32];
                v.set_text(what);
            }
            // Passed on, from another layer.
            Error::Aborted { by, why, .. } => {
                v.by = *by as u32;
                v.set_text(why);
            }
            other => v.set_text(&other.to_string()),
        }
        v
    }

    fn set_text(&mut self, text: &str) {
        let mut end = text.len().min(TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.text[..end].copy_from_slice(&text.as_bytes()[..end]);
        self.text_len = end as u32;
    }

    /// The rank that has ended the group.
    #[cfg(feature = "tcp")]
    pub(crate) fn by(&self) -> usize {
        self.by as usize
    }

    /// The ranks that the verdict says are gone or don't answer.
    pub(crate) fn lost(&self) -> Vec<usize> {
        match self.kind {
            PEER_LOST => vec![self.ranks[0] as usize],
            TIMEOUT => self.waiting[..(self.waiting_len as usize).min(WAITING)]
                .iter()
                .map(|r| usize::from(*r))
                .collect(),
            _ => Vec::new(),
        }
    }

    /// The error as `rank` reports it, which was in call number `seq`, `call`.
    pub(crate) fn error(&self, rank: usize, call: Call, seq: u64) -> Error {
        let text = String::from_utf8_lossy(&self.text[..(self.text_len as usize).min(TEXT)]);
        // It may come from memory that anybody wrote.
        let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let (by, after) = (self.by as usize, Duration::from_nanos(self.after));
        match self.kind {
            PEER_LOST => Error::PeerLost { rank, peer: self.ranks[0] as usize, call, seq, how: text },
            TIMEOUT => {
                Error::Timeout { rank, call, seq, waiting_for: self.lost(), after, instead: text.into() }
            }
            MISMATCH => Error::Mismatch {
                rank,
                seq: self.seq,
                a: self.ranks[0] as usize,
                a_call: Box::new(Call::from_words(self.calls[0]).unwrap_or(call)),
                b: self.ranks[1] as usize,
                b_call: Box::new(Call::from_words(self.calls[1]).unwrap_or(call)),
            },
            CORRUPTED => {
                let [from, to] = self.ranks.map(|r| r as usize);
                Error::Corrupted { rank, from, to, call, seq, what: text }
            }
            _ => Error::Aborted { rank, by, call, seq, why: text },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tensorwire_core::{DType, Op, ReduceOp};

    #[test]
    fn errors_survive_the_way_to_a_peer() {
        let call = Call {
            op: Op::AllReduce,
            dtype: Some(DType::F32),
            reduce: Some(ReduceOp::Sum),
            count: 7,
            root: None,
            layout: 0,
            wire: None,
        };
        let other = Call { count: 8, ..call };
        let s = Duration::from_secs(1);
        let errors = [
            Error::PeerLost { rank: 1, peer: 2, call, seq: 5, how: "its process ended".into() },
            Error::Timeout { rank: 1, call, seq: 5, waiting_for: vec![0, 3], after: s, instead: "é".into() },
            Error::Mismatch { rank: 1, seq: 5, a: 0, a_call: call.into(), b: 2, b_call: other.into() },
            Error::Corrupted { rank: 1, from: 0, to: 2, call, seq: 5, what: "data".into() },
            Error::Aborted { rank: 1, by: 0, call, seq: 5, why: "é".repeat(300) },
        ];
        for error in &errors[..4] {
            let verdict = Verdict::new(0, error);
            assert_eq!(verdict.error(1, call, 5).to_string(), error.to_string());
            #[cfg(feature = "tcp")]
            assert_eq!(Verdict::from_bytes(verdict.bytes()).error(1, call, 5).to_string(), error.to_string());
        }
        match Verdict::new(0, &Error::invalid("é".repeat(300))).error(1, call, 5) {
            Error::Aborted { by: 0, why, .. } => assert_eq!(why, "é".repeat(128)),
            wrong => panic!("{wrong}"),
        }
    }
}
