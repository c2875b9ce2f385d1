//! On files of the host, with QEMU's tools as the second opinion where they are installed.

use std::cell::Cell;
use std::rc::Rc;
use std::task::{Context, Waker};

use super::*;
use crate::io::{spawn_local, yield_now};

/// A scratch directory on disk, where O_DIRECT works.
fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("vublk-qcow2-").tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap()
}

fn host(path: &Path, write: bool, direct: bool) -> Arc<dyn File> {
    let options = crate::io::OpenOptions { write, direct, ..Default::default() };
    Arc::new(HostFile::open(path, options).unwrap())
}

fn qemu_img(args: &[&str], dir: &Path) -> bool {
    let Some(mut command) = qemu("qemu-img") else { return false };
    let out = command.args(args).current_dir(dir).output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    true
}

fn host_image(path: PathBuf, write: bool, direct: bool, backing: Option<Node>) -> Driven {
    let options = OpenOptions { read_only: !write, backing, ..Default::default() };
    FormatDriver::new(block_on(Qcow2::open(host(&path, write, direct), options)).unwrap()).unwrap()
}

#[test]
fn images_of_qemu_are_read_and_written() {
    let dir = scratch();
    let content = {
        let mut content = random_bytes(9, 3 << 20);
        content[1 << 20..2 << 20].fill(0);
        content[(2 << 20) + 4096..(2 << 20) + 300_000].fill(7);
        content
    };
    std::fs::write(dir.path().join("content.raw"), &content).unwrap();
    let path = dir.path().join("image.qcow2");
    for (create, compressed, snapshot) in [
        ("compat=1.1", false, false),
        ("compat=0.10", false, false),
        ("compat=1.1", true, false),
        ("compat=1.1,cluster_size=4096", true, false),
        ("compat=1.1", false, true),
        ("compat=1.1,refcount_bits=1,cluster_size=512", false, false),
    ] {
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", create];
        if compressed {
            args.push("-c");
        }
        args.extend(["content.raw", "image.qcow2"]);
        if !qemu_img(&args, dir.path()) {
            return;
        }
        if snapshot {
            qemu_img(&["snapshot", "-c", "one", "image.qcow2"], dir.path());
        }
        let what = format!("{create}, compressed {compressed}, snapshot {snapshot}");
        for direct in [false, true] {
            let driver = host_image(path.clone(), true, direct, None);
            let mut model = block_on(read(&driver, 0, content.len() as u64));
            if !direct {
                assert!(model == content, "{what}: read differs");
            }
            let mut rng = Rng::new(3);
            for _ in 0..60 {
                let request = random_request(&mut rng, content.len() as u64, 512, 300);
                block_on(perform(&driver, &request)).unwrap();
                block_on(perform_on_model(&driver, &mut model, &request));
            }
            block_on(driver.close()).unwrap();
            assert!(block_on(read(&driver, 0, content.len() as u64)) == model, "{what}");
            drop(driver);
            let image = std::fs::read(&path).unwrap();
            check_with_qemu(&image, Some(&model), None, &what);
        }
        if snapshot {
            qemu_img(&["snapshot", "-a", "one", "image.qcow2"], dir.path());
            let image = std::fs::read(&path).unwrap();
            check_with_qemu(&image, Some(&content), None, "snapshot");
        }
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn chains_of_qcow2_on_raw() {
    let dir = scratch();
    let content = random_bytes(4, 1 << 20);
    std::fs::write(dir.path().join("base.raw"), &content).unwrap();
    let middle = ["create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "middle.qcow2", "1536K"];
    if !qemu_img(&middle, dir.path()) {
        return;
    }
    qemu_img(
        &["create", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", "top.qcow2"],
        dir.path(),
    );
    for direct in [false, true] {
        let raw = Raw::open(host(&dir.path().join("base.raw"), false, direct), true).unwrap();
        let named =
            |name: &str| NodeOptions { name: name.into(), read_only: true, ..Default::default() };
        let base = Node::new(Arc::new(raw), named("base"));
        let middle = host_image(dir.path().join("middle.qcow2"), false, direct, Some(base));
        let middle = Node::new(Arc::new(middle), named("middle"));
        let top = host_image(dir.path().join("top.qcow2"), true, direct, Some(middle));
        let size = top.limits().size;
        let mut model = block_on(read(&top, 0, size));
        assert!(direct || model[..content.len()] == content);
        let mut rng = Rng::new(8);
        for _ in 0..50 {
            let request = random_request(&mut rng, size, 512, 200);
            block_on(perform(&top, &request)).unwrap();
            block_on(perform_on_model(&top, &mut model, &request));
        }
        block_on(top.close()).unwrap();
        std::fs::write(dir.path().join("expected.raw"), &model).unwrap();
        qemu_img(&["compare", "-f", "qcow2", "-F", "raw", "top.qcow2", "expected.raw"], dir.path());
        qemu_img(&["check", "top.qcow2"], dir.path());
    }
}

/// A piece of a plan: the file and the place in it, or zeros, and the length.
type Piece = (Option<(u32, u64)>, u64);

/// What a plan for a read leads to; `None` if there is none.
fn planned(driver: &dyn Driver, offset: u64, len: u64) -> Option<Vec<Piece>> {
    let mut plan = Plan::default();
    let answer = driver.plan(PlanOp::Read, ByteRange { offset, len }, &mut plan);
    (answer == Planned::Ready).then(|| {
        let extent = |extent: &PlanExtent<'_>| match extent {
            PlanExtent::File { file, offset, len } => (Some((file.id(), *offset)), *len),
            PlanExtent::Zero { len } => (None, *len),
        };
        plan.extents.iter().map(extent).collect()
    })
}

#[test]
fn reads_are_planned_through_a_chain() {
    let dir = scratch();
    let (base, top) = (dir.path().join("base.raw"), dir.path().join("top.qcow2"));
    std::fs::write(&base, random_bytes(4, (1 << 20) + 512)).unwrap();
    let raw = |path: &Path| {
        let file = HostFile::open(path, crate::io::OpenOptions::default()).unwrap();
        let id = file.id();
        (Arc::new(Raw::open(Arc::new(file), true).unwrap()), id)
    };
    let (driver, base_id) = raw(&base);
    let base_node = Node::new(driver, NodeOptions::default());
    let mut backing = base_node.clone();
    for name in ["one.qcow2", "two.qcow2", "top.qcow2"] {
        let path = dir.path().join(name);
        std::fs::write(&path, []).unwrap();
        block_on(create(host(&path, true, false), &backed(2 << 20, 65536, true))).unwrap();
        let is_top = path == top;
        let layer = Arc::new(host_image(path, is_top, false, Some(backing)));
        backing = Node::new(layer, NodeOptions::default());
    }
    let (top, two) = (backing.driver(), backing.backing().unwrap());
    block_on(read(&*top, 0, 4096));
    assert_eq!(planned(&*top, 4096, 4096), Some(vec![(Some((base_id, 4096)), 4096)]));
    let across_its_end = planned(&*top, (1 << 20) - 512, 4096).unwrap();
    assert_eq!(across_its_end, [(Some((base_id, (1 << 20) - 512)), 1024), (None, 3072)]);
    // What is here follows what is there.
    block_on(write(&*top, 65536, &[1; 65536])).unwrap();
    let extents = planned(&*top, 65536 - 512, 1024).unwrap();
    assert_eq!(extents[0], (Some((base_id, 65536 - 512)), 512));
    assert!(extents.len() == 2 && extents[1].0.unwrap().0 != base_id, "{extents:?}");
    // So is what surrounds a new cluster: the layer in the middle is not asked to read.
    let asked = || two.backing().unwrap().counters().reads.load(Ordering::Relaxed);
    let before = asked();
    block_on(write(&*top, (4 << 16) + 512, &[2; 512])).unwrap();
    assert_eq!(asked(), before);
    let mut cluster = std::fs::read(&base).unwrap()[4 << 16..5 << 16].to_vec();
    cluster[512..1024].fill(2);
    assert!(block_on(read(&*top, 4 << 16, 1 << 16)) == cluster);
    // Another driver in the middle or at the bottom: through what was before leads nothing.
    let quiesced = crate::block::Gate::new().quiesce();
    let (other, other_id) = raw(&base);
    base_node.replace_driver(other, &quiesced);
    assert_eq!(planned(&*top, 4096, 4096), None);
    let one = two.backing().unwrap();
    one.set_backing(Some(base_node), &quiesced).unwrap();
    assert_eq!(planned(&*top, 4096, 4096), None);
    two.set_backing(Some(one), &quiesced).unwrap();
    backing.set_backing(Some(two), &quiesced).unwrap();
    let top = backing.driver();
    assert_eq!(planned(&*top, 4096, 4096), Some(vec![(Some((other_id, 4096)), 4096)]));
    assert_eq!(block_on(read(&*top, 4096, 512)), std::fs::read(&base).unwrap()[4096..][..512]);
}

#[test]
fn discards_give_space_back_to_the_host() {
    let dir = scratch();
    let path = dir.path().join("image.qcow2");
    std::fs::write(&path, []).unwrap();
    block_on(create(host(&path, true, false), &CreateOptions::new(16 << 20))).unwrap();
    let driver = host_image(path.clone(), true, false, None);
    let data = random_bytes(1, 1 << 20);
    for i in 0..8u64 {
        block_on(write(&driver, i << 20, &data)).unwrap();
    }
    block_on(driver.flush()).unwrap();
    use std::os::unix::fs::MetadataExt;
    let used = || std::fs::metadata(&path).unwrap().blocks() * 512;
    let before = used();
    block_on(driver.discard(ByteRange { offset: 0, len: 8 << 20 })).unwrap();
    // Written again before the hole is punched: stays.
    block_on(write(&driver, 3 << 20, &data)).unwrap();
    block_on(driver.flush()).unwrap();
    let after = used();
    assert!(after + (6 << 20) < before, "{before} bytes before, {after} after");
    assert!(block_on(read(&driver, 3 << 20, 1 << 20)) == data);
    assert!(block_on(read(&driver, 4 << 20, 1 << 20)).iter().all(|byte| *byte == 0));
    block_on(driver.close()).unwrap();
    check_with_qemu(&std::fs::read(&path).unwrap(), None, None, "discard");
}

#[test]
fn giving_space_back_lets_others_run() {
    const PIECES: u64 = 64;
    let dir = scratch();
    let path = dir.path().join("image.qcow2");
    let size = 2 * PIECES * 4096;
    std::fs::File::create(&path).unwrap();
    let options = CreateOptions { cluster_size: 4096, ..CreateOptions::new(size) };
    block_on(create(host(&path, true, false), &options)).unwrap();
    let driver = host_image(path, true, false, None);
    block_on(write(&driver, 0, &random_bytes(1, size))).unwrap();
    for piece in 0..PIECES {
        block_on(driver.discard(ByteRange { offset: piece * 8192, len: 4096 })).unwrap();
    }
    let (turns, over) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(false)));
    block_on(async {
        spawn_local({
            let (turns, over) = (Rc::clone(&turns), Rc::clone(&over));
            async move {
                while !over.get() {
                    turns.set(turns.get() + 1);
                    yield_now().await;
                }
            }
        });
        // As the end of a flush does, whose turns at the disk do not count here.
        driver.format().punch(u64::MAX).await;
        over.set(true);
        yield_now().await;
    });
    assert!(turns.get() >= PIECES, "{} turns while {PIECES} holes were made", turns.get());
}

#[test]
fn several_threads_at_once() {
    let dir = scratch();
    let path = dir.path().join("image.qcow2");
    std::fs::write(&path, []).unwrap();
    let size = 8u64 << 20;
    block_on(create(host(&path, true, false), &CreateOptions::new(size))).unwrap();
    let state = state_dir();
    let keep = Keep::open_with_capacity(state.path(), IMAGE, "qcow2", 128 << 10).unwrap();
    let options =
        OpenOptions { read_only: false, backing: None, keep: Some(keep), ..OpenOptions::default() };
    let image = block_on(Qcow2::open(host(&path, true, false), options)).unwrap();
    let driver = Arc::new(FormatDriver::new(image).unwrap());
    driver.begin_session(1).unwrap();
    const THREADS: u64 = 4;
    let threads: Vec<_> = (0..THREADS)
        .map(|i| {
            let driver = Arc::clone(&driver);
            std::thread::spawn(move || {
                let mut rng = Rng::new(i);
                let mut written = std::collections::HashMap::new();
                for step in 0..400 {
                    let offset = (rng.below(size / 4096 / THREADS) * THREADS + i) * 4096;
                    let value = (step % 250) as u8 + 1;
                    match rng.below(20) {
                        0 => block_on(driver.flush()).unwrap(),
                        1 => {
                            let range = ByteRange { offset, len: 4096 };
                            block_on(driver.write_zeroes(range, true)).unwrap();
                            written.insert(offset, 0);
                        }
                        _ => {
                            block_on(write(&*driver, offset, &[value; 4096])).unwrap();
                            written.insert(offset, value);
                        }
                    }
                }
                written
            })
        })
        .collect();
    let mut expected = vec![0; size as usize];
    for thread in threads {
        for (offset, value) in thread.join().unwrap() {
            expected[offset as usize..][..4096].fill(value);
        }
    }
    assert!(block_on(read(&*driver, 0, size)) == expected);
    block_on(driver.close()).unwrap();
    check_with_qemu(&std::fs::read(&path).unwrap(), Some(&expected), None, "threads");
}

#[test]
fn plans_lead_to_the_data() {
    let dir = scratch();
    let path = dir.path().join("image.qcow2");
    std::fs::write(&path, []).unwrap();
    block_on(create(host(&path, true, false), &CreateOptions::new(16 << 20))).unwrap();
    let driver = host_image(path.clone(), true, false, None);
    let plan = |op, offset, len| {
        let mut plan = Plan::default();
        let answer = driver.plan(op, ByteRange { offset, len }, &mut plan);
        (answer == Planned::Ready).then_some(plan)
    };
    let op = PlanOp::Write { fua: false };
    assert!(plan(op, 0, 4096).is_none(), "not allocated");
    block_on(write(&driver, 0, &[5; 8192])).unwrap();
    let planned = plan(op, 0, 4096).expect("mapped");
    let PlanExtent::File { offset, len: 4096, .. } = planned.extents[0] else { panic!() };
    // While the plan is under way, nothing may take the cluster away.
    let whole = ByteRange { offset: 0, len: 65536 };
    let mut discard = driver.discard(whole);
    let mut cx = Context::from_waker(Waker::noop());
    assert!(discard.as_mut().poll(&mut cx).is_pending());
    assert!(plan(op, 2048, 4096).is_none(), "an older write to the same place is under way");
    drop(planned);
    assert!(discard.as_mut().poll(&mut cx).is_ready());
    drop(discard);
    let planned = plan(PlanOp::Read, 0, 4096).unwrap();
    assert!(matches!(planned.extents[..], [PlanExtent::Zero { len: 4096 }]));
    block_on(write(&driver, 0, &[6; 65536])).unwrap();
    let planned = plan(PlanOp::Read, 0, 131072).unwrap();
    let [PlanExtent::File { offset: again, len: 65536, .. }, PlanExtent::Zero { len: 65536 }] =
        planned.extents[..]
    else {
        panic!("{planned:?}")
    };
    assert_eq!(again, offset, "a discarded cluster is kept for its place");
    assert!(plan(PlanOp::Flush, 0, 0).is_none(), "metadata waits");
    block_on(driver.flush()).unwrap();
    assert!(plan(PlanOp::Flush, 0, 0).is_some());
}
