//! Hosts as the tiers of their network hold them: pods, racks, and hosts that are in neither. What is alike is drawn
//! once.

use super::{Class, FEW, Fabric, Host, MOST, Shape, View, fitting, note, speed, words};

/// Something that the network joins.
enum Node {
    /// A host, as its place among the fabric's.
    Host(usize),
    /// A pod or a rack: its number, and what it holds.
    Tier(Class, u32, Vec<Node>),
}

/// Draws a fabric's hosts.
pub(super) struct Tiers<'a> {
    fabric: &'a Fabric,
    views: Vec<View<'a>>,
}

impl<'a> Tiers<'a> {
    pub(super) fn new(fabric: &'a Fabric) -> Tiers<'a> {
        Tiers { fabric, views: (0..fabric.hosts().len()).map(|host| View::new(fabric, host)).collect() }
    }

    /// What the network joins, and whether it joins anything: several things that no pod or rack holds together.
    pub(super) fn shapes(&self) -> (Vec<Shape>, bool) {
        let all = self.nodes((0..self.views.len()).collect(), &[Class::Pod, Class::Rack]);
        (self.alike(&all), all.len() > 1)
    }

    fn nodes(&self, hosts: Vec<usize>, tiers: &[Class]) -> Vec<Node> {
        let Some((tier, nearer)) = tiers.split_first() else {
            return hosts.into_iter().map(Node::Host).collect();
        };
        let number = |host: &usize| holder(&self.fabric.hosts()[*host], *tier);
        let mut held: Vec<(Option<u32>, Vec<usize>)> = Vec::new();
        let mut place = std::collections::BTreeMap::new();
        for host in hosts {
            let at = *place.entry(number(&host)).or_insert(held.len());
            if at == held.len() {
                held.push((number(&host), Vec::new()));
            }
            held[at].1.push(host);
        }
        let node = |(number, hosts): (Option<u32>, Vec<usize>)| {
            let inside = self.nodes(hosts, nearer);
            match number {
                Some(number) => vec![Node::Tier(*tier, number, inside)],
                None => inside,
            }
        };
        held.into_iter().flat_map(node).collect()
    }

    fn is_like(&self, a: &Node, b: &Node) -> bool {
        match (a, b) {
            (Node::Host(a), Node::Host(b)) => self.views[*a].is_like(&self.views[*b]),
            (Node::Tier(x, _, a), Node::Tier(y, _, b)) => {
                x == y && a.len() == b.len() && a.iter().zip(b).all(|(a, b)| self.is_like(a, b))
            }
            _ => false,
        }
    }

    /// Those that are alike once, the first of them, unless there are few hosts; and no more than a frame shows.
    fn alike(&self, nodes: &[Node]) -> Vec<Shape> {
        let mut alike: Vec<(&Node, usize)> = Vec::new();
        for node in nodes {
            match alike.last_mut() {
                Some((first, count)) if self.views.len() > FEW && self.is_like(first, node) => *count += 1,
                _ => alike.push((node, 1)),
            }
        }
        let shown = if alike.len() > MOST { MOST - 1 } else { alike.len() };
        let mut shapes: Vec<Shape> =
            alike[..shown].iter().map(|(node, count)| self.shape(node, *count)).collect();
        let more: usize = alike[shown..].iter().map(|(_, count)| count).sum();
        if more > 0 {
            let what = if nodes.iter().all(|n| matches!(n, Node::Host(_))) { "hosts" } else { "of them" };
            shapes.push(note(format!("and {more} more {what}")));
        }
        shapes
    }

    fn shape(&self, node: &Node, count: usize) -> Shape {
        match node {
            Node::Host(host) => self.views[*host].shape(count),
            Node::Tier(class, number, nodes) => {
                let mut title = vec![format!("{} {number}", words(*class))];
                if count > 1 {
                    title[0] += &format!(" and {} more {}s like it", count - 1, words(*class));
                }
                let link = |host: &usize| self.views[*host].link(*class);
                let slowest = hosts(nodes).iter().map(link).reduce(super::Link::slower);
                title.extend(slowest.filter(|_| nodes.len() > 1).map(|link| speed(&link)));
                let inside = self.alike(nodes);
                Shape::Frame { title, class: *class, columns: fitting(&inside, inside.len().max(1)), inside }
            }
        }
    }
}

fn holder(host: &Host, tier: Class) -> Option<u32> {
    if tier == Class::Pod { host.pod } else { host.rack }
}

/// All hosts below some nodes.
fn hosts(nodes: &[Node]) -> Vec<usize> {
    let of = |node: &Node| match node {
        Node::Host(host) => vec![*host],
        Node::Tier(_, _, nodes) => hosts(nodes),
    };
    nodes.iter().flat_map(of).collect()
}
