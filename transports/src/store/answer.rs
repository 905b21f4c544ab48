//! What a store answers, and how it is asked, over a connection of any kind.
//!
//! One frame a request, one a reply. Request: operation byte, key length byte, key, then the value (set) or
//! the delta (add, 8 bytes) or the milliseconds to wait (get, 8 bytes), little-endian. Reply: status byte,
//! then the value, the sum, or what was wrong.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use tensorwire_core::{Deadline, Error, Result};

use crate::local_socket::{read_frame, write_frame};

const SET: u8 = 1;
const GET: u8 = 2;
const ADD: u8 = 3;

const OK: u8 = 0;
const ABSENT: u8 = 1;
const REFUSED: u8 = 2;

pub(super) const MAX_VALUE: usize = 64 << 10;
/// Values that one store holds at most; a job needs a few a rank.
const MAX_KEYS: usize = 1 << 16;

#[derive(Default)]
pub(super) struct Table {
    pub(super) values: Mutex<HashMap<String, Vec<u8>>>,
    changed: Condvar,
}

/// Answers one client until it leaves or says something that isn't a request.
pub(super) fn serve(mut stream: impl Read + Write, table: &Table) {
    while let Ok(request) = read_frame(&mut stream) {
        let (status, body) = match answer(&request, table) {
            Ok(reply) => reply,
            Err(why) => (REFUSED, why.into_bytes()),
        };
        let mut reply = vec![status];
        reply.extend_from_slice(&body);
        if write_frame(&mut stream, &reply).is_err() {
            return;
        }
    }
}

pub(super) fn answer(request: &[u8], table: &Table) -> Result<(u8, Vec<u8>), String> {
    let malformed = || "malformed request".to_owned();
    let (&[op, key_len], rest) = request.split_first_chunk::<2>().ok_or_else(malformed)?;
    let (key, rest) = rest.split_at_checked(key_len as usize).ok_or_else(malformed)?;
    let key = std::str::from_utf8(key).map_err(|_| malformed())?;
    let number = || rest.try_into().map(i64::from_le_bytes).map_err(|_| malformed());
    let mut values = table.values.lock().unwrap_or_else(PoisonError::into_inner);
    match op {
        SET | ADD if !values.contains_key(key) && values.len() >= MAX_KEYS => {
            Err(format!("over {MAX_KEYS} keys"))
        }
        SET if rest.len() > MAX_VALUE => Err(format!("a value of {} bytes is over {MAX_VALUE}", rest.len())),
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
            Ok(values.get(key).map_or((ABSENT, Vec::new()), |v| (OK, v.clone())))
        }
        _ => Err(malformed()),
    }
}

/// A connection to a store.
pub(super) trait Wire: Read + Write {
    /// Sets how long a read or write may block to what is left until the deadline.
    fn limit(&self, deadline: Deadline) -> io::Result<()>;
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
            wire.limit(deadline)?;
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
                "the job's store refused '{key}': {}",
                String::from_utf8_lossy(&body)
            ))),
            status => Ok((status, body)),
        }
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
            _ => Err(Error::invalid(format!(
                "no rank set '{key}' in the job's store within {:?}",
                deadline.budget()
            ))),
        }
    }

    pub(super) fn add(&self, key: &str, delta: i64, deadline: Deadline) -> Result<i64> {
        let (_, sum) = self.ask(ADD, key, &delta.to_le_bytes(), deadline)?;
        let sum = sum.try_into().map_err(|_| Error::invalid("the job's store sent a malformed sum"))?;
        Ok(i64::from_le_bytes(sum))
    }
}
