//! Parsers of what Slurm's commands print. Only text formats that we choose ourselves: they are equal in all versions, JSON is not.

use std::collections::BTreeMap;
use std::time::Duration;

/// Format for `squeue -h -o`. Reason and comment may hold anything, so they stand last, behind separators that are rare in them.
pub const SQUEUE_FORMAT: &str = "%i|%T|%N|%L|%S|%k|%r";
/// Fields for `sacct -n -P -X -o`.
pub const SACCT_FORMAT: &str = "JobIDRaw,State,ExitCode,NodeList";

/// What `sbatch --parsable` printed: job and, where there are several, cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Submitted {
    pub job: u64,
    pub cluster: Option<String>,
}

/// The last line that is an id. Sites print banners before it.
pub fn submitted(stdout: &str) -> Option<Submitted> {
    stdout.lines().rev().find_map(|line| {
        let mut parts = line.trim().splitn(2, ';');
        let job = digits(parts.next()?)?;
        let cluster = parts.next().map(str::trim).filter(|cluster| !cluster.is_empty()).map(str::to_owned);
        Some(Submitted { job, cluster })
    })
}

/// Start and nodes from what `sbatch --test-only` says: `Job 8 to start at 2099-10-21T19:15:13 using 16 processors on nodes h100-[01-02] …`.
pub fn estimate(words: &str) -> Option<(&str, &str)> {
    let (_, rest) = words.split_once(" to start at ")?;
    let start = rest.split_whitespace().next()?;
    let (_, rest) = rest.split_once(" on nodes ")?;
    Some((start, rest.split_whitespace().next()?))
}

/// A row of `squeue` in [`SQUEUE_FORMAT`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queued {
    /// As printed; of an array, `59_3`.
    pub id: String,
    pub state: State,
    /// Empty while it pends.
    pub nodes: String,
    /// Until the time limit.
    pub left: Option<Duration>,
    /// Local time of the start, or of the estimated one.
    pub start: Option<String>,
    pub comment: String,
    pub reason: String,
}

/// One line of `squeue`; `None` for a line of another shape.
pub fn queued(line: &str) -> Option<Queued> {
    let mut fields = line.trim_end_matches(['\r', '\n']).splitn(7, '|');
    let mut next = || fields.next().map(str::trim);
    Some(Queued {
        id: next().filter(|id| id.starts_with(|char: char| char.is_ascii_digit()))?.to_owned(),
        state: State::parse(next()?),
        nodes: next()?.to_owned(),
        left: time_limit_left(next()?),
        start: next().filter(|start| *start != "N/A" && !start.is_empty()).map(str::to_owned),
        comment: next()?.trim_start_matches("(null)").to_owned(),
        reason: next()?.to_owned(),
    })
}

/// A row of `sacct -n -P -X` in [`SACCT_FORMAT`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Accounted {
    pub job: u64,
    pub state: State,
    pub exit: Option<ExitStatus>,
    pub nodes: String,
}

/// One line of `sacct`; `None` for a line of another shape.
pub fn accounted(line: &str) -> Option<Accounted> {
    let mut fields = line.trim().splitn(4, '|');
    Some(Accounted {
        job: digits(fields.next()?)?,
        state: State::parse(fields.next()?),
        exit: ExitStatus::parse(fields.next()?),
        nodes: fields.next()?.to_owned(),
    })
}

/// How a batch script ended, from `CODE:SIGNAL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitStatus {
    pub code: u8,
    pub signal: u8,
}

impl ExitStatus {
    pub fn parse(text: &str) -> Option<Self> {
        let (code, signal) = text.trim().split_once(':')?;
        Some(Self { code: code.parse().ok()?, signal: signal.parse().ok()? })
    }
}

/// The value of a key in what `scontrol show config` prints: `SlurmdTimeout           = 300 sec`.
pub(crate) fn config_value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let mut lines = text.lines().filter_map(|line| line.split_once('='));
    lines.find(|(name, _)| name.trim() == key).map(|(_, value)| value.trim())
}

/// The fields of the line that `scontrol -o show job` prints. Values may hold spaces: a field begins at a known key.
pub fn job_fields(line: &str) -> BTreeMap<&str, &str> {
    const KEYS: [&str; 25] = [
        "JobId",
        "JobName",
        "UserId",
        "Priority",
        "Account",
        "QOS",
        "JobState",
        "Reason",
        "Dependency",
        "Requeue",
        "Restarts",
        "BatchFlag",
        "ExitCode",
        "RunTime",
        "SubmitTime",
        "StartTime",
        "EndTime",
        "PreemptTime",
        "Partition",
        "NodeList",
        "BatchHost",
        "NumNodes",
        "Comment",
        "StdOut",
        "Power",
    ];
    let mut starts: Vec<(usize, &str)> = Vec::new();
    let mut at = 0;
    for word in line.split(' ') {
        if let Some((key, _)) = word.split_once('=') {
            // A key that is not ours still ends the value before it, if it looks like one of scontrol's.
            let plain = key.starts_with(|char: char| char.is_ascii_uppercase())
                && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b":/".contains(&byte));
            if plain {
                starts.push((at, key));
            }
        }
        at += word.len() + 1;
    }
    let ends = starts.iter().skip(1).map(|(start, _)| start - 1).chain([line.len()]);
    let fields = starts.iter().zip(ends).filter(|((_, key), _)| KEYS.contains(key));
    let mut map = BTreeMap::new();
    for ((start, key), end) in fields {
        // The first wins: what a name or comment of the user's imitates stands later.
        map.entry(*key).or_insert_with(|| line[start + key.len() + 1..end].trim());
    }
    map
}

/// State of a job. Words of versions that we do not know are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Pending,
    Configuring,
    Running,
    Suspended,
    Completing,
    Completed,
    Cancelled,
    Failed,
    Timeout,
    NodeFail,
    Preempted,
    BootFail,
    Deadline,
    OutOfMemory,
    Requeued,
    Held,
    Signaling,
    StageOut,
    Resizing,
    Stopped,
    Revoked,
    LaunchFailed,
    ReconfigFail,
    Unknown(String),
}

impl State {
    /// From the long form; of `CANCELLED by 0` and `COMPLETED+` only the word counts.
    pub fn parse(text: &str) -> Self {
        let word = text.trim().split([' ', '+']).next().unwrap_or_default();
        match word.to_ascii_uppercase().as_str() {
            "PENDING" => Self::Pending,
            "CONFIGURING" => Self::Configuring,
            "RUNNING" => Self::Running,
            "SUSPENDED" => Self::Suspended,
            "COMPLETING" => Self::Completing,
            "COMPLETED" => Self::Completed,
            "CANCELLED" => Self::Cancelled,
            "FAILED" => Self::Failed,
            "TIMEOUT" => Self::Timeout,
            "NODE_FAIL" => Self::NodeFail,
            "PREEMPTED" => Self::Preempted,
            "BOOT_FAIL" => Self::BootFail,
            "DEADLINE" => Self::Deadline,
            "OUT_OF_MEMORY" | "OUT_OF_ME" => Self::OutOfMemory,
            "REQUEUED" | "REQUEUE_FED" => Self::Requeued,
            "REQUEUE_HOLD" | "SPECIAL_EXIT" | "RESV_DEL_HOLD" => Self::Held,
            "SIGNALING" => Self::Signaling,
            "STAGE_OUT" => Self::StageOut,
            "RESIZING" => Self::Resizing,
            "STOPPED" => Self::Stopped,
            "REVOKED" => Self::Revoked,
            "LAUNCH_FAILED" => Self::LaunchFailed,
            "RECONFIG_FAIL" => Self::ReconfigFail,
            _ => Self::Unknown(word.to_owned()),
        }
    }

    /// The job will run no more. A state that is not known is no end: one answer is no reason to give a job up.
    pub fn is_end(&self) -> bool {
        matches!(
            self,
            Self::Completed
                | Self::Cancelled
                | Self::Failed
                | Self::Timeout
                | Self::NodeFail
                | Self::Preempted
                | Self::BootFail
                | Self::Deadline
                | Self::OutOfMemory
                | Self::Revoked
                | Self::LaunchFailed
                | Self::ReconfigFail
        )
    }

    /// The job waits for its nodes.
    pub fn is_waiting(&self) -> bool {
        matches!(self, Self::Pending | Self::Configuring | Self::Requeued | Self::Held)
    }

    /// For people.
    pub fn words(&self) -> &str {
        match self {
            Self::Pending => "waits in the queue",
            Self::Configuring => "has its nodes, which are being prepared",
            Self::Running => "runs",
            Self::Suspended | Self::Stopped => "is suspended",
            Self::Completing => "is ending",
            Self::Completed => "has ended",
            Self::Cancelled => "was cancelled",
            Self::Failed => "failed",
            Self::Timeout => "reached its time limit",
            Self::NodeFail => "lost a node",
            Self::Preempted => "was preempted by another job",
            Self::BootFail => "had a node that did not boot",
            Self::Deadline => "reached its deadline",
            Self::OutOfMemory => "ran out of host memory",
            Self::Requeued => "was put back into the queue",
            Self::Held => "is held and will not start by itself",
            Self::Signaling => "is being told to end",
            Self::StageOut => "is storing its files",
            Self::Resizing => "is changing its size",
            Self::Revoked => "runs on another cluster of the federation",
            Self::LaunchFailed => "could not be launched",
            Self::ReconfigFail => "had a node that could not be configured",
            Self::Unknown(word) => word,
        }
    }
}

/// Why a job waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    pub words: String,
    /// It will not start by itself: somebody must change something.
    pub stuck: bool,
    /// Somebody has said that it shall wait.
    pub held: bool,
    /// Slurm has looked at it.
    pub decided: bool,
}

/// What a reason of squeue (`%r`) means.
pub fn reason(text: &str) -> Reason {
    let text = text.trim().trim_start_matches('(').trim_end_matches(')');
    let (held, decided) = (text.starts_with("JobHeld"), !matches!(text, "" | "None"));
    let known = |words: &str, stuck| Reason { words: words.into(), stuck, held, decided };
    let word = text.split([',', ' ', ':']).next().unwrap_or_default();
    match word {
        "" | "None" => known("Slurm has not looked at it yet", false),
        "Priority" => known("other jobs go first", false),
        "Resources" => known("it is next, and waits for nodes to become free", false),
        "BeginTime" => known("it may not begin yet", false),
        "Dependency" => known("it waits for another job", false),
        "DependencyNeverSatisfied" => known("it waits for a job that did not end as it should have", true),
        "Prolog" => known("its nodes are being prepared", false),
        "Licenses" => known("it waits for licences", false),
        "Reservation" => known("it waits for its reservation to begin", false),
        "ReservationDeleted" => known("its reservation was deleted", true),
        "ReqNodeNotAvail" => known("nodes that it needs are down, drained or reserved", false),
        "JobHeldUser" => known("it was held by its owner: scontrol release", true),
        "JobHeldAdmin" => known("it was held by an administrator", true),
        "PartitionNodeLimit" => known("it asks for more nodes than the partition gives", true),
        "PartitionTimeLimit" => known("it asks for more time than the partition gives", true),
        "PartitionConfig" => known("the partition has no nodes with what it asks for", true),
        "PartitionDown" => known("the partition is down", false),
        "PartitionInactive" => known("the partition takes no jobs", true),
        "AccountNotAllowed" => known("the account may not use the partition", true),
        "InvalidAccount" => known("the account is not valid", true),
        "InvalidQOS" => known("the quality of service is not valid", true),
        "BadConstraints" => known("no node can satisfy what it asks for", true),
        "NodeDown" => known("a node that it needs is down", false),
        "FrontEndDown" => known("no front end is up", false),
        "Cleaning" => known("its last attempt is still being cleaned up", false),
        "SystemFailure" => known("Slurm, a file system or a network failed", false),
        _ if word.starts_with("QOSMax") && word.contains("PerJob")
            || word.starts_with("AssocMax") && word.contains("PerJob") =>
        {
            known(&format!("it asks for more than one job may have ({word})"), true)
        }
        _ if word.starts_with("QOS") => known(&format!("a limit of the quality of service is reached ({word})"), false),
        _ if word.starts_with("Assoc") => known(&format!("a limit of the account is reached ({word})"), false),
        // squeue writes these two with spaces, scontrol with underscores.
        _ if text.replace('_', " ") == "launch failed requeued held" => {
            known("it could not be launched on a node, and is held", true)
        }
        _ if text.replace('_', " ") == "job requeued in held state" => {
            known("it was put back into the queue, and is held", true)
        }
        _ if text.starts_with("Nodes required for job are DOWN") => {
            known("nodes that it needs are down, drained or reserved", false)
        }
        _ if text.contains("can't use this partition") => known(text, true),
        _ => known(text, false),
    }
}

/// A time limit as sbatch takes it: `MIN`, `MIN:SS`, `H:MM:SS`, `D-H`, `D-H:MM`, `D-H:MM:SS`.
pub fn time_limit(text: &str) -> Option<Duration> {
    let (days, rest) = match text.split_once('-') {
        Some((days, rest)) => (Some(digits(days)?), rest),
        None => (None, text),
    };
    let parts = rest.split(':').map(digits).collect::<Option<Vec<_>>>()?;
    let (hours, minutes, seconds) = match (days, parts.as_slice()) {
        (None, &[minutes]) => (0, minutes, 0),
        (None, &[minutes, seconds]) => (0, minutes, seconds),
        (Some(_), &[hours]) => (hours, 0, 0),
        (Some(_), &[hours, minutes]) => (hours, minutes, 0),
        (_, &[hours, minutes, seconds]) => (hours, minutes, seconds),
        _ => return None,
    };
    let scaled = |number: u64, scale: u64| number.checked_mul(scale);
    let total = scaled(days.unwrap_or(0), 86_400)?
        .checked_add(scaled(hours, 3600)?)?
        .checked_add(scaled(minutes, 60)?)?
        .checked_add(seconds)?;
    Some(Duration::from_secs(total)).filter(|limit| *limit <= crate::seconds::MAX)
}

/// The same for a flag.
pub(crate) fn time_limit_flag(text: &str) -> Result<Duration, &'static str> {
    time_limit(text).filter(|limit| !limit.is_zero()).ok_or("expected minutes, HH:MM:SS or D-HH:MM:SS; a year at most")
}

/// Time as squeue prints it, in which two parts are minutes and seconds, as in a limit; `None` for `UNLIMITED`, `INVALID` and the like.
fn time_limit_left(text: &str) -> Option<Duration> {
    time_limit(text).filter(|_| text.contains(':'))
}

/// A time limit as sbatch takes it, `D-HH:MM:SS` or `HH:MM:SS`.
pub fn format_time(limit: Duration) -> String {
    let seconds = limit.as_secs();
    let (days, hours, minutes, seconds) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    match days {
        0 => format!("{hours:02}:{minutes:02}:{seconds:02}"),
        _ => format!("{days}-{hours:02}:{minutes:02}:{seconds:02}"),
    }
}

/// A number without a sign.
fn digits(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ids_are_found_behind_banners() {
        let found = |text| submitted(text).map(|submitted| (submitted.job, submitted.cluster));
        assert_eq!(found("42\n"), Some((42, None)));
        assert_eq!(found("1;slc0\n"), Some((1, Some("slc0".into()))));
        assert_eq!(found("Welcome to site\n\n7\n"), Some((7, None)));
        for text in ["", "Submitted batch job 5", "-5", "99999999999999999999999", "x;y"] {
            assert_eq!(found(text), None, "{text}");
        }
    }

    #[test]
    fn estimates_are_found() {
        let words = "Job 8 to start at 2099-10-21T19:15:13 using 16 processors on nodes h100-[01-02] in partition h100";
        assert_eq!(estimate(words), Some(("2099-10-21T19:15:13", "h100-[01-02]")));
        assert_eq!(estimate("allocation failure: Requested node configuration is not available"), None);
    }

    #[test]
    fn queue_rows_keep_reasons_with_separators() {
        let row =
            queued("9|PENDING||2:00:00|N/A|nemotron:x:1|Job's account not known, so it can't use this partition (a|b)")
                .unwrap();
        assert_eq!((row.state, row.nodes.as_str(), row.start), (State::Pending, "", None));
        assert_eq!((row.left, row.comment.as_str()), (Some(Duration::from_secs(7200)), "nemotron:x:1"));
        assert!(row.reason.ends_with("(a|b)") && reason(&row.reason).stuck);
        let row = queued("59_3|RUNNING|h100-[01-02]|59:30|2099-10-21T19:15:13|(null)|None\n").unwrap();
        assert_eq!((row.id.as_str(), row.left, row.comment.as_str()), ("59_3", Some(Duration::from_secs(3570)), ""));
        assert_eq!(queued("slurm_load_jobs error: Invalid job id specified"), None);
        assert_eq!(queued(""), None);
    }

    #[test]
    fn accounting_rows_give_state_and_exit() {
        let row = accounted("12|CANCELLED by 0|0:15|h100-01").unwrap();
        assert_eq!((row.job, row.state, row.exit), (12, State::Cancelled, Some(ExitStatus { code: 0, signal: 15 })));
        assert_eq!(accounted("12|FAILED|5:0|").unwrap().exit, Some(ExitStatus { code: 5, signal: 0 }));
        assert_eq!(accounted("12.batch|FAILED|5:0|"), None);
        assert_eq!(accounted("Slurm accounting storage is disabled"), None);
    }

    #[test]
    fn fields_with_spaces_are_whole() {
        let line = "JobId=8 JobName=a b UserId=root(0) Priority=1 JobState=PENDING Reason=Nodes required for job are DOWN, DRAINED Dependency=(null) \
                    Requeue=0 Restarts=1 ExitCode=0:0 NumNodes=2-2 TRES=cpu=2,node=1 Command=/a b JobState=x Comment=nemotron:n:1 StdOut=/r/x y Power=";
        let fields = job_fields(line);
        assert_eq!((fields["JobId"], fields["JobName"], fields["JobState"]), ("8", "a b", "PENDING"));
        assert_eq!(fields["Reason"], "Nodes required for job are DOWN, DRAINED");
        assert_eq!((fields["Comment"], fields["StdOut"], fields["Power"]), ("nemotron:n:1", "/r/x y", ""));
    }

    #[test]
    fn every_state_is_known_and_has_words() {
        let states = "PENDING CONFIGURING RUNNING SUSPENDED COMPLETING COMPLETED CANCELLED FAILED TIMEOUT NODE_FAIL PREEMPTED BOOT_FAIL \
                      DEADLINE OUT_OF_MEMORY REQUEUED REQUEUE_FED REQUEUE_HOLD SPECIAL_EXIT STOPPED REVOKED RESIZING SIGNALING STAGE_OUT \
                      RESV_DEL_HOLD LAUNCH_FAILED RECONFIG_FAIL";
        for word in states.split_whitespace() {
            let state = State::parse(word);
            assert!(!matches!(state, State::Unknown(_)) && !state.words().is_empty(), "{word}");
        }
        assert_eq!(State::parse("COMPLETED+"), State::Completed);
        assert_eq!(State::parse("HIBERNATING").words(), "HIBERNATING");
        assert!(!State::parse("HIBERNATING").is_end() && State::parse("CANCELLED by 0").is_end());
    }

    #[test]
    fn reasons_say_who_must_act() {
        assert!(reason("launch failed requeued held").stuck && reason("job requeued in held state").stuck);
        let stuck = "DependencyNeverSatisfied JobHeldUser JobHeldAdmin launch_failed_requeued_held PartitionNodeLimit PartitionTimeLimit \
                     QOSMaxWallDurationPerJobLimit AssocMaxNodePerJobLimit BadConstraints PartitionConfig";
        for word in stuck.split_whitespace() {
            assert!(reason(word).stuck, "{word}");
        }
        for text in [
            "Priority",
            "(Resources)",
            "ReqNodeNotAvail, UnavailableNodes:h100-01",
            "AssocGrpGRES",
            "QOSMaxGRESPerUser",
            "BeginTime",
        ] {
            assert!(!reason(text).stuck, "{text}");
        }
        assert_eq!(reason("Something New, here").words, "Something New, here");
    }

    #[test]
    fn time_limits_are_those_of_sbatch() {
        for (text, seconds) in
            [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129_600), ("1-12:30", 131_400), ("0-0:0:9", 9)]
        {
            assert_eq!(time_limit(text), Some(Duration::from_secs(seconds)), "{text}");
        }
        for text in
            ["", "x", "1-", "-1", "1:2:3:4", "2h", "UNLIMITED", "99999999999999999999", "18446744073709551615-0"]
        {
            assert_eq!(time_limit(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "\\PC{0,60}|[JobIdState=| :;0-9\\-\\n]{0,60}") {
            let _ = (submitted(&text), estimate(&text), queued(&text), accounted(&text), job_fields(&text), State::parse(&text), reason(&text), time_limit(&text));
        }

        #[test]
        fn times_survive_a_round_trip(seconds in 0_u64..31_536_000) {
            let limit = Duration::from_secs(seconds);
            prop_assert_eq!(time_limit(&format_time(limit)), Some(limit));
        }
    }
}
