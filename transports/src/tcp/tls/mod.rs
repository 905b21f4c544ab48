//! TLS 1.3 between the ranks of a job, both of which show a certificate of the job's authority.
//!
//! A certificate names its holder by a DNS name that is never looked up: `rank-3.tensorwire.internal`,
//! `store.tensorwire.internal` for whoever serves the job's store, or `*.tensorwire.internal` for all of a job. Inside the
//! connection both sides then prove that they know the job's secret, together with a number that only this connection
//! has (RFC 9266's way to bind the two): certificates alone don't let anybody in, nor does the secret.

mod authority;
mod session;

use std::fmt;
use std::sync::Arc;

use rustls::client::{Resumption, WebPkiServerVerifier, verify_server_name};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tensorwire_core::{Error, Result};

use super::secret::read_private;
use super::stream::Identity;

pub use authority::{Authority, Certificate};
pub(super) use session::{Session, complaint};

/// The variable that holds the certificates of the job's authority, in PEM, or names a file that does.
pub const TLS_CA_VAR: &str = "TENSORWIRE_TLS_CA";
/// The variable that holds this rank's certificate, in PEM and with those that lead to the authority's behind it, or
/// names a file that does.
pub const TLS_CERT_VAR: &str = "TENSORWIRE_TLS_CERT";
/// The variable that holds the certificate's private key, in PEM, or names a file that does, which nobody else can read.
pub const TLS_KEY_VAR: &str = "TENSORWIRE_TLS_KEY";

/// Bytes of a file of certificates at most.
const MAX_FILE: u64 = 1 << 20;

/// What a rank shows to others, and what it asks others to show.
#[derive(Clone)]
pub struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    own: CertificateDer<'static>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls(..)")
    }
}

/// What a connection's own number is made of: RFC 9266.
pub(super) const BINDING: &[u8] = b"EXPORTER-Channel-Binding";

/// The name that a certificate has for `who`.
pub(super) fn name(who: Identity) -> String {
    match who {
        Identity::Rank(rank) => format!("rank-{rank}.tensorwire.internal"),
        Identity::Store => "store.tensorwire.internal".to_owned(),
        Identity::Any => "*.tensorwire.internal".to_owned(),
    }
}

fn server_name(who: Identity) -> ServerName<'static> {
    ServerName::try_from(name(who)).expect("a DNS name")
}

/// Whether a certificate says that its holder is `who`.
pub(super) fn names(certificate: &CertificateDer<'_>, who: Identity) -> bool {
    ParsedCertificate::try_from(certificate)
        .is_ok_and(|certificate| verify_server_name(&certificate, &server_name(who)).is_ok())
}

impl Tls {
    /// The certificates that the variables `TENSORWIRE_TLS_CA`, `TENSORWIRE_TLS_CERT` and `TENSORWIRE_TLS_KEY` hold, or
    /// name the files of.
    ///
    /// # Errors
    /// [`Error::Config`] if one isn't set or holds something else, they don't belong together, or others can read the
    /// key's file.
    pub fn from_env() -> Result<Tls> {
        Tls::from_lookup(|name| std::env::var(name).ok().filter(|v| !v.is_empty()))
    }

    fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Tls> {
        let text = |name: &str, read: &dyn Fn(&str) -> Result<String>| match lookup(name) {
            Some(text) if text.trim_start().starts_with("-----BEGIN") => Ok(text),
            Some(path) => read(&path),
            None => Err(Error::Config(format!(
                "ranks over TLS show certificates, and {name} is not set: `tensorwire launch` makes them; by hand, \
                 {TLS_CA_VAR}, {TLS_CERT_VAR} and {TLS_KEY_VAR} name files in PEM"
            ))),
        };
        let ca = text(TLS_CA_VAR, &read)?;
        let cert = text(TLS_CERT_VAR, &read)?;
        let key = text(TLS_KEY_VAR, &|path| read_private("the private key's file", path, MAX_FILE))?;
        Tls::from_pem(&ca, &cert, &key)
    }

    /// The authority's certificates, one's own, and its private key, in PEM.
    ///
    /// # Errors
    /// [`Error::Config`] if they are something else, or don't belong together.
    pub fn from_pem(ca: &str, cert: &str, key: &str) -> Result<Tls> {
        // What a key holds stays unsaid.
        let wrong = |name: &str, what: &dyn fmt::Display| Error::Config(format!("{name}: {what}"));
        let certificates = |name: &str, text: &str| {
            let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
            let all = all.map_err(|e| wrong(name, &e))?;
            if all.is_empty() { Err(wrong(name, &"there is no certificate in PEM there")) } else { Ok(all) }
        };
        let mut roots = RootCertStore::empty();
        for root in certificates(TLS_CA_VAR, ca)? {
            roots.add(root).map_err(|e| wrong(TLS_CA_VAR, &e))?;
        }
        let chain = certificates(TLS_CERT_VAR, cert)?;
        let own = chain[0].clone();
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
            .map_err(|_| wrong(TLS_KEY_VAR, &"there is no private key in PEM there"))?;

        let (roots, provider) = (Arc::new(roots), Arc::new(rustls::crypto::ring::default_provider()));
        let tls13 = &[&rustls::version::TLS13];
        let unfit = |e: rustls::Error| wrong(TLS_CERT_VAR, &format!("with the key in {TLS_KEY_VAR}: {e}"));
        let authority = |e: &dyn fmt::Display| wrong(TLS_CA_VAR, e);
        let verifier = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone());
        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(tls13)
            .map_err(unfit)?
            .with_webpki_verifier(verifier.build().map_err(|e| authority(&e))?)
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(unfit)?;
        client.enable_sni = false;
        // Each connection stands on certificates of its own.
        client.resumption = Resumption::disabled();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone());
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(tls13)
            .map_err(unfit)?
            .with_client_cert_verifier(verifier.build().map_err(|e| authority(&e))?)
            .with_single_cert(chain, key)
            .map_err(unfit)?;
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Tls { client: Arc::new(client), server: Arc::new(server), own })
    }

    /// What a side that dials, and one that is dialled, ask and show.
    #[cfg(feature = "quic")]
    pub(super) fn configs(&self) -> (ClientConfig, ServerConfig) {
        ((*self.client).clone(), (*self.server).clone())
    }

    /// Fails unless one's own certificate says that it is `who`'s: peers would refuse it.
    pub(super) fn check(&self, who: Identity) -> Result<()> {
        let parsed = ParsedCertificate::try_from(&self.own)
            .map_err(|e| Error::Config(format!("{TLS_CERT_VAR}: {e}")))?;
        verify_server_name(&parsed, &server_name(who)).map_err(|_| {
            let name = name(who);
            Error::Config(format!(
                "the certificate in {TLS_CERT_VAR} does not name this process: it needs the alternative name DNS:{name}, or \
                 DNS:*.tensorwire.internal for all of a job"
            ))
        })
    }
}

fn read(path: &str) -> Result<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE).read_to_string(&mut text))
        .map_err(|e| Error::os(format!("reading the certificates' file {path}"), e))?;
    Ok(text)
}

#[cfg(test)]
pub(super) mod tests;
