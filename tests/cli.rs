//! Black box tests of the commands, with qemu-img as the second opinion where it is installed.
//!
//! Tests that need a tool or a right that is missing say so on stderr and pass.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

mod common;

use common::{Random, fails, have, ok, ok_or, tool, tool_ok, vublk};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|err| panic!("{err}: {text}"))
}

/// Makes a file of random runs: data, stored zeros, holes.
fn random_file(path: &Path, len: u64, random: &mut Random) -> Vec<u8> {
    let file = File::create(path).unwrap();
    file.set_len(len).unwrap();
    let mut content = vec![0; len as usize];
    for _ in 0..1 + random.below(20) {
        let start = random.below(len);
        let scale = 9 + random.below(12);
        let run = (1 + random.below(1 << scale)).min(len - start);
        let bytes = &mut content[start as usize..(start + run) as usize];
        if random.below(3) == 0 {
            bytes.fill(0);
        } else {
            bytes.iter_mut().for_each(|b| *b = random.below(256) as u8);
        }
        file.write_all_at(bytes, start).unwrap();
    }
    // Until they are on the disk, the blocks that a file takes are anybody's guess.
    file.sync_all().unwrap();
    content
}

/// The 4 KiB blocks of a file that are not holes, asked block by block.
fn stored_blocks(path: &Path) -> Vec<bool> {
    let map =
        json(&ok(Path::new("/"), &["map", "--output=json", "-f", "raw", path.to_str().unwrap()]));
    let mut blocks = vec![false; std::fs::metadata(path).unwrap().len().div_ceil(4096) as usize];
    for entry in map.as_array().unwrap().iter().filter(|e| e["data"] == true) {
        let (start, len) = (entry["start"].as_u64().unwrap(), entry["length"].as_u64().unwrap());
        for block in start / 4096..(start + len).div_ceil(4096) {
            blocks[block as usize] = true;
        }
    }
    blocks
}

#[test]
fn create_makes_sparse_files_of_the_right_size() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    assert_eq!(ok(d, &["create", "a", "1.5M"]), "Formatting 'a', fmt=raw size=1572864\n");
    let meta = std::fs::metadata(d.join("a")).unwrap();
    assert_eq!((meta.len(), meta.blocks()), (1_572_864, 0));
    assert_eq!(ok(d, &["create", "-q", "-f", "raw", "-o", "size=64K", "b"]), "");
    assert_eq!(std::fs::metadata(d.join("b")).unwrap().len(), 65536);
    // A size that is no multiple of a sector is rounded up, as qemu-img does.
    ok(d, &["create", "c", "1000001"]);
    assert_eq!(std::fs::metadata(d.join("c")).unwrap().len(), 1_000_448);
    for how in ["falloc", "full"] {
        ok(d, &["create", "-o", &format!("preallocation={how}"), how, "1M"]);
        let meta = std::fs::metadata(d.join(how)).unwrap();
        assert!(meta.blocks() * 512 >= 1 << 20, "{how}: {} blocks", meta.blocks());
        assert_eq!(meta.len(), 1 << 20);
    }
    // Overwriting leaves nothing of what was there.
    std::fs::write(d.join("b"), [7; 4096]).unwrap();
    ok(d, &["create", "b", "8K"]);
    assert_eq!(std::fs::read(d.join("b")).unwrap(), [0; 8192]);
    assert!(ok(d, &["create", "-o", "help"]).contains("preallocation"));
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
                // What is damaged is looked at, and not refused.
                let output = vublk(d, &[verb, name]);
                assert_eq!(output.status.code(), Some(2));
                let text = String::from_utf8(output.stdout).unwrap();
                assert!(text.contains(message), "{verb} {name}: {text}");
                continue;
            }
            let line = fails(d, &[verb, name], 1);
            assert!(line.contains(message), "{verb} {name}: {line}");
        }
        let line = fails(d, &["serve", "--socket-path", "s", name], 1);
        assert!(line.contains(message), "serve {name}: {line}");
    }
    let serve = |name, more: &[&str]| {
        fails(d, &[&["serve", "--socket-path", "s", "-f", "raw", name], more].concat(), 1)
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
    let line = fails(d, &["serve", "--socket-path", "s", "--allow-dir", "no", "odd"], 1);
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
    let line = fails(d, &["serve", "disk"], 1);
    assert!(line.contains("--socket-path PATH"), "{line}");
    let long = format!("/tmp/{}", "s".repeat(110));
    let line = fails(d, &["serve", "--socket-path", &long, "disk"], 1);
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
    assert_eq!(nobody(0o600, &["info", "disk"]), "vublk: disk: Permission denied\n");
    assert_eq!(
        nobody(0o444, &["resize", "-f", "raw", "disk", "+1M"]),
        "vublk: disk: Permission denied (to open it for writing)\n"
    );
    assert_eq!(nobody(0o444, &["create", "new", "1M"]), "vublk: new: Permission denied\n");
}

#[test]
fn resize_goes_both_ways_if_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let len = || std::fs::metadata(d.join("disk")).unwrap().len();
    ok(d, &["create", "disk", "1M"]);
    assert_eq!(ok(d, &["resize", "-f", "raw", "disk", "+1M"]), "Image resized.\n");
    assert_eq!(len(), 2 << 20);
    assert_eq!(ok(d, &["resize", "-q", "disk", "3M"]), "");
    assert_eq!(len(), 3 << 20);
    let line = fails(d, &["resize", "disk", "-1M"], 1);
    assert!(line.ends_with("use --shrink if that is meant"), "{line}");
    assert_eq!(len(), 3 << 20);
    ok(d, &["resize", "--shrink", "disk", "-1M"]);
    assert_eq!(len(), 2 << 20);
    let line = fails(d, &["resize", "--shrink", "disk", "-3M"], 1);
    assert!(line.contains("cannot take 3145728 bytes from a disk that has 2097152"), "{line}");
    let line = fails(d, &["resize", "--shrink", "disk", "0"], 1);
    assert!(line.contains("at least one block"), "{line}");
    let line = fails(d, &["resize", "disk", "+16383P"], 1);
    assert!(line.contains("is more than the"), "{line}");
    assert_eq!(len(), 2 << 20);
}

#[test]
fn info_and_map_say_what_qemu_img_says() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut random = Random::new("info_and_map_say_what_qemu_img_says");
    for round in 0..10 {
        let len = 512 * (1 + random.below(10_000));
        random_file(&d.join("disk"), len, &mut random);
        let theirs = tool(d, "qemu-img", &["info", "--output=json", "-f", "raw", "disk"]);
        let theirs = json(std::str::from_utf8(&theirs.stdout).unwrap());
        assert_eq!(json(&ok(d, &["info", "--output=json", "disk"])), theirs, "round {round}");
        let chain = json(&ok(d, &["info", "--backing-chain", "--output=json", "disk"]));
        assert_eq!(chain, serde_json::json!([theirs]));

        let theirs = tool(d, "qemu-img", &["map", "--output=json", "-f", "raw", "disk"]);
        let theirs = json(std::str::from_utf8(&theirs.stdout).unwrap());
        let mut ours = json(&ok(d, &["map", "--output=json", "-f", "raw", "disk"]));
        for entry in ours.as_array_mut().unwrap() {
            let filename = entry.as_object_mut().unwrap().remove("filename");
            assert_eq!(filename.unwrap(), "disk");
        }
        assert_eq!(ours, theirs, "round {round}");
        let theirs = tool(d, "qemu-img", &["map", "-f", "raw", "disk"]);
        assert_eq!(ok(d, &["map", "disk"]), String::from_utf8(theirs.stdout).unwrap());
    }
    let human = ok(d, &["info", "disk"]);
    let theirs = tool(d, "qemu-img", &["info", "-f", "raw", "disk"]);
    assert_eq!(human, String::from_utf8(theirs.stdout).unwrap());
    let measured = tool(d, "qemu-img", &["measure", "--output=json", "-f", "raw", "disk"]);
    assert_eq!(
        json(&ok(d, &["measure", "--output=json", "disk"])),
        json(std::str::from_utf8(&measured.stdout).unwrap())
    );
}

#[test]
fn a_map_can_be_cut_and_piped() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "disk", "1M"]);
    let cut = ok(d, &["map", "--output=json", "-s", "64K", "-l", "4K", "disk"]);
    let entry = &json(&cut)[0];
    assert_eq!((entry["start"].as_u64(), entry["length"].as_u64()), (Some(65536), Some(4096)));
    let line = fails(d, &["map", "-s", "2M", "disk"], 1);
    assert!(line.contains("--start-offset 2097152 lies beyond"), "{line}");

    // A reader that leaves early is no error.
    let mut child = Command::new(env!("CARGO_BIN_EXE_vublk"))
        .args(["map", "disk"])
        .current_dir(d)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn convert_keeps_content_and_holes() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut random = Random::new("convert_keeps_content_and_holes");
    let block = std::fs::metadata(d).unwrap().blksize();
    for round in 0..30 {
        // Sizes that are no multiple of anything are part of it.
        let len = 1 + random.below(6 << 20);
        let content = random_file(&d.join("from"), len, &mut random);
        let lanes = (1 + random.below(16)).to_string();
        ok(d, &["convert", "-f", "raw", "-O", "raw", "-m", &lanes, "from", "to"]);
        // The target is a whole number of sectors, as with qemu-img.
        let to = std::fs::read(d.join("to")).unwrap();
        assert_eq!(to.len() as u64, len.next_multiple_of(512), "round {round}");
        assert!(to[..content.len()] == content[..], "round {round}");
        assert!(to[content.len()..].iter().all(|b| *b == 0), "round {round}");
        if block == 4096 {
            let expected: Vec<_> =
                content.chunks(4096).map(|b| b.iter().any(|b| *b != 0)).collect();
            // Only the last block, if it is a short one, may be stored without need.
            let whole = len as usize / 4096;
            let stored = stored_blocks(&d.join("to"));
            assert!(stored[..whole] == expected[..whole], "round {round}");
        }
        let output = vublk(d, &["compare", "-f", "raw", "-F", "raw", "from", "to"]);
        assert_eq!(output.status.code(), Some(0), "round {round}: {output:?}");

        // Onto something that is there already, larger than needed.
        let extra = random.below(1 << 20);
        std::fs::write(d.join("old"), vec![0xee; (len + extra) as usize]).unwrap();
        ok(d, &["convert", "-n", "from", "old"]);
        let old = std::fs::read(d.join("old")).unwrap();
        assert!(old[..len as usize] == content, "round {round}");
        assert!(old[len as usize..].iter().all(|b| *b == 0xee), "round {round}");
    }
}

#[test]
fn convert_has_qemu_imgs_options() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "from", "1M"]);
    File::options().write(true).open(d.join("from")).unwrap().write_all_at(b"x", 70_000).unwrap();
    ok(d, &["convert", "-S", "0", "from", "full"]);
    assert!(std::fs::metadata(d.join("full")).unwrap().blocks() * 512 >= 1 << 20);
    ok(d, &["convert", "-S", "64K", "full", "sparse"]);
    assert_eq!(stored_blocks(&d.join("sparse")).iter().filter(|b| **b).count(), 1);
    // The zeros around the data are shorter than this, so all of the chunk is stored.
    ok(d, &["convert", "-S", "1M", "full", "dense"]);
    assert_eq!(stored_blocks(&d.join("dense")).iter().filter(|b| **b).count(), 256);
    ok(d, &["convert", "-W", "-m", "16", "-t", "unsafe", "-T", "writeback", "from", "to"]);
    ok(d, &["convert", "-o", "preallocation=falloc", "from", "to"]);
    assert!(std::fs::metadata(d.join("to")).unwrap().blocks() * 512 >= 1 << 20);

    std::fs::write(d.join("small"), [0; 512]).unwrap();
    let line = fails(d, &["convert", "-n", "from", "small"], 1);
    assert!(line.contains("small: has 512 bytes, and the source 1048576"), "{line}");
    let line = fails(d, &["convert", "from", "from"], 1);
    assert!(line.contains("same file"), "{line}");
    std::fs::hard_link(d.join("from"), d.join("twin")).unwrap();
    let line = fails(d, &["convert", "from", "twin"], 1);
    assert!(line.contains("same file"), "{line}");
    let line = fails(d, &["convert", "-B", "x", "from", "new"], 1);
    assert!(line.contains("raw images cannot have a backing file"), "{line}");
    assert_eq!(std::fs::metadata(d.join("from")).unwrap().len(), 1 << 20);
    let line = fails(d, &["convert", "missing", "new"], 1);
    assert_eq!(line, "missing: No such file or directory");
    assert!(!d.join("new").exists());

    // Progress: silent unless on a terminal or forced.
    let quiet = vublk(d, &["convert", "-p", "from", "to"]);
    assert_eq!(quiet.stderr, b"");
    let shown = vublk(d, &["convert", "--progress=always", "from", "to"]);
    let text = String::from_utf8(shown.stderr).unwrap();
    assert!(text.ends_with("(100.00/100%)\r\n"), "{text:?}");
}

#[test]
fn convert_with_direct_io() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut random = Random::new("convert_with_direct_io");
    let content = random_file(&d.join("from"), 4096 * 777, &mut random);
    let output = vublk(d, &["convert", "-T", "none", "-t", "none", "from", "to"]);
    if !output.status.success() {
        let line = String::from_utf8(output.stderr).unwrap();
        assert!(line.contains("does not support O_DIRECT"), "{line}");
        eprintln!("SKIPPED: {line}");
        return;
    }
    assert!(std::fs::read(d.join("to")).unwrap() == content);
    std::fs::write(d.join("odd"), vec![1; 5000]).unwrap();
    let line = fails(d, &["convert", "-T", "none", "odd", "to"], 1);
    assert!(
        line.contains("5000 bytes is not a multiple") && line.contains("-T writeback"),
        "{line}"
    );
    // The target has whole sectors, so it depends on the host's unit whether there is room.
    let output = vublk(d, &["convert", "-t", "none", "odd", "to"]);
    if output.status.success() {
        let to = std::fs::read(d.join("to")).unwrap();
        assert!(to[..5000] == [1; 5000] && to[5000..] == [0; 120]);
    }
}

#[test]
fn convert_agrees_with_qemu_img() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut random = Random::new("convert_agrees_with_qemu_img");
    for _ in 0..5 {
        let len = 4096 * (1 + random.below(2000));
        random_file(&d.join("from"), len, &mut random);
        // qemu-img always stores the first block of what it creates.
        File::options().write(true).open(d.join("from")).unwrap().write_all_at(b"x", 0).unwrap();
        ok(d, &["convert", "from", "ours"]);
        assert!(
            tool(d, "qemu-img", &["convert", "-f", "raw", "-O", "raw", "from", "theirs"])
                .status
                .success()
        );
        let strict = ["compare", "-s", "-f", "raw", "-F", "raw", "ours", "theirs"];
        let theirs = tool(d, "qemu-img", &strict);
        assert_eq!(theirs.status.code(), Some(0), "{theirs:?}");
        let ours = vublk(d, &strict);
        assert_eq!(ours.status.code(), Some(0), "{ours:?}");
    }
}

/// A loop device; detached when dropped.
struct LoopDevice(String);

impl LoopDevice {
    fn new(backing: &Path) -> Option<LoopDevice> {
        let output = Command::new("losetup").args(["-f", "--show"]).arg(backing).output().ok()?;
        let device = String::from_utf8(output.stdout).ok()?.trim().to_string();
        if !output.status.success() {
            eprintln!("SKIPPED: no loop device: {}", String::from_utf8_lossy(&output.stderr));
            return None;
        }
        Some(LoopDevice(device))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn block_devices_can_be_targets() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut random = Random::new("block_devices_can_be_targets");
    let content = random_file(&d.join("from"), 2 << 20, &mut random);
    std::fs::write(d.join("backing"), vec![0xcc; 4 << 20]).unwrap();
    let Some(device) = LoopDevice::new(&d.join("backing")) else { return };
    for cache in ["writeback", "none"] {
        ok(d, &["convert", "-t", cache, "-O", "raw", "from", &device.0]);
        let mut bytes = vec![0; 2 << 20];
        File::open(&device.0).unwrap().read_exact(&mut bytes).unwrap();
        assert!(bytes == content, "{cache}");
    }
    let info = json(&ok(d, &["info", "--output=json", "-f", "raw", &device.0]));
    assert_eq!(info["virtual-size"], 4 << 20);
    assert_eq!(info["children"][0]["info"]["format"], "host_device");
    let line = fails(d, &["create", &device.0, "8M"], 1);
    assert!(line.contains("the device has only 4194304 bytes"), "{line}");
    let line = fails(d, &["resize", "-f", "raw", &device.0, "8M"], 1);
    assert!(line.contains("block device cannot be changed"), "{line}");
}

#[test]
fn compare_has_qemu_imgs_exit_codes() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "a", "4M"]);
    ok(d, &["create", "b", "4M"]);
    let run = |args: &[&str]| {
        let ours = vublk(d, &[&["compare"], args].concat());
        let said = String::from_utf8(ours.stdout).unwrap();
        if have("qemu-img") && !args.iter().any(|a| a.starts_with("--output")) {
            let args = [&["compare", "-f", "raw", "-F", "raw"], args].concat();
            let theirs = tool(d, "qemu-img", &args);
            assert_eq!(ours.status.code(), theirs.status.code(), "{args:?}");
            // Their offset of a mismatch is that of its sector, ours that of the byte.
            let words = |text: &str| text.replace(|c: char| c.is_ascii_digit(), "");
            assert_eq!(words(&said), words(&String::from_utf8_lossy(&theirs.stdout)), "{args:?}");
        }
        (ours.status.code().unwrap(), said)
    };
    assert_eq!(run(&["a", "b"]), (0, "Images are identical.\n".into()));
    assert_eq!(run(&["-s", "a", "b"]), (0, "Images are identical.\n".into()));
    let b = File::options().write(true).open(d.join("b")).unwrap();
    b.write_all_at(b"x", 3_333_333).unwrap();
    assert_eq!(run(&["a", "b"]).0, 1);
    assert_eq!(json(&run(&["--output=json", "a", "b"]).1)["offset"], 3_333_333);
    b.write_all_at(&[0; 512], 3_333_300).unwrap();
    assert_eq!(run(&["a", "b"]).0, 0);
    // The same content, but stored.
    let (code, said) = run(&["-s", "a", "b"]);
    assert!(code == 1 && said.contains("block status mismatch"), "{said}");
    ok(d, &["create", "b", "8M"]);
    assert_eq!(run(&["a", "b"]).0, 0);
    assert_eq!(run(&["-s", "a", "b"]), (1, "Strict mode: Image size mismatch!\n".into()));
    b.write_all_at(b"x", 7 << 20).unwrap();
    assert_eq!(run(&["a", "b"]).0, 1);
    assert_eq!(json(&run(&["--output=json", "a", "b"]).1)["offset"], 7 << 20);
    assert_eq!(run(&["-q", "a", "b"]), (1, String::new()));
    assert_eq!(run(&["a", "missing"]).0, 2);
    fails(d, &["compare", "missing", "a"], 2);
}

#[test]
fn there_is_nothing_to_check_in_raw() {
    let dir = tempfile::tempdir().unwrap();
    ok(dir.path(), &["create", "a", "1M"]);
    let line = fails(dir.path(), &["check", "a"], 63);
    assert_eq!(line, "a: raw images have nothing that could be checked");
}

#[test]
fn log_lines_come_as_text_or_json() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "a", "1M"]);
    let run = |args: &[&str], env: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
        command.args(args).current_dir(d).env("VUBLK_LOG", env);
        String::from_utf8(command.output().unwrap().stderr).unwrap()
    };
    // A guessed format of something that is written to is worth a warning.
    let text = run(&["resize", "-q", "a", "1M"], "");
    assert!(text.contains(" WARN vublk::images::open: a: no format was given"), "{text}");
    assert!(!text.contains('\x1b'), "colours in a file: {text:?}");
    let line = json(&run(&["--log-format=json", "resize", "-q", "a", "1M"], ""));
    assert_eq!(line["level"], "WARN");
    assert_eq!(run(&["resize", "-q", "a", "1M"], "error"), "");
    assert_eq!(run(&["--log-level=off", "resize", "-q", "a", "1M"], "debug"), "");
    assert_eq!(run(&["resize", "-q", "a", "1M"], "off,vublk::images=error"), "");
    assert!(run(&["info", "a"], "loud").starts_with("vublk: VUBLK_LOG: 'loud' is not a log level"));
}

#[test]
fn completions_and_manual_pages_are_made() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    for shell in ["bash", "zsh", "fish"] {
        assert!(ok(d, &["completions", shell]).contains("convert"), "{shell}");
    }
    ok(d, &["man", "pages"]);
    for page in ["vublk.1", "vublk-serve.1", "vublk-convert.1"] {
        assert!(d.join("pages").join(page).exists(), "{page}");
    }
}

/// Does random things to a qcow2 image by qemu-io.
fn scribble(dir: &Path, image: &str, size: u64, random: &mut Random) {
    let mut args = vec!["-f".to_string(), "qcow2".into()];
    for _ in 0..2 + random.below(12) {
        let scale = 9 + random.below(12);
        let start = 512 * random.below(size / 512);
        let len = (512 * (1 + random.below(1 << (scale - 9)))).min(size - start);
        let pattern = 1 + random.below(255);
        args.push("-c".into());
        args.push(match random.below(6) {
            0 => format!("write -z {start} {len}"),
            1 => format!("write -z -u {start} {len}"),
            2 => format!("discard {start} {len}"),
            3 => format!("write -c -P {pattern} {} 65536", (start & !0x1f_ffff).min(size - 65536)),
            _ => format!("write -P {pattern} {start} {len}"),
        });
    }
    args.push(image.into());
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    // Compressed writes that do not fit the clusters fail, which does not matter.
    tool(dir, "qemu-io", &args);
}

/// A map without what ours and QEMU's do not both say: file names, where zeros are preallocated,
/// and holes that the host has in the place of data. Runs that this leaves alike are joined.
fn comparable(map: &str) -> Vec<Value> {
    let number = |entry: &Value, name: &str| entry[name].as_u64();
    let mut entries: Vec<Value> = Vec::new();
    for mut entry in json(map).as_array().unwrap().iter().cloned() {
        let fields = entry.as_object_mut().unwrap();
        fields.remove("filename");
        if fields["data"] == true {
            fields["zero"] = false.into();
        } else {
            fields.remove("offset");
        }
        if let Some(last) = entries.last_mut() {
            let length = number(last, "length").unwrap();
            let mut next = last.clone();
            next["start"] = entry["start"].clone();
            next["length"] = entry["length"].clone();
            if let Some(offset) = number(last, "offset") {
                next["offset"] = (offset + length).into();
            }
            if next == entry {
                last["length"] = (length + number(&entry, "length").unwrap()).into();
                continue;
            }
        }
        entries.push(entry);
    }
    entries
}

/// Makes a chain of images with random content: `top.qcow2` over `mid.qcow2` over `base`.
fn random_chain(d: &Path, options: &str, random: &mut Random) -> u64 {
    let size = 65536 * (2 + random.below(60)) + 512 * random.below(128);
    let half = 512 * (1 + size / 1024);
    random_file(&d.join("base"), half, random);
    let create =
        |args: &[&str]| tool_ok(d, "qemu-img", &[&["create", "-q", "-f", "qcow2"], args].concat());
    let size_text = size.to_string();
    create(&["-b", "base", "-F", "raw", "mid.qcow2", &half.to_string()]);
    scribble(d, "mid.qcow2", half, random);
    create(&["-o", options, "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", &size_text]);
    scribble(d, "top.qcow2", size, random);
    size
}

#[test]
fn qcow2_chains_are_seen_as_qemu_img_sees_them() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut random = Random::new("qcow2_chains_are_seen_as_qemu_img_sees_them");
    for options in [
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=64k",
        "cluster_size=2M,refcount_bits=64",
        "compat=0.10",
        "lazy_refcounts=on",
    ] {
        let size = random_chain(d, options, &mut random);
        let both = |args: &[&str]| (json(&ok(d, args)), json(&tool_ok(d, "qemu-img", args)));
        let (ours, theirs) = both(&["info", "--output=json", "top.qcow2"]);
        assert_eq!(ours, theirs, "{options}");
        let (ours, theirs) = both(&["info", "--output=json", "--backing-chain", "top.qcow2"]);
        assert_eq!(ours, theirs, "{options}");
        // QEMU's compressed writes have been seen to corrupt an image by themselves.
        let check = ["check", "--output=json", "top.qcow2"];
        let (ours, theirs) = (vublk(d, &check), tool(d, "qemu-img", &check));
        assert_eq!(ours.status.code(), theirs.status.code(), "{options}");
        let text = |output: &Output| json(std::str::from_utf8(&output.stdout).unwrap());
        assert_eq!(text(&ours), text(&theirs), "{options}");
        let map = ["map", "--output=json", "top.qcow2"];
        let ours = comparable(&ok(d, &map));
        assert_eq!(ours, comparable(&tool_ok(d, "qemu-img", &map)), "{options}");

        // The same content, by either tool's reading and writing.
        tool_ok(d, "qemu-img", &["convert", "-O", "raw", "top.qcow2", "theirs.raw"]);
        ok(d, &["convert", "-O", "raw", "top.qcow2", "ours.raw"]);
        let content = std::fs::read(d.join("theirs.raw")).unwrap();
        assert_eq!(content.len() as u64, size);
        assert!(std::fs::read(d.join("ours.raw")).unwrap() == content, "{options}");
        assert_eq!(vublk(d, &["compare", "top.qcow2", "theirs.raw"]).status.code(), Some(0));

        for target in ["cluster_size=512", "cluster_size=4k", "cluster_size=64k", "cluster_size=2M"]
        {
            ok(d, &["convert", "-O", "qcow2", "-o", target, "top.qcow2", "new.qcow2"]);
            tool_ok(d, "qemu-img", &["check", "new.qcow2"]);
            tool_ok(d, "qemu-img", &["compare", "new.qcow2", "theirs.raw"]);
            assert_eq!(vublk(d, &["compare", "new.qcow2", "top.qcow2"]).status.code(), Some(0));
            let measure = ["measure", "--output=json", "-O", "qcow2", "-o", target, "theirs.raw"];
            let (ours, theirs) = both(&measure);
            assert_eq!(ours, theirs, "{target}");
        }
        let (ours, theirs) = both(&["measure", "--output=json", "-O", "qcow2", "top.qcow2"]);
        assert_eq!(ours["required"], theirs["required"], "{options}");
        assert_eq!(ours["fully-allocated"], theirs["fully-allocated"]);

        // Only the layer above the backing file.
        ok(d, &["convert", "-O", "qcow2", "-B", "mid.qcow2", "-F", "qcow2", "top.qcow2", "layer"]);
        tool_ok(d, "qemu-img", &["check", "layer"]);
        tool_ok(d, "qemu-img", &["compare", "layer", "theirs.raw"]);
        let unallocated = |image| {
            let map = comparable(&ok(d, &["map", "--output=json", image]));
            map.iter()
                .filter(|e| e["depth"] != 0)
                .map(|e| e["length"].as_u64().unwrap())
                .sum::<u64>()
        };
        if options.contains("=64k") {
            assert_eq!(unallocated("layer"), unallocated("top.qcow2"));
        }
    }
}

#[test]
fn qcow2_keeps_holes_and_finds_differences() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "from", "8M"]);
    let from = File::options().write(true).open(d.join("from")).unwrap();
    from.write_all_at(b"x", 3_000_000).unwrap();
    from.write_all_at(&[0; 100_000], 5_000_000).unwrap();
    ok(d, &["convert", "-O", "qcow2", "from", "to"]);
    let check = json(&ok(d, &["check", "--output=json", "to"]));
    assert_eq!(check["allocated-clusters"], 1);
    assert_eq!(check, json(&tool_ok(d, "qemu-img", &["check", "--output=json", "to"])));
    assert_eq!(vublk(d, &["compare", "from", "to"]).status.code(), Some(0));
    from.write_all_at(b"y", 6_000_000).unwrap();
    let output = vublk(d, &["compare", "--output=json", "from", "to"]);
    assert_eq!(output.status.code(), Some(1));
    let found = json(std::str::from_utf8(&output.stdout).unwrap());
    assert_eq!(found["offset"], 6_000_000);

    // A source that ends in the middle of a sector.
    std::fs::write(d.join("odd"), [7; 70_001]).unwrap();
    ok(d, &["convert", "-f", "raw", "-O", "qcow2", "odd", "to"]);
    tool_ok(d, "qemu-img", &["compare", "-f", "raw", "-F", "qcow2", "odd", "to"]);
    assert_eq!(vublk(d, &["compare", "-f", "raw", "odd", "to"]).status.code(), Some(0));
    // Onto an image that is there.
    ok(d, &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "old", "9M"]);
    ok(d, &["convert", "-n", "-O", "qcow2", "from", "old"]);
    assert_eq!(vublk(d, &["compare", "from", "old"]).status.code(), Some(0));
    tool_ok(d, "qemu-img", &["check", "old"]);
}

#[test]
fn qcow2_is_created_as_told() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let options = "cluster_size=4K,refcount_bits=8,compat=1.1,preallocation=off";
    assert_eq!(
        ok(d, &["create", "-f", "qcow2", "-o", options, "a", "1M"]),
        "Formatting 'a', fmt=qcow2 cluster_size=4096 size=1048576 refcount_bits=8\n"
    );
    let info = json(&ok(d, &["info", "--output=json", "a"]));
    assert_eq!(info["cluster-size"], 4096);
    assert_eq!(info["format-specific"]["data"]["refcount-bits"], 8);
    std::fs::create_dir(d.join("sub")).unwrap();
    // The size comes from the backing file, whose name is relative to the image.
    ok(d, &["create", "-f", "qcow2", "-b", "../a", "-F", "qcow2", "sub/b"]);
    let info = json(&ok(d, &["info", "--output=json", "sub/b"]));
    assert_eq!(
        (&info["virtual-size"], &info["backing-filename"]),
        (&1_048_576.into(), &"../a".into())
    );
    assert_eq!(info["backing-filename-format"], "qcow2");
    assert_eq!(info["full-backing-filename"], "sub/../a");
    ok(d, &["create", "-f", "qcow2", "-o", "backing_file=a,backing_fmt=qcow2", "c", "2M"]);
    ok(d, &["create", "-f", "qcow2", "-u", "-b", "gone", "-F", "raw", "d", "2M"]);
    if have("qemu-img") {
        for image in ["a", "sub/b", "c"] {
            tool_ok(d, "qemu-img", &["check", image]);
            let args = ["info", "--output=json", image];
            assert_eq!(json(&ok(d, &args)), json(&tool_ok(d, "qemu-img", &args)));
        }
    }
    for (args, message) in [
        (&["-o", "cluster_size=3K", "x", "1M"][..], "cluster size 3072 is not a power of two"),
        (&["-o", "cluster_size=4M", "x", "1M"], "cluster size 4194304 is not"),
        (&["-o", "refcount_bits=3", "x", "1M"], "refcount width 3 is not"),
        (&["-o", "refcount_bits=many", "x", "1M"], "-o refcount_bits: 'many'"),
        (&["-o", "compat=0.10", "x", "1M"], "-o compat=0.10 is not supported"),
        (&["-o", "preallocation=full", "x", "1M"], "-o preallocation=full is not supported"),
        (&["-o", "lazy_refcounts=on", "x", "1M"], "format qcow2 has no option 'lazy_refcounts'"),
        (&["-b", "a", "x", "1M"], "the backing file a is given without its format; say it with -F"),
        (&["-b", "a", "-F", "qcow2", "-o", "backing_file=a", "x"], "backing file is given twice"),
        (&["-o", "backing_fmt=raw", "x", "1M"], "but no backing file"),
        (&["-b", "gone", "-F", "raw", "x", "1M"], "the backing file: gone: No such file"),
        (&["-u", "-b", "gone", "-F", "raw", "x"], "x: a new image needs a size"),
        (&["-b", "a", "-F", "vmdk", "x"], "vmdk images are not supported"),
        (&["-b", "nbd:host:1", "-F", "raw", "x"], "only files and block devices"),
        (&["x", "0"], "size 0 is not a positive multiple"),
        (&["x"], "x: a new image needs a size"),
        (&["x", "7E"], "x: cannot create the image"),
    ] {
        let line = fails(d, &[&["create", "-f", "qcow2"], args].concat(), 1);
        assert!(line.contains(message), "{args:?}: {line}");
        assert!(!d.join("x").exists(), "{args:?}");
    }
    let before = std::fs::read(d.join("a")).unwrap();
    let line = fails(d, &["create", "-f", "qcow2", "-b", "a", "-F", "qcow2", "a"], 1);
    assert_eq!(line, "a: an image cannot be its own backing file");
    assert!(std::fs::read(d.join("a")).unwrap() == before);
}

#[test]
fn qcow2_grows_and_does_not_shrink() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let content =
        random_file(&d.join("raw"), 3 << 20, &mut Random::new("qcow2_grows_and_does_not_shrink"));
    // What the backing file holds past the old end must not show.
    std::fs::write(d.join("base"), vec![9; 8 << 20]).unwrap();
    ok(d, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "a", "3M"]);
    ok(d, &["convert", "-n", "-O", "qcow2", "raw", "a"]);
    ok(d, &["resize", "a", "+3M"]);
    // The old table is lost space, nothing worse.
    let code = tool(d, "qemu-img", &["check", "a"]).status.code();
    assert!(matches!(code, Some(0 | 3)), "{code:?}");
    tool_ok(d, "qemu-img", &["convert", "-O", "raw", "a", "after"]);
    let after = std::fs::read(d.join("after")).unwrap();
    assert_eq!(after.len(), 6 << 20);
    assert!(after[..3 << 20] == content && after[3 << 20..].iter().all(|b| *b == 0));
    let line = fails(d, &["resize", "--shrink", "a", "1M"], 1);
    assert!(
        line.contains("qcow2 images are not shrunk here; use 'qemu-img resize --shrink'"),
        "{line}"
    );
    let line = fails(d, &["resize", "a", "7000001"], 1);
    assert!(line.contains("not a multiple of 512"), "{line}");
}

#[test]
fn qcow2_check_has_qemu_imgs_exit_codes() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    tool_ok(d, "qemu-img", &["create", "-q", "-f", "qcow2", "a", "1M"]);
    tool_ok(d, "qemu-io", &["-f", "qcow2", "-c", "write 0 128k", "a"]);
    let sound = std::fs::read(d.join("a")).unwrap();
    let word = |at: u64| u64::from_be_bytes(sound[at as usize..][..8].try_into().unwrap());
    let block = word(word(48));
    let l2 = word(word(40)) & 0x00ff_ffff_ffff_fe00;
    let run = |patch: Option<(u64, &[u8])>| {
        std::fs::write(d.join("a"), &sound).unwrap();
        let file = File::options().write(true).open(d.join("a")).unwrap();
        file.set_len((sound.len() as u64).next_multiple_of(65536) + 65536).unwrap();
        if let Some((at, bytes)) = patch {
            file.write_all_at(bytes, at).unwrap();
        }
        let args = ["check", "-U", "--output=json", "-f", "qcow2", "a"];
        let (ours, theirs) = (vublk(d, &args), tool(d, "qemu-img", &args));
        assert_eq!(ours.status.code(), theirs.status.code(), "{patch:?}");
        let text = |output: &Output| json(std::str::from_utf8(&output.stdout).unwrap());
        assert_eq!(text(&ours), text(&theirs), "{patch:?}");
        ours.status.code().unwrap()
    };
    let last = sound.len().div_ceil(65536) as u64;
    assert_eq!(run(None), 0);
    assert_eq!(run(Some((block + 2 * last, &[0, 1]))), 3);
    assert!(ok_or(d, &["check", "a"], 3).contains("1 leaked clusters were found"));
    assert_eq!(run(Some((block, &[0, 0]))), 2);
    assert!(ok_or(d, &["check", "a"], 2).contains("ERROR cluster 0 refcount=0 reference=1"));
    assert_eq!(run(Some((l2 + 6, &[0x02]))), 2);
    // A refcount block that cannot be found.
    assert_eq!(run(Some((word(48) + 6, &[0x02]))), 1);
    for what in ["leaks", "all"] {
        let line = fails(d, &["check", "-r", what, "a"], 1);
        assert!(line.ends_with(&format!("use qemu-img check -r {what} a")), "{line}");
    }
}

#[test]
fn bad_qcow2_images_are_refused_with_a_clear_line() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-q", "-f", "qcow2", "good", "1M"]);
    let good = std::fs::read(d.join("good")).unwrap();
    let patched = |name: &str, at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(d.join(name), image).unwrap();
    };
    std::fs::write(d.join("short"), &good[..40]).unwrap();
    patched("version", 4, &[0, 0, 0, 9]);
    patched("clusters", 20, &[0, 0, 0, 40]);
    patched("l1", 40, &[0x7f]);
    patched("unknown", 72, &[0, 0, 0, 0, 0, 0, 1, 0]);
    patched("encrypted", 32, &[0, 0, 0, 1]);
    patched("dirty", 72, &[0, 0, 0, 0, 0, 0, 0, 1]);
    patched("corrupt", 72, &[0, 0, 0, 0, 0, 0, 0, 2]);
    let serve = |name: &str| fails(d, &["serve", "--socket-path", "s", "-f", "qcow2", name], 1);
    for (name, message, is_shown) in [
        ("short", "short: file of 40 bytes is too short for a qcow2 header", false),
        ("version", "version: qcow2 version 9 is not supported", false),
        ("clusters", "clusters: cluster bits 40", false),
        ("l1", "l1: L1 table of", false),
        ("unknown", "unknown: the image uses incompatible feature 8", true),
        ("encrypted", "encrypted: the image is encrypted (AES)", true),
        ("dirty", "dirty: the image was not closed in order", true),
        ("corrupt", "corrupt: the image is marked corrupt", true),
    ] {
        let line = serve(name);
        assert!(line.contains(message), "{line}");
        let info = vublk(d, &["info", "-f", "qcow2", name]);
        assert_eq!(info.status.success(), is_shown, "{info:?}");
        assert!(std::fs::read(d.join(name)).unwrap().len() <= good.len());
    }
    // Reading what is merely dirty or corrupt is fine.
    for name in ["dirty", "corrupt"] {
        ok(d, &["convert", "-f", "qcow2", name, "out"]);
    }

    // Chains: through the gate, and to an end.
    let create = |name: &str, base: &str, format: &str| {
        let args = ["create", "-q", "-f", "qcow2", "-u", "-b", base, "-F", format, name, "1M"];
        ok(d, &args);
    };
    std::fs::create_dir(d.join("sub")).unwrap();
    create("no-base", "gone", "raw");
    create("sub/outside", "../good", "qcow2");
    create("loop-a", "loop-b", "qcow2");
    create("loop-b", "loop-a", "qcow2");
    create("not-qcow2", "plain", "qcow2");
    create("remote", "nbd:localhost:10809", "raw");
    std::fs::write(d.join("plain"), [0; 4096]).unwrap();
    for (name, message) in [
        ("no-base", "no-base: its backing file: "),
        ("sub/outside", "--allow-dir"),
        ("loop-a", "is already part of this chain"),
        ("not-qcow2", "not-qcow2: its backing file: plain: not a qcow2 image"),
        ("remote", "the protocol 'nbd:' is not supported"),
    ] {
        for args in [&["serve", "--socket-path", "s", name][..], &["map", name]] {
            let line = fails(d, args, 1);
            assert!(line.contains(message), "{args:?}: {line}");
        }
        // Its own header is there to be seen.
        ok(d, &["info", name]);
        ok(d, &["check", name]);
    }
    ok(d, &["map", "--allow-dir", ".", "sub/outside"]);
    let line = fails(d, &["info", "--backing-chain", "loop-a"], 1);
    assert!(line.contains("is already part of this chain"), "{line}");
    // The operator's own word for the format counts.
    let line = fails(d, &["map", "-f", "qcow2", "plain"], 1);
    assert!(line.contains("plain: not a qcow2 image"), "{line}");
    // A guest would do the rest.
    let line = fails(d, &["serve", "--socket-path", "s", "--state-dir", "sub", "good"], 1);
    assert!(line.contains("sub") && line.contains("--state-dir"), "{line}");
}

#[test]
fn snapshots_are_shown() {
    if !have("qemu-img") || !have("qemu-io") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-q", "-f", "qcow2", "a", "1M"]);
    for name in ["first", "second"] {
        tool_ok(d, "qemu-io", &["-f", "qcow2", "-c", "write 0 64k", "a"]);
        tool_ok(d, "qemu-img", &["snapshot", "-c", name, "a"]);
    }
    for args in [&["info", "--output=json", "a"], &["check", "--output=json", "a"]] {
        assert_eq!(json(&ok(d, args)), json(&tool_ok(d, "qemu-img", args)));
    }
}

/// A process that ends with the test, whatever happens.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_served_chain_is_told_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-q", "base", "1M"]);
    ok(d, &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "mid"]);
    ok(d, &["create", "-q", "-f", "qcow2", "-b", "mid", "-F", "qcow2", "top"]);
    let log = File::create(d.join("log")).unwrap();
    let mut child = Ended(
        Command::new(env!("CARGO_BIN_EXE_vublk"))
            .args(["serve", "-f", "qcow2", "--socket-path", "s", "--pidfile", "pid", "top"])
            .current_dir(d)
            .env_remove("VUBLK_LOG")
            .stderr(log)
            .spawn()
            .unwrap(),
    );
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !d.join("pid").exists() {
        assert!(std::time::Instant::now() < deadline, "it does not start");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // All of the chain is locked.
    for name in ["top", "mid", "base"] {
        let line = fails(d, &["resize", "-f", "raw", name, "+1M"], 1);
        assert!(line.contains("does not share the right"), "{line}");
    }
    ok(d, &["map", "mid"]);
    let pid = rustix::process::Pid::from_child(&child.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(child.0.wait().unwrap().success());
    let log = std::fs::read_to_string(d.join("log")).unwrap();
    for line in [
        ": serving top (qcow2, 1048576 bytes, read-write,",
        ":   over mid (qcow2, 1048576 bytes)",
        ":   over base (raw, 1048576 bytes)",
    ] {
        assert!(log.contains(line), "{log}");
    }
    assert!(!log.contains("imago"), "{log}");
}
