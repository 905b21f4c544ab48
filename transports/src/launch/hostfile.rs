//! Host files, as mpirun reads them: which hosts there are, and how many ranks each may run.

use std::ops::Range;

use tensorwire_core::{Error, Result};

/// The most that one host, or a file's line, may ask for.
const MAX_SLOTS: usize = 4096;
/// The most hosts.
const MAX_HOSTS: usize = 4096;

/// A host on which ranks can be started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// As the remote shell takes it: a name, an address, or `user@name`.
    pub name: String,
    /// How many ranks it may run.
    pub slots: usize,
}

impl Host {
    /// Whether the name means this host, on which nothing remote is needed to start a rank.
    pub fn is_local(&self) -> bool {
        let own = rustix::system::uname();
        let own = own.nodename().to_string_lossy().into_owned();
        let short = own.split('.').next().unwrap_or_default();
        let name = self.name.as_str();
        ["localhost", "127.0.0.1", "::1"].contains(&name)
            || (!own.is_empty() && [own.as_str(), short].contains(&name))
    }

    /// The name without the user.
    pub fn address(&self) -> &str {
        self.name.rsplit_once('@').map_or(&self.name, |(_, host)| host)
    }
}

/// Reads a host file: one host a line, with `slots=N` (1 if that is left out); `#` begins a comment. A host that is
/// named again adds its slots.
///
/// ```text
/// # the two big ones
/// node1 slots=8
/// node2 slots=8
/// ```
///
/// # Errors
/// [`Error::Config`] names the line.
pub fn parse_hostfile(text: &str) -> Result<Vec<Host>> {
    let mut hosts: Vec<Host> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let bad = |what: String| Error::Config(format!("line {} of the host file: {what}", number + 1));
        let line = line.split('#').next().unwrap_or_default();
        let mut words = line.split_whitespace();
        let Some(name) = words.next() else { continue };
        check_name(name).map_err(bad)?;
        let mut slots = None;
        for word in words {
            let value = word.strip_prefix("slots=").ok_or_else(|| {
                bad(format!("'{word}' is not understood: a line reads HOST, or HOST slots=N"))
            })?;
            let n = value.parse::<usize>().ok().filter(|n| (1..=MAX_SLOTS).contains(n));
            let n = n.ok_or_else(|| bad(format!("slots={value}: give a number from 1 to {MAX_SLOTS}")))?;
            if slots.replace(n).is_some() {
                return Err(bad("slots= is there twice".into()));
            }
        }
        let slots = slots.unwrap_or(1);
        let known = hosts.len();
        match hosts.iter_mut().find(|h| h.name == name) {
            Some(host) if host.slots + slots > MAX_SLOTS => {
                return Err(bad(format!("{name} has more than {MAX_SLOTS} slots")));
            }
            Some(host) => host.slots += slots,
            None if known == MAX_HOSTS => return Err(bad(format!("more than {MAX_HOSTS} hosts"))),
            None => hosts.push(Host { name: name.to_owned(), slots }),
        }
    }
    if hosts.is_empty() {
        return Err(Error::Config("the host file names no host: a line reads HOST slots=N".into()));
    }
    Ok(hosts)
}

fn check_name(name: &str) -> Result<(), String> {
    // A leading dash would be an option to the remote shell; other characters have a meaning to it.
    let fine = |c: char| c.is_ascii_alphanumeric() || ".-_:@%".contains(c);
    if name.len() > 255 || name.starts_with('-') || name.contains("@-") || !name.chars().all(fine) {
        let name: String = name.escape_debug().take(80).collect();
        return Err(format!("'{name}' is not the name of a host"));
    }
    Ok(())
}

/// Which ranks run where: the slots of the first host first. Hosts that get none are left out.
///
/// # Errors
/// [`Error::Config`] if there are fewer slots than ranks.
pub(super) fn place(hosts: &[Host], ranks: usize) -> Result<Vec<(Host, Range<usize>)>> {
    let slots: usize = hosts.iter().map(|h| h.slots).sum();
    if slots < ranks {
        return Err(Error::Config(format!(
            "{ranks} ranks, and the host file has slots for {slots}: raise slots= or name further hosts"
        )));
    }
    let mut first = 0;
    let mut placed = Vec::new();
    for host in hosts {
        let end = ranks.min(first + host.slots);
        if first < end {
            placed.push((host.clone(), first..end));
        }
        first = end;
    }
    Ok(placed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn host(name: &str, slots: usize) -> Host {
        Host { name: name.into(), slots }
    }

    #[test]
    fn hosts_slots_and_comments() {
        let text =
            "# two\n\nnode1 slots=4\n  ada@node2\t# one slot\r\nnode1 slots=2\n10.0.0.3 slots=1\nfd00::1\n";
        let want = [host("node1", 6), host("ada@node2", 1), host("10.0.0.3", 1), host("fd00::1", 1)];
        assert_eq!(parse_hostfile(text).unwrap(), want);
        assert_eq!(want[1].address(), "node2");
        assert!(host("localhost", 1).is_local() && !host("node-that-is-not-here", 1).is_local());
    }

    #[test]
    fn a_line_that_is_wrong_is_named() {
        for (text, says) in [
            ("a\nb slots=0", "line 2 of the host file: slots=0"),
            ("a slots=x", "slots=x"),
            ("a slots=99999", "slots=99999"),
            ("a slots=1 slots=1", "twice"),
            ("a max_slots=3", "'max_slots=3' is not understood"),
            ("-oProxyCommand=evil", "is not the name of a host"),
            ("me@-oProxyCommand=evil", "is not the name of a host"),
            ("a;b", "is not the name of a host"),
            ("$(x)", "is not the name of a host"),
            ("\u{1b}[2J", "'\\u{1b}[2J' is not"),
            ("", "names no host"),
            ("# nothing", "names no host"),
        ] {
            let error = parse_hostfile(text).unwrap_err().to_string();
            assert!(error.contains(says), "{text:?}: {error}");
        }
    }

    #[test]
    fn slots_are_filled_in_the_files_order() {
        let hosts = [host("a", 2), host("b", 3), host("c", 1)];
        let placed = |ranks| place(&hosts, ranks).unwrap();
        assert_eq!(placed(1), [(host("a", 2), 0..1)]);
        assert_eq!(placed(4), [(host("a", 2), 0..2), (host("b", 3), 2..4)]);
        assert_eq!(placed(6).len(), 3);
        assert!(place(&hosts, 7).unwrap_err().to_string().contains("slots for 6"));
    }

    proptest! {
        #[test]
        fn any_text_is_hosts_or_an_error(text in "(?s).{0,300}") {
            if let Ok(hosts) = parse_hostfile(&text) {
                prop_assert!(!hosts.is_empty() && hosts.iter().all(|h| (1..=MAX_SLOTS).contains(&h.slots)));
            }
        }
    }
}
