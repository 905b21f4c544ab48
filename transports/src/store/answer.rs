//! What a store answers, and how it is asked, over a connection of any kind.
//!
//! One frame a request, one a reply. Request: operation byte, key length byte, key, then the value (set) or
//! the delta (add, 8 bytes) or the milliseconds to wait (get, 8 bytes) or the rank, the world and the process (enter, 4, 4
//! and 16 bytes), little-endian. Reply: status byte, then the value, the sum, or what was wrong.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tensorwire_core::{Deadline, Error, Result};

use crate::local_socket::{random_u64, read_frame, write_frame};

const SET: u8 = 1;
const GET: u8 = 2;
const ADD: u8 = 3;
const ENTER: u8 = 4;

const OK: u8 = 0;
const ABSENT: u8 = 1;
const REFUSED: u8 = 2;

pub(super) const MAX_VALUE: usize = 64 << 10;
/// Bytes of a request or a reply at most: a key and a value fit.
const MAX_FRAME: usize = MAX_VALUE + 1024;
/// Values that one store holds at most; a job needs a few a rank.
const MAX_KEYS: usize = 1 << 16;
/// Bytes of all keys and values that it holds at most.
const MAX_BYTES: usize = 256 << 20;
/// How long a client may take to get a request or its reply through, once it has begun: it isn't waited for in between.
const PATIENCE: Duration = Duration::from_secs(10);
/// Refusals that are remembered for whoever waits in vain.
pub(super) const MAX_REFUSALS: usize = 4;

#[derive(Default)]
pub(super) struct Table {
    pub(super) values: Mutex<HashMap<String, Vec<u8>>>,
    changed: Condvar,
    present: Mutex<Present>,
}

/// A rank that only asks whose store it is.
pub(super) const NOBODY: u32 = u32::MAX;

/// The processes that have entered.
#[derive(Default)]
struct Present {
    world: Option<u32>,
    /// By rank: which process, and how often.
    ranks: HashMap<u32, ([u8; 16], usize)>,
    /// Who was not let in.
    refused: Vec<String>,
}

impl Present {
    fn refuse(&mut self, why: String) {
        if self.refused.len() < MAX_REFUSALS && !self.refused.contains(&why) {
            self.refused.push(why);
        }
    }
}

/// Why a process is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    /// It was started for another world than this one.
    World(u32),
    Rank,
    /// Another process is this rank.
    Taken,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Table {
    /// A table for a job of `world`; without that, the first process that enters says it.
    #[cfg(feature = "tcp")]
    pub(super) fn of(world: usize) -> Table {
        let present = Present { world: Some(world as u32), ..Present::default() };
        Table { present: Mutex::new(present), ..Table::default() }
    }

    /// Lets a process in as `rank`, until it [leaves](Table::leave) as often.
    pub(super) fn enter(&self, rank: u32, world: u32, process: [u8; 16]) -> Result<(), Unfit> {
        let mut present = lock(&self.present);
        let ours = *present.world.get_or_insert(world);
        let unfit = match present.ranks.get(&rank) {
            _ if world != ours => Unfit::World(ours),
            _ if rank >= world => Unfit::Rank,
            Some((known, _)) if *known != process => Unfit::Taken,
            _ => {
                present.ranks.entry(rank).or_insert((process, 0)).1 += 1;
                return Ok(());
            }
        };
        if rank != NOBODY {
            present.refuse(format!("a process that came as rank {rank} {}", unfit.describe(world)));
        }
        Err(unfit)
    }

    /// Remembers somebody who was not let in, for another reason.
    #[cfg(feature = "tcp")]
    pub(super) fn refuse(&self, why: String) {
        lock(&self.present).refuse(why);
    }

    pub(super) fn leave(&self, rank: u32) {
        let mut present = lock(&self.present);
        if let Some((_, times)) = present.ranks.get_mut(&rank) {
            *times -= 1;
            if *times == 0 {
                present.ranks.remove(&rank);
            }
        }
    }

    /// What may be the reason that somebody waits in vain.
    fn refusals(&self) -> String {
        lock(&self.present).refused.join("; ")
    }
}

impl Unfit {
    /// What is wrong with a process that was started for `world`.
    pub(super) fn describe(self, world: u32) -> String {
        match self {
            Unfit::World(ours) => format!("was started for a world of {world}, and the job has {ours}"),
            Unfit::Rank => format!("is outside the world of {world}"),
            Unfit::Taken => "has come twice: was it started twice?".to_owned(),
        }
    }
}

/// A number that tells this process from others.
fn process() -> io::Result<[u8; 16]> {
    static PROCESS: OnceLock<[u8; 16]> = OnceLock::new();
    if let Some(known) = PROCESS.get() {
        return Ok(*known);
    }
    let (a, b) = (random_u64()?.to_le_bytes(), random_u64()?.to_le_bytes());
    let fresh = std::array::from_fn(|i| if i < 8 { a[i] } else { b[i - 8] });
    Ok(*PROCESS.get_or_init(|| fresh))
}

/// Answers one client until it leaves or says something that isn't a request.
pub(super) fn serve(mut stream: impl Wire, table: &Table) {
    let mut entered = Vec::new();
    while let Ok(request) = read_request(&mut stream) {
        let (status, body) = match request.split_first_chunk() {
            Some((&[ENTER, 0], place)) => match enter(place, table) {
                Ok(rank) => {
                    entered.push(rank);
                    (OK, Vec::new())
                }
                Err(why) => (REFUSED, why.into_bytes()),
            },
            _ => answer(&request, table).unwrap_or_else(|why| (REFUSED, why.into_bytes())),
        };
        let mut reply = vec![status];
        reply.extend_from_slice(&body);
        if write_frame(&mut stream, &reply).is_err() || entered.len() > MAX_REFUSALS {
            break;
        }
    }
    entered.into_iter().for_each(|rank| table.leave(rank));
}

/// Waits for a request to begin for as long as it takes, and for the rest of it not long.
fn read_request(stream: &mut impl Wire) -> io::Result<Vec<u8>> {
    let mut head = [0; 4];
    stream.limit(None)?;
    stream.read_exact(&mut head[..1])?;
    stream.limit(Some(Deadline::after(PATIENCE)))?;
    stream.read_exact(&mut head[1..])?;
    let len = u32::from_le_bytes(head) as usize;
    if len > MAX_FRAME {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    Ok(body)
}

fn enter(place: &[u8], table: &Table) -> Result<u32, String> {
    let place: &[u8; 24] = place.try_into().map_err(|_| "malformed request".to_owned())?;
    let word = |at: usize| u32::from_le_bytes([place[at], place[at + 1], place[at + 2], place[at + 3]]);
    let (rank, world) = (word(0), word(4));
    let process = place[8..].try_into().expect("sixteen bytes");
    table.enter(rank, world, process).map(|()| rank).map_err(|unfit| unfit.describe(world))
}

pub(super) fn answer(request: &[u8], table: &Table) -> Result<(u8, Vec<u8>), String> {
    let malformed = || "malformed request".to_owned();
    let (&[op, key_len], rest) = request.split_first_chunk::<2>().ok_or_else(malformed)?;
    let (key, rest) = rest.split_at_checked(key_len as usize).ok_or_else(malformed)?;
    let key = std::str::from_utf8(key).map_err(|_| malformed())?;
    let number = || rest.try_into().map(i64::from_le_bytes).map_err(|_| malformed());
    let mut values = lock(&table.values);
    let held =
        |values: &HashMap<String, Vec<u8>>| values.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>();
    match op {
        SET | ADD if !values.contains_key(key) && values.len() >= MAX_KEYS => {
            Err(format!("over {MAX_KEYS} keys"))
        }
        SET if rest.len() > MAX_VALUE => Err(format!("a value of {} bytes is over {MAX_VALUE}", rest.len())),
        SET if rest.len() > 1024 && held(&values) + rest.len() > MAX_BYTES => {
            Err(format!("over {MAX_BYTES} bytes"))
        }
        SET => {
            values.insert(key.to_owned(), rest.to_vec());
            table.changed.notify_all();
            Ok((OK, Vec::new()))
        }
        ADD => {
            let old = match values.get(key) {
                None => 0,
                Some(v) => v
                    .as_slice()
                    .try_into()
                    .map(i64::from_le_bytes)
                    .map_err(|_| format!("{key} is no counter"))?,
            };
            let sum = old.wrapping_add(number()?).to_le_bytes().to_vec();
            values.insert(key.to_owned(), sum.clone());
            table.changed.notify_all();
            Ok((OK, sum))
        }
        GET => {
            let wait = Duration::from_millis(u64::try_from(number()?).map_err(|_| malformed())?);
            let (values, _) = table
                .changed
                .wait_timeout_while(values, wait, |values| !values.contains_key(key))
                .unwrap_or_else(PoisonError::into_inner);
            let found = values.get(key).cloned();
            drop(values);
            Ok(found.map_or_else(|| (ABSENT, table.refusals().into_bytes()), |value| (OK, value)))
        }
        _ => Err(malformed()),
    }
}

/// A connection to a store.
pub(super) trait Wire: Read + Write {
    /// Sets how long a read or write may block to what is left until the deadline, or to any time.
    fn limit(&self, deadline: Option<Deadline>) -> io::Result<()>;
}

/// One end of it, which asks.
#[derive(Debug)]
pub(super) struct Client<W> {
    name: String,
    wire: Mutex<W>,
}

impl<W: Wire> Client<W> {
    /// `name` is the store's, for errors.
    pub(super) fn new(name: String, wire: W) -> Client<W> {
        Client { name, wire: Mutex::new(wire) }
    }

    fn ask(&self, op: u8, key: &str, tail: &[u8], deadline: Deadline) -> Result<(u8, Vec<u8>)> {
        let key_len = u8::try_from(key.len())
            .map_err(|_| Error::invalid(format!("a store key has {} bytes; 255 is the limit", key.len())))?;
        let mut request = vec![op, key_len];
        request.extend_from_slice(key.as_bytes());
        request.extend_from_slice(tail);
        let mut wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
        let mut exchange = || {
            wire.limit(Some(deadline))?;
            write_frame(&mut *wire, &request)?;
            read_frame(&mut *wire)
        };
        let mut reply = exchange()
            .map_err(|e| Error::os(format!("asking the job's store {} for '{key}'", self.name), e))?;
        if reply.is_empty() {
            return Err(Error::invalid("the job's store sent an empty reply"));
        }
        let body = reply.split_off(1);
        match reply[0] {
            REFUSED => Err(Error::invalid(format!(
                "the job's store refused {}: {}",
                if op == ENTER { "this rank".to_owned() } else { format!("'{key}'") },
                String::from_utf8_lossy(&body)
            ))),
            status => Ok((status, body)),
        }
    }

    /// Says who this process is: an error if another one has said the same, or the world is another.
    pub(super) fn enter(&self, rank: usize, world: usize, deadline: Deadline) -> Result<()> {
        let mut place = (rank as u32).to_le_bytes().to_vec();
        place.extend_from_slice(&(world as u32).to_le_bytes());
        place.extend_from_slice(&process().map_err(|e| Error::os("reading random numbers", e))?);
        self.ask(ENTER, "", &place, deadline).map(drop)
    }

    pub(super) fn set(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()> {
        self.ask(SET, key, value, deadline).map(drop)
    }

    pub(super) fn get(&self, key: &str, deadline: Deadline) -> Result<Vec<u8>> {
        // The server waits for the key; the socket's own limit is a little later, for a server that is gone.
        let wait = deadline.remaining().as_millis() as u64;
        let slack = Deadline::after(deadline.remaining() + Duration::from_secs(1));
        match self.ask(GET, key, &wait.to_le_bytes(), slack)? {
            (OK, value) => Ok(value),
            (_, refused) => {
                let (within, refused) = (deadline.budget(), String::from_utf8_lossy(&refused));
                let refused = if refused.is_empty() { String::new() } else { format!("; {refused}") };
                Err(Error::invalid(format!(
                    "no rank set '{key}' in the job's store within {within:?}{refused}"
                )))
            }
        }
    }

    pub(super) fn add(&self, key: &str, delta: i64, deadline: Deadline) -> Result<i64> {
        let (_, sum) = self.ask(ADD, key, &delta.to_le_bytes(), deadline)?;
        let sum = sum.try_into().map_err(|_| Error::invalid("the job's store sent a malformed sum"))?;
        Ok(i64::from_le_bytes(sum))
    }
}

/// For fuzzing: whatever a client sends is a request or refused, and costs no more memory than it may.
pub(crate) fn fuzz_requests(bytes: &[u8]) {
    let table = Table::default();
    for request in bytes.chunks(40) {
        // A wait would be for another client.
        if request.first() == Some(&GET) {
            continue;
        }
        let _ = answer(request, &table);
        let _ = enter(request, &table);
    }
    assert!(lock(&table.present).refused.len() <= MAX_REFUSALS);
}
