//! Guests on VHDX images: dynamic ones, and differencing ones on a parent that the guest filled before.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use super::common::scratch::text;
use super::common::{Backend, Boot, Disk, Program, Scratch, can_boot, load, run, skip, vublk};
use super::{MIB, check_on_host, fill_job, killed_under_load, read_back_job};

impl Scratch {
    /// Makes a dynamic VHDX image in blocks of 1 MiB.
    fn vhdx(&self, name: &str, size: u64) -> PathBuf {
        let path = self.file(name);
        let size = size.to_string();
        vublk(&["create", "-q", "-f", "vhdx", "-o", "block_size=1M", text(&path), &size]);
        path
    }

    /// Makes a differencing one on it.
    fn vhdx_on(&self, parent: &Path, name: &str) -> PathBuf {
        let path = self.file(name);
        let on = ["-b", text(parent), "-F", "vhdx"];
        vublk(&[&["create", "-q", "-f", "vhdx"][..], &on, &[text(&path)]].concat());
        path
    }
}

/// The content as a raw image, after both checks that there are.
fn checked(scratch: &Scratch, image: &Path, has_parent: bool) -> PathBuf {
    vublk(&["check", "-q", text(image)]);
    let raw = scratch.file("out.raw");
    vublk(&["convert", "-f", "vhdx", "-O", "raw", text(image), text(&raw)]);
    if !has_parent {
        run("qemu-img", &["check", "-q", text(image)]);
        run("qemu-img", &["compare", "-q", "-f", "vhdx", "-F", "raw", text(image), text(&raw)]);
    }
    raw
}

/// A file system is filled on a dynamic image, read back and written on through a differencing one.
#[test]
fn ext4_on_vhdx() {
    if !can_boot("ext4_on_vhdx") {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.vhdx("disk.vhdx", 512 * MIB);
    let mut backend = Backend::start(&scratch, &Disk::vhdx(&image));
    let first = Boot::new(&scratch, "first", fill_job("ext4")).run(&backend);
    backend.assert_stops();
    check_on_host("ext4", &checked(&scratch, &image, false));

    let child = scratch.vhdx_on(&image, "child.avhdx");
    let before = run("sha256sum", &[text(&image)]);
    let mut backend = Backend::start(&scratch, &Disk::vhdx(&child).queues(2));
    let second = Boot::new(&scratch, "second", read_back_job("ext4")).cpus(2).run(&backend);
    assert_eq!(second.said("digest"), first.said("digest"));
    backend.assert_stops();
    assert_eq!(run("sha256sum", &[text(&image)]), before, "the parent has changed");
    check_on_host("ext4", &checked(&scratch, &child, true));
}

/// Kills under the living guest: nothing that it saw completed may be missing.
fn loses_nothing(test: &str, has_parent: bool) {
    if !can_boot(test) {
        return;
    }
    if Program::chosen() != Program::Vublk {
        return skip(test, "the stand-in does not recover requests in flight");
    }
    let scratch = Scratch::new();
    let mut image = scratch.vhdx("disk.vhdx", 64 * MIB);
    if has_parent {
        image = scratch.vhdx_on(&image, "child.avhdx");
    }
    let sum = killed_under_load(&Disk::vhdx(&image).queues(2), &scratch, 2);
    let raw = checked(&scratch, &image, has_parent);
    let found = format!("{:016x}", load::file_checksum(&raw, 0, load::REGION as usize));
    assert_eq!(found, sum, "the image holds what the guest read last");
}

#[test]
fn vhdx_backend_is_killed_under_load() {
    loses_nothing("vhdx_backend_is_killed_under_load", false);
}

#[test]
fn differencing_vhdx_backend_is_killed_under_load() {
    loses_nothing("differencing_vhdx_backend_is_killed_under_load", true);
}

/// Writes files for ever and says which are on the disk. Those that it was told of are still as they
/// were.
fn journal_job(known: &[(String, String)], make: bool) -> String {
    let prepare = if make { "mkfs.ext4 -q /dev/vda" } else { "" };
    let checks: String = known
        .iter()
        .map(|(name, sum)| format!("[ \"$(sha256sum </mnt/{name})\" = \"{sum}  -\" ]\n"))
        .collect();
    let next = known.len();
    format!(
        r#"
{prepare}
mount -t ext4 -o errors=panic /dev/vda /mnt
{checks}
say intact {next}
i={next}
while true; do
  dd if=/dev/urandom of=/mnt/f$i bs=16k count=$((1 + $i % 7)) conv=fsync 2>/dev/null
  [ $(($i % 4)) = 3 ] && dd if=/dev/zero of=/mnt/scratch bs=64k count=$i 2>/dev/null && rm /mnt/scratch
  [ $(($i % 8)) = 5 ] && /bin/fstrim /mnt
  set -- $(sha256sum </mnt/f$i)
  say wrote f$i $1
  i=$(($i + 1))
done
"#
    )
}

/// Guest and back-end die together, again and again; then the file system comes back clean.
fn dies_together(test: &str, has_parent: bool) {
    if !can_boot(test) {
        return;
    }
    let scratch = Scratch::new();
    let mut image = scratch.vhdx("disk.vhdx", 512 * MIB);
    if has_parent {
        image = scratch.vhdx_on(&image, "child.avhdx");
    }
    let seed = load::seed();
    println!("VUBLK_TEST_SEED={seed}");
    let mut known: Vec<(String, String)> = Vec::new();
    let mut backend = Backend::start(&scratch, &Disk::vhdx(&image));
    for round in 0..3 {
        let name = format!("dies-{round}");
        let job = journal_job(&known, round == 0);
        let mut guest = Boot::new(&scratch, &name, job).start(&backend);
        assert_eq!(guest.expect("intact"), known.len().to_string(), "round {round}");
        for _ in 0..12 + (seed >> (round * 8)) % 16 {
            let said = guest.expect_while("wrote", || backend.assert_alive());
            let (file, sum) = said.split_once(' ').expect("a name and a digest");
            known.push((file.to_string(), sum.to_string()));
        }
        std::thread::sleep(Duration::from_millis((seed >> (32 + round * 8)) % 60));
        backend.kill();
        drop(guest);
        backend.restart();
        backend.await_socket();
    }
    let mut job = journal_job(&known, false);
    job.truncate(job.find("i=").expect("a loop"));
    job += "umount /mnt\ne2fsck -fn /dev/vda >/tmp/check 2>&1 || { cat /tmp/check; exit 1; }\n";
    let last = Boot::new(&scratch, "last", job).run(&backend);
    assert_eq!(last.said("intact"), known.len().to_string());
    backend.assert_stops();
    check_on_host("ext4", &checked(&scratch, &image, has_parent));
}

#[test]
fn guest_on_vhdx_dies_together_with_its_backend() {
    dies_together("guest_on_vhdx_dies_together_with_its_backend", false);
}

#[test]
fn guest_on_differencing_vhdx_dies_together_with_its_backend() {
    dies_together("guest_on_differencing_vhdx_dies_together_with_its_backend", true);
}

/// The disk grows and shrinks under the guest, which is told, while it writes; and the back-end is
/// killed in between.
#[test]
fn vhdx_is_resized_under_a_guest() {
    let test = "vhdx_is_resized_under_a_guest";
    if !can_boot(test) {
        return;
    }
    if Program::chosen() != Program::Vublk {
        return skip(test, "the stand-in has no control socket here");
    }
    let scratch = Scratch::new();
    let image = scratch.vhdx("disk.vhdx", 64 * MIB);
    let mut backend = Backend::start(&scratch, &Disk::vhdx(&image).controlled());
    let job = r#"
dd if=/dev/urandom of=/tmp/data bs=1M count=2 2>/dev/null
writer() {
  while [ ! -e /tmp/stop ]; do
    dd if=/tmp/data of=/dev/vda bs=32k seek=$((32 * $1)) conv=fsync,notrunc 2>/dev/null
  done
}
writer 0 & first=$!
writer 10 & second=$!
say ready
while true; do
  hear
  [ "$heard" = stop ] && break
  for try in $(seq 400); do
    [ "$(cat /sys/block/vda/size)" = "$heard" ] && break
    usleep 20000
  done
  [ "$(cat /sys/block/vda/size)" = "$heard" ]
  dd if=/tmp/data of=/dev/vda bs=512 seek=$(($heard - 4096)) conv=fsync,notrunc 2>/dev/null
  say resized $heard
done
touch /tmp/stop
wait $first
wait $second
sync
echo 3 >/proc/sys/vm/drop_caches
for at in 0 10 62; do dd if=/dev/vda bs=1M skip=$at count=2 2>/dev/null | cmp - /tmp/data; done
set -- $(sha256sum </tmp/data)
say digest $1
"#;
    let mut guest = Boot::new(&scratch, "resized", job).cpus(2).start(&backend);
    guest.expect("ready");
    let end = guest.end();
    for (round, size) in [160, 300, 96, 200, 64].into_iter().enumerate() {
        let bytes = size * MIB;
        let arguments = json!({"device": "disk", "size": bytes, "x-vublk-shrink": true});
        backend.qmp(end).run("block_resize", arguments, end);
        let sectors = (bytes / 512).to_string();
        guest.tell(&sectors);
        assert_eq!(guest.expect_while("resized", || backend.assert_alive()), sectors);
        if round == 1 || round == 3 {
            backend.kill();
            backend.restart();
        }
    }
    guest.tell("stop");
    guest.finish();
    backend.assert_stops();
    let raw = checked(&scratch, &image, false);
    for at in [0, 10, 62] {
        let read = format!("dd if={} bs=1M skip={at} count=2 2>/dev/null | sha256sum", text(&raw));
        let found = run("sh", &["-c", &read]);
        assert!(found.starts_with(guest.said("digest")), "at {at} MiB");
    }
}
