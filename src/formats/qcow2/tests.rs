//! Tests of what the image does while the power stays on.

mod host;
mod kept;
mod refused;

use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;
use crate::block::keep::tests::state_dir;
use crate::block::{Driver, FormatDriver, NodeOptions, PlanExtent, Root};
use crate::formats::raw::Raw;
use crate::io::sim::{Fault, Rng, Sim, SimFile, SimOp, SimTask};
use crate::io::{AlignedBuf, Alignment, HostFile, block_on};

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

/// Makes an empty file into an image.
pub(super) async fn create(file: Arc<dyn File>, options: &CreateOptions) -> Result<()> {
    NewImage::lay_out(file, options).await?.write().await
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
    FormatDriver::new(block_on(Qcow2::open(Arc::new(file.clone()), options)).unwrap()).unwrap()
}

pub(super) fn backed(size: u64, cluster_size: u64, by: bool) -> CreateOptions {
    let backing = Backing { file: "base.raw".into(), format: Some("raw".into()) };
    CreateOptions { cluster_size, backing: by.then_some(backing), ..CreateOptions::new(size) }
}

pub(super) async fn read(driver: &dyn Driver, offset: u64, len: u64) -> Vec<u8> {
    let buf = AlignedBuf::zeroed(len as usize, 4096);
    driver.read(offset, buf.buffers()).await.unwrap();
    buf.to_vec()
}

/// Scatters a write over memory that is not aligned to anything.
pub(super) async fn write(driver: &dyn Driver, offset: u64, data: &[u8]) -> Result<()> {
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

/// Nothing was done then, and a guest whose disk was to grow by a slip goes on.
#[test]
fn a_size_that_cannot_be_changes_nothing() {
    let options = CreateOptions::new(1 << 20);
    let file = new_image(&options, Alignment::NONE);
    let disk = open_image(&file, None, None);
    for size in [3 << 50, i64::MAX as u64 & !511] {
        let err = block_on(disk.resize(size)).unwrap_err().to_string();
        assert!(err.contains("is more than the 2251799813685248 that"), "{err}");
        let buf = AlignedBuf::from_slice(&[1; 512], 512);
        block_on(disk.write(0, buf.buffers(), false)).unwrap();
        block_on(disk.flush()).unwrap();
        assert_eq!(disk.limits().size, 1 << 20);
    }
    block_on(disk.resize(2 << 20)).unwrap();
}

/// A persistent bitmap that were still consistent would leave the write out of the next backup.
#[test]
fn nothing_is_written_while_the_header_claims_what_that_makes_untrue() {
    const AUTOCLEAR: usize = 88;
    let base = || Some(raw_node(&[0; 65536], Alignment::NONE));
    let file = new_image(&backed(1 << 20, 65536, true), Alignment::NONE);
    let disk = open_image(&file, base(), None);
    let buf = AlignedBuf::from_slice(&[1; 512], 512);
    let write = |disk: &Driven| block_on(disk.write(0, buf.buffers(), false)).unwrap();
    write(&disk);
    block_on(disk.close()).unwrap();
    let mut content = file.durable();
    content[AUTOCLEAR + 7] = 1;
    let claims = |file: &SimFile| file.durable()[AUTOCLEAR + 7] == 1;
    for change in ["write", "discard", "zeroes", "resize", "rename"] {
        let file = SimFile::from_bytes("test.qcow2", content.clone());
        let disk = open_image(&file, base(), None);
        block_on(disk.flush()).unwrap();
        block_on(disk.close()).unwrap();
        assert!(claims(&file), "before anything is written");
        let cluster = ByteRange { offset: 0, len: 65536 };
        match change {
            "write" => write(&disk),
            "discard" => block_on(disk.discard(cluster)).unwrap(),
            "rename" => block_on(disk.rename_backing(Some(("base.raw", "raw")))).unwrap(),
            "resize" => block_on(disk.resize(2 << 20)).unwrap(),
            _ => block_on(disk.write_zeroes(cluster, false)).unwrap(),
        }
        // The disk is the same by another name of its backing file.
        assert_eq!(claims(&file), change == "rename", "{change}");
    }
}

#[test]
fn what_surrounds_a_new_cluster_goes_with_its_data_in_one_write() {
    let base = random_bytes(5, 1 << 20);
    let file = new_image(&backed(1 << 20, 65536, true), Alignment::NONE);
    let disk = open_image(&file, Some(raw_node(&base, Alignment::NONE)), None);
    // Whatever is done once is done.
    block_on(write(&disk, 0, &[1; 512])).unwrap();
    let before = file.count(SimOp::Write);
    block_on(write(&disk, (3 << 16) + 4096, &[2; 8192])).unwrap();
    assert_eq!(file.count(SimOp::Write) - before, 1);
    let cluster = block_on(read(&disk, 3 << 16, 65536));
    let mut expected = base[3 << 16..4 << 16].to_vec();
    expected[4096..4096 + 8192].fill(2);
    assert!(cluster == expected);
    // Over the end of a cluster, and of two clusters the whole of one.
    let before = file.count(SimOp::Write);
    block_on(write(&disk, (5 << 16) - 512, &[3; 1024])).unwrap();
    let writes = file.count(SimOp::Write) - before;
    assert!((1..=2).contains(&writes), "{writes}");
    let mut expected = base[4 << 16..6 << 16].to_vec();
    expected[(1 << 16) - 512..(1 << 16) + 512].fill(3);
    assert!(block_on(read(&disk, 4 << 16, 2 << 16)) == expected);
}

/// Writers that allocate under the same table take turns at it, but not while they read.
#[test]
fn what_surrounds_new_clusters_is_read_side_by_side() {
    let mut most = 0;
    for seed in 0..20 {
        let sim = Sim::new(seed);
        let base = SimFile::from_bytes("base.raw", random_bytes(5, 1 << 20));
        let file = new_image(&backed(1 << 20, 65536, true), Alignment::NONE);
        let raw = Raw::open(Arc::new(base.clone()), true).unwrap();
        let disk = open_image(&file, Some(Node::new(Arc::new(raw), NodeOptions::default())), None);
        block_on(write(&disk, 0, &[1; 512])).unwrap();
        sim.attach(&base);
        let writers: Vec<SimTask<'_>> = (1..5u64)
            .map(|cluster| {
                let disk = &disk;
                Box::pin(async move { write(disk, cluster << 16, &[2; 512]).await.unwrap() })
                    as SimTask<'_>
            })
            .collect();
        sim.run_until(writers, |_| {
            most = most.max(sim.pending());
            false
        });
    }
    assert!(most > 2, "{most}");
}
