//! How fast a run goes, over the last seconds.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_secs(10);

/// A rate from samples of counters that only grow.
pub(super) struct Rate {
    tokens: VecDeque<(Instant, u64)>,
    /// When rows were first counted, and how many were done then.
    rows: Option<(Instant, u64)>,
}

impl Rate {
    pub(super) fn new() -> Self {
        Self { tokens: VecDeque::new(), rows: None }
    }

    /// Tokens per second over the window that ends with this sample.
    pub(super) fn of(&mut self, now: Instant, tokens: u64) -> f64 {
        self.tokens.push_back((now, tokens));
        // One sample older than the window stays, as its beginning.
        while self.tokens.get(1).is_some_and(|(at, _)| now.duration_since(*at) >= WINDOW) {
            self.tokens.pop_front();
        }
        let Some(&(at, before)) = self.tokens.front() else { return 0.0 };
        let seconds = now.duration_since(at).as_secs_f64();
        if seconds > 0.0 { tokens.saturating_sub(before) as f64 / seconds } else { 0.0 }
    }

    /// Seconds until all rows are done, going by the rows done since the first call.
    pub(super) fn time_left(&mut self, done: u64, total: u64) -> Option<f64> {
        let (since, before) = *self.rows.get_or_insert((Instant::now(), done));
        let new = done.checked_sub(before).filter(|&new| new > 0)?;
        Some(since.elapsed().as_secs_f64() / new as f64 * total.saturating_sub(done) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_window() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut rate = Rate::new();
        assert_eq!(rate.of(at(0), 0), 0.0);
        assert_eq!(rate.of(at(5), 50), 10.0);
        assert_eq!(rate.of(at(10), 100), 10.0);
        assert_eq!(rate.of(at(20), 100), 0.0, "the first ten seconds are out of the window");
    }
}
