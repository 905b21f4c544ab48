//! The handshake of a connection: four messages of fixed sizes, after which both sides know that the other knows
//! the job's secret, and what the connection is for.
//!
//! 1. Hello: who dials whom, in which group, with a fresh nonce.
//! 2. Challenge: the other side's fresh nonce.
//! 3. Proof: `HMAC-SHA256(secret, "dial", Hello, Challenge)`.
//! 4. Answer: a status, and `HMAC-SHA256(secret, "answer", Hello, Challenge, status)`.
//!
//! A stranger learns a nonce. What is proved names both ranks, the group, the world and the version, so that it
//! serves no other connection; both nonces are fresh, so that nothing can be replayed; the two sides prove
//! different texts, so that neither's proof can be reflected. What follows is neither encrypted nor authenticated:
//! that is what TLS is for. Over TLS, `Challenge` stands in both proofs for that message and the connection's own number
//! (RFC 9266): somebody in between has another connection with either side, and so can't pass the proofs on.

use std::time::Duration;

use super::secret::{PROOF, Secret, random};
use tensorwire_core::Result;

pub(crate) const HELLO: usize = 88;
pub(crate) const CHALLENGE: usize = 48;
pub(crate) const ANSWER: usize = 8 + PROOF;

const MAGIC: [u8; 8] = *b"tensorwr";
/// Changes with anything that the two sides must do alike.
const VERSION: u16 = 2;

/// Names a group of ranks among all groups of a job.
pub(crate) type GroupId = [u8; 16];

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Channel {
    /// The collectives of a group.
    Collective = 1,
    /// Messages between two ranks, which wait here for their receiver without keeping collectives.
    Message = 2,
    /// The job's store.
    Store = 3,
    /// What the ranks of a group that has ended tell each other about who goes on.
    Survivors = 4,
    /// None: whether the other rank waits for somebody, and for how long it will, is all that is asked. The answer says it.
    Question = 5,
    /// None: why the group has ended follows the handshake, for a rank that reads nothing from its connections now.
    Verdict = 6,
}

impl Channel {
    fn from_code(code: u8) -> Option<Channel> {
        use Channel::{Collective, Message, Question, Store, Survivors, Verdict};
        [Collective, Message, Store, Survivors, Question, Verdict].into_iter().find(|c| *c as u8 == code)
    }
}

/// What the side that dials says first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Hello {
    pub(crate) channel: Channel,
    pub(crate) world: u32,
    pub(crate) from: u32,
    pub(crate) to: u32,
    pub(crate) group: GroupId,
    /// Differs between processes: two that come as the same rank are found out.
    pub(crate) instance: [u8; 16],
    pub(crate) nonce: [u8; 32],
}

/// Why bytes aren't a message of this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Misfit {
    /// They are something else altogether.
    Garbage,
    /// They are of another version of it.
    Version(u16),
}

fn head() -> [u8; 10] {
    let mut b = [0; 10];
    b[..8].copy_from_slice(&MAGIC);
    b[8..].copy_from_slice(&VERSION.to_le_bytes());
    b
}

fn check_head(bytes: &[u8]) -> Result<(), Misfit> {
    if bytes.len() < 10 || bytes[..8] != MAGIC {
        return Err(Misfit::Garbage);
    }
    match u16::from_le_bytes([bytes[8], bytes[9]]) {
        VERSION => Ok(()),
        other => Err(Misfit::Version(other)),
    }
}

/// Whether `bytes`, of which more may follow, can begin a hello.
pub(crate) fn may_be_hello(bytes: &[u8]) -> bool {
    let known = bytes.len().min(MAGIC.len());
    bytes[..known] == MAGIC[..known]
}

impl Hello {
    pub(crate) fn new(
        channel: Channel,
        world: usize,
        from: usize,
        to: usize,
        group: GroupId,
    ) -> Result<Hello> {
        static INSTANCE: std::sync::OnceLock<[u8; 16]> = std::sync::OnceLock::new();
        let instance = match INSTANCE.get() {
            Some(instance) => *instance,
            None => {
                let fresh = random()?;
                *INSTANCE.get_or_init(|| fresh)
            }
        };
        let (world, from, to) = (world as u32, from as u32, to as u32);
        Ok(Hello { channel, world, from, to, group, instance, nonce: random()? })
    }

    pub(crate) fn bytes(&self) -> [u8; HELLO] {
        let mut b = [0; HELLO];
        b[..10].copy_from_slice(&head());
        b[10] = self.channel as u8;
        b[12..16].copy_from_slice(&self.world.to_le_bytes());
        b[16..20].copy_from_slice(&self.from.to_le_bytes());
        b[20..24].copy_from_slice(&self.to.to_le_bytes());
        b[24..40].copy_from_slice(&self.group);
        b[40..56].copy_from_slice(&self.instance);
        b[56..].copy_from_slice(&self.nonce);
        b
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Hello, Misfit> {
        check_head(bytes)?;
        let b: &[u8; HELLO] = bytes.try_into().map_err(|_| Misfit::Garbage)?;
        let channel = Channel::from_code(b[10]).filter(|_| b[11] == 0).ok_or(Misfit::Garbage)?;
        let number = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let (world, from, to) = (number(12), number(16), number(20));
        let piece = |at: usize| b[at..at + 16].try_into().expect("sixteen bytes");
        let nonce = b[56..].try_into().expect("the last 32 bytes");
        Ok(Hello { channel, world, from, to, group: piece(24), instance: piece(40), nonce })
    }
}

/// A challenge of this version with this nonce.
pub(crate) fn challenge(nonce: &[u8; 32]) -> [u8; CHALLENGE] {
    let mut b = [0; CHALLENGE];
    b[..10].copy_from_slice(&head());
    b[16..].copy_from_slice(nonce);
    b
}

/// Checks a challenge; its nonce is proved with the rest of it.
pub(crate) fn check_challenge(bytes: &[u8]) -> Result<(), Misfit> {
    check_head(bytes)?;
    if bytes.len() == CHALLENGE && bytes[10..16] == [0; 6] { Ok(()) } else { Err(Misfit::Garbage) }
}

/// What becomes of a connection whose dialler has proved itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    /// It is one.
    Accepted = 0,
    /// There is no such group here, any more.
    NoGroup = 1,
    /// The group here has another number of ranks.
    WrongWorld = 2,
    /// The ranks named aren't these.
    WrongRank = 3,
    /// This rank has such a connection already.
    Taken = 4,
    /// Both dialled at once, and the lower rank's connection is the one.
    Crossed = 5,
    /// The group has ended, and the survivors have gone on without the rank that dials.
    WentOn = 6,
    /// No connection was asked for: this rank waits in a call, of whichever group, or knows that the group has ended.
    Waits = 7,
    /// No connection was asked for: this rank is in no call that waits.
    Elsewhere = 8,
    /// The dialler's certificate isn't the rank's that it says it is.
    WrongName = 9,
}

impl Status {
    fn from_code(code: u8) -> Option<Status> {
        use Status::*;
        let all =
            [Accepted, NoGroup, WrongWorld, WrongRank, Taken, Crossed, WentOn, Waits, Elsewhere, WrongName];
        all.into_iter().find(|s| *s as u8 == code)
    }
}

/// The dialler's proof.
pub(crate) fn proof(secret: &Secret, hello: &[u8], challenge: &[u8]) -> [u8; PROOF] {
    secret.prove("dial", &[hello, challenge])
}

pub(crate) fn check_proof(secret: &Secret, hello: &[u8], challenge: &[u8], proof: &[u8]) -> bool {
    secret.verify("dial", &[hello, challenge], proof)
}

/// The other side's answer, with its proof; `waits` is for how long it will wait, where that was asked.
pub(crate) fn answer(
    secret: &Secret,
    hello: &[u8],
    challenge: &[u8],
    status: Status,
    waits: Duration,
) -> [u8; ANSWER] {
    let mut b = [0; ANSWER];
    b[0] = status as u8;
    let milliseconds = u32::try_from(waits.as_millis()).unwrap_or(u32::MAX);
    b[4..8].copy_from_slice(&milliseconds.to_le_bytes());
    let proof = secret.prove("answer", &[hello, challenge, &b[..8]]);
    b[8..].copy_from_slice(&proof);
    b
}

/// The status of an answer, and for how long the other side will wait, if its proof holds.
pub(crate) fn check_answer(
    secret: &Secret,
    hello: &[u8],
    challenge: &[u8],
    bytes: &[u8],
) -> Option<(Status, Duration)> {
    let (head, proof) = bytes.split_at_checked(8)?;
    let status = Status::from_code(head[0])?;
    let waits = Duration::from_millis(u32::from_le_bytes([head[4], head[5], head[6], head[7]]).into());
    secret.verify("answer", &[hello, challenge, head], proof).then_some((status, waits))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello() -> Hello {
        Hello {
            channel: Channel::Message,
            world: 4,
            from: 1,
            to: 3,
            group: [9; 16],
            instance: [5; 16],
            nonce: [3; 32],
        }
    }

    #[test]
    fn other_versions_are_told_from_garbage() {
        let mut bytes = hello().bytes();
        assert_eq!(Hello::parse(&bytes), Ok(hello()));
        bytes[8] += 1;
        assert_eq!(Hello::parse(&bytes), Err(Misfit::Version(VERSION + 1)));
        bytes[0] = b'G';
        assert_eq!(Hello::parse(&bytes), Err(Misfit::Garbage));
        assert_eq!(check_challenge(&challenge(&[1; 32])), Ok(()));
        assert!(may_be_hello(b"tens") && may_be_hello(&bytes[..0]) && !may_be_hello(b"GET / HT"));
    }

    #[test]
    fn a_proof_serves_one_connection_and_one_side() {
        let secret = Secret::generate().unwrap();
        let (h, c) = (hello().bytes(), challenge(&[1; 32]));
        let p = proof(&secret, &h, &c);
        assert!(check_proof(&secret, &h, &c, &p));
        let others = [
            Hello { channel: Channel::Collective, ..hello() },
            Hello { world: 5, ..hello() },
            Hello { from: 2, ..hello() },
            Hello { to: 2, ..hello() },
            Hello { group: [8; 16], ..hello() },
            Hello { nonce: [4; 32], ..hello() },
        ];
        for other in others {
            assert!(!check_proof(&secret, &other.bytes(), &c, &p));
        }
        assert!(!check_proof(&secret, &h, &challenge(&[2; 32]), &p), "a replay meets another nonce");
        let waits = Duration::from_millis(1500);
        let a = answer(&secret, &h, &c, Status::Waits, waits);
        assert_eq!(check_answer(&secret, &h, &c, &a), Some((Status::Waits, waits)));
        assert!(!check_proof(&secret, &h, &c, &a[8..]), "an answer is no proof of the other side");
        let mut reflected = a;
        reflected[8..].copy_from_slice(&p);
        assert_eq!(check_answer(&secret, &h, &c, &reflected), None);
        let stranger = Secret::generate().unwrap();
        assert_eq!(check_answer(&stranger, &h, &c, &a), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_hello_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(hello) = Hello::parse(&bytes) {
                prop_assert_eq!(&hello.bytes()[..], &bytes[..]);
            }
            let _ = check_challenge(&bytes);
        }

        #[test]
        fn a_changed_hello_is_another_or_refused(at in 0usize..HELLO, by in 1u8..=255) {
            let mut bytes = hello().bytes();
            bytes[at] ^= by;
            prop_assert_ne!(Hello::parse(&bytes), Ok(hello()));
        }

        #[test]
        fn a_changed_answer_is_refused(at in 0usize..ANSWER, by in 1u8..=255) {
            let secret = Secret::fixed();
            let (h, c) = (hello().bytes(), challenge(&[1; 32]));
            let mut bytes = answer(&secret, &h, &c, Status::Taken, Duration::ZERO);
            bytes[at] ^= by;
            prop_assert_eq!(check_answer(&secret, &h, &c, &bytes), None);
        }
    }
}
