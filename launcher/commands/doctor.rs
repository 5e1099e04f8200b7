use nemotron_engine::rank::Device;
use serde_json::json;

use crate::cli::{DoctorArgs, EngineArgs};
use crate::env::Environment;
use crate::hardware::hardware;
use crate::health::{self, Check, Grade, Wants};
use crate::host::Host;
use crate::process::hostname;
use crate::report::{Exit, Failure, Outcome, print_json, print_line};
use crate::resolve::run_root;
use crate::settings::{Selection, Settings};

pub(crate) fn run(args: &DoctorArgs) -> Outcome {
    let environment = Environment::of_process();
    let host = Host::probe()?;
    let engine = EngineArgs { profile: args.profile.clone(), ..EngineArgs::default() };
    let selection = Selection {
        engine: Some(&engine),
        cluster: args.cluster.as_deref(),
        default_profile: Some("cpu"),
        ..Selection::default()
    };
    let settings = Settings::resolve(&selection, &environment)?;
    let (_, hardware) = hardware(&settings, &host)?;
    let ranks = hardware.devices_per_node;
    let devices = (hardware.device == Device::Cuda).then_some((ranks, hardware.memory_bytes));
    let wants = Wants { devices, ranks };

    let mut checks = health::host::checks(&host, &wants, &run_root(&settings, &environment)?);
    let on_host = checks.len();
    checks.extend(health::devices::checks(&wants));
    if args.json {
        print_json(&json!({ "schema": 1, "host": hostname(), "checks": checks }))?;
    } else {
        print(&checks)?;
    }
    verdict(&checks, on_host)
}

fn print(checks: &[Check]) -> Outcome {
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    for Check { name, grade, found, cure } in checks {
        print_line(format!("{grade:4}  {name:width$}  {found}"))?;
        if let Some(cure) = cure {
            print_line(format!("{:4}  {:width$}  help: {cure}", "", ""))?;
        }
    }
    Ok(())
}

/// # Errors
/// A finding is critical; that of a device counts before that of the host.
fn verdict(checks: &[Check], on_host: usize) -> Outcome {
    let critical = checks.iter().filter(|check| check.grade == Grade::Crit).count();
    let of_devices = checks[on_host..].iter().any(|check| check.grade == Grade::Crit);
    let exit = if of_devices { Exit::DeviceUnhealthy } else { Exit::Preflight };
    match critical {
        0 => Ok(()),
        1 => Err(Failure::msg(exit, "one critical finding")),
        _ => Err(Failure::msg(exit, format!("{critical} critical findings"))),
    }
}
