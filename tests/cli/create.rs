//! create, and what becomes of a file that is there already.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use crate::common::{LoopDevice, Random, fails, have, ok, skip, tool_ok};
use crate::{json, random_file};

/// Demands that a command that would make `x` is refused with these words, and changes nothing.
fn is_refused(dir: &Path, args: &[&str], message: &str) {
    let x = dir.join("x");
    let line = fails(dir, args, 1);
    assert!(line.contains(message), "{args:?}: {line}");
    assert!(!x.exists(), "{args:?}");
    std::fs::write(&x, "precious").unwrap();
    let line = fails(dir, args, 1);
    assert!(line.contains(message), "{args:?}: {line}");
    assert_eq!(std::fs::read(&x).unwrap(), b"precious", "{args:?}");
    std::fs::remove_file(&x).unwrap();
}

#[test]
fn a_create_that_is_refused_leaves_an_existing_file_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-q", "base", "1M"]);
    let long = "b".repeat(2000);
    for (args, message) in [
        (&["-f", "raw", "x", "8191P"][..], "x: making it"),
        (&["-f", "qcow2", "x", "8191P"], "too large for clusters of 65536 bytes"),
        (&["-f", "qcow2", "-o", "cluster_size=512", "x", "1T"], "use a larger cluster_size"),
        (&["-f", "qcow2", "-o", "cluster_size=3000", "x", "1M"], "not a power of two"),
        (&["-f", "qcow2", "-u", "-b", &long, "-F", "raw", "x", "1M"], "1 to 1023 bytes"),
        (&["-f", "qcow2", "-b", "nowhere", "-F", "raw", "x"], "nowhere: No such file"),
        (&["-f", "vhdx", "x", "65T"], "VHDX allows from one sector (512) to 64T"),
        (&["-f", "vhdx", "-o", "subformat=fixed,block_size=3M", "x", "1M"], "a power of two"),
        (&["-f", "add-cow", "-u", "-b", &long, "-F", "raw", "x", "1M"], "backing_file"),
    ] {
        let args = [&["create"], args].concat();
        is_refused(d, &args, message);
        assert!(!d.join("x.raw").exists(), "{args:?}");
    }
    std::fs::write(d.join("x"), [7; 512]).unwrap();
    fails(d, &["create", "-f", "add-cow", "-o", "image-file=x", "x"], 1);
    assert_eq!(std::fs::read(d.join("x")).unwrap(), [7; 512]);
}

#[test]
fn a_conversion_that_is_refused_leaves_its_target_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (d, sub) = (dir.path(), dir.path().join("sub"));
    std::fs::create_dir(&sub).unwrap();
    ok(d, &["create", "-q", "base", "1M"]);
    ok(d, &["create", "-q", "sub/from", "1M"]);
    std::fs::write(sub.join("odd"), [1; 1000]).unwrap();
    let convert = |args: &[&str], message: &str| {
        is_refused(&sub, &[&["convert", "-f", "raw"], args, &["x"]].concat(), message);
    };
    for how in
        [&["-B", "../base", "-F", "raw"][..], &["-o", "backing_file=../base,backing_fmt=raw"]]
    {
        let args = [&["-O", "qcow2"], how, &["from"]].concat();
        convert(&args, "x: its backing file: ../base: lies outside of the directories");
    }
    convert(&["-O", "qcow2", "-o", "cluster_size=3000", "from"], "not a power of two");
    convert(&["-O", "vmdk", "from"], "cannot be created");
    convert(&["-O", "raw", "-o", "size=8191P", "from"], "x: making it");
    // In a file system without direct I/O, it is that which is refused.
    convert(&["-T", "none", "odd"], "irect");
    ok(
        &sub,
        &["convert", "-O", "qcow2", "-B", "../base", "-F", "raw", "--allow-dir", "..", "from", "x"],
    );
}

/// As with qemu-img, an image that can be is made; a guest's disk it becomes when it is made larger.
#[test]
fn a_size_of_zero_is_served_where_the_format_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for format in ["raw", "qcow2"] {
        ok(d, &["create", "-q", "-f", format, "x", "0"]);
        assert_eq!(json(&ok(d, &["info", "--output=json", "-f", format, "x"]))["virtual-size"], 0);
        if format == "qcow2" && have("qemu-img") {
            tool_ok(d, "qemu-img", &["check", "-q", "x"]);
        }
        ok(d, &["convert", "-f", format, "-O", "qcow2", "x", "copy"]);
        ok(d, &["compare", "-f", format, "-F", "qcow2", "x", "copy"]);
        let line = fails(d, &["serve", "--socket-path", "s", "-f", format, "x"], 78);
        let way_out = format!("a disk needs a size: vublk resize -f {format} x 10G");
        assert!(line.contains(&way_out), "{line}");
        ok(d, &["resize", "-q", "-f", format, "x", "10G"]);
        std::fs::remove_file(d.join("x")).unwrap();
    }
    for format in ["vhdx", "add-cow"] {
        is_refused(d, &["create", "-f", format, "x", "0"], "x: a size of 0 bytes cannot be: ");
    }
}

/// The backing file may stand on images elsewhere, as when the new image is opened.
#[test]
fn a_backing_file_may_pull_in_what_the_operator_allows() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for name in ["bases", "images"] {
        std::fs::create_dir(d.join(name)).unwrap();
    }
    ok(d, &["create", "-q", "bases/base", "1M"]);
    let mid = ["create", "-q", "-f", "qcow2", "-u", "-b", "../bases/base", "-F", "raw"];
    ok(d, &[&mid[..], &["images/mid", "1M"]].concat());
    for format in ["qcow2", "add-cow"] {
        let top = format!("top.{format}");
        let create = ["create", "-q", "-f", format, "-b", "images/mid", "-F", "qcow2", &top];
        let line = fails(d, &create, 1);
        let bases = d.join("bases").canonicalize().unwrap();
        let way_out = format!("allow it with --allow-dir {}", bases.display());
        assert!(line.ends_with(&way_out), "{line}");
        assert!(!d.join(&top).exists());
        ok(d, &[&create[..], &["--allow-dir", "bases"]].concat());
        ok(d, &["map", "--allow-dir", "bases", &top]);
    }
}

/// On a file system that is too small, and that nobody else sees.
#[test]
fn a_create_that_fails_half_way_leaves_no_half_made_file() {
    let dir = tempfile::tempdir().unwrap();
    let script = "mount -t tmpfs -o size=1M none . && cd . && echo mounted || exit 0; \
                  printf precious > old; \
                  \"$0\" create -q -o preallocation=full old 4M; echo $? $(stat -c %s old); \
                  \"$0\" create -q -o preallocation=full new 4M; echo $?; ls";
    let mut command = Command::new("unshare");
    command.args(["-r", "-m", "sh", "-c", script, env!("CARGO_BIN_EXE_vublk")]);
    let Ok(output) = command.current_dir(dir.path()).output() else { return skip("no unshare") };
    let said = String::from_utf8(output.stdout).unwrap();
    let Some(said) = said.strip_prefix("mounted\n") else { return skip("no mount of our own") };
    assert_eq!(said, "1 0\n1\nold\n");
    let lines = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<&str> = lines.lines().collect();
    let full = "making it 4194304 bytes large: No space left on device";
    let lost = "what old contained is gone, and there is no new image in it";
    assert_eq!(lines, [format!("vublk: {lost}: old: {full}"), format!("vublk: new: {full}")]);
}

#[test]
fn an_empty_name_is_no_backing_file() {
    let dir = tempfile::tempdir().unwrap();
    for format in ["qcow2", "vhdx", "add-cow"] {
        let args = ["create", "-f", format, "-b", "", "-F", format, "x", "1M"];
        is_refused(dir.path(), &args, "the name of the backing file is empty");
        let unchecked = [&args[..], &["-u"]].concat();
        is_refused(dir.path(), &unchecked, "the name of the backing file is empty");
    }
}

#[test]
fn a_read_only_device_is_refused_before_anything_is_done() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("backing"), vec![0xee; 1 << 20]).unwrap();
    std::fs::write(d.join("from"), vec![1; 1 << 20]).unwrap();
    let Some(device) = LoopDevice::read_only(&d.join("backing")) else { return };
    let name = device.name();
    let why = format!("{name}: is a read-only block device");
    for args in [
        &["create", "-f", "raw", name, "1M"][..],
        &["create", "-f", "qcow2", name, "1M"],
        &["convert", "-f", "raw", "from", name],
        &["convert", "-n", "-f", "raw", "from", name],
    ] {
        let line = fails(d, args, 1);
        assert!(line.contains(&why) && !line.contains("is gone"), "{args:?}: {line}");
    }
    ok(d, &["map", "-f", "raw", name]);
}

#[test]
fn qcow2_images_are_made_on_block_devices() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    // What is on it shows nowhere.
    std::fs::write(d.join("backing"), vec![0xee; 8 << 20]).unwrap();
    let Some(device) = LoopDevice::over(&d.join("backing")) else { return };
    let device = device.name();
    let is_sound = || {
        ok(d, &["check", "-f", "qcow2", device]);
        if have("qemu-img") {
            tool_ok(d, "qemu-img", &["check", "-q", "-f", "qcow2", device]);
        }
    };
    ok(d, &["create", "-q", "-f", "qcow2", device, "1G"]);
    is_sound();
    assert_eq!(json(&ok(d, &["info", "--output=json", device]))["virtual-size"], 1 << 30);
    let mut random = Random::new("qcow2_images_are_made_on_block_devices");
    for cache in ["writeback", "none"] {
        random_file(&d.join("from"), 5 << 20, &mut random);
        File::options().write(true).open(d.join("from")).unwrap().set_len(2 << 30).unwrap();
        ok(d, &["convert", "-t", cache, "-f", "raw", "-O", "qcow2", "from", device]);
        is_sound();
        ok(d, &["compare", "-f", "raw", "-F", "qcow2", "from", device]);
        // What is zero takes no place, as in a file.
        ok(d, &["convert", "-f", "raw", "-O", "qcow2", "from", "file"]);
        let end =
            |image| json(&ok(d, &["check", "--output=json", image]))["image-end-offset"].clone();
        assert_eq!(end(device), end("file"));
    }
    // A disk may be larger than its device; what says where everything is must fit.
    let line = fails(d, &["create", "-f", "qcow2", device, "1P"], 1);
    assert!(line.contains("the device has only 8388608 bytes"), "{line}");
    let line = fails(d, &["create", "-f", "add-cow", device, "1M"], 1);
    assert!(line.contains("a device can be its image file"), "{line}");
    ok(d, &["compare", "-f", "raw", "-F", "qcow2", "from", device]);
}

/// Not an image that nobody can open.
#[test]
fn names_that_would_be_taken_for_addresses_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-q", "-f", "raw", "a:b", "1M"]);
    ok(d, &["create", "-q", "-f", "vhdx", "a:b.vhdx", "1M"]);
    for (format, backing, backing_format) in
        [("qcow2", "a:b", "raw"), ("add-cow", "a:b", "raw"), ("vhdx", "a:b.vhdx", "vhdx")]
    {
        let create = ["create", "-q", "-f", format, "-F", backing_format, "-b"];
        let name = format!("over:{format}");
        let line = fails(d, &[&create[..], &[backing, &name]].concat(), 1);
        assert!(line.contains(&format!("write ./{backing} if it is a file's name")), "{line}");
        assert!(!d.join(&name).exists() && !d.join(format!("{name}.raw")).exists());
        let plain = format!("./{backing}");
        ok(d, &[&create[..], &[&plain, &name]].concat());
        ok(d, &["compare", "-f", format, &name, backing]);
        if format != "vhdx" {
            let rebase = ["rebase", "-q", "-f", format, "-b", backing, "-F", "raw", &name];
            let line = fails(d, &rebase, 1);
            assert!(line.contains("write ./a:b if"), "{line}");
            ok(d, &["compare", "-f", format, &name, backing]);
        }
    }
    let line = fails(d, &["create", "-f", "add-cow", "-o", "image-file=a:b", "x"], 1);
    assert!(line.contains("write ./a:b if") && !d.join("x").exists(), "{line}");
}
