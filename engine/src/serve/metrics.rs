//! Counters and latency histograms, and their Prometheus text form.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::engine::EngineStats;

/// What the HTTP side counts.
#[derive(Default)]
pub(super) struct Metrics {
    /// Answers by route and status. 499: the client left first.
    responses: Mutex<BTreeMap<(&'static str, u16), u64>>,
    /// From submitting a row to its first token.
    pub(super) first_token: Histogram,
    /// Between two tokens of a row.
    pub(super) next_token: Histogram,
    /// From submitting a row to its end.
    pub(super) row: Histogram,
    /// From a request's head to the end of its answer, by route.
    requests: Mutex<BTreeMap<&'static str, Histogram>>,
}

impl Metrics {
    pub(super) fn count_response(&self, route: &'static str, status: u16, duration: Duration) {
        lock(&self.requests).entry(route).or_default().observe(duration);
        *lock(&self.responses).entry((route, status)).or_default() += 1;
    }

    /// The text exposition format, version 0.0.4.
    ///
    /// `phase` is that of this server, named as in the run's events but in lower case; `rank_steps` those that each rank has completed.
    pub(super) fn render(&self, stats: &EngineStats, rank_steps: &[u64], phase: &str) -> String {
        let mut out = String::new();
        head(&mut out, "phase", "gauge", "1 for the phase that the server is in.");
        for known in ["ready", "draining", "failed"] {
            let _ = writeln!(out, "nemotron_phase{{phase=\"{known}\"}} {}", u8::from(known == phase));
        }
        let values: [(&str, &str, &str, u64); 8] = [
            ("rows_waiting", "gauge", "Rows that wait for admission.", stats.waiting as u64),
            ("rows_running", "gauge", "Rows that are being generated.", stats.running as u64),
            ("kv_pages_used", "gauge", "Pages of the KV cache in use.", stats.kv_pages_used as u64),
            ("kv_pages", "gauge", "Pages of the KV cache.", stats.kv_pages_total as u64),
            ("prompt_tokens_total", "counter", "Prompt tokens computed.", stats.prompt_tokens),
            ("generated_tokens_total", "counter", "Tokens generated.", stats.generated_tokens),
            ("rows_finished_total", "counter", "Rows completed.", stats.finished_rows),
            ("steps_total", "counter", "Steps of the model.", stats.steps),
        ];
        for (name, kind, help, value) in values {
            head(&mut out, name, kind, help);
            let _ = writeln!(out, "nemotron_{name} {value}");
        }
        head(&mut out, "rank_step_lag", "gauge", "Steps that a rank is behind the foremost one, as heard last.");
        let foremost = rank_steps.iter().max().copied().unwrap_or(0);
        for (rank, steps) in rank_steps.iter().enumerate() {
            let _ = writeln!(out, "nemotron_rank_step_lag{{rank=\"{rank}\"}} {}", foremost - steps);
        }
        head(&mut out, "http_responses_total", "counter", "Answers by route and status; 499: the client left first.");
        for ((route, status), count) in &*lock(&self.responses) {
            let _ = writeln!(out, "nemotron_http_responses_total{{route=\"{route}\",status=\"{status}\"}} {count}");
        }
        for (histogram, name, help) in [
            (&self.first_token, "time_to_first_token_seconds", "From submitting a row to its first token."),
            (&self.next_token, "time_between_tokens_seconds", "Between two tokens of a row."),
            (&self.row, "row_seconds", "From submitting a row to its end."),
        ] {
            head(&mut out, name, "histogram", help);
            histogram.render(&mut out, name, "");
        }
        head(&mut out, "request_seconds", "histogram", "From a request's head to the end of its answer.");
        for (route, histogram) in &*lock(&self.requests) {
            histogram.render(&mut out, "request_seconds", &format!("route=\"{route}\""));
        }
        out
    }
}

/// What is guarded is a count, right after any panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP nemotron_{name} {help}\n# TYPE nemotron_{name} {kind}");
}

/// Upper bounds in seconds: from one decoding step to a long row of a large model.
const BOUNDS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0];

/// A latency distribution.
#[derive(Default)]
pub(super) struct Histogram {
    /// Observations in each interval, the last one without an upper bound.
    counts: [AtomicU64; BOUNDS.len() + 1],
    micros: AtomicU64,
}

impl Histogram {
    pub(super) fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        self.counts[BOUNDS.partition_point(|&bound| bound < seconds)].fetch_add(1, Relaxed);
        self.micros.fetch_add(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX), Relaxed);
    }

    fn render(&self, out: &mut String, name: &str, label: &str) {
        let comma = if label.is_empty() { "" } else { "," };
        let mut total = 0;
        let bounds = BOUNDS.iter().map(f64::to_string).chain(["+Inf".into()]);
        for (bound, count) in bounds.zip(&self.counts) {
            total += count.load(Relaxed);
            let _ = writeln!(out, "nemotron_{name}_bucket{{{label}{comma}le=\"{bound}\"}} {total}");
        }
        let sum = self.micros.load(Relaxed) as f64 / 1e6;
        let labels = if label.is_empty() { String::new() } else { format!("{{{label}}}") };
        let _ = writeln!(out, "nemotron_{name}_sum{labels} {sum}\nnemotron_{name}_count{labels} {total}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_are_cumulative_and_a_bound_belongs_to_its_bucket() {
        let metrics = Metrics::default();
        for millis in [5, 6, 700_000] {
            metrics.row.observe(Duration::from_millis(millis));
        }
        metrics.count_response("/generate", 200, Duration::ZERO);
        metrics.count_response("/generate", 200, Duration::ZERO);
        let text = metrics.render(&EngineStats { running: 3, ..EngineStats::default() }, &[7, 5], "ready");
        for line in [
            "nemotron_rows_running 3",
            "nemotron_rank_step_lag{rank=\"0\"} 0",
            "nemotron_rank_step_lag{rank=\"1\"} 2",
            "nemotron_phase{phase=\"ready\"} 1",
            "nemotron_phase{phase=\"failed\"} 0",
            "nemotron_request_seconds_count{route=\"/generate\"} 2",
            "nemotron_http_responses_total{route=\"/generate\",status=\"200\"} 2",
            "nemotron_row_seconds_bucket{le=\"0.005\"} 1",
            "nemotron_row_seconds_bucket{le=\"0.01\"} 2",
            "nemotron_row_seconds_bucket{le=\"600\"} 2",
            "nemotron_row_seconds_bucket{le=\"+Inf\"} 3",
            "nemotron_row_seconds_sum 700.011",
            "nemotron_row_seconds_count 3",
        ] {
            assert!(text.lines().any(|candidate| candidate == line), "{line} is not in:\n{text}");
        }
    }
}
