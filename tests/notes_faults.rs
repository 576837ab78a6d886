//! A store in a file that is killed, full, damaged, cut short, taken or no store at all: an error that names
//! the file, and whatever was acknowledged. Power cuts and disks that fail at any call are in the store's own
//! tests.

#![cfg(feature = "redb")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use std::{env, fs, thread};

use hybrid_attention::Error;
use hybrid_attention::memory::{Embedded, Note, NoteId, Record, Store};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

fn record(index: usize) -> Record {
    let text = format!("text {index} {}", "x".repeat(index % 5 * 200));
    let vector = |number: usize| (0..64).map(|at| (index * number + at) as f32).collect();
    Record {
        id: NoteId::of(&text),
        text,
        note: Note::default().time(index as i64).tag("index", index.to_string()),
        superseded_by: None,
        spans: Vec::new(),
        vectors: (1..2 + index % 2).map(vector).collect(),
    }
}

/// The variable that makes a test another process: what it is told.
const TOLD: &str = "HYBRID_ATTENTION_TEST_TOLD";

/// A test of this file in a process of its own, behind the words of another command, if any.
fn this_test(name: &str, told: &str, behind: &[&str]) -> Result<Command> {
    let words = behind.iter().map(PathBuf::from).chain([env::current_exe()?]);
    let words: Vec<PathBuf> = words.collect();
    let (first, rest) = words.split_first().ok_or("no command")?;
    let mut command = Command::new(first);
    command.args(rest).args(["--exact", name, "--nocapture", "--test-threads", "1"]);
    command.env(TOLD, told).stdin(Stdio::null());
    Ok(command)
}

#[allow(clippy::print_stdout, reason = "how the processes of a test talk")]
fn say(what: &str) {
    println!("{what}");
    // A line that is not read any more is not a reason to fail.
    let _ = std::io::stdout().flush();
}

fn refused<T>(result: hybrid_attention::Result<T>, path: &Path) -> Result<String> {
    match result {
        Err(Error::Store { place, message }) => {
            assert_eq!(place, path.display().to_string());
            assert!(!message.is_empty());
            Ok(message)
        }
        Err(other) => Err(other.into()),
        Ok(_) => Err("it was not refused".into()),
    }
}

/// Adds notes from a number on, removes some, and says each that is done.
fn write_on(told: &str) -> Result {
    let (from, path) = told.split_once(' ').ok_or("told nothing")?;
    let store = Embedded::open(path)?;
    for index in from.parse::<usize>()?.. {
        store.put(&[record(index)])?;
        say(&format!("\nkept {index}"));
        if index % 5 == 4 {
            store.remove(record(index - 2).id)?;
            say(&format!("\ngone {}", index - 2));
        }
    }
    Ok(())
}

/// What a process has said: notes that are kept, and those that are gone. It is killed, if it is to be, some time
/// after it has said so many.
fn heard(
    child: &mut Child,
    kill_after: Option<(usize, Duration)>,
) -> Result<(BTreeSet<usize>, BTreeSet<usize>)> {
    let lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
    let (mut kept, mut gone) = (BTreeSet::new(), BTreeSet::new());
    let mut killing = kill_after;
    for line in lines {
        let line = line?;
        match line.split_once(' ') {
            Some(("kept", index)) => kept.insert(index.parse()?),
            Some(("gone", index)) => gone.insert(index.parse()?),
            _ => continue,
        };
        // It goes on writing meanwhile, and what it says stays in the pipe.
        if let Some((_, after)) = killing.take_if(|(count, _)| kept.len() + gone.len() >= *count) {
            thread::sleep(after);
            child.kill()?;
        }
    }
    child.wait()?;
    Ok((kept, gone))
}

#[test]
fn a_hundred_kills_lose_nothing_acknowledged() -> Result {
    if let Ok(told) = env::var(TOLD) {
        return write_on(&told);
    }
    let folder = tempfile::tempdir()?;
    let mut path = folder.path().join("notes.redb");
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let (mut kept, mut gone, mut next, mut written) = (BTreeSet::new(), BTreeSet::new(), 0, 0);
    for round in 0..100 {
        if round % 10 == 9 {
            path = folder.path().join(format!("notes {round}.redb"));
            written += kept.len();
            (kept, gone, next) = (BTreeSet::new(), BTreeSet::new(), 0);
        }
        let told = format!("{next} {}", path.display());
        let mut command = this_test("a_hundred_kills_lose_nothing_acknowledged", &told, &[])?;
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let after = Duration::from_micros(rng.random_range(0..15_000));
        let (put, removed) = if round % 3 == 0 {
            // Also while it makes the file or opens the file, and checks it.
            thread::sleep(2 * after);
            child.kill()?;
            heard(&mut child, None)?
        } else {
            heard(&mut child, Some((rng.random_range(1..8), after)))?
        };
        let last = put.last().copied();
        kept.extend(put);
        gone.extend(removed);
        let store = Embedded::open(&path)?;
        let there = |index: usize| -> Result<bool> {
            let found = store.get(record(index).id)?;
            assert!(found.is_none() || found == Some(record(index)), "round {round}, {index}");
            Ok(found.is_some())
        };
        for index in &kept {
            // The removal that was under way when it was killed may be done, too.
            let under_way = last.is_some_and(|last| last % 5 == 4 && index + 2 == last);
            match (gone.contains(index), under_way) {
                (true, _) => assert!(!there(*index)?, "round {round}: {index} is back"),
                (false, false) => assert!(there(*index)?, "round {round}: {index} is lost"),
                (false, true) => {
                    if !there(*index)? {
                        gone.insert(*index);
                    }
                }
            }
        }
        // So may the note that was.
        let under_way = last.map_or(next, |last| last + 1);
        if there(under_way)? {
            kept.insert(under_way);
        }
        assert_eq!(store.len()?, kept.difference(&gone).count(), "round {round}");
        assert_eq!(store.page(None, usize::MAX)?.len(), store.len()?);
        next = under_way + 1;
    }
    written += kept.len();
    assert!(written > 100, "only {written} were written");
    Ok(())
}

/// Adds notes to a disk until it is full.
fn fill(path: &Path, free: impl FnOnce() -> Result) -> Result {
    let store = Embedded::open(path)?;
    let mut index = 0;
    let error = loop {
        let some: Vec<Record> = (3 * index..3 * index + 3).map(record).collect();
        match store.put(&some) {
            Ok(()) => index += 1,
            Err(error) => break error,
        }
        assert!(index < 100_000, "it is never full");
    };
    refused(Err::<(), _>(error), path)?;
    assert!(index > 10, "{index}");
    drop(store);
    // While there is no room it may not open.
    if let Err(error) = Embedded::open(path) {
        refused(Err::<(), _>(error), path)?;
    }
    free()?;
    let store = Embedded::open(path)?;
    assert_eq!(store.len()?, 3 * index);
    for index in 0..3 * index {
        assert_eq!(store.get(record(index).id)?, Some(record(index)));
    }
    store.put(&[record(3 * index)])?;
    Ok(())
}

/// A file that may not grow beyond some size, for which nobody needs to be root.
#[test]
#[cfg(unix)]
fn a_file_that_may_not_grow_keeps_what_it_has() -> Result {
    if let Ok(told) = env::var(TOLD) {
        // Room again: a copy is not made longer, what is in it is smaller than the file.
        let store = fill(Path::new(&told), || Err("no more room".into()));
        assert!(store.is_err_and(|error| error.to_string() == "no more room"));
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("notes.redb");
    let limited = ["sh", "-c", "trap '' XFSZ; ulimit -f 8192; exec \"$0\" \"$@\""];
    let name = "a_file_that_may_not_grow_keeps_what_it_has";
    let told = path.to_str().ok_or("no UTF-8")?;
    succeeded(&this_test(name, told, &limited)?.output()?)?;
    // In this process it may.
    let store = Embedded::open(&path)?;
    let count = store.len()?;
    assert!(count > 30 && count.is_multiple_of(3));
    for index in 0..count {
        assert_eq!(store.get(record(index).id)?, Some(record(index)));
    }
    store.put(&[record(count)])?;
    Ok(())
}

fn succeeded(output: &Output) -> Result {
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&said).into()),
    }
}

/// A disk of some megabytes that gets full, and is then mounted to be read only.
#[test]
#[cfg(target_os = "linux")]
#[allow(clippy::print_stderr, reason = "says that it is skipped")]
fn a_full_disk_and_a_read_only_one_are_named() -> Result {
    if let Ok(told) = env::var(TOLD) {
        let folder = Path::new(&told);
        let (path, ballast) = (folder.join("notes.redb"), folder.join("ballast"));
        fs::write(&ballast, vec![1; 2 << 20])?;
        fill(&path, || Ok(fs::remove_file(&ballast)?))?;
        let mounted = Command::new("mount").args(["-o", "remount,ro"]).arg(folder).status()?;
        assert!(mounted.success());
        let error = refused(Embedded::open(&path), &path)?;
        assert!(error.to_lowercase().contains("read-only"), "{error}");
        let new = folder.join("new.redb");
        refused(Embedded::open(&new), &new)?;
        return Ok(());
    }
    const NO_MOUNT: i32 = 77;
    let folder = tempfile::tempdir()?;
    let folder = folder.path().to_str().ok_or("no UTF-8")?;
    let mount =
        format!("mount -t tmpfs -o size=8m none '{folder}' || exit {NO_MOUNT}; exec \"$0\" \"$@\"");
    // Root needs no namespace of users, and others may not be given one.
    let ways: [&[&str]; 2] = [
        &["unshare", "--mount", "sh", "-c"],
        &["unshare", "--map-root-user", "--mount", "sh", "-c"],
    ];
    for way in ways {
        let behind = [way, &[mount.as_str()]].concat();
        let name = "a_full_disk_and_a_read_only_one_are_named";
        let Ok(output) = this_test(name, folder, &behind)?.output() else { continue };
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.code() != Some(NO_MOUNT) && !said.starts_with("unshare:") {
            return succeeded(&output);
        }
    }
    eprintln!("skipped: no disk can be mounted here");
    Ok(())
}

#[test]
fn another_process_that_holds_the_file_is_named() -> Result {
    let name = "another_process_that_holds_the_file_is_named";
    if let Ok(told) = env::var(TOLD) {
        return write_on(&told);
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("notes.redb");
    let mut child = this_test(name, &format!("0 {}", path.display()), &[])?
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut lines = BufReader::new(child.stdout.take().ok_or("no output")?).lines();
    while !lines.next().ok_or("it ended")??.starts_with("kept") {}
    let error = refused(Embedded::open(&path), &path)?;
    assert!(error.contains("already open"), "{error}");
    child.kill()?;
    child.wait()?;
    let store = Embedded::open(&path)?;
    // So it is within one.
    refused(Embedded::open(&path), &path)?;
    assert!(!store.is_empty()?);
    Ok(())
}

/// A store with some notes in a file, closed.
fn some_notes(path: &Path) -> Result<Vec<Record>> {
    let store = Embedded::open(path)?;
    store.claim("a manifest")?;
    store.put(&(0..40).map(record).collect::<Vec<_>>())?;
    Ok(store.page(None, usize::MAX)?)
}

#[test]
fn a_file_that_was_cut_short_or_damaged_says_so_or_says_what_it_said() -> Result {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("notes.redb");
    let right = some_notes(&path)?;
    let bytes = fs::read(&path)?;
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut refusals = 0;
    for case in 0..300 {
        let mut damaged = bytes.clone();
        match case % 3 {
            0 => damaged.truncate(rng.random_range(1..bytes.len())),
            1 => {
                let from = rng.random_range(0..bytes.len() - 1);
                let to = (from + rng.random_range(1..4096)).min(bytes.len());
                rng.fill(&mut damaged[from..to]);
            }
            // A part of the file in another place of it.
            _ => {
                let page = |rng: &mut ChaCha8Rng| rng.random_range(0..bytes.len() / 4096) * 4096;
                let (from, to) = (page(&mut rng), page(&mut rng));
                damaged[to..to + 4096].copy_from_slice(&bytes[from..from + 4096]);
            }
        }
        fs::write(&path, &damaged)?;
        let read = Embedded::open(&path)
            .and_then(|store| Ok((store.manifest()?, store.page(None, usize::MAX)?)));
        match read {
            Ok((manifest, read)) => {
                assert_eq!(manifest.as_deref(), Some("a manifest"), "case {case}");
                assert_eq!(read, right, "case {case}");
            }
            Err(error) => {
                refused(Err::<(), _>(error), &path)?;
                refusals += 1;
            }
        }
    }
    assert!(refusals > 50, "{refusals}");
    Ok(())
}

#[test]
fn what_is_no_store_is_left_as_it_is() -> Result {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("notes.redb");
    for other in [&b"a letter"[..], &[0; 100_000], "{\"text\": 1}\n".repeat(9999).as_bytes()] {
        fs::write(&path, other)?;
        refused(Embedded::open(&path), &path)?;
        assert_eq!(fs::read(&path)?, other);
    }
    refused(Embedded::open(folder.path()), folder.path())?;
    let nowhere = folder.path().join("no/such/folder");
    refused(Embedded::open(&nowhere), &nowhere)?;
    // An empty file is one that was only just made.
    fs::write(&path, [])?;
    assert!(Embedded::open(&path)?.is_empty()?);
    Ok(())
}
