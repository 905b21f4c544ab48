//! A store in a directory that all hosts of a job share, such as one on NFS: for where no port can be reached.
//!
//! What a crashed run has left behind is never taken for this one: a rank enters with a fresh nonce in a file's name,
//! and believes only the answer to that nonce, which rank 0 gives for as long as it lives.
//!
//! ```text
//! DIR/JOB/leader               the session that rank 0 serves
//! DIR/JOB/hello-R-W-NONCE      rank R of W asks to be let in
//! DIR/JOB/welcome-NONCE        the answer: a session, or why not
//! DIR/JOB/SESSION/rank-R       rank R has entered
//! DIR/JOB/SESSION/v-KEY        a value
//! DIR/JOB/SESSION/n-KEY.N      a counter after N additions
//! ```
//!
//! Whatever appears does so at once, by rename or by link, which are atomic on NFS too. Directories are opened anew
//! before each look, which makes an NFS client ask its server.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tensorwire_core::{Deadline, Error, Result};

use super::Store;
use super::answer::{MAX_REFUSALS, MAX_VALUE};
use crate::local_socket::random_u64;

/// How often rank 0 looks who has come.
const LOOK: Duration = Duration::from_millis(10);
/// The longest pause between two looks for a value.
const PAUSE: Duration = Duration::from_millis(20);
/// How long a rank 0 that finds another one's session waits for that one to show that it lives.
const TAKEOVER: Duration = Duration::from_secs(2);
/// Entries of a directory that are looked at; a job has a few a rank.
const MAX_ENTRIES: usize = 1 << 17;

/// A rank's part in a store that is a directory.
#[derive(Debug)]
pub struct FileStore {
    session: PathBuf,
    next: AtomicU64,
    /// Rank 0 lets the others in.
    door: Option<Door>,
}

impl FileStore {
    /// Meets the other ranks of `job` at `address` (`file:DIR`, or `file:///DIR` as torch writes it). Rank 0 makes what is
    /// needed there, and removes it when its store is dropped. Jobs of different names don't meet.
    ///
    /// # Errors
    /// [`Error::Config`] if the address can't be read; [`Error::Os`] if the directory can't be used, or belongs to
    /// somebody else; [`Error::Rendezvous`] if rank 0 doesn't come by the deadline, was started for another world, or has
    /// this rank already.
    pub fn meet(
        address: &str,
        job: Option<&str>,
        rank: usize,
        world: usize,
        deadline: Deadline,
    ) -> Result<FileStore> {
        let place = address.strip_prefix("file:").unwrap_or(address);
        let place = place.strip_prefix("//").unwrap_or(place);
        if place.is_empty() {
            return Err(Error::Config(format!("the store address '{address}' names no directory: file:DIR")));
        }
        let root = Path::new(place);
        private_dir(root)?;
        let dir = root.join(format!("tensorwire-{}", file_name(job.unwrap_or("job"))));
        private_dir(&dir)?;
        owned(&dir)?;
        let failed = |what: String| Error::Rendezvous { rank, world, what };
        let twice = || failed(format!("another process has come as rank {rank}: was it started twice?"));
        let (session, door) = if rank == 0 {
            let door = Door::open(&dir, world)?.ok_or_else(twice)?;
            (door.session.clone(), Some(door))
        } else {
            let at = dir.display();
            let answer = ask(&dir, rank, world, deadline)?.ok_or_else(|| {
                failed(format!(
                    "rank 0 has not come to {at} within {:?}: is it running, with the same job name?",
                    deadline.budget()
                ))
            })?;
            match answer.strip_prefix('!') {
                Some(why) => return Err(failed(why.to_owned())),
                None => (dir.join(file_name(&answer)), None),
            }
        };
        let store = FileStore { session, next: AtomicU64::new(0), door };
        let entered = store.publish(b"", &store.session.join(format!("rank-{rank}")), false);
        match entered.map_err(|e| store.trouble("entering", e))? {
            true => Ok(store),
            false => Err(twice()),
        }
    }

    /// Puts a file with these bytes at `path`, whole: whether it was done, where one that is there must stay.
    fn publish(&self, bytes: &[u8], path: &Path, replace: bool) -> io::Result<bool> {
        let next = self.next.fetch_add(1, Ordering::Relaxed);
        let temporary = self.session.join(format!("t-{}-{next}-{:016x}", std::process::id(), random_u64()?));
        publish(bytes, &temporary, path, replace)
    }

    /// The state of a counter: how often it was added to, and the sum.
    fn counter(&self, prefix: &str) -> io::Result<(u64, i64)> {
        let versions = names(&self.session)?.into_iter();
        let latest = versions.filter_map(|name| name.strip_prefix(prefix)?.parse::<u64>().ok()).max();
        let Some(version) = latest else { return Ok((0, 0)) };
        let sum = fs::read(self.session.join(format!("{prefix}{version}")))?;
        let sum = sum.try_into().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        Ok((version, i64::from_le_bytes(sum)))
    }

    fn trouble(&self, what: &str, e: io::Error) -> Error {
        let at = self.session.display();
        match e.kind() {
            io::ErrorKind::NotFound => {
                Error::os(format!("{what} in the job's store {at}, which is gone: rank 0 has ended"), e)
            }
            _ => Error::os(format!("{what} in the job's store {at}"), e),
        }
    }
}

impl Store for FileStore {
    fn set(&self, key: &str, value: &[u8], _: Deadline) -> Result<()> {
        check_key(key)?;
        if value.len() > MAX_VALUE {
            return Err(Error::invalid(format!(
                "the job's store refused '{key}': a value of {} bytes is over {MAX_VALUE}",
                value.len()
            )));
        }
        let path = self.session.join(format!("v-{}", file_name(key)));
        self.publish(value, &path, true).map_err(|e| self.trouble("writing", e)).map(drop)
    }

    fn get(&self, key: &str, deadline: Deadline) -> Result<Vec<u8>> {
        check_key(key)?;
        let path = self.session.join(format!("v-{}", file_name(key)));
        let mut pause = Duration::from_millis(1);
        loop {
            fs::read_dir(&self.session).map_err(|e| self.trouble("looking", e))?;
            match fs::read(&path) {
                Ok(value) if value.len() > MAX_VALUE => {
                    return Err(Error::invalid(format!(
                        "'{key}' in the job's store is over {MAX_VALUE} bytes"
                    )));
                }
                Ok(value) => return Ok(value),
                Err(e) if e.kind() == io::ErrorKind::NotFound && !deadline.passed() => {
                    std::thread::sleep(pause.min(deadline.remaining()));
                    pause = (pause * 2).min(PAUSE);
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    let refused: String =
                        self.door.iter().flat_map(Door::refused).map(|who| format!("; {who}")).collect();
                    return Err(Error::invalid(format!(
                        "no rank set '{key}' in the job's store within {:?}{refused}",
                        deadline.budget()
                    )));
                }
                Err(e) => return Err(self.trouble("reading", e)),
            }
        }
    }

    fn add(&self, key: &str, delta: i64, deadline: Deadline) -> Result<i64> {
        check_key(key)?;
        let prefix = format!("n-{}.", file_name(key));
        loop {
            let (version, sum) = self.counter(&prefix).map_err(|e| self.trouble("counting", e))?;
            let sum = sum.wrapping_add(delta);
            let path = self.session.join(format!("{prefix}{}", version + 1));
            // Whoever links the next number first has added.
            if self.publish(&sum.to_le_bytes(), &path, false).map_err(|e| self.trouble("counting", e))? {
                return Ok(sum);
            }
            if deadline.passed() {
                return Err(Error::invalid(format!("'{key}' in the job's store is contended")));
            }
        }
    }
}

/// Rank 0's side: a thread that lets the others in, until it is dropped.
#[derive(Debug)]
struct Door {
    dir: PathBuf,
    session: PathBuf,
    stop: Arc<AtomicBool>,
    refused: Arc<Mutex<Vec<String>>>,
    thread: Option<JoinHandle<()>>,
}

impl Door {
    /// Opens a session; `None` if another rank 0 is alive.
    fn open(dir: &Path, world: usize) -> Result<Option<Door>> {
        let trouble = |e: io::Error| Error::os(format!("serving the job's store in {}", dir.display()), e);
        let name =
            format!("s-{:016x}{:016x}", random_u64().map_err(trouble)?, random_u64().map_err(trouble)?);
        let session = dir.join(&name);
        let leader = dir.join("leader");
        let lead = || publish(name.as_bytes(), &dir.join(format!("t-{name}")), &leader, false);
        if !lead().map_err(trouble)? {
            let asked = ask(dir, 0, world, Deadline::after(TAKEOVER))?;
            if asked.is_some() {
                return Ok(None);
            }
            // A run that crashed has left it.
            match fs::remove_file(&leader) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(trouble(e)),
                _ => {}
            }
            if !lead().map_err(trouble)? {
                return Ok(None);
            }
        }
        clear(dir, Some(&name));
        private_dir(&session)?;
        let (stop, refused) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::default()));
        let work = {
            let (dir, stop, refused) = (dir.to_owned(), stop.clone(), refused.clone());
            move || serve(&dir, &name, world, &stop, &refused)
        };
        let thread =
            std::thread::Builder::new().name("tensorwire-store".into()).spawn(work).map_err(trouble)?;
        Ok(Some(Door { dir: dir.to_owned(), session, stop, refused, thread: Some(thread) }))
    }

    /// Who came and was not let in.
    fn refused(&self) -> Vec<String> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // Release: pairs with the thread's Acquire load. Nothing else is handed over.
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // Where another run has taken over, what is here is that one's.
        let ours = self.session.file_name().is_some_and(|name| leads(&self.dir, &name.to_string_lossy()));
        let _ = fs::remove_dir_all(&self.session);
        if ours {
            clear(&self.dir, None);
            let _ = fs::remove_file(self.dir.join("leader"));
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

/// Whether the session is the one that newcomers are let into.
fn leads(dir: &Path, session: &str) -> bool {
    fs::read(dir.join("leader")).is_ok_and(|name| name == session.as_bytes())
}

/// Removes what earlier sessions have left; all of it where none is to `keep`.
fn clear(dir: &Path, keep: Option<&str>) {
    for name in names(dir).unwrap_or_default() {
        let path = dir.join(&name);
        if name.starts_with("s-") && keep != Some(&name) {
            let _ = fs::remove_dir_all(path);
        } else if name.starts_with("welcome-")
            || name.starts_with("t-")
            || keep.is_none() && name.starts_with("hello-")
        {
            let _ = fs::remove_file(path);
        }
    }
}

/// Answers those who ask, until told to stop or superseded.
fn serve(dir: &Path, session: &str, world: usize, stop: &AtomicBool, refused: &Mutex<Vec<String>>) {
    while !stop.load(Ordering::Acquire) {
        std::thread::sleep(LOOK);
        let Ok(names) = names(dir) else { continue };
        let mut hellos =
            names.iter().filter_map(|name| Some((name, name.strip_prefix("hello-")?))).peekable();
        if hellos.peek().is_none() || !leads(dir, session) {
            continue;
        }
        for (name, hello) in hellos {
            let mut parts = hello.splitn(3, '-');
            let mut number = || parts.next().and_then(|n| n.parse::<usize>().ok());
            let (rank, theirs) = (number(), number());
            let (Some(rank), Some(theirs), Some(nonce)) = (rank, theirs, parts.next()) else { continue };
            let answer = if theirs != world {
                format!("!rank {rank} was started for a world of {theirs}, rank 0 for {world}")
            } else if rank >= world {
                format!("!rank {rank} is outside the world of {world}")
            } else {
                session.to_owned()
            };
            if let Some(why) = answer.strip_prefix('!') {
                let mut refused = refused.lock().unwrap_or_else(PoisonError::into_inner);
                if refused.len() < MAX_REFUSALS && !refused.iter().any(|known| known == why) {
                    refused.push(why.to_owned());
                }
            }
            let welcome = dir.join(format!("welcome-{}", file_name(nonce)));
            let temporary = dir.join(format!("t-{}", file_name(nonce)));
            if publish(answer.as_bytes(), &temporary, &welcome, true).is_ok() {
                let _ = fs::remove_file(dir.join(name));
            }
        }
    }
}

/// Asks rank 0 to be let in: its answer, or `None` if none comes.
fn ask(dir: &Path, rank: usize, world: usize, deadline: Deadline) -> Result<Option<String>> {
    let trouble = |e: io::Error| Error::os(format!("entering the job's store in {}", dir.display()), e);
    let nonce = format!("{:016x}{:016x}", random_u64().map_err(trouble)?, random_u64().map_err(trouble)?);
    let hello = dir.join(format!("hello-{rank}-{world}-{nonce}"));
    let welcome = dir.join(format!("welcome-{nonce}"));
    fs::write(&hello, b"").map_err(trouble)?;
    let mut pause = Duration::from_millis(1);
    let answer = loop {
        // Rank 0 of an earlier run may be removing the directory.
        let _ = fs::read_dir(dir).or_else(|_| {
            make_dir(dir).and_then(|()| fs::write(&hello, b"")).and_then(|()| fs::read_dir(dir))
        });
        match fs::read(&welcome) {
            Ok(answer) => break Some(String::from_utf8_lossy(&answer).into_owned()),
            Err(_) if !deadline.passed() => {
                std::thread::sleep(pause.min(deadline.remaining()));
                pause = (pause * 2).min(PAUSE);
            }
            Err(_) => break None,
        }
    };
    let _ = fs::remove_file(&hello);
    let _ = fs::remove_file(&welcome);
    Ok(answer)
}

/// Puts a file with these bytes at `path`, whole: whether it was done, where one that is there must stay.
fn publish(bytes: &[u8], temporary: &Path, path: &Path, replace: bool) -> io::Result<bool> {
    fs::write(temporary, bytes)?;
    if replace {
        return fs::rename(temporary, path).map(|()| true);
    }
    let linked = match fs::hard_link(temporary, path) {
        Ok(()) => Ok(true),
        // A reply may be lost on the way from the server: the number of names tells what it did.
        Err(e) => match fs::metadata(temporary) {
            Ok(about) if about.nlink() == 2 => Ok(true),
            _ if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            _ => Err(e),
        },
    };
    let _ = fs::remove_file(temporary);
    linked
}

fn names(dir: &Path) -> io::Result<Vec<String>> {
    let entries = fs::read_dir(dir)?.take(MAX_ENTRIES).flatten();
    Ok(entries.filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

fn make_dir(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        done => done,
    }
}

fn private_dir(dir: &Path) -> Result<()> {
    make_dir(dir)
        .map_err(|e| Error::os(format!("making the directory {} for the job's store", dir.display()), e))
}

/// Refuses a directory into which others could put what this job believes.
fn owned(dir: &Path) -> Result<()> {
    let about = fs::symlink_metadata(dir)
        .map_err(|e| Error::os(format!("looking at the job's store {}", dir.display()), e))?;
    let ours = rustix::process::geteuid().as_raw();
    if !about.is_dir() || about.uid() != ours || about.mode() & 0o022 != 0 {
        return Err(Error::Config(format!(
            "the job's store {} can be written by others than user {ours}: name another directory, or remove it",
            dir.display()
        )));
    }
    Ok(())
}

fn check_key(key: &str) -> Result<()> {
    match key.len() {
        0..=255 => Ok(()),
        n => Err(Error::invalid(format!("a store key has {n} bytes; 255 is the limit"))),
    }
}

/// A text as a file's name: distinct texts have distinct names, which hold no separator and aren't too long.
fn file_name(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if text.len() <= 100 && text.chars().all(plain) {
        return text.to_owned();
    }
    let digest =
        |seed: u64| text.bytes().fold(seed, |d, b| (d ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3));
    let readable: String = text.chars().filter(|c| plain(*c)).take(60).collect();
    format!("{readable}~{:016x}{:016x}", digest(0xcbf2_9ce4_8422_2325), digest(0x9e37_79b9_7f4a_7c15))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(10))
    }

    fn moment() -> Deadline {
        Deadline::after(Duration::from_millis(300))
    }

    fn place() -> (tempfile::TempDir, String) {
        let dir = tempfile::tempdir().unwrap();
        let address = format!("file://{}", dir.path().join("meet").display());
        (dir, address)
    }

    #[test]
    fn ranks_share_values_and_counters_and_leave_nothing_behind() {
        let (dir, address) = place();
        let meet = |rank| FileStore::meet(&address, Some("a job/1"), rank, 2, soon()).unwrap();
        let (zero, one) = std::thread::scope(|s| {
            let other = s.spawn(|| meet(1));
            (meet(0), other.join().unwrap())
        });
        std::thread::scope(|s| {
            let waiting = s.spawn(|| one.get("tcp/1/head", soon()).unwrap());
            zero.set("tcp/1/head", b"value", soon()).unwrap();
            assert_eq!(waiting.join().unwrap(), b"value");
        });
        assert!(one.get("absent", moment()).unwrap_err().to_string().contains("no rank set 'absent'"));
        assert!(one.set("long", &vec![0; MAX_VALUE + 1], soon()).is_err());
        // A hundred additions from each side at once, none of them lost.
        let adds =
            |store: &FileStore| (0..100).map(|_| store.add("n", 1, soon()).unwrap()).collect::<Vec<_>>();
        let mut sums = std::thread::scope(|s| {
            let there = s.spawn(|| adds(&zero));
            [adds(&one), there.join().unwrap()].concat()
        });
        sums.sort_unstable();
        assert!(sums.into_iter().eq(1..=200));
        drop(zero);
        let error = one.get("x", soon()).unwrap_err().to_string();
        assert!(error.contains("rank 0 has ended"), "{error}");
        assert_eq!(names(&dir.path().join("meet")).unwrap(), [""; 0], "all is cleaned up");
    }

    #[test]
    fn what_a_crashed_run_left_is_not_believed() {
        let (_dir, address) = place();
        let mut crashed = FileStore::meet(&address, None, 0, 2, soon()).unwrap();
        crashed.set("k", b"old", soon()).unwrap();
        // It ends without cleaning up: its thread stops answering, its files stay.
        let door = crashed.door.as_mut().unwrap();
        door.stop.store(true, Ordering::Release);
        door.thread.take().unwrap().join().unwrap();
        let late = FileStore::meet(&address, None, 1, 2, moment()).unwrap_err().to_string();
        assert!(late.contains("rank 0 has not come"), "{late}");
        std::thread::scope(|s| {
            let other = s.spawn(|| FileStore::meet(&address, None, 1, 2, soon()).unwrap());
            let zero = FileStore::meet(&address, None, 0, 2, soon()).unwrap();
            let one = other.join().unwrap();
            assert!(one.get("k", moment()).is_err(), "the old value is seen");
            zero.set("k", b"new", soon()).unwrap();
            assert_eq!(one.get("k", soon()).unwrap(), b"new");
            // The one that was taken for dead doesn't remove what is the new one's.
            drop(crashed);
            assert_eq!(one.get("k", soon()).unwrap(), b"new");
        });
    }

    #[test]
    fn who_does_not_belong_is_told_why() {
        let (dir, address) = place();
        let meet = |job, rank, world| FileStore::meet(&address, Some(job), rank, world, soon());
        let _zero = meet("a", 0, 2).unwrap();
        let _one = meet("a", 1, 2).unwrap();
        for (rank, world, says) in [
            (1, 2, "another process has come as rank 1"),
            (0, 2, "another process has come as rank 0"),
            (1, 3, "rank 1 was started for a world of 3, rank 0 for 2"),
            (5, 2, "outside the world of 2"),
        ] {
            let error = meet("a", rank, world).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        let other = FileStore::meet(&address, Some("b"), 1, 2, moment()).unwrap_err().to_string();
        assert!(other.contains("rank 0 has not come"), "another job's rank 0 answers: {other}");
        assert!(FileStore::meet("file:", None, 0, 1, moment()).is_err());
        let file = dir.path().join("a-file");
        fs::write(&file, b"").unwrap();
        assert!(FileStore::meet(&format!("file:{}", file.display()), None, 0, 1, moment()).is_err());
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let (dir, address) = place();
        let open = dir.path().join("meet").join("tensorwire-a");
        fs::create_dir_all(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        let error = FileStore::meet(&address, Some("a"), 0, 1, moment()).unwrap_err().to_string();
        assert!(error.contains("can be written by others"), "{error}");
    }

    #[test]
    fn odd_entries_do_not_disturb_thedoor() {
        let (dir, address) = place();
        let zero = FileStore::meet(&address, Some("a"), 0, 2, soon()).unwrap();
        let at = dir.path().join("meet").join("tensorwire-a");
        for name in
            ["hello-", "hello-x-2-n", "hello-1-2-", "hello-1-99999999999999999999-n", "hello-1-2-..", "x"]
        {
            fs::write(at.join(name), b"junk").unwrap();
        }
        let _one = FileStore::meet(&address, Some("a"), 1, 2, soon()).unwrap();
        drop(zero);
    }
}
