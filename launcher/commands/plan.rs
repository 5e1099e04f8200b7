use std::fmt::Write as _;

use crate::auto;
use crate::cli::PlanArgs;
use crate::env::Environment;
use crate::hardware::GIB;
use crate::host::Host;
use crate::job_file;
use crate::model::Model;
use crate::plan::{self, Plan};
use crate::preview::Preview;
use crate::report::{Outcome, print_json, print_line};
use crate::settings::Selection;

pub(crate) fn run(args: &PlanArgs) -> Outcome {
    let (environment, host) = (Environment::of_process(), Host::probe()?);
    let selection = Selection { engine: Some(&args.engine), job: args.job.as_deref(), ..Selection::default() };
    let settings = auto::settings(&selection, &environment, &host)?;
    let job = args.job.as_ref().map(|path| job_file::load(path, &settings.job_overrides, &environment)).transpose()?;
    let model = Model::of_settings(&settings, &environment)?;
    let (name, config) = model.describe()?;
    let plan = Plan::new(plan::Model { name: &name, config: &config }, &settings, &host)?;
    let preview = match (&job, &model) {
        (Some(job), Model::Source(source)) => Some(Preview::of(job, None, source, &plan)?),
        _ => None,
    };
    if args.json {
        let mut object = serde_json::to_value(&plan).map_err(anyhow::Error::new)?;
        if let Some(preview) = &preview {
            object["job"] = serde_json::to_value(preview).map_err(anyhow::Error::new)?;
        }
        print_json(&object)?;
    } else {
        print_line(table(&plan))?;
        match &preview {
            Some(preview) => print_line(format!("\n{}", preview.table()))?,
            None if job.is_some() => {
                print_line("\njob       its rows are counted with a tokenizer: name a checkpoint with --model")?
            }
            None => true,
        };
    }
    plan.check(&config, &host).map(drop)
}

fn table(plan: &Plan) -> String {
    let mut text = String::new();
    _ = write(plan, &mut text);
    text.truncate(text.trim_end().len());
    text
}

fn write(plan: &Plan, out: &mut String) -> std::fmt::Result {
    let gib = |bytes: u64| format!("{:.2}", bytes as f64 / GIB);
    writeln!(out, "model     {}, {} parameters, {}", plan.model, grouped(plan.parameters), plan.dtype_name())?;
    writeln!(out, "profile   {}: {} on {}", plan.profile, plan.layout(), plan.devices())?;
    writeln!(out)?;
    writeln!(
        out,
        "{:>4} {:>5} {:>12} {:>12} {:>12} {:>12} {:>12} {:>12} {:>12}",
        "rank", "stage", "memory GiB", "weights", "activations", "logits", "runtime", "KV cache", "KV tokens"
    )?;
    for rank in &plan.ranks {
        writeln!(
            out,
            "{:>4} {:>5} {:>12} {:>12} {:>12} {:>12} {:>12} {:>12} {:>12}",
            rank.rank,
            rank.stage,
            gib(rank.memory_bytes),
            gib(rank.weights_bytes),
            gib(rank.activations_bytes),
            gib(rank.logits_bytes),
            gib(rank.overhead_bytes),
            gib(rank.kv_bytes),
            grouped(rank.kv_tokens as u64),
        )?;
    }
    if !plan.fits {
        return Ok(());
    }
    writeln!(out)?;
    writeln!(
        out,
        "KV cache  {} tokens: {} sequences of {}",
        grouped(plan.kv_tokens as u64),
        grouped(plan.sequences_at_context as u64),
        plan.context
    )?;
    writeln!(
        out,
        "load      about {} s: {} GiB a host at {:.1} GiB/s (storage.read_gib_s)",
        plan.load_seconds.ceil(),
        gib(plan.load_bytes_per_node),
        plan.hardware.read_rate / GIB,
    )?;
    for roofline in &plan.decode {
        writeln!(
            out,
            "decode    at most {:.0} tokens/s in a batch of {} at context {}, communication not counted",
            roofline.tokens_per_second, roofline.batch, roofline.context
        )?;
    }
    Ok(())
}

/// `341,029,195,776`
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
