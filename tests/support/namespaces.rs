//! Hosts for tests: network namespaces with an address each, on a switch. Each has its own loopback, ports and abstract
//! sockets, which is as good as a host for anything but power cuts.

use std::ffi::OsStr;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Gone when dropped.
pub(crate) struct Hosts {
    switch: String,
    pub(crate) hosts: Vec<String>,
}

fn ip(args: &str) -> bool {
    run("ip", args)
}

fn run(program: &str, args: &str) -> bool {
    let run =
        Command::new(program).args(args.split(' ')).stdout(Stdio::null()).stderr(Stdio::null()).status();
    run.is_ok_and(|status| status.success())
}

#[allow(dead_code, reason = "each test program uses a part of it")]
impl Hosts {
    /// `None`, and a line that says why, where this system lets the test make none.
    pub(crate) fn new(count: usize) -> Option<Hosts> {
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let id = format!("tensorwire-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let names = (0..count).map(|i| format!("{id}-{i}")).collect();
        let hosts = Hosts { switch: format!("{id}-switch"), hosts: names };
        let switch = &hosts.switch;
        let mut made =
            ip(&format!("netns add {switch}")) && ip(&format!("-n {switch} link add switch up type bridge"));
        for (i, host) in hosts.hosts.iter().enumerate() {
            made = made
                && ip(&format!("netns add {host}"))
                && ip(&format!("-n {switch} link add port{i} type veth peer name eth0 netns {host}"))
                && ip(&format!("-n {switch} link set port{i} master switch up"))
                && ip(&format!("-n {host} address add {}/24 dev eth0", Hosts::address(i)))
                && ip(&format!("-n {host} link set eth0 up"))
                && ip(&format!("-n {host} link set lo up"));
        }
        if !made {
            eprintln!("skipped: making network namespaces takes root and iproute2 (ip netns add)");
        }
        made.then_some(hosts)
    }

    /// What `ip netns exec` knows the host by.
    pub(crate) fn name(&self, i: usize) -> &str {
        &self.hosts[i]
    }

    pub(crate) fn address(i: usize) -> String {
        format!("10.77.0.{}", i + 1)
    }

    /// `program`, as it is run on a host.
    pub(crate) fn within(&self, i: usize, program: impl AsRef<OsStr>) -> Command {
        // It becomes the process that it starts.
        let mut ip = Command::new("ip");
        ip.args(["netns", "exec", self.name(i)]).arg(program);
        ip
    }

    /// Lets every host send no more than `mbit` a second, or as much as it can. `false` where this system can't.
    pub(crate) fn limit(&self, mbit: Option<u32>) -> bool {
        let limit = |host: &String| match mbit {
            Some(mbit) => {
                let rate = format!("tbf rate {mbit}mbit burst 16kb latency 500ms");
                run("tc", &format!("-n {host} qdisc replace dev eth0 root {rate}"))
            }
            None => run("tc", &format!("-n {host} qdisc del dev eth0 root")),
        };
        self.hosts.iter().all(limit)
    }

    /// The switch no longer passes on what comes from the host or goes to it. Nothing tells either side.
    pub(crate) fn forget(&self, i: usize) {
        assert!(ip(&format!("-n {} link set port{i} nomaster", self.switch)));
    }

    /// Undoes [`forget`](Hosts::forget).
    pub(crate) fn know(&self, i: usize) {
        assert!(ip(&format!("-n {} link set port{i} master switch", self.switch)));
    }

    /// The link between the host and the switch is down, at the switch's end or the host's own.
    pub(crate) fn unplug(&self, i: usize, at_the_host: bool) {
        let args = match at_the_host {
            true => format!("-n {} link set eth0 down", self.hosts[i]),
            false => format!("-n {} link set port{i} down", self.switch),
        };
        assert!(ip(&args));
    }

    /// Undoes [`unplug`](Hosts::unplug) at the switch.
    pub(crate) fn plug(&self, i: usize) {
        assert!(ip(&format!("-n {} link set port{i} up", self.switch)));
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in self.hosts.iter().chain([&self.switch]) {
            ip(&format!("netns del {name}"));
        }
    }
}
