//! What is refused, and the line that says so.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::common::{LoopDevice, fails, have, ok, vublk};
use crate::json;

/// All devices of the host are beside a device, and none of them is its image's to give away.
#[test]
fn an_image_on_a_device_names_no_other_device() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let Some(secret) = LoopDevice::new(&d.join("secret"), 4 << 20) else { return };
    let Some(top) = LoopDevice::new(&d.join("top"), 4 << 20) else { return };
    let (top, secret) = (top.name(), secret.name());
    ok(d, &["create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", top, "1M"]);
    let err = fails(d, &["map", "-f", "qcow2", top], 1);
    assert!(err.contains("--allow-dir /dev"), "{err}");
    ok(d, &["map", "-f", "qcow2", "--allow-dir", "/dev", top]);
}

#[test]
fn create_refuses_what_makes_no_sense() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for (args, message) in [
        (&["create", "x"][..], "x: a new image needs a size"),
        (&["create", "x", "1X"], "'1X' is not a size"),
        (&["create", "x", "16E"], "does not fit 64 bits"),
        (&["create", "x", "9007199254740992K"], "x: a size of 9223372036854775808 bytes is more"),
        (&["create", "x", "8191P"], "x: making it"),
        (&["create", "x", "7.99999E"], "x: making it"),
        (&["create", "-o", "size=1M", "x", "1M"], "the size is given twice"),
        (
            &["create", "-o", "cluster_size=64K", "x", "1M"],
            "format raw has no option 'cluster_size'",
        ),
        (
            &["create", "-o", "preallocation=metadata", "x", "1M"],
            "unknown preallocation 'metadata'",
        ),
        (
            &["create", "-b", "base", "-F", "raw", "x", "1M"],
            "raw images cannot have a backing file",
        ),
        (&["create", "-f", "vmdk", "x", "1M"], "x: vmdk images cannot be created"),
        (&["create", "nowhere/x", "1M"], "nowhere/x: No such file or directory"),
        (&["create", ".", "1M"], ".: is a directory, not an image"),
    ] {
        let line = fails(d, args, 1);
        assert!(line.contains(message), "{args:?}: {line}");
        assert!(!d.join("x").exists(), "{args:?}");
    }
    // Wrong usage is clap's to say.
    assert_eq!(vublk(d, &["create", "-f", "qcow3", "x", "1M"]).status.code(), Some(2));
    assert_eq!(vublk(d, &["create"]).status.code(), Some(2));
    assert_eq!(vublk(d, &["frobnicate"]).status.code(), Some(2));
}

/// Not a daemon that waits for ever.
#[test]
fn a_daemon_that_nobody_could_use_is_not_started() {
    let dir = tempfile::tempdir().unwrap();
    ok(dir.path(), &["create", "x", "1M"]);
    let line = fails(
        dir.path(),
        &["serve", "--blockdev", "driver=file,node-name=x,filename=x", "--pidfile", "pid"],
        78,
    );
    assert!(line.contains("nothing would be served"), "{line}");
    assert!(line.contains("--export") && line.contains("--control"), "{line}");
    assert!(!dir.path().join("pid").exists());
    // What is wrong with an option is told first.
    let line = fails(dir.path(), &["serve", "--blockdev", "driver=nbd,node-name=x"], 78);
    assert!(line.contains("does not accept value 'nbd'"), "{line}");
}

#[test]
fn bad_images_are_refused_with_a_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::create_dir(d.join("dir")).unwrap();
    std::fs::write(d.join("empty"), b"").unwrap();
    std::fs::write(d.join("odd"), [1; 1000]).unwrap();
    std::fs::write(d.join("disk.vhdx"), b"vhdxfile").unwrap();
    std::fs::write(d.join("disk.vmdk"), b"KDMV").unwrap();
    std::fs::write(d.join("log"), b"rhswfsj\0").unwrap();
    let fifo = Command::new("mkfifo").arg(d.join("fifo")).status();
    assert!(fifo.unwrap().success());
    std::os::unix::fs::symlink("loop", d.join("loop")).unwrap();
    let long = "x".repeat(300);
    for (name, message) in [
        ("missing", "missing: No such file or directory"),
        ("dir", "dir: is a directory, not an image"),
        ("fifo", "fifo: is neither a regular file nor a block device"),
        ("/dev/null", "/dev/null: is neither a regular file nor a block device"),
        ("loop", "loop: Too many levels of symbolic links"),
        ("odd/x", "odd/x: Not a directory"),
        ("disk.vhdx", "disk.vhdx: has only 8 bytes; the headers of a VHDX image alone take 1 MiB"),
        ("disk.vmdk", "disk.vmdk: vmdk images are not supported; convert it"),
        ("log", "log: is a log of writes"),
        ("nbd://host/disk", "nbd://host/disk: only files and block devices of this host"),
        (&long, "File name too long"),
    ] {
        for verb in ["info", "map", "check"] {
            if (verb, name) == ("check", "disk.vhdx") {
                // What is damaged is looked at, and not refused; whose the findings are is known.
                let (output, message) = (vublk(d, &[verb, name]), &message["disk.vhdx: ".len()..]);
                assert_eq!(output.status.code(), Some(2));
                let text = String::from_utf8(output.stdout).unwrap();
                assert!(text.contains(message), "{verb} {name}: {text}");
                continue;
            }
            let line = fails(d, &[verb, name], 1);
            assert!(line.contains(message), "{verb} {name}: {line}");
        }
        let line = fails(d, &["serve", "--socket-path", "s", name], 78);
        assert!(line.contains(message), "serve {name}: {line}");
    }
    let serve = |name, more: &[&str]| {
        fails(d, &[&["serve", "--socket-path", "s", "-f", "raw", name], more].concat(), 78)
    };
    assert_eq!(
        serve("empty", &[]),
        "empty: is empty, and a disk needs a size: vublk resize -f raw empty 10G"
    );
    assert_eq!(
        serve("odd", &[]),
        "odd: its size of 1000 bytes is not a multiple of the block size of 512; make it larger \
         (vublk resize -f raw odd 1024)"
    );
    // The way out works.
    ok(d, &["resize", "-f", "raw", "odd", "1024"]);
    let line = serve("odd", &["--block-size", "4096"]);
    assert!(line.contains("(vublk resize -f raw odd 4096) or use --block-size 512"), "{line}");
    let line = fails(d, &["serve", "--socket-path", "s", "--allow-dir", "no", "odd"], 78);
    assert!(line.contains("--allow-dir no: No such file"), "{line}");
    // Reading these is fine.
    assert!(ok(d, &["info", "empty"]).contains("virtual size: 0 B (0 bytes)"));
    assert_eq!(ok(d, &["map", "--output=json", "empty"]), "[]\n");
}

#[test]
fn serve_says_what_is_wrong_with_its_options() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "disk", "1M"]);
    let line = fails(d, &["serve", "disk"], 78);
    assert!(line.contains("--socket-path PATH"), "{line}");
    let line =
        fails(d, &["serve", "--socket-path", "s", "--control", "s", "-f", "raw", "disk"], 78);
    assert!(line.starts_with("--control s: is the socket of the disk"), "{line}");
    let nowhere = ["serve", "--socket-path", "s", "--control", "nowhere/s", "-f", "raw", "disk"];
    let output = Command::new(env!("CARGO_BIN_EXE_vublk")).current_dir(d).args(nowhere).output();
    let said = String::from_utf8(output.unwrap().stderr).unwrap();
    assert!(said.contains("cannot listen on nowhere/s") && !said.contains("serving"), "{said}");
    let long = format!("/tmp/{}", "s".repeat(110));
    let line = fails(d, &["serve", "--socket-path", &long, "disk"], 78);
    assert!(line.contains("has 115 bytes, and sockets allow 107"), "{line}");
    for usage in [
        &["serve", "--socket-path", "s"][..],
        &["serve", "--socket-path", "s", "--fd", "3", "disk"],
        &["serve", "--socket-path", "s", "--num-queues", "65", "disk"],
        &["serve", "--socket-path", "s", "--queue-size", "1025", "disk"],
        &["serve", "--socket-path", "s", "--serial", "a serial that is too long", "disk"],
        &["serve", "--socket-path", "s", "--cache", "fast", "disk"],
    ] {
        let output = vublk(d, usage);
        assert_eq!(output.status.code(), Some(2), "{usage:?}");
        assert!(String::from_utf8_lossy(&output.stderr).starts_with("error: "), "{usage:?}");
    }
    let capabilities = json(&ok(d, &["serve", "--print-capabilities"]));
    assert_eq!(capabilities["type"], "block");
    assert_eq!(capabilities["features"], serde_json::json!(["read-only", "blk-file"]));
}

#[test]
fn unreadable_images_are_refused_as_such() {
    let me = Command::new("id").arg("-u").output().unwrap().stdout;
    if me != b"0\n" || !have("setpriv") {
        eprintln!("SKIPPED: needs root and setpriv, to become nobody");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::set_permissions(d, PermissionsExt::from_mode(0o755)).unwrap();
    // The program itself may lie where nobody may not go.
    std::fs::copy(env!("CARGO_BIN_EXE_vublk"), d.join("vublk")).unwrap();
    std::fs::write(d.join("disk"), [0; 4096]).unwrap();
    let nobody = |mode, args: &[&str]| {
        std::fs::set_permissions(d.join("disk"), PermissionsExt::from_mode(mode)).unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "./vublk"]);
        let output = command.args(args).current_dir(d).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    // Who is asked is named: a unit's user is not the one who has made the image.
    assert_eq!(
        nobody(0o600, &["info", "disk"]),
        "vublk: disk: Permission denied (to open it for reading, as user 65534)\n"
    );
    assert_eq!(
        nobody(0o444, &["resize", "-f", "raw", "disk", "+1M"]),
        "vublk: disk: Permission denied (to open it for writing, as user 65534)\n"
    );
    assert_eq!(nobody(0o444, &["create", "new", "1M"]), "vublk: new: Permission denied\n");
}
