//! Slurm's way to write lists of hosts, such as `login,gpu[003-009,12]-ib`.

/// The first host of a list; `None` where the text is none.
pub(super) fn first_host(list: &str) -> Option<String> {
    let list = list.trim();
    let mut host = String::new();
    let mut rest = list;
    loop {
        let end = rest.find(['[', ',']).unwrap_or(rest.len());
        host.push_str(&rest[..end]);
        match rest[end..].chars().next() {
            None | Some(',') => break,
            _ => {
                let (inside, after) = rest[end + 1..].split_once(']')?;
                let first = inside.split(['-', ',']).next()?;
                if first.is_empty() || !first.bytes().all(|b| b.is_ascii_digit()) {
                    return None;
                }
                host.push_str(first);
                rest = after;
            }
        }
    }
    let fine = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    (!host.is_empty() && host.len() <= 255 && host.chars().all(fine)).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_first_host() {
        for (list, first) in [
            ("node1", "node1"),
            ("node1,node2", "node1"),
            ("gpu[003-009,12]", "gpu003"),
            ("gpu[7,9],login", "gpu7"),
            ("rack[1-2]node[04-08].cluster", "rack1node04.cluster"),
            ("a-b[10]-ib,x", "a-b10-ib"),
        ] {
            assert_eq!(first_host(list).as_deref(), Some(first), "{list}");
        }
        for bad in ["", ",", "a[", "a[]", "a[x-y]", "a b", "a]b", "$(x)"] {
            assert_eq!(first_host(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_has_a_first_host_or_none(text in "(?s).{0,100}") {
            let _ = first_host(&text);
        }
    }
}
