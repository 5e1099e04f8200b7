#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::job::record::Counts;

fn keys(rows: u8) -> Vec<Key> {
    (0..rows).map(|row| [row; 16]).collect()
}

fn options(dir: &Path, attempt: u32) -> JournalOptions {
    JournalOptions {
        dir: dir.to_owned(),
        attempt,
        allow_changed: false,
        model: "m".into(),
        crashed: Vec::new(),
        patience: Duration::from_millis(300),
        share: None,
    }
}

fn header(rows: u8, input: &str) -> Header {
    Header {
        schema: 1,
        attempt: 0,
        model: "m".into(),
        settings: "s".into(),
        input: input.into(),
        rows: u64::from(rows),
    }
}

fn open(dir: &Path, attempt: u32, rows: u8) -> Result<Journal, JobError> {
    Journal::open(options(dir, attempt), &header(rows, "i"), keys(rows))
}

fn done(row: u8) -> Done {
    let counts = Counts { failed: row == 1, prompt_tokens: 2, completion_tokens: 3 };
    Done { key: [row; 16], counts, line: format!("{{\"id\":{row},\"response\":\"{}\"}}", "é".repeat(40)) }
}

/// Hands rows over and waits until all are on the disk.
fn write(journal: Journal, rows: std::ops::Range<u8>) {
    let (_, mut writer) = journal.start().unwrap();
    let mut left = rows.len();
    for row in rows {
        writer.begun([row; 16]);
        writer.done(row.into(), done(row));
    }
    while left > 0 {
        match writer.replies.blocking_recv().unwrap() {
            Reply::Committed(rows) => left -= rows.len(),
            reply => panic!("{reply:?}"),
        }
    }
}

fn done_rows(dir: &Path, rows: u8) -> usize {
    let archive = Archive::read(&[dir.to_owned()], &keys(rows)).unwrap();
    let places = archive.places.iter().enumerate().filter_map(|(row, place)| Some((row, (*place)?)));
    // Whatever counts as done is read back whole.
    places.inspect(|&(row, place)| assert_eq!(archive.done(place).unwrap(), done(row as u8))).count()
}

#[test]
fn attempts_add_up() {
    let dir = tempfile::tempdir().unwrap();
    write(open(dir.path(), 0, 5).unwrap(), 0..3);
    let second = open(dir.path(), 1, 5).unwrap();
    let progress = second.archive.progress;
    assert_eq!((progress.rows_done, progress.rows_failed, progress.completion_tokens), (3, 1, 9));
    write(second, 2..5);
    let archive = Archive::read(&[dir.path().to_owned()], &keys(5)).unwrap();
    assert_eq!((archive.progress.rows_done, archive.repeated, archive.attempts), (5, 1, 2));
    assert_eq!(done_rows(dir.path(), 5), 5);
}

#[test]
fn a_journal_cut_or_damaged_anywhere_loses_one_row_at_most() {
    let dir = tempfile::tempdir().unwrap();
    write(open(dir.path(), 0, 40).unwrap(), 0..40);
    let path = file_of(dir.path(), 0);
    let whole = fs::read(&path).unwrap();
    assert!(whole.len() > 4096);
    // Where each record ends, and how many rows are done up to there.
    let (mut ends, mut rows) = (Vec::new(), 0);
    super::super::frame::scan(io::Cursor::new(&whole), |offset, frame| {
        ends.push((offset as usize, rows));
        rows += usize::from(matches!(Record::decode(frame), Some(Record::Done(_))));
    })
    .unwrap();
    ends.push((whole.len(), rows));
    assert_eq!(rows, 40);
    for len in whole.len() - 4096..=whole.len() {
        fs::write(&path, &whole[..len]).unwrap();
        let (_, expected) = *ends.iter().rfind(|(end, _)| *end <= len).unwrap();
        assert_eq!(done_rows(dir.path(), 40), expected, "cut at {len}");
    }
    // The mark of a begun row and the record of a done one.
    let record = ends[21].0..ends[23].0;
    for at in record {
        let mut bytes = whole.clone();
        bytes[at] ^= 0xFF;
        fs::write(&path, bytes).unwrap();
        assert!(done_rows(dir.path(), 40) >= 39, "byte {at}");
    }
    // The next attempt writes on, and only what was lost is missing.
    let next = open(dir.path(), 1, 40).unwrap();
    assert!(next.archive.progress.rows_done >= 39);
}

#[test]
fn what_made_the_rows_may_not_change_unnoticed() {
    let dir = tempfile::tempdir().unwrap();
    write(open(dir.path(), 0, 4).unwrap(), 0..4);
    let changed = |allow_changed| {
        let options = JournalOptions { allow_changed, ..options(dir.path(), 1) };
        let mut keys = keys(4);
        keys[2] = [77; 16];
        Journal::open(options, &header(4, "other"), keys)
    };
    assert!(matches!(changed(false), Err(JobError::Changed { what: "the input" })));
    let journal = changed(true).unwrap();
    assert_eq!(journal.archive.places.iter().map(Option::is_some).collect::<Vec<_>>(), [true, true, false, true]);
}

/// Two attempts in lines of 4 KiB: 500 rows of one input, and 60 of the other. The keys of both.
fn superseded(dir: &Path) -> (Vec<Key>, Vec<Key>) {
    let keys = |seed| -> Vec<Key> {
        let key = |row: u16| {
            let mut key = [seed; 16];
            key[..2].copy_from_slice(&row.to_le_bytes());
            key
        };
        (0..500).map(key).collect()
    };
    let (old, new) = (keys(1), keys(2));
    // At the second one's start only the last rows are superseded.
    let mixed = [&old[..440], &new[440..]].concat();
    for (attempt, keys, rows) in [(0, &old, 0..500), (1, &mixed, 440..500)] {
        let options = JournalOptions { allow_changed: true, ..options(dir, attempt) };
        let (_, mut writer) = Journal::open(options, &header(0, "i"), keys.clone()).unwrap().start().unwrap();
        let mut left = rows.len();
        for row in rows {
            writer.begun(keys[row]);
            let line = format!("{row:04096}");
            writer.done(row, Done { key: keys[row], counts: Counts::default(), line });
        }
        // Two that were in flight when the attempt ended.
        new[..2].iter().for_each(|&key| writer.begun(key));
        while left > 0 {
            let Some(Reply::Committed(rows)) = writer.replies.blocking_recv() else { panic!("not committed") };
            left -= rows.len();
        }
    }
    (old, new)
}

fn size(dir: &Path) -> u64 {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

/// What the journal says about rows.
fn said(dir: &Path, keys: &[Key]) -> (Vec<Option<Done>>, Vec<u32>, usize) {
    let archive = Archive::read(&[dir.to_owned()], keys).unwrap();
    assert_eq!(archive.repeated, 0);
    let done = archive.places.iter().map(|place| place.map(|place| archive.done(place).unwrap())).collect();
    let mut attempts: Vec<u32> = archive.in_flight.keys().copied().collect();
    attempts.sort_unstable();
    (done, attempts, archive.in_flight[&1].len())
}

#[test]
fn superseded_records_are_taken_out_when_they_are_the_larger_part() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = superseded(dir.path());
    let (before, large) = (said(dir.path(), &new), size(dir.path()));
    assert_eq!((before.0.iter().flatten().count(), before.2), (60, 2));
    // As long as the earlier rows are the job's, nothing is superseded.
    let reopen = |attempt, keys: &[Key]| {
        let options = JournalOptions { allow_changed: true, crashed: vec![1], ..options(dir.path(), attempt) };
        Journal::open(options, &header(0, "i"), keys.to_vec()).unwrap()
    };
    drop(reopen(2, &old));
    assert!(size(dir.path()) > large);
    let journal = reopen(3, &new);
    assert_eq!(journal.strikes.len(), 2);
    assert!(size(dir.path()) < large / 4, "{} of {large}", size(dir.path()));
    let after = said(dir.path(), &new);
    assert_eq!((after.0, after.2), (before.0, before.2));
}

#[test]
fn compaction_may_be_killed_at_any_moment() {
    let dir = tempfile::tempdir().unwrap();
    let (_, new) = superseded(dir.path());
    let expected = said(dir.path(), &new);
    let (temporary, files) = (dir.path().join(compact::TEMPORARY), [0, 1].map(|attempt| file_of(dir.path(), attempt)));
    let old = files.each_ref().map(|path| fs::read(path).unwrap());
    compact::compact(dir.path(), &new, &Archive::read(&[dir.path().to_owned()], &new).unwrap()).unwrap();
    assert_eq!(said(dir.path(), &new), expected);
    let compacted = files.each_ref().map(|path| fs::read(path).unwrap());
    // The files that have their new content, and how much of the next one is written.
    for renamed in 0..=2 {
        for (file, path) in files.iter().enumerate() {
            fs::write(path, if file < renamed { &compacted[file] } else { &old[file] }).unwrap();
        }
        assert_eq!(said(dir.path(), &new), expected, "{renamed} are renamed");
        let Some(next) = compacted.get(renamed) else { continue };
        for len in (0..=next.len()).step_by(next.len() / 50 + 1).chain([next.len()]) {
            fs::write(&temporary, &next[..len]).unwrap();
            assert_eq!(said(dir.path(), &new), expected, "{renamed} are renamed, {len} bytes of the next are written");
        }
        // Whoever comes next does it again.
        let archive = Archive::read(&[dir.path().to_owned()], &new).unwrap();
        compact::compact(dir.path(), &new, &archive).unwrap();
        assert!(files.each_ref().map(|path| fs::read(path).unwrap()) == compacted);
        assert!(!temporary.exists());
    }
}

#[test]
fn an_old_attempt_is_fenced_off() {
    let dir = tempfile::tempdir().unwrap();
    let old = open(dir.path(), 0, 3).unwrap();
    let (_, mut writer) = old.start().unwrap();
    // What another host does, where no lock is seen.
    write_fence(dir.path(), 1).unwrap();
    writer.done(0, done(0));
    assert!(matches!(writer.replies.blocking_recv(), Some(Reply::Failed(JobError::Fenced { attempt: 1 }))));
    drop(writer);
    assert!(matches!(open(dir.path(), 0, 3), Err(JobError::Fenced { attempt: 1 })));
    open(dir.path(), 1, 3).unwrap();
}

#[test]
fn rows_in_flight_at_crashes_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    for (attempt, begun) in [(0, vec![0, 1, 2]), (1, vec![1]), (2, vec![2])] {
        let (_, writer) = open(dir.path(), attempt, 4).unwrap().start().unwrap();
        begun.iter().for_each(|&row| writer.begun([row; 16]));
        if attempt == 0 {
            writer.done(0, done(0));
        }
    }
    let journal =
        Journal::open(JournalOptions { crashed: vec![0, 1], ..options(dir.path(), 3) }, &header(4, "i"), keys(4));
    let strikes = journal.unwrap().strikes;
    let expected = [(1, Strikes { count: 2, alone: true }), (2, Strikes { count: 1, alone: false })];
    assert_eq!(strikes, HashMap::from(expected));
}

#[test]
fn trouble_is_said_and_in_the_end_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = open(dir.path(), 0, 2).unwrap();
    let full = PathBuf::from("/dev/full");
    journal.file = OpenOptions::new().write(true).open(&full).unwrap();
    journal.path = full.clone();
    let (_, mut writer) = journal.start().unwrap();
    writer.done(0, done(0));
    assert!(matches!(writer.replies.blocking_recv(), Some(Reply::Trouble(_))));
    let last = std::iter::from_fn(|| writer.replies.blocking_recv()).last();
    assert!(matches!(last, Some(Reply::Failed(JobError::Output { path, .. })) if path == full));
}

#[test]
fn an_input_output_error_is_borne_and_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = open(dir.path(), 0, 2).unwrap();
    // Its first pages are never mapped, so each write there is an input/output error.
    journal.file = OpenOptions::new().write(true).open("/proc/self/mem").unwrap();
    let (_, mut writer) = journal.start().unwrap();
    writer.done(0, done(0));
    match writer.replies.blocking_recv() {
        Some(Reply::Trouble(error)) => assert!(error.contains("os error 5"), "{error}"),
        reply => panic!("{reply:?}"),
    }
    assert!(matches!(writer.replies.blocking_recv(), Some(Reply::Committed(rows)) if rows.len() == 1));
    assert_eq!(done_rows(dir.path(), 2), 1);
}

#[test]
fn an_attempt_in_trouble_that_another_has_replaced_leaves_its_file_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = open(dir.path(), 0, 2).unwrap();
    let path = journal.path.clone();
    journal.file = File::open(&path).unwrap();
    let (_, mut writer) = journal.start().unwrap();
    write_fence(dir.path(), 1).unwrap();
    fs::write(&path, "what the newer attempt has").unwrap();
    writer.done(0, done(0));
    let last = std::iter::from_fn(|| writer.replies.blocking_recv()).last();
    assert!(matches!(last, Some(Reply::Failed(JobError::Fenced { attempt: 1 }))), "{last:?}");
    assert_eq!(fs::read(&path).unwrap(), b"what the newer attempt has");
}

#[test]
fn a_stale_handle_is_replaced_and_nothing_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mut journal = open(dir.path(), 0, 2).unwrap();
    // A handle that cannot write any more, while the file can be opened again.
    journal.file = File::open(&journal.path).unwrap();
    let (_, mut writer) = journal.start().unwrap();
    writer.done(0, done(0));
    writer.done(1, done(1));
    assert!(matches!(writer.replies.blocking_recv(), Some(Reply::Trouble(_))));
    let mut left = 2;
    while left > 0 {
        let Some(Reply::Committed(rows)) = writer.replies.blocking_recv() else { panic!("not committed") };
        left -= rows.len();
    }
    assert_eq!(done_rows(dir.path(), 2), 2);
}
