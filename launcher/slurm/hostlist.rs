//! Slurm's node lists: `dgx[1,3-4]-ib[01-02],login`. Parsed here because `scontrol show hostnames` needs a configuration, and ends with
//! code 0 even when it refuses.

use thiserror::Error;

/// Nodes that one list may name: far above any cluster, far below what would fill memory.
const MAX_NODES: usize = 100_000;

/// Why a text is no node list.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum HostlistError {
    #[error("`{0}` is no node list: {1}")]
    Syntax(String, &'static str),
    #[error("`{0}` names more than {MAX_NODES} nodes")]
    TooMany(String),
}

/// All nodes in the order of the list, duplicates kept. Leading zeros of a range's start set the width: `n[01-3]` is n01, n02, n03.
///
/// # Errors
/// The text is malformed: unbalanced or empty brackets, a range that runs backwards, text after the last bracket.
pub fn expand(list: &str) -> Result<Vec<String>, HostlistError> {
    let mut nodes = Vec::new();
    for item in split_outside_brackets(list)? {
        nodes.append(&mut expand_item(list, item)?);
        if nodes.len() > MAX_NODES {
            return Err(HostlistError::TooMany(list.into()));
        }
    }
    Ok(nodes)
}

fn syntax(list: &str, reason: &'static str) -> HostlistError {
    HostlistError::Syntax(list.into(), reason)
}

/// The items between commas that stand in no bracket; none of an empty list.
fn split_outside_brackets(list: &str) -> Result<Vec<&str>, HostlistError> {
    let (mut items, mut start, mut inside) = (Vec::new(), 0, false);
    for (at, char) in list.char_indices() {
        match (char, inside) {
            ('[', true) | (']', false) => return Err(syntax(list, "brackets do not match")),
            ('[', false) => inside = true,
            (']', true) => inside = false,
            (',', false) => {
                items.push(&list[start..at]);
                start = at + 1;
            }
            _ if char.is_whitespace() || char.is_control() => return Err(syntax(list, "it has white space")),
            _ => {}
        }
    }
    if inside {
        return Err(syntax(list, "brackets do not match"));
    }
    if list.is_empty() {
        return Ok(items);
    }
    items.push(&list[start..]);
    if items.iter().any(|item| item.is_empty()) {
        return Err(syntax(list, "a name is empty"));
    }
    Ok(items)
}

fn expand_item(list: &str, item: &str) -> Result<Vec<String>, HostlistError> {
    let mut names = vec![String::new()];
    let mut rest = item;
    while let Some((prefix, (ranges, after))) =
        rest.split_once('[').and_then(|(prefix, tail)| Some((prefix, tail.split_once(']')?)))
    {
        let numbers = expand_ranges(list, ranges)?;
        if names.len().saturating_mul(numbers.len()) > MAX_NODES {
            return Err(HostlistError::TooMany(list.into()));
        }
        names =
            names.iter().flat_map(|name| numbers.iter().map(move |number| format!("{name}{prefix}{number}"))).collect();
        rest = after;
        if rest.is_empty() {
            return Ok(names);
        }
    }
    if rest.len() < item.len() {
        return Err(syntax(list, "text follows the last bracket"));
    }
    Ok(vec![item.into()])
}

fn expand_ranges(list: &str, ranges: &str) -> Result<Vec<String>, HostlistError> {
    let number = |text: &str| -> Result<u64, HostlistError> {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse().ok()).flatten().ok_or_else(|| syntax(list, "a bracket holds what is no number"))
    };
    let mut numbers = Vec::new();
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (from, to, width) = (number(first)?, number(last)?, first.len());
        if from > to {
            return Err(syntax(list, "a range runs backwards"));
        }
        if to - from >= (MAX_NODES - numbers.len().min(MAX_NODES)) as u64 {
            return Err(HostlistError::TooMany(list.into()));
        }
        numbers.extend((from..=to).map(|number| format!("{number:0width$}")));
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    fn check(list: &str, expected: &str) {
        assert_eq!(expand(list).unwrap().join(" "), expected, "{list}");
    }

    #[test]
    fn lists_expand_as_scontrol_does() {
        check("", "");
        check("vm", "vm");
        check("h100-[01-02]", "h100-01 h100-02");
        check("r[1-2]n[01-03]", "r1n01 r1n02 r1n03 r2n01 r2n02 r2n03");
        check("dgx[1,3-4],dgx-x[09-11]", "dgx1 dgx3 dgx4 dgx-x09 dgx-x10 dgx-x11");
        check("n[1-3]-ib[0-1]", "n1-ib0 n1-ib1 n2-ib0 n2-ib1 n3-ib0 n3-ib1");
        check("a[1]b[2]c[3-4]", "a1b2c3 a1b2c4");
        check("a[01-3]", "a01 a02 a03");
        check("n[9-11]", "n9 n10 n11");
        check("n[099-101]", "n099 n100 n101");
        check("n1,n1", "n1 n1");
    }

    #[test]
    fn what_is_malformed_is_refused() {
        for list in [
            "n[001-003,010]x",
            "n[1-2",
            "n1-2]",
            "n[[1]]",
            "n[]",
            "n[a-b]",
            "n[3-1]",
            "n[1-]",
            "n[1,]",
            ",n1",
            "n1,",
            "n 1",
            "n[1-2-3]",
            "n[99999999999999999999]",
        ] {
            assert!(matches!(expand(list), Err(HostlistError::Syntax(..))), "{list}: {:?}", expand(list));
        }
        for list in ["n[0-99999999]", "n[0-999]m[0-999]", "n[0-18446744073709551615]"] {
            assert!(matches!(expand(list), Err(HostlistError::TooMany(_))), "{list}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_survived(list in "[an0-9,\\[\\]-]{0,24}") {
            if let Ok(nodes) = expand(&list) {
                prop_assert!(nodes.iter().all(|node| !node.is_empty() && !node.contains(['[', ']', ','])));
            }
        }

        #[test]
        fn what_was_folded_unfolds(prefix in "[a-z][a-z-]{0,5}", from in 0_u32..2000, count in 1_u32..50, width in 1_usize..5) {
            let last = from + count - 1;
            let list = format!("{prefix}[{from:0width$}-{last:0width$}]");
            let names: Vec<_> = (from..=last).map(|number| format!("{prefix}{number:0width$}")).collect();
            prop_assert_eq!(expand(&list).unwrap(), names.clone());
            prop_assert_eq!(expand(&names.join(",")).unwrap(), names);
        }
    }
}
