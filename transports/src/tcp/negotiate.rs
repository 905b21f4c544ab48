//! Connections whose handshake is under way, on either side: state machines that do what the socket allows now.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::TcpOptions;
use super::hello::{self, ANSWER, CHALLENGE, HELLO, Hello, Misfit, Status};
use super::secret::{PROOF, Secret, random};
use super::socket;

/// How long a stranger may take to prove itself.
const PATIENCE: Duration = Duration::from_secs(3);

/// Bytes that are awaited, and those that have come: no more memory than the longest message takes.
struct Inbox {
    bytes: [u8; HELLO],
    have: usize,
}

impl Inbox {
    const EMPTY: Inbox = Inbox { bytes: [0; HELLO], have: 0 };

    /// Reads on towards `want` bytes: all of them, or `None` if they aren't there yet.
    fn read(&mut self, stream: &TcpStream, want: usize) -> io::Result<Option<&[u8]>> {
        while self.have < want {
            match rustix::net::recv(stream, &mut self.bytes[self.have..want], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((_, n)) => self.have += n,
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.have = 0;
        Ok(Some(&self.bytes[..want]))
    }
}

/// Sends one of the handshake's messages, for which a fresh connection has room.
fn say(stream: &TcpStream, bytes: &[u8]) -> io::Result<()> {
    match rustix::net::send(stream, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
        Ok(n) if n == bytes.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(e) => Err(e.into()),
    }
}

/// A connection that somebody has opened to this process.
pub(crate) struct Arrival {
    stream: TcpStream,
    until: Instant,
    inbox: Inbox,
    hello: Option<[u8; HELLO]>,
    challenge: [u8; CHALLENGE],
}

impl Arrival {
    pub(crate) fn new(stream: TcpStream) -> io::Result<Arrival> {
        stream.set_nonblocking(true)?;
        let until = Instant::now() + PATIENCE;
        Ok(Arrival { stream, until, inbox: Inbox::EMPTY, hello: None, challenge: [0; CHALLENGE] })
    }

    pub(crate) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// When it has taken too long.
    pub(crate) fn until(&self) -> Instant {
        self.until
    }

    /// Goes on as far as it can: what the other side has proved to be, `None` if it hasn't yet, or an error if it
    /// never will.
    pub(crate) fn advance(&mut self, secret: &Secret) -> io::Result<Option<Hello>> {
        let no = || io::Error::from(io::ErrorKind::InvalidData);
        let Some(greeting) = self.hello else {
            let Some(bytes) = self.inbox.read(&self.stream, HELLO)? else {
                let so_far = &self.inbox.bytes[..self.inbox.have];
                return if hello::may_be_hello(so_far) { Ok(None) } else { Err(no()) };
            };
            let greeting: [u8; HELLO] = bytes.try_into().expect("as many bytes as asked for");
            self.challenge = hello::challenge(&random().map_err(|_| no())?);
            match Hello::parse(&greeting) {
                Ok(_) => {}
                // It learns our version before the connection ends.
                Err(Misfit::Version(_)) => {
                    say(&self.stream, &self.challenge)?;
                    return Err(no());
                }
                Err(Misfit::Garbage) => return Err(no()),
            }
            say(&self.stream, &self.challenge)?;
            self.hello = Some(greeting);
            return Ok(None);
        };
        let Some(proof) = self.inbox.read(&self.stream, PROOF)? else { return Ok(None) };
        if !hello::check_proof(secret, &greeting, &self.challenge, proof) {
            return Err(no());
        }
        Hello::parse(&greeting).map(Some).map_err(|_| no())
    }

    /// Tells the other side, which has proved itself, what becomes of the connection; it is the caller's if it was
    /// accepted.
    pub(crate) fn settle(self, secret: &Secret, status: Status) -> Option<TcpStream> {
        let greeting = self.hello.as_ref()?;
        let told = say(&self.stream, &hello::answer(secret, greeting, &self.challenge, status));
        (told.is_ok() && status == Status::Accepted).then_some(self.stream)
    }
}

/// Why a dial came to nothing.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The other side knows the secret, and doesn't want the connection.
    Status(Status),
    /// Nobody listens there.
    Nobody,
    /// The other side can't be reached.
    Unreachable(io::Error),
    /// It hung up in the middle: it is worth another try.
    Cut,
    /// It hung up on the proof: it has another secret, or has ended.
    Unproved,
    /// It can't prove that it knows the secret, or speaks another protocol or version.
    Stranger(String),
}

impl Refusal {
    /// For a person.
    pub(crate) fn describe(&self) -> String {
        match self {
            Refusal::Status(status) => format!("it refused: {status:?}"),
            Refusal::Nobody => "nobody listens there".to_owned(),
            Refusal::Unreachable(e) => e.to_string(),
            Refusal::Unproved => "it has another secret: all ranks of a job need the same".to_owned(),
            Refusal::Cut => "it hung up".to_owned(),
            Refusal::Stranger(what) => what.clone(),
        }
    }
}

/// A connection that this process opens.
pub(crate) struct Dial {
    stream: TcpStream,
    hello: [u8; HELLO],
    inbox: Inbox,
    stage: Stage,
}

enum Stage {
    Connecting,
    Greeted,
    Proved([u8; CHALLENGE]),
}

impl Dial {
    pub(crate) fn begin(to: SocketAddr, hello: &Hello, options: &TcpOptions) -> io::Result<Dial> {
        let stream = socket::begin_connect(to, options)?;
        Ok(Dial { stream, hello: hello.bytes(), inbox: Inbox::EMPTY, stage: Stage::Connecting })
    }

    pub(crate) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Whether the other side's kernel hasn't answered yet.
    pub(crate) fn is_connecting(&self) -> bool {
        matches!(self.stage, Stage::Connecting)
    }

    /// What to poll for.
    pub(crate) fn interest(&self) -> PollFlags {
        if self.is_connecting() { PollFlags::OUT } else { PollFlags::IN }
    }

    /// Goes on after the socket was ready: whether the connection is made.
    pub(crate) fn advance(&mut self, secret: &Secret) -> Result<bool, Refusal> {
        let stranger = |what: &str| Refusal::Stranger(what.to_owned());
        loop {
            match &self.stage {
                Stage::Connecting => {
                    socket::connected(&self.stream).map_err(|e| match e.kind() {
                        io::ErrorKind::ConnectionRefused => Refusal::Nobody,
                        io::ErrorKind::ConnectionReset => Refusal::Cut,
                        _ => Refusal::Unreachable(e),
                    })?;
                    say(&self.stream, &self.hello).map_err(|_| Refusal::Cut)?;
                    self.stage = Stage::Greeted;
                    return Ok(false);
                }
                Stage::Greeted => {
                    let bytes = match self.inbox.read(&self.stream, CHALLENGE) {
                        Ok(Some(bytes)) => bytes,
                        Ok(None) => return Ok(false),
                        Err(_) => return Err(Refusal::Cut),
                    };
                    match hello::check_challenge(bytes) {
                        Ok(()) => {}
                        Err(Misfit::Version(v)) => {
                            return Err(Refusal::Stranger(format!(
                                "it speaks version {v} of the protocol, this rank another"
                            )));
                        }
                        Err(Misfit::Garbage) => return Err(stranger("something else listens there")),
                    }
                    let challenge: [u8; CHALLENGE] = bytes.try_into().expect("as many bytes as asked for");
                    let proof = hello::proof(secret, &self.hello, &challenge);
                    say(&self.stream, &proof).map_err(|_| Refusal::Cut)?;
                    self.stage = Stage::Proved(challenge);
                }
                Stage::Proved(challenge) => {
                    let bytes = match self.inbox.read(&self.stream, ANSWER) {
                        Ok(Some(bytes)) => bytes,
                        Ok(None) => return Ok(false),
                        // Whoever doesn't like a proof hangs up.
                        Err(_) => return Err(Refusal::Unproved),
                    };
                    return match hello::check_answer(secret, &self.hello, challenge, bytes) {
                        Some(Status::Accepted) => Ok(true),
                        Some(status) => Err(Refusal::Status(status)),
                        None => Err(stranger("it can't prove that it knows the job's secret")),
                    };
                }
            }
        }
    }

    pub(crate) fn into_stream(self) -> TcpStream {
        self.stream
    }
}
