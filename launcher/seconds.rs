//! Durations: in TOML a number of seconds, on the command line a number with an optional unit.

use std::time::Duration;

use serde::{Deserialize, Deserializer, Serializer};

/// The longest duration that makes sense.
pub(crate) const MAX: Duration = Duration::from_secs(365 * 24 * 3600);

pub(crate) fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(duration.as_secs_f64())
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let seconds = f64::deserialize(deserializer)?;
    Duration::try_from_secs_f64(seconds).map_err(serde::de::Error::custom)
}

/// `90`, `1.5s`, `5m` or `2h`; a year at most, so that a point in time can always be computed from it.
pub(crate) fn parse(text: &str) -> Result<Duration, &'static str> {
    const EXPECTED: &str = "expected seconds, or a number with s, m or h, such as 90s, 5m, 2h; a year at most";
    let (number, unit) = text.split_at(text.find(|char: char| char.is_ascii_alphabetic()).unwrap_or(text.len()));
    let scale = match unit {
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(EXPECTED),
    };
    let seconds: f64 = number.parse().map_err(|_| EXPECTED)?;
    let duration = Duration::try_from_secs_f64(seconds * scale).map_err(|_| EXPECTED)?;
    if duration <= MAX { Ok(duration) } else { Err(EXPECTED) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_text_is_survived(text in "\\PC{0,20}|[-+.0-9einfasmh ]{0,12}") {
            if let Ok(duration) = parse(&text) {
                prop_assert!(duration <= MAX);
            }
        }

        #[test]
        fn units_are_multiples_of_seconds(count in 0_u64..8_000) {
            let seconds = |text: String| parse(&text).map(|duration| duration.as_secs());
            prop_assert_eq!(seconds(format!("{count}")), Ok(count));
            prop_assert_eq!(seconds(format!("{count}s")), Ok(count));
            prop_assert_eq!(seconds(format!("{count}m")), Ok(60 * count));
            prop_assert_eq!(seconds(format!("{count}h")), Ok(3600 * count));
        }
    }
}
