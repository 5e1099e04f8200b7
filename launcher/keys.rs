//! The configuration keys: one table for profiles, cluster files, the `[launch]` table of job files, the environment, flags and `--set`.

use toml::Value;

use crate::slurm::parse::time_limit;

/// A configuration key.
#[derive(Debug)]
pub struct Key {
    /// Dotted, as in TOML.
    pub name: &'static str,
    /// Accepted in place of the dotted name; the flag bears it too, with `-` for `_`.
    pub short: Option<&'static str>,
    pub kind: Kind,
    /// What holds when no layer sets it, for people.
    pub default: &'static str,
    pub doc: &'static str,
}

/// What a key's value must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Text,
    /// A text; in a file, one with a `/` is relative to the file. `~/` is the home directory.
    Path,
    Flag,
    /// A whole number, at least 1.
    Count,
    Port,
    /// Finite and greater than 0.
    Number,
    /// Seconds as a number, or a text such as `90s`, `5m`, `2h`; kept as seconds.
    Duration,
    OneOf(&'static [&'static str]),
    /// A list of texts; as plain text, separated by commas.
    Texts,
    /// As `sbatch --time`: `90` minutes, `2:30:00`, `1-12`; kept as seconds.
    TimeLimit,
    /// A table whose names are free; each entry `name.ENTRY` is a text of its own.
    Entries,
}

const GPU_REQUESTS: &[&str] = &["gpus-per-node", "gres", "gpus-per-task", "none"];
const FROM_PROFILE: &str = "from the profile";

#[rustfmt::skip]
pub const KEYS: &[Key] = &[
    key("profile", None, Kind::Text, "cpu for serve and batch", "hardware profile"),
    key("cluster", None, Kind::Text, "local", "cluster that runs it"),
    key("description", None, Kind::Text, "none", "what a profile or cluster file describes"),
    key("model", None, Kind::Path, FROM_PROFILE, "checkpoint directory, `builtin`, or a known architecture to plan for"),
    key("device", None, Kind::OneOf(&["cpu", "cuda"]), FROM_PROFILE, "what computes"),
    key("dtype", None, Kind::OneOf(&["bf16", "f32"]), "bf16", "precision of matrix products and of the KV cache"),
    key("threads", None, Kind::Count, "cores / ranks", "threads of one CPU rank"),
    key("mesh.tp", Some("tp"), Kind::Count, FROM_PROFILE, "ranks that split every layer"),
    key("mesh.pp", Some("pp"), Kind::Count, FROM_PROFILE, "stages of layers"),
    key("hardware.nodes", Some("nodes"), Kind::Count, "1", "hosts"),
    key("hardware.devices_per_node", Some("devices_per_node"), Kind::Count, "1", "devices, and ranks, of one host"),
    key("hardware.name", None, Kind::Text, "none", "name of the device"),
    key("hardware.memory_gib", None, Kind::Number, "none", "usable memory of one device in GiB"),
    key("hardware.bandwidth_gb_s", None, Kind::Number, "none", "memory bandwidth of one device in GB/s"),
    key("hardware.tflops", None, Kind::Number, "none", "dense bf16 TFLOP/s of one device"),
    key("storage.read_gib_s", None, Kind::Number, "2", "what one host reads from the checkpoint's storage in GiB/s"),
    key("limits.page_tokens", Some("page_tokens"), Kind::Count, "16", "tokens of one page of the KV cache"),
    key("limits.kv_tokens", Some("kv_tokens"), Kind::Count, "what memory allows", "tokens that the KV cache holds"),
    key("limits.max_step_tokens", Some("max_step_tokens"), Kind::Count, "512", "tokens in one step at most"),
    key("limits.max_sequences", Some("max_sequences"), Kind::Count, "256", "sequences that run at the same time at most"),
    key("serve.host", Some("host"), Kind::Text, "127.0.0.1", "address to listen on"),
    key("serve.port", Some("port"), Kind::Port, "1424", "port to listen on; 0 lets the system choose"),
    key("serve.no_auth", Some("no_auth"), Kind::Flag, "false", "ask clients for no token"),
    key("serve.token_file", Some("token_file"), Kind::Path, "the run's own", "file that holds the clients' token"),
    key("serve.strict", Some("strict"), Kind::Flag, "false", "status 400 for invalid requests"),
    key("serve.idle_timeout", Some("idle_timeout"), Kind::Duration, "30m with Slurm, else 0: never", "a server without requests for so long ends"),
    key("continue.retries", Some("retries"), Kind::Count, "none", "starts after failures that another start may cure; free ones are not counted"),
    key("continue.chain", Some("chain"), Kind::Count, "none", "jobs of Slurm that may follow one whose time is over"),
    key("slurm.account", Some("account"), Kind::Text, "none", "account that is charged"),
    key("slurm.partition", Some("partition"), Kind::Text, "Slurm's own", "partition"),
    key("slurm.qos", Some("qos"), Kind::Text, "none", "quality of service"),
    key("slurm.time", Some("time"), Kind::TimeLimit, "the partition's", "time limit, as sbatch takes it"),
    key("slurm.constraint", Some("constraint"), Kind::Text, "none", "features that the nodes must have"),
    key("slurm.reservation", Some("reservation"), Kind::Text, "none", "reservation"),
    key("slurm.nodelist", Some("nodelist"), Kind::Text, "none", "nodes that must be among the job's"),
    key("slurm.exclude", Some("exclude"), Kind::Text, "none", "nodes that must not be"),
    key("slurm.exclusive", None, Kind::Flag, "false", "share the nodes with no other job"),
    key("slurm.requeue", None, Kind::Flag, "false", "let Slurm start the job again after a node failed or it was preempted"),
    key("slurm.extra", None, Kind::Texts, "none", "further options of sbatch, such as --mail-type=END"),
    key("slurm.binary", None, Kind::Path, "this executable", "nemotron as the compute nodes see it"),
    key("slurm.template", None, Kind::Path, "the one in the binary", "template of the batch script"),
    key("slurm.quirks.gpu_request", None, Kind::OneOf(GPU_REQUESTS), "gpus-per-node", "how devices are asked for; cpu asks for none"),
    key("slurm.quirks.gres_type", None, Kind::Text, "none", "type of device in the request, such as h100"),
    key("slurm.quirks.mem", None, Kind::Text, "the partition's", "memory of a node, as sbatch takes it; 0 is all of it"),
    key("slurm.quirks.cpus_per_task", Some("cpus_per_task"), Kind::Count, "the partition's", "processors of one rank"),
    key("slurm.quirks.switches", None, Kind::Count, "none", "leaf switches that the nodes may lie on at most"),
    key("slurm.quirks.sacct", None, Kind::Flag, "true", "ask sacct about jobs that have ended"),
    key("hardware.gpu", None, Kind::Text, "any", "device of the cluster's nodes; the profile must be for the same"),
    key("hardware.gpus_per_node", None, Kind::Count, "any", "devices of one of the cluster's nodes; larger groups are split"),
    key("container.runtime", None, Kind::OneOf(&["none", "pyxis", "apptainer"]), "none", "what ranks run in"),
    key("container.image", None, Kind::Text, "none", "image that ranks run in"),
    key("container.mounts", None, Kind::Texts, "none", "SOURCE:TARGET[:OPTIONS] in the container, besides run directory, model and binary"),
    key("container.mount_home", None, Kind::Flag, "false", "the home directory in the container too"),
    key("fabric.preset", None, Kind::Text, "none", "network between the nodes: a file in fabrics/"),
    key("fabric.interface", None, Kind::Text, "NCCL's choice", "network interface on which ranks find each other"),
    key("fabric.env", None, Kind::Entries, "the preset's", "variables of the network, where the job does not have them yet"),
    key("env.pass", None, Kind::Texts, "none", "variables of the submitting shell that the job gets"),
    key("env.source", None, Kind::Texts, "none", "shell files that the batch script reads first"),
    key("env.set", None, Kind::Entries, "none", "variables of the job"),
    key("secrets.names", None, Kind::Texts, "none", "variables of the submitting shell that the job gets from a file that only you can read"),
    key("limits.max_nodes", None, Kind::Count, "none", "nodes that a run may ask for here"),
    key("limits.max_time", None, Kind::TimeLimit, "none", "longest time limit here"),
    key("limits.partitions", None, Kind::Texts, "any", "partitions that a run may ask for here"),
    key("job.deadline", None, Kind::Duration, "none", "time that an attempt of a job has; it ends before, and can be resumed"),
    key("login.run_root", Some("run_root"), Kind::Path, "~/.local/share/nemotron/runs", "folder that holds the runs"),
    key("deadlines.preflight", None, Kind::Duration, "60s", "for a phase: checks of devices and paths"),
    key("deadlines.rendezvous", None, Kind::Duration, "180s", "for a phase: all ranks find each other"),
    key("deadlines.comm_init", None, Kind::Duration, "120s", "for a phase: all ranks connect"),
    key("deadlines.loading", None, Kind::Duration, "4 x planned, at least 10m", "for a phase: weights are loaded"),
    key("deadlines.warmup", None, Kind::Duration, "300s", "for a phase: a token is decoded across all ranks"),
    key("deadlines.drain", None, Kind::Duration, "120s", "for a phase: running requests finish"),
    key("deadlines.storage", None, Kind::Duration, "300s", "a job's journal or output cannot be written"),
    key("deadlines.lease", None, Kind::Duration, "60s", "a replica shows no sign of life: the others take its rows over"),
    key("deadlines.slurmd", None, Kind::Duration, "half of SlurmdTimeout", "a node's slurmd is gone: Slurm would end the job later"),
    key("deadlines.progress", None, Kind::Duration, "300s", "work is queued but no step completes: the run has hung"),
];

const fn key(
    name: &'static str,
    short: Option<&'static str>,
    kind: Kind,
    default: &'static str,
    doc: &'static str,
) -> Key {
    Key { name, short, kind, default, doc }
}

/// The key of that dotted or short name, or the one that the entry of that name belongs to.
pub fn by_name(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| match key.kind {
        Kind::Entries => name.strip_prefix(key.name).is_some_and(|rest| rest.len() > 1 && rest.starts_with('.')),
        _ => key.name == name || key.short == Some(name),
    })
}

/// The key that `--flag` sets.
pub fn by_flag(flag: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.flag() == flag)
}

impl Key {
    /// The dotted name of what `name`, by which this key was found, sets.
    pub fn full_name(&self, name: &str) -> String {
        if self.kind == Kind::Entries { name.into() } else { self.name.into() }
    }

    fn brief(&self) -> &'static str {
        self.short.unwrap_or(self.name)
    }

    /// Name of the flag, if the command has one.
    pub fn flag(&self) -> String {
        self.brief().replace('_', "-")
    }

    /// Name of the environment variable.
    pub fn variable(&self) -> String {
        format!("NEMOTRON_{}", self.brief().replace('.', "_").to_uppercase())
    }
}

impl Kind {
    /// What is expected, for people.
    pub fn expected(self) -> String {
        match self {
            Self::Text | Self::Path => "a text".into(),
            Self::Flag => "true or false".into(),
            Self::Count => "a whole number from 1 on".into(),
            Self::Port => "a port number from 0 to 65535".into(),
            Self::Number => "a number greater than 0".into(),
            Self::Duration => "seconds, or a text such as \"90s\", \"5m\" or \"2h\"".into(),
            Self::OneOf(values) => format!("one of {}", values.join(", ")),
            Self::Texts => "a list of texts".into(),
            Self::TimeLimit => "a time limit: minutes, HH:MM:SS or D-HH:MM:SS".into(),
            Self::Entries => "a text or a whole number".into(),
        }
    }

    /// The value in the form that the rest of the launcher reads, if it is one of this kind.
    pub fn check(self, value: &Value) -> Option<Value> {
        let fits = match (self, value) {
            (Self::Text | Self::Path, Value::String(_)) | (Self::Flag, Value::Boolean(_)) => true,
            (Self::Count, Value::Integer(number)) => (1..=i64::from(u32::MAX)).contains(number),
            (Self::Port, Value::Integer(number)) => u16::try_from(*number).is_ok(),
            (Self::Number, Value::Float(number)) => number.is_finite() && *number > 0.0,
            (Self::Number, Value::Integer(number)) => return (*number > 0).then_some(Value::Float(*number as f64)),
            (Self::Duration, Value::Integer(_) | Value::Float(_) | Value::String(_)) => {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                return crate::seconds::parse(&text).ok().map(|duration| Value::Float(duration.as_secs_f64()));
            }
            (Self::OneOf(values), Value::String(text)) => values.contains(&text.as_str()),
            (Self::Texts, Value::Array(texts)) => texts.iter().all(Value::is_str),
            (Self::TimeLimit, Value::Integer(_) | Value::String(_)) => {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                let seconds = time_limit(&text)?.as_secs();
                return (seconds > 0).then_some(Value::Float(seconds as f64));
            }
            (Self::Entries, Value::String(_)) => true,
            (Self::Entries, Value::Integer(number)) => return Some(Value::String(number.to_string())),
            _ => false,
        };
        fits.then(|| value.clone())
    }

    /// The same for a value that came as plain text, from the environment or `--set`.
    pub fn parse(self, text: &str) -> Option<Value> {
        let value = match self {
            Self::Text | Self::Path | Self::OneOf(_) | Self::Duration | Self::TimeLimit | Self::Entries => {
                Value::String(text.into())
            }
            Self::Texts => text.split(',').map(str::trim).filter(|text| !text.is_empty()).collect::<Vec<_>>().into(),
            Self::Flag => Value::Boolean(match text {
                "true" | "1" | "yes" | "on" => true,
                "false" | "0" | "no" | "off" => false,
                _ => return None,
            }),
            Self::Count | Self::Port => Value::Integer(text.parse().ok()?),
            Self::Number => Value::Float(text.parse().ok()?),
        };
        self.check(&value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_flags_and_variables_are_unique() {
        let mut names: Vec<_> =
            KEYS.iter().flat_map(|key| std::iter::once(key.name).chain(key.short)).map(str::to_owned).collect();
        let mut variables: Vec<_> = KEYS.iter().map(Key::variable).collect();
        for list in [&mut names, &mut variables] {
            list.sort();
            assert!(list.windows(2).all(|pair| pair[0] != pair[1]), "{list:?}");
        }
    }

    #[test]
    fn values_are_checked_by_kind() {
        assert_eq!(Kind::Duration.parse("1.5m"), Some(Value::Float(90.0)));
        assert_eq!(Kind::Number.check(&Value::Integer(3)), Some(Value::Float(3.0)));
        assert_eq!(Kind::Flag.parse("1"), Some(Value::Boolean(true)));
        assert_eq!(Kind::TimeLimit.parse("1-00:30"), Some(Value::Float(88_200.0)));
        assert_eq!(Kind::Texts.parse("a, b"), Some(vec!["a", "b"].into()));
        assert_eq!(Kind::Entries.check(&Value::Integer(22)), Some("22".into()));
        assert_eq!(Kind::Port.parse("0"), Some(Value::Integer(0)));
        for (kind, text) in [
            (Kind::Count, "0"),
            (Kind::Count, "x"),
            (Kind::Port, "65536"),
            (Kind::Number, "inf"),
            (Kind::Number, "-1"),
            (Kind::Duration, "5 weeks"),
            (Kind::Duration, "-5s"),
            (Kind::OneOf(&["cpu", "cuda"]), "tpu"),
            (Kind::TimeLimit, "0"),
            (Kind::TimeLimit, "soon"),
        ] {
            assert_eq!(kind.parse(text), None, "{kind:?} {text}");
        }
    }
}
