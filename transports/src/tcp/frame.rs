//! What travels on an established connection: frames of a 64-byte header and a payload. Numbers are
//! little-endian, as are the elements themselves.
//!
//! | bytes | what |
//! | --- | --- |
//! | 0..4 | `TWF1` |
//! | 4 | kind |
//! | 8..16 | the sender's collectives so far, this one included |
//! | 16..24 | bytes of the payload |
//! | 24..28 | with [checksums](super::TcpOptions::checksum), the payload's CRC-32; zero without |
//! | 28..32 | with checksums, the CRC-32 of the rest of the header; zero without |
//! | 32..64 | the sender's call |

use tensorwire_core::Call;

use crate::shm::verdict::Verdict;

/// Bytes of a header.
pub(crate) const HEADER: usize = 64;

const MAGIC: [u8; 4] = *b"TWF1";

/// Where a header has its checksums.
const SUMS: std::ops::Range<usize> = 24..32;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// A piece of a collective.
    Data = 1,
    /// A message from one rank to another.
    Message = 2,
    /// Why the group has ended.
    Verdict = 3,
    /// The sender leaves the group.
    Leave = 4,
}

/// Bytes of the frame that tells why a group has ended.
pub(super) const PARTING: usize = HEADER + Verdict::BYTES;

/// The frame that tells why a group has ended, whatever was going on.
pub(super) fn parting(verdict: &Verdict, checksum: bool) -> Vec<u8> {
    let mut header = Header { kind: Kind::Verdict, seq: 0, len: Verdict::BYTES as u64, call: [0; 4] }.bytes();
    if checksum {
        seal(&mut header, verdict.bytes());
    }
    [&header[..], verdict.bytes()].concat()
}

/// What a [parting] frame says; `None` where it is none, or isn't as it was sent.
pub(super) fn parted(bytes: &[u8], checksum: bool) -> Option<Verdict> {
    let (header, sum) = if checksum { unseal(bytes)? } else { (Header::parse(bytes)?, 0) };
    let verdict = bytes.get(HEADER..PARTING)?;
    let sound = !checksum || crc32fast::hash(verdict) == sum;
    let is_one = header.kind == Kind::Verdict && header.len == Verdict::BYTES as u64;
    (sound && is_one).then(|| Verdict::from_bytes(verdict))
}

/// Puts the checksums into a header: its own, and its payload's.
pub(super) fn seal(header: &mut [u8; HEADER], payload: &[u8]) {
    header[SUMS.start..SUMS.start + 4].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
    let own = own_sum(header);
    header[SUMS.start + 4..SUMS.end].copy_from_slice(&own.to_le_bytes());
}

/// The checksum of a header without itself.
fn own_sum(header: &[u8; HEADER]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&header[..SUMS.start + 4]);
    sum.update(&header[SUMS.end..]);
    sum.finalize()
}

/// The header that `bytes` begin with, and its payload's checksum; `None` where they are none, or aren't as they were
/// [sealed](seal).
pub(super) fn unseal(bytes: &[u8]) -> Option<(Header, u32)> {
    let mut b: [u8; HEADER] = *bytes.first_chunk()?;
    let sum = |b: &[u8], at: usize| u32::from_le_bytes(b[at..at + 4].try_into().expect("four bytes"));
    let (payload, own) = (sum(&b, SUMS.start), sum(&b, SUMS.start + 4));
    if own != own_sum(&b) {
        return None;
    }
    b[SUMS].fill(0);
    Some((Header::parse(&b)?, payload))
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    pub(crate) seq: u64,
    pub(crate) len: u64,
    /// [`Call::to_words`], compared as they are.
    pub(crate) call: [u64; 4],
}

impl Header {
    #[inline]
    pub(crate) fn bytes(&self) -> [u8; HEADER] {
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
    pub(crate) fn parse(bytes: &[u8]) -> Option<Header> {
        let b: &[u8; HEADER] = bytes.first_chunk()?;
        if b[..4] != MAGIC || b[5..8] != [0; 3] || b[SUMS] != [0; 8] {
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
    pub(crate) fn call(&self) -> Option<Call> {
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
        fn a_sealed_header_is_found_changed_wherever_it_is(
            payload in proptest::collection::vec(any::<u8>(), 0..100), at in 0usize..HEADER, by in 1u8..=255,
        ) {
            let header = Header { kind: Kind::Data, seq: 7, len: payload.len() as u64, call: [1, 2, 3, 4] };
            let mut bytes = header.bytes();
            seal(&mut bytes, &payload);
            prop_assert_eq!(unseal(&bytes), Some((header, crc32fast::hash(&payload))));
            bytes[at] ^= by;
            prop_assert_eq!(unseal(&bytes), None);
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
