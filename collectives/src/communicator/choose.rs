//! What carries the data of a job that leaves it open (`TENSORWIRE_TRANSPORT=auto`), and why.

use tensorwire_core::{Error, Link, Result};
use tensorwire_topology::table::Table;
use tensorwire_transports::launch::Transport;

/// The size by which links are compared: what a layer of a large model exchanges for a token.
const TYPICAL: usize = 16 << 10;

/// What the ranks of a job have, alike.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Present {
    /// A secret, without which nobody is let in over TCP.
    pub(super) secret: bool,
    /// Certificates, and the features that use them.
    pub(super) certificates: bool,
    /// MPI, which has started them on several hosts; it carries a secret too.
    pub(super) mpi: bool,
}

impl Present {
    /// What may carry data between hosts, the first first where nothing is known of their speed: who starts ranks with MPI
    /// has set it up for the network, and TLS costs the processors less than QUIC. Who has certificates isn't sent in clear.
    fn candidates(self) -> &'static [Transport] {
        use Transport::{Mpi, Quic, Tcp, Tls};
        match self {
            _ if self.is_encrypted() && cfg!(feature = "quic") => &[Tls, Quic],
            _ if self.is_encrypted() => &[Tls],
            Present { mpi: true, .. } => &[Mpi, Tcp],
            Present { secret: true, .. } => &[Tcp],
            _ => &[],
        }
    }

    /// Whether the ranks' data is to be encrypted.
    pub(super) fn is_encrypted(self) -> bool {
        self.secret && self.certificates
    }

    /// What all ranks use: rank 0 chooses, which may know links that others don't, and `spread` gives all ranks its bytes.
    pub(super) fn agree(
        self,
        rank: usize,
        spread: impl FnOnce(&[u8]) -> Result<Vec<u8>>,
    ) -> Result<(Transport, String)> {
        let mut said = String::new();
        if rank == 0 {
            let (over, why) = self.choose(|over| Some(Table::links_in_force(over.name())?.inter?.link));
            said = format!("{over} {why}");
        }
        let said = spread(said.as_bytes())?;
        let said = String::from_utf8_lossy(&said);
        let (over, why) = said.split_once(' ').unwrap_or((&said, ""));
        let over = over.parse().map_err(|e| {
            Error::Config(format!(
                "rank {rank}: rank 0 did not say what carries the data ({e}): is it of another version?"
            ))
        })?;
        Ok((over, why.to_owned()))
    }

    /// What carries data between hosts, shared memory if nothing does; and why, for a person. `measured` is the link between
    /// hosts over a transport, where `tensorwire topo --probe` has measured it.
    pub(super) fn choose(self, measured: impl Fn(Transport) -> Option<Link>) -> (Transport, String) {
        let candidates = self.candidates();
        let (first, rest) = match candidates {
            [] => return (Transport::Shm, "without a secret or MPI no rank can leave its host".into()),
            [first, rest @ ..] => (*first, rest),
        };
        let what = match first {
            Transport::Mpi => "MPI has started the ranks, on several hosts",
            Transport::Tls => "the ranks have a secret and certificates",
            _ => "the ranks have a secret",
        };
        if rest.is_empty() {
            return (first, what.into());
        }
        let times: Vec<_> =
            candidates.iter().map(|over| (*over, measured(*over).map(|link| link.us(TYPICAL)))).collect();
        if let Some((unknown, _)) = times.iter().find(|(_, us)| us.is_none()) {
            let others: Vec<_> = rest.iter().map(|over| over.name()).collect();
            let why = format!(
                "{what}; whether {} would be faster isn't known, since {unknown} was not measured between these hosts \
                 (`tensorwire topo --probe --transport {unknown}`)",
                others.join(" or ")
            );
            return (first, why);
        }
        let times = times.iter().map(|(over, us)| (*over, us.unwrap_or(f64::INFINITY)));
        let list: Vec<_> = times.clone().map(|(over, us)| format!("{us:.1} us over {over}")).collect();
        let fastest = times.min_by(|a, b| a.1.total_cmp(&b.1)).map_or(first, |(over, _)| over);
        (fastest, format!("16 KiB between hosts take {}, as measured", list.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(alpha_us: f64) -> Link {
        Link { alpha_us, gbps: 10.0, overhead_us: 1.0 }
    }

    #[test]
    fn what_is_alone_is_taken() {
        let nothing = Present::default();
        assert_eq!(nothing.choose(|_| None).0, Transport::Shm);
        assert_eq!(Present { certificates: true, ..nothing }.choose(|_| None).0, Transport::Shm);
        let secret = Present { secret: true, ..nothing };
        assert_eq!(secret.choose(|_| None).0, Transport::Tcp);
    }

    #[test]
    fn what_is_known_to_be_faster_is_taken_and_said() {
        let both = Present { mpi: true, secret: true, ..Present::default() };
        let measured = |mpi: f64, tcp: f64| {
            both.choose(move |over| match over {
                Transport::Mpi => Some(link(mpi)),
                Transport::Tcp => Some(link(tcp)),
                _ => None,
            })
        };
        assert_eq!(measured(5.0, 20.0).0, Transport::Mpi);
        let (over, why) = measured(20.0, 5.0);
        assert_eq!(over, Transport::Tcp);
        assert!(why.contains("over mpi") && why.contains("over tcp"), "{why}");
        // One alone says nothing of the other.
        let (over, why) = both.choose(|over| (over == Transport::Tcp).then(|| link(1.0)));
        assert_eq!(over, Transport::Mpi);
        assert!(why.contains("mpi was not measured"), "{why}");
    }

    #[test]
    fn who_has_certificates_is_never_sent_in_clear() {
        for mpi in [false, true] {
            let present = Present { secret: true, certificates: true, mpi };
            let over = present.choose(|_| Some(link(1.0))).0;
            assert!(matches!(over, Transport::Tls | Transport::Quic), "{over}");
        }
    }
}
