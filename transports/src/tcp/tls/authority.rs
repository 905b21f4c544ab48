//! A job's own authority: made by its launcher, and gone with it.

use std::fmt;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use tensorwire_core::{Error, Result};

use super::{Tls, name};
use crate::tcp::stream::Identity;

/// Issues the certificates of one job. Its key exists in this process alone.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// A certificate and its private key, in PEM. For the environment of the rank alone: never for an argument, which
/// everybody on the host can read, or a log.
#[derive(Clone)]
pub struct Certificate {
    /// The certificate.
    pub cert: String,
    /// Its private key.
    pub key: String,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority(..)")
    }
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Certificate(..)")
    }
}

fn failed(e: rcgen::Error) -> Error {
    Error::os("making a certificate", std::io::Error::other(e))
}

impl Authority {
    /// A fresh one.
    ///
    /// # Errors
    /// [`Error::Os`] if the system has no random numbers.
    pub fn generate() -> Result<Authority> {
        let mut params = CertificateParams::new(Vec::new()).map_err(failed)?;
        params.distinguished_name.push(DnType::CommonName, "a tensorwire job");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().map_err(failed)?;
        Ok(Authority { issuer: CertifiedIssuer::self_signed(params, key).map_err(failed)? })
    }

    /// Its own certificate, in PEM.
    pub fn ca(&self) -> String {
        self.issuer.pem()
    }

    /// A certificate for `rank`. Rank 0's is good for the job's store too, which it may serve.
    ///
    /// # Errors
    /// [`Error::Os`] if the system has no random numbers.
    pub fn rank(&self, rank: usize) -> Result<Certificate> {
        let store = (rank == 0).then_some(Identity::Store);
        self.issue([Identity::Rank(rank)].into_iter().chain(store))
    }

    /// A certificate for whichever rank has it, and for the job's store.
    ///
    /// # Errors
    /// [`Error::Os`] if the system has no random numbers.
    pub fn any_rank(&self) -> Result<Certificate> {
        self.issue([Identity::Any])
    }

    /// What the launcher serves the job's store with.
    ///
    /// # Errors
    /// [`Error::Os`] if the system has no random numbers.
    pub fn store(&self) -> Result<Tls> {
        let Certificate { cert, key } = self.issue([Identity::Store])?;
        Tls::from_pem(&self.ca(), &cert, &key)
    }

    fn issue(&self, whose: impl IntoIterator<Item = Identity>) -> Result<Certificate> {
        let names: Vec<String> = whose.into_iter().map(name).collect();
        let mut params = CertificateParams::new(names.clone()).map_err(failed)?;
        params.distinguished_name.push(DnType::CommonName, &*names[0]);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate().map_err(failed)?;
        let cert = params.signed_by(&key, &self.issuer).map_err(failed)?;
        Ok(Certificate { cert: cert.pem(), key: key.serialize_pem() })
    }
}
