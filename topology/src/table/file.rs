//! The table's file.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tensorwire_core::{Link, Tuning};

use super::{Absent, MOST, MOST_NETWORKS, MOST_PROFILES, Measured, Network, Profile, SCHEMA, Table};
use crate::discover::Fingerprint;
use crate::{Error, Result};

/// Far above what a table of the most worlds takes.
const MOST_BYTES: u64 = 4 << 20;

const AGAIN: &str = "tensorwire topo --probe makes a new one";

/// What every version's file says.
#[derive(Deserialize)]
struct Head {
    schema: String,
    version: String,
}

#[derive(Serialize, Deserialize)]
struct File {
    schema: String,
    version: String,
    machine: Fingerprint,
    measured_at: u64,
    worlds: Vec<World>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    networks: Vec<Transport>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    profiles: Vec<Profile>,
}

#[derive(Serialize, Deserialize)]
struct Transport {
    transport: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    intra: Option<Figures>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    inter: Option<Figures>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct Figures {
    alpha_us: f64,
    gbps: f64,
    overhead_us: f64,
    measured_at: u64,
}

impl From<Measured> for Figures {
    fn from(measured: Measured) -> Figures {
        let Measured { link: Link { alpha_us, gbps, overhead_us }, measured_at } = measured;
        Figures { alpha_us, gbps, overhead_us, measured_at }
    }
}

impl From<Figures> for Measured {
    fn from(figures: Figures) -> Measured {
        let Figures { alpha_us, gbps, overhead_us, measured_at } = figures;
        Measured { link: Link { alpha_us, gbps, overhead_us }, measured_at }
    }
}

#[derive(Serialize, Deserialize)]
struct World {
    ranks: usize,
    one_shot: usize,
    symmetric_one_shot: usize,
    chunk: usize,
    single_copy_above: usize,
}

/// The name of a machine's file.
pub(super) fn name(machine: &Fingerprint) -> String {
    let Fingerprint { processor, processors, caches } = machine;
    // FNV-1a, 64 bits: no more is needed to tell machines apart whose fingerprint is compared anyway.
    let text = format!("{processor}|{processors}|{}", caches.join("|"));
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    format!("shm-{hash:016x}.json")
}

impl Table {
    /// Reads a table for `machine`.
    ///
    /// # Errors
    /// [`Absent::Missing`] if there is no such file, [`Absent::Refused`] if it can't be used.
    pub fn load(path: &Path, machine: &Fingerprint) -> Result<Table, Absent> {
        let refused = |why: String| Absent::Refused { path: path.to_owned(), why };
        let text = match read(path) {
            Ok(text) => text,
            Err(e) if e.kind() == ErrorKind::NotFound => return Err(Absent::Missing),
            Err(e) => return Err(refused(e.to_string())),
        };
        Table::parse(&text, machine).map_err(refused)
    }

    /// Writes the table, whole or not at all: whoever reads at the same time finds the one before or this one.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = self.to_json();
        with_temporary(path, |temporary, file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(temporary, path)
        })
    }

    /// Makes sure, before anything is measured, that a table can be saved there.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn check_place(path: &Path) -> Result<()> {
        with_temporary(path, |_, _| Ok(()))
    }

    fn to_json(&self) -> String {
        let world = |t: &Tuning| World {
            ranks: t.world,
            one_shot: t.one_shot,
            symmetric_one_shot: t.symmetric_one_shot,
            chunk: t.chunk,
            single_copy_above: t.single_copy_above,
        };
        let network = |n: &Network| Transport {
            transport: n.transport.clone(),
            intra: n.intra.map(Figures::from),
            inter: n.inter.map(Figures::from),
        };
        let file = File {
            schema: SCHEMA.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            machine: self.machine.clone(),
            measured_at: self.measured_at,
            worlds: self.tunings.iter().map(world).collect(),
            networks: self.networks.iter().map(network).collect(),
            profiles: self.profiles.clone(),
        };
        // Numbers and strings: nothing that JSON can't hold.
        let json = serde_json::to_string_pretty(&file);
        debug_assert!(json.is_ok());
        json.unwrap_or_default() + "\n"
    }

    /// Reads a table's text, or says why it can't be used on `machine`.
    fn parse(text: &str, machine: &Fingerprint) -> Result<Table, String> {
        let damaged = |e: serde_json::Error| format!("it is no table ({e}): {AGAIN}");
        let head: Head = serde_json::from_str(text).map_err(damaged)?;
        if head.schema != SCHEMA {
            return Err(format!("its schema is {:?}, not {SCHEMA}: {AGAIN}", head.schema));
        }
        let version = env!("CARGO_PKG_VERSION");
        if head.version != version {
            return Err(format!("version {:?} measured it, this is {version}: {AGAIN}", head.version));
        }
        let file: File = serde_json::from_str(text).map_err(damaged)?;
        if file.machine != *machine {
            let of = |m: &Fingerprint| {
                format!("{}, {} processors, {}", m.processor, m.processors, m.caches.join(", "))
            };
            return Err(format!(
                "it is another machine's ({}; this is {}): {AGAIN}",
                of(&file.machine),
                of(machine)
            ));
        }
        let tuning = |w: &World| Tuning {
            world: w.ranks,
            one_shot: w.one_shot,
            symmetric_one_shot: w.symmetric_one_shot,
            chunk: w.chunk,
            single_copy_above: w.single_copy_above,
        };
        let tunings: Vec<Tuning> = file.worlds.iter().map(tuning).collect();
        let measured = |figures: Option<Figures>| figures.map(Measured::from);
        let network = |n: Transport| Network {
            transport: n.transport,
            intra: measured(n.intra),
            inter: measured(n.inter),
        };
        let networks: Vec<Network> = file.networks.into_iter().map(network).collect();
        let profiles = file.profiles;
        let least = usize::from(networks.is_empty() && profiles.is_empty());
        if tunings.len() < least || tunings.len() > MOST {
            return Err(format!("it has {} worlds, not {least} to {MOST}: {AGAIN}", tunings.len()));
        }
        if networks.len() > MOST_NETWORKS {
            return Err(format!("it has {} networks, at most {MOST_NETWORKS}: {AGAIN}", networks.len()));
        }
        if profiles.len() > MOST_PROFILES {
            return Err(format!("it has {} profiles, at most {MOST_PROFILES}: {AGAIN}", profiles.len()));
        }
        if let Some(why) = profiles.iter().find_map(Profile::unsound) {
            return Err(format!("{why}: {AGAIN}"));
        }
        let sound = |n: &Network| [n.intra, n.inter].iter().flatten().all(|m| m.link.is_sound());
        if let Some(n) = networks.iter().find(|n| !sound(n)) {
            return Err(format!("its numbers for {:?} make no sense: {AGAIN}", n.transport));
        }
        if let Some(t) = tunings.iter().find(|t| !t.is_sound()) {
            return Err(format!("its numbers for {} ranks make no sense: {AGAIN}", t.world));
        }
        if !tunings.is_sorted_by(|a, b| a.world < b.world) {
            return Err(format!("its worlds aren't in ascending order: {AGAIN}"));
        }
        Ok(Table { machine: file.machine, measured_at: file.measured_at, tunings, networks, profiles })
    }
}

/// The text of an ordinary file of a sensible size.
fn read(path: &Path) -> io::Result<String> {
    let invalid = |what: &str| io::Error::new(ErrorKind::InvalidData, what.to_owned());
    // Before it is opened: a pipe would wait for somebody to write.
    if !fs::metadata(path)?.is_file() {
        return Err(invalid("it is no ordinary file"));
    }
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MOST_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(invalid("it is too large for a table"));
    }
    String::from_utf8(bytes).map_err(|_| invalid("it is no text"))
}

/// Makes a file beside `path`, which `write` fills and may rename; removes it if it is still there.
fn with_temporary(path: &Path, write: impl FnOnce(&Path, &mut fs::File) -> io::Result<()>) -> Result<()> {
    let failed = |source| Error::Write { path: path.to_owned(), source };
    // A rename would take the place of a device.
    match fs::metadata(path) {
        Ok(there) if !there.is_file() => {
            return Err(failed(io::Error::new(ErrorKind::InvalidInput, "it is no ordinary file")));
        }
        Ok(_) => {}
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(failed(e)),
    }
    if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let mut file = OpenOptions::new().write(true).create_new(true).open(&temporary).map_err(failed)?;
    let written = write(&temporary, &mut file).map_err(failed);
    // It has another name, or was for nothing.
    let _ = fs::remove_file(&temporary);
    written
}

#[cfg(test)]
mod tests {
    use super::super::profile::tests::profile;
    use super::*;
    use proptest::prelude::*;

    fn machine() -> Fingerprint {
        Fingerprint { processor: "Some CPU".into(), processors: 2, caches: vec!["L1 Data 32K for 1".into()] }
    }

    fn network(transport: &str, intra: Option<f64>, inter: Option<f64>) -> Network {
        let measured = |alpha_us: f64| Measured {
            link: Link { alpha_us, gbps: 1.25, overhead_us: 2.0 },
            measured_at: 1_795_000_000,
        };
        Network { transport: transport.into(), intra: intra.map(measured), inter: inter.map(measured) }
    }

    fn table() -> Table {
        Table {
            machine: machine(),
            measured_at: 1_795_000_000,
            tunings: vec![Tuning::built_in(2), Tuning::built_in(4)],
            networks: vec![network("tcp", Some(9.5), None), network("tls", Some(12.0), Some(50.25))],
            profiles: vec![profile(Some(50), 0.25, 1_795_000_000), profile(Some(480), 1.25, 1_795_000_001)],
        }
    }

    #[test]
    fn a_table_survives_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("made").join("a.json");
        assert_eq!(Table::load(&path, &machine()), Err(Absent::Missing));
        Table::check_place(&path).unwrap();
        assert_eq!(Table::load(&path, &machine()), Err(Absent::Missing));
        table().save(&path).unwrap();
        let later = Table { measured_at: 1_795_000_001, ..table() };
        later.save(&path).unwrap();
        assert_eq!(Table::load(&path, &machine()).unwrap(), later);
        let names: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().collect();
        assert_eq!(names.len(), 1, "nothing else is left: {names:?}");
    }

    #[test]
    fn other_machines_have_other_files_and_refuse_this_one() {
        let other = [
            Fingerprint { processors: 3, ..machine() },
            Fingerprint { processor: "Other CPU".into(), ..machine() },
            Fingerprint { caches: vec![], ..machine() },
        ];
        for other in other {
            assert_ne!(name(&other), name(&machine()));
            let why = Table::parse(&table().to_json(), &other).unwrap_err();
            assert!(why.contains("another machine's (Some CPU, 2 processors"), "{why}");
        }
        assert_eq!(name(&machine()), name(&machine()));
    }

    #[test]
    fn what_can_not_be_used_is_refused_and_says_why() {
        let json = table().to_json();
        for (from, to, why) in [
            ("table/v1", "table/v9", "schema"),
            (env!("CARGO_PKG_VERSION"), "99.0.0", "version \"99.0.0\" measured it"),
            ("\"chunk\": 262144", "\"chunk\": 0", "make no sense"),
            ("\"chunk\": 262144", "\"chunk\": -1", "no table"),
            ("\"chunk\": 262144", "\"chunk\": 1e300", "no table"),
            ("\"ranks\": 2", "\"ranks\": 1", "make no sense"),
            ("\"ranks\": 2", "\"ranks\": 4", "ascending"),
            ("\"one_shot\": 4194304,", "", "no table"),
            ("\"gbps\": 1.25", "\"gbps\": 0.0", "make no sense"),
            ("\"alpha_us\": 9.5", "\"alpha_us\": -9.5", "make no sense"),
            ("\"alpha_us\": 9.5", "\"alpha_us\": null", "no table"),
            ("\"collective\": \"all_reduce\"", "\"collective\": 7", "no table"),
            ("\"layer_us\": 30.0", "\"layer_us\": -30.0", "step of 2 ranks makes no sense"),
            ("\"band\": 1.1,", "\"band\": 0.1,", "makes no sense"),
            ("\"knots\": [", "\"knots\": [[9, 9.0], ", "all_reduce over 2 ranks make no sense"),
            ("}\n", "", "no table"),
        ] {
            let bad = json.replacen(from, to, 1);
            assert_ne!(bad, json);
            let message = Table::parse(&bad, &machine()).unwrap_err();
            assert!(message.contains(why) && message.contains("--probe"), "{message}");
        }
        for bad in ["", "[]", "null", "{}", "\u{0}"] {
            assert!(Table::parse(bad, &machine()).is_err(), "{bad}");
        }
        assert!(
            Table::parse(&Table::empty(machine()).to_json(), &machine()).unwrap_err().contains("0 worlds")
        );
        let many = Table { networks: vec![network("tcp", None, None); 17], ..table() };
        assert!(Table::parse(&many.to_json(), &machine()).unwrap_err().contains("17 networks"));
        let many = Table { profiles: vec![Profile::default(); 5], ..table() };
        assert!(Table::parse(&many.to_json(), &machine()).unwrap_err().contains("5 profiles"));
    }

    #[test]
    fn a_file_of_before_there_were_profiles_is_read() {
        let before = Table { profiles: vec![], ..table() };
        assert!(!before.to_json().contains("profiles"));
        assert_eq!(Table::parse(&before.to_json(), &machine()), Ok(before));
    }

    #[test]
    fn a_file_that_was_cut_short_is_refused_wherever() {
        let json = table().to_json();
        // The last is the newline.
        for end in 0..json.len() - 1 {
            assert!(Table::parse(&json[..end], &machine()).is_err(), "{end}");
        }
    }

    #[test]
    fn each_measurement_leaves_the_others_as_they_are() {
        let mut table = Table { tunings: vec![], ..table() };
        table.set_network(network("tcp", None, Some(33.0)));
        table.set_network(network("tls", Some(1.0), None));
        table.set_network(network("other", None, None));
        assert_eq!(table.network("tcp"), Some(&network("tcp", Some(9.5), Some(33.0))));
        assert_eq!(table.network("tls"), Some(&network("tls", Some(1.0), Some(50.25))));
        assert_eq!(table.networks.len(), 3);
        assert_eq!(Table::parse(&table.to_json(), &machine()), Ok(table), "links alone are a table too");
    }

    #[test]
    fn what_is_no_ordinary_file_is_left_alone() {
        for path in ["/dev/zero", "/dev/null", "/proc"] {
            let path = Path::new(path);
            let refused = Table::load(path, &machine()).unwrap_err().to_string();
            assert!(refused.contains("is ignored: it is no ordinary file"), "{refused}");
            let error = table().save(path).unwrap_err().to_string();
            assert!(error.contains("can't write") && error.contains("no ordinary file"), "{error}");
        }
        let folder = tempfile::tempdir().unwrap();
        let large = folder.path().join("large");
        fs::write(&large, vec![b' '; MOST_BYTES as usize + 1]).unwrap();
        assert!(Table::load(&large, &machine()).unwrap_err().to_string().contains("too large"));
        let below = large.join("a.json");
        assert!(matches!(Table::check_place(&below), Err(Error::Write { .. })));
        assert!(matches!(Table::load(&below, &machine()), Err(Absent::Refused { .. })));
    }

    proptest! {
        #[test]
        fn a_table_is_read_as_it_was_written(
            worlds in proptest::collection::btree_set(2usize..2000, 1..20),
            one_shot in any::<u32>(),
            pages in 1usize..1000,
        ) {
            let tuning = |world| Tuning {
                world, one_shot: one_shot as usize, symmetric_one_shot: one_shot as usize / 2, chunk: pages * 4096, single_copy_above: one_shot as usize / 3,
            };
            let table = Table { tunings: worlds.into_iter().map(tuning).collect(), ..table() };
            prop_assert_eq!(Table::parse(&table.to_json(), &machine()), Ok(table));
        }

        /// Damage anywhere: a table that can be used, or a reason.
        #[test]
        fn damage_is_no_panic(at in 0usize..5000, bytes in proptest::collection::vec(any::<u8>(), 1..8)) {
            let mut text = table().to_json().into_bytes();
            let at = at % text.len();
            let end = (at + bytes.len()).min(text.len());
            text.splice(at..end, bytes);
            if let Ok(table) = Table::parse(&String::from_utf8_lossy(&text), &machine()) {
                prop_assert!(table.tunings.iter().all(Tuning::is_sound));
                prop_assert!(table.profiles.iter().all(|p| p.unsound().is_none()));
            }
        }
    }
}
