//! Which device runs which rank: groups are laid on the nearest islands that hold them.

use std::collections::HashMap;
use std::rc::Rc;

use super::machine::Machine;

/// Lays nested groups on a machine's devices, and remembers the inner ones.
#[derive(Default)]
pub struct Layouts {
    known: HashMap<Vec<usize>, Rc<[usize]>>,
}

impl Layouts {
    /// A device for each rank, with the innermost axis running fastest; nothing if the machine is too small or falls
    /// apart. `sizes` are the axes' degrees, innermost first; the last axis' groups exchange nothing, so they may lie
    /// anywhere.
    ///
    /// Axis by axis, neighbouring groups are bundled where an island of the nearest level holds them all; what is left
    /// over is bundled at the next level. So an inner axis never crosses farther links than it must, and a device that
    /// doesn't divide stays idle.
    pub fn lay(&mut self, machine: &Machine, sizes: &[usize]) -> Option<Vec<usize>> {
        let ranks = sizes.iter().try_fold(1usize, |n, s| n.checked_mul(*s))?;
        if ranks > machine.workers.len() {
            return None;
        }
        let (_, inner) = sizes.split_last()?;
        self.groups(machine, inner).get(..ranks).map(<[_]>::to_vec)
    }

    /// All groups of these sizes that the machine holds, one after the other.
    fn groups(&mut self, machine: &Machine, sizes: &[usize]) -> Rc<[usize]> {
        let Some((last, inner)) = sizes.split_last() else {
            return (0..machine.workers.len()).collect();
        };
        if *last == 1 {
            return self.groups(machine, inner);
        }
        if let Some(known) = self.known.get(sizes) {
            return known.clone();
        }
        let group = inner.iter().product();
        let groups = self.groups(machine, inner);
        let bundled: Rc<[usize]> = bundle(machine, &groups, group, *last).into();
        self.known.insert(sizes.to_vec(), bundled.clone());
        bundled
    }
}

/// Bundles of `size` groups of `of` devices each, those on the nearest islands first.
fn bundle(machine: &Machine, devices: &[usize], of: usize, size: usize) -> Vec<usize> {
    let mut groups: Vec<&[usize]> = devices.chunks_exact(of).collect();
    groups.sort_by_key(|g| g[0]);
    let mut bundles = Vec::with_capacity(devices.len());
    for level in &machine.levels {
        // Groups by the island that holds them whole.
        let mut homes: Vec<Vec<&[usize]>> = vec![Vec::new(); level.links.len()];
        let mut left = Vec::new();
        for group in groups {
            let island = level.island_of[group[0]];
            if group.iter().all(|d| level.island_of[*d] == island) {
                homes[island].push(group);
            } else {
                left.push(group);
            }
        }
        // Islands in the order of their first devices.
        homes.sort_by_key(|home| home.first().map(|g| g[0]));
        for home in homes {
            let whole = home.len() / size * size;
            home[..whole].iter().for_each(|g| bundles.extend_from_slice(g));
            left.extend(&home[whole..]);
        }
        groups = left;
        groups.sort_by_key(|g| g[0]);
    }
    bundles
}
