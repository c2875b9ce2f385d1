//! The format against the sheet's example, against a byte vector, and against what goes wrong.

mod kept;
mod maps;

use super::*;
use crate::block::{Driver, FormatDriver, NodeOptions, keep::tests::state_dir};
use crate::formats::raw::Raw;
use crate::io::sim::{Fault, Rng, Sim, SimFile, SimOp, SimTask};
use crate::io::{Buffers, HostFile, block_on};
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

pub(super) type Disk = FormatDriver<AddCow>;

/// A node of a raw disk with this content.
pub(super) fn raw_node(content: &[u8]) -> Node {
    let file = Arc::new(SimFile::from_bytes("base.raw", content.to_vec()));
    let raw = Raw::open(file, true).unwrap();
    Node::new(Arc::new(raw), NodeOptions::default())
}

pub(super) fn backing_of(content: Option<&[u8]>) -> Backing {
    content.map_or(Backing::None, |content| Backing::Node(raw_node(content)))
}

/// A fresh add-cow file for an image of `size` bytes, all of it durable.
pub(super) fn new_file(size: u64, backing: bool) -> Vec<u8> {
    let file = SimFile::new("new.add-cow");
    let backing = backing.then(|| "base.raw".to_string());
    let header = Header { backing, image: "disk.raw".into() };
    block_on(create::create(&file, &header, size)).unwrap();
    file.durable()
}

pub(super) fn open_disk(
    file: &SimFile,
    image: &SimFile,
    backing: Backing,
    keep: Option<Keep>,
) -> Disk {
    try_open(file, image, backing, keep).unwrap()
}

fn try_open(file: &SimFile, image: &SimFile, backing: Backing, keep: Option<Keep>) -> Result<Disk> {
    let image = Arc::new(image.clone());
    let options = OpenOptions { read_only: false, image, backing, backing_format: None, keep };
    block_on(AddCow::open(Arc::new(file.clone()), options)).and_then(FormatDriver::new)
}

pub(super) async fn read(disk: &dyn Driver, offset: u64, len: u64) -> Vec<u8> {
    let buf = AlignedBuf::from_slice(&vec![0xee; len as usize], 512);
    disk.read(offset, buf.buffers()).await.unwrap();
    buf.to_vec()
}

pub(super) async fn write(disk: &dyn Driver, offset: u64, data: &[u8]) -> Result<()> {
    disk.write(offset, buffers(data), false).await
}

fn buffers(data: &[u8]) -> Buffers {
    AlignedBuf::from_slice(data, 512).buffers()
}

/// Sectors filled with `first`, `first + 1`, …
fn numbered(first: u8, sectors: u8) -> Vec<u8> {
    (first..first + sectors).flat_map(|value| [value; 512]).collect()
}

/// The example of the specification sheet.
fn example() -> (SimFile, SimFile, Backing) {
    let header = Header { backing: Some("base.raw".into()), image: "disk.raw".into() };
    let mut bytes = header.encode().unwrap();
    bytes.extend([0x09, 0x02, 0x10]);
    let file = SimFile::from_bytes("x.add-cow", bytes);
    let image = SimFile::from_bytes("disk.raw", numbered(0x40, 21));
    (file, image, backing_of(Some(&numbered(0x80, 10))))
}

#[test]
fn the_example_of_the_sheet_reads_and_writes_as_it_says() {
    let (file, image, backing) = example();
    let disk = open_disk(&file, &image, backing, None);
    assert_eq!(disk.limits().size, 10752);
    let content = block_on(read(&disk, 0, 10752));
    let firsts: Vec<u8> = content.chunks(512).map(|sector| sector[0]).collect();
    let expected = [
        0x40, 0x81, 0x82, 0x43, 0x84, 0x85, 0x86, 0x87, 0x88, 0x49, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        0x54,
    ];
    assert_eq!(firsts, expected);
    assert!(content.chunks(512).all(|sector| sector.iter().all(|byte| *byte == sector[0])));
    block_on(write(&disk, 10 * 512, &[1; 512])).unwrap();
    block_on(disk.flush()).unwrap();
    assert_eq!(file.durable()[2560..], [0x09, 0x06, 0x10]);
    // Nothing else has changed, and rewriting it changes nothing at all.
    assert_eq!(file.durable().len(), 2563);
    let writes = file.count(SimOp::Write);
    block_on(write(&disk, 10 * 512, &[2; 512])).unwrap();
    block_on(disk.flush()).unwrap();
    assert_eq!(file.count(SimOp::Write), writes);
    assert_eq!(image.durable()[10 * 512..11 * 512], [2; 512]);
}

#[test]
fn a_backing_that_ends_inside_a_sector_goes_on_with_zeros() {
    let (file, image, _) = example();
    let disk = open_disk(&file, &image, backing_of(Some(&[7; 700])), None);
    let content = block_on(read(&disk, 512, 1024));
    assert_eq!(content[..188], [7; 188]);
    assert_eq!(content[188..], [0; 1024 - 188]);
    let disk = open_disk(&file, &image, Backing::None, None);
    assert_eq!(block_on(read(&disk, 512, 512)), [0; 512]);
    let disk = open_disk(&file, &image, Backing::Unopened, None);
    let buf = AlignedBuf::zeroed(512, 512);
    let err = block_on(disk.read(512, buf.buffers())).unwrap_err();
    assert!(err.to_string().contains("without its backing file"), "{err}");
}

/// The bits may be older than the host's demands, or of another tool.
#[test]
fn sectors_smaller_than_the_units_of_the_files_are_read() {
    let header = Header { backing: Some("base.raw".into()), image: "disk.raw".into() };
    let mut bytes = header.encode().unwrap();
    bytes.extend([0x09, 0x02]);
    let file = SimFile::from_bytes("x.add-cow", bytes);
    let units = crate::io::Alignment { request: 4096, memory: 512 };
    let image = SimFile::with_alignment("disk.raw", numbered(0x40, 16), units);
    let base = Arc::new(SimFile::with_alignment("base.raw", numbered(0x80, 16), units));
    let base = Node::new(Arc::new(Raw::open(base, true).unwrap()), NodeOptions::default());
    let disk = open_disk(&file, &image, Backing::Node(base), None);
    assert_eq!(disk.limits().request_alignment, 4096, "the image file's");
    let mut expected = numbered(0x80, 16);
    for sector in [0, 3, 9] {
        expected[sector * 512..][..512].fill(0x40 + sector as u8);
    }
    assert!(block_on(read(&disk, 0, 8192)) == expected);
    assert!(block_on(read(&disk, 4096, 4096)) == expected[4096..]);
}

/// A VHDX has sectors of 4096 bytes if its disk has: what stands on it need not.
#[test]
fn the_units_of_the_backing_are_not_those_of_the_disk() {
    let units = crate::io::Alignment { request: 4096, memory: 512 };
    let base = Arc::new(SimFile::with_alignment("base.raw", numbered(0x80, 16), units));
    let base = Node::new(Arc::new(Raw::open(base, true).unwrap()), NodeOptions::default());
    let file = SimFile::from_bytes("x.add-cow", new_file(17 * 512, true));
    let image = SimFile::from_bytes("disk.raw", vec![0; 17 * 512]);
    let disk = open_disk(&file, &image, Backing::Node(base), None);
    assert_eq!(disk.limits().request_alignment, 512);
    block_on(write(&disk, 3 * 512, &[1; 512])).unwrap();
    let mut expected = numbered(0x80, 16);
    expected[3 * 512..][..512].fill(1);
    expected.extend([0; 512]);
    assert!(block_on(read(&disk, 0, 17 * 512)) == expected);
    assert!(block_on(read(&disk, 15 * 512, 1024)) == expected[15 * 512..]);
    // Its end can be read, so others may stand on it.
    let top = Node::new(Arc::new(disk), NodeOptions::default());
    let (file, image) = (SimFile::from_bytes("y.add-cow", new_file(17 * 512, true)), image);
    assert!(try_open(&file, &image, Backing::Node(top), None).is_ok());
}

#[test]
fn what_is_discarded_or_zeroed_never_shows_the_backing() {
    let (file, image, backing) = example();
    let disk = open_disk(&file, &image, backing, None);
    block_on(async {
        disk.discard(ByteRange { offset: 0, len: 4 * 512 }).await.unwrap();
        let content = read(&disk, 0, 4 * 512).await;
        // Its own sectors are gone, the backing's are as they were.
        let firsts: Vec<u8> = content.chunks(512).map(|sector| sector[0]).collect();
        assert_eq!(firsts, [0, 0x81, 0x82, 0]);
        disk.write_zeroes(ByteRange { offset: 0, len: 12 * 512 }, true).await.unwrap();
        assert_eq!(read(&disk, 0, 12 * 512).await, [0; 12 * 512]);
        disk.flush().await.unwrap();
    });
    assert_eq!(file.durable()[2560..], [0xff, 0x0f, 0x10]);
}

#[test]
fn zeroing_without_a_backing_sets_no_bits_that_are_not_needed() {
    let file = SimFile::from_bytes("x.add-cow", new_file(1 << 20, false));
    // What lies in the image where no bit is set is nobody's.
    let image = SimFile::from_bytes("disk.raw", vec![0x55; 1 << 20]);
    let disk = open_disk(&file, &image, Backing::None, None);
    block_on(async {
        write(&disk, 4096, &[1; 512]).await.unwrap();
        disk.write_zeroes(ByteRange { offset: 0, len: 1 << 20 }, true).await.unwrap();
        assert_eq!(read(&disk, 0, 1 << 20).await, vec![0; 1 << 20]);
        disk.flush().await.unwrap();
    });
    assert_eq!(file.durable()[2560..2564], [0, 1, 0, 0]);
}

#[test]
fn refused_files_are_not_modified() {
    let (file, image, _) = example();
    for (at, byte) in [(0, b'X'), (11, 2), (1036, 0)] {
        let mut bytes = file.durable();
        bytes[at] = byte;
        let bad = SimFile::from_bytes("x.add-cow", bytes.clone());
        let err = try_open(&bad, &image, Backing::None, None).map(|_| ()).unwrap_err();
        assert!(err.to_string().starts_with("x.add-cow: "), "{err}");
        assert_eq!(bad.volatile(), bytes);
    }
    let bad = SimFile::from_bytes("x.add-cow", file.durable()[..100].to_vec());
    let err = try_open(&bad, &image, Backing::None, None).map(|_| ()).unwrap_err();
    assert!(err.to_string().contains("truncated add-cow header"), "{err}");
    assert_eq!(bad.unflushed() + image.unflushed(), 0);
}

#[test]
fn a_short_bitmap_is_zeros_and_is_extended_by_the_first_write() {
    let (file, image, backing) = example();
    let short = SimFile::from_bytes("x.add-cow", file.durable()[..2561].to_vec());
    let disk = open_disk(&short, &image, backing, None);
    assert_eq!(block_on(read(&disk, 20 * 512, 512)), [0; 512]);
    block_on(disk.flush()).unwrap();
    assert_eq!(short.durable().len(), 2561, "nothing was written yet");
    block_on(write(&disk, 512, &[1; 512])).unwrap();
    block_on(disk.flush()).unwrap();
    assert_eq!(short.durable()[2560..], [0x0b, 0, 0]);
}

#[test]
fn bits_beyond_the_disk_are_ignored_and_left_out() {
    let (file, image, backing) = example();
    let mut bytes = file.durable();
    bytes[2562] = 0xf0;
    bytes.extend([0xff; 100]);
    let file = SimFile::from_bytes("x.add-cow", bytes);
    let disk = open_disk(&file, &image, backing, None);
    block_on(write(&disk, 19 * 512, &[1; 512])).unwrap();
    block_on(disk.flush()).unwrap();
    assert_eq!(file.durable()[2562], 0x18);
}

#[test]
fn many_pages_stay_in_bounded_memory() {
    // 2048 pages of 16 MiB each: more than twice what fits. Sparse, as the image is not really there.
    let size = 2048u64 * PAGE_SECTORS * 512;
    let file = SimFile::from_bytes("x.add-cow", new_file(size, false));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    let image = host_file(&path);
    let options = OpenOptions {
        read_only: false,
        image: Arc::new(image),
        backing: Backing::None,
        backing_format: None,
        keep: None,
    };
    let disk = FormatDriver::new(block_on(AddCow::open(Arc::new(file.clone()), options)).unwrap())
        .unwrap();
    let seed = 3;
    let mut rng = Rng::new(seed);
    let mut written = std::collections::HashMap::new();
    block_on(async {
        for i in 0..3000u64 {
            let sector = rng.below(size / 512);
            write(&disk, sector * 512, &i.to_le_bytes().repeat(64)).await.unwrap();
            written.insert(sector, i);
        }
        for (sector, i) in &written {
            let content = read(&disk, sector * 512, 512).await;
            assert_eq!(content, i.to_le_bytes().repeat(64), "sector {sector}, seed {seed}");
        }
        disk.flush().await.unwrap();
    });
    let ones: u64 = file.durable()[2560..].iter().map(|byte| u64::from(byte.count_ones())).sum();
    assert_eq!(ones, written.len() as u64);
    assert!(disk.format().shared.pages.resident_bytes() <= pages::FRAMES * PAGE_LEN);
}

fn host_file(path: &Path) -> HostFile {
    let options = crate::io::OpenOptions { write: true, ..Default::default() };
    HostFile::open(path, options).unwrap()
}

/// Files of the host with a backing: what plans are made of.
struct HostDisk {
    _dir: tempfile::TempDir,
    file: Arc<HostFile>,
    image: Arc<HostFile>,
    base: Arc<HostFile>,
    disk: Disk,
}

fn host_disk(keep: Option<Keep>) -> HostDisk {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("x.add-cow"), new_file(64 << 20, true)).unwrap();
    std::fs::File::create(path("disk.raw")).unwrap().set_len(64 << 20).unwrap();
    std::fs::write(path("base.raw"), numbered(1, 100)).unwrap();
    let open = |name| Arc::new(host_file(&path(name)));
    let (file, image, base) = (open("x.add-cow"), open("disk.raw"), open("base.raw"));
    let raw = Raw::open(Arc::clone(&base) as Arc<dyn File>, true).unwrap();
    let options = OpenOptions {
        read_only: false,
        image: Arc::clone(&image) as Arc<dyn File>,
        backing: Backing::Node(Node::new(Arc::new(raw), NodeOptions::default())),
        backing_format: None,
        keep,
    };
    let disk = block_on(AddCow::open(Arc::clone(&file) as Arc<dyn File>, options)).unwrap();
    HostDisk { _dir: dir, file, image, base, disk: FormatDriver::new(disk).unwrap() }
}

/// The extents of a plan as (file, offset, length), file 0 for zeros; `None` for "not now".
fn planned(disk: &Disk, op: PlanOp, offset: u64, len: u64) -> Option<Vec<(u32, u64, u64)>> {
    let mut plan = Plan::default();
    let answer = disk.plan(op, ByteRange { offset, len }, &mut plan);
    (answer == Planned::Ready).then(|| {
        let extent = |extent: &PlanExtent<'_>| match extent {
            PlanExtent::File { file, offset, len } => (file.id() + 1, *offset, *len),
            PlanExtent::Zero { len } => (0, 0, *len),
        };
        plan.extents.iter().map(extent).collect()
    })
}

const WRITE: PlanOp = PlanOp::Write { fua: false };

#[test]
fn whatever_is_in_memory_is_planned() {
    let host = host_disk(None);
    let disk = &host.disk;
    let (image, base) = (host.image.id() + 1, host.base.id() + 1);
    assert_eq!(planned(disk, PlanOp::Read, 0, 512), None, "the page is not loaded yet");
    assert_eq!(planned(disk, WRITE, 0, 512), None);
    block_on(read(disk, 0, 512));
    // Through to the backing, and beyond its end.
    assert_eq!(
        planned(disk, PlanOp::Read, 99 * 512, 1024),
        Some(vec![(base, 99 * 512, 512), (0, 0, 512)])
    );
    // A plan that is not carried out changes nothing.
    assert_eq!(planned(disk, WRITE, 512, 1024), Some(vec![(image, 512, 1024)]));
    assert_eq!(planned(disk, PlanOp::Read, 0, 2048), Some(vec![(base, 0, 2048)]));
    let mut plan = Plan::default();
    let range = ByteRange { offset: 512, len: 1024 };
    assert_eq!(disk.plan(WRITE, range, &mut plan), Planned::Ready);
    assert_eq!(plan.commit.take().unwrap().written().unwrap(), Committed::Done);
    assert_eq!(
        planned(disk, PlanOp::Read, 0, 2048),
        Some(vec![(base, 0, 512), (image, 512, 1024), (base, 1536, 512)])
    );
    // Now there are bits to write out.
    assert_eq!(planned(disk, PlanOp::Flush, 0, 0), None);
    assert_eq!(planned(disk, PlanOp::Write { fua: true }, 512, 512), None);
    block_on(disk.flush()).unwrap();
    assert_eq!(planned(disk, PlanOp::Flush, 0, 0), Some(vec![(image, 0, 0)]));
    let rewrite = planned(disk, PlanOp::Write { fua: true }, 512, 512);
    assert_eq!(rewrite, Some(vec![(image, 512, 512)]));
    let mut plan = Plan::default();
    let range = ByteRange { offset: 512, len: 512 };
    assert_eq!(disk.plan(WRITE, range, &mut plan), Planned::Ready);
    assert!(plan.commit.is_none() && plan.pin.is_none());
    assert_eq!(host.file.len().unwrap(), 2560 + (64 << 20) / 512 / 8);
}

/// What a worker writes with one call is one step here, too, as far as a page goes.
#[test]
fn writes_that_go_on_from_each_other_are_committed_together() {
    let host = host_disk(None);
    let disk = &host.disk;
    const PAGE: u64 = PAGE_SECTORS * SECTOR_SIZE;
    let all = ByteRange::between(PAGE - 1536, PAGE + 512);
    block_on(read(disk, PAGE - 512, 1024));
    let mut commits = (all.offset..all.end()).step_by(512).map(|offset| {
        let mut plan = Plan::default();
        assert_eq!(disk.plan(WRITE, ByteRange { offset, len: 512 }, &mut plan), Planned::Ready);
        plan.commit.unwrap()
    });
    let pins = || disk.format().shared.pages.pins();
    let mut next = || commits.next().unwrap();
    let (mut first, mut second, third) = (next(), next(), next());
    // Not what does not go on, nor in the other direction.
    let third = first.join(third).unwrap_err();
    first = second.join(first).unwrap_err();
    first.join(second).unwrap();
    first.join(third).unwrap();
    assert_eq!(pins(), 1);
    // The next one is of another page.
    let fourth = first.join(next()).unwrap_err();
    assert_eq!(pins(), 2);
    let image = host.image.id() + 1;
    assert_eq!(first.written().unwrap(), Committed::Done);
    let read = planned(disk, PlanOp::Read, all.offset, 1536);
    assert_eq!(read, Some(vec![(image, all.offset, 1536)]));
    assert_ne!(planned(disk, PlanOp::Read, PAGE, 512), Some(vec![(image, PAGE, 512)]));
    assert_eq!(fourth.written().unwrap(), Committed::Done);
    assert_eq!(planned(disk, PlanOp::Read, PAGE, 512), Some(vec![(image, PAGE, 512)]));
    assert_eq!(pins(), 0);
}

#[test]
fn a_backing_whose_driver_was_replaced_is_not_planned_through() {
    let host = host_disk(None);
    block_on(read(&host.disk, 0, 512));
    assert!(planned(&host.disk, PlanOp::Read, 0, 512).is_some());
    let backing = host.disk.format().backing().unwrap();
    let raw = Raw::open(Arc::new(SimFile::from_bytes("other", numbered(7, 4))), true).unwrap();
    let quiesced = crate::block::Gate::new().quiesce();
    backing.replace_driver(Arc::new(raw), &quiesced);
    assert_eq!(planned(&host.disk, PlanOp::Read, 0, 512), None);
    assert_eq!(block_on(read(&host.disk, 0, 512)), [7; 512]);
    // On another backing the same image goes on.
    let other = host.disk.on_backing(None, &quiesced).unwrap();
    assert_eq!(block_on(read(&*other, 0, 512)), [0; 512]);
}

#[test]
fn without_a_keep_a_guests_new_sectors_are_flushed_before_it_is_told() {
    let host = host_disk(None);
    block_on(host.disk.resume(None)).unwrap();
    host.disk.begin_session(1).unwrap();
    block_on(read(&host.disk, 0, 512));
    assert_eq!(planned(&host.disk, WRITE, 0, 512), None);
    block_on(write(&host.disk, 0, &[1; 512])).unwrap();
    let mut bit = [0];
    std::os::unix::fs::FileExt::read_at(
        &std::fs::File::open(host.file.path()).unwrap(),
        &mut bit,
        2560,
    )
    .unwrap();
    assert_eq!(bit, [1]);
}

fn open_keep(dir: &Path, capacity: u64) -> Keep {
    Keep::open_with_capacity(dir, (1, 2), NAME, capacity).unwrap()
}

/// Kills the process: what was not flushed to the files is there, what was in memory is gone.
fn killed(file: &SimFile, image: &SimFile) -> (SimFile, SimFile) {
    (
        SimFile::from_bytes("x.add-cow", file.volatile()),
        SimFile::from_bytes("disk.raw", image.volatile()),
    )
}

#[test]
fn a_failed_flush_poisons_and_reads_go_on() {
    for op in [SimOp::Write, SimOp::Flush] {
        let (file, image, backing) = example();
        let disk = open_disk(&file, &image, backing, None);
        block_on(write(&disk, 512, &[1; 512])).unwrap();
        file.fail(Fault { op: Some(op), after: 0, errno: libc::EIO, for_good: false });
        block_on(disk.flush()).unwrap_err();
        assert_eq!(block_on(read(&disk, 512, 512)), [1; 512]);
        for result in [block_on(write(&disk, 0, &[2; 512])), block_on(disk.flush())] {
            let err = result.unwrap_err();
            assert_eq!(err.kind(), ErrorKind::Poisoned);
            assert!(err.to_string().contains("bitmap could not be"), "{err}");
        }
    }
}

/// The bitmap is sparse, so a flush may find no room for a page of it.
#[test]
fn a_flush_without_room_is_made_up_for_once_there_is() {
    const SIZE: u64 = 4 * PAGE_SECTORS * SECTOR_SIZE;
    let at = |page: u64| page * PAGE_SECTORS * SECTOR_SIZE;
    for after in 0..4 {
        let (file, image) = (SimFile::from_bytes("x", new_file(SIZE, true)), SimFile::new("disk"));
        block_on(image.set_len(SIZE)).unwrap();
        let disk = open_disk(&file, &image, backing_of(Some(&[9; 512])), None);
        let node = Node::new(Arc::new(disk), NodeOptions::default());
        let write = |page: u64| {
            let written = node.write(at(page), buffers(&[1; 512]), false);
            block_on(written).unwrap();
        };
        (0..4).for_each(write);
        let full = Fault { op: Some(SimOp::Write), after, errno: libc::ENOSPC, for_good: true };
        file.fail(full);
        for _ in 0..2 {
            let err = block_on(node.flush()).unwrap_err();
            assert_eq!(err.kind(), ErrorKind::NoSpace, "{err}");
        }
        file.heal();
        assert!(!node.is_poisoned());
        write(0);
        block_on(node.flush()).unwrap();
        let bitmap = file.durable().split_off(HEADER_LEN as usize);
        assert!((0..4).all(|page| bitmap[page * PAGE_LEN] == 1));
        // A sync that failed is another matter, whatever it says.
        write(1);
        block_on(node.write(512, buffers(&[1; 512]), false)).unwrap();
        file.fail(Fault { op: Some(SimOp::Flush), after: 0, ..full });
        block_on(node.flush()).unwrap_err();
        assert!(node.is_poisoned());
    }
}

#[test]
fn a_flush_that_was_dropped_is_made_up_for() {
    use crate::io::sim::{Sim, SimTask};
    for stop in 0..8 {
        let dir = state_dir();
        let (file, image, backing) = example();
        let keep = open_keep(dir.path(), 4096);
        let disk = open_disk(&file, &image, backing, Some(keep));
        block_on(disk.resume(None)).unwrap();
        disk.begin_session(1).unwrap();
        block_on(write(&disk, 512, &[1; 512])).unwrap();
        let sim = Sim::new(stop);
        sim.attach(&file);
        sim.attach(&image);
        let flush: SimTask<'_> = Box::pin(async { disk.flush().await.unwrap() });
        sim.run_until(vec![flush], |step| step >= stop);
        sim.block_on(write(&disk, 1024, &[2; 512])).unwrap();
        sim.block_on(disk.flush()).unwrap();
        assert_eq!(file.durable()[2560] & 0b110, 0b110, "dropped after {stop} steps");
    }
}

#[test]
fn what_a_dropped_flush_left_with_the_host_undoes_nothing() {
    for (seed, at) in (0..16).flat_map(|seed| (1..7).map(move |at| (seed, at))) {
        let file = SimFile::from_bytes("x.add-cow", new_file(1 << 20, true));
        let image = SimFile::from_bytes("disk.raw", vec![0; 1 << 20]);
        let backing = || backing_of(Some(&numbered(0x80, 16)));
        let disk = open_disk(&file, &image, backing(), None);
        block_on(write(&disk, 0, &numbered(1, 1))).unwrap();
        let sim = Sim::new(seed);
        sim.attach(&file);
        let flush = async { disk.flush().await.unwrap() };
        sim.run_until(vec![Box::pin(flush) as SimTask<'_>], |step| step == at);
        sim.detach(&file);
        let later = async {
            write(&disk, 512, &numbered(2, 1)).await.unwrap();
            disk.flush().await.unwrap();
        };
        sim.run(vec![Box::pin(later) as SimTask<'_>]);
        sim.drain();
        let again = open_disk(&file.after_kill(), &image.after_kill(), backing(), None);
        let found = block_on(read(&again, 0, 1024));
        assert!(found == numbered(1, 2), "seed {seed}, dropped at step {at}");
    }
}

#[test]
fn random_requests_agree_with_a_byte_vector() {
    for seed in 0..30 {
        let mut rng = Rng::new(seed);
        let sectors = 1 + rng.below(3000);
        let base: Vec<u8> = (0..rng.below(sectors * 700)).map(|i| (i / 512) as u8 | 0x80).collect();
        let has_backing = rng.below(4) > 0;
        let mut model = if has_backing { base.clone() } else { Vec::new() };
        model.resize(sectors as usize * 512, 0);
        let file = SimFile::from_bytes("x.add-cow", new_file(sectors * 512, has_backing));
        // Rubbish in the image, which no bit shows.
        let image = SimFile::from_bytes("disk.raw", vec![0x55; sectors as usize * 512]);
        let backing = || backing_of(has_backing.then_some(&base[..]));
        let mut disk = open_disk(&file, &image, backing(), None);
        for step in 0..200u64 {
            let size = model.len() as u64 / 512;
            let first = rng.below(size);
            let count = 1 + rng.below((size - first).min(300));
            let range = ByteRange { offset: first * 512, len: count * 512 };
            let part = range.offset as usize..range.end() as usize;
            let what = format!("seed {seed}, step {step}, {range}");
            match rng.below(12) {
                0 => {
                    block_on(disk.close()).unwrap();
                    disk = open_disk(&file, &image, backing(), None);
                }
                1 => block_on(disk.flush()).unwrap(),
                2 => {
                    model[part].fill(0);
                    block_on(disk.write_zeroes(range, rng.one_in(2))).unwrap();
                }
                3 => {
                    block_on(disk.discard(range)).unwrap();
                    // Own sectors read as zeros here, the backing's are as they were.
                    let now = block_on(read(&disk, range.offset, range.len));
                    for (now, was) in now.chunks(512).zip(model[part.clone()].chunks(512)) {
                        assert!(now == was || now == [0; 512], "{what}");
                    }
                    model[part].copy_from_slice(&now);
                }
                4 if step % 5 == 0 => {
                    let size = 1 + rng.below(sectors * 2);
                    block_on(disk.resize(size * 512)).unwrap();
                    model.resize(size as usize * 512, 0);
                }
                5..8 => {
                    let data: Vec<u8> = (0..range.len).map(|i| (step + i / 512) as u8).collect();
                    model[part].copy_from_slice(&data);
                    let fua = rng.one_in(4);
                    block_on(disk.write(range.offset, buffers(&data), fua)).unwrap();
                }
                _ => {
                    let content = block_on(read(&disk, range.offset, range.len));
                    assert!(content == model[part], "{what}");
                }
            }
        }
        block_on(disk.close()).unwrap();
        let disk = open_disk(&file, &image, backing(), None);
        assert!(block_on(read(&disk, 0, model.len() as u64)) == model, "seed {seed}, at the end");
        let file = Arc::new(file) as Arc<dyn File>;
        let found = block_on(check::check(&file, model.len() as u64, false, false)).unwrap();
        assert_eq!((found.corruptions, found.leaks), (0, 0), "{:?}", found.findings);
    }
}

#[test]
fn growing_hides_what_the_backing_had_behind_the_end() {
    let base = numbered(0x80, 40);
    let file = SimFile::from_bytes("x.add-cow", new_file(5 * 512, true));
    let image = SimFile::from_bytes("disk.raw", vec![0; 5 * 512]);
    let disk = open_disk(&file, &image, backing_of(Some(&base)), None);
    block_on(disk.resize(50 * 512)).unwrap();
    let mut expected = base[..5 * 512].to_vec();
    expected.resize(50 * 512, 0);
    assert!(block_on(read(&disk, 0, 50 * 512)) == expected);
    assert_eq!(file.durable()[2560..], [0xe0, 0xff, 0xff, 0xff, 0xff, 0, 0]);
    block_on(disk.resize(3 * 512)).unwrap();
    assert_eq!(file.durable()[2560..], [0]);
    assert_eq!(image.durable().len(), 3 * 512);
    let err = block_on(disk.resize(1000)).unwrap_err();
    assert!(err.to_string().contains("multiple of 512"), "{err}");
}

/// A block device as image file, a limit of the file system: nobody may take the image file for one that
/// was cut off then.
#[test]
fn a_disk_that_cannot_grow_is_as_it_was() {
    let base = numbered(0x80, 40);
    for op in [SimOp::Write, SimOp::SetLen] {
        let file = SimFile::from_bytes("x.add-cow", new_file(5 * 512, true));
        let image = SimFile::from_bytes("disk.raw", vec![0; 5 * 512]);
        let disk = open_disk(&file, &image, backing_of(Some(&base)), None);
        block_on(write(&disk, 512, &[1; 512])).unwrap();
        block_on(disk.flush()).unwrap();
        let full = Fault { op: Some(op), after: 0, errno: libc::ENOSPC, for_good: true };
        let faulty = if op == SimOp::Write { &file } else { &image };
        faulty.fail(full);
        let refused = block_on(disk.resize(50 * 512)).unwrap_err();
        assert!(refused.to_string().contains("No space"), "{refused}");
        faulty.heal();
        let mut expected = base[..5 * 512].to_vec();
        expected[512..1024].fill(1);
        assert!(block_on(read(&disk, 0, 5 * 512)) == expected);
        assert_eq!(file.volatile()[2560..], [2], "{op:?}");
        // Both go on as if nobody had tried.
        block_on(write(&disk, 4 * 512, &[2; 512])).unwrap();
        block_on(disk.flush()).unwrap();
        assert_eq!(file.durable()[2560..], [0x12]);
        block_on(disk.resize(50 * 512)).unwrap();
        assert_eq!(file.durable()[2560..], [0xf2, 0xff, 0xff, 0xff, 0xff, 0, 0]);
    }
}

/// What is kept must name sectors of the disk that the next process finds.
#[test]
fn a_guest_comes_back_after_a_kill_while_the_disk_grows() {
    use crate::io::sim::{Sim, SimTask};
    let mut is_done = false;
    for stop in 0.. {
        if is_done {
            break;
        }
        let dir = state_dir();
        let base = numbered(0x80, 40);
        let file = SimFile::from_bytes("x.add-cow", new_file(5 * 512, true));
        let image = SimFile::from_bytes("disk.raw", vec![0; 5 * 512]);
        let open = |file: &SimFile, image: &SimFile| {
            let keep = open_keep(dir.path(), 4096);
            open_disk(file, image, backing_of(Some(&base)), Some(keep))
        };
        let disk = open(&file, &image);
        disk.begin_session(7).unwrap();
        block_on(write(&disk, 512, &[1; 512])).unwrap();
        let sim = Sim::new(stop);
        sim.attach(&file);
        sim.attach(&image);
        let grow: SimTask<'_> = Box::pin(async {
            disk.resize(50 * 512).await.unwrap();
            is_done = true;
        });
        sim.run_until(vec![grow], |step| step >= stop);
        drop(disk);
        let (file, image) = killed(&file, &image);
        let disk = open(&file, &image);
        let back = block_on(disk.resume(Some(7)));
        back.unwrap_or_else(|err| panic!("killed after {stop} steps: {err}"));
        assert_eq!(block_on(read(&disk, 512, 512)), [1; 512]);
    }
}

#[test]
fn the_check_finds_and_repairs() {
    let check = |file: &SimFile, image_len, leaks, all| {
        let file = Arc::new(file.clone()) as Arc<dyn File>;
        block_on(check::check(&file, image_len, leaks, all)).unwrap()
    };
    let (file, _, _) = example();
    let found = check(&file, 10752, false, false);
    assert_eq!((found.sectors, found.allocated, found.fragments), (21, 4, 3));
    assert_eq!((found.corruptions, found.leaks), (0, 0));
    assert!(found.findings.is_empty());

    let changed = |change: fn(&mut Vec<u8>)| {
        let mut bytes = file.durable();
        change(&mut bytes);
        SimFile::from_bytes("x.add-cow", bytes)
    };
    let says = |found: &check::Found, text: &str| {
        assert!(found.findings.iter().any(|line| line.contains(text)), "{:?}", found.findings);
    };
    let short = changed(|bytes| bytes.truncate(2561));
    let found = check(&short, 10752, true, false);
    says(&found, "bitmap is short: 1 of 3 bytes");
    assert_eq!((found.corruptions, short.volatile().len()), (1, 2561));
    assert_eq!(check(&short, 10752, true, true).corruptions_fixed, 1);
    assert_eq!(short.durable()[2560..], [9, 0, 0]);

    let beyond = changed(|bytes| bytes[2562] = 0xf0);
    let found = check(&beyond, 10752, false, false);
    says(&found, "3 bits are set past the end");
    assert_eq!((found.leaks, found.allocated), (1, 4));
    assert_eq!(check(&beyond, 10752, true, false).leaks_fixed, 1);
    assert_eq!(beyond.durable()[2562], 0x10);

    let longer = changed(|bytes| bytes.extend([0; 10]));
    says(&check(&longer, 10752, true, false), "leftover: 10 bytes");
    assert_eq!(longer.durable().len(), 2563);

    let truncated = check(&file, 5 * 512, true, false);
    says(&truncated, "image file is smaller than the highest set bit: sector 20");
    assert_eq!(truncated.corruptions, 1);

    let full = changed(|bytes| bytes[2560..].copy_from_slice(&[0xff, 0xff, 0x1f]));
    says(&check(&full, 10752, false, false), "fully allocated: backing can be dropped");
    let reserved = changed(|bytes| bytes[2100] = 1);
    let found = check(&reserved, 10752, false, false);
    says(&found, "reserved bytes");
    assert_eq!((found.corruptions, found.leaks), (0, 0));
}
