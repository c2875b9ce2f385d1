//! Image locks: QEMU and vublk keep out of each other's disks, and readers coexist.
//!
//! The locks are held in this process, and another thread that starts a child would hand it their
//! files for a moment. So these tests have a binary of their own and run one at a time.
//!
//! Tests that need a tool that is missing say so on stderr and pass.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard};

mod common;

use common::{LoopDevice, Setup, fails, have, ok, tool_ok};
use vublk::images::{ImageFormat, Locking, OpenRequest, open};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Waits for the other tests.
fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// A QEMU process that has an image open until dropped.
struct Qemu(Child);

impl Qemu {
    /// qemu-io; `None` if it refuses the image.
    fn io(dir: &Path, args: &[&str]) -> Option<Qemu> {
        let mut qemu = Qemu::start(dir, "qemu-io", args);
        // It reads commands only once the image is open.
        qemu.say("length")?;
        qemu.has_printed(1).then_some(qemu)
    }

    /// A virtual machine with a virtio-blk disk.
    fn machine(dir: &Path, drive: &str) -> Option<Qemu> {
        let drive = format!("if=none,id=d,{drive}");
        let mut args = vec!["-nodefaults", "-display", "none", "-S", "-accel", "tcg"];
        args.extend(["-qmp", "stdio", "-drive", &drive, "-device", "virtio-blk-pci,drive=d"]);
        let mut qemu = Qemu::start(dir, "qemu-system-x86_64", &args);
        // It greets at once, but answers only when the machine is there.
        qemu.say("{\"execute\": \"qmp_capabilities\"}")?;
        qemu.has_printed(2).then_some(qemu)
    }

    fn start(dir: &Path, program: &str, args: &[&str]) -> Qemu {
        let mut command = Command::new(program);
        command.args(args).current_dir(dir).stdin(Stdio::piped()).stdout(Stdio::piped());
        Qemu(command.stderr(Stdio::null()).spawn().unwrap())
    }

    /// Sends a line; `None` if it has gone already.
    fn say(&mut self, line: &str) -> Option<()> {
        writeln!(self.0.stdin.as_mut().unwrap(), "{line}").ok()
    }

    /// Waits until it has printed `count` lines; false if it gives up before.
    fn has_printed(&mut self, count: usize) -> bool {
        let mut reader = BufReader::new(self.0.stdout.take().unwrap());
        let mut lines = 0;
        while lines < count && reader.read_line(&mut String::new()).unwrap() > 0 {
            lines += 1;
        }
        // A closed pipe would end it.
        self.0.stdout = Some(reader.into_inner());
        lines == count
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Ways of vublk to open `disk`.
fn ours(dir: &Path, how: &str) -> vublk::Result<vublk::images::Image> {
    let path = dir.join("disk");
    let request = match how {
        "writer" => OpenRequest::write(path),
        "reader" => OpenRequest::read(path),
        "share" => OpenRequest::read(path).locking(Locking::Share),
        "inspect" => OpenRequest::read(path).locking(Locking::Inspect),
        _ => unreachable!(),
    };
    open(&request.format(Some(ImageFormat::Raw)))
}

#[test]
fn qemu_and_vublk_refuse_each_others_disks() {
    if !have("qemu-io") {
        return;
    }
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "disk", "1M"]);
    // Who opens, whether the other writes, and whether both may be there.
    let io_writer: &[&str] = &["-f", "raw", "disk"];
    let io_reader: &[&str] = &["-r", "-f", "raw", "disk"];
    let io_share: &[&str] = &["-U", "-r", "-f", "raw", "disk"];
    let matrix = [
        ("writer", io_writer, false),
        ("writer", io_reader, true),
        ("writer", io_share, true),
        ("reader", io_writer, false),
        ("reader", io_reader, true),
        ("reader", io_share, true),
        ("share", io_writer, true),
        ("share", io_reader, true),
        ("inspect", io_writer, true),
    ];
    for (how, args, coexist) in matrix {
        let first = ours(d, how).unwrap();
        assert_eq!(Qemu::io(d, args).is_some(), coexist, "vublk {how}, then qemu-io {args:?}");
        drop(first);
        let qemu = Qemu::io(d, args).unwrap();
        let second = ours(d, how);
        assert_eq!(second.is_ok(), coexist, "qemu-io {args:?}, then vublk {how}: {second:?}");
        if let Err(err) = &second {
            let err = err.to_string();
            assert!(err.contains("disk: ") && err.contains("qemu-io (pid "), "{err}");
        }
        drop((qemu, second));
        ours(d, "writer").unwrap();
    }
}

#[test]
fn a_machines_disk_is_left_alone() {
    if !have("qemu-system-x86_64") {
        return;
    }
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "disk", "1M"]);
    let matrix = [
        ("writer", "file=disk,format=raw", false),
        ("writer", "file=disk,format=raw,read-only=on", false),
        ("reader", "file=disk,format=raw", false),
        ("reader", "file=disk,format=raw,read-only=on", true),
        ("share", "file=disk,format=raw", true),
    ];
    for (how, drive, coexist) in matrix {
        let first = ours(d, how).unwrap();
        assert_eq!(Qemu::machine(d, drive).is_some(), coexist, "vublk {how}, then QEMU {drive}");
        drop(first);
        let qemu = Qemu::machine(d, drive).unwrap();
        assert_eq!(ours(d, how).is_ok(), coexist, "QEMU {drive}, then vublk {how}");
        if !drive.contains("read-only") {
            // The commands keep away or look on as asked.
            for args in [&["resize", "-f", "raw", "disk", "+1M"][..], &["create", "disk", "1M"]] {
                let line = fails(d, args, 1);
                assert!(line.contains("qemu-system-x86 (pid "), "{line}");
            }
            assert_eq!(std::fs::metadata(d.join("disk")).unwrap().len(), 1 << 20);
            for args in [&["map", "disk"][..], &["convert", "disk", "copy"]] {
                let line = fails(d, args, 1);
                assert!(line.ends_with("; -U reads it all the same"), "{line}");
            }
            // It is no option of those who rely on it.
            let overlay = ["create", "-f", "add-cow", "-b", "disk", "-F", "raw", "top"];
            let line = fails(d, &overlay, 1);
            assert!(line.contains("qemu-system-x86 (pid ") && !line.contains("-U"), "{line}");
            ok(d, &["map", "-U", "disk"]);
            ok(d, &["convert", "-U", "disk", "copy"]);
            ok(d, &["info", "disk"]);
        }
        drop(qemu);
    }
}

#[test]
fn backing_files_can_be_shared_by_chains() {
    if !have("qemu-img") || !have("qemu-system-x86_64") {
        return;
    }
    // A base that QEMU uses below an overlay, and that we read at the same time, as any chain of
    // ours would: backing files are opened as readers.
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "base", "1M"]);
    tool_ok(d, "qemu-img", &["create", "-f", "qcow2", "-b", "base", "-F", "raw", "disk.qcow2"]);
    let qemu = Qemu::io(d, &["-f", "qcow2", "disk.qcow2"]).unwrap();
    let raw = Some(ImageFormat::Raw);
    let reader = open(&OpenRequest::read(d.join("base")).format(raw)).unwrap();
    // A reader of ours and the overlay's user keep a writer of ours away.
    drop(qemu);
    let writer = open(&OpenRequest::write(d.join("base")).format(raw));
    assert!(writer.is_err());
    drop(reader);
    // And a machine's base may not be written, by anybody.
    let machine = Qemu::machine(d, "file=disk.qcow2,format=qcow2").unwrap();
    open(&OpenRequest::read(d.join("base")).format(raw)).unwrap();
    assert!(open(&OpenRequest::write(d.join("base")).format(raw)).is_err());
    drop(machine);
    open(&OpenRequest::write(d.join("base")).format(raw)).unwrap();
}

/// A device's number is not that of its node, and yet the kernel's word on who has it open is for the
/// device. Whoever is not seen would be taken for dead, and waited for.
#[test]
fn who_holds_a_block_device_is_named_at_once() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let Some(device) = LoopDevice::new(&dir.path().join("backing"), 1 << 20) else { return };
    let mut backend = Setup::new(&[]).image(device.path()).start();
    drop(backend.qemu());
    for args in [&["create", device.name(), "1M"][..], &["map", "-f", "raw", device.name()]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
        let output = command.args(["--log-level", "info"]).args(args).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let holder = format!("; it is open in vublk (pid {})", backend.pid());
        assert!(said.contains(&holder), "{args:?}: {said}");
        assert!(!said.contains("waiting"), "{args:?}: {said}");
    }
    assert!(backend.terminate().success());
}
