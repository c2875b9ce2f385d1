//! The filter on simulated files.

use std::time::{Duration, Instant};

use super::*;
use crate::ErrorKind;
use crate::block::NodeOptions;
use crate::formats::raw::Raw;
use crate::io::sim::{Rng, SimFile, SimOp};
use crate::io::{AlignedBuf, HostFile, OpenOptions, block_on};

const SIZE: u64 = 64 << 10;

/// A filter with its node, over a disk that remembers what was flushed.
struct Bed {
    disk: SimFile,
    fault: Arc<Fault>,
    node: Node,
}

fn bed(settings: Settings) -> Bed {
    let disk = SimFile::from_bytes("disk", vec![0; SIZE as usize]);
    let raw = Arc::new(Raw::open(Arc::new(disk.clone()), false).unwrap());
    let below = Node::new(raw, NodeOptions { name: "image".into(), ..NodeOptions::default() });
    let fault = Arc::new(Fault::new("f0", below, settings));
    let options = NodeOptions { name: "f0".into(), ..NodeOptions::default() };
    let node = Node::new(Arc::clone(&fault) as Arc<dyn Driver>, options);
    Bed { disk, fault, node }
}

fn volatile(survive_one_in: u64, tear_one_in: u64) -> Settings {
    let volatile = VolatileSettings { size: 32 << 10, survive_one_in, tear_one_in };
    Settings { volatile: Some(volatile), ..Settings::default() }
}

fn error(op: FaultOp) -> Settings {
    let scope = Scope { op: Some(op), ..Scope::default() };
    Settings { errors: vec![ErrorRule { scope, errno: libc::EIO }], ..Settings::default() }
}

impl Bed {
    fn write(&self, offset: u64, bytes: &[u8], fua: bool) -> Result<()> {
        block_on(self.node.write(offset, AlignedBuf::from_slice(bytes, 512).buffers(), fua))
    }

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let buf = AlignedBuf::zeroed(len, 512);
        block_on(self.node.read(offset, buf.buffers())).unwrap();
        buf.to_vec()
    }

    fn flush(&self) -> Result<()> {
        block_on(self.node.flush())
    }
}

#[test]
fn what_the_disk_has_grown_by_can_be_used() {
    use crate::io::File;
    let bed = bed(Settings::default());
    block_on(bed.disk.set_len(2 * SIZE)).unwrap();
    assert_eq!(bed.node.refresh(&crate::block::Gate::new().quiesce()).unwrap().size, 2 * SIZE);
    bed.write(SIZE, &[1; 512], false).unwrap();
    assert_eq!(bed.read(SIZE, 512), [1; 512]);
}

#[test]
fn what_fails_has_changed_nothing_and_the_error_says_where() {
    let bed = bed(error(FaultOp::Write));
    let err = bed.write(4096, &[1; 512], false).unwrap_err();
    assert_eq!((err.kind(), err.errno()), (ErrorKind::Io, Some(libc::EIO)));
    let text = err.to_string();
    assert!(text.contains("node 'f0': injected fault: write of"), "{text}");
    assert_eq!(bed.disk.count(SimOp::Write), 0);
    assert_eq!(bed.read(4096, 512), [0; 512]);
    assert_eq!(bed.fault.injected().errors, 1);
    block_on(bed.fault.set(Settings::default())).unwrap();
    bed.write(4096, &[1; 512], false).unwrap();
}

#[test]
fn a_failed_flush_poisons_the_node_above_and_not_the_disk() {
    let bed = bed(error(FaultOp::Flush));
    bed.flush().unwrap_err();
    assert_eq!(bed.disk.count(SimOp::Flush), 0);
    assert!(bed.node.is_poisoned() && !bed.fault.below().is_poisoned());
    assert_eq!(bed.write(0, &[1; 512], false).unwrap_err().kind(), ErrorKind::Poisoned);
    assert_eq!(bed.read(0, 512), [0; 512]);
}

#[test]
fn a_lying_flush_makes_nothing_durable() {
    let bed = bed(Settings { flush_lies_one_in: 1, ..Settings::default() });
    bed.write(0, &[1; 512], false).unwrap();
    bed.flush().unwrap();
    bed.write(512, &[2; 512], true).unwrap();
    assert_eq!((bed.disk.count(SimOp::Flush), bed.disk.unflushed()), (0, 2));
    assert_eq!(bed.fault.injected().lies, 2);
    block_on(bed.fault.set(Settings::default())).unwrap();
    bed.flush().unwrap();
    assert_eq!(bed.disk.durable()[..1024], *[[1; 512], [2; 512]].concat());
}

#[test]
fn a_delay_is_waited_for() {
    let delay = Duration::from_millis(30);
    let scope = Scope { op: Some(FaultOp::Read), ..Scope::default() };
    let rule = DelayRule { scope, least: delay, most: delay };
    let bed = bed(Settings { delays: vec![rule], ..Settings::default() });
    let started = Instant::now();
    bed.read(0, 512);
    assert!(started.elapsed() >= delay);
    assert_eq!(bed.fault.injected().delays, 1);
}

#[test]
fn unflushed_writes_are_kept_from_the_disk() {
    let bed = bed(volatile(0, 0));
    bed.write(1024, &[1; 1024], false).unwrap();
    assert_eq!((bed.fault.at_risk(), bed.disk.count(SimOp::Write)), (1024, 0));
    // Yet they are what is read, and what is reported.
    assert_eq!(bed.read(512, 2048), [vec![0; 512], vec![1; 1024], vec![0; 512]].concat());
    let status = |offset| {
        let range = ByteRange::between(offset, SIZE);
        block_on(bed.node.block_status(range)).unwrap().range
    };
    assert_eq!(status(1024), ByteRange { offset: 1024, len: 1024 });
    assert_eq!(status(512).end(), 1024);
    bed.flush().unwrap();
    assert_eq!(bed.disk.durable()[1024..2048], [1; 1024]);
    assert_eq!(bed.fault.at_risk(), 0);
    // Zeros and discards reach the disk at once, and nothing that is kept hides them.
    bed.write(0, &[3; 1024], false).unwrap();
    block_on(bed.node.write_zeroes(ByteRange { offset: 512, len: 512 }, false)).unwrap();
    assert_eq!(bed.read(0, 1024), [[3; 512], [0; 512]].concat());
    // A write that is to be durable is.
    bed.write(4096, &[4; 512], true).unwrap();
    assert_eq!(bed.disk.durable()[4096..4608], [4; 512]);
    // What does not fit is written.
    for i in 0..80 {
        bed.write(i * 512, &[5; 512], false).unwrap();
    }
    assert!(bed.fault.at_risk() <= 32 << 10, "{}", bed.fault.at_risk());
    block_on(bed.node.close()).unwrap();
    assert_eq!(bed.disk.volatile()[..40960], [5; 40960]);
}

/// After a kill each write is there, gone, or there in its first or last sectors.
#[test]
fn a_kill_loses_writes_whole_and_in_part() {
    let left = |seed| {
        let bed = bed(Settings { seed, ..volatile(3, 3) });
        for i in 0..8u8 {
            bed.write(u64::from(i) * 4096, &[i + 1; 4096], false).unwrap();
        }
        assert_eq!(bed.read(0, 4096), [1; 4096]);
        bed.disk.volatile()
    };
    let (mut gone, mut whole, mut torn) = (0, 0, 0);
    for seed in 0..20 {
        let disk = left(seed);
        assert!(disk == left(seed), "the same seed, the same losses");
        for i in 0..8u8 {
            let block = &disk[usize::from(i) * 4096..][..4096];
            let there = block.iter().filter(|byte| **byte == i + 1).count();
            match there {
                0 => gone += 1,
                4096 => whole += 1,
                _ => {
                    torn += 1;
                    assert!(there % 512 == 0 && (block[0] == i + 1) != (block[4095] == i + 1));
                }
            }
        }
    }
    assert!(gone > 20 && whole > 20 && torn > 20, "{gone} gone, {whole} whole, {torn} torn");
}

/// Whatever the dice do, reads give what was written last, and what was flushed is on the disk.
#[test]
fn a_volatile_cache_reads_as_the_disk_it_hides() {
    for seed in 0..30 {
        let bed = bed(Settings { seed, ..volatile(4, 4) });
        let mut rng = Rng::new(seed);
        let mut model = vec![0u8; SIZE as usize];
        for step in 0..60u8 {
            let sector = rng.below(SIZE / 512 - 8);
            let len = (1 + rng.below(8)) as usize * 512;
            let at = (sector * 512) as usize;
            match rng.below(8) {
                0 => {
                    bed.flush().unwrap();
                    assert!(bed.disk.durable() == model, "seed {seed}");
                }
                1 => {
                    let range = ByteRange { offset: sector * 512, len: len as u64 };
                    block_on(bed.node.write_zeroes(range, false)).unwrap();
                    model[at..at + len].fill(0);
                }
                _ => {
                    bed.write(sector * 512, &vec![step + 1; len], rng.one_in(5)).unwrap();
                    model[at..at + len].fill(step + 1);
                }
            }
            assert!(bed.read(0, SIZE as usize) == model, "seed {seed}, step {step}");
        }
    }
}

#[test]
fn what_no_rule_touches_is_planned() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    let options = OpenOptions { write: true, ..Default::default() };
    let host = Arc::new(HostFile::open(file.path(), options).unwrap());
    let below = Node::new(Arc::new(Raw::open(host, false).unwrap()), NodeOptions::default());
    let range = ByteRange { offset: 4096, len: 4096 };
    let scope = Scope { op: Some(FaultOp::Read), range: Some(range), ..Scope::default() };
    let fault = Fault::new(
        "f0",
        below.clone(),
        Settings { errors: vec![ErrorRule { scope, errno: 5 }], ..Settings::default() },
    );
    let plan = |op, offset| {
        let mut plan = Plan::default();
        fault.plan(op, ByteRange { offset, len: 512 }, &mut plan)
    };
    assert_eq!(plan(PlanOp::Read, 0), Planned::Ready);
    assert_eq!(plan(PlanOp::Read, 4096), Planned::NotNow);
    assert_eq!(plan(PlanOp::Write { fua: true }, 4096), Planned::Ready);
    assert_eq!(plan(PlanOp::Flush, 0), Planned::Ready);
    block_on(fault.set(Settings { flush_lies_one_in: 2, ..Settings::default() })).unwrap();
    assert_eq!(plan(PlanOp::Read, 4096), Planned::Ready);
    assert_eq!(plan(PlanOp::Write { fua: false }, 4096), Planned::Ready);
    assert_eq!(plan(PlanOp::Write { fua: true }, 4096), Planned::NotNow);
    assert_eq!(plan(PlanOp::Flush, 0), Planned::NotNow);
    block_on(fault.set(volatile(0, 0))).unwrap();
    assert_eq!(plan(PlanOp::Read, 0), Planned::Ready);
    assert_eq!(plan(PlanOp::Write { fua: false }, 0), Planned::NotNow);
    block_on(fault.write(0, AlignedBuf::zeroed(512, 512).buffers(), false)).unwrap();
    assert_eq!(plan(PlanOp::Read, 0), Planned::NotNow);
    // A disk that refuses writes, or that is another one by now, is asked.
    block_on(fault.set(Settings::default())).unwrap();
    assert_eq!(plan(PlanOp::Write { fua: false }, 0), Planned::Ready);
    below.poison(&Error::invalid("a test"));
    assert_eq!(plan(PlanOp::Write { fua: false }, 0), Planned::NotNow);
}
