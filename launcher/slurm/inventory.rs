//! What a cluster offers, from `sinfo`; and the cluster file that says so.

use std::collections::BTreeSet;
use std::time::Duration;

use super::client::{self, BRIEF, PATIENCE, Request, arguments};
use super::parse::{config_value, format_time, time_limit};
use crate::report::Outcome;

/// Format for `sinfo -h -o`.
const SINFO_FORMAT: &str = "%P|%a|%l|%D|%G|%c|%f|%T";

/// Nodes of one kind in a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nodes {
    pub partition: String,
    /// Jobs that name no partition go here.
    pub is_default: bool,
    pub is_up: bool,
    /// Longest time limit; `None` is without end.
    pub max_time: Option<Duration>,
    /// Nodes that run jobs now or could: not those that are down, drained or reserved.
    pub count: usize,
    pub gpus: Option<Gpus>,
    pub cpus: usize,
    /// What administrators say about them.
    pub features: String,
}

/// The devices of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpus {
    /// As Slurm calls it, such as `h100`.
    pub kind: Option<String>,
    pub count: usize,
}

/// What Slurm here says about its partitions.
///
/// # Errors
/// It does not answer.
pub fn ask() -> Outcome<Vec<Nodes>> {
    let answer = client::ask("sinfo", &arguments(["-h", "-o", SINFO_FORMAT]), &Request::within(PATIENCE))?;
    Ok(nodes(&answer.stdout))
}

/// What else a cluster file says about a site.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Habits {
    /// Of the user, where there is accounting.
    pub account: Option<String>,
    pub has_accounting: bool,
    /// Jobs get as much memory as they ask for, and little when they do not.
    pub manages_memory: bool,
}

impl Habits {
    /// What `scontrol show config` and sacctmgr say.
    ///
    /// # Errors
    /// Slurm does not answer.
    pub fn ask(user: &str) -> Outcome<Self> {
        let config = client::ask("scontrol", &arguments(["show", "config"]), &Request::within(PATIENCE))?;
        let habits = Self::of_config(&config.stdout);
        let account = habits.has_accounting.then(|| {
            let user = format!("name={user}");
            let words = arguments(["--noheader", "--parsable2", "show", "user", &user, "format=DefaultAccount"]);
            // A site may keep users from asking.
            let answer = client::ask("sacctmgr", &words, &Request::within(BRIEF)).ok()?;
            answer.stdout.lines().next().map(str::trim).filter(|account| !account.is_empty()).map(str::to_owned)
        });
        Ok(Self { account: account.flatten(), ..habits })
    }

    fn of_config(text: &str) -> Self {
        let value = |key: &str| config_value(text, key).unwrap_or_default();
        Self {
            account: None,
            has_accounting: value("AccountingStorageType") == "accounting_storage/slurmdbd",
            manages_memory: value("SelectTypeParameters").to_uppercase().contains("MEMORY"),
        }
    }
}

/// All lines of `sinfo`, one a partition and kind of node; those of another shape are left out.
fn nodes(text: &str) -> Vec<Nodes> {
    let mut nodes: Vec<Nodes> = Vec::new();
    for line in text.lines().filter_map(line) {
        // It prints a line a state.
        let same = |known: &&mut Nodes| Nodes { count: line.count, ..(*known).clone() } == line;
        match nodes.iter_mut().find(same) {
            Some(known) => known.count += line.count,
            None => nodes.push(line),
        }
    }
    nodes
}

fn line(line: &str) -> Option<Nodes> {
    let fields: Vec<&str> = line.split('|').map(str::trim).collect();
    let &[partition, available, limit, count, gres, cpus, features, state] = fields.as_slice() else { return None };
    // sinfo marks numbers that differ between nodes with a plus sign.
    let number = |text: &str| text.trim_end_matches('+').parse::<usize>().ok();
    // A star says that a node does not answer.
    let usable = ["idle", "alloc", "mix", "comp", "plan", "power"].iter().any(|word| state.starts_with(word));
    let usable = usable && !state.ends_with('*');
    let count = number(count)?;
    Some(Nodes {
        partition: partition.trim_end_matches('*').to_owned(),
        is_default: partition.ends_with('*'),
        is_up: available == "up",
        max_time: time_limit(limit),
        count: if usable { count } else { 0 },
        gpus: gpus(gres),
        cpus: number(cpus)?,
        features: features.trim_start_matches("(null)").to_owned(),
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
pub fn cluster_file(nodes: &[Nodes], chosen: &Nodes, habits: &Habits) -> String {
    let quoted = |text: &str| toml::Value::from(text).to_string();
    let mut text = format!(
        "schema = 1\ndescription = {}\n\n[login]\n# run_root = \"/a/folder/that/all/nodes/see\"\n\n[slurm]\n{}\npartition = {}\n",
        quoted(&format!("Written from what sinfo reports about partition {}", chosen.partition)),
        habits.account.as_ref().map_or_else(|| "# account = \"\"".into(), |name| format!("account = {}", quoted(name))),
        quoted(&chosen.partition),
    );
    let usual = Duration::from_secs(4 * 3600);
    text += &format!("time = \"{}\"\n", format_time(chosen.max_time.map_or(usual, |most| most.min(usual))));
    let mut quirks = String::new();
    if !habits.has_accounting {
        quirks += "sacct = false\n";
    }
    if habits.manages_memory {
        quirks += "mem = \"0\"    # all of a node's\n";
    }
    if let Some(Gpus { kind, count }) = &chosen.gpus {
        if let Some(kind) = kind {
            quirks += &format!("gres_type = {}\n", quoted(kind));
        }
        quirks += &format!("cpus_per_task = {}\n", (chosen.cpus / (*count).max(1)).max(1));
    }
    if !quirks.is_empty() {
        text += &format!("\n[slurm.quirks]\n{quirks}");
    }
    if let Some(Gpus { count, .. }) = &chosen.gpus {
        text += &format!("\n[hardware]\ngpus_per_node = {}\n", (*count).max(1));
        text += "\n[fabric]\n# preset = \"ib\"         # or roce, efa, azure-ib, gcp-tcpxo, oci-roce, socket, …\n# interface = \"bond0\"   # on which nodes find each other, if not by their names\n";
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

    const SINFO: &str = "batch*|up|infinite|1|gpu:h100:8|112|hopper|idle\nbatch*|up|infinite|1|gpu:h100:8|112|hopper|allocated\n\
                         batch*|up|infinite|1|gpu:h100:8|112|hopper|down*\nbatch*|up|infinite|1|gpu:h200:8(S:0-1)|112+|(null)|idle\n\
                         h200|up|1-00:00:00|1|gpu:h200:8(S:0-1)|112|(null)|mixed\ncpu|down|2:00:00|4|(null)|64||idle\nbroken line\n";

    #[test]
    fn nodes_are_those_that_sinfo_lists() {
        let nodes = nodes(SINFO);
        assert_eq!(nodes.len(), 4);
        let h100 = Some(Gpus { kind: Some("h100".into()), count: 8 });
        assert_eq!((nodes[0].partition.as_str(), nodes[0].is_default, &nodes[0].gpus), ("batch", true, &h100));
        assert_eq!((nodes[0].count, nodes[0].features.as_str(), nodes[1].features.as_str()), (2, "hopper", ""));
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
        let config =
            "AccountingStorageType   = accounting_storage/slurmdbd\nSelectTypeParameters    = CR_CORE_MEMORY\n";
        let habits = Habits { account: Some("proj".into()), ..Habits::of_config(config) };
        for (partition, habits) in [("batch", &habits), ("h200", &Habits::default()), ("cpu", &habits)] {
            let text = cluster_file(&nodes, choose(&nodes, Some(partition)).unwrap(), habits);
            let document = Document { label: "site".into(), folder: None, text };
            let settings = Settings::of_cluster("site", &document, &Environment::default()).unwrap();
            assert_eq!(settings.text("slurm.partition"), Some(partition));
            assert_eq!(settings.text("slurm.account"), habits.account.as_deref());
            assert_eq!(settings.text("slurm.quirks.mem"), habits.manages_memory.then_some("0"));
            assert_eq!(settings.source("slurm.quirks.sacct").is_some(), !habits.has_accounting);
            assert_eq!(settings.texts("limits.partitions"), ["batch", "cpu", "h200"]);
            assert_eq!(settings.count("hardware.gpus_per_node"), (partition != "cpu").then_some(8));
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_survived(text in "\\PC{0,60}|[a-z0-9|*:,()=\\n]{0,80}") {
            let nodes = nodes(&text);
            let _ = (choose(&nodes, None), Habits::of_config(&text), gpus(&text));
        }
    }
}
