//! What the guest is told of the disk, and what it can switch.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use vublk::frontend::client::{Client, feature};
use vublk::frontend::request::{Config, STATUS_IOERR, STATUS_OK, STATUS_UNSUPP};
use vublk::frontend::{Personality, Request, SessionOptions};

use crate::common::{Backend, Setup, skip, soon};

/// Pages of a file that are dirty or on their way to the disk; `None` where the kernel cannot say.
#[allow(unsafe_code)]
pub fn unwritten_pages(path: &Path) -> Option<u64> {
    use std::os::fd::AsRawFd;
    const CACHESTAT: libc::c_long = 451;
    let file = std::fs::File::open(path).ok()?;
    let range = [0u64; 2];
    // Pages cached, dirty, in writeback, evicted, recently evicted.
    let mut counts = [0u64; 5];
    // SAFETY: both structures are as large as the kernel's, and live across the call.
    let rc = unsafe {
        libc::syscall(CACHESTAT, file.as_raw_fd(), range.as_ptr(), counts.as_mut_ptr(), 0)
    };
    (rc == 0).then_some(counts[1] + counts[2])
}

/// Whether a write of a fresh block is durable when it completes.
fn writes_are_durable(backend: &Backend, session: &mut vublk::frontend::Session) -> bool {
    rustix::fs::fsync(std::fs::File::open(&backend.image).unwrap()).unwrap();
    let mut durable = true;
    for i in 0..4u64 {
        session.write(0, i << 20, &[i as u8 + 1; 4096]).unwrap();
        durable &= unwritten_pages(&backend.image) == Some(0);
    }
    durable
}

#[test]
fn writes_are_durable_when_the_guest_says_so() {
    let probe = Backend::start(&[]);
    probe.scribble(0, &[1; 4096]);
    if unwritten_pages(&probe.image).is_none_or(|pages| pages == 0) {
        return skip("this kernel or file system does not count dirty pages");
    }
    let with = |personality, without: u64, plus: u64| {
        let mut options = SessionOptions::new(personality);
        options.features = options.features & !without | plus;
        options
    };
    let flush = feature::FLUSH;
    for (args, options, durable) in [
        (&[] as &[&str], with(Personality::Qemu, 0, 0), false),
        // No FLUSH: the guest cannot ask for durability later.
        (&[], with(Personality::Qemu, flush, 0), true),
        (&[], with(Personality::Firecracker, flush, 0), true),
        (&["--aio", "threads"], with(Personality::Qemu, flush, 0), true),
        // The operator takes the blame.
        (&["--cache", "unsafe"], with(Personality::Firecracker, flush, 0), false),
        (&["--cache", "writethrough"], with(Personality::Qemu, 0, 0), true),
    ] {
        let backend = Backend::start(args);
        let mut session = backend.open(options.clone());
        assert_eq!(writes_are_durable(&backend, &mut session), durable, "{args:?} {options:?}");
        if session.features() & flush != 0 && !args.contains(&"unsafe") {
            session.write(0, 0, &[9; 4096]).unwrap();
            session.flush(0).unwrap();
            assert_eq!(unwritten_pages(&backend.image), Some(0), "{args:?}: after a flush");
        }
    }
    // The cache switched off and on by the guest.
    let backend = Backend::start(&[]);
    let mut session = backend.open(with(Personality::Qemu, 0, feature::CONFIG_WCE));
    session.client.set_acknowledge(true);
    for on in [1u8, 0, 1, 0] {
        session.client.set_config(Config::WRITEBACK_OFFSET, &[on]).unwrap();
        let config = Config::parse(&session.client.get_config(0, 60).unwrap()).unwrap();
        assert_eq!(config.writeback, on);
        if on == 0 {
            // What was written before is durable now.
            assert_eq!(unwritten_pages(&backend.image), Some(0));
        }
        assert_eq!(writes_are_durable(&backend, &mut session), on == 0, "write cache {on}");
    }
    // The next guest finds it on, as the first one did.
    drop(session);
    let mut next = backend.open(with(Personality::Qemu, 0, feature::CONFIG_WCE));
    assert_eq!(next.config.writeback, 1);
    assert!(!writes_are_durable(&backend, &mut next));
}

#[test]
fn the_configuration_space_says_what_is_served() {
    let backend = Backend::start(&["--block-size", "4096", "--num-queues", "4"]);
    let session = backend.open(SessionOptions::new(Personality::Qemu).queues(4));
    let config = session.config;
    assert_eq!(config.capacity, crate::common::backend::DISK / 512);
    assert_eq!((config.blk_size, config.num_queues, config.writeback), (4096, 4, 1));
    assert_eq!(config.seg_max, 126);
    assert_eq!(config.size_max, 0);
    assert!(config.max_discard_sectors > 0 && config.max_discard_seg > 0);
    assert!(config.max_write_zeroes_sectors > 0 && config.max_write_zeroes_seg > 0);
    assert!(config.discard_sector_alignment > 0);
    // Any part of it, at either origin; zeros beyond its end.
    let client = &session.client;
    let whole = client.get_config(0, 60).unwrap();
    for (offset, size) in [(0, 8), (0, 36), (0, 57), (8, 4), (20, 4), (59, 1)] {
        let range = offset as usize..(offset + size) as usize;
        assert_eq!(client.get_config(offset, size).unwrap(), whole[range.clone()]);
        assert_eq!(client.get_config(0x100 + offset, size).unwrap(), whole[range]);
    }
    let long = client.get_config(0, 200).unwrap();
    assert_eq!(long[..57], whole[..57]);
    assert!(long[60..].iter().all(|b| *b == 0));
    // Nothing is offered that is not implemented.
    let mut client = Client::connect(&backend.socket, std::time::Duration::from_secs(10)).unwrap();
    drop(session);
    let offered = client.get_features().unwrap();
    for bit in [1u32, 7, 33, 34, 35, 36, 37, 38, 40] {
        assert_eq!(offered & 1 << bit, 0, "feature {bit} is offered");
    }
    let protocol = client.get_protocol_features().unwrap();
    let implemented =
        [0u32, 1, 3, 5, 9, 12, 13, 15, 19].iter().fold(0, |bits, bit| bits | 1u64 << bit);
    assert_eq!(protocol, implemented);
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let backend = Backend::start(&["--read-only"]);
    let mut session = backend.qemu();
    assert_ne!(session.features() & feature::RO, 0);
    let offered = session.client.offered();
    assert_eq!(offered & (feature::DISCARD | feature::WRITE_ZEROES), 0);
    for request in [
        Request::write(0, vec![1; 512]),
        Request::discard(&[(0, 4096)]),
        Request::write_zeroes(&[(0, 4096)], true),
    ] {
        let done = session.execute(0, &request).unwrap();
        assert!(matches!(done.status, STATUS_IOERR | STATUS_UNSUPP), "{request:?}");
    }
    assert_eq!(session.read(0, 0, 512).unwrap(), [0; 512]);
    session.flush(0).unwrap();
    // Another reader is welcome.
    let second = Setup::new(&["-r"]).image(&backend.image).start();
    second.qemu().read(0, 0, 512).unwrap();
}

#[test]
fn discard_makes_holes_and_zeroes_come_in_segments() {
    let backend = Backend::start(&[]);
    let blocks = || {
        rustix::fs::fsync(std::fs::File::open(&backend.image).unwrap()).unwrap();
        std::fs::metadata(&backend.image).unwrap().blocks()
    };
    backend.scribble(0, &[7; 1 << 20]);
    assert!(blocks() >= 2048);
    let mut session = backend.qemu();
    session.discard(0, 0, 512 << 10).unwrap();
    assert!(blocks() <= 1024 + 16, "{} blocks after a discard", blocks());
    assert_eq!(session.read(0, 0, 4096).unwrap(), [0; 4096]);
    assert_eq!(session.read(0, 512 << 10, 4096).unwrap(), [7; 4096]);
    // Segments that are not in order, with one of nothing between them.
    let base = 512u64 << 10;
    let ranges = [(base + 8192, 4096), (base, 512), (base + 512, 0), (base + 65536, 8192)];
    let done = session.execute(0, &Request::write_zeroes(&ranges, false)).unwrap();
    assert_eq!(done.status, STATUS_OK);
    let mut expected = vec![7u8; 128 << 10];
    for (at, len) in ranges {
        expected[(at - base) as usize..][..len as usize].fill(0);
    }
    assert!(session.read(0, base, 128 << 10).unwrap() == expected);
    // Without UNMAP the space stays.
    let before = blocks();
    session.write_zeroes(0, base, 256 << 10, false).unwrap();
    // What maps them may shrink.
    assert!(blocks() + 16 >= before, "zeroes without unmap gave space back");
    session.write_zeroes(0, base, 256 << 10, true).unwrap();
    assert!(blocks() <= before - 400, "{} blocks, {before} before", blocks());
    assert_eq!(session.read(0, base, 4096).unwrap(), [0; 4096]);
    // Several segments of a discard; then what is refused, as a whole.
    let ranges = [(base + (300 << 10), 4096), (base + (400 << 10), 8192)];
    assert_eq!(session.execute(0, &Request::discard(&ranges)).unwrap().status, STATUS_OK);
    let kind = vublk::frontend::request::kind::DISCARD;
    let off_disk = crate::common::backend::DISK;
    backend.scribble(0, &[5; 4096]);
    for (request, status) in [
        (Request::discard(&[(0, 4096), (off_disk, 512)]), STATUS_IOERR),
        (Request::ranges(kind, &[(0, 4096)], 1), STATUS_UNSUPP),
        (Request::ranges(kind, &[(0, 4096)], 2), STATUS_UNSUPP),
        (Request::ranges(kind, &[], 0), STATUS_IOERR),
        (Request { out: vec![0; 17], ..Request::discard(&[]) }, STATUS_IOERR),
        (Request::discard(&[(0, 512); 300]), STATUS_IOERR),
        (Request { kind: 77, ..Request::flush() }, STATUS_UNSUPP),
    ] {
        assert_eq!(session.execute(0, &request).unwrap().status, status, "{request:?}");
    }
    assert_eq!(session.read(0, 0, 4096).unwrap(), [5; 4096], "a refused request did something");
}

#[test]
fn features_that_were_not_negotiated_are_unsupported() {
    let backend = Backend::start(&[]);
    let mut options = SessionOptions::default();
    options.features &= !(feature::DISCARD | feature::WRITE_ZEROES);
    let mut session = backend.open(options);
    let discard = session.execute(0, &Request::discard(&[(0, 512)])).unwrap();
    let zeroes = session.execute(0, &Request::write_zeroes(&[(0, 512)], false)).unwrap();
    assert_eq!((discard.status, zeroes.status), (STATUS_UNSUPP, STATUS_UNSUPP));
}

#[test]
fn a_grown_disk_is_announced_and_can_be_used() {
    let backend = Backend::start(&[]);
    let mut session = backend.qemu();
    let old = session.config.bytes();
    let file = std::fs::File::options().write(true).open(&backend.image).unwrap();
    for step in 1..4u64 {
        let size = old + step * (1 << 20);
        file.set_len(size).unwrap();
        backend.signal(rustix::process::Signal::HUP);
        let channel = session.client.backend_channel().unwrap();
        let message = channel.recv(soon()).unwrap();
        assert_eq!(message.request, 2);
        assert_eq!(message.flags, 1, "an answer is asked for, which may come too late");
        // As QEMU does: the main channel is used before the message is done with.
        let config = Config::parse(&session.client.get_config(0, 57).unwrap()).unwrap();
        assert_eq!(config.bytes(), size);
        session.write(0, size - 4096, &[step as u8; 4096]).unwrap_or_else(|err| {
            panic!("the new space is not there: {err}\n{}", backend.log());
        });
        assert_eq!(backend.content()[size as usize - 4096..], [step as u8; 4096]);
    }
    // A second look without a change says nothing.
    backend.signal(rustix::process::Signal::HUP);
    let channel = session.client.backend_channel().unwrap();
    let soon = std::time::Instant::now() + std::time::Duration::from_millis(50);
    assert!(channel.recv(soon).is_err());
    // A size that changes while nobody is connected, and one that QEMU does not read again.
    backend.wait_log("the size of disk has changed");
}

#[test]
fn a_disk_that_grew_while_the_process_was_dead_is_announced() {
    let mut backend = Backend::start(&[]);
    let mut session = backend.qemu();
    backend.kill();
    let file = std::fs::File::options().write(true).open(&backend.image).unwrap();
    file.set_len(32 << 20).unwrap();
    backend.spawn();
    // QEMU does not read the configuration space when it reconnects.
    session.reconnect().unwrap();
    session.client.wait_config_change(soon()).unwrap();
    let config = Config::parse(&session.client.get_config(0, 57).unwrap()).unwrap();
    assert_eq!(config.bytes(), 32 << 20);
}
