//! One rank, as the supervisor sees it.

use std::net::SocketAddr;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use nemotron_engine::report::{Load, Phase};

use crate::rendezvous::{Hello, Link, RankEnd};
use crate::state::RankStatus;

/// For how long a process and its connection may end apart from each other.
const APART: Duration = Duration::from_millis(300);

pub(super) struct Member {
    pub(super) status: RankStatus,
    pub(super) address: Option<SocketAddr>,
    pub(super) link: Option<Link>,
    /// What it said last.
    pub(super) end: Option<RankEnd>,
    /// When it was heard last.
    pub(super) heard: Instant,
    /// Since when the scheduler's daemon on its node is gone; on the first rank of a node only.
    pub(super) daemon_gone: Option<Instant>,
    closed: Option<Instant>,
    exited: Option<(ExitStatus, Instant)>,
    buried: bool,
}

/// How a rank went.
pub(super) enum Death {
    /// Its process ended.
    Exited(ExitStatus),
    /// Its connection ended, and its process is not known to.
    Vanished,
}

impl Member {
    pub(super) fn new(rank: usize, device: String) -> Self {
        let status = RankStatus {
            rank,
            device,
            process: None,
            phase: None,
            progress: 0.0,
            load: Load::default(),
            steps: 0,
            busy_s: 0.0,
            ended: None,
        };
        Self {
            status,
            address: None,
            link: None,
            end: None,
            heard: Instant::now(),
            daemon_gone: None,
            closed: None,
            exited: None,
            buried: false,
        }
    }

    pub(super) fn introduce(&mut self, hello: Hello, address: Option<SocketAddr>, link: Link) {
        self.status.process = Some(hello.process);
        self.status.phase = Some(Phase::Preflight);
        self.address = address;
        self.link = Some(link);
        self.heard = Instant::now();
    }

    pub(super) fn is_connected(&self) -> bool {
        self.link.is_some() && self.closed.is_none()
    }

    /// It never connected, or its connection ended at least so long ago.
    pub(super) fn is_gone(&self, now: Instant, since: Duration) -> bool {
        self.link.is_none() || self.closed.is_some_and(|at| now.duration_since(at) >= since)
    }

    /// Its preflight is over.
    pub(super) fn has_joined(&self) -> bool {
        self.status.phase >= Some(Phase::Rendezvous)
    }

    pub(super) fn exited(&mut self, status: ExitStatus) {
        self.exited = Some((status, Instant::now()));
        self.status.ended = Some(status.to_string());
    }

    pub(super) fn closed(&mut self) {
        self.closed = Some(Instant::now());
    }

    /// Says once that the rank has gone, when everything that it said has been heard.
    pub(super) fn bury(&mut self, now: Instant) -> Option<Death> {
        let apart = |since: Instant| now.duration_since(since) > APART;
        let death = match (self.exited, self.closed) {
            _ if self.buried => return None,
            (Some((status, at)), closed) if self.link.is_none() || closed.is_some() || apart(at) => {
                Death::Exited(status)
            }
            (None, Some(at)) if apart(at) => Death::Vanished,
            _ => return None,
        };
        self.buried = true;
        Some(death)
    }

    /// Where it is; empty while that is not known.
    pub(super) fn host(&self) -> &str {
        self.status.process.as_ref().map_or("", |process| &process.host)
    }

    /// `rank 1 (host n042, pid 4711)`; `place` says where it must be before it is known where it is.
    pub(super) fn name(&self, place: Option<String>) -> String {
        let rank = self.status.rank;
        match (&self.status.process, place) {
            (Some(process), _) => format!("rank {rank} (host {}, pid {})", process.host, process.pid),
            (None, Some(place)) => format!("rank {rank} ({place})"),
            (None, None) => format!("rank {rank}"),
        }
    }
}
