//! Guests that boot from our disk: by the drivers of the firmware, which differ from an operating system's.
//! They look for used requests instead of waiting for interrupts, have rings of their own in memory below
//! 1 MiB, reset the device when they hand it on, and send one request at a time.
//!
//! GRUB reads a kernel and an initramfs of 50 MB that way; the kernel then finds the same disk with its
//! own driver.

#[macro_use]
mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use common::guest::Firmware;
use common::{Backend, Boot, Disk, Guest, Scratch, can_make_bootable, run};

/// Length of the disks, in bytes.
const SIZE: u64 = 128 << 20;

/// Reads what the firmware has read, and writes behind it.
const JOB: &str = "
say size $(cat /sys/block/vda/size)
say digest $(dd if=/dev/vda bs=1M count=64 2>/dev/null | sha256sum | cut -c-64)
dd if=/jobs/default of=/dev/vda bs=1M seek=100 conv=fsync 2>/dev/null
";

/// A disk to boot from.
fn disk(scratch: &Scratch) -> PathBuf {
    let path = scratch.file("disk.raw");
    Boot::new(scratch, "disk", JOB).write_disk(&path, SIZE);
    path
}

/// Of what the guest looks at.
fn digest(path: &Path) -> String {
    let command = format!("head -c 64M '{}' | sha256sum | cut -c-64", path.display());
    run("sh", &["-c", &command]).trim().to_owned()
}

#[track_caller]
fn assert_read(guest: &Guest, digest: &str) {
    assert_eq!(guest.said("size"), (SIZE / 512).to_string());
    assert_eq!(guest.said("digest"), digest);
}

fn boots(firmware: Firmware, platform: &str) {
    let scratch = Scratch::new();
    let path = disk(&scratch);
    let before = digest(&path);
    let mut backend = Backend::start(&scratch, &Disk::raw(&path));
    let mut guest = Boot::new(&scratch, "boot", JOB).by_firmware(firmware).start(&backend);
    assert_eq!(guest.expect("grub"), platform);
    guest.finish();
    assert_read(&guest, &before);
    backend.assert_stops();
    let image = std::fs::read(&path).expect("the disk");
    assert!(image[100 << 20..].starts_with(JOB.as_bytes()), "the guest's write is there");
}

#[test]
fn bios_boots_from_the_disk() {
    need_guests!("bios_boots_from_the_disk");
    if !can_make_bootable("bios_boots_from_the_disk") {
        return;
    }
    boots(Firmware::Bios, "pc");
}

#[test]
fn efi_boots_from_the_disk() {
    need_guests!("efi_boots_from_the_disk");
    if !can_make_bootable("efi_boots_from_the_disk") {
        return;
    }
    boots(Firmware::Efi, "efi");
}

/// The back-end is killed while the firmware reads, and comes back: the boot goes on.
#[test]
fn a_boot_survives_kills() {
    need_guests!("a_boot_survives_kills");
    if !can_make_bootable("a_boot_survives_kills") {
        return;
    }
    need_vublk!("a_boot_survives_kills", "does not recover requests in flight");
    let scratch = Scratch::new();
    let path = disk(&scratch);
    let before = digest(&path);
    let mut backend = Backend::start(&scratch, &Disk::raw(&path));
    for (name, firmware) in [("bios", Firmware::Bios), ("efi", Firmware::Efi)] {
        let mut guest = Boot::new(&scratch, name, JOB).by_firmware(firmware).start(&backend);
        guest.expect("grub");
        for pause in [0, 100, 0, 300] {
            // Into the middle of the kernel and the initramfs, which take seconds.
            std::thread::sleep(Duration::from_millis(pause));
            backend.kill();
            backend.restart();
        }
        guest.finish();
        assert_read(&guest, &before);
    }
    backend.assert_stops();
}
