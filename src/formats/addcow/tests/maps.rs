//! What is told of a large disk, and what that costs.

use super::*;

/// What a block status of all of a disk costs, in reads of the bitmap.
fn reads_of_a_map(disk: &Disk, file: &SimFile) -> (Vec<(bool, ByteRange)>, u64) {
    let before = file.count(SimOp::Read);
    let size = disk.limits().size;
    let mut runs: Vec<(bool, ByteRange)> = Vec::new();
    let mut at = 0;
    while at < size {
        let status = block_on(disk.block_status(ByteRange::between(at, size))).unwrap();
        let is_data = status.kind == crate::block::driver::StatusKind::Data;
        match runs.last_mut() {
            Some((last, range)) if *last == is_data => range.len += status.range.len,
            _ => runs.push((is_data, status.range)),
        }
        at = status.range.end();
    }
    (runs, file.count(SimOp::Read) - before)
}

#[test]
fn the_map_of_a_large_disk_reads_what_there_is_of_its_bitmap() {
    const DISK: u64 = 1 << 40;
    let file = SimFile::new("x.add-cow");
    let header = Header { backing: None, image: "disk.raw".into() };
    block_on(create::create(&file, &header, DISK)).unwrap();
    let image = SimFile::new("disk.raw");
    block_on(image.set_len(DISK)).unwrap();
    let disk = open_disk(&file, &image, Backing::None, None);
    let (runs, reads) = reads_of_a_map(&disk, &file);
    assert_eq!(runs, [(false, ByteRange { offset: 0, len: DISK })]);
    // The first page, which shares a block of the host's with the header.
    assert!(reads <= 1, "{reads}");

    // Data far apart, seen by another process and by this one.
    let far: Vec<_> = (1..=10).map(|i| (i * DISK / 11).next_multiple_of(1 << 20)).collect();
    for at in &far {
        block_on(write(&disk, *at, &[1; 4096])).unwrap();
    }
    block_on(disk.flush()).unwrap();
    let file = file.after_kill();
    for (disk, file) in [(open_disk(&file, &image, Backing::None, None), &file), (disk, &file)] {
        let (runs, reads) = reads_of_a_map(&disk, file);
        let data: Vec<_> = runs.iter().filter(|(is_data, _)| *is_data).collect();
        assert!(data.iter().zip(&far).all(|((_, range), at)| range.offset == *at), "{data:?}");
        assert_eq!(data.len(), far.len());
        assert!(reads <= 2 * far.len() as u64, "{reads}");
    }
}

#[test]
fn the_map_of_a_large_disk_reads_a_full_bitmap_in_large_pieces() {
    const PAGES: u64 = 1000;
    let header = Header { backing: None, image: "disk.raw".into() };
    let mut bytes = header.encode().unwrap();
    bytes.resize(bytes.len() + PAGES as usize * PAGE_LEN, 0x0f);
    let file = SimFile::from_bytes("x.add-cow", bytes);
    let image = SimFile::new("disk.raw");
    block_on(image.set_len(PAGES * PAGE_SECTORS * SECTOR_SIZE)).unwrap();
    let disk = open_disk(&file, &image, Backing::None, None);
    for page in (0..PAGES).rev().step_by(100).chain(0..PAGES) {
        let at = page * PAGE_SECTORS * SECTOR_SIZE;
        let rest = ByteRange::between(at, disk.limits().size);
        let status = block_on(disk.block_status(rest)).unwrap();
        assert_eq!(status.range, ByteRange { offset: at, len: 4 * SECTOR_SIZE });
    }
    let reads = file.count(SimOp::Read);
    assert!(reads <= 2 * PAGES / 16, "{reads}");
}

/// What the host's file has nothing of is passed over, however much it is.
#[test]
fn the_map_of_a_huge_disk_takes_steps_of_what_it_holds() {
    const DISK: u64 = 7 << 60;
    // Such files are on tmpfs only.
    let open = |name| {
        let fd = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        Arc::new(host_file(Path::new(&path))) as Arc<dyn File>
    };
    let (file, image) = (open("x.add-cow"), open("disk.raw"));
    let header = Header { backing: None, image: "disk.raw".into() };
    block_on(create::create(&*file, &header, DISK)).unwrap();
    block_on(image.set_len(DISK)).unwrap();
    let options = OpenOptions {
        read_only: false,
        image,
        backing: Backing::None,
        backing_format: None,
        keep: None,
    };
    let disk = FormatDriver::new(block_on(AddCow::open(file, options)).unwrap()).unwrap();
    // What a flush has written, and what only memory knows of.
    let (flushed, fresh) = (1 << 50, 5 << 60);
    block_on(write(&disk, flushed, &[1; 4096])).unwrap();
    block_on(disk.flush()).unwrap();
    block_on(write(&disk, fresh, &[1; 4096])).unwrap();
    let mut found = Vec::new();
    let (mut at, mut steps) = (0, 0);
    while at < DISK {
        let status = block_on(disk.block_status(ByteRange::between(at, DISK))).unwrap();
        if status.kind == crate::block::driver::StatusKind::Data {
            found.push(status.range);
        }
        at = status.range.end();
        steps += 1;
        assert!(steps <= 16, "at {at}");
    }
    let data = |offset| ByteRange { offset, len: 4096 };
    assert_eq!(found, [data(flushed), data(fresh)]);
    // What needs no change is passed over as well.
    let all = ByteRange { offset: 0, len: DISK };
    block_on(disk.write_zeroes(all, true)).unwrap();
    block_on(disk.discard(all)).unwrap();
    assert_eq!(block_on(read(&disk, fresh, 4096)), [0; 4096]);
}

/// What a map saw of the file before it had its turn is not what it notes.
#[test]
fn a_page_that_is_written_while_a_map_waits_is_not_noted_as_empty() {
    const PAGES: u64 = 8;
    let size = PAGES * PAGE_SECTORS * SECTOR_SIZE;
    let file = SimFile::from_bytes("x.add-cow", new_file(size, false));
    let image = SimFile::new("disk.raw");
    block_on(image.set_len(size)).unwrap();
    let disk = open_disk(&file, &image, Backing::None, None);
    let shared = &disk.format().shared;
    let at = 2 * PAGE_SECTORS * SECTOR_SIZE;
    let others = block_on(shared.loading.exclusive(ALL));
    let mut status = disk.block_status(ByteRange::between(at, size));
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(status.as_mut().poll(&mut context).is_pending());
    // Loaded, changed, written and evicted by somebody else.
    let bits = HEADER_LEN + 2 * PAGE_LEN as u64;
    block_on(file.write(bits, buffers(&[0xff; 512]), false)).unwrap();
    drop(others);
    let status = block_on(status).unwrap();
    assert_eq!(status.kind, crate::block::driver::StatusKind::Data);
    assert_eq!(status.range.len, 4096 * SECTOR_SIZE);
}
