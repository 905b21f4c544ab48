//! Which of this host's addresses the peers reach it at.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::str::FromStr;

use tensorwire_core::{Error, Result};

/// A choice among this host's addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Interface {
    /// The interface of this name.
    Name(String),
    /// Addresses that begin with the same bits.
    Network(IpAddr, u8),
}

impl FromStr for Interface {
    type Err = Error;

    /// A name, such as `eth0`; an address; or a network, such as `10.1.0.0/16`.
    fn from_str(text: &str) -> Result<Interface> {
        let text = text.trim();
        let bad = || {
            Error::Config(format!(
                "TENSORWIRE_INTERFACE is '{text}': give an interface's name, such as eth0, or a network, such as \
                 10.0.0.0/8 or fd00::/8"
            ))
        };
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits.parse::<u8>().map_err(|_| bad())?)),
            None => (text, None),
        };
        match address.parse::<IpAddr>() {
            Ok(ip) => {
                let most = if ip.is_ipv4() { 32 } else { 128 };
                Some(Interface::Network(ip, bits.unwrap_or(most)))
                    .filter(|_| bits.unwrap_or(0) <= most)
                    .ok_or_else(bad)
            }
            Err(_) if bits.is_some() || text.is_empty() => Err(bad()),
            Err(_) => Ok(Interface::Name(text.to_owned())),
        }
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Interface::Name(name) => f.write_str(name),
            Interface::Network(ip, bits) => write!(f, "{ip}/{bits}"),
        }
    }
}

impl Interface {
    fn fits(&self, name: &str, ip: IpAddr) -> bool {
        let same = |a: u128, b: u128, width: u8, bits: u8| bits == 0 || (a ^ b) >> (width - bits) == 0;
        match (self, ip) {
            (Interface::Name(wanted), _) => wanted == name,
            (Interface::Network(IpAddr::V4(net), bits), IpAddr::V4(ip)) => {
                same(u32::from(*net).into(), u32::from(ip).into(), 32, *bits)
            }
            (Interface::Network(IpAddr::V6(net), bits), IpAddr::V6(ip)) => {
                same((*net).into(), ip.into(), 128, *bits)
            }
            _ => false,
        }
    }
}

/// The address that was chosen, and why: for a person.
#[derive(Clone, Debug)]
pub(super) struct Chosen {
    pub(super) ip: IpAddr,
    pub(super) why: String,
}

/// Chooses by `wanted`, or else the address from which packets leave for `towards`, where the ranks meet; on this
/// host alone if they meet on it.
pub(super) fn choose(wanted: Option<&Interface>, towards: Option<SocketAddr>) -> Result<Chosen> {
    let all = addresses().map_err(|e| Error::os("listing this host's network interfaces", e))?;
    let name_of = |ip| all.iter().find(|(_, a)| *a == ip).map_or("?", |(name, _)| name);
    if let Some(wanted) = wanted {
        // An IPv4 address before an IPv6 one, and a global one before one that holds for a link alone.
        let rank = |ip: &IpAddr| (ip.is_ipv6(), matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local()));
        let fitting = all.iter().filter(|(name, ip)| wanted.fits(name, *ip)).min_by_key(|(_, ip)| rank(ip));
        let Some((name, ip)) = fitting else {
            let there: Vec<String> = all.iter().map(|(name, ip)| format!("{name} {ip}")).collect();
            return Err(Error::Config(format!(
                "TENSORWIRE_INTERFACE is '{wanted}', which no address of this host fits: it has {}",
                there.join(", ")
            )));
        };
        return Ok(Chosen { ip: *ip, why: format!("{name}, as TENSORWIRE_INTERFACE says") });
    }
    let Some(towards) = towards else {
        return Ok(Chosen {
            ip: Ipv4Addr::LOCALHOST.into(),
            why: "this host alone, where the ranks meet".into(),
        });
    };
    let ip = source_for(towards)
        .map_err(|e| Error::os(format!("finding the way to {towards}, where the ranks meet"), e))?;
    Ok(Chosen { ip, why: format!("{}, the way to {towards}", name_of(ip)) })
}

/// This host's address from which `host` is reached, or the one that `wanted` chooses: what to serve other hosts at.
///
/// # Errors
/// [`Error::Config`] if the name of the host can't be resolved, or no address fits; [`Error::Os`] if no way leads there.
pub fn address_towards(host: &str, wanted: Option<&Interface>) -> Result<IpAddr> {
    if wanted.is_some() {
        return choose(wanted, None).map(|chosen| chosen.ip);
    }
    let unresolved = |e: io::Error| Error::Config(format!("the address of host {host} can't be found: {e}"));
    let mut at = (host, 9).to_socket_addrs().map_err(unresolved)?;
    let at = at.next().ok_or_else(|| unresolved(io::ErrorKind::NotFound.into()))?;
    choose(None, Some(at)).map(|chosen| chosen.ip)
}

/// What leads to other hosts, where nothing is known of them: the way to anywhere, or else to a network of this host.
pub(crate) fn outward() -> Option<SocketAddr> {
    // Addresses that are set aside for documentation: they are nobody's, and the default route leads to them.
    let anywhere = [IpAddr::from([192, 0, 2, 1]), IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1])];
    let anywhere = anywhere.map(|ip| SocketAddr::new(ip, 9)).into_iter();
    let route = anywhere.into_iter().find(|at| source_for(*at).is_ok());
    route.or_else(|| {
        let local = |ip: &IpAddr| matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
        let all = addresses().ok()?;
        let ip = all.into_iter().map(|(_, ip)| ip).find(|ip| !ip.is_loopback() && !local(ip))?;
        Some(SocketAddr::new(ip, 9))
    })
}

/// The address from which packets to `towards` leave. Nothing is sent.
fn source_for(towards: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr =
        if towards.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(towards)?;
    Ok(socket.local_addr()?.ip())
}

/// Every address of this host, with its interface's name.
fn addresses() -> io::Result<Vec<(String, IpAddr)>> {
    let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: `first` may be written.
    if unsafe { libc::getifaddrs(&mut first) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut all = Vec::new();
    let mut next = first;
    while !next.is_null() {
        // SAFETY: (1) the list is valid until it is freed, below; (2) an address of a family has that family's
        // type; (3) the name ends with a zero byte.
        unsafe {
            let entry = &*next;
            next = entry.ifa_next;
            if entry.ifa_addr.is_null() || entry.ifa_flags & libc::IFF_UP as u32 == 0 {
                continue;
            }
            let ip = match i32::from((*entry.ifa_addr).sa_family) {
                libc::AF_INET => {
                    let address = &*entry.ifa_addr.cast::<libc::sockaddr_in>();
                    IpAddr::from(address.sin_addr.s_addr.to_ne_bytes())
                }
                libc::AF_INET6 => {
                    IpAddr::from((*entry.ifa_addr.cast::<libc::sockaddr_in6>()).sin6_addr.s6_addr)
                }
                _ => continue,
            };
            all.push((CStr::from_ptr(entry.ifa_name).to_string_lossy().into_owned(), ip));
        }
    }
    // SAFETY: the list came from `getifaddrs`, and nothing of it is used any more.
    unsafe { libc::freeifaddrs(first) };
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_networks() {
        let fits = |text: &str, name: &str, ip: &str| {
            text.parse::<Interface>().unwrap().fits(name, ip.parse().unwrap())
        };
        assert!(fits("eth0", "eth0", "10.0.0.1") && !fits("eth0", "eth1", "10.0.0.1"));
        assert!(fits("10.1.0.0/16", "x", "10.1.2.3") && !fits("10.1.0.0/16", "x", "10.2.2.3"));
        assert!(fits("10.1.2.3", "x", "10.1.2.3") && !fits("10.1.2.3", "x", "10.1.2.4"));
        assert!(fits("fd00::/8", "x", "fd12::1") && !fits("fd00::/8", "x", "fe80::1"));
        assert!(fits("0.0.0.0/0", "x", "1.2.3.4") && !fits("0.0.0.0/0", "x", "::1"));
        for bad in ["", "10.0.0.0/33", "fd00::/129", "eth0/3", "10.0.0.0/x"] {
            assert!(bad.parse::<Interface>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_way_to_the_store_or_the_one_asked_for() {
        let chosen = choose(None, Some("127.0.0.1:9".parse().unwrap())).unwrap();
        assert_eq!(chosen.ip, Ipv4Addr::LOCALHOST);
        assert!(chosen.why.contains("lo"), "{}", chosen.why);
        assert_eq!(choose(None, None).unwrap().ip, Ipv4Addr::LOCALHOST);
        assert_eq!(choose(Some(&"127.0.0.0/8".parse().unwrap()), None).unwrap().ip, Ipv4Addr::LOCALHOST);
        let error = choose(Some(&"no-such-interface".parse().unwrap()), None).unwrap_err().to_string();
        assert!(error.contains("127.0.0.1"), "{error}");
    }
}
