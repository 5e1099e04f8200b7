//! `--profile auto`: of all profiles that the model fits, the one that the cluster has devices for, and why it was chosen.

use std::cmp::Reverse;
use std::fs;

use nemotron_engine::rank::Device;

use crate::cluster::LOCAL;
use crate::env::Environment;
use crate::host::Host;
use crate::model::Model;
use crate::plan::{self, Plan};
use crate::profile;
use crate::report::{Exit, Failure, Outcome};
use crate::settings::{AUTO, Selection, Settings};
use crate::slurm::inventory::{self, Gpus, Nodes};
use crate::supervise::narrate;

/// The settings of a selection; a profile that is `auto` is chosen, and the choice told.
///
/// # Errors
/// As for [`Settings::resolve`]; Slurm does not say what it has; no profile suits it.
pub(crate) fn settings(selection: &Selection<'_>, environment: &Environment, host: &Host) -> Outcome<Settings> {
    let settings = Settings::resolve(selection, environment)?;
    if settings.text("profile") != Some(AUTO) {
        return Ok(settings);
    }
    let local = settings.text("cluster").is_none_or(|cluster| cluster == LOCAL);
    let offers = if local { this_machine() } else { inventory::ask()? };
    let (settings, why) = choose(&settings, &offers, environment, host)?;
    narrate(&why);
    Ok(settings)
}

/// The devices of this machine, by what NVIDIA's kernel module says.
fn this_machine() -> Vec<Nodes> {
    let cards = fs::read_dir("/proc/driver/nvidia/gpus").into_iter().flatten().filter_map(Result::ok);
    let models = cards.filter_map(|card| {
        let text = fs::read_to_string(card.path().join("information")).ok()?;
        let model = text.lines().find_map(|line| line.strip_prefix("Model:"))?;
        // `NVIDIA H100 80GB HBM3`
        Some(model.trim().trim_start_matches("NVIDIA ").to_lowercase().replace(' ', "-"))
    });
    let models: Vec<String> = models.collect();
    let gpus = models.first().map(|kind| Gpus { kind: Some(kind.clone()), count: models.len() });
    vec![Nodes {
        partition: String::new(),
        is_default: true,
        is_up: true,
        max_time: None,
        count: 1,
        gpus,
        cpus: 0,
        features: String::new(),
    }]
}

/// A profile on nodes that have its devices.
struct Candidate<'a> {
    profile: Settings,
    plan: Plan,
    nodes: &'a Nodes,
}

impl Candidate<'_> {
    fn num_devices(&self) -> usize {
        self.plan.mesh.world_size()
    }

    fn name(&self) -> &str {
        self.profile.text("profile").unwrap_or_default()
    }
}

/// The fewest devices win; then the default partition, then the faster device.
fn choose(
    settings: &Settings,
    offers: &[Nodes],
    environment: &Environment,
    host: &Host,
) -> Outcome<(Settings, String)> {
    let partitions = settings.texts("limits.partitions");
    let allowed = |nodes: &&Nodes| match settings.text("slurm.partition").filter(|name| !name.is_empty()) {
        Some(partition) => nodes.partition == partition,
        None => nodes.is_up && (partitions.is_empty() || partitions.contains(&nodes.partition)),
    };
    let offers: Vec<&Nodes> = offers.iter().filter(allowed).collect();
    let mut candidates = Vec::new();
    let mut wanted = Vec::new();
    for name in profile::names(environment) {
        let profile = Settings::of_profile(&name, &profile::find(&name, environment)?, environment)?;
        let Some(plan) = plan(&settings.with_profile(&profile, &[]), environment, host)? else { continue };
        if plan.device == Device::Cpu {
            // What any node has is taken where there is nothing else.
            if offers.iter().all(|nodes| nodes.gpus.is_none())
                && let Some(nodes) = offers.iter().max_by_key(|nodes| nodes.is_default)
            {
                candidates.push(Candidate { profile, plan, nodes });
            }
            continue;
        }
        wanted.push(format!("{name} ({})", plan.devices()));
        let suits = |nodes: &&&Nodes| {
            let enough = |gpus: &Gpus| gpus.count >= plan.hardware.devices_per_node;
            nodes.count >= plan.hardware.nodes && nodes.gpus.as_ref().is_some_and(enough) && is_of(nodes, &plan)
        };
        for nodes in offers.iter().filter(suits) {
            candidates.push(Candidate { profile: profile.clone(), plan: plan.clone(), nodes });
        }
    }
    let bandwidth = |candidate: &Candidate<'_>| candidate.plan.hardware.bandwidth.unwrap_or(0.0) as u64;
    candidates.sort_by_key(|candidate| {
        (candidate.num_devices(), Reverse(candidate.nodes.is_default), Reverse(bandwidth(candidate)))
    });
    let Some(best) = candidates.first() else {
        let offered: Vec<_> = offers.iter().map(|nodes| describe(nodes)).collect();
        let text = format!("no profile suits what there is: {}", offered.join(", "));
        let hint = match wanted.is_empty() {
            true => "the model fits no profile; `nemotron plan` says why".into(),
            false => format!("the model fits {}", wanted.join(", ")),
        };
        return Err(Failure::msg(Exit::DoesNotFit, text).hint(hint));
    };
    let mut why = format!("profile {}: {}", best.name(), describe(best.nodes));
    if best.plan.device == Device::Cuda {
        why += &format!(", and {} fits {}", best.plan.model, best.plan.devices());
    }
    let others: Vec<&str> = candidates.iter().map(Candidate::name).filter(|name| *name != best.name()).collect();
    if !others.is_empty() {
        why +=
            &format!("; {} would do too (fewest devices, default partition, fastest device decide)", others.join(", "));
    }
    let mut choice = vec![("profile", best.name().to_owned())];
    if !best.nodes.partition.is_empty() {
        choice.push(("slurm.partition", best.nodes.partition.clone()));
        // Where partitions mix devices, a bare number could get others.
        let kind = best.nodes.gpus.as_ref().and_then(|gpus| gpus.kind.clone());
        choice.extend(kind.filter(|_| best.plan.device == Device::Cuda).map(|kind| ("slurm.quirks.gres_type", kind)));
    }
    Ok((settings.with_profile(&best.profile, &choice), why))
}

/// The plan of the model on a profile; `None` if it does not fit.
fn plan(settings: &Settings, environment: &Environment, host: &Host) -> Outcome<Option<Plan>> {
    let (name, config) = Model::of_settings(settings, environment)?.describe()?;
    // A mesh that the model cannot have is no candidate either.
    Ok(Plan::new(plan::Model { name: &name, config: &config }, settings, host).ok().filter(|plan| plan.fits))
}

/// Whether the nodes' devices are those of the plan: `h100` is an H100-80GB, unless the features say that it has less memory.
fn is_of(nodes: &Nodes, plan: &Plan) -> bool {
    let name = plan.hardware.name.to_lowercase();
    let (model, memory) = name.split_once('-').unwrap_or((&name, ""));
    let kind = nodes.gpus.as_ref().and_then(|gpus| gpus.kind.as_deref()).unwrap_or_default().to_lowercase();
    let known = format!("{kind},{}", nodes.features.to_lowercase());
    let words: Vec<&str> = known.split(|char: char| !char.is_ascii_alphanumeric()).collect();
    let digits = |text: &str| text.chars().filter(char::is_ascii_digit).collect::<String>();
    let sizes = words.iter().filter(|word| word.ends_with('g') || word.ends_with("gb")).map(|word| digits(word));
    let sizes: Vec<String> = sizes.filter(|size| !size.is_empty()).collect();
    words.contains(&model) && (sizes.is_empty() || sizes.contains(&digits(memory)))
}

/// `partition gpu has 4 nodes with 8 x h100`.
fn describe(nodes: &Nodes) -> String {
    let place = match nodes.partition.as_str() {
        "" => "this machine".to_owned(),
        partition => format!("partition {partition}"),
    };
    match &nodes.gpus {
        Some(Gpus { kind, count }) => {
            let kind = kind.as_deref().unwrap_or("devices of unknown kind");
            let plural = if nodes.count == 1 { "" } else { "s" };
            format!("{place} has {} node{plural} with {count} x {kind}", nodes.count)
        }
        None => format!("{place} has no devices"),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::cli::EngineArgs;

    const HOST: Host = Host { cores: 8, available_bytes: 16 << 30 };

    fn nodes(partition: &str, count: usize, gpus: Option<(&str, usize)>) -> Nodes {
        Nodes {
            partition: partition.into(),
            is_default: partition == "batch",
            is_up: true,
            max_time: None,
            count,
            gpus: gpus.map(|(kind, count)| Gpus { kind: Some(kind.into()), count }),
            cpus: 64,
            features: String::new(),
        }
    }

    fn chosen(offers: &[Nodes], set: &[&str]) -> Outcome<(Settings, String)> {
        let set = set.iter().map(|text| (*text).to_owned()).collect();
        let engine = EngineArgs { profile: Some(AUTO.into()), set, ..EngineArgs::default() };
        let selection = Selection { engine: Some(&engine), cluster: Some("generic"), ..Selection::default() };
        let environment = Environment::new([], "/nonexistent");
        choose(&Settings::resolve(&selection, &environment)?, offers, &environment, &HOST)
    }

    fn profile(offers: &[Nodes], set: &[&str]) -> String {
        chosen(offers, set).unwrap().0.text("profile").unwrap().to_owned()
    }

    #[test]
    fn the_fewest_devices_that_hold_the_model() {
        let large = ["model=nemotron-4-340b"];
        let (h100, h200, a100) = (("h100", 8), ("h200", 8), ("a100", 8));
        let all = [nodes("batch", 4, Some(h100)), nodes("big", 1, Some(h200)), nodes("old", 2, Some(a100))];
        let (settings, why) = chosen(&all, &large).unwrap();
        assert_eq!((settings.text("profile"), settings.text("slurm.partition")), (Some("h200x8"), Some("big")));
        assert_eq!(settings.text("slurm.quirks.gres_type"), Some("h200"));
        assert_eq!(settings.source("slurm.partition").unwrap().to_string(), "--profile auto");
        assert!(why.starts_with("profile h200x8: partition big has 1 node with 8 x h200"), "{why}");
        assert!(why.contains("; h100x16, a100x16 would do too"), "{why}");
        assert_eq!(profile(&all[..1], &large), "h100x16");
        assert_eq!(profile(&all, &["model=nemotron-4-340b", "partition=old"]), "a100x16");
        assert_eq!(
            profile(&all, &["model=nemotron-mini-4b"]),
            "h100x1",
            "the default partition goes before a faster device"
        );
    }

    #[test]
    fn what_cannot_be_had_is_said() {
        let failure = chosen(&[nodes("batch", 1, Some(("h100", 8)))], &["model=nemotron-4-340b"]).unwrap_err();
        assert_eq!(failure.exit, Exit::DoesNotFit);
        let text = failure.to_string();
        assert!(
            text.contains("partition batch has 1 node with 8 x h100") && text.contains("h100x16 (2 x 8 x H100-80GB)"),
            "{text}"
        );
        let mut small = nodes("batch", 2, Some(("a100", 8)));
        small.features = "ampere,gpu40g".into();
        assert!(chosen(&[small.clone()], &["model=nemotron-4-340b"]).is_err(), "40 GB are not 80");
        small.features = "ampere,gpu80g".into();
        assert_eq!(profile(&[small], &["model=nemotron-4-340b"]), "a100x16");
        assert_eq!(profile(&[nodes("batch", 4, None)], &["model=builtin"]), "cpu");
    }
}
