//! The secret of a job, and proofs of knowing it.

use std::fmt;
use std::io::Read;
use std::os::unix::fs::MetadataExt;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use tensorwire_core::{Error, Result};

use super::stream::Identity;
use super::tls::Tls;
use crate::launch::Transport;

/// Bytes of a proof.
pub(crate) const PROOF: usize = 32;

/// The variable that holds a job's secret, as 64 hexadecimal digits.
pub const SECRET_VAR: &str = "TENSORWIRE_SECRET";
/// The variable that names a file which holds it.
pub const SECRET_FILE_VAR: &str = "TENSORWIRE_SECRET_FILE";

/// 32 random bytes that the ranks of a job share, and nobody else. It is never sent, printed or logged: each side
/// proves that it knows it. Connections of ranks that also have certificates are over TLS, or QUIC.
#[derive(Clone)]
pub struct Secret {
    bytes: [u8; 32],
    tls: Option<Tls>,
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    fn new(bytes: [u8; 32]) -> Secret {
        Secret { bytes, tls: None }
    }

    /// The same, for connections over TLS with these certificates.
    #[cfg(feature = "tls")]
    pub fn with_tls(self, tls: Tls) -> Secret {
        Secret { tls: Some(tls), ..self }
    }

    pub(super) fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    /// Fails where peers would refuse this process's certificate, for it isn't `who`'s.
    pub(crate) fn check(&self, who: Identity) -> Result<()> {
        self.tls.as_ref().map_or(Ok(()), |tls| tls.check(who))
    }

    /// A fresh one.
    ///
    /// # Errors
    /// [`Error::Os`] if the system has no random numbers.
    pub fn generate() -> Result<Secret> {
        Ok(Secret::new(random()?))
    }

    /// What the environment gives a rank over this transport: as [`from_env`](Secret::from_env), and for TLS and QUIC
    /// the certificates as well.
    ///
    /// # Errors
    /// [`Error::Config`] if anything of it is missing or makes no sense, or this program was built without the feature
    /// that it needs.
    pub fn for_transport(transport: Transport) -> Result<Secret> {
        let secret = Secret::from_env()?;
        match transport {
            #[cfg(feature = "tls")]
            Transport::Tls => Ok(secret.with_tls(Tls::from_env()?)),
            #[cfg(feature = "quic")]
            Transport::Quic => Ok(secret.with_tls(Tls::from_env()?)),
            #[allow(unreachable_patterns, reason = "where neither feature is missing")]
            Transport::Tls | Transport::Quic => Err(Error::Config(format!(
                "TENSORWIRE_TRANSPORT is '{transport}', but this program was built without the feature {transport}"
            ))),
            Transport::Tcp | Transport::Shm | Transport::Mpi | Transport::Auto => Ok(secret),
        }
    }

    /// The secret that `TENSORWIRE_SECRET` holds, or the file that `TENSORWIRE_SECRET_FILE` names.
    ///
    /// # Errors
    /// [`Error::Config`] if neither is set, what is there isn't 64 hexadecimal digits, or others can read the file.
    pub fn from_env() -> Result<Secret> {
        Secret::from_lookup(|name| std::env::var(name).ok().filter(|v| !v.is_empty()))
    }

    /// Whether the environment gives one.
    pub fn is_given() -> bool {
        let given = |name| std::env::var_os(name).is_some_and(|v| !v.is_empty());
        given(SECRET_VAR) || given(SECRET_FILE_VAR)
    }

    fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Secret> {
        if let Some(text) = lookup(SECRET_VAR) {
            return Secret::parse(&text).ok_or_else(|| not_a_secret(SECRET_VAR));
        }
        let Some(path) = lookup(SECRET_FILE_VAR) else {
            return Err(Error::Config(format!(
                "ranks over TCP share a secret, and none is given: `tensorwire launch` makes one; by hand, give all \
                 ranks the same 64 hexadecimal digits (`openssl rand -hex 32`) in {SECRET_VAR}, or in a file that \
                 {SECRET_FILE_VAR} names"
            )));
        };
        // More than this is no secret.
        let text = read_private("the secret's file", &path, 4096)?;
        Secret::parse(&text)
            .ok_or_else(|| not_a_secret(&format!("the file {path}, which {SECRET_FILE_VAR} names,")))
    }

    /// The secret that 64 hexadecimal digits are.
    pub(crate) fn parse(text: &str) -> Option<Secret> {
        let text = text.trim().as_bytes();
        let mut bytes = [0; 32];
        if text.len() != 64 {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(text.chunks(2)) {
            let digit = |c: u8| char::from(c).to_digit(16);
            *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
        }
        Some(Secret::new(bytes))
    }

    /// As the variable and the file hold it. For the environment of ranks alone: never for an argument, which
    /// everybody on the host can read, or a log.
    pub fn to_hex(&self) -> String {
        self.bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    fn mac(&self, purpose: &str, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.bytes).expect("a key of any length will do");
        // Lengths first, so that no two lists of parts are one text.
        mac.update(&(purpose.len() as u64).to_le_bytes());
        mac.update(purpose.as_bytes());
        for part in parts {
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part);
        }
        mac
    }

    /// What only those who know the secret can say of `parts`; `purpose` keeps the proof of one side from serving
    /// the other.
    pub(crate) fn prove(&self, purpose: &str, parts: &[&[u8]]) -> [u8; PROOF] {
        self.mac(purpose, parts).finalize().into_bytes().into()
    }

    /// Whether `proof` is what [`prove`](Secret::prove) says, compared in constant time.
    pub(crate) fn verify(&self, purpose: &str, parts: &[&[u8]], proof: &[u8]) -> bool {
        self.mac(purpose, parts).verify_slice(proof).is_ok()
    }
}

/// The first `most` bytes of the text of a file that only its owner, this user or root, can read; `what` it is, for a
/// person.
pub(super) fn read_private(what: &str, path: &str, most: u64) -> Result<String> {
    let unread = |e| Error::os(format!("reading {what} {path}"), e);
    let mut file = std::fs::File::open(path).map_err(unread)?;
    let about = file.metadata().map_err(unread)?;
    let (mode, owner, ours) = (about.mode() & 0o777, about.uid(), rustix::process::geteuid().as_raw());
    if about.is_file() && (mode & 0o077 != 0 || owner != ours && owner != 0) {
        return Err(Error::Config(format!(
            "{what} {path} has mode {mode:04o} and belongs to user {owner}: others may know what it holds; \
             `chmod 600 {path}`, as its owner"
        )));
    }
    let mut text = String::new();
    (&mut file).take(most).read_to_string(&mut text).map_err(unread)?;
    Ok(text)
}

fn not_a_secret(place: &str) -> Error {
    // What was there stays unsaid: it may be a secret with a slip.
    Error::Config(format!(
        "{place} does not hold a secret: 64 hexadecimal digits, as `openssl rand -hex 32` prints"
    ))
}

#[cfg(test)]
impl Secret {
    /// The same each time, for tests that need many.
    pub(crate) fn fixed() -> Secret {
        Secret::new([7; 32])
    }
}

/// Random bytes from the kernel.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut bytes))
        .map_err(|e| Error::os("reading random numbers from /dev/urandom", e))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_holds_it_or_the_error_says_how() {
        let secret = Secret::generate().unwrap();
        let hex = secret.to_hex();
        let read = |name: &'static str, value: &str| {
            let value = value.to_owned();
            Secret::from_lookup(move |n| (n == name).then(|| value.clone()))
        };
        assert_eq!(read(SECRET_VAR, &hex).unwrap().bytes, secret.bytes);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), format!("{hex}\n")).unwrap();
        let path = file.path().to_str().unwrap();
        assert_eq!(read(SECRET_FILE_VAR, path).unwrap().bytes, secret.bytes);
        use std::os::unix::fs::PermissionsExt;
        for (mode, fine) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false), (0o666, false)] {
            std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            let got = read(SECRET_FILE_VAR, path);
            assert_eq!(got.is_ok(), fine, "{mode:o}");
            let Err(error) = got else { continue };
            assert!(error.to_string().contains("chmod 600") && !error.to_string().contains(&hex), "{error}");
        }
        assert!(read("OTHER", "").unwrap_err().to_string().contains("openssl rand -hex 32"));
        for bad in ["xyz", &hex[1..], &hex.replace(|c: char| c.is_ascii_digit(), "g")] {
            let error = read(SECRET_VAR, bad).unwrap_err().to_string();
            assert!(error.contains("64 hexadecimal digits") && !error.contains(bad), "{error}");
        }
        assert_eq!(format!("{secret:?}"), "Secret(..)");
    }

    #[test]
    fn a_proof_holds_for_its_purpose_and_parts_alone() {
        let (secret, other) = (Secret::new([7; 32]), Secret::new([8; 32]));
        let proof = secret.prove("a", &[b"bc", b"d"]);
        assert!(secret.verify("a", &[b"bc", b"d"], &proof));
        assert!(!secret.verify("b", &[b"bc", b"d"], &proof));
        assert!(!secret.verify("a", &[b"b", b"cd"], &proof));
        assert!(!secret.verify("a", &[b"bcd"], &proof));
        assert!(!secret.verify("a", &[b"bc", b"d"], &proof[..31]));
        assert!(!other.verify("a", &[b"bc", b"d"], &proof));
    }
}
