//! The devices of a run, and how its ranks lie on them.

use nemotron_engine::config::Mesh;
use nemotron_engine::rank::Device;
use serde::Serialize;

use crate::cluster::LOCAL;
use crate::host::Host;
use crate::report::{Exit, Failure, Outcome};
use crate::settings::Settings;

pub const GIB: f64 = (1_u64 << 30) as f64;

/// The devices of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Hardware {
    #[serde(skip)]
    pub device: Device,
    /// Name of the device, for people.
    pub name: String,
    pub nodes: usize,
    /// Devices, and ranks, of one host.
    pub devices_per_node: usize,
    /// That one rank can use.
    pub memory_bytes: u64,
    /// Bytes/s that one device reads from its memory; unknown for CPUs.
    pub bandwidth: Option<f64>,
    /// Dense operations/s of one device.
    pub flops: Option<f64>,
    /// Bytes/s that one host reads from the checkpoint's storage.
    pub read_rate: f64,
}

/// How the ranks lie on the devices.
///
/// Devices and mesh must agree. Where only one of them was asked for, the other follows: `pp=1` on two hosts of 8 uses one host, and
/// `nodes=1` on a profile of TP8 × PP2 makes it PP1.
///
/// # Errors
/// They cannot agree.
pub fn layout(settings: &Settings, device: Device) -> Outcome<(Mesh, usize, usize)> {
    let count = |key| settings.count(key).unwrap_or(1);
    let mut mesh = Mesh { tp: count("mesh.tp"), pp: count("mesh.pp") };
    let (mut nodes, mut per_node) = (count("hardware.nodes"), count("hardware.devices_per_node"));
    let world = mesh.tp.saturating_mul(mesh.pp);
    let asked = |key| settings.is_requested(key);
    let on_this_machine = settings.text("cluster").is_none_or(|cluster| cluster == LOCAL);
    if device == Device::Cpu && (on_this_machine || nodes == 1) {
        if nodes > 1 && settings.is_requested("hardware.nodes") {
            return Err(Failure::msg(Exit::Usage, "device cpu runs on one host"));
        }
        return Ok((mesh, 1, world));
    }
    if let Some(most) = settings.count("hardware.gpus_per_node").filter(|most| per_node > *most) {
        let keys = ["mesh.tp", "mesh.pp", "hardware.nodes", "hardware.devices_per_node"];
        if keys.into_iter().any(asked) || !world.is_multiple_of(most) {
            let message = format!("the run wants {per_node} devices of one node, the cluster's nodes have {most}");
            return Err(Failure::msg(Exit::DoesNotFit, message).hint(format!("set devices_per_node={most}")));
        }
        // A tensor-parallel group stays on one node.
        (nodes, per_node) = (world / most, most);
        mesh.tp = mesh.tp.min(most);
        mesh.pp = world / mesh.tp;
    }
    let devices = nodes.saturating_mul(per_node);
    if world == devices {
        return Ok((mesh, nodes, per_node));
    }
    if !asked("hardware.nodes") && !asked("hardware.devices_per_node") {
        if world <= per_node {
            return Ok((mesh, 1, world));
        }
        if world < devices && world.is_multiple_of(per_node) {
            return Ok((mesh, world / per_node, per_node));
        }
    } else {
        if !asked("mesh.tp") && !asked("mesh.pp") {
            mesh.tp = mesh.tp.min(devices);
        } else if !asked("mesh.tp") && devices.is_multiple_of(mesh.pp) {
            mesh.tp = devices / mesh.pp;
        }
        if !asked("mesh.pp") && devices.is_multiple_of(mesh.tp) {
            mesh.pp = devices / mesh.tp;
        }
        if mesh.tp.saturating_mul(mesh.pp) == devices {
            return Ok((mesh, nodes, per_node));
        }
    }
    let Mesh { tp, pp } = mesh;
    let needed = tp.saturating_mul(pp);
    let message = format!("TP{tp} x PP{pp} needs {needed} devices, but there are {nodes} x {per_node} = {devices}");
    Err(Failure::msg(Exit::DoesNotFit, message).hint("set tp, pp, nodes and devices_per_node so that they agree"))
}

/// What settings say about the hardware, and how the model is laid out on it.
///
/// # Errors
/// The layout is impossible, or the profile does not say how much memory a device has.
pub fn hardware(settings: &Settings, host: &Host) -> Outcome<(Mesh, Hardware)> {
    let device = match settings.text("device") {
        Some("cuda") => Device::Cuda,
        _ => Device::Cpu,
    };
    let (mesh, nodes, devices_per_node) = layout(settings, device)?;
    let read_rate = settings.number("storage.read_gib_s").unwrap_or(2.0) * GIB;
    let hardware = match device {
        Device::Cpu => Hardware {
            device,
            name: "cpu".into(),
            nodes,
            devices_per_node,
            memory_bytes: host.available_bytes / devices_per_node.max(1) as u64,
            bandwidth: None,
            flops: None,
            read_rate,
        },
        Device::Cuda => {
            let profile = settings.text("profile").unwrap_or_default();
            let memory_gib = settings.number("hardware.memory_gib").ok_or_else(|| {
                Failure::msg(Exit::Usage, format!("profile {profile} describes no CUDA device"))
                    .hint("choose a profile with one, or set hardware.memory_gib")
            })?;
            Hardware {
                device,
                name: settings.text("hardware.name").unwrap_or("cuda").into(),
                nodes,
                devices_per_node,
                memory_bytes: (memory_gib * GIB) as u64,
                bandwidth: settings.number("hardware.bandwidth_gb_s").map(|rate| rate * 1e9),
                flops: settings.number("hardware.tflops").map(|rate| rate * 1e12),
                read_rate,
            }
        }
    };
    Ok((mesh, hardware))
}
