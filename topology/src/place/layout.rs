//! Which device runs which rank: groups are laid on the nearest islands that hold them.

use super::machine::Machine;

/// Lays nested groups on a machine's devices: `sizes` are the axes' degrees, innermost first. The result has a device
/// for each rank, with the innermost axis running fastest; nothing if the machine is too small or falls apart.
///
/// Axis by axis, neighbouring groups are bundled where an island of the nearest level holds them all; what is left
/// over is bundled at the next level. So an inner axis never crosses farther links than it must, and a device that
/// doesn't divide stays idle.
pub fn lay(machine: &Machine, sizes: &[usize]) -> Option<Vec<usize>> {
    let ranks = sizes.iter().try_fold(1usize, |n, s| n.checked_mul(*s))?;
    if ranks > machine.workers.len() {
        return None;
    }
    let mut groups: Vec<Vec<usize>> = (0..machine.workers.len()).map(|d| vec![d]).collect();
    for &size in sizes {
        if size > 1 {
            groups = bundle(machine, groups, size);
        }
    }
    groups.into_iter().next()
}

/// Bundles of `size` groups each, those on the nearest islands first.
fn bundle(machine: &Machine, mut groups: Vec<Vec<usize>>, size: usize) -> Vec<Vec<usize>> {
    let mut bundles = Vec::new();
    for level in &machine.levels {
        // Where a whole group lies: on one island, or on several, and then no bundle at this level holds it.
        let home = |group: &[usize]| {
            let island = level.island_of[group[0]];
            group.iter().all(|d| level.island_of[*d] == island).then_some(island)
        };
        let mut homes: Vec<Vec<Vec<usize>>> = vec![Vec::new(); level.links.len()];
        let mut left = Vec::new();
        for group in groups {
            match home(&group) {
                Some(island) => homes[island].push(group),
                None => left.push(group),
            }
        }
        for mut on_island in homes {
            let whole = on_island.len() / size * size;
            left.extend(on_island.drain(whole..));
            bundles.extend(on_island.chunks(size).map(<[_]>::concat));
        }
        groups = left;
        groups.sort_by_key(|g| g[0]);
    }
    bundles
}
