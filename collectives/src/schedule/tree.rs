//! Schedules in which ranks pass on what they have got, so that each talks to few others.

use tensorwire_transports::tcp::{Place, Span};

use super::Pieces;
use super::steps::{Rank, Steps};

/// The root's buffer reaches every rank along a binomial tree, in pieces: `log2 n` steps for the first; a rank sends
/// at most `log2 n` times `S` bytes, most ranks none.
pub(crate) fn broadcast(steps: &mut Steps, me: Rank, len: usize, piece: usize, root: usize) {
    // Numbered from the root, rank r's parent is r without its lowest bit; its children are r with each bit below that
    // one.
    let place = (me.rank + me.world - root) % me.world;
    let at = |place: usize| (place + root) % me.world;
    let below = if place == 0 { me.world.next_power_of_two() } else { 1 << place.trailing_zeros() };
    let children = std::iter::successors(Some(below >> 1), |bit| Some(bit >> 1)).take_while(|bit| *bit > 0);
    let children: Vec<usize> = children.map(|bit| place + bit).filter(|c| *c < me.world).map(at).collect();
    let pieces = Pieces::new(len, 1, piece);
    let turns = pieces.count().max(1);
    steps.begin(0);
    for turn in 0..=turns {
        if turn < turns && place != 0 {
            // The next piece comes while this one is passed on.
            steps.receive(at(place & (place - 1)), Span::new(Place::Output, pieces.range(turn)));
        }
        if turn < turns {
            steps.mark();
        }
        if turn > 0 {
            if place != 0 && !children.is_empty() {
                steps.wait(turn - 1, false);
            }
            for child in &children {
                steps.send(*child, Span::new(Place::Output, pieces.range(turn - 1)));
            }
        }
    }
}

/// Nobody is done before everybody has come: in step `i` of `log2 n`, a rank tells the one `2^i` after it and hears
/// from the one `2^i` before it (dissemination: Hensgen, Finkel and Manber, 1988).
pub(crate) fn barrier(steps: &mut Steps, me: Rank) {
    let nothing = Span::new(Place::Output, 0..0);
    steps.begin(0);
    let mut distance = 1;
    let mut turn = 0;
    while distance < me.world {
        steps.send((me.rank + distance) % me.world, nothing);
        steps.receive((me.rank + me.world - distance) % me.world, nothing);
        steps.mark();
        steps.wait(turn, false);
        distance *= 2;
        turn += 1;
    }
}
