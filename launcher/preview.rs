//! What a job would take: its whole input is read, checked and tokenised before a device is held for it.

use std::fmt::Write as _;
use std::path::Path;

use nemotron_engine::checkpoint;
use nemotron_engine::job::{Job, JobMeasure};
use nemotron_engine::rank::ModelSource;
use serde::Serialize;

use crate::job_file::LoadedJob;
use crate::plan::Plan;
use crate::report::Outcome;
use crate::supervise::span;

/// Characters of the first prompt that are shown.
const SHOWN: usize = 600;

#[derive(Clone, Debug, Serialize)]
pub(crate) struct Preview {
    #[serde(flatten)]
    measure: JobMeasure,
    /// Tokens that prompt and completion may have together.
    context: usize,
    /// As the model would see it.
    first_prompt: String,
    /// The least time for all new tokens, by the plan's roofline; `None` where the hardware is not known.
    at_least_s: Option<f64>,
}

impl Preview {
    pub(crate) fn of(job: &LoadedJob, limit: Option<u64>, model: &ModelSource, plan: &Plan) -> Outcome<Self> {
        let folder = job.path.parent().unwrap_or(Path::new("/"));
        let checkpoint = checkpoint::open(model)?;
        let tokenizer = checkpoint.tokenizer()?;
        let loaded = Job::load(&job.file, folder, limit, &tokenizer)?;
        let measure = loaded.measure(plan.context);
        let best = plan.decode.iter().map(|roofline| roofline.tokens_per_second).reduce(f64::max);
        Ok(Self {
            at_least_s: best.filter(|_| measure.max_new_tokens > 0).map(|rate| measure.max_new_tokens as f64 / rate),
            measure,
            context: plan.context,
            first_prompt: if limit == Some(0) { String::new() } else { loaded.first_prompt(&tokenizer)? },
        })
    }

    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        _ = self.write(&mut text);
        text.truncate(text.trim_end().len());
        text
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let JobMeasure { rows, rejected, truncated, shortened, .. } = self.measure;
        let measure = &self.measure;
        writeln!(
            out,
            "job       {rows} rows, {} prompt tokens, at most {} new tokens; {rejected} rows do not fit the context of {}",
            measure.prompt_tokens, measure.max_new_tokens, self.context
        )?;
        if truncated + shortened > 0 {
            writeln!(out, "          {truncated} prompts lose their beginning, {shortened} rows get fewer new tokens")?;
        }
        let most = measure.prompt_lengths.iter().map(|&(_, prompts)| prompts).max().unwrap_or(1);
        for &(at_most, prompts) in &measure.prompt_lengths {
            let bar = "#".repeat((40 * prompts).div_ceil(most) as usize);
            writeln!(out, "          prompts of up to {at_most:>7} tokens: {prompts:>9}  {bar}")?;
        }
        writeln!(out, "          the longest prompt has {} tokens", measure.longest_prompt)?;
        if let Some(seconds) = self.at_least_s {
            writeln!(out, "time      at least {} when no row stops early, communication not counted", span(seconds))?;
        }
        let shown: String = self.first_prompt.chars().take(SHOWN).collect();
        let more = if shown.len() < self.first_prompt.len() { "…" } else { "" };
        writeln!(out, "first prompt, as the model sees it:\n{shown}{more}")
    }
}
