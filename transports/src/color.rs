//! Who goes into which group of a split.

/// What a rank tells the others: its color, if it has one, and its key.
pub(crate) fn choice(color: Option<u32>, key: i32) -> [u8; 9] {
    let mut mine = [0; 9];
    mine[0] = u8::from(color.is_some());
    mine[1..5].copy_from_slice(&color.unwrap_or(0).to_le_bytes());
    mine[5..].copy_from_slice(&key.to_le_bytes());
    mine
}

/// The ranks that gave the same `color`, ordered by key, then rank, of all ranks' choices; none without a color.
pub(crate) fn members(color: Option<u32>, choices: &[[u8; 9]]) -> Vec<usize> {
    let of = choice(color, 0);
    let same = |(rank, choice): (usize, &[u8; 9])| {
        let [.., a, b, c, d] = *choice;
        (choice[..5] == of[..5]).then(|| (i32::from_le_bytes([a, b, c, d]), rank))
    };
    let mut ours: Vec<(i32, usize)> =
        choices.iter().enumerate().filter_map(same).filter(|_| color.is_some()).collect();
    ours.sort_unstable();
    ours.into_iter().map(|(_, rank)| rank).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_order_the_ranks_of_a_color() {
        let all = [
            choice(Some(0), 3),
            choice(None, 0),
            choice(Some(7), 0),
            choice(Some(0), -1),
            choice(Some(0), 3),
        ];
        assert_eq!(members(Some(0), &all), [3, 0, 4]);
        assert_eq!(members(Some(7), &all), [2]);
        assert!(members(None, &all).is_empty());
    }
}
