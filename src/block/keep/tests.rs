//! The keep: what a process after a kill finds in it, whatever the moment.

use super::*;

/// A state directory on tmpfs, removed with the value.
pub(crate) fn state_dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("vublk-test-").tempdir_in("/dev/shm").unwrap()
}

fn open(dir: &Path) -> Keep {
    Keep::open_with_capacity(dir, (7, 42), "test", 64 << 10).unwrap()
}

fn records(keep: &Keep, nonce: u128) -> Option<Vec<Vec<u8>>> {
    keep.take_over(nonce).unwrap()
}

#[test]
fn records_outlive_the_process() {
    let dir = state_dir();
    let keep = open(dir.path());
    assert_eq!(records(&keep, 1), None);
    keep.begin(1).unwrap();
    keep.append(&[b"one"]).unwrap();
    keep.append(&[b"t", b"", b"wo"]).unwrap();
    keep.append(&[]).unwrap();
    drop(keep);
    let keep = open(dir.path());
    let expected = vec![b"one".to_vec(), b"two".to_vec(), vec![]];
    assert_eq!(records(&keep, 1), Some(expected.clone()));
    // A redo that is killed can be repeated; another session's nonce opens nothing.
    assert_eq!(records(&keep, 1), Some(expected));
    assert_eq!(records(&keep, 2), None);
    keep.begin(2).unwrap();
    assert_eq!(records(&keep, 1), None);
    assert_eq!(records(&keep, 2), Some(vec![]));
    keep.discard().unwrap();
    assert!(!keep.path().exists());
}

#[test]
fn a_keep_without_a_session_leaves_no_file() {
    let dir = state_dir();
    let files = || std::fs::read_dir(dir.path()).unwrap().count();
    drop(open(dir.path()));
    assert_eq!(files(), 0);
    let keep = open(dir.path());
    keep.begin(1).unwrap();
    drop(keep);
    // As a killed process leaves it, with records or without.
    assert_eq!(files(), 1);
    drop(open(dir.path()));
    assert_eq!(open(dir.path()).session(), Some(1));
    open(dir.path()).discard().unwrap();
    assert_eq!(files(), 0);
}

/// Who waits for a process that ends in order gets a keep that is found again.
#[test]
fn a_keep_that_was_waited_for_is_in_its_place() {
    let dir = state_dir();
    let first = open(dir.path());
    let second = std::thread::scope(|scope| {
        let waits = scope.spawn(|| open(dir.path()));
        std::thread::sleep(std::time::Duration::from_millis(100));
        first.discard().unwrap();
        drop(first);
        waits.join().unwrap()
    });
    second.begin(2).unwrap();
    drop(second);
    assert!(Keep::is_there(dir.path(), (7, 42), "test"));
    assert_eq!(open(dir.path()).session(), Some(2));
}

/// Killed while its session begins again, on an overlay or with another driver, a guest is let in all
/// the same.
#[test]
fn a_session_that_begins_again_is_never_gone() {
    let dir = state_dir();
    let keep = open(dir.path());
    keep.begin(1).unwrap();
    drop(keep);
    let has_begun = std::sync::atomic::AtomicBool::new(false);
    let keep = open(dir.path());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..2000 {
                keep.append(&[b"one"]).unwrap_or_else(|err| assert!(!keep.is_recording(), "{err}"));
                keep.begin(1).unwrap();
            }
            has_begun.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        while !has_begun.load(std::sync::atomic::Ordering::Relaxed) {
            let (state, _) =
                keep.owner.read_header(&keep.file).expect("the session is there at every instant");
            assert_eq!(state.nonce, Some(1));
        }
    });
    assert_eq!(records(&keep, 1), Some(vec![]));
    keep.append(&[b"two"]).unwrap();
    drop(keep);
    assert_eq!(records(&open(dir.path()), 1), Some(vec![b"two".to_vec()]));
}

/// As when a guest that is kept for leaves in the middle of a request, and another comes.
#[test]
fn without_a_session_a_record_is_refused() {
    let dir = state_dir();
    let keep = open(dir.path());
    let refused = |result: Result<()>| {
        let err = result.unwrap_err();
        assert_eq!(err.kind(), ErrorKind::InvalidArgument);
        assert!(err.to_string().contains(".keep: "), "{err}");
    };
    refused(keep.append(&[b"one"]));
    keep.begin(1).unwrap();
    let reservation = keep.reserve(10).unwrap();
    keep.forget().unwrap();
    refused(reservation.append(&[b"two"]));
    refused(keep.append_and(&[b"three"], || panic!("changed without a record")));
    keep.begin(2).unwrap();
    assert_eq!(keep.found(), None);
}

/// Inode numbers are used again.
#[test]
fn what_was_kept_for_an_image_that_is_gone_is_void() {
    let dir = state_dir();
    let open = |born_ns| Keep::open_born(dir.path(), (7, 42), born_ns, "test", 4096).unwrap();
    for (written, read, is_found) in
        [(5, 5, true), (5, 6, false), (0, 6, true), (5, 0, true), (-5, -5, true)]
    {
        let keep = open(written);
        keep.begin(1).unwrap();
        keep.append(&[b"one"]).unwrap();
        drop(keep);
        assert_eq!(open(read).found().is_some(), is_found, "{written}, {read}");
    }
}

#[test]
fn a_flush_drops_only_what_it_covers() {
    let dir = state_dir();
    let keep = open(dir.path());
    keep.begin(1).unwrap();
    for round in 0..5u8 {
        keep.append(&[&[round, 1]]).unwrap();
        keep.rotate().unwrap();
        keep.append(&[&[round, 2]]).unwrap();
        drop(open_copy(&keep, dir.path(), |copy| {
            let got = records(copy, 1).unwrap();
            let n = got.len();
            assert_eq!(got[n - 2..], [vec![round, 1], vec![round, 2]]);
        }));
        keep.release().unwrap();
        assert_eq!(records(&keep, 1).unwrap(), [vec![round, 2]]);
    }
    keep.reset().unwrap();
    assert_eq!(records(&keep, 1).unwrap(), Vec::<Vec<u8>>::new());
    keep.append(&[b"x"]).unwrap();
    assert_eq!(records(&keep, 1).unwrap(), [b"x".to_vec()]);
}

/// Opens a copy of the file under another directory, as a process that comes later would.
fn open_copy(keep: &Keep, _dir: &Path, check: impl FnOnce(&Keep)) -> tempfile::TempDir {
    let dir = state_dir();
    std::fs::copy(keep.path(), dir.path().join(keep.path().file_name().unwrap())).unwrap();
    check(&open(dir.path()));
    dir
}

#[test]
fn killed_at_any_write_of_an_append() {
    // An append is: record bytes in any number of pieces, then the committed length. Cut the
    // file's change at every byte of the record, without the length.
    let dir = state_dir();
    let keep = open(dir.path());
    keep.begin(1).unwrap();
    keep.append(&[b"first"]).unwrap();
    let before = std::fs::read(keep.path()).unwrap();
    keep.append(&[b"second record"]).unwrap();
    let after = std::fs::read(keep.path()).unwrap();
    let name = keep.path().file_name().unwrap().to_os_string();
    for cut in before.len()..=after.len() {
        let dir = state_dir();
        let mut torn = after[..cut].to_vec();
        torn[..at::END].copy_from_slice(&before[..at::END]);
        std::fs::write(dir.path().join(&name), &torn).unwrap();
        assert_eq!(records(&open(dir.path()), 1).unwrap(), [b"first".to_vec()]);
    }
}

#[test]
fn damage_is_found_and_nothing_applied() {
    let dir = state_dir();
    let keep = open(dir.path());
    keep.begin(1).unwrap();
    keep.append(&[b"first"]).unwrap();
    keep.append(&[b"second"]).unwrap();
    let mut bytes = std::fs::read(keep.path()).unwrap();
    bytes[HEADER_LEN as usize + 9] ^= 1;
    std::fs::write(keep.path(), &bytes).unwrap();
    let err = keep.take_over(1).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Corrupt);
    assert!(err.to_string().contains("remove this file"), "{err}");
}

#[test]
fn another_image_boot_or_format_finds_nothing() {
    let dir = state_dir();
    let keep = open(dir.path());
    keep.begin(1).unwrap();
    keep.append(&[b"first"]).unwrap();
    let path = keep.path().to_path_buf();
    drop(keep);
    for at in [at::BOOT_ID, at::DEV, at::INO, at::FORMAT, at::MAGIC, at::VALID] {
        let bytes = std::fs::read(&path).unwrap();
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        std::fs::write(&path, &changed).unwrap();
        assert_eq!(records(&open(dir.path()), 1), None, "field at {at}");
        std::fs::write(&path, &bytes).unwrap();
    }
    assert_eq!(records(&open(dir.path()), 1).unwrap().len(), 1);
}

#[test]
fn it_is_bounded_and_locked() {
    let dir = state_dir();
    let keep = open(dir.path());
    keep.begin(1).unwrap();
    let payload = vec![7; 8000];
    let mut n = 0;
    while keep.append(&[&payload]).is_ok() {
        n += 1;
    }
    assert_eq!(n, 8);
    assert!(!keep.can_ever_hold(64 << 10));
    keep.rotate().unwrap();
    keep.append(&[&payload]).unwrap();
    keep.release().unwrap();
    let reservation = keep.reserve(8000).unwrap();
    assert!(keep.reserve(56000).is_none());
    drop(reservation);
    assert!(keep.reserve(50000).is_some());
    let err = Keep::open_with_capacity(dir.path(), (7, 42), "test", 64 << 10).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Busy);
}

#[test]
fn a_directory_on_disk_or_open_to_others_is_refused() {
    let dir = state_dir();
    let open_to_all = dir.path().join("open");
    std::fs::create_dir(&open_to_all).unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&open_to_all, PermissionsExt::from_mode(0o777)).unwrap();
    let err = Keep::open(&open_to_all, (1, 1), "test").unwrap_err();
    assert_eq!(err.kind(), ErrorKind::PermissionDenied);
    let on_disk = tempfile::tempdir().unwrap();
    if !is_tmpfs(on_disk.path()).unwrap() {
        let err = Keep::open(on_disk.path(), (1, 1), "test").unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Unsupported);
        assert!(err.to_string().contains("--state-dir"), "{err}");
        // Nor is one made there.
        let missing = on_disk.path().join("missing");
        let err = Keep::open(&missing, (1, 1), "test").unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Unsupported);
        assert!(!missing.exists());
    }
}

#[test]
fn a_record_has_one_checksum_however_it_is_cut() {
    let data: Vec<u8> = (0..200).collect();
    for len in [0, 1, 8, 16, 47, 48, 49, 64, 200] {
        let data = &data[..len];
        let all = [&7u64.to_le_bytes()[..], &4096u64.to_le_bytes()[..], data].concat();
        let expected = crc32c::crc32c(&all);
        for cut in [0, 1, len / 2, len] {
            let (one, other) = data.split_at(cut.min(len));
            assert_eq!(checksum(7, 4096, &[one, other]), expected, "{len} bytes, cut at {cut}");
        }
        assert_eq!(checksum(7, 4096, &[data]), expected, "{len} bytes");
    }
}

/// Of a job's write, say, that is under way while its guest comes or goes.
#[test]
fn what_was_reserved_before_a_session_has_its_room_in_it() {
    let dir = state_dir();
    let keep = open(dir.path());
    keep.begin(1).unwrap();
    let before = keep.reserve(40_000).unwrap();
    keep.begin(2).unwrap();
    assert!(keep.reserve(40_000).is_none(), "the same room was promised twice");
    let other = keep.reserve(20_000).unwrap();
    before.append(&[&[1; 40_000]]).unwrap();
    other.append(&[&[2; 20_000]]).unwrap();
    drop(keep);
    let keep = open(dir.path());
    assert_eq!(records(&keep, 2), Some(vec![vec![1; 40_000], vec![2; 20_000]]));
    keep.begin(3).unwrap();
    let before = keep.reserve(40_000).unwrap();
    keep.forget().unwrap();
    assert!(keep.reserve(40_000).is_none(), "the same room was promised twice");
    drop(before);
    assert!(keep.reserve(40_000).is_some());
    keep.discard().unwrap();
}
