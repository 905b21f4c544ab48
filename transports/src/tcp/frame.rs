//! What travels on an established connection: frames of a 64-byte header and a payload. Numbers are
//! little-endian, as are the elements themselves.
//!
//! | bytes | what |
//! | --- | --- |
//! | 0..4 | `TWF1` |
//! | 4 | kind |
//! | 8..16 | the sender's collectives so far, this one included |
//! | 16..24 | bytes of the payload |
//! | 32..64 | the sender's call |

use tensorwire_core::Call;

use crate::shm::verdict::Verdict;

/// Bytes of a header.
pub(super) const HEADER: usize = 64;

const MAGIC: [u8; 4] = *b"TWF1";

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// A piece of a collective.
    Data = 1,
    /// A message from one rank to another.
    Message = 2,
    /// Why the group has ended.
    Verdict = 3,
    /// The sender leaves the group.
    Leave = 4,
}

/// The frame that tells why a group has ended, whatever was going on.
pub(super) fn parting(verdict: &Verdict) -> Vec<u8> {
    let header = Header { kind: Kind::Verdict, seq: 0, len: Verdict::BYTES as u64, call: [0; 4] };
    [&header.bytes()[..], verdict.bytes()].concat()
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) seq: u64,
    pub(super) len: u64,
    /// [`Call::to_words`], compared as they are.
    pub(super) call: [u64; 4],
}

impl Header {
    #[inline]
    pub(super) fn bytes(&self) -> [u8; HEADER] {
        let mut b = [0; HEADER];
        b[..4].copy_from_slice(&MAGIC);
        b[4] = self.kind as u8;
        b[8..16].copy_from_slice(&self.seq.to_le_bytes());
        b[16..24].copy_from_slice(&self.len.to_le_bytes());
        for (to, word) in b[32..].chunks_exact_mut(8).zip(self.call) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        b
    }

    /// The header that `bytes` begin with; `None` where they are none.
    #[inline]
    pub(super) fn parse(bytes: &[u8]) -> Option<Header> {
        let b: &[u8; HEADER] = bytes.first_chunk()?;
        if b[..4] != MAGIC || b[5..8] != [0; 3] || b[24..32] != [0; 8] {
            return None;
        }
        let kind = match b[4] {
            1 => Kind::Data,
            2 => Kind::Message,
            3 => Kind::Verdict,
            4 => Kind::Leave,
            _ => return None,
        };
        let word = |at: usize| u64::from_le_bytes(b[at..at + 8].try_into().expect("eight bytes"));
        Some(Header { kind, seq: word(8), len: word(16), call: [word(32), word(40), word(48), word(56)] })
    }

    /// The sender's call, if it is one.
    pub(super) fn call(&self) -> Option<Call> {
        Call::from_words(self.call)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_survive_the_way(kind in 1u8..5, seq: u64, len: u64, call: [u64; 4]) {
            let kind = [Kind::Data, Kind::Message, Kind::Verdict, Kind::Leave][usize::from(kind) - 1];
            let header = Header { kind, seq, len, call };
            prop_assert_eq!(Header::parse(&header.bytes()), Some(header));
        }

        #[test]
        fn any_bytes_are_a_header_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Some(header) = Header::parse(&bytes) {
                prop_assert_eq!(&header.bytes()[..], &bytes[..HEADER]);
            }
        }

        #[test]
        fn a_header_with_a_changed_byte_is_another_or_none(at in 0usize..HEADER, by in 1u8..=255) {
            let header = Header { kind: Kind::Data, seq: 7, len: 8, call: [1, 2, 3, 4] };
            let mut bytes = header.bytes();
            bytes[at] ^= by;
            prop_assert_ne!(Header::parse(&bytes), Some(header));
        }
    }
}
