//! What bytes from outside go through first, one function a parser: for the targets in `fuzz/` and for the test that runs
//! the same on mutated examples. Each panics where a parser breaks what it promises.

use crate::launch::{Env, parse_hostfile};

/// What a launcher and its agents say to each other.
pub fn agent_frames(bytes: &[u8]) {
    crate::launch::fuzz_frames(bytes);
}

/// What a store's client asks for.
pub fn store_requests(bytes: &[u8]) {
    crate::store::fuzz_requests(bytes);
}

/// A host file.
pub fn hostfile(bytes: &[u8]) {
    if let Ok(hosts) = parse_hostfile(&String::from_utf8_lossy(bytes)) {
        assert!(hosts.iter().all(|h| h.slots > 0 && !h.name.starts_with('-')));
    }
}

/// An environment: `NAME=VALUE` a line.
pub fn environment(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let find = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    if let Ok(env) = Env::from_lookup(|name| find(name).map(str::to_owned), 1) {
        assert!(env.rank < env.world);
    }
    #[cfg(feature = "tcp")]
    let _ = text.lines().next().unwrap_or_default().parse::<crate::tcp::Interface>();
}

/// Any message of a handshake.
#[cfg(feature = "tcp")]
pub fn handshake(bytes: &[u8]) {
    crate::tcp::fuzz_handshake(bytes);
}

/// The header of a frame between ranks.
#[cfg(feature = "tcp")]
pub fn frame_header(bytes: &[u8]) {
    crate::tcp::fuzz_frame(bytes);
}
