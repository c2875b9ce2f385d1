//! Linux guests in QEMU that boot against our socket.
//!
//! `integration/setup` prepares what they need; without it every test here says so in a line that
//! begins with `SKIP:` and passes. `VUBLK_REQUIRE_GUESTS=1` turns a skip into a failure,
//! `VUBLK_TEST_BACKEND=qsd` serves the disks by qemu-storage-daemon instead, to tell a fault of
//! these tests from one of vublk, and `VUBLK_TEST_SEED` repeats a load's random choices.

#[macro_use]
mod common;
mod vhdx;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::scratch::{allocated, fill_with_noise, text};
use common::{Backend, Boot, Disk, Guest, Program, Scratch, load, run, vublk};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

// ---- file systems ---------------------------------------------------------------------------

/// Makes a file system, fills it with files of many sizes, and checks it: unmounted, mounted again
/// with cold caches, and by the file system's own checker. Says how many files there are and a
/// digest of all their names and contents.
fn fill_job(kind: &str) -> String {
    let (make, check) = tools(kind);
    format!(
        r#"
say queues $(ls /sys/block/vda/mq | wc -l)
{make} /dev/vda
mount -t {kind} /dev/vda /mnt
mkdir /mnt/large /mnt/small
for i in $(seq 12); do
  dd if=/dev/urandom of=/mnt/large/$i bs=64k count=$i conv=fsync 2>/dev/null
done
for i in $(seq 60); do echo "file $i of many" >/mnt/small/$i; done
dd if=/dev/urandom of=/mnt/large/hole bs=4k count=3 seek=1000 conv=fsync 2>/dev/null
dd if=/dev/urandom of=/mnt/large/5 bs=1000 count=7 seek=3 conv=notrunc,fsync 2>/dev/null
truncate -s 100001 /mnt/large/9
rm /mnt/large/3 /mnt/small/1*
mv /mnt/small/22 /mnt/large/renamed
sync
digest() {{ (cd /mnt && find . -type f | sort | xargs sha256sum | sha256sum | cut -c1-64); }}
before=$(digest)
umount /mnt
echo 3 >/proc/sys/vm/drop_caches
{check} /dev/vda >/tmp/check 2>&1 || {{ cat /tmp/check; exit 1; }}
mount -t {kind} /dev/vda /mnt
[ "$before" = "$(digest)" ]
say files $(find /mnt -type f | wc -l)
say digest $before
umount /mnt
"#
    )
}

/// Reads what [`fill_job`] wrote, and writes a little more.
fn read_back_job(kind: &str) -> String {
    let (_, check) = tools(kind);
    format!(
        r#"
mount -t {kind} /dev/vda /mnt
say files $(find /mnt -type f | wc -l)
say digest $(cd /mnt && find . -type f | sort | xargs sha256sum | sha256sum | cut -c1-64)
dd if=/dev/urandom of=/mnt/second-boot bs=1M count=2 conv=fsync 2>/dev/null
umount /mnt
{check} /dev/vda >/tmp/check 2>&1 || {{ cat /tmp/check; exit 1; }}
"#
    )
}

/// How the guest makes and checks a file system.
fn tools(kind: &str) -> (&'static str, &'static str) {
    match kind {
        "ext4" => ("mkfs.ext4 -q", "e2fsck -fn"),
        "xfs" => ("mkfs.xfs -q", "xfs_repair -n"),
        "btrfs" => ("mkfs.btrfs -q", "btrfs check"),
        other => panic!("no tools for {other}"),
    }
}

/// Checks a raw image with a file system on the host.
fn check_on_host(kind: &str, image: &Path) {
    match kind {
        "ext4" => run("/sbin/e2fsck", &["-fn", text(image)]),
        "xfs" => run("/sbin/xfs_repair", &["-n", "-f", text(image)]),
        "btrfs" => run("/bin/btrfs", &["check", text(image)]),
        other => panic!("no tools for {other}"),
    };
}

/// Two boots against one back-end, with a check on the host after each.
fn file_system(kind: &str, queues: u32) {
    let scratch = Scratch::new();
    let image = scratch.raw("disk.raw", 512 * MIB);
    let mut backend = Backend::start(&scratch, &Disk::raw(&image).queues(queues));

    let first = Boot::new(&scratch, "first", fill_job(kind)).cpus(queues).run(&backend);
    assert_eq!(first.said("queues"), queues.to_string(), "queues the guest uses");
    assert_eq!(first.said("files"), "61");
    check_on_host(kind, &image);

    let second = Boot::new(&scratch, "second", read_back_job(kind)).run(&backend);
    assert_eq!(second.said("files"), first.said("files"));
    assert_eq!(second.said("digest"), first.said("digest"));

    backend.assert_alive();
    backend.assert_stops();
    check_on_host(kind, &image);
}

/// The first word of a text: the digest in what `sha256sum` prints.
fn word(text: &str) -> &str {
    text.split_whitespace().next().unwrap_or_default()
}

#[test]
fn ext4_on_one_queue() {
    need_guests!("ext4_on_one_queue");
    file_system("ext4", 1);
}

#[test]
fn ext4_on_four_queues() {
    need_guests!("ext4_on_four_queues");
    file_system("ext4", 4);
}

#[test]
fn xfs_on_one_queue() {
    need_guests!("xfs_on_one_queue");
    file_system("xfs", 1);
}

#[test]
fn xfs_on_four_queues() {
    need_guests!("xfs_on_four_queues");
    file_system("xfs", 4);
}

#[test]
fn btrfs_on_one_queue() {
    need_guests!("btrfs_on_one_queue");
    file_system("btrfs", 1);
}

/// The same through qcow2, whose image is checked by QEMU's own tool as well.
#[test]
fn ext4_on_qcow2() {
    need_guests!("ext4_on_qcow2");
    let scratch = Scratch::new();
    let image = scratch.qcow2("disk.qcow2", 512 * MIB);
    let mut backend = Backend::start(&scratch, &Disk::qcow2(&image));
    let first = Boot::new(&scratch, "first", fill_job("ext4")).run(&backend);
    let second = Boot::new(&scratch, "second", read_back_job("ext4")).run(&backend);
    assert_eq!(second.said("digest"), first.said("digest"));
    backend.assert_stops();

    run("qemu-img", &["check", "-q", text(&image)]);
    let raw = scratch.file("disk.raw");
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&image), text(&raw)]);
    check_on_host("ext4", &raw);
}

/// The same through add-cow, over a base that is full of something else and does not change.
#[test]
fn ext4_on_add_cow() {
    need_guests!("ext4_on_add_cow");
    need_vublk!("ext4_on_add_cow", "does not know the format");
    let scratch = Scratch::new();
    let base = scratch.raw("base.raw", 512 * MIB);
    fill_with_noise(&base, 0, 96 * MIB);
    let before = run("sha256sum", &[text(&base)]);
    let image = scratch.add_cow("disk.add-cow", &base);
    let mut backend = Backend::start(&scratch, &Disk::add_cow(&image));
    let first = Boot::new(&scratch, "first", fill_job("ext4")).run(&backend);
    let second = Boot::new(&scratch, "second", read_back_job("ext4")).run(&backend);
    assert_eq!(second.said("files"), "61");
    assert_eq!(second.said("digest"), first.said("digest"));
    backend.assert_stops();

    vublk(&["check", "-q", text(&image)]);
    let raw = scratch.file("disk.raw");
    vublk(&["convert", "-q", "-f", "add-cow", "-O", "raw", text(&image), text(&raw)]);
    check_on_host("ext4", &raw);
    assert_eq!(run("sha256sum", &[text(&base)]), before, "the base was modified");
}

// ---- coming and going -----------------------------------------------------------------------

/// The disk is pulled out of a running guest and put back, and the guest reads what it had
/// written. Another QEMU is served afterwards on the same socket.
#[test]
fn disk_is_unplugged_and_plugged_in_again() {
    need_guests!("disk_is_unplugged_and_plugged_in_again");
    let scratch = Scratch::new();
    let image = scratch.raw("disk.raw", 64 * MIB);
    let mut backend = Backend::start(&scratch, &Disk::raw(&image));
    let job = r#"
dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null
dd if=/tmp/data of=/dev/vda bs=1M conv=fsync 2>/dev/null
say written
await ! /sys/block/vda
say gone
await /dev/vda
dd if=/dev/vda bs=1M count=4 2>/dev/null | cmp - /tmp/data
dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null
dd if=/tmp/data of=/dev/vda bs=1M conv=fsync 2>/dev/null
say digest $(sha256sum </tmp/data)
"#;
    let mut guest = Boot::new(&scratch, "unplug", job).behind_port().start(&backend);
    guest.expect("written");
    let end = guest.end();
    let mut qmp = guest.qmp();
    qmp.run("device_del", json!({"id": "disk"}), end);
    guest.expect("gone");
    qmp.await_event("DEVICE_DELETED", end, |data| data["device"] == "disk");
    // Without its device the connection has no use; a new one is made for the disk's return.
    qmp.run("chardev-remove", json!({"id": "disk-socket"}), end);
    backend.assert_alive();
    let address = json!({"type": "unix", "data": {"path": text(backend.socket())}});
    let socket = json!({"addr": address, "server": false, "reconnect-ms": 200});
    let chardev = json!({"id": "disk-socket", "backend": {"type": "socket", "data": socket}});
    qmp.run("chardev-add", chardev, end);
    qmp.run("device_add", guest.device(), end);
    guest.finish();

    let job = "say digest $(dd if=/dev/vda bs=1M count=4 2>/dev/null | sha256sum)";
    let second = Boot::new(&scratch, "second", job).run(&backend);
    assert_eq!(second.said("digest"), guest.said("digest"));
    backend.assert_alive();
}

/// The guest reboots: QEMU stays connected and resets the device.
#[test]
fn guest_reboots() {
    need_guests!("guest_reboots");
    let scratch = Scratch::new();
    let image = scratch.raw("disk.raw", 64 * MIB);
    let mut backend = Backend::start(&scratch, &Disk::raw(&image));
    // The disk itself remembers how often the guest has booted: one mark for each boot.
    let job = r#"
marks=$(head -c 2 /dev/vda | tr -d '\0')
if [ -z "$marks" ]; then
  dd if=/dev/urandom of=/dev/vda bs=1M seek=1 count=8 2>/dev/null
fi
say digest $(dd if=/dev/vda bs=1M skip=1 count=8 2>/dev/null | sha256sum)
printf "1$marks" | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null
say marks "1$marks"
if [ -z "$marks" ]; then reboot -f; fi
"#;
    let mut guest = Boot::new(&scratch, "reboot", job).reboots().start(&backend);
    guest.expect("up");
    let digest = guest.expect("digest");
    assert_eq!(guest.expect("marks"), "1");
    guest.expect("up");
    assert_eq!(guest.expect("digest"), digest);
    assert_eq!(guest.expect("marks"), "11");
    guest.finish();
    backend.assert_alive();
}

/// The back-end is asked to stop while the guest is idle, and started again: the guest goes on.
#[test]
fn backend_is_stopped_and_started_under_an_idle_guest() {
    need_guests!("backend_is_stopped_and_started_under_an_idle_guest");
    let scratch = Scratch::new();
    let image = scratch.raw("disk.raw", 64 * MIB);
    let mut backend = Backend::start(&scratch, &Disk::raw(&image).queues(2));
    let job = r#"
dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
dd if=/tmp/data of=/dev/vda bs=1M conv=fsync 2>/dev/null
say idle
hear
echo 3 >/proc/sys/vm/drop_caches
dd if=/dev/vda bs=1M count=8 2>/dev/null | cmp - /tmp/data
dd if=/tmp/data of=/dev/vda bs=1M seek=8 conv=fsync 2>/dev/null
say digest $(sha256sum </tmp/data)
"#;
    let mut guest = Boot::new(&scratch, "idle", job).cpus(2).start(&backend);
    guest.expect("idle");
    backend.assert_stops();
    backend.restart();
    guest.tell("go on");
    guest.finish();
    backend.assert_stops();
    for first in [0, 8] {
        let job = format!("dd if={} bs=1M skip={first} count=8 2>/dev/null", text(&image));
        let digest = run("sh", &["-c", &format!("{job} | sha256sum")]);
        assert_eq!(word(&digest), word(guest.said("digest")), "at {first} MiB");
    }
}

// ---- recovery -------------------------------------------------------------------------------

/// How often a back-end is killed in one boot.
const KILLS: u32 = 6;

/// Kills the back-end under load, again and again, and starts it with the same command. The guest
/// must see nothing but pauses: no error, no lost or repeated write, no request that never ends.
fn killed_under_load(disk: &Disk, scratch: &Scratch, cpus: u32) -> String {
    let seed = load::seed();
    println!("VUBLK_TEST_SEED={seed}");
    let mut backend = Backend::start(scratch, disk);
    let mut guest = Boot::new(scratch, "killed", load::job(8, 512, seed))
        .with_own_program()
        .cpus(cpus)
        .start(&backend);
    guest.expect("load-started");
    ping(&mut guest, &mut backend, 0);
    for round in 1..=KILLS {
        // Different moments of the load, and outages from nothing to longer than QEMU's retry.
        let spread = seed.rotate_left(round * 7);
        std::thread::sleep(Duration::from_millis(50 + spread % 400));
        backend.kill();
        std::thread::sleep(Duration::from_millis((spread >> 16) % 300));
        backend.restart();
        ping(&mut guest, &mut backend, round);
    }
    guest.tell("stop");
    let done = guest.expect("load-done");
    guest.finish();
    backend.assert_stops();
    let (sum, rest) = done.split_once(' ').expect("a checksum and more");
    common::announce(&format!(
        "{KILLS} kills of {} queues: operations and longest pause in ms: {rest}",
        backend.queues()
    ));
    sum.to_owned()
}

/// Waits until every worker of the load has gone on since now.
#[track_caller]
fn ping(guest: &mut Guest, backend: &mut Backend, round: u32) {
    guest.tell(&format!("ping {round}"));
    let answer = guest.expect_while("pong", || backend.assert_alive());
    assert_eq!(word(&answer), round.to_string());
}

/// The checksum of the load's region of a raw image, as the guest prints it.
fn region_checksum(image: &Path) -> String {
    format!("{:016x}", load::file_checksum(image, 0, load::REGION as usize))
}

#[test]
fn raw_backend_is_killed_under_load() {
    need_guests!("raw_backend_is_killed_under_load");
    need_vublk!("raw_backend_is_killed_under_load", "does not recover requests in flight");
    let scratch = Scratch::new();
    let image = scratch.raw("disk.raw", 64 * MIB);
    let sum = killed_under_load(&Disk::raw(&image), &scratch, 1);
    assert_eq!(region_checksum(&image), sum, "the image holds what the guest read last");
}

#[test]
fn raw_backend_with_four_queues_is_killed_under_load() {
    need_guests!("raw_backend_with_four_queues_is_killed_under_load");
    need_vublk!(
        "raw_backend_with_four_queues_is_killed_under_load",
        "does not recover requests in flight"
    );
    let scratch = Scratch::new();
    let image = scratch.raw("disk.raw", 64 * MIB);
    let sum = killed_under_load(&Disk::raw(&image).queues(4), &scratch, 4);
    assert_eq!(region_checksum(&image), sum, "the image holds what the guest read last");
}

/// qcow2 keeps mappings in memory until a flush; they must outlive the process all the same.
#[test]
fn qcow2_backend_is_killed_under_load() {
    need_guests!("qcow2_backend_is_killed_under_load");
    need_vublk!("qcow2_backend_is_killed_under_load", "does not recover requests in flight");
    let scratch = Scratch::new();
    let image = scratch.qcow2("disk.qcow2", 64 * MIB);
    let sum = killed_under_load(&Disk::qcow2(&image).queues(2), &scratch, 2);

    // Clusters that nothing refers to are allowed after a crash, and nothing worse.
    let output = std::process::Command::new("qemu-img")
        .args(["check", text(&image)])
        .output()
        .expect("qemu-img starts");
    let code = output.status.code();
    assert!(matches!(code, Some(0 | 3)), "{}", String::from_utf8_lossy(&output.stderr));
    let raw = scratch.file("disk.raw");
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&image), text(&raw)]);
    assert_eq!(region_checksum(&raw), sum, "the image holds what the guest read last");
}

/// add-cow keeps its bits in memory until a flush. Half of what is read comes from the base.
#[test]
fn add_cow_backend_is_killed_under_load() {
    need_guests!("add_cow_backend_is_killed_under_load");
    need_vublk!("add_cow_backend_is_killed_under_load", "does not know the format");
    let scratch = Scratch::new();
    let base = scratch.raw("base.raw", 64 * MIB);
    fill_with_noise(&base, 0, 64 * MIB);
    let image = scratch.add_cow("disk.add-cow", &base);
    let sum = killed_under_load(&Disk::add_cow(&image).queues(2), &scratch, 2);

    vublk(&["check", "-q", text(&image)]);
    let raw = scratch.file("disk.raw");
    vublk(&["convert", "-q", "-f", "add-cow", "-O", "raw", text(&image), text(&raw)]);
    assert_eq!(region_checksum(&raw), sum, "the image holds what the guest read last");
}

/// A file system on the disk while the back-end is killed: journal, flushes and page cache.
#[test]
fn backend_is_killed_under_a_file_system() {
    need_guests!("backend_is_killed_under_a_file_system");
    need_vublk!("backend_is_killed_under_a_file_system", "does not recover requests in flight");
    let scratch = Scratch::new();
    let image = scratch.raw("disk.raw", 512 * MIB);
    let mut backend = Backend::start(&scratch, &Disk::raw(&image).queues(2));
    let job = r#"
mkfs.ext4 -q /dev/vda
mount -t ext4 -o errors=panic /dev/vda /mnt
dd if=/dev/urandom of=/tmp/data bs=1M count=2 2>/dev/null
say writing
worker() {
  for i in $(seq 60); do
    dd if=/tmp/data of=/mnt/$1.$i bs=32k conv=fsync 2>/dev/null
    [ $(($i % 5)) = 0 ] && rm /mnt/$1.$(($i - 4))
    say wrote $1.$i
  done
}
worker a & a=$!
worker b & b=$!
wait $a
wait $b
echo 3 >/proc/sys/vm/drop_caches
for file in /mnt/[ab].*; do cmp $file /tmp/data; done
say files $(ls /mnt/[ab].* | wc -l)
umount /mnt
e2fsck -fn /dev/vda >/tmp/check 2>&1 || { cat /tmp/check; exit 1; }
"#;
    let mut guest = Boot::new(&scratch, "mounted", job).cpus(2).start(&backend);
    guest.expect("writing");
    for round in 0..KILLS {
        // The guest has gone on since the last kill when it says this afresh.
        guest.forget();
        guest.expect_while("wrote", || backend.assert_alive());
        guest.expect_while("wrote", || backend.assert_alive());
        std::thread::sleep(Duration::from_millis(u64::from(round) * 7));
        backend.kill();
        backend.restart();
    }
    guest.finish();
    assert_eq!(guest.said("files"), "96");
    backend.assert_stops();
    check_on_host("ext4", &image);
}

/// Memory is plugged into the guest while it writes, holds what it reads from the disk, and is pulled out
/// again: the back-end is told of regions that come and go under its requests.
#[test]
fn memory_is_plugged_in_and_pulled_out_under_load() {
    need_guests!("memory_is_plugged_in_and_pulled_out_under_load");
    let scratch = Scratch::new();
    let image = scratch.raw("disk.raw", 64 * MIB);
    let (offset, length) = (load::REGION, 32 * MIB);
    fill_with_noise(&image, offset, length);
    let expected = load::file_checksum(&image, offset, length as usize);
    let seed = load::seed();
    println!("VUBLK_TEST_SEED={seed}");
    let mut backend = Backend::start(&scratch, &Disk::raw(&image).queues(2));
    // Movable memory is what Linux takes first for its page cache, and what can be pulled out.
    let job = format!(
        "echo online_movable >/sys/devices/system/memory/auto_online_blocks\n{}",
        load::job(2, 512, seed)
    );
    let boot = Boot::new(&scratch, "plug", job).with_own_program().cpus(2).memory_slots();
    let mut guest = boot.start(&backend);
    guest.expect("load-started");
    let end = guest.end();
    let mut qmp = guest.qmp();
    for round in 0..4 {
        let (size, memory) = (128 * MIB, format!("memory-{round}"));
        let backing = json!({
            "qom-type": "memory-backend-memfd", "id": memory, "size": size, "share": true,
        });
        qmp.run("object-add", backing, end);
        qmp.run("device_add", json!({"driver": "pc-dimm", "id": "more", "memdev": memory}), end);
        ping(&mut guest, &mut backend, 2 * round);
        let plugged = qmp.run("query-memory-size-summary", json!({}), end);
        assert_eq!(plugged["plugged-memory"], size);
        let (at, piece) = (offset + u64::from(round) * length / 4, length / 4);
        guest.tell(&format!("cache {at} {piece}"));
        guest.expect("cached");
        // Linux gives up for now if it finds a page in use.
        let answers = ["DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR"];
        loop {
            qmp.run("device_del", json!({"id": "more"}), end);
            if qmp.await_any(&answers, end) == "DEVICE_DELETED" {
                break;
            }
        }
        qmp.run("object-del", json!({"id": memory}), end);
        ping(&mut guest, &mut backend, 2 * round + 1);
    }
    // Linux has moved what it had read there to other memory.
    guest.tell(&format!("sum {offset} {length}"));
    assert_eq!(guest.expect("sum"), format!("{expected:016x}"));
    guest.tell("stop");
    let done = guest.expect("load-done");
    guest.finish();
    backend.assert_stops();
    assert_eq!(word(&done), region_checksum(&image));
}

/// A guest with load that is about to be moved, and what is to be found of it afterwards.
struct Traveller {
    scratch: Scratch,
    image: PathBuf,
    job: String,
    /// What the guest's page cache holds of the image: offset, length and checksum.
    cached: (u64, u64, u64),
}

impl Traveller {
    fn new() -> Traveller {
        let scratch = Scratch::new();
        let image = scratch.raw("disk.raw", 64 * MIB);
        // The guest reads this part into its page cache while its memory is being sent.
        let (offset, length) = (load::REGION, 32 * MIB);
        fill_with_noise(&image, offset, length);
        let sum = load::file_checksum(&image, offset, length as usize);
        let seed = load::seed();
        println!("VUBLK_TEST_SEED={seed}");
        let job = load::job(4, 512, seed);
        Traveller { scratch, image, job, cached: (offset, length, sum) }
    }

    fn disk(&self) -> Disk {
        Disk::raw(&self.image).queues(2)
    }

    fn boot<'a>(&'a self, name: &'a str) -> Boot<'a> {
        Boot::new(&self.scratch, name, self.job.clone()).with_own_program().cpus(2)
    }

    /// Boots the guest, and sends it there while it reads and writes.
    fn send(&self, backend: &mut Backend, uri: &str) {
        let mut source = self.boot("source").start(backend);
        source.expect("load-started");
        ping(&mut source, backend, 1);
        let end = source.end();
        let mut qmp = source.qmp();
        // Slow at first, and with a pause too short to end in, so that it is under way while the
        // guest reads, however slow that is.
        let slow = json!({"max-bandwidth": 2 * MIB, "downtime-limit": 1});
        qmp.run("migrate-set-parameters", slow, end);
        qmp.run("migrate", json!({"uri": uri}), end);
        let sent = |answer: Value| answer["ram"]["transferred"].as_u64();
        while sent(qmp.run("query-migrate", json!({}), end)) < Some(4 * MIB) {
            assert!(Instant::now() < end, "the migration does not begin");
            std::thread::sleep(Duration::from_millis(20));
        }
        let (offset, length, _) = self.cached;
        source.tell(&format!("cache {offset} {length}"));
        source.expect("cached");
        ping(&mut source, backend, 2);
        let fast = json!({"max-bandwidth": 4096 * MIB, "downtime-limit": 2000});
        qmp.run("migrate-set-parameters", fast, end);
        loop {
            let answer = qmp.run("query-migrate", json!({}), end);
            match answer["status"].as_str() {
                Some("completed") => break,
                Some("failed" | "cancelled") | None => panic!("the migration failed: {answer}"),
                Some(_) => assert!(Instant::now() < end, "the migration does not end: {answer}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        qmp.run("quit", json!({}), end);
        source.await_exit();
        drop(source);
        backend.assert_alive();
    }

    /// The guest runs on, has what it had, and its load ends without an error.
    fn arrive(&self, mut target: Guest, backend: &mut Backend) {
        // What is sent to the serial port before its state is loaded would be lost.
        let end = target.end();
        let mut qmp = target.qmp();
        while qmp.run("query-status", json!({}), end)["status"] != "running" {
            assert!(Instant::now() < end, "the guest does not run on");
            std::thread::sleep(Duration::from_millis(20));
        }
        ping(&mut target, backend, 3);
        let (offset, length, sum) = self.cached;
        target.tell(&format!("sum {offset} {length}"));
        assert_eq!(target.expect("sum"), format!("{sum:016x}"), "the guest's page cache");
        target.tell("stop");
        let done = target.expect("load-done");
        target.finish();
        backend.assert_stops();
        assert_eq!(word(&done), region_checksum(&self.image));
    }
}

/// The guest is saved to a file while it runs with load, and continued by another QEMU: every page
/// that the back-end writes must be in the migration's log, and the rings must go on where they
/// stopped. The second QEMU connects to the same back-end after the first has left.
#[test]
fn guest_migrates_through_a_file_under_load() {
    need_guests!("guest_migrates_through_a_file_under_load");
    let traveller = Traveller::new();
    let mut backend = Backend::start(&traveller.scratch, &traveller.disk());
    let uri = format!("file:{}", text(&traveller.scratch.file("state")));
    traveller.send(&mut backend, &uri);
    let target = traveller.boot("target").incoming(&uri).start(&backend);
    traveller.arrive(target, &mut backend);
}

/// The guest moves to another QEMU and another back-end on the same raw image, as between hosts that share
/// it.
#[test]
fn guest_migrates_to_another_backend_under_load() {
    need_guests!("guest_migrates_to_another_backend_under_load");
    need_vublk!("guest_migrates_to_another_backend_under_load", "has other options");
    let traveller = Traveller::new();
    let mut here = Backend::start(&traveller.scratch, &traveller.disk());
    let beyond = Scratch::new();
    let mut there = Backend::start(&beyond, &traveller.disk().unlocked());
    let uri = format!("unix:{}", text(&traveller.scratch.socket("migration")));
    let target = traveller.boot("target").incoming(&uri).start(&there);
    traveller.send(&mut here, &uri);
    here.assert_stops();
    traveller.arrive(target, &mut there);
}

// ---- what the guest is told -----------------------------------------------------------------

/// What the guest sees of a disk, and what discard and write-zeroes do to the image.
fn limits(block_size: u32) {
    let scratch = Scratch::new();
    let image = scratch.raw("disk.raw", 64 * MIB);
    let disk = Disk::raw(&image).block_size(block_size).serial("disk-0123456789");
    let mut backend = Backend::start(&scratch, &disk);
    let job = r#"
cd /sys/block/vda
say write-cache $(cat queue/write_cache)
say serial $(cat serial)
say block-size $(cat queue/logical_block_size)
say sectors $(cat size)
say ro $(cat ro)
say segments $(cat queue/max_segments)
[ $(cat queue/discard_max_bytes) -gt 0 ]
[ $(cat queue/write_zeroes_max_bytes) -gt 0 ]
cd /
dd if=/dev/urandom of=/dev/vda bs=1M count=16 conv=fsync 2>/dev/null
say filled; hear
/bin/blkdiscard -o 8M -l 8M /dev/vda
sync
say half; hear
before=$(dd if=/dev/vda bs=1M count=4 2>/dev/null | sha256sum)
/bin/blkdiscard -z -o 4M -l 1M /dev/vda
echo 3 >/proc/sys/vm/drop_caches
dd if=/dev/vda bs=1M skip=4 count=1 2>/dev/null | cmp -n 1048576 - /dev/zero
[ "$before" = "$(dd if=/dev/vda bs=1M count=4 2>/dev/null | sha256sum)" ]
/bin/blkdiscard /dev/vda
sync
say empty; hear
mkfs.ext4 -q -E nodiscard /dev/vda
mount -t ext4 /dev/vda /mnt
dd if=/dev/urandom of=/mnt/file bs=1M count=24 conv=fsync 2>/dev/null
say stored; hear
rm /mnt/file
sync
/bin/fstrim /mnt
say trimmed; hear
umount /mnt
"#;
    let mut guest = Boot::new(&scratch, "limits", job).start(&backend);
    let mut space_after = |step: &str| {
        guest.expect(step);
        let space = allocated(&image);
        guest.tell("go on");
        space
    };
    let filled = space_after("filled");
    assert!(filled >= 16 * MIB, "after 16 MiB of writes the image takes {filled} bytes");
    let half = space_after("half");
    assert!(half <= filled - 7 * MIB, "a discard of 8 MiB left {half} of {filled} bytes");
    let empty = space_after("empty");
    assert!(empty <= MIB, "a discard of everything left {empty} bytes");
    let stored = space_after("stored");
    assert!(stored >= 24 * MIB, "with a file of 24 MiB the image takes {stored} bytes");
    let trimmed = space_after("trimmed");
    assert!(trimmed <= stored - 20 * MIB, "trimming left {trimmed} of {stored} bytes");
    guest.finish();

    assert_eq!(guest.said("write-cache"), "write back");
    assert_eq!(guest.said("block-size"), block_size.to_string());
    assert_eq!(guest.said("sectors"), (64 * MIB / 512).to_string());
    assert_eq!(guest.said("ro"), "0");
    let segments: u32 = guest.said("segments").parse().expect("a number");
    assert!(segments >= 126, "{segments} segments a request");
    let serial = match backend.program() {
        Program::Vublk => "disk-0123456789",
        Program::StorageDaemon => "vhost_user_blk",
    };
    assert_eq!(guest.said("serial"), serial);
    backend.assert_stops();
    check_on_host("ext4", &image);
}

#[test]
fn guest_sees_limits_of_a_512_byte_disk() {
    need_guests!("guest_sees_limits_of_a_512_byte_disk");
    limits(512);
}

#[test]
fn guest_sees_limits_of_a_4096_byte_disk() {
    need_guests!("guest_sees_limits_of_a_4096_byte_disk");
    limits(4096);
}

/// A disk served read-only is read-only for the guest, and its image does not change.
#[test]
fn read_only_disk_is_not_written() {
    need_guests!("read_only_disk_is_not_written");
    let scratch = Scratch::new();
    let image = scratch.raw("disk.raw", 16 * MIB);
    fill_with_noise(&image, 0, 16 * MIB);
    let digest = run("sha256sum", &[text(&image)]);
    let modified = std::fs::metadata(&image).and_then(|data| data.modified()).expect("a time");
    let mut backend = Backend::start(&scratch, &Disk::raw(&image).read_only());
    let job = r#"
say ro $(cat /sys/block/vda/ro)
say digest $(sha256sum </dev/vda)
if dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync,notrunc 2>/dev/null; then exit 1; fi
if blockdev --setrw /dev/vda && dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync,notrunc; then
  exit 1
fi 2>/dev/null
"#;
    let mut guest = Boot::new(&scratch, "read-only", job).start(&backend);
    assert_eq!(guest.expect("ro"), "1");
    assert_eq!(word(&guest.expect("digest")), word(&digest));
    assert_eq!(guest.expect("rc"), "0");
    guest.await_exit();
    backend.assert_stops();
    assert_eq!(run("sha256sum", &[text(&image)]), digest);
    let after = std::fs::metadata(&image).and_then(|data| data.modified()).expect("a time");
    assert_eq!(after, modified, "the image was modified");
}

// ---- the guest's side -----------------------------------------------------------------------

/// Not a test of its own: the jobs of other tests run it inside a guest. On the host it does
/// nothing.
#[test]
#[ignore = "the guests of other tests run it"]
fn runs_inside_a_guest() {
    load::run();
}
