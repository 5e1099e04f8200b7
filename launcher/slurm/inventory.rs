//! What a cluster offers, from `sinfo`; and the cluster file that says so.

use std::collections::BTreeSet;
use std::time::Duration;

use super::parse::{format_time, time_limit};

/// Format for `sinfo -h -o`.
pub const SINFO_FORMAT: &str = "%P|%a|%l|%D|%G|%c|%m";

/// Nodes of one kind in a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nodes {
    pub partition: String,
    /// Jobs that name no partition go here.
    pub is_default: bool,
    pub is_up: bool,
    /// Longest time limit; `None` is without end.
    pub max_time: Option<Duration>,
    pub count: usize,
    pub gpus: Option<Gpus>,
    pub cpus: usize,
}

/// The devices of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpus {
    /// As Slurm calls it, such as `h100`.
    pub kind: Option<String>,
    pub count: usize,
}

/// All lines of `sinfo`; those of another shape are left out.
pub fn nodes(text: &str) -> Vec<Nodes> {
    text.lines().filter_map(line).collect()
}

fn line(line: &str) -> Option<Nodes> {
    let fields: Vec<&str> = line.split('|').map(str::trim).collect();
    let &[partition, available, limit, count, gres, cpus, _] = fields.as_slice() else { return None };
    // sinfo marks numbers that differ between nodes with a plus sign.
    let number = |text: &str| text.trim_end_matches('+').parse::<usize>().ok();
    Some(Nodes {
        partition: partition.trim_end_matches('*').to_owned(),
        is_default: partition.ends_with('*'),
        is_up: available == "up",
        max_time: time_limit(limit),
        count: number(count)?,
        gpus: gpus(gres),
        cpus: number(cpus)?,
    })
}

/// `gpu:h100:8(S:0-1)`, `gpu:8`, or several of them with other things between commas.
fn gpus(gres: &str) -> Option<Gpus> {
    gres.split(',').find_map(|item| {
        let parts: Vec<&str> = item.trim().split('(').next()?.split(':').collect();
        match parts.as_slice() {
            ["gpu", kind, count] => Some(Gpus { kind: Some((*kind).to_owned()), count: count.parse().ok()? }),
            ["gpu", count] => Some(Gpus { kind: None, count: count.parse().ok()? }),
            _ => None,
        }
    })
}

/// The partition that a cluster file is best written for: the one that is asked for, else the default one if it has devices, else
/// the one with the most devices, else the default one.
pub fn choose<'a>(nodes: &'a [Nodes], partition: Option<&str>) -> Option<&'a Nodes> {
    let devices = |nodes: &Nodes| nodes.gpus.as_ref().map_or(0, |gpus| gpus.count.saturating_mul(nodes.count));
    let candidates = nodes.iter().filter(|nodes| partition.is_none_or(|name| nodes.partition == name));
    candidates
        .max_by_key(|nodes| (nodes.is_up, nodes.is_default && devices(nodes) > 0, devices(nodes), nodes.is_default))
}

/// A cluster file for those nodes.
pub fn cluster_file(nodes: &[Nodes], chosen: &Nodes) -> String {
    let quoted = |text: &str| toml::Value::from(text).to_string();
    let mut text = format!(
        "schema = 1\ndescription = {}\n\n[login]\n# run_root = \"/a/folder/that/all/nodes/see\"\n\n[slurm]\n# account = \"\"\npartition = {}\n",
        quoted(&format!("Written from what sinfo reports about partition {}", chosen.partition)),
        quoted(&chosen.partition),
    );
    let usual = Duration::from_secs(4 * 3600);
    text += &format!("time = \"{}\"\n", format_time(chosen.max_time.map_or(usual, |most| most.min(usual))));
    if let Some(Gpus { kind, count }) = &chosen.gpus {
        text += "\n[slurm.quirks]\n";
        if let Some(kind) = kind {
            text += &format!("gres_type = {}\n", quoted(kind));
        }
        text += &format!("cpus_per_task = {}\n", (chosen.cpus / (*count).max(1)).max(1));
        text += &format!("\n[hardware]\ngpus_per_node = {}\n", (*count).max(1));
        text += "\n[fabric]\n# preset = \"ib\"    # or roce, efa, socket, …: see `nemotron clusters list`\n";
    }
    let partitions: BTreeSet<&str> = nodes.iter().map(|nodes| nodes.partition.as_str()).collect();
    let partitions: Vec<String> = partitions.into_iter().map(quoted).collect();
    text += &format!("\n[limits]\npartitions = [{}]\n", partitions.join(", "));
    if let Some(most) = chosen.max_time {
        text += &format!("max_time = \"{}\"\n", format_time(most));
    }
    text
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::config_file::Document;
    use crate::env::Environment;
    use crate::settings::Settings;

    const SINFO: &str = "batch*|up|infinite|2|gpu:h100:8|112|2000000\nbatch*|up|infinite|1|gpu:h200:8(S:0-1)|112+|2000000\n\
                         h200|up|1-00:00:00|1|gpu:h200:8(S:0-1)|112|2000000+\ncpu|down|2:00:00|4|(null)|64|256000\nbroken line\n";

    #[test]
    fn nodes_are_those_that_sinfo_lists() {
        let nodes = nodes(SINFO);
        assert_eq!(nodes.len(), 4);
        let h100 = Some(Gpus { kind: Some("h100".into()), count: 8 });
        assert_eq!((nodes[0].partition.as_str(), nodes[0].is_default, &nodes[0].gpus), ("batch", true, &h100));
        assert_eq!((nodes[1].cpus, nodes[2].max_time), (112, Some(Duration::from_secs(86_400))));
        assert_eq!((nodes[3].is_up, &nodes[3].gpus), (false, &None));
        assert_eq!(gpus("craynetwork:4,gpu:a100:4(S:0,1)"), Some(Gpus { kind: Some("a100".into()), count: 4 }));
        assert_eq!(gpus("gpu:8"), Some(Gpus { kind: None, count: 8 }));
    }

    #[test]
    fn the_partition_with_devices_is_chosen() {
        let nodes = nodes(SINFO);
        let chosen = |name| choose(&nodes, name).map(|nodes| (nodes.partition.as_str(), nodes.count));
        assert_eq!(chosen(None), Some(("batch", 2)));
        assert_eq!(chosen(Some("cpu")), Some(("cpu", 4)));
        assert_eq!(chosen(Some("nothing")), None);
    }

    #[test]
    fn the_file_is_a_cluster_file() {
        let nodes = nodes(SINFO);
        for partition in ["batch", "h200", "cpu"] {
            let text = cluster_file(&nodes, choose(&nodes, Some(partition)).unwrap());
            let document = Document { label: "site".into(), folder: None, text };
            let settings = Settings::of_cluster("site", &document, &Environment::default()).unwrap();
            assert_eq!(settings.text("slurm.partition"), Some(partition));
            assert_eq!(settings.texts("limits.partitions"), ["batch", "cpu", "h200"]);
            assert_eq!(settings.count("hardware.gpus_per_node"), (partition != "cpu").then_some(8));
        }
    }
}
