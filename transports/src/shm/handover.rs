//! How the ranks of one host come to hold the same memory.
//!
//! Rank 0 makes the memory and listens on an abstract Unix socket whose name it publishes through the job's
//! store. Each other rank connects and says who it is, with a pidfd of itself; when all have come, each gets
//! its memfd and everyone's pidfd, and says so, and which processors it may use; when all have, each is told to go on,
//! and everyone's processors. A rank that can't take them
//! is everyone's error. That a rank can be handed the memory is the proof that it is on
//! this host.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tensorwire_core::{Deadline, Error, Result, Tuning};

use super::layout::Layout;
use super::memory::{Memory, VERSION};
use crate::liveness;
use crate::local_socket;
use crate::processors::Processors;
use crate::store::Store;

const MAGIC: [u8; 4] = *b"TWsh";
/// The kernel passes at most 253 descriptors at once.
const FDS_A_MESSAGE: usize = 128;

/// Begins what rank 0 publishes instead of a name if it can't begin.
const FAILED: char = '!';

/// Tunings that rank 0 may pass on.
pub(super) const MAX_TUNINGS: usize = 256;

/// How long a caller may take to introduce itself: one that says nothing must not keep the others waiting.
const GREETING: Duration = Duration::from_secs(2);

/// What every rank ends up with.
pub(super) struct Handover {
    pub(super) memory: Memory,
    /// Where the group's part of it starts.
    pub(super) start: u64,
    pub(super) layout: Layout,
    pub(super) tuning: Vec<Tuning>,
    pub(super) pidfds: Vec<OwnedFd>,
    pub(super) processors: Vec<Processors>,
}

/// Rank 0: makes the memory, waits for the others and hands it over.
pub(super) fn give(
    layout: Layout,
    tuning: &[Tuning],
    key: &str,
    store: &dyn Store,
    deadline: Deadline,
) -> Result<Handover> {
    let world = layout.world;
    let rendezvous = |what: String| Error::Rendezvous { rank: 0, world, what };
    let make = || {
        let memory = Memory::create()?;
        let start = layout.take(&memory)?;
        let name = local_socket::fresh_name("shm").map_err(|e| Error::os("naming a socket", e))?;
        let listener = local_socket::listen(&name).and_then(|l| l.set_nonblocking(true).map(|()| l));
        Ok((memory, start, name, listener.map_err(|e| Error::os("listening for the other ranks", e))?))
    };
    let (memory, start, name, listener) = make().inspect_err(|e: &Error| {
        // If the store is out of reach as well, the others' time runs out.
        let _ = store.set(key, format!("{FAILED}{e}").as_bytes(), deadline);
    })?;
    store.set(key, name.as_bytes(), deadline)?;

    let mut guests: Vec<Option<(UnixStream, OwnedFd)>> = (0..world).map(|_| None).collect();
    let mut refused = Vec::new();
    for _ in 1..world {
        let failed = |e: io::Error, missing: Vec<usize>| match e.kind() {
            io::ErrorKind::TimedOut => {
                format!("rank(s) {missing:?} did not come within {:?}", deadline.budget())
            }
            _ => format!("rank 0 can't let rank(s) {missing:?} in: {e}{}", advice(&e)),
        };
        while let Some(why) = welcome(&listener, &mut guests, deadline).map_err(|e| {
            let mut what = failed(e, (1..world).filter(|r| guests[*r].is_none()).collect());
            if !refused.is_empty() {
                what += &format!("; refused: {}", refused.join("; "));
            }
            rendezvous(what)
        })? {
            refused.push(why);
        }
    }
    let mut pidfds = vec![liveness::own_pidfd()?];
    let mut streams = Vec::new();
    for (stream, pidfd) in guests.into_iter().flatten() {
        pidfds.push(pidfd);
        streams.push(stream);
    }
    let borrowed: Vec<BorrowedFd<'_>> = pidfds.iter().map(AsFd::as_fd).collect();
    let went_away =
        |i: usize| move |e: io::Error| rendezvous(format!("rank {} went away while it joined: {e}", i + 1));
    for (i, stream) in streams.iter_mut().enumerate() {
        let mut hand = || {
            local_socket::limit(stream, deadline)?;
            local_socket::write_frame(stream, &accepted(&layout, start, tuning))?;
            send_fds(stream, &[memory.fd()])?;
            borrowed.chunks(FDS_A_MESSAGE).try_for_each(|fds| send_fds(stream, fds))
        };
        hand().map_err(went_away(i))?;
    }
    drop(borrowed);
    let mut processors = vec![Processors::allowed()];
    for (i, stream) in streams.iter_mut().enumerate() {
        let theirs = local_socket::read_frame(stream).map_err(went_away(i))?;
        let theirs = parse_processors(&theirs).and_then(|all| all.into_iter().next());
        processors.push(theirs.ok_or_else(|| {
            rendezvous(format!("rank {} said of its processors what makes no sense", i + 1))
        })?);
    }
    let all = write_processors(&processors);
    for (i, stream) in streams.iter_mut().enumerate() {
        local_socket::write_frame(stream, &all).map_err(went_away(i))?;
    }
    Ok(Handover { memory, start, layout, tuning: tuning.to_vec(), pidfds, processors })
}

/// What to do about an error.
fn advice(e: &io::Error) -> &'static str {
    match Errno::from_io_error(e) {
        Some(Errno::MFILE) => "; is the limit of open files (ulimit -n) too low?",
        _ => "",
    }
}

/// Lets one rank in, or says why a caller was refused. Fails when time is up, or for want of files.
fn welcome(
    listener: &UnixListener,
    guests: &mut [Option<(UnixStream, OwnedFd)>],
    deadline: Deadline,
) -> io::Result<Option<String>> {
    let mut stream = accept(listener, deadline)?;
    let mut introduce = || {
        local_socket::check_user(&stream)?;
        local_socket::limit(&stream, Deadline::after(GREETING.min(deadline.remaining())))?;
        let hello = local_socket::read_frame(&mut stream)?;
        let pidfd = recv_fds(&stream, 1)?.remove(0);
        Ok((hello, pidfd))
    };
    let (hello, pidfd) = match introduce() {
        Ok(introduced) => introduced,
        Err(e) if !advice(&e).is_empty() => return Err(e),
        Err(e) => return Ok(Some(format!("a caller that did not introduce itself: {e}"))),
    };
    match admit(&hello, guests) {
        Ok(rank) => {
            guests[rank] = Some((stream, pidfd));
            Ok(None)
        }
        Err(why) => {
            let mut reply = vec![1];
            reply.extend_from_slice(why.as_bytes());
            // A caller that has gone needs no answer.
            let _ = local_socket::write_frame(&mut stream, &reply);
            Ok(Some(why))
        }
    }
}

/// The rank that this greeting introduces, if it belongs here.
fn admit(hello: &[u8], guests: &[Option<(UnixStream, OwnedFd)>]) -> Result<usize, String> {
    let world = guests.len();
    let words: &[u8; 16] = hello.try_into().map_err(|_| "a greeting of the wrong length".to_owned())?;
    let word = |i: usize| u32::from_le_bytes([words[i], words[i + 1], words[i + 2], words[i + 3]]);
    if words[..4] != MAGIC {
        return Err("a greeting that is not tensorwire's".into());
    }
    let (version, rank, their_world) = (word(4), word(8) as usize, word(12) as usize);
    if version != VERSION {
        return Err(format!(
            "rank {rank} speaks version {version} of the shared-memory protocol, rank 0 {VERSION}"
        ));
    }
    if their_world != world {
        return Err(format!("rank {rank} was started for a world of {their_world}, rank 0 for {world}"));
    }
    match guests.get(rank) {
        None => Err(format!("rank {rank} is outside the world of {world}")),
        Some(Some(_)) => Err(format!("rank {rank} has come twice")),
        Some(None) if rank == 0 => Err("rank 0 has come twice".into()),
        Some(None) => Ok(rank),
    }
}

/// Every other rank: asks rank 0 for the memory.
pub(super) fn take(
    rank: usize,
    world: usize,
    key: &str,
    store: &dyn Store,
    deadline: Deadline,
) -> Result<Handover> {
    let rendezvous = |what: String| Error::Rendezvous { rank, world, what };
    let name = store.get(key, deadline)?;
    let name = String::from_utf8_lossy(&name).into_owned();
    if let Some(why) = name.strip_prefix(FAILED) {
        return Err(rendezvous(format!("rank 0 could not begin: {why}")));
    }
    // It listened before it published the name: if it doesn't now, it has given up.
    let mut stream = local_socket::connect(&name, Deadline::after(Duration::ZERO))
        .map_err(|e| rendezvous(format!("rank 0 can't be reached on this host ({name}): {e}")))?;
    let mut hello = Vec::from(MAGIC);
    for word in [VERSION, rank as u32, world as u32] {
        hello.extend_from_slice(&word.to_le_bytes());
    }
    let own = liveness::own_pidfd()?;
    let mut ask = || {
        local_socket::limit(&stream, deadline)?;
        local_socket::write_frame(&mut stream, &hello)?;
        send_fds(&stream, &[own.as_fd()])?;
        local_socket::read_frame(&mut stream)
    };
    let reply = ask().map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => {
            rendezvous("rank 0 ended, or gave up, before all ranks had come".into())
        }
        _ => rendezvous(format!("rank 0 did not answer within {:?}: {e}", deadline.budget())),
    })?;
    let accepted = match reply.split_first() {
        Some((0, body)) => parse_accepted(body, world),
        Some((_, why)) => {
            return Err(rendezvous(format!("rank 0 refused: {}", String::from_utf8_lossy(why))));
        }
        None => None,
    };
    let (layout, start, tuning) =
        accepted.ok_or_else(|| rendezvous("rank 0 sent an answer that makes no sense".into()))?;
    let receive = || {
        let memory = recv_fds(&stream, 1)?.remove(0);
        let mut pidfds = Vec::with_capacity(world);
        while pidfds.len() < world {
            pidfds.extend(recv_fds(&stream, (world - pidfds.len()).min(FDS_A_MESSAGE))?);
        }
        Ok((memory, pidfds))
    };
    let (memory, pidfds) = receive().map_err(|e: io::Error| match advice(&e) {
        "" => rendezvous(format!("rank 0 went away while handing over: {e}")),
        advice => rendezvous(format!("no room for {} descriptors: {e}{advice}", world + 1)),
    })?;
    let mut confirm = || {
        local_socket::write_frame(&mut stream, &write_processors(&[Processors::allowed()]))?;
        local_socket::read_frame(&mut stream)
    };
    let all =
        confirm().map_err(|e| rendezvous(format!("rank 0 gave up, for a rank that could not join: {e}")))?;
    let processors = parse_processors(&all)
        .filter(|all| all.len() == world)
        .ok_or_else(|| rendezvous("rank 0 said of all ranks' processors what makes no sense".into()))?;
    Ok(Handover { memory: Memory::open(memory)?, start, layout, tuning, pidfds, processors })
}

/// Some ranks' processors, as text with a space between.
fn write_processors(all: &[Processors]) -> Vec<u8> {
    all.iter().map(Processors::to_string).collect::<Vec<_>>().join(" ").into_bytes()
}

fn parse_processors(text: &[u8]) -> Option<Vec<Processors>> {
    str::from_utf8(text).ok()?.split(' ').map(|one| one.parse().ok()).collect()
}

/// Rank 0's answer to a rank it lets in, in words behind status 0: the slot bytes of the layout, where the group
/// starts, and the tunings.
fn accepted(layout: &Layout, start: u64, tuning: &[Tuning]) -> Vec<u8> {
    let words = |t: &Tuning| {
        [t.world, t.one_shot, t.symmetric_one_shot, t.chunk, t.single_copy_above].map(|n| n as u64)
    };
    let words = [layout.slots() as u64, start].into_iter().chain(tuning.iter().flat_map(words));
    std::iter::once(0).chain(words.flat_map(u64::to_le_bytes)).collect()
}

fn parse_accepted(body: &[u8], world: usize) -> Option<(Layout, u64, Vec<Tuning>)> {
    let (words, []) = body.as_chunks::<8>() else { return None };
    let words: Vec<u64> = words.iter().map(|w| u64::from_le_bytes(*w)).collect();
    let ([slots, start], rest) = words.split_first_chunk()?;
    let (tuning, []) = rest.as_chunks::<5>() else { return None };
    let parse = |words: &[u64; 5]| {
        let number = |i: usize| usize::try_from(words[i]).ok();
        let tuning = Tuning {
            world: number(0)?,
            one_shot: number(1)?,
            symmetric_one_shot: number(2)?,
            chunk: number(3)?,
            single_copy_above: number(4)?,
        };
        Some(tuning).filter(Tuning::is_sound)
    };
    let layout = Layout::new(world, usize::try_from(*slots).ok()?).ok()?;
    Some((layout, *start, tuning.iter().map(parse).collect::<Option<_>>()?))
}

fn accept(listener: &UnixListener, deadline: Deadline) -> io::Result<UnixStream> {
    loop {
        let left = deadline.remaining();
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let mut fds = [PollFd::new(listener, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
}

fn send_fds(stream: &UnixStream, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_A_MESSAGE))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one message"));
    }
    sendmsg(stream, &[IoSlice::new(b"f")], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn recv_fds(stream: &UnixStream, count: usize) -> io::Result<Vec<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_A_MESSAGE))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let got = recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fds: Vec<OwnedFd> = control
        .drain()
        .flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
            _ => Vec::new(),
        })
        .collect();
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(Errno::MFILE.into());
    }
    if got.bytes != 1 || fds.len() != count {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("{} of {count} descriptors came", fds.len()),
        ));
    }
    Ok(fds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(magic: &[u8; 4], words: [u32; 3]) -> Vec<u8> {
        let mut h = Vec::from(*magic);
        words.iter().for_each(|w| h.extend_from_slice(&w.to_le_bytes()));
        h
    }

    #[test]
    fn what_rank_0_tells_comes_whole_or_not_at_all() {
        let layout = Layout::new(3, 64 << 10).unwrap();
        for tuning in [vec![], vec![Tuning::built_in(2)], (2..9).map(Tuning::built_in).collect()] {
            let body = accepted(&layout, 1 << 21, &tuning);
            assert_eq!(body[0], 0);
            assert_eq!(parse_accepted(&body[1..], 3), Some((layout, 1 << 21, tuning)));
            for cut in 1..body.len() {
                // Whole words can be a shorter list.
                let parsed = parse_accepted(&body[1..cut], 3);
                assert!(parsed.is_none() || (cut >= 17 && (cut - 17).is_multiple_of(40)), "{cut}");
            }
        }
        let unsound = Tuning { chunk: 3, ..Tuning::built_in(2) };
        assert_eq!(parse_accepted(&accepted(&layout, 0, &[unsound])[1..], 3), None);
    }

    #[test]
    fn only_a_rank_of_this_world_that_has_not_come_is_admitted() {
        let (end, _other) = UnixStream::pair().unwrap();
        let guests = vec![None, Some((end, liveness::own_pidfd().unwrap())), None];
        assert_eq!(admit(&hello(&MAGIC, [VERSION, 2, 3]), &guests), Ok(2));
        for (hello, why) in [
            (hello(&MAGIC, [VERSION, 1, 3]), "rank 1 has come twice"),
            (hello(&MAGIC, [VERSION, 0, 3]), "rank 0 has come twice"),
            (hello(&MAGIC, [VERSION, 3, 3]), "outside the world of 3"),
            (hello(&MAGIC, [VERSION, 2, 4]), "a world of 4, rank 0 for 3"),
            (hello(&MAGIC, [VERSION + 1, 2, 3]), "version"),
            (hello(b"HTTP", [VERSION, 2, 3]), "not tensorwire's"),
            (b"GET / HTTP/1.1".to_vec(), "wrong length"),
            (Vec::new(), "wrong length"),
        ] {
            let message = admit(&hello, &guests).unwrap_err();
            assert!(message.contains(why), "{message}");
        }
    }
}
