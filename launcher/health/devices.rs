//! NVIDIA devices as NVML sees them: present, free, whole, and able to reach each other. NVML comes with the driver and is loaded at run time.
//!
//! NVML counts the devices that the process may see, whatever `CUDA_VISIBLE_DEVICES` says; [`Selector`] is the way from one to the other.

use std::time::{Duration, Instant};

use nemotron_engine::checkpoint;
use nemotron_engine::memory::rank_memory;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError, P2pCapabilitiesIndex, P2pStatus};
use nvml_wrapper::enums::device::SampleValue;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::{Device, Nvml};

use super::{Check, Grade, Wants, require};
use crate::hardware::GIB;
use crate::process::hostname;
use crate::report::{Exit, Failure, Outcome};
use crate::spec::RunSpec;

/// The oldest compute capability that the kernels are compiled for.
const CAPABILITY: (i32, i32) = (8, 0);
/// Rows that a device may have remapped before it is due for replacement (Azure's node health checks).
const REMAPPED_ROWS: u64 = 512;
/// The share of the planned memory that must be free: the driver's own part differs a little between versions.
const FREE_SHARE: f64 = 0.98;
/// How long a job that ended a moment ago may take to give its memory back.
const RELEASE: Duration = Duration::from_secs(60);
/// `NVML_FI_DEV_REMAPPED_UNC`, `_PENDING` and `_FAILURE`: fields of A100 and later.
const REMAPPED: [FieldId; 3] = [FieldId(143), FieldId(144), FieldId(145)];
/// Xid errors after which the device or its link is lost for this process: AWS's and Azure's health checks agree on these. Others follow
/// from an error of the program (13, 31, 43, 45, 94) and show as such.
const FATAL_XIDS: [u64; 14] = [48, 62, 64, 65, 68, 69, 73, 74, 79, 80, 81, 95, 119, 120];

/// What NVML tells about one device; `None` where the device or the driver does not tell.
#[derive(Clone, Debug, Default, PartialEq)]
struct Facts {
    index: u32,
    name: String,
    capability: Option<(i32, i32)>,
    total_bytes: u64,
    free_bytes: u64,
    /// Processes that compute on it.
    processes: Vec<u32>,
    /// Uncorrected ECC errors since the driver was loaded.
    uncorrected: Option<u64>,
    remapped: Option<Remapped>,
    throttle: Option<ThrottleReasons>,
}

/// Rows of the memory that were replaced by spare ones.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Remapped {
    /// For uncorrectable errors.
    rows: u64,
    /// One waits for a reset.
    is_pending: bool,
    /// There was no spare one.
    has_failed: bool,
}

impl Facts {
    fn of(device: &Device) -> Result<Self, NvmlError> {
        let memory = device.memory_info()?;
        let remapped = device.field_values_for(&REMAPPED).ok().and_then(|fields| {
            let value = |index: usize| match fields.get(index)?.as_ref().ok()?.value.as_ref().ok()? {
                SampleValue::U32(value) => Some(u64::from(*value)),
                SampleValue::U64(value) => Some(*value),
                _ => None,
            };
            Some(Remapped { rows: value(0)?, is_pending: value(1)? != 0, has_failed: value(2)? != 0 })
        });
        Ok(Self {
            index: device.index()?,
            name: device.name()?,
            capability: device.cuda_compute_capability().ok().map(|version| (version.major, version.minor)),
            total_bytes: memory.total,
            free_bytes: memory.free,
            processes: device
                .running_compute_processes()
                .map(|processes| processes.iter().map(|process| process.pid).collect())
                .unwrap_or_default(),
            uncorrected: device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile).ok(),
            remapped,
            throttle: device.current_throttle_reasons().ok(),
        })
    }
}

/// The findings on one device; `wanted_bytes` is what a rank's plan counts on.
fn grade(facts: &Facts, wanted_bytes: u64) -> Vec<Check> {
    let name = format!("device {}", facts.index);
    let mut checks = Vec::new();
    if let Some((major, minor)) = facts.capability
        && (major, minor) < CAPABILITY
    {
        let found = format!("{} has compute capability {major}.{minor}", facts.name);
        checks.push(
            Check::new(&name, Grade::Crit, found)
                .cure(format!("devices from {}.{} on (A100, H100, H200) are supported", CAPABILITY.0, CAPABILITY.1)),
        );
    }
    let gib = |bytes: u64| bytes as f64 / GIB;
    if (facts.free_bytes as f64) < wanted_bytes as f64 * FREE_SHARE {
        let who = match facts.processes.as_slice() {
            [] => "no process that can be seen here holds it".into(),
            pids => format!("processes {pids:?} compute on it"),
        };
        let found = format!(
            "{} has {:.1} of {:.1} GiB free, the plan counts on {:.1} GiB; {who}",
            facts.name,
            gib(facts.free_bytes),
            gib(facts.total_bytes),
            gib(wanted_bytes)
        );
        checks.push(
            Check::new(&name, Grade::Crit, found)
                .cure("exclude the node (slurm.exclude) and tell its admins, or choose a profile of smaller devices"),
        );
    } else if !facts.processes.is_empty() {
        let found = format!("processes {:?} compute on {}", facts.processes, facts.name);
        checks.push(Check::new(&name, Grade::Warn, found).cure("ask for whole nodes: slurm.exclusive = true"));
    }
    if let Some(errors) = facts.uncorrected.filter(|errors| *errors > 0) {
        let found = format!("{errors} uncorrected ECC errors since the driver was loaded");
        checks.push(Check::new(&name, Grade::Crit, found).cure("exclude the node; its admins reset or replace it"));
    }
    if let Some(remapped) = facts.remapped {
        let cure = "exclude the node; its admins reset or replace the device";
        if remapped.has_failed || remapped.is_pending {
            let what = if remapped.has_failed { "failed" } else { "waits for a reset" };
            checks.push(Check::new(&name, Grade::Crit, format!("remapping of a memory row {what}")).cure(cure));
        } else if remapped.rows > REMAPPED_ROWS {
            checks.push(
                Check::new(&name, Grade::Crit, format!("{} memory rows were remapped", remapped.rows)).cure(cure),
            );
        }
    }
    let brakes = ThrottleReasons::HW_SLOWDOWN
        | ThrottleReasons::HW_THERMAL_SLOWDOWN
        | ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN
        | ThrottleReasons::SW_THERMAL_SLOWDOWN;
    if let Some(reasons) = facts.throttle.map(|reasons| reasons & brakes).filter(|reasons| !reasons.is_empty()) {
        let names: Vec<&str> = reasons.iter_names().map(|(name, _)| name).collect();
        let found = format!("clocks are held down: {}", names.join(", "));
        checks.push(Check::new(&name, Grade::Warn, found).cure("cooling or power of the node: tell its admins"));
    }
    if checks.is_empty() {
        let (free, total) = (gib(facts.free_bytes), gib(facts.total_bytes));
        checks.push(Check::ok(&name, format!("{}, {free:.1} of {total:.1} GiB free", facts.name)));
    }
    checks
}

/// All findings on the devices of this host. Without a driver that is one finding, critical only if devices are wanted.
pub(crate) fn checks(wants: &Wants) -> Vec<Check> {
    let nvml = match Nvml::init() {
        Ok(nvml) => nvml,
        Err(error) => return vec![no_driver(&error, wants)],
    };
    look(&nvml, wants).unwrap_or_else(|error| vec![failed(&error)])
}

fn look(nvml: &Nvml, wants: &Wants) -> Result<Vec<Check>, NvmlError> {
    let cuda = nvml.sys_cuda_driver_version()?;
    let driver = format!("{} (CUDA {}.{})", nvml.sys_driver_version()?, cuda / 1000, cuda % 1000 / 10);
    let mut checks = vec![Check::ok("driver", driver)];
    let devices = (0..nvml.device_count()?).map(|index| nvml.device_by_index(index));
    let devices = devices.collect::<Result<Vec<_>, _>>()?;
    let (wanted, bytes) = wants.devices.unwrap_or((0, 0));
    let found = format!("{} devices", devices.len());
    checks.push(match wants.devices {
        None => Check::ok("devices", found),
        Some(_) => Check::graded(
            "devices",
            devices.len() >= wanted,
            Grade::Crit,
            format!("{found}, {wanted} wanted"),
            "ask Slurm for all devices of a node: slurm.gpus_per_node or slurm.gres, with --gpu-bind=none",
        ),
    });
    for device in &devices {
        checks.extend(grade(&Facts::of(device)?, bytes));
    }
    if devices.len() > 1 {
        checks.push(peers(&devices));
    }
    Ok(checks)
}

/// Whether each device reads the memory of each other one. The all-reduce over peer memory needs it; NCCL goes a slower way without.
fn peers(devices: &[Device]) -> Check {
    let apart = devices.iter().enumerate().find_map(|(index, first)| {
        let reaches = |second: &Device| {
            !matches!(first.p2p_status(second, P2pCapabilitiesIndex::Read), Ok(status) if status != P2pStatus::Ok)
        };
        let second = (index + 1..devices.len()).find(|second| !reaches(&devices[*second]))?;
        Some((index, second))
    });
    match apart {
        None => Check::ok("peer access", format!("all {} devices reach each other", devices.len())),
        Some((first, second)) => {
            Check::new("peer access", Grade::Warn, format!("devices {first} and {second} do not reach each other"))
                .cure("collectives are slow without NVLink; in a virtual machine, ask for NVSwitch passthrough")
        }
    }
}

fn no_driver(error: &NvmlError, wants: &Wants) -> Check {
    let absent = matches!(error, NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound);
    let found = if absent { "no NVIDIA driver (libnvidia-ml.so.1 was not found)".into() } else { error.to_string() };
    match wants.devices {
        None => Check::new("driver", Grade::Skip, found),
        Some(_) => Check::new("driver", Grade::Crit, found)
            .cure("run it on a node with devices (in a container: with --nv, or NVIDIA's container tools), or use --profile cpu"),
    }
}

fn failed(error: &NvmlError) -> Check {
    Check::new("devices", Grade::Crit, format!("NVML: {error}"))
        .cure("a device that fell off the bus comes back with a reboot: exclude the node")
}

/// How `CUDA_VISIBLE_DEVICES` names the device of an ordinal.
#[derive(Debug, PartialEq, Eq)]
enum Selector<'a> {
    Index(u32),
    /// `GPU-…`, or the beginning of one.
    Uuid(&'a str),
}

/// The device that CUDA calls `ordinal`; `None` if it hides it.
fn select(visible: Option<&str>, ordinal: usize) -> Option<Selector<'_>> {
    let Some(visible) = visible else { return Some(Selector::Index(u32::try_from(ordinal).ok()?)) };
    let name = visible.split(',').nth(ordinal)?.trim();
    match name.parse() {
        Ok(index) => Some(Selector::Index(index)),
        Err(_) if name.starts_with("GPU-") => Some(Selector::Uuid(name)),
        Err(_) => None,
    }
}

fn device<'a>(nvml: &'a Nvml, visible: Option<&str>, ordinal: usize) -> Result<Device<'a>, NvmlError> {
    match select(visible, ordinal).ok_or(NvmlError::NotFound)? {
        Selector::Index(index) => nvml.device_by_index(index),
        Selector::Uuid(uuid) => nvml.device_by_uuid(uuid),
    }
}

/// That the device of one rank is fit to hold what the rank allocates. Memory that a job before has not given back yet is waited for.
///
/// # Errors
/// It is not: host, device, what was found, and what to do.
pub(crate) fn of_rank(spec: &RunSpec, rank: usize, visible: Option<&str>) -> Outcome {
    let config = checkpoint::open(&spec.model)?.config().clone();
    let memory = rank_memory(&config, spec.mesh, rank, spec.dtype, spec.device, &spec.limits);
    let kv_tokens = (spec.limits.num_pages * spec.limits.page_tokens) as u64;
    let wanted_bytes = memory.fixed() + memory.kv_bytes_per_token * kv_tokens;
    let ordinal = spec.local_rank(rank);
    let wants = Wants { devices: Some((1, wanted_bytes)), ranks: 1 };
    let nvml = match Nvml::init() {
        Ok(nvml) => nvml,
        Err(error) => return require(&[no_driver(&error, &wants)], Exit::DeviceUnhealthy),
    };
    let begun = Instant::now();
    loop {
        let checks = match device(&nvml, visible, ordinal).and_then(|device| Facts::of(&device)) {
            Ok(facts) if (facts.free_bytes as f64) < wanted_bytes as f64 * FREE_SHARE && begun.elapsed() < RELEASE => {
                tracing::info!(device = facts.index, free_bytes = facts.free_bytes, "waiting for device memory");
                std::thread::sleep(Duration::from_secs(1));
                continue;
            }
            Ok(facts) => grade(&facts, wanted_bytes),
            Err(NvmlError::NotFound) => {
                let found = format!("there is no device {ordinal} (CUDA_VISIBLE_DEVICES is {visible:?})");
                vec![Check::new("devices", Grade::Crit, found).cure("start ranks with --gpu-bind=none")]
            }
            Err(error) => vec![failed(&error)],
        };
        for check in checks.iter().filter(|check| check.grade == Grade::Warn) {
            tracing::warn!(name = check.name, "{}", check.found);
        }
        return require(&checks, Exit::DeviceUnhealthy);
    }
}

/// Waits for the driver to report that the device is lost; ends with why, or `None` where the driver tells nothing.
///
/// Blocks for ever on a healthy device: for a thread of its own.
pub(crate) fn watch(ordinal: usize, visible: Option<&str>) -> Option<Failure> {
    let nvml = Nvml::init().ok()?;
    let device = device(&nvml, visible, ordinal).ok()?;
    let events = device.register_events(EventTypes::CRITICAL_XID_ERROR, nvml.create_event_set().ok()?).ok()?;
    loop {
        match events.wait(60_000) {
            Ok(event) => match event.event_data {
                Some(XidError::Value(xid)) if FATAL_XIDS.contains(&xid) => {
                    let message = format!("{}: device {ordinal}: Xid {xid}", hostname());
                    return Some(
                        Failure::msg(Exit::DeviceUnhealthy, message)
                            .hint("the node is excluded from the next attempt; tell its admins"),
                    );
                }
                xid => tracing::warn!(ordinal, ?xid, "the driver reports an error of the device"),
            },
            Err(NvmlError::Timeout) => {}
            Err(error) => {
                tracing::warn!(%error, "the device is not watched any more");
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn healthy() -> Facts {
        Facts {
            name: "NVIDIA H100 80GB HBM3".into(),
            capability: Some((9, 0)),
            total_bytes: 80 << 30,
            free_bytes: 79 << 30,
            uncorrected: Some(0),
            remapped: Some(Remapped::default()),
            throttle: Some(ThrottleReasons::GPU_IDLE),
            ..Facts::default()
        }
    }

    fn worst(facts: &Facts) -> Grade {
        grade(facts, 78 << 30).iter().map(|check| check.grade).max().unwrap_or(Grade::Skip)
    }

    #[test]
    fn each_defect_has_its_grade() {
        assert_eq!(worst(&healthy()), Grade::Ok);
        let remapped = |rows, is_pending, has_failed| Some(Remapped { rows, is_pending, has_failed });
        for (facts, expected) in [
            (Facts { free_bytes: 40 << 30, ..healthy() }, Grade::Crit),
            (Facts { capability: Some((7, 0)), ..healthy() }, Grade::Crit),
            (Facts { uncorrected: Some(1), ..healthy() }, Grade::Crit),
            (Facts { remapped: remapped(2, false, false), ..healthy() }, Grade::Ok),
            (Facts { remapped: remapped(513, false, false), ..healthy() }, Grade::Crit),
            (Facts { remapped: remapped(1, true, false), ..healthy() }, Grade::Crit),
            (Facts { remapped: remapped(1, false, true), ..healthy() }, Grade::Crit),
            (Facts { throttle: Some(ThrottleReasons::HW_THERMAL_SLOWDOWN), ..healthy() }, Grade::Warn),
            (Facts { processes: vec![4711], ..healthy() }, Grade::Warn),
            (Facts { uncorrected: None, remapped: None, throttle: None, ..healthy() }, Grade::Ok),
        ] {
            assert_eq!(worst(&facts), expected, "{facts:?}");
        }
    }

    #[test]
    fn whoever_holds_the_memory_is_named() {
        let checks = grade(&Facts { free_bytes: 1 << 30, processes: vec![17, 23], ..healthy() }, 78 << 30);
        assert!(checks[0].found.contains("1.0 of 80.0 GiB") && checks[0].found.contains("[17, 23]"), "{checks:?}");
    }

    #[test]
    fn cuda_names_devices_by_index_or_uuid() {
        assert_eq!(select(None, 3), Some(Selector::Index(3)));
        assert_eq!(select(Some("4,5"), 1), Some(Selector::Index(5)));
        assert_eq!(select(Some("GPU-1a, GPU-2b"), 1), Some(Selector::Uuid("GPU-2b")));
        assert_eq!(select(Some("4,5"), 2), None);
        assert_eq!(select(Some("-1"), 0), None);
    }
}
