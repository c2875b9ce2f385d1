//! convert, to files and block devices.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};

use crate::common::{LoopDevice, Random, fails, have, ok, tool, vublk};
use crate::{json, random_file, stored_blocks};

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
    assert!(!line.contains("-t writeback"), "the target has nothing to do with it: {line}");
    ok(d, &["create", "-f", "qcow2", "-b", "odd", "-F", "raw", "over", "1M"]);
    let line = fails(d, &["convert", "-T", "none", "over", "to"], 1);
    assert!(line.contains("direct I/O") && line.contains("-T writeback"), "{line}");
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

#[test]
fn block_devices_can_be_targets() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut random = Random::new("block_devices_can_be_targets");
    let content = random_file(&d.join("from"), 2 << 20, &mut random);
    std::fs::write(d.join("backing"), vec![0xcc; 4 << 20]).unwrap();
    let Some(device) = LoopDevice::over(&d.join("backing")) else { return };
    for cache in ["writeback", "none"] {
        ok(d, &["convert", "-t", cache, "-O", "raw", "from", device.name()]);
        let mut bytes = vec![0; 2 << 20];
        File::open(device.path()).unwrap().read_exact(&mut bytes).unwrap();
        assert!(bytes == content, "{cache}");
    }
    let info = json(&ok(d, &["info", "--output=json", "-f", "raw", device.name()]));
    assert_eq!(info["virtual-size"], 4 << 20);
    assert_eq!(info["children"][0]["info"]["format"], "host_device");
    let line = fails(d, &["create", device.name(), "8M"], 1);
    assert!(line.contains("the device has only 4194304 bytes"), "{line}");
    let line = fails(d, &["resize", "-f", "raw", device.name(), "8M"], 1);
    assert!(line.contains("block device cannot be changed"), "{line}");
}

/// What the source does not hold hides the target's backing file, however that is named.
#[test]
fn convert_onto_a_backing_file_keeps_content() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("base.raw"), vec![b'B'; 8 << 20]).unwrap();
    ok(d, &["create", "-q", "-f", "raw", "src.raw", "8M"]);
    let source = File::options().write(true).open(d.join("src.raw")).unwrap();
    source.write_all_at(b"hello", 3 << 20).unwrap();
    ok(d, &["convert", "-f", "raw", "-O", "qcow2", "src.raw", "src.qcow2"]);
    for (source, format) in [("src.raw", "raw"), ("src.qcow2", "qcow2")] {
        for (i, (to, options)) in [
            ("qcow2", &["-B", "base.raw", "-F", "raw"][..]),
            ("qcow2", &["-o", "backing_file=base.raw,backing_fmt=raw"]),
            ("add-cow", &["-o", "backing-file=base.raw,backing-fmt=raw"]),
        ]
        .into_iter()
        .enumerate()
        {
            let target = format!("{format}-{i}");
            let convert = ["convert", "-f", format, "-O", to];
            ok(d, &[&convert, options, &[source, &target]].concat());
            ok(d, &["compare", "-f", "raw", "-F", to, "src.raw", &target]);
        }
    }
}

/// The layers between are copied, too, also what they hide by their end.
#[test]
fn convert_onto_what_lies_further_down_keeps_content() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("base"), vec![b'B'; 4 << 20]).unwrap();
    for format in ["qcow2", "add-cow"] {
        let layer = |name: &str, backing: &str, backing_format: &str, size: &str| {
            let head = ["create", "-q", "-f", format, "-b", backing, "-F", backing_format];
            ok(d, &[&head[..], &[name, size]].concat());
        };
        let hold = |name: &str, letter: u8, len: usize| {
            std::fs::write(d.join("piece"), vec![letter; len]).unwrap();
            ok(d, &["convert", "-n", "-f", "raw", "-O", format, "piece", name]);
        };
        let [lower, middle, top] =
            ["lower", "middle", "top"].map(|name| format!("{name}.{format}"));
        layer(&lower, "base", "raw", "4M");
        layer(&middle, &lower, format, "2M");
        layer(&top, &middle, format, "4M");
        hold(&lower, b'L', 1 << 20);
        hold(&middle, b'M', 512 << 10);
        hold(&top, b'T', 128 << 10);
        for (below, below_format) in [("base", "raw"), (&lower, format), (&middle, format)] {
            ok(d, &["convert", "-O", format, "-B", below, "-F", below_format, &top, "copy"]);
            ok(d, &["compare", &top, "copy"]);
            let _ = std::fs::remove_file(d.join("copy.raw"));
        }
        // What only the base holds stays there.
        ok(d, &["convert", "-O", format, "-B", "base", "-F", "raw", &lower, "copy"]);
        let map = json(&ok(d, &["map", "--output=json", "copy"]));
        let is_left = |entry: &serde_json::Value| entry["start"] == 1 << 20 && entry["depth"] == 1;
        assert!(map.as_array().unwrap().iter().any(is_left), "{map}");
        let _ = std::fs::remove_file(d.join("copy.raw"));
    }
}

/// It would be emptied before it is read, and locks do not tell with -U.
#[test]
fn what_an_image_stands_on_is_neither_its_copy_nor_itself() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("base.raw"), vec![b'B'; 1 << 20]).unwrap();
    for format in ["qcow2", "add-cow"] {
        ok(d, &["create", "-q", "-f", format, "-b", "base.raw", "-F", "raw", format]);
        let err = fails(d, &["convert", "-U", "-f", format, "-O", "raw", format, "base.raw"], 1);
        assert!(err.contains(&format!("is what the source {format} stands on")), "{err}");
        let before = std::fs::read(d.join(format)).unwrap();
        let own = ["create", "-u", "-f", format, "-b", format, "-F", "qcow2", format, "1M"];
        let err = fails(d, &own, 1);
        assert!(err.contains("cannot be its own backing file"), "{err}");
        assert!(std::fs::read(d.join(format)).unwrap() == before);
    }
    assert!(std::fs::read(d.join("base.raw")).unwrap() == vec![b'B'; 1 << 20]);
}

/// A loop device is its file by another name.
#[test]
fn what_the_source_is_made_of_is_not_its_copy() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("disk"), vec![b'D'; 1 << 20]).unwrap();
    ok(d, &["create", "-q", "-f", "qcow2", "-b", "disk", "-F", "raw", "over"]);
    let Some(device) = LoopDevice::over(&d.join("disk")) else { return };
    for (from, to) in [("disk", device.name()), (device.name(), "disk"), ("over", device.name())] {
        let err = fails(d, &["convert", "-O", "qcow2", from, to], 1);
        assert!(err.contains("cannot be its target"), "{err}");
    }
    let own =
        ["create", "-f", "qcow2", "-b", "disk", "-F", "raw", "--allow-dir", "/", device.name()];
    let own =
        own.map(
            |word| if word == "disk" { d.join("disk").display().to_string() } else { word.into() },
        );
    let err = fails(d, &own.each_ref().map(String::as_str), 1);
    assert!(err.contains("cannot be its own backing file"), "{err}");
    assert!(std::fs::read(d.join("disk")).unwrap() == vec![b'D'; 1 << 20]);
}

/// An add-cow image that holds a part of one of the host's sectors.
#[test]
fn what_the_page_cache_has_written_is_read_by_direct_io() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("base"), vec![b'B'; 1 << 20]).unwrap();
    std::fs::write(d.join("sector"), vec![b'S'; 512]).unwrap();
    std::fs::write(d.join("blocks"), vec![0; 1 << 20]).unwrap();
    let Some(device) = LoopDevice::with_blocks(&d.join("blocks"), 4096) else { return };
    let image = format!("image-file={}", device.name());
    ok(d, &["create", "-q", "-f", "add-cow", "-o", &image, "-b", "base", "-F", "raw", "top"]);
    let allow = ["--allow-dir", "/dev", "-f"];
    ok(d, &[&["convert", "-n", "-O", "add-cow"], &allow[..], &["raw", "sector", "top"]].concat());
    for cache in ["writeback", "none"] {
        ok(d, &[&["convert", "-T", cache], &allow[..], &["add-cow", "top", "copy"]].concat());
        let copy = std::fs::read(d.join("copy")).unwrap();
        assert!(copy[..512] == [b'S'; 512], "{cache}");
        assert!(copy[512..] == vec![b'B'; (1 << 20) - 512], "{cache}");
    }
}

/// The library that writes qcow2 says by lines of its own that it was not finished, which is no news then.
#[test]
fn a_conversion_that_fails_says_so_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let content = Random::new("a_conversion_that_fails").bytes(18 << 20);
    std::fs::write(d.join("from"), content).unwrap();
    let script = format!(
        "ulimit -f 6000; exec {} convert -f raw -O qcow2 from to",
        env!("CARGO_BIN_EXE_vublk")
    );
    let mut shell = std::process::Command::new("sh");
    shell.current_dir(d).env_remove("VUBLK_LOG").args(["-c", &script]);
    let output = shell.output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.starts_with("vublk: converting from to to (which is incomplete): "), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
}

/// The sectors of the target may be larger than those of the source.
#[test]
fn what_lies_behind_the_source_stays_in_an_existing_target() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    std::fs::write(d.join("old"), vec![0xee; 1 << 20]).unwrap();
    for (data, size) in
        [(512, 512), (4608, 4608), (4096, 4608), (4096, 40960), (0, 512), (100, 100), (0, 100)]
    {
        let from = File::create(d.join("from")).unwrap();
        from.write_all_at(&vec![7; data], 0).unwrap();
        from.set_len(size).unwrap();
        let large = ["-O", "vhdx", "-o", "logical_sector_size=4096"];
        ok(d, &[&["convert", "-f", "raw"], &large[..], &["old", "target"]].concat());
        ok(d, &["convert", "-n", "-f", "raw", "-O", "vhdx", "from", "target"]);
        ok(d, &["convert", "-f", "vhdx", "target", "is"]);
        let mut wanted = vec![7; data];
        wanted.resize((size as usize).next_multiple_of(512), 0);
        wanted.resize(1 << 20, 0xee);
        assert!(std::fs::read(d.join("is")).unwrap() == wanted, "{data} of {size}");
    }
}
