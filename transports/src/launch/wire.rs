//! What a launcher and its agent on another host say to each other, over the standard streams of a remote shell.
//!
//! The agent begins with [`BANNER`]; what a login script prints before it is skipped. Then both send frames: a byte
//! that says what it is, the length of the body (4 bytes, little-endian), and the body.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use super::Stream;
use super::lines::MAX_LINE;

/// What the agent says first. It changes with the frames.
pub(super) const BANNER: &[u8] = b"\0tensorwire agent 1\n";

/// How often each side says that it is there.
pub(super) const BEAT: Duration = Duration::from_secs(5);

/// After how long without a word the other side is taken for lost: a host without power, a cut cable.
pub(super) const SILENCE: Duration = Duration::from_secs(60);

/// Bytes of a body at most: a job's whole environment, of which a system takes less.
const MAX_BODY: usize = 8 << 20;
/// The same for what an agent sends: a line and its rank.
const MAX_REPORT: usize = MAX_LINE + 64;
/// Entries of a list at most.
const MAX_ENTRIES: usize = 1 << 16;

/// The ranks that one host is to run.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) first: u32,
    pub(super) ranks: u32,
    pub(super) world: u32,
    pub(super) directory: OsString,
    pub(super) store: OsString,
    pub(super) command: Vec<OsString>,
    pub(super) env: Vec<(OsString, OsString)>,
    /// Variables of single ranks.
    pub(super) rank_env: Vec<(u32, OsString, OsString)>,
}

impl fmt::Debug for Job {
    /// Without the values of variables: secrets are among them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, ranks, world) = (self.first, self.ranks, self.world);
        write!(f, "Job({:?}, {ranks} ranks from {first} of {world})", self.command)
    }
}

/// What the launcher says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Start(Box<Job>),
    /// Pass this signal on to the ranks.
    Signal(u8),
    /// End them.
    End,
    Beat,
}

/// What an agent says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Report {
    Line {
        rank: u32,
        stream: Stream,
        bytes: Vec<u8>,
    },
    /// A rank has ended; `first` if it is the one of its host that failed first.
    Ended {
        rank: u32,
        status: i32,
        first: bool,
    },
    /// Ranks could not be started.
    Failed {
        what: String,
        errno: i32,
    },
    Beat,
}

impl Report {
    pub(super) fn status(raw: i32) -> ExitStatus {
        ExitStatus::from_raw(raw)
    }
}

#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn number(&mut self, n: u32) -> &mut Writer {
        self.0.extend_from_slice(&n.to_le_bytes());
        self
    }

    fn text(&mut self, text: &OsStr) -> &mut Writer {
        self.number(text.len() as u32);
        self.0.extend_from_slice(text.as_bytes());
        self
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn number(&mut self) -> Option<u32> {
        let (n, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*n))
    }

    fn text(&mut self) -> Option<OsString> {
        let len = self.number()? as usize;
        let (text, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        // A zero byte ends a string for the system: what follows it would be lost.
        (!text.contains(&0)).then(|| OsString::from_vec(text.to_vec()))
    }

    fn list<T>(&mut self, mut item: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let len = self.number()? as usize;
        // Not reserved: the length is only a claim.
        (len <= MAX_ENTRIES).then(|| (0..len).map(|_| item(self)).collect())?
    }
}

/// A frame.
fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(5 + body.len());
    bytes.push(kind);
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

impl Job {
    fn body(&self) -> Vec<u8> {
        let mut w = Writer::default();
        w.number(self.first).number(self.ranks).number(self.world).text(&self.directory).text(&self.store);
        w.number(self.command.len() as u32);
        for arg in &self.command {
            w.text(arg);
        }
        w.number(self.env.len() as u32);
        for (name, value) in &self.env {
            w.text(name).text(value);
        }
        w.number(self.rank_env.len() as u32);
        for (rank, name, value) in &self.rank_env {
            w.number(*rank).text(name).text(value);
        }
        w.0
    }

    fn parse(body: &[u8]) -> Option<Job> {
        let mut r = Reader(body);
        let job = Job {
            first: r.number()?,
            ranks: r.number()?,
            world: r.number()?,
            directory: r.text()?,
            store: r.text()?,
            command: r.list(Reader::text)?,
            env: r.list(|r| Some((r.name()?, r.text()?)))?,
            rank_env: r.list(|r| Some((r.number()?, r.name()?, r.text()?)))?,
        };
        let fits = job.ranks > 0 && u64::from(job.first) + u64::from(job.ranks) <= u64::from(job.world);
        (r.0.is_empty() && fits && !job.command.is_empty()).then_some(job)
    }
}

impl Reader<'_> {
    /// The name of a variable.
    fn name(&mut self) -> Option<OsString> {
        self.text().filter(|name| !name.is_empty() && !name.as_bytes().contains(&b'='))
    }
}

impl Order {
    pub(super) fn bytes(&self) -> Vec<u8> {
        match self {
            Order::Start(job) => frame(1, &job.body()),
            Order::Signal(signal) => frame(2, &[*signal]),
            Order::End => frame(3, &[]),
            Order::Beat => frame(4, &[]),
        }
    }

    fn parse(kind: u8, body: &[u8]) -> Option<Order> {
        match (kind, body) {
            (1, body) => Job::parse(body).map(Box::new).map(Order::Start),
            (2, &[signal]) => Some(Order::Signal(signal)),
            (3, []) => Some(Order::End),
            (4, []) => Some(Order::Beat),
            _ => None,
        }
    }
}

/// The parts of a [`Report::Line`]'s frame, so that the line itself need not be copied.
pub(super) fn line_head(rank: usize, stream: Stream, len: usize) -> [u8; 9] {
    let mut head = [0; 9];
    head[0] = 1 + stream as u8;
    head[1..5].copy_from_slice(&(4 + len as u32).to_le_bytes());
    head[5..].copy_from_slice(&(rank as u32).to_le_bytes());
    head
}

impl Report {
    pub(super) fn bytes(&self) -> Vec<u8> {
        match self {
            Report::Line { rank, stream, bytes } => {
                let mut all = line_head(*rank as usize, *stream, bytes.len()).to_vec();
                all.extend_from_slice(bytes);
                all
            }
            Report::Ended { rank, status, first } => {
                let mut w = Writer::default();
                w.number(*rank).number(*status as u32).number(u32::from(*first));
                frame(3, &w.0)
            }
            Report::Failed { what, errno } => {
                let mut w = Writer::default();
                let what: String = what.chars().filter(|c| *c != '\0').take(MAX_LINE / 4).collect();
                w.number(*errno as u32).text(what.as_ref());
                frame(4, &w.0)
            }
            Report::Beat => frame(5, &[]),
        }
    }

    fn parse(kind: u8, body: &[u8]) -> Option<Report> {
        let mut r = Reader(body);
        let report = match kind {
            1 | 2 => {
                let stream = if kind == 1 { Stream::Stdout } else { Stream::Stderr };
                let rank = r.number()?;
                Report::Line { rank, stream, bytes: std::mem::take(&mut r.0).to_vec() }
            }
            3 => Report::Ended { rank: r.number()?, status: r.number()? as i32, first: r.number()? == 1 },
            4 => {
                let errno = r.number()? as i32;
                Report::Failed { what: r.text()?.to_string_lossy().into_owned(), errno }
            }
            5 => Report::Beat,
            _ => return None,
        };
        r.0.is_empty().then_some(report)
    }
}

/// What isn't a frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Garbage;

/// Cuts a stream into frames, in bounded memory.
#[derive(Default)]
pub(super) struct Decoder {
    bytes: Vec<u8>,
    /// How many of them have been taken.
    taken: usize,
}

impl Decoder {
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        self.bytes.drain(..std::mem::take(&mut self.taken));
        self.bytes.extend_from_slice(bytes);
    }

    /// Skips what a login script has printed: whether the banner has come.
    pub(super) fn find_banner(&mut self) -> Result<bool, Garbage> {
        if let Some(at) = self.bytes.windows(BANNER.len()).position(|w| w == BANNER) {
            self.taken = at + BANNER.len();
            return Ok(true);
        }
        if self.bytes.len() > MAX_LINE { Err(Garbage) } else { Ok(false) }
    }

    /// The next order, once all of it has come.
    pub(super) fn order(&mut self) -> Result<Option<Order>, Garbage> {
        self.next(MAX_BODY, Order::parse)
    }

    /// The next report, once all of it has come.
    pub(super) fn report(&mut self) -> Result<Option<Report>, Garbage> {
        self.next(MAX_REPORT, Report::parse)
    }

    fn next<T>(&mut self, most: usize, parse: impl Fn(u8, &[u8]) -> Option<T>) -> Result<Option<T>, Garbage> {
        let Some((&[kind, a, b, c, d], rest)) = self.bytes[self.taken..].split_first_chunk() else {
            return Ok(None);
        };
        let len = u32::from_le_bytes([a, b, c, d]) as usize;
        if len > most {
            return Err(Garbage);
        }
        let Some(body) = rest.get(..len) else { return Ok(None) };
        let parsed = parse(kind, body).ok_or(Garbage)?;
        self.taken += 5 + len;
        Ok(Some(parsed))
    }
}

/// For fuzzing: whatever these bytes are, they are frames, the start of one, or refused.
pub(crate) fn fuzz_frames(bytes: &[u8]) {
    let mut orders = Decoder::default();
    let mut reports = Decoder::default();
    for chunk in bytes.chunks(7) {
        orders.feed(chunk);
        reports.feed(chunk);
        while let Ok(Some(order)) = orders.order() {
            let mut again = Decoder::default();
            again.feed(&order.bytes());
            assert_eq!(again.order(), Ok(Some(order)));
        }
        while let Ok(Some(report)) = reports.report() {
            let mut again = Decoder::default();
            again.feed(&report.bytes());
            let _ = again.report();
        }
    }
    let mut banner = Decoder::default();
    banner.feed(bytes);
    let _ = banner.find_banner();
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn job() -> Job {
        Job {
            first: 2,
            ranks: 2,
            world: 4,
            directory: "/tmp/a b".into(),
            store: "tcp:10.0.0.1:5".into(),
            command: vec!["sh".into(), "-c".into(), OsString::from_vec(b"echo \xff".to_vec())],
            env: vec![("A".into(), "1\n2".into()), ("TENSORWIRE_SECRET".into(), "ab".into())],
            rank_env: vec![(3, "B".into(), "".into())],
        }
    }

    #[test]
    fn orders_and_reports_survive_the_way_in_pieces() {
        let orders = [Order::Start(Box::new(job())), Order::Signal(15), Order::Beat, Order::End];
        let reports = [
            Report::Line { rank: 3, stream: Stream::Stderr, bytes: b"x\xff".to_vec() },
            Report::Line { rank: 0, stream: Stream::Stdout, bytes: vec![7; MAX_LINE] },
            Report::Ended { rank: 1, status: 9, first: true },
            Report::Failed { what: "no luck".into(), errno: 2 },
            Report::Beat,
        ];
        let said: Vec<u8> = orders.iter().flat_map(Order::bytes).collect();
        let mut decoder = Decoder::default();
        let mut heard = Vec::new();
        for byte in said {
            decoder.feed(&[byte]);
            heard.extend(decoder.order().unwrap());
        }
        assert_eq!(heard, orders);
        let said: Vec<u8> = reports.iter().flat_map(Report::bytes).collect();
        let mut heard = Vec::new();
        for piece in said.chunks(1000) {
            decoder.feed(piece);
            while let Some(report) = decoder.report().unwrap() {
                heard.push(report);
            }
        }
        assert_eq!(heard, reports);
    }

    #[test]
    fn a_login_scripts_words_are_skipped_but_not_for_ever() {
        let mut decoder = Decoder::default();
        decoder.feed(b"Welcome to node2\n\0tensorw");
        assert_eq!(decoder.find_banner(), Ok(false));
        decoder.feed(b"ire agent 1\n");
        decoder.feed(&Report::Beat.bytes());
        assert_eq!(decoder.find_banner(), Ok(true));
        assert_eq!(decoder.report(), Ok(Some(Report::Beat)));
        decoder.feed(&[b'x'; MAX_LINE + 1]);
        assert_eq!(decoder.find_banner(), Err(Garbage));
    }

    #[test]
    fn a_claimed_length_costs_nothing_and_a_wrong_job_is_refused() {
        let mut decoder = Decoder::default();
        decoder.feed(&[1, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(decoder.order(), Err(Garbage));
        assert_eq!(decoder.report(), Err(Garbage));
        for wrong in [
            Job { ranks: 0, ..job() },
            Job { first: 3, ..job() },
            Job { command: Vec::new(), ..job() },
            Job { env: vec![("A=B".into(), "".into())], ..job() },
            Job { env: vec![("".into(), "".into())], ..job() },
            Job { directory: "a\0b".into(), ..job() },
        ] {
            assert_eq!(Job::parse(&wrong.body()), None, "{wrong:?}");
        }
        let body = job().body();
        assert!((0..body.len()).all(|cut| Job::parse(&body[..cut]).is_none()));
    }

    proptest! {
        #[test]
        fn any_bytes_are_frames_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            fuzz_frames(&bytes);
        }

        #[test]
        fn a_changed_job_is_another_or_refused(at in 0usize..120, by in 1u8..=255) {
            let mut bytes = Order::Start(Box::new(job())).bytes();
            let at = at % bytes.len();
            bytes[at] ^= by;
            fuzz_frames(&bytes);
        }
    }
}
