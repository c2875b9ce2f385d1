//! Linux guests whose disks are changed through the control socket while they run: snapshots are
//! taken, sizes change.
//!
//! What is needed, and what is skipped without it, is told in `guest.rs`.

#[macro_use]
mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::scratch::{fill_with_noise, text};
use common::{Backend, Boot, Disk, Guest, Scratch, announce, run, vublk};
use serde_json::json;

const MIB: u64 = 1 << 20;

// ---- snapshots ------------------------------------------------------------------------------

/// Two workers each write one file after the other on a mounted file system, and say the name of each
/// as soon as it is synced; they stop when the host says so.
const WRITING: &str = r#"
mkfs.ext4 -q /dev/vda
mount -t ext4 -o errors=panic /dev/vda /mnt
worker() {
  n=0
  while [ ! -e /tmp/stop ]; do
    n=$(($n + 1))
    yes $1.$n | head -c 40000 >/tmp/$1
    dd if=/tmp/$1 of=/mnt/$1.$n bs=40000 conv=fsync 2>/dev/null
    echo $n >/mnt/$1.unsynced
    say synced $1.$n
  done
}
say writing
worker a & a=$!
worker b & b=$!
hear
touch /tmp/stop
wait $a
wait $b
umount /mnt
e2fsck -fn /dev/vda >/tmp/check 2>&1 || { cat /tmp/check; exit 1; }
"#;

/// The content of such a file.
fn content(name: &str) -> Vec<u8> {
    format!("{name}\n").bytes().cycle().take(40_000).collect()
}

/// How many snapshots are taken in a row, each of the overlay that the one before has made.
const SNAPSHOTS: usize = 3;

/// Takes snapshots of a file system that is being written to. Each image that is frozen must hold a
/// file system that its journal makes whole, with all that was synced when the snapshot was asked for.
fn snapshots_of_a_mounted_file_system(format: &str) {
    let scratch = Scratch::new();
    let base = scratch.raw("disk.raw", 256 * MIB);
    let mut backend = Backend::start(&scratch, &Disk::raw(&base).queues(2).controlled());
    let mut guest = Boot::new(&scratch, "writing", WRITING).cpus(2).start(&backend);
    guest.expect("writing");
    let mut qmp = backend.qmp(guest.end());

    let mut synced: Vec<String> = Vec::new();
    let mut frozen: Vec<(PathBuf, &str, usize)> = Vec::new();
    let (mut top, mut top_format) = (base, "raw");
    for number in 0..SNAPSHOTS {
        more_is_synced(&mut guest, &mut backend, &mut synced, 12);
        // What is said between here and the snapshot is in it as well, and not looked for.
        frozen.push((top, top_format, synced.len()));
        let overlay = scratch.file(&format!("overlay{number}"));
        let snapshot = json!({"device": "disk", "snapshot-file": overlay, "format": format});
        qmp.run("blockdev-snapshot-sync", snapshot, guest.end());
        (top, top_format) = (overlay, format);
    }
    more_is_synced(&mut guest, &mut backend, &mut synced, 12);
    let pauses = qmp.run("x-vublk-query-pauses", json!({}), guest.end());
    guest.tell("stop");
    guest.finish();
    backend.assert_stops();
    announce(&format!("{SNAPSHOTS} snapshots with {format}: {pauses}"));

    for (image, format, count) in &frozen {
        assert_holds(&scratch, image, format, &synced[..*count], true);
    }
    // The guest has unmounted: nothing is left for a journal.
    assert_holds(&scratch, &top, top_format, &synced, false);
}

/// Waits until so many more files are synced.
fn more_is_synced(
    guest: &mut Guest,
    backend: &mut Backend,
    synced: &mut Vec<String>,
    count: usize,
) {
    let wanted = synced.len() + count;
    while synced.len() < wanted {
        synced.push(guest.expect_while("synced", || backend.assert_alive()));
        synced.extend(guest.drain("synced"));
    }
}

/// Asserts that an image holds a clean file system with these files, once its journal is replayed.
#[track_caller]
fn assert_holds(scratch: &Scratch, image: &Path, format: &str, files: &[String], live: bool) {
    let copy = scratch.file("copy.raw");
    let before = std::fs::read(image).expect("the image");
    vublk(&["convert", "-q", "-f", format, "-O", "raw", text(image), text(&copy)]);
    assert!(before == std::fs::read(image).expect("the image"), "{image:?} was modified");
    if format == "qcow2" {
        run("qemu-img", &["check", "-q", text(image)]);
    } else if format == "add-cow" {
        vublk(&["check", "-q", text(image)]);
    }
    if live {
        // 1: something was done, which is the journal's.
        let mut replay = Command::new("/sbin/e2fsck");
        replay.args(["-fy", "-E", "journal_only"]).arg(&copy);
        let replay = replay.output().expect("e2fsck starts");
        assert!(matches!(replay.status.code(), Some(0 | 1)), "{replay:?}");
    }
    run("/sbin/e2fsck", &["-fn", text(&copy)]);

    let mounted = Mount::read_only(&copy, &scratch.file("mnt"));
    for name in files {
        let found = std::fs::read(mounted.at.join(name));
        let found = found.unwrap_or_else(|error| panic!("{image:?}: {name}: {error}"));
        assert!(found == content(name), "{image:?}: {name} is not what was synced");
    }
    let all = std::fs::read_dir(&mounted.at).expect("a directory").count();
    // Both workers may have gone on while the snapshot was on its way, but not much.
    assert!(all >= files.len(), "{all} entries");
    if !live {
        assert!(all <= files.len() + 8, "{all} entries, and {} files were synced", files.len());
    }
}

/// A file system of the host's, unmounted when dropped.
struct Mount {
    at: PathBuf,
}

impl Mount {
    fn read_only(image: &Path, at: &Path) -> Mount {
        let _ = std::fs::create_dir(at);
        run("mount", &["-t", "ext4", "-o", "loop,ro", text(image), text(at)]);
        Mount { at: at.to_owned() }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.at).status();
    }
}

/// Whether images can be mounted here; says so if not.
fn can_mount(test: &str) -> bool {
    if rustix::process::geteuid().is_root() {
        return true;
    }
    common::skip(test, "only root may mount an image");
    false
}

#[test]
fn snapshots_with_add_cow_while_a_guest_writes() {
    need_guests!("snapshots_with_add_cow_while_a_guest_writes");
    need_vublk!("snapshots_with_add_cow_while_a_guest_writes", "does not know the format");
    if can_mount("snapshots_with_add_cow_while_a_guest_writes") {
        snapshots_of_a_mounted_file_system("add-cow");
    }
}

#[test]
fn snapshots_with_qcow2_while_a_guest_writes() {
    need_guests!("snapshots_with_qcow2_while_a_guest_writes");
    need_vublk!("snapshots_with_qcow2_while_a_guest_writes", "has no control socket here");
    if can_mount("snapshots_with_qcow2_while_a_guest_writes") {
        snapshots_of_a_mounted_file_system("qcow2");
    }
}

// ---- sizes ----------------------------------------------------------------------------------

/// Follows the disk as it grows: says what it sees, and uses what is new.
const GROWN: &str = r#"
sectors() { cat /sys/block/vda/size; }
becomes() {
  for try in $(seq 400); do
    if [ $(sectors) = $1 ]; then return 0; fi
    usleep 50000
  done
  say stays $(sectors)
  return 1
}
part() { dd if=/dev/vda bs=1M skip=$1 count=$2 iflag=direct 2>/dev/null; }
dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null
dd if=/tmp/data of=/dev/vda bs=1M seek=60 oflag=direct 2>/dev/null
say small $(sectors)
becomes $((96 * 2048))
part 60 4 | cmp - /tmp/data
# What is new is empty, whatever lies hidden below, and can be used to its end.
part 64 2 | cmp -n 2097152 - /dev/zero
part 94 2 | cmp -n 2097152 - /dev/zero
dd if=/tmp/data of=/dev/vda bs=1M seek=92 oflag=direct conv=fsync 2>/dev/null
part 92 4 | cmp - /tmp/data
say large $(sectors)
"#;

/// The same as it shrinks: what is gone is refused, and empty when it is there again.
const SHRUNK: &str = r#"
becomes $((62 * 2048))
part 60 2 | cmp -n 2097152 - /tmp/data
if dd if=/dev/vda bs=1M skip=62 count=1 iflag=direct 2>/dev/null | cmp -n 512 - /dev/zero; then exit 1; fi
say shrunk $(sectors)
becomes $((64 * 2048))
part 62 2 | cmp -n 2097152 - /dev/zero
say again $(sectors)
"#;

/// Grows a disk under a guest, and shrinks it unless `refusal` is why that cannot be. The guest is
/// told each time and does not reboot.
fn resized_under_a_guest(disk: &Disk, scratch: &Scratch, refusal: Option<&str>) {
    let mut backend = Backend::start(scratch, &disk.clone().controlled());
    let job = if refusal.is_some() { GROWN.to_string() } else { [GROWN, SHRUNK].concat() };
    let mut guest = Boot::new(scratch, "resized", job).start(&backend);
    let mut qmp = backend.qmp(guest.end());
    let size = |mib: u64| json!({"device": "disk", "size": mib * MIB});
    let shrink = json!({"device": "disk", "size": 62 * MIB, "x-vublk-shrink": true});
    guest.expect("small");
    qmp.run("block_resize", size(96), guest.end());
    guest.expect("large");
    match refusal {
        Some(refusal) => {
            let error = qmp.fails("block_resize", shrink, guest.end());
            assert!(error.contains(refusal), "{error}");
        }
        None => {
            let error = qmp.fails("block_resize", size(62), guest.end());
            assert!(error.contains("say x-vublk-shrink if that is meant"), "{error}");
            qmp.run("block_resize", shrink, guest.end());
            guest.expect("shrunk");
            qmp.run("block_resize", size(64), guest.end());
            guest.expect("again");
        }
    }
    guest.finish();
    backend.assert_stops();
}

#[test]
fn a_raw_disk_changes_its_size_under_a_guest() {
    need_guests!("a_raw_disk_changes_its_size_under_a_guest");
    need_vublk!("a_raw_disk_changes_its_size_under_a_guest", "has no control socket here");
    let scratch = Scratch::new();
    let image = scratch.raw("disk.raw", 64 * MIB);
    resized_under_a_guest(&Disk::raw(&image), &scratch, None);
    assert_eq!(std::fs::metadata(&image).expect("the image").len(), 64 * MIB);
}

#[test]
fn a_qcow2_disk_grows_under_a_guest() {
    need_guests!("a_qcow2_disk_grows_under_a_guest");
    need_vublk!("a_qcow2_disk_grows_under_a_guest", "has no control socket here");
    let scratch = Scratch::new();
    let image = scratch.qcow2("disk.qcow2", 64 * MIB);
    resized_under_a_guest(&Disk::qcow2(&image), &scratch, Some("qcow2 images are not shrunk here"));
    // 3: the table that had to move has left its old place unused, and nothing worse.
    let check = Command::new("qemu-img").args(["check", text(&image)]).output();
    let check = check.expect("qemu-img starts");
    assert!(matches!(check.status.code(), Some(0 | 3)), "{check:?}");
    let info = run("qemu-img", &["info", "--output=json", text(&image)]);
    assert!(info.contains(&format!("\"virtual-size\": {}", 96 * MIB)), "{info}");
}

/// The base is larger than the disk: what it has beyond must never show.
#[test]
fn an_add_cow_disk_changes_its_size_under_a_guest() {
    need_guests!("an_add_cow_disk_changes_its_size_under_a_guest");
    need_vublk!("an_add_cow_disk_changes_its_size_under_a_guest", "does not know the format");
    let scratch = Scratch::new();
    let base = scratch.raw("base.raw", 64 * MIB);
    let image = scratch.add_cow("disk.add-cow", &base);
    fill_with_noise(&base, 0, 128 * MIB);
    let before = run("sha256sum", &[text(&base)]);
    resized_under_a_guest(&Disk::add_cow(&image), &scratch, None);
    vublk(&["check", "-q", text(&image)]);
    assert_eq!(run("sha256sum", &[text(&base)]), before, "the base was modified");
}

/// A disk that changes its size again and again while it is written to shows no error to its guest.
#[test]
fn a_disk_grows_under_load() {
    need_guests!("a_disk_grows_under_load");
    need_vublk!("a_disk_grows_under_load", "has no control socket here");
    let scratch = Scratch::new();
    let image = scratch.raw("disk.raw", 64 * MIB);
    let mut backend = Backend::start(&scratch, &Disk::raw(&image).queues(2).controlled());
    let seed = common::load::seed();
    println!("VUBLK_TEST_SEED={seed}");
    let mut guest = Boot::new(&scratch, "grows", common::load::job(4, 512, seed))
        .with_own_program()
        .cpus(2)
        .start(&backend);
    guest.expect("load-started");
    let mut qmp = backend.qmp(guest.end());
    let until = Instant::now() + Duration::from_secs(4);
    let mut size = 64 * MIB;
    while Instant::now() < until {
        size += MIB;
        qmp.run("block_resize", json!({"device": "disk", "size": size}), guest.end());
        std::thread::sleep(Duration::from_millis(40));
    }
    guest.tell("ping 1");
    guest.expect_while("pong", || backend.assert_alive());
    guest.tell("stop");
    guest.expect("load-done");
    guest.finish();
    backend.assert_stops();
    assert_eq!(std::fs::metadata(&image).expect("the image").len(), size);
}

/// Not a test of its own: the job of another test runs it inside a guest. On the host it does
/// nothing.
#[test]
#[ignore = "the guests of other tests run it"]
fn runs_inside_a_guest() {
    common::load::run();
}
