//! Connections whose handshake is under way, on either side: state machines that do what the socket allows now.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::TcpOptions;
use super::frame::PARTING;
use super::hello::{self, ANSWER, CHALLENGE, Channel, HELLO, Hello, Misfit, Status};
use super::secret::{PROOF, Secret, random};
use super::socket;
use super::stream::{Identity, Stream};
use super::tls;

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
    fn read(&mut self, stream: &mut Stream, want: usize) -> io::Result<Option<&[u8]>> {
        while self.have < want {
            match stream.receive(&mut self.bytes[self.have..want])? {
                Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(n) => self.have += n,
                None => return Ok(None),
            }
        }
        self.have = 0;
        Ok(Some(&self.bytes[..want]))
    }

    /// Whether what has come is a record of TLS: an alert or a handshake.
    fn is_tls(&self) -> bool {
        self.have >= 2 && matches!(self.bytes[..2], [21 | 22, 3])
    }
}

/// A challenge as it is proved: with the number of the connection, where it has one.
fn bound(challenge: &[u8], stream: &Stream) -> io::Result<Vec<u8>> {
    Ok([challenge, &stream.binding()?].concat())
}

/// A connection that somebody has opened to this process.
pub(crate) struct Arrival {
    stream: Stream,
    until: Instant,
    inbox: Inbox,
    hello: Option<[u8; HELLO]>,
    /// The challenge, as it is proved.
    challenge: Vec<u8>,
    /// Of a rank that has proved itself and brings word that a group has ended: what has come of the frame.
    word: Option<Vec<u8>>,
}

impl Arrival {
    pub(crate) fn new(stream: Stream) -> Arrival {
        let until = Instant::now() + PATIENCE;
        Arrival { stream, until, inbox: Inbox::EMPTY, hello: None, challenge: Vec::new(), word: None }
    }

    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Whether the other side, which has proved itself, has the certificate of `who`, if it needs one.
    pub(crate) fn is_from(&self, who: Identity) -> bool {
        self.stream.is_from(who)
    }

    /// The frame that came behind the handshake, if one was to.
    pub(super) fn word(&self) -> &[u8] {
        self.word.as_deref().unwrap_or_default()
    }

    /// When it has taken too long.
    pub(crate) fn until(&self) -> Instant {
        self.until
    }

    /// Goes on as far as it can: what the other side has proved to be, `None` if it hasn't yet, or an error if it
    /// never will.
    pub(crate) fn advance(&mut self, secret: &Secret) -> io::Result<Option<Hello>> {
        let no = || io::Error::from(io::ErrorKind::InvalidData);
        if !self.stream.handshake()? {
            return Ok(None);
        }
        let Some(greeting) = self.hello else {
            let Some(bytes) = self.inbox.read(&mut self.stream, HELLO)? else {
                let so_far = &self.inbox.bytes[..self.inbox.have];
                return if hello::may_be_hello(so_far) { Ok(None) } else { Err(no()) };
            };
            let greeting: [u8; HELLO] = bytes.try_into().expect("as many bytes as asked for");
            let challenge = hello::challenge(&random().map_err(|_| no())?);
            match Hello::parse(&greeting) {
                Ok(_) => {}
                // It learns our version before the connection ends; one that speaks TLS, that this rank doesn't.
                Err(misfit) if matches!(misfit, Misfit::Version(_)) || greeting[..2] == [22, 3] => {
                    self.stream.say(&challenge)?;
                    return Err(no());
                }
                Err(_) => return Err(no()),
            }
            self.stream.say(&challenge)?;
            self.challenge = bound(&challenge, &self.stream)?;
            self.hello = Some(greeting);
            return Ok(None);
        };
        let hello = Hello::parse(&greeting).map_err(|_| no())?;
        if self.word.is_none() {
            let Some(proof) = self.inbox.read(&mut self.stream, PROOF)? else { return Ok(None) };
            if !hello::check_proof(secret, &greeting, &self.challenge, proof) {
                return Err(no());
            }
            if hello.channel != Channel::Verdict {
                return Ok(Some(hello));
            }
            self.answer(secret, Status::Accepted, Duration::ZERO)?;
            self.word = Some(Vec::with_capacity(PARTING));
        }
        Ok(self.read_word()?.then_some(hello))
    }

    /// Reads on towards the frame that follows the handshake: whether all of it is there.
    fn read_word(&mut self) -> io::Result<bool> {
        let Some(word) = &mut self.word else { return Ok(false) };
        let mut bytes = [0; PARTING];
        while word.len() < PARTING {
            let missing = PARTING - word.len();
            match self.stream.receive(&mut bytes[..missing])? {
                Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(n) => word.extend_from_slice(&bytes[..n]),
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Tells the other side, which has proved itself, what becomes of the connection; it is the caller's if it was
    /// accepted.
    pub(crate) fn settle(mut self, secret: &Secret, status: Status) -> Option<Stream> {
        let told = self.answer(secret, status, Duration::ZERO);
        (told.is_ok() && status == Status::Accepted).then_some(self.stream)
    }

    /// Tells the other side, which has proved itself and asked, for how long this one will wait, if it waits.
    pub(crate) fn tell_waits(mut self, secret: &Secret, waits: Option<Duration>) {
        let status = if waits.is_some() { Status::Waits } else { Status::Elsewhere };
        // Who has gone meanwhile needs no answer.
        let _ = self.answer(secret, status, waits.unwrap_or_default());
    }

    fn answer(&mut self, secret: &Secret, status: Status, waits: Duration) -> io::Result<()> {
        let greeting = self.hello.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        self.stream.say(&hello::answer(secret, greeting, &self.challenge, status, waits))
    }
}

/// Why a dial came to nothing.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The other side knows the secret, and doesn't want the connection.
    Status(Status),
    /// It was asked, and will wait for so long.
    Waits(Duration),
    /// Nobody listens there.
    Nobody,
    /// The other side can't be reached.
    Unreachable(io::Error),
    /// It hung up in the middle: it is worth another try.
    Cut,
    /// It hung up on the proof: it has another secret, or has ended.
    Unproved,
    /// It hung up before the proof, over TLS: it doesn't trust this rank's certificate, or has ended.
    Untrusted,
    /// It can't prove that it knows the secret, or speaks another protocol or version.
    Stranger(String),
}

impl Refusal {
    /// For a person.
    pub(crate) fn describe(&self) -> String {
        match self {
            Refusal::Status(Status::WrongName) => {
                "it refused: this process's certificate is another rank's (TENSORWIRE_TLS_CERT)".to_owned()
            }
            Refusal::Status(status) => format!("it refused: {status:?}"),
            Refusal::Waits(_) => "it was asked whether it waits, and does".to_owned(),
            Refusal::Nobody => "nobody listens there".to_owned(),
            Refusal::Unreachable(e) => e.to_string(),
            Refusal::Unproved => "it has another secret: all ranks of a job need the same".to_owned(),
            Refusal::Untrusted => {
                "it hung up on this rank's certificate: all ranks of a job need certificates of one \
                                   authority"
                    .to_owned()
            }
            Refusal::Cut => "it hung up".to_owned(),
            Refusal::Stranger(what) => what.clone(),
        }
    }
}

/// A connection that this process opens.
pub(crate) struct Dial {
    stream: Stream,
    hello: [u8; HELLO],
    inbox: Inbox,
    stage: Stage,
}

enum Stage {
    Connecting,
    /// TLS makes its own handshake.
    Securing,
    Greeted,
    /// The challenge, as it is proved.
    Proved(Vec<u8>),
}

impl Dial {
    /// Begins to connect to `peer` at `to`, over TCP or TLS.
    pub(crate) fn begin(
        to: SocketAddr,
        peer: Identity,
        hello: &Hello,
        secret: &Secret,
        options: &TcpOptions,
    ) -> io::Result<Dial> {
        let stream = Stream::dialled(socket::begin_connect(to, options)?, secret, peer)?;
        Ok(Dial::over(stream, hello))
    }

    /// Goes on over a stream that was begun.
    pub(super) fn over(stream: Stream, hello: &Hello) -> Dial {
        Dial { stream, hello: hello.bytes(), inbox: Inbox::EMPTY, stage: Stage::Connecting }
    }

    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Whether the other side's kernel hasn't answered yet.
    pub(crate) fn is_connecting(&self) -> bool {
        matches!(self.stage, Stage::Connecting)
    }

    /// What to poll for.
    pub(crate) fn interest(&self) -> PollFlags {
        match &self.stream {
            Stream::Tcp(_) | Stream::Tls(..) if self.is_connecting() => PollFlags::OUT,
            stream => stream.interest(),
        }
    }

    /// Goes on after the socket was ready: whether the connection is made.
    pub(crate) fn advance(&mut self, secret: &Secret) -> Result<bool, Refusal> {
        let stranger = |what: &str| Refusal::Stranger(what.to_owned());
        let cut = |e: io::Error| tls::complaint(&e).map_or(Refusal::Cut, Refusal::Stranger);
        loop {
            match &self.stage {
                Stage::Connecting => {
                    let connected = self.stream.connected().map_err(|e| match e.kind() {
                        io::ErrorKind::ConnectionRefused => Refusal::Nobody,
                        io::ErrorKind::ConnectionReset => Refusal::Cut,
                        _ => tls::complaint(&e).map_or(Refusal::Unreachable(e), Refusal::Stranger),
                    })?;
                    if !connected {
                        return Ok(false);
                    }
                    self.stage = Stage::Securing;
                }
                Stage::Securing => {
                    if !self.stream.handshake().map_err(cut)? {
                        return Ok(false);
                    }
                    self.stream.say(&self.hello).map_err(cut)?;
                    self.stage = Stage::Greeted;
                }
                Stage::Greeted => {
                    let come = self.inbox.read(&mut self.stream, CHALLENGE);
                    let come =
                        come.map(|bytes| bytes.map(|b| <[u8; CHALLENGE]>::try_from(b).expect("all of it")));
                    let bytes = match come {
                        Ok(Some(bytes)) => bytes,
                        Ok(None) => return Ok(false),
                        Err(_) if !self.stream.is_encrypted() && self.inbox.is_tls() => {
                            return Err(stranger(
                                "it speaks TLS: give all ranks of a job the same TENSORWIRE_TRANSPORT",
                            ));
                        }
                        Err(e) if self.stream.is_encrypted() => {
                            return Err(tls::complaint(&e).map_or(Refusal::Untrusted, Refusal::Stranger));
                        }
                        Err(_) => return Err(Refusal::Cut),
                    };
                    match hello::check_challenge(&bytes) {
                        Ok(()) => {}
                        Err(Misfit::Version(v)) => {
                            return Err(Refusal::Stranger(format!(
                                "it speaks version {v} of the protocol, this rank another"
                            )));
                        }
                        Err(Misfit::Garbage) => return Err(stranger("something else listens there")),
                    }
                    let challenge = bound(&bytes, &self.stream).map_err(cut)?;
                    let proof = hello::proof(secret, &self.hello, &challenge);
                    self.stream.say(&proof).map_err(cut)?;
                    self.stage = Stage::Proved(challenge);
                }
                Stage::Proved(challenge) => {
                    let bytes = match self.inbox.read(&mut self.stream, ANSWER) {
                        Ok(Some(bytes)) => bytes,
                        Ok(None) => return Ok(false),
                        // Whoever doesn't like a proof hangs up.
                        Err(_) => return Err(Refusal::Unproved),
                    };
                    return match hello::check_answer(secret, &self.hello, challenge, bytes) {
                        Some((Status::Accepted, _)) => Ok(true),
                        Some((Status::Waits, waits)) => Err(Refusal::Waits(waits)),
                        Some((status, _)) => Err(Refusal::Status(status)),
                        None => Err(stranger("it can't prove that it knows the job's secret")),
                    };
                }
            }
        }
    }

    pub(crate) fn into_stream(self) -> Stream {
        self.stream
    }
}
