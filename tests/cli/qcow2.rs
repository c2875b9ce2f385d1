//! The commands on qcow2 images, with qemu-img as the second opinion.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Output;

use serde_json::Value;

use crate::common::{Qmp, Random, Setup, fails, have, ok, ok_or, tool, tool_ok, vublk};
use crate::{json, random_file};

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
fn a_map_may_begin_and_end_anywhere() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-f", "qcow2", "base", "1M"]);
    tool_ok(d, "qemu-io", &["-c", "write 64k 64k", "base"]);
    ok(d, &["create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top"]);
    tool_ok(d, "qemu-io", &["-c", "write 256k 64k", "top"]);
    for part in [["-s", "100000", "-l", "2M"], ["-s", "0", "-l", "100001"], ["-s", "7", "-l", "1"]]
    {
        let args = [&["map", "--output=json"], &part[..], &["top"]].concat();
        let theirs = comparable(&tool_ok(d, "qemu-img", &args));
        assert_eq!(comparable(&ok(d, &args)), theirs, "{part:?}");
    }

    // Clusters that are smaller than the sectors of the backing file.
    ok(d, &["create", "-f", "vhdx", "-o", "logical_sector_size=4096", "large", "1M"]);
    let small = ["-o", "cluster_size=512"];
    ok(
        d,
        &[&["create", "-f", "qcow2"], &small[..], &["-b", "large", "-F", "vhdx", "top"]].concat(),
    );
    ok(d, &["create", "data", "512"]);
    std::fs::write(d.join("data"), [1; 512]).unwrap();
    ok(d, &["convert", "-n", "-O", "qcow2", "data", "top"]);
    let map = comparable(&ok(d, &["map", "--output=json", "top"]));
    let rest = map.iter().find(|e| e["start"] == 512).unwrap_or_else(|| panic!("{map:?}"));
    assert_eq!((&rest["depth"], &rest["zero"]), (&1.into(), &true.into()), "{map:?}");
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
        (&["-b", "nbd:host:1", "-F", "raw", "x"], "the protocol 'nbd:' is not supported"),
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
    let serve = |name: &str| fails(d, &["serve", "--socket-path", "s", "-f", "qcow2", name], 78);
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
        let serve = &["serve", "--socket-path", "s", name][..];
        for (args, code) in [(serve, 78), (&["map", name], 1)] {
            let line = fails(d, args, code);
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
    let line = fails(d, &["serve", "--socket-path", "s", "--state-dir", "sub", "good"], 78);
    assert!(line.contains("sub") && line.contains("--state-dir"), "{line}");
    // What does not need it yet is no different: the first snapshot would.
    ok(d, &["create", "-q", "disk.raw", "1M"]);
    let disk = "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path=s";
    let node = "driver=raw,node-name=d,file.driver=file,file.filename=disk.raw";
    for how in [
        &["--socket-path", "s", "-f", "raw", "disk.raw"][..],
        &["--blockdev", node, "--export", disk],
    ] {
        let line = fails(d, &[&["serve", "--state-dir", "sub"], how].concat(), 78);
        assert!(line.starts_with("state directory sub: is not on tmpfs"), "{line}");
    }
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

/// Puts overlays on another backing file, as `qemu-img rebase` does: the disk stays, whatever the two
/// hold and however long they are; with `-u` only the name changes.
#[test]
fn rebase_keeps_the_disk_as_qemu_img_has_it() {
    if !have("qemu-img") || !have("qemu-io") {
        return crate::common::skip("qemu-img or qemu-io is not installed");
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    let mut random = Random::new("rebase_keeps_the_disk_as_qemu_img_has_it");
    const SIZE: u64 = 4 << 20;
    for round in 0..6 {
        for (name, len) in [("old", SIZE), ("new", SIZE - 512 * random.below(2000))] {
            random_file(&d.join(name), len, &mut random);
        }
        // Where they are alike, nothing need be copied.
        let old = std::fs::read(d.join("old")).unwrap();
        File::options()
            .write(true)
            .open(d.join("new"))
            .unwrap()
            .write_all_at(&old[..1 << 20], 0)
            .unwrap();
        let cluster = ["512", "4096", "65536"][round % 3];
        let options = format!("cluster_size={cluster}");
        tool_ok(
            d,
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", &options, "-b", "old", "-F", "raw", "top"],
        );
        scribble(d, "top", SIZE, &mut random);
        ok(d, &["convert", "-q", "-f", "qcow2", "-O", "raw", "top", "before"]);
        ok(d, &["rebase", "-q", "-f", "qcow2", "-b", "new", "-F", "raw", "top"]);
        tool_ok(d, "qemu-img", &["check", "-q", "top"]);
        let info = json(&tool_ok(d, "qemu-img", &["info", "--output=json", "top"]));
        assert_eq!(
            (&info["backing-filename"], &info["backing-filename-format"]),
            (&"new".into(), &"raw".into())
        );
        tool_ok(d, "qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", "top", "before"]);
        // And on nothing.
        ok(d, &["rebase", "-q", "-f", "qcow2", "-b", "", "top"]);
        tool_ok(d, "qemu-img", &["check", "-q", "top"]);
        tool_ok(d, "qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", "top", "before"]);
        let info = json(&tool_ok(d, "qemu-img", &["info", "--output=json", "top"]));
        assert_eq!(info["backing-filename"], Value::Null);
    }
    // The name only: as qemu-img does it, whether or not what is named is there.
    let overlay = ["create", "-q", "-f", "qcow2", "-b", "old", "-F", "raw"];
    tool_ok(d, "qemu-img", &[&overlay[..], &["ours"]].concat());
    tool_ok(d, "qemu-img", &[&overlay[..], &["theirs"]].concat());
    for (name, format) in [("new", "raw"), ("elsewhere/moved", "qcow2"), ("old", "raw")] {
        let rebase = ["rebase", "-q", "-u", "-f", "qcow2", "-b", name, "-F", format];
        ok(d, &[&rebase[..], &["ours"]].concat());
        tool_ok(d, "qemu-img", &[&rebase[..], &["theirs"]].concat());
        let named = |image| {
            let mut info = json(&tool_ok(d, "qemu-img", &["info", "--output=json", image]));
            (info["backing-filename"].take(), info["backing-filename-format"].take())
        };
        assert_eq!(named("ours"), named("theirs"));
    }
    tool_ok(d, "qemu-img", &["check", "-q", "ours"]);
    tool_ok(d, "qemu-img", &["compare", "-q", "ours", "theirs"]);
    // Of one that had none, whose header is full of names for features.
    for options in ["compat=v3", "compat=0.10", "cluster_size=1024"] {
        for (image, by) in [("ours", "vublk"), ("theirs", "qemu-img")] {
            let create = ["create", "-q", "-f", "qcow2", "-o", options, image, "4M"];
            match by {
                "vublk" if options != "compat=0.10" => ok(d, &create),
                _ => tool_ok(d, "qemu-img", &create),
            };
            tool_ok(d, "qemu-io", &["-c", "write -P 7 1M 64k", image]);
            for name in ["new", "old"] {
                ok(d, &["rebase", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", image]);
                let info = json(&tool_ok(d, "qemu-img", &["info", "--output=json", image]));
                assert_eq!(info["backing-filename"], name);
                assert_eq!(info["backing-filename-format"], "raw");
                tool_ok(d, "qemu-img", &["check", "-q", image]);
            }
            // The disk is what QEMU reads.
            let mut expected = std::fs::read(d.join("old")).unwrap();
            expected[1 << 20..][..64 << 10].fill(7);
            for convert in [true, false] {
                let args = ["convert", "-q", "-f", "qcow2", "-O", "raw", image, "after"];
                match convert {
                    true => ok(d, &args),
                    false => tool_ok(d, "qemu-img", &args),
                };
                assert!(std::fs::read(d.join("after")).unwrap() == expected, "{options}");
            }
        }
    }
    let err = fails(d, &["rebase", "-f", "qcow2", "-b", "ours", "-F", "qcow2", "ours"], 1);
    assert!(err.contains("cannot be its own backing file"), "{err}");
}

/// QEMU could not go back to such a snapshot any more.
#[test]
fn a_version_2_image_with_snapshots_keeps_its_size() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    tool_ok(d, "qemu-img", &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", "v2", "4M"]);
    tool_ok(d, "qemu-img", &["snapshot", "-c", "a", "v2"]);
    let err = fails(d, &["resize", "-f", "qcow2", "v2", "8M"], 1);
    assert!(err.contains("Can't resize a v2 image which has snapshots"), "{err}");
    tool_ok(d, "qemu-img", &["snapshot", "-a", "a", "v2"]);
}

/// A backup of what has changed since the last one needs them.
#[test]
fn bitmaps_are_good_until_the_guest_writes() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    tool_ok(d, "qemu-img", &["create", "-q", "-f", "qcow2", "disk", "16M"]);
    tool_ok(d, "qemu-img", &["bitmap", "--add", "disk", "b0"]);
    let is_good = || {
        let args = ["info", "--output=json", "disk"];
        let info = json(&tool_ok(d, "qemu-img", &args));
        assert_eq!(json(&ok(d, &args)), info);
        let bitmaps = &info["format-specific"]["data"]["bitmaps"];
        bitmaps[0]["flags"] == serde_json::json!(["auto"])
    };
    assert!(is_good());
    let control = d.join("qmp");
    let args = ["--control", control.to_str().unwrap()];
    for writes in [false, true] {
        let mut backend = Setup::new(&args).format("qcow2", &d.join("disk")).start();
        let mut session = backend.qemu();
        session.read(0, 0, 4096).unwrap();
        session.flush(0).unwrap();
        if writes {
            session.write(0, 0, &[1; 512]).unwrap();
        }
        let blocks = Qmp::connect(&control).ok("query-block", serde_json::json!({}));
        let told = &blocks[0]["inserted"]["image"]["format-specific"]["data"]["bitmaps"];
        assert_eq!(told[0]["name"] == "b0", !writes, "{blocks}");
        session.stop().unwrap();
        assert!(backend.terminate().success(), "{}", backend.log());
        assert_eq!(is_good(), !writes);
    }
}

#[test]
fn bitmaps_are_shown() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    tool_ok(d, "qemu-img", &["create", "-q", "-f", "qcow2", "disk", "16M"]);
    tool_ok(d, "qemu-img", &["bitmap", "--add", "-g", "4096", "disk", "b0"]);
    tool_ok(d, "qemu-img", &["bitmap", "--add", "--disable", "disk", "another one"]);
    let args = ["info", "--output=json", "disk"];
    let theirs = json(&tool_ok(d, "qemu-img", &args));
    assert_eq!(theirs["format-specific"]["data"]["bitmaps"].as_array().unwrap().len(), 2);
    assert_eq!(json(&ok(d, &args)), theirs);
    // Theirs has an order of its own.
    let lines = |text: String| {
        let mut lines: Vec<_> = text.lines().map(str::to_string).collect();
        lines.sort();
        lines
    };
    let text = ok(d, &["info", "disk"]);
    assert!(text.contains("    bitmaps:\n        [0]:\n            flags:\n"), "{text}");
    assert_eq!(lines(text), lines(tool_ok(d, "qemu-img", &["info", "disk"])));
    // A directory that lies elsewhere than it can.
    let file = File::options().read(true).write(true).open(d.join("disk")).unwrap();
    let mut cluster = vec![0; 65536];
    file.read_exact_at(&mut cluster, 0).unwrap();
    let extension = cluster.windows(4).position(|word| word == [0x23, 0x85, 0x28, 0x75]).unwrap();
    file.write_all_at(&(1u64 << 50).to_be_bytes(), extension as u64 + 24).unwrap();
    let line = fails(d, &["info", "disk"], 1);
    assert!(line.contains("disk: bitmap directory entry 0 at 1125899906842624"), "{line}");
}

/// Whoever asks the process that serves an image is told what `info` tells.
#[test]
fn queries_tell_what_info_tells() {
    if !have("qemu-img") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    tool_ok(d, "qemu-img", &["create", "-q", "-f", "qcow2", "disk.qcow2", "16M"]);
    tool_ok(d, "qemu-img", &["bitmap", "--add", "-g", "4096", "disk.qcow2", "b0"]);
    tool_ok(d, "qemu-img", &["snapshot", "-c", "first", "disk.qcow2"]);
    ok(d, &["create", "-q", "-f", "vhdx", "disk.vhdx", "16M"]);
    ok(d, &["create", "-q", "-f", "add-cow", "disk.add-cow", "16M"]);
    ok(d, &["create", "-q", "disk.raw", "16M"]);
    let control = d.join("qmp");
    for format in ["qcow2", "vhdx", "add-cow", "raw"] {
        let name = format!("disk.{format}");
        let mut info = json(&ok(d, &["info", "-f", format, "--output=json", &name]));
        let args = ["--read-only", "--control", control.to_str().unwrap()];
        let mut backend = Setup::new(&args).format(format, &d.join(&name)).start();
        let nodes = Qmp::connect(&control).ok("query-named-block-nodes", serde_json::json!({}));
        let mut told = nodes.as_array().unwrap().iter();
        let told = told.find(|node| node["node-name"] == "image").expect("the image's node");
        info.as_object_mut().unwrap().remove("children");
        info["filename"] = d.join(&name).to_str().unwrap().into();
        assert_eq!(told["image"], info, "{format}");
        assert!(backend.terminate().success(), "{}", backend.log());
    }
}

/// The text of a state is followed, as it is where the image is opened.
#[test]
fn a_chain_is_told_as_far_as_it_goes() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-q", "base", "1M"]);
    let json_name = r#"json:{"driver":"raw","file":{"driver":"file","filename":"base"}}"#;
    ok(d, &["create", "-q", "-f", "qcow2", "-u", "-b", json_name, "-F", "raw", "mid", "1M"]);
    ok(d, &["create", "-q", "-f", "qcow2", "-u", "-b", "mid", "-F", "qcow2", "top", "1M"]);
    let told = |args: &[&str], why: &str| {
        let output = vublk(d, args);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.starts_with("vublk: mid: its backing file: "), "{error}");
        assert!(error.contains(why) && error.matches('\n').count() == 1, "{error}");
        String::from_utf8(output.stdout).unwrap()
    };
    let way_out = "the driver 'raw' is not known here; ";
    let text = told(&["info", "--backing-chain", "top"], way_out);
    assert!(text.starts_with("image: top\n") && text.contains("\nimage: mid\n"), "{text}");
    let chain =
        json(&told(&["info", "--backing-chain", "--output=json", "top"], "rebase -u -b FILE"));
    assert_eq!(chain.as_array().unwrap().len(), 2, "{chain}");
    assert_eq!(chain[1]["filename"], "mid");
    // Likewise where the file is gone.
    ok(d, &["rebase", "-q", "-u", "-b", "gone", "-F", "raw", "mid"]);
    let text = told(&["info", "--backing-chain", "top"], "gone: No such file");
    assert!(text.contains("\nimage: mid\n"), "{text}");
    // An image that cannot be opened itself has nothing that comes before.
    let error = fails(d, &["info", "--backing-chain", "gone"], 1);
    assert!(error.starts_with("gone: No such file"), "{error}");
}

#[test]
fn a_backing_file_by_json_text_is_refused_with_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path();
    ok(d, &["create", "-q", "base", "1M"]);
    let json = r#"json:{"driver":"raw","file":{"driver":"file","filename":"base"}}"#;
    ok(d, &["create", "-q", "-f", "qcow2", "-u", "-b", json, "-F", "raw", "over", "1M"]);
    let line = fails(d, &["map", "over"], 1);
    let why = format!("over: its backing file: {json}: the driver 'raw' is not known here; ");
    assert!(line.starts_with(&why), "{line}");
    assert!(line.ends_with("vublk rebase -u -b FILE -F FORMAT over"), "{line}");
    ok(d, &["rebase", "-q", "-u", "-b", "base", "-F", "raw", "over"]);
    ok(d, &["map", "over"]);
}
