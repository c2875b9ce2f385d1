//! Tests of what the image does while the power stays on.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;
use crate::block::keep::tests::state_dir;
use crate::block::{Driver, FormatDriver, NodeOptions, Root};
use crate::formats::raw::Raw;
use crate::io::sim::{Fault, Rng, Sim, SimFile, SimOp, SimTask};
use crate::io::{HostFile, block_on};

pub(super) const IMAGE: (u64, u64) = (1, 2);

/// A tool of QEMU's, or `None` with a line that says so.
pub(super) fn qemu(tool: &str) -> Option<Command> {
    let found = Command::new(tool).arg("--version").output().is_ok_and(|out| out.status.success());
    if !found {
        eprintln!("SKIPPED: {tool} is not installed");
        return None;
    }
    Some(Command::new(tool))
}

/// A new image on a simulated file.
pub(super) fn new_image(options: &CreateOptions, alignment: Alignment) -> SimFile {
    let file = SimFile::with_alignment("test.qcow2", Vec::new(), alignment);
    block_on(create(Arc::new(file.clone()), options)).unwrap();
    file
}

pub(super) fn raw_node(content: &[u8], alignment: Alignment) -> Node {
    let file = SimFile::with_alignment("base.raw", content.to_vec(), alignment);
    let raw = Raw::open(Arc::new(file), true).unwrap();
    let options = NodeOptions { name: "base".into(), read_only: true, ..Default::default() };
    Node::new(Arc::new(raw), options)
}

pub(super) type Driven = FormatDriver<Qcow2>;

pub(super) fn open_image(file: &SimFile, backing: Option<Node>, keep: Option<Keep>) -> Driven {
    let options = OpenOptions { read_only: false, backing, keep, ..OpenOptions::default() };
    FormatDriver::new(block_on(Qcow2::open(Arc::new(file.clone()), options)).unwrap())
}

pub(super) fn backed(size: u64, cluster_size: u64, by: bool) -> CreateOptions {
    let backing = Backing { file: "base.raw".into(), format: Some("raw".into()) };
    CreateOptions { cluster_size, backing: by.then_some(backing), ..CreateOptions::new(size) }
}

pub(super) async fn read(driver: &Driven, offset: u64, len: u64) -> Vec<u8> {
    let buf = AlignedBuf::zeroed(len as usize, 4096);
    driver.read(offset, buf.buffers()).await.unwrap();
    buf.to_vec()
}

/// Scatters a write over memory that is not aligned to anything.
pub(super) async fn write(driver: &Driven, offset: u64, data: &[u8]) -> Result<()> {
    let whole = AlignedBuf::zeroed(data.len() + 1, 4096);
    let part = whole.buffers().slice(1, data.len() as u64);
    part.copy_from_slice(data);
    driver.write(offset, part, false).await
}

/// A request of the model tests.
#[derive(Clone, Debug)]
pub(super) enum Request {
    Write(u64, Vec<u8>),
    Zero(ByteRange, bool),
    Discard(ByteRange),
    Flush,
}

/// A random request on a disk of `size` bytes, in units of `unit`.
pub(super) fn random_request(rng: &mut Rng, size: u64, unit: u64, longest: u64) -> Request {
    let blocks = size / unit;
    let start = rng.below(blocks);
    let len = 1 + rng.below(longest.min(blocks - start));
    let range = ByteRange { offset: start * unit, len: len * unit };
    match rng.below(16) {
        0 => Request::Flush,
        1 | 2 => Request::Zero(range, rng.one_in(2)),
        3 | 4 => Request::Discard(range),
        _ => {
            let data = (0..range.len / 8).flat_map(|_| rng.word().to_le_bytes()).collect();
            Request::Write(range.offset, data)
        }
    }
}

pub(super) async fn perform(driver: &Driven, request: &Request) -> Result<()> {
    match request {
        Request::Write(offset, data) => write(driver, *offset, data).await,
        Request::Zero(range, unmap) => driver.write_zeroes(*range, *unmap).await,
        Request::Discard(range) => driver.discard(*range).await,
        Request::Flush => driver.flush().await,
    }
}

/// What a request does to the content. A discard may do anything between nothing and zeros, so the
/// driver is asked what it did.
async fn perform_on_model(driver: &Driven, model: &mut [u8], request: &Request) {
    let part = |range: &ByteRange| range.offset as usize..range.end() as usize;
    match request {
        Request::Write(offset, data) => {
            model[*offset as usize..*offset as usize + data.len()].copy_from_slice(data);
        }
        Request::Zero(range, _) => model[part(range)].fill(0),
        Request::Discard(range) => {
            let now = read(driver, range.offset, range.len).await;
            for (byte, now) in model[part(range)].iter_mut().zip(now) {
                assert!(now == *byte || now == 0, "a discard left foreign data");
                *byte = now;
            }
        }
        Request::Flush => {}
    }
}

/// `qemu-img check`, which must find no errors (leaks are allowed), and the same content as ours.
pub(super) fn check_with_qemu(
    image: &[u8],
    expected: Option<&[u8]>,
    base: Option<&[u8]>,
    what: &str,
) {
    let Some(mut check) = qemu("qemu-img") else { return };
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("test.qcow2");
    std::fs::write(&path, image).unwrap();
    if let Some(base) = base {
        std::fs::write(dir.path().join("base.raw"), base).unwrap();
    }
    let out = check.args(["check", "-q"]).arg(&path).output().unwrap();
    let code = out.status.code();
    assert!(
        matches!(code, Some(0 | 3)),
        "{what}: qemu-img check: {code:?} {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    let Some(expected) = expected else { return };
    let raw = dir.path().join("expected.raw");
    std::fs::write(&raw, expected).unwrap();
    let mut compare = qemu("qemu-img").unwrap();
    let out = compare.args(["compare", "-f", "qcow2", "-F", "raw"]).arg(&path).arg(&raw).output();
    let out = out.unwrap();
    assert!(out.status.success(), "{what}: {}", String::from_utf8_lossy(&out.stdout));
}

fn random_bytes(seed: u64, len: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    (0..len / 8).flat_map(|_| rng.word().to_le_bytes()).collect()
}

/// One model run: random requests against a byte vector, with reopens.
fn model_run(seed: u64, cluster_size: u64, with_backing: bool, unit: u64, alignment: Alignment) {
    let what = format!("seed {seed}, clusters {cluster_size}, backing {with_backing}, unit {unit}");
    let mut rng = Rng::new(seed);
    // Odd on purpose: the last cluster is not whole, and the backing ends before the disk.
    let (clusters, steps) = if cluster_size > 65536 { (3, 40) } else { (40, 120) };
    let size = cluster_size * clusters + if cluster_size > unit { unit } else { 0 };
    let base_len = align_down(size * 2 / 3, alignment.request.max(512));
    let base = random_bytes(seed ^ 77, base_len);
    let node = || with_backing.then(|| raw_node(&base, alignment));
    let file = new_image(&backed(size, cluster_size, with_backing), alignment);
    let mut model = vec![0; size as usize];
    if with_backing {
        model[..base.len()].copy_from_slice(&base);
    }
    let mut driver = open_image(&file, node(), None);
    let longest = (cluster_size * 3 / unit).clamp(2, 1000);
    for step in 0..steps {
        let request = random_request(&mut rng, size, unit, longest);
        block_on(perform(&driver, &request)).unwrap_or_else(|err| panic!("{what}: {err}"));
        block_on(perform_on_model(&driver, &mut model, &request));
        if step % 40 == 39 {
            let content = block_on(read(&driver, 0, size));
            assert!(content == model, "{what}: content differs after step {step}");
            block_on(driver.close()).unwrap();
            driver = open_image(&file, node(), None);
            let content = block_on(read(&driver, 0, size));
            assert!(content == model, "{what}: content differs after reopening at step {step}");
        }
    }
    block_on(driver.close()).unwrap();
    let base = with_backing.then_some(&base[..]);
    check_with_qemu(&file.durable(), Some(&model), base, &what);
}

#[test]
fn random_requests_agree_with_a_byte_vector() {
    let direct = Alignment { request: 4096, memory: 512 };
    for seed in 0..2 {
        for with_backing in [false, true] {
            for cluster_size in [512, 4096, 65536, 2 << 20] {
                model_run(seed, cluster_size, with_backing, 512, Alignment::NONE);
                model_run(seed + 100, cluster_size, with_backing, 4096, direct);
                // Requests smaller than the file's sectors.
                model_run(seed + 200, cluster_size, with_backing, 512, direct);
            }
        }
    }
}

#[test]
fn many_requests_at_once_on_a_slow_disk() {
    for seed in 0..60 {
        let mut rng = Rng::new(seed);
        let cluster_size = [512, 4096, 65536][rng.below(3) as usize];
        let alignment = match rng.one_in(2) {
            true => Alignment { request: 4096, memory: 512 },
            false => Alignment::NONE,
        };
        let lanes = 6u64;
        let lane = 20 * 4096u64;
        let size = lanes * lane;
        let base = random_bytes(seed, size);
        let file = new_image(&backed(size, cluster_size, true), alignment);
        let driver = open_image(&file, Some(raw_node(&base, Alignment::NONE)), None);
        let sim = Sim::new(seed);
        sim.attach(&file);
        // Each task owns interleaved blocks of 512, so that clusters are shared but bytes are not.
        let models: Vec<Mutex<Vec<u8>>> = (0..lanes).map(|_| Mutex::new(base.clone())).collect();
        let tasks: Vec<SimTask<'_>> = (0..lanes)
            .map(|i| {
                let (driver, models) = (&driver, &models);
                let mut rng = Rng::new(seed * 100 + i);
                Box::pin(async move {
                    for _ in 0..15 {
                        let block = rng.below(size / 512 / lanes) * lanes + i;
                        let offset = block * 512;
                        if rng.one_in(10) {
                            driver.flush().await.unwrap();
                            continue;
                        }
                        let data = vec![rng.word() as u8; 512];
                        write(driver, offset, &data).await.unwrap();
                        let at = offset as usize..offset as usize + 512;
                        models[i as usize].lock().unwrap()[at.clone()].copy_from_slice(&data);
                        assert!(read(driver, offset, 512).await == data, "seed {seed}");
                    }
                }) as SimTask<'_>
            })
            .collect();
        sim.run(tasks);
        sim.block_on(driver.flush()).unwrap();
        sim.detach(&file);
        let content = block_on(read(&driver, 0, size));
        for block in 0..size / 512 {
            let at = block as usize * 512..block as usize * 512 + 512;
            let model = models[(block % lanes) as usize].lock().unwrap();
            assert!(content[at.clone()] == model[at], "seed {seed}, block {block}");
        }
        check_with_qemu(&file.durable(), Some(&content), Some(&base), &format!("seed {seed}"));
    }
}

#[test]
fn dropped_futures_leave_the_image_consistent() {
    for seed in 0..150 {
        let mut rng = Rng::new(seed);
        let cluster_size = [512, 4096, 65536][rng.below(3) as usize];
        let size = 40 * cluster_size.max(4096);
        let base = random_bytes(seed, size);
        let file = new_image(&backed(size, cluster_size, true), Alignment::NONE);
        let driver = open_image(&file, Some(raw_node(&base, Alignment::NONE)), None);
        let sim = Sim::new(seed);
        sim.attach(&file);
        for _ in 0..6 {
            let requests: Vec<Request> =
                (0..5).map(|_| random_request(&mut rng, size, 512, 40)).collect();
            let tasks: Vec<SimTask<'_>> = requests
                .iter()
                .map(|request| {
                    let driver = &driver;
                    Box::pin(async move { perform(driver, request).await.unwrap() }) as SimTask<'_>
                })
                .collect();
            let stop = rng.below(40);
            // Whatever has not ended by then is dropped where it stands.
            sim.run_until(tasks, |step| step >= stop);
        }
        // After all that, ordinary requests work and what they write is there.
        let mut written = Vec::new();
        for i in 0..20 {
            let data = vec![i as u8 + 1; 512];
            let offset = rng.below(size / 512) * 512;
            sim.block_on(write(&driver, offset, &data)).unwrap();
            written.retain(|(at, _)| *at != offset);
            written.push((offset, data));
        }
        sim.block_on(driver.flush()).unwrap();
        sim.drain();
        sim.detach(&file);
        for (offset, data) in &written {
            assert!(block_on(read(&driver, *offset, 512)) == *data, "seed {seed}, {offset}");
        }
        let content = block_on(read(&driver, 0, size));
        drop(driver);
        let driver = open_image(&file, Some(raw_node(&base, Alignment::NONE)), None);
        assert!(block_on(read(&driver, 0, size)) == content, "seed {seed}: differs when reopened");
        check_with_qemu(&file.volatile(), Some(&content), Some(&base), &format!("seed {seed}"));
    }
}

#[test]
fn what_completed_survives_a_kill_for_the_same_guest_only() {
    for seed in 0..60 {
        let mut rng = Rng::new(seed);
        let cluster_size = [512, 4096, 65536][rng.below(3) as usize];
        let with_backing = rng.one_in(2);
        let size = 30 * cluster_size.max(4096);
        let base = random_bytes(seed, size / 2);
        let node = || with_backing.then(|| raw_node(&base, Alignment::NONE));
        let dir = state_dir();
        let keep = || Keep::open_with_capacity(dir.path(), IMAGE, "qcow2", 1 << 20).unwrap();
        let file = new_image(&backed(size, cluster_size, with_backing), Alignment::NONE);
        let mut model = vec![0; size as usize];
        if with_backing {
            model[..base.len()].copy_from_slice(&base);
        }
        let mut driver = open_image(&file, node(), Some(keep()));
        block_on(driver.resume(None)).unwrap();
        let mut nonce = 1000;
        block_on(async { driver.begin_session(nonce) }).unwrap();
        for _ in 0..6 {
            for _ in 0..rng.below(25) {
                let request = random_request(&mut rng, size, 512, 200);
                block_on(perform(&driver, &request)).unwrap();
                block_on(perform_on_model(&driver, &mut model, &request));
            }
            // Killed: nothing is closed or flushed; the page cache lives on.
            drop(driver);
            driver = open_image(&file, node(), Some(keep()));
            block_on(driver.resume(Some(nonce))).unwrap();
            let content = block_on(read(&driver, 0, size));
            assert!(content == model, "seed {seed}: a completed write was lost");
            nonce += 1;
            driver.begin_session(nonce).unwrap();
        }
        let named = with_backing.then_some(&base[..]);
        check_with_qemu(&file.volatile(), None, named, &format!("seed {seed}"));

        // A new guest gets what was flushed, and nothing of what was kept.
        block_on(driver.flush()).unwrap();
        let flushed = block_on(read(&driver, 0, size));
        let whole = ByteRange { offset: 0, len: size };
        block_on(driver.write_zeroes(whole, true)).unwrap();
        block_on(write(&driver, 0, &[9; 512])).unwrap();
        drop(driver);
        let driver = open_image(&file, node(), Some(keep()));
        let err = block_on(driver.resume(Some(7))).unwrap_err();
        assert!(err.to_string().contains("another guest's session"), "{err}");
        block_on(driver.resume(None)).unwrap();
        // (The last write went into its cluster's place, which is the flushed one.)
        let content = block_on(read(&driver, 0, size));
        let rest = cluster_size as usize..;
        assert!(content[rest.clone()] == flushed[rest], "seed {seed}: unflushed state shows");
        driver.begin_session(1).unwrap();
        block_on(driver.close()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "keep left behind");
    }
}

/// What is noted for the guest (in its in-flight region) follows the root from node to node.
#[test]
fn it_is_noted_whether_a_guests_writes_are_kept() {
    let dir = state_dir();
    let raw = || {
        let file = SimFile::with_alignment("raw", vec![0; 65536], Alignment::NONE);
        let options = NodeOptions { name: "raw".into(), read_only: false, ..Default::default() };
        Node::new(Arc::new(Raw::open(Arc::new(file), false).unwrap()), options)
    };
    let qcow2 = |keep| {
        let file = new_image(&backed(65536, 4096, false), Alignment::NONE);
        let options = NodeOptions { name: "qcow2".into(), read_only: false, ..Default::default() };
        Node::new(Arc::new(open_image(&file, None, keep)), options)
    };
    let keep = Keep::open(dir.path(), IMAGE, "qcow2").unwrap();
    let noted = Arc::new(Mutex::new(None));
    let root = Root::new("disk", raw());
    root.resume(None).unwrap();
    let note = Arc::clone(&noted);
    root.begin_session(1, move |kept| *note.lock().unwrap() = Some(kept)).unwrap();
    assert_eq!(*noted.lock().unwrap(), Some(false));
    root.replace_node(qcow2(Some(keep)), &root.quiesce()).unwrap();
    assert_eq!(*noted.lock().unwrap(), Some(true));
    root.replace_node(qcow2(None), &root.quiesce()).unwrap();
    assert_eq!(*noted.lock().unwrap(), Some(false));
    *noted.lock().unwrap() = Some(true);
    root.end_session();
    assert_eq!((*noted.lock().unwrap(), root.session()), (Some(false), None));
}

#[test]
fn killed_in_the_middle_of_requests_and_flushes() {
    for seed in 0..120 {
        let mut rng = Rng::new(seed);
        let cluster_size = [512, 4096, 65536][rng.below(3) as usize];
        let lanes = 4u64;
        let size = 40 * cluster_size.max(4096);
        let dir = state_dir();
        let keep = || Keep::open_with_capacity(dir.path(), IMAGE, "qcow2", 256 << 10).unwrap();
        let file = new_image(&backed(size, cluster_size, false), Alignment::NONE);
        // Of each block: the values it may have, the last completed one first.
        let model: Mutex<Vec<Vec<u8>>> = Mutex::new(vec![vec![0]; (size / 512) as usize]);
        for nonce in 1..5 {
            let driver = open_image(&file, None, Some(keep()));
            if nonce == 1 {
                block_on(driver.resume(None)).unwrap();
            } else {
                block_on(driver.resume(Some(nonce - 1))).unwrap();
            }
            driver.begin_session(nonce).unwrap();
            let content = block_on(read(&driver, 0, size));
            for (block, possible) in model.lock().unwrap().iter_mut().enumerate() {
                let found = content[block * 512];
                assert!(content[block * 512..][..512].iter().all(|byte| *byte == found));
                assert!(possible.contains(&found), "seed {seed}: block {block} is {found}");
                *possible = vec![found];
            }
            let sim = Sim::new(rng.word());
            sim.attach(&file);
            let tasks: Vec<SimTask<'_>> = (0..lanes)
                .map(|i| {
                    let (driver, model) = (&driver, &model);
                    let mut rng = Rng::new(rng.word());
                    Box::pin(async move {
                        for _ in 0..12 {
                            if rng.one_in(8) {
                                driver.flush().await.unwrap();
                                continue;
                            }
                            let block = rng.below(size / 512 / lanes) * lanes + i;
                            let value = rng.word() as u8;
                            model.lock().unwrap()[block as usize].push(value);
                            write(driver, block * 512, &[value; 512]).await.unwrap();
                            model.lock().unwrap()[block as usize] = vec![value];
                        }
                    }) as SimTask<'_>
                })
                .collect();
            let stop = rng.below(250);
            sim.run_until(tasks, |step| step >= stop);
            drop(driver);
            // What the kernel was told to do happens, process or not.
            sim.drain();
            sim.detach(&file);
        }
        check_with_qemu(&file.volatile(), None, None, &format!("seed {seed}"));
    }
}

#[test]
fn without_a_keep_writes_that_allocate_wait_for_the_disk() {
    let file = new_image(&CreateOptions::new(1 << 20), Alignment::NONE);
    let driver = open_image(&file, None, None);
    driver.begin_session(1).unwrap();
    block_on(write(&driver, 0, &[1; 512])).unwrap();
    let flushes = file.count(SimOp::Flush);
    block_on(write(&driver, 512, &[2; 512])).unwrap();
    assert_eq!(file.count(SimOp::Flush), flushes, "a mapped cluster costs nothing extra");
    block_on(driver.discard(ByteRange { offset: 0, len: 65536 })).unwrap();
    block_on(write(&driver, 65536, &[3; 512])).unwrap();
    drop(driver);
    let driver = open_image(&file, None, None);
    assert_eq!(block_on(read(&driver, 0, 512)), [0; 512]);
    assert_eq!(block_on(read(&driver, 65536, 512)), [3; 512]);
}

#[test]
fn a_mapped_cluster_costs_no_record() {
    let dir = state_dir();
    let file = new_image(&CreateOptions::new(1 << 20), Alignment::NONE);
    let keep = Keep::open(dir.path(), IMAGE, "qcow2").unwrap();
    let path = keep.path().to_path_buf();
    let driver = open_image(&file, None, Some(keep));
    driver.begin_session(1).unwrap();
    block_on(write(&driver, 0, &[1; 65536])).unwrap();
    assert!(std::fs::metadata(&path).unwrap().len() > 65536, "not recorded");
    block_on(driver.flush()).unwrap();
    use std::os::unix::fs::MetadataExt;
    let blocks = std::fs::metadata(&path).unwrap().blocks();
    block_on(write(&driver, 4096, &[2; 4096])).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().blocks(), blocks, "recorded without need");
}

#[test]
fn a_failed_flush_poisons_writes_and_reads_go_on() {
    for (op, after) in [(SimOp::Flush, 0), (SimOp::Flush, 1), (SimOp::Write, 1), (SimOp::Write, 2)]
    {
        let file = new_image(&CreateOptions::new(1 << 20), Alignment::NONE);
        let driver = open_image(&file, None, None);
        block_on(write(&driver, 0, &[1; 512])).unwrap();
        block_on(driver.flush()).unwrap();
        file.fail(Fault { op: Some(op), after, errno: libc::EIO, for_good: false });
        block_on(write(&driver, 65536, &[2; 512])).unwrap();
        let err = block_on(driver.flush()).unwrap_err();
        assert_eq!(err.errno(), Some(libc::EIO), "{err}");
        for result in [
            block_on(driver.flush()),
            block_on(write(&driver, 0, &[3; 512])),
            block_on(driver.discard(ByteRange { offset: 0, len: 65536 })),
        ] {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Poisoned);
        }
        assert_eq!(block_on(read(&driver, 0, 512)), [1; 512]);
        assert_eq!(block_on(read(&driver, 65536, 512)), [2; 512]);
    }
}

#[test]
fn a_failed_data_write_fails_that_request_alone() {
    let file = new_image(&CreateOptions::new(1 << 20), Alignment::NONE);
    let driver = open_image(&file, None, None);
    file.fail(Fault { op: Some(SimOp::Write), after: 0, errno: libc::ENOSPC, for_good: false });
    let err = block_on(write(&driver, 0, &[1; 512])).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::NoSpace);
    assert_eq!(block_on(read(&driver, 0, 512)), [0; 512]);
    block_on(write(&driver, 0, &[1; 512])).unwrap();
    block_on(driver.flush()).unwrap();
    assert_eq!(block_on(read(&driver, 0, 512)), [1; 512]);
    check_with_qemu(&file.durable(), None, None, "failed write");
}

#[test]
fn grows_and_the_new_space_reads_as_zeros() {
    for (old, new, base_len) in [
        (100 << 10, 3 << 20, 2 << 20),
        (64 << 10, 1 << 30, 96 << 10),
        (1 << 20, (1 << 20) + 512, 0),
    ] {
        let base = random_bytes(5, base_len);
        let file = new_image(&backed(old, 65536, true), Alignment::NONE);
        let driver = open_image(&file, Some(raw_node(&base, Alignment::NONE)), None);
        block_on(write(&driver, 0, &[1; 512])).unwrap();
        block_on(driver.resize(new)).unwrap();
        assert_eq!(driver.limits().size, new);
        let mut expected = base.clone();
        expected.resize(old as usize, 0);
        expected[..512].fill(1);
        expected.resize(new as usize, 0);
        let first = (4u64 << 20).min(new);
        assert!(block_on(read(&driver, 0, first)) == expected[..first as usize], "{old} to {new}");
        let err = block_on(driver.resize(old)).unwrap_err();
        assert!(err.to_string().contains("qemu-img resize --shrink"), "{err}");
        block_on(driver.close()).unwrap();
        check_with_qemu(&file.durable(), Some(&expected), Some(&base), "grown");
    }
}

#[test]
fn only_what_the_caller_opened_is_used() {
    let file = new_image(&backed(1 << 20, 65536, true), Alignment::NONE);
    let header = block_on(Header::read(&(Arc::new(file.clone()) as Arc<dyn File>))).unwrap();
    let backing = header.backing.clone().unwrap();
    assert_eq!((backing.file.as_str(), backing.format.as_deref()), ("base.raw", Some("raw")));
    let open = |backing| {
        let options = OpenOptions { backing, ..OpenOptions::default() };
        block_on(Qcow2::open(Arc::new(file.clone()), options))
    };
    let err = open(None).unwrap_err();
    assert!(err.to_string().contains("'base.raw', which was not opened"), "{err}");
    let details = open(Some(raw_node(&[0; 512], Alignment::NONE))).unwrap().details();
    assert_eq!(details["compat"], "1.1");
    assert_eq!(details["backing-filename"], "base.raw");
    let plain = new_image(&CreateOptions::new(1 << 20), Alignment::NONE);
    let options =
        OpenOptions { backing: Some(raw_node(&[0; 512], Alignment::NONE)), ..Default::default() };
    block_on(Qcow2::open(Arc::new(plain), options)).unwrap_err();
}

#[test]
fn features_that_are_not_supported_are_named() {
    let image = new_image(&CreateOptions::new(1 << 20), Alignment::NONE).durable();
    let cases: [(usize, u8, bool, &str); 8] = [
        (79, 1, false, "qemu-img check -r all"),
        (79, 2, false, "marked corrupt"),
        (79, 4, true, "external data file"),
        (79, 8, true, "compression type"),
        (79, 16, true, "extended L2"),
        (78, 1, true, "incompatible feature 8"),
        (35, 1, true, "encrypted (AES)"),
        (35, 2, true, "encrypted (LUKS)"),
    ];
    for (at, value, refused_read_only, expected) in cases {
        let mut bytes = image.clone();
        bytes[at] = value;
        let file = SimFile::from_bytes("disk.qcow2", bytes.clone());
        let open = |read_only| {
            let options = OpenOptions { read_only, ..OpenOptions::default() };
            block_on(Qcow2::open(Arc::new(file.clone()), options))
        };
        let err = open(false).unwrap_err();
        assert!(err.to_string().contains(expected), "{err}");
        assert!(err.to_string().starts_with("disk.qcow2: "), "{err}");
        match open(true) {
            Ok(image) => {
                assert!(!refused_read_only);
                let driver = FormatDriver::new(image);
                assert_eq!(block_on(read(&driver, 0, 512)), [0; 512]);
                let err = block_on(write(&driver, 0, &[1; 512])).unwrap_err();
                assert_eq!(err.kind(), ErrorKind::ReadOnly);
                block_on(driver.close()).unwrap();
            }
            Err(err) => assert!(refused_read_only && err.to_string().contains(expected), "{err}"),
        }
        assert_eq!(file.volatile(), bytes, "a refused image was modified");
    }
}

#[test]
fn bad_create_options_are_refused() {
    let good = CreateOptions::new(1 << 20);
    let named = |format: Option<&str>| {
        Some(Backing { file: "x".into(), format: format.map(str::to_string) })
    };
    let cases = [
        (CreateOptions { size: 0, ..good.clone() }, "size 0"),
        (CreateOptions { size: 100, ..good.clone() }, "multiple of 512"),
        (CreateOptions { cluster_size: 256, ..good.clone() }, "cluster size 256"),
        (CreateOptions { cluster_size: 3 << 10, ..good.clone() }, "cluster size 3072"),
        (CreateOptions { refcount_bits: 3, ..good.clone() }, "refcount width 3"),
        (CreateOptions { backing: named(None), ..good.clone() }, "format of backing file 'x'"),
    ];
    for (options, expected) in cases {
        let file = SimFile::new("new.qcow2");
        let err = block_on(create(Arc::new(file.clone()), &options)).unwrap_err();
        assert!(err.to_string().contains(expected), "{err}");
        assert!(file.volatile().is_empty());
    }
    let file = SimFile::from_bytes("new.qcow2", vec![1; 512]);
    block_on(create(Arc::new(file), &good)).unwrap_err();
}

#[test]
fn hostile_images_are_refused_or_read_without_harm() {
    let base = random_bytes(1, 128 << 10);
    let file = new_image(&backed(1 << 20, 4096, true), Alignment::NONE);
    let driver = open_image(&file, Some(raw_node(&base, Alignment::NONE)), None);
    for i in 0..40 {
        block_on(write(&driver, i * 20480, &[i as u8 + 1; 512])).unwrap();
    }
    block_on(driver.close()).unwrap();
    drop(driver);
    let good = file.durable();
    let mut opened = 0;
    for seed in 0..1500 {
        let mut rng = Rng::new(seed);
        let mut bytes = good.clone();
        if rng.one_in(4) {
            bytes.truncate(rng.below(good.len() as u64) as usize);
        }
        for _ in 0..1 + rng.below(4) {
            // The header, the tables, or anywhere; a byte or a whole big-endian field.
            let reach = [112, 512, 5 * 4096, bytes.len() as u64][rng.below(4) as usize];
            let at = rng.below(reach.min(bytes.len() as u64)) as usize;
            if rng.one_in(2) {
                let Some(byte) = bytes.get_mut(at) else { continue };
                *byte = rng.word() as u8;
            } else {
                let at = at & !7;
                let Some(field) = bytes.get_mut(at..at + 8) else { continue };
                let value = match rng.below(5) {
                    0 => u64::MAX,
                    1 => 0,
                    2 => 1 << rng.below(64),
                    3 => rng.below(1 << 24) << 9,
                    _ => u64::from_be_bytes(field.try_into().unwrap()).wrapping_add(512),
                };
                field.copy_from_slice(&value.to_be_bytes());
            }
        }
        let file = SimFile::from_bytes("hostile.qcow2", bytes);
        for read_only in [true, false] {
            let backing =
                |header: &Header| header.backing.as_ref().map(|_| raw_node(&base, Alignment::NONE));
            let shared: Arc<dyn File> = Arc::new(file.clone());
            let Ok(header) = block_on(Header::read(&shared)) else { continue };
            let options =
                OpenOptions { read_only, backing: backing(&header), ..Default::default() };
            let Ok(image) = block_on(Qcow2::open(shared, options)) else { continue };
            opened += 1;
            let driver = FormatDriver::new(image);
            let size = driver.limits().size;
            for _ in 0..10 {
                let request = random_request(&mut rng, size.clamp(512, 1 << 40), 512, 64);
                let buf = AlignedBuf::zeroed(4096, 512);
                let offset = align_down(rng.below(size.saturating_sub(4096)), 512);
                if size >= 4096 {
                    let _ = block_on(driver.read(offset, buf.buffers()));
                }
                if !read_only && size >= 512 {
                    let _ = block_on(perform(&driver, &request));
                }
            }
            let _ = block_on(driver.flush());
        }
    }
    assert!(opened > 300, "only {opened} of the images could be opened: the test is too harsh");
}

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
    FormatDriver::new(block_on(Qcow2::open(host(&path, write, direct), options)).unwrap())
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
    let driver = Arc::new(FormatDriver::new(image));
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
                            block_on(write(&driver, offset, &[value; 4096])).unwrap();
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
    assert!(block_on(read(&driver, 0, size)) == expected);
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
