//! Marks by themselves, and what has a test die between two of their changes.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use super::store::beside;
use super::*;

thread_local! {
    /// How many more changes of files this thread makes before it dies.
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Has the thread panic in place of one of the next changes of marks and headers; with `None` it lives
/// on.
pub fn die_after(changes: Option<u32>) {
    LEFT.set(changes);
}

/// A change of a file is about to be made.
pub fn step() {
    if let Some(left) = LEFT.get() {
        assert!(left > 0, "killed by the test");
        LEFT.set(Some(left - 1));
    }
}

fn image(dir: &Path) -> HostFile {
    std::fs::write(dir.join("base"), "x").unwrap();
    std::fs::write(dir.join("overlay"), "x").unwrap();
    let options = OpenOptions { write: true, ..OpenOptions::default() };
    HostFile::open(&dir.join("base"), options).unwrap()
}

/// `base`, and an add-cow image `overlay` that stands on it.
fn make_overlay(dir: &Path) {
    use crate::images::{CreateRequest, ImageFormat, create};
    let make = |name: &str, format, backing: Option<&str>| {
        create(&CreateRequest {
            size: Some(1 << 20),
            backing: backing.map(String::from),
            backing_format: backing.map(|_| ImageFormat::Raw),
            ..CreateRequest::new(dir.join(name), format)
        })
        .unwrap();
    };
    make("base", ImageFormat::Raw, None);
    make("overlay", ImageFormat::AddCow, Some("base"));
}

#[test]
fn a_new_image_has_no_mark_and_is_never_made_of_a_frozen_one() {
    use crate::images::{CreateRequest, ImageFormat, create};
    let dir = tempfile::tempdir().unwrap();
    let file = image(dir.path());
    let overlay = dir.path().join("overlay");
    let create = || {
        create(&CreateRequest {
            size: Some(512),
            ..CreateRequest::new(file.path(), ImageFormat::Raw)
        })
    };
    mark_moved(&file, &overlay);
    create().unwrap();
    assert_eq!(moved_to(&file), None);
    check(&file, &[]).unwrap();
    std::fs::write(file.path(), "x").unwrap();
    mark(&file, &overlay);
    let err = create().unwrap_err().to_string();
    assert!(err.contains("serve that one (writing here would destroy it)"), "{err}");
    assert_eq!(std::fs::read(file.path()).unwrap(), b"x");
}

#[test]
fn a_marked_image_names_its_overlay_until_that_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let base = image(dir.path());
    check(&base, &[]).unwrap();
    mark(&base, &dir.path().join("overlay"));
    if beside(&base, ATTRIBUTE).exists() {
        println!("SKIP: no extended attributes in {}", dir.path().display());
    }
    names_its_overlay(dir.path(), &base);
}

/// Who has made another image in an overlay's place is not told to remove that without a word.
#[test]
fn an_image_that_was_made_in_an_overlays_place_is_noticed() {
    use crate::images::{CreateRequest, ImageFormat, create};
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("other"), [0; 512]).unwrap();
    let frozen = || {
        for name in ["base", "overlay", "overlay.raw"] {
            let _ = std::fs::remove_file(path(name));
        }
        make_overlay(dir.path());
        let options = OpenOptions { write: true, ..OpenOptions::default() };
        let base = HostFile::open(&path("base"), options).unwrap();
        mark(&base, &path("overlay"));
        base
    };
    let overwrite = |backing: Option<&str>| {
        create(&CreateRequest {
            size: Some(1 << 20),
            backing: backing.map(String::from),
            backing_format: backing.map(|_| ImageFormat::Raw),
            ..CreateRequest::new(path("overlay"), ImageFormat::Qcow2)
        })
        .unwrap();
    };
    let is_noticed = |base: &HostFile| {
        let refused = check(base, &[]).unwrap_err().to_string();
        assert!(refused.contains("serve that one"), "{refused}");
        refused.contains("another image was made in the overlay's place")
    };
    assert!(!is_noticed(&frozen()));
    for (backing, is_another) in [(None, true), (Some("other"), true), (Some("base"), false)] {
        let base = frozen();
        overwrite(backing);
        assert_eq!(is_noticed(&base), is_another, "{backing:?}");
    }
    // Not one that stands on it by way of another.
    let base = frozen();
    std::fs::rename(path("overlay"), path("between")).unwrap();
    create(&CreateRequest {
        backing: Some("between".into()),
        backing_format: Some(ImageFormat::AddCow),
        ..CreateRequest::new(path("overlay"), ImageFormat::Qcow2)
    })
    .unwrap();
    assert!(!is_noticed(&base));
    // Nor one that names what is not there: the image may have been moved.
    let base = frozen();
    std::fs::rename(path("base"), path("moved")).unwrap();
    assert!(!is_noticed(&base));
    // What way out it names is one.
    std::fs::rename(path("overlay"), path("away")).unwrap();
    check(&base, &[]).unwrap();
}

/// Marks of the time when a mark was one path are read as they are.
#[test]
fn a_mark_names_all_overlays_that_need_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let base = image(dir.path());
    let path = |name: &str| dir.path().join(name);
    let one = path("overlay").into_os_string().into_encoded_bytes();
    put(&base, ATTRIBUTE, &one).unwrap();
    std::fs::write(path("other"), "x").unwrap();
    mark(&base, &path("other"));
    mark(&base, &path("other"));
    let refused = || check(&base, &[]).unwrap_err().to_string();
    assert!(refused().contains(&format!("goes on in {}", path("other").display())));
    // Each is asked for by itself: what is written for one shows in the other.
    let only = |names: &[&str]| {
        let paths: Vec<_> = names.iter().map(|name| path(name)).collect();
        let paths: Vec<_> = paths.iter().map(PathBuf::as_path).collect();
        check_only_below(&base, &paths, &[]).map_err(|err| err.to_string())
    };
    assert!(only(&["other"]).unwrap_err().contains(path("overlay").to_str().unwrap()));
    only(&["overlay", "other"]).unwrap();
    std::fs::remove_file(path("other")).unwrap();
    assert!(refused().contains(&format!("goes on in {}", path("overlay").display())));
    unmark(&base, &path("other"));
    std::fs::write(path("top"), "x").unwrap();
    Turn::wait(&base).mark_over(&path("top"), &path("overlay"));
    only(&["top"]).unwrap();
    std::fs::remove_file(path("top")).unwrap();
    let refused = refused();
    assert!(refused.contains(&format!("remove {} first", path("overlay").display())), "{refused}");
    assert!(refused.contains("still stands on it"), "{refused}");
    std::fs::remove_file(path("overlay")).unwrap();
    check(&base, &[]).unwrap();
    assert_eq!(get(&base, ATTRIBUTE), None);
}

/// A stream took the one overlay out, a second one the image itself: what still stands on it is not where
/// the disk is.
#[test]
fn an_image_that_its_disk_has_left_names_that_before_what_was_left_on_it() {
    let dir = tempfile::tempdir().unwrap();
    let base = image(dir.path());
    let path = |name: &str| dir.path().join(name);
    for name in ["left", "top"] {
        std::fs::write(path(name), "x").unwrap();
    }
    mark(&base, &path("left"));
    Turn::wait(&base).mark_over(&path("top"), &path("left"));
    unmark(&base, &path("top"));
    mark_moved(&base, &path("top"));
    let refused = || check(&base, &[]).unwrap_err().to_string();
    let goes_on = format!("goes on in {};", path("top").display());
    assert!(refused().contains(&goes_on), "{}", refused());
    // Where it goes on is gone: then what was left is in the way.
    std::fs::remove_file(path("top")).unwrap();
    assert!(refused().contains("still stands on it"), "{}", refused());
    std::fs::remove_file(path("left")).unwrap();
    check(&base, &[]).unwrap();
}

#[test]
fn a_mark_that_does_not_fit_stays_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let base = image(dir.path());
    let deep = dir.path().join(["x".repeat(200).as_str(); 15].join("/"));
    std::fs::create_dir_all(&deep).unwrap();
    let overlays: Vec<_> = (0..40).map(|n| deep.join(n.to_string())).collect();
    for overlay in &overlays {
        std::fs::write(overlay, "x").unwrap();
        mark(&base, overlay);
    }
    assert!(is_frozen_below(&base, &overlays[0]));
    assert!(!is_frozen_below(&base, &overlays[39]));
    check(&base, &[]).unwrap_err();
}

/// Does something in a file system of the one kind that never has attributes.
fn without_attributes(what: impl FnOnce(&Path)) {
    let dir = tempfile::tempdir().unwrap();
    let mount = |command: &str, args: &[&str]| {
        let done = std::process::Command::new(command).args(args).arg(dir.path()).status();
        done.is_ok_and(|status| status.success())
    };
    if !rustix::process::geteuid().is_root() || !mount("mount", &["-t", "ramfs", "none"]) {
        println!("SKIP: only root may mount a file system without attributes");
        return;
    }
    let outcome = catch_unwind(AssertUnwindSafe(|| what(dir.path())));
    assert!(mount("umount", &["-l"]));
    outcome.unwrap();
}

#[test]
fn an_image_without_attributes_has_its_mark_beside_it() {
    without_attributes(|dir| {
        let base = image(dir);
        let overlay = dir.join("overlay");
        mark(&base, &overlay);
        assert!(beside(&base, ATTRIBUTE).exists());
        assert_eq!(overlay_of(&base), Some(overlay.clone()));
        // Another file in the image's place is not meant.
        std::fs::rename(dir.join("base"), dir.join("away")).unwrap();
        let other = image(dir);
        check(&other, &[]).unwrap();
        mark(&other, &overlay);
        names_its_overlay(dir, &other);
        assert!(!beside(&other, ATTRIBUTE).exists());
    });
}

/// Whoever may write to the directory may put anything there, and must not stop those who look.
#[test]
fn nobody_waits_for_what_is_no_mark() {
    without_attributes(|dir| {
        let base = image(dir);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            beside(&base, ATTRIBUTE),
            rustix::fs::FileType::Fifo,
            0o600.into(),
            0,
        )
        .unwrap();
        let (told, found) = std::sync::mpsc::channel();
        std::thread::spawn(move || told.send(overlay_of(&base)));
        assert_eq!(found.recv_timeout(Duration::from_secs(60)), Ok(None));
    });
}

/// Each thread stands for a process: it has opened the image for itself.
fn all_change_one_mark_at_once(dir: &Path) {
    const ROUNDS: usize = 60;
    drop(image(dir));
    let open = || HostFile::open(&dir.join("base"), OpenOptions::default()).unwrap();
    let overlay = |name: String| {
        let path = dir.join(name);
        std::fs::write(&path, "x").unwrap();
        path
    };
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                let base = open();
                let (stays, comes_and_goes) =
                    (overlay(format!("stays-{thread}")), overlay(format!("goes-{thread}")));
                mark(&base, &stays);
                for round in 0..ROUNDS {
                    mark(&base, &comes_and_goes);
                    assert!(is_frozen_below(&base, &comes_and_goes), "{thread}: {round}");
                    assert!(is_frozen_below(&base, &stays), "{thread}: {round}");
                    unmark(&base, &comes_and_goes);
                    assert!(!is_frozen_below(&base, &comes_and_goes), "{thread}: {round}");
                }
            });
        }
    });
    assert_eq!(overlays(&open(), ATTRIBUTE).len(), 4);
}

#[test]
fn no_entry_is_lost_where_processes_change_a_mark_at_once() {
    all_change_one_mark_at_once(tempfile::tempdir().unwrap().path());
}

#[test]
fn no_entry_is_lost_where_marks_are_files_either() {
    without_attributes(all_change_one_mark_at_once);
}

/// The note of a job that is at work is not settled, or nobody would see to what the job leaves if it is
/// killed.
#[test]
fn a_note_is_settled_once_its_job_has_ended() {
    use crate::images::{ImageFormat, Locking, OpenRequest};
    use crate::jobs::marks::Marks;
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    make_overlay(dir.path());
    let base = || Arc::new(HostFile::open(&path("base"), OpenOptions::default()).unwrap());
    mark(&base(), &path("overlay"));
    let marks = Marks { overlays: vec![path("overlay")], leaves: Some(base()), ..Marks::default() };
    let (announced, next) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _job = marks.announce();
            announced.send(()).unwrap();
            std::thread::sleep(Duration::from_millis(300));
            let request = OpenRequest::write(path("overlay")).locking(Locking::Off);
            let overlay = crate::images::open(&request.format(Some(ImageFormat::AddCow))).unwrap();
            crate::images::set_backing(&overlay, None, None).unwrap();
            // And here it is killed.
        });
        next.recv().unwrap();
        check(&base(), &[]).unwrap();
    });
    check(&base(), &[]).unwrap();
}

fn names_its_overlay(dir: &Path, base: &HostFile) {
    let path = |name: &str| dir.join(name);
    let err = check(base, &[]).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::InvalidArgument);
    assert!(err.to_string().contains(path("overlay").to_str().unwrap()), "{err}");
    // A directory that is away may come back.
    std::fs::create_dir(path("mount")).unwrap();
    mark(base, &path("mount/overlay"));
    std::fs::remove_dir(path("mount")).unwrap();
    check(base, &[]).unwrap_err();
    unmark(base, &path("mount/overlay"));
    std::fs::remove_file(path("overlay")).unwrap();
    check(base, &[]).unwrap();
    assert_eq!(overlay_of(base), None);
    mark(base, &path("overlay"));
    clear(base);
    clear(base);
    assert_eq!(overlay_of(base), None);
}
