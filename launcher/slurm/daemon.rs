//! slurmd, Slurm's daemon on each node. Ranks outlive it, and a restart of it harms nobody; but without it Slurm can neither signal nor end
//! them, and gives the job up when it has been away for `SlurmdTimeout`.

use std::fs;
use std::time::Duration;

use super::client::{Request, arguments, ask};
use super::parse::config_value;

/// How often a node looks for its slurmd.
const INTERVAL: Duration = Duration::from_secs(2);
/// Looks in a row that miss it before that is said: one falls into every restart.
const MISSES: u32 = 2;
/// State of a socket that listens, in the kernel's tables.
const LISTEN: &str = "0A";

/// What Slurm says about the slurmds of a job's nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Daemons {
    /// One a node, in the order of the nodes; none when Slurm did not say.
    ports: Vec<u16>,
    /// After which time of silence Slurm gives a node up; `None` is never, or it did not say.
    timeout: Option<Duration>,
}

impl Daemons {
    /// Asks Slurm, briefly: a run does without.
    pub(super) fn ask(nodes: &[String], limit: Duration) -> Self {
        let request = Request::within(limit);
        let Ok(config) = ask("scontrol", &arguments(["show", "config"]), &request) else { return Self::default() };
        let shown = ask("scontrol", &arguments(["--oneliner", "show", "node", &nodes.join(",")]), &request);
        Self::of_answers(nodes, &config.stdout, &shown.map(|answer| answer.stdout).unwrap_or_default())
    }

    fn of_answers(nodes: &[String], config: &str, shown: &str) -> Self {
        let usual = config_value(config, "SlurmdPort").and_then(|port| port.parse::<u16>().ok());
        let own = |node: &String| {
            let mut lines = shown.lines().map(str::split_whitespace);
            let mut words =
                lines.find(|words| words.clone().any(|word| word.strip_prefix("NodeName=") == Some(node)))?;
            words.find_map(|word| word.strip_prefix("Port=")?.parse().ok())
        };
        let seconds = config_value(config, "SlurmdTimeout").and_then(|text| text.split(' ').next()?.parse().ok());
        Self {
            ports: nodes.iter().map_while(|node| own(node).or(usual)).collect(),
            timeout: seconds.filter(|&seconds| seconds > 0).map(Duration::from_secs),
        }
    }

    /// Of the node with this index.
    pub(super) fn port(&self, node: usize) -> Option<u16> {
        self.ports.get(node).copied()
    }

    /// For how long a run may do without one: half the time after which Slurm would end it.
    pub(super) fn patience(&self) -> Option<Duration> {
        self.timeout.map(|timeout| timeout / 2)
    }
}

/// Watches this node's slurmd for ever; `changed` is told when it goes and when it is back. Its socket is looked for in the kernel's table and
/// not connected to: that needs no right, and does not fill slurmd's log.
pub(crate) fn watch(port: u16, mut changed: impl FnMut(bool)) {
    // In a network of its own, as some containers have, there is nothing to see.
    if !listens(port) {
        return;
    }
    let mut misses = 0;
    loop {
        std::thread::sleep(INTERVAL);
        if !listens(port) {
            misses += 1;
            if misses == MISSES {
                changed(false);
            }
        } else if std::mem::take(&mut misses) >= MISSES {
            changed(true);
        }
    }
}

fn listens(port: u16) -> bool {
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .into_iter()
        .any(|table| has_listener(&fs::read_to_string(table).unwrap_or_default(), port))
}

/// Lines are `0: 00000000:1AA2 00000000:0000 0A …`: a number, the local address with its port, the other end's, the state.
fn has_listener(table: &str, port: u16) -> bool {
    let port = format!(":{port:04X}");
    table.lines().any(|line| {
        let mut words = line.split_whitespace().skip(1);
        words.next().is_some_and(|local| local.ends_with(&port)) && words.nth(1) == Some(LISTEN)
    })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::net::TcpListener;

    use super::*;

    #[test]
    fn slurm_says_where_they_listen() {
        let nodes = ["n1", "n2"].map(str::to_owned);
        let config = "SlurmdPidFile           = /run/slurmd.pid\nSlurmdPort              = 6818\nSlurmdTimeout           = 300 sec\n";
        let shown = "NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.1 State=IDLE\nNodeName=n2 NodeAddr=10.0.0.2 Port=7001 State=IDLE\n";
        let daemons = Daemons::of_answers(&nodes, config, shown);
        assert_eq!((daemons.port(0), daemons.port(1), daemons.port(2)), (Some(6818), Some(7001), None));
        assert_eq!(daemons.patience(), Some(Duration::from_secs(150)));
        assert_eq!(Daemons::of_answers(&nodes, "SlurmdTimeout = 0 sec", "").patience(), None);
        assert_eq!(Daemons::of_answers(&nodes, "", ""), Daemons::default());
    }

    #[test]
    fn a_socket_that_listens_is_seen_and_one_that_is_closed_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(listens(port));
        drop(listener);
        assert!(!listens(port));
        // An established connection from that port is none.
        assert!(!has_listener("   1: 0100007F:1AA2 0100007F:9C40 01 00000000:00000000", 6818));
        assert!(has_listener(
            "   1: 00000000000000000000000000000000:1AA2 00000000000000000000000000000000:0000 0A 0",
            6818
        ));
    }
}
