//! What is planned, on files of the host.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

use super::journal::{Conditions, Edit, Outcome};
use super::testing::{Driven, Fixture, Moment, read, visit_at, write};
use super::{OpenOptions, Structure, Vhdx};
use crate::block::driver::{Plan, PlanExtent, PlanOp, Planned};
use crate::block::keep::tests::state_dir;
use crate::block::{Driver, FormatDriver, Gate, Keep, Node, NodeOptions, StatusKind};
use crate::formats::raw::Raw;
use crate::io::{File, HostFile, block_on};
use crate::units::{ByteRange, MIB};

const WRITE: PlanOp = PlanOp::Write { fua: false };

struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new(fixture: &Fixture) -> Host {
        let host = Host { dir: tempfile::tempdir().unwrap() };
        std::fs::write(host.path(), fixture.bytes()).unwrap();
        host
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("x.vhdx")
    }

    fn len(&self) -> u64 {
        std::fs::metadata(self.path()).unwrap().len()
    }

    fn open(&self, keep: Option<Keep>) -> Driven {
        self.open_on(None, keep)
    }

    fn open_on(&self, backing: Option<Node>, keep: Option<Keep>) -> Driven {
        let options = crate::io::OpenOptions { write: true, ..Default::default() };
        let file: Arc<dyn File> = Arc::new(HostFile::open(&self.path(), options).unwrap());
        let structure = block_on(Structure::read(&file)).unwrap();
        let options = OpenOptions { backing, keep, ..OpenOptions::default() };
        FormatDriver::new(block_on(Vhdx::open(structure, options)).unwrap()).unwrap()
    }
}

/// The extents of a plan as (offset, length), `None` for zeros; `None` for "not now".
fn planned(disk: &Driven, op: PlanOp, offset: u64, len: u64) -> Option<Vec<(Option<u64>, u64)>> {
    let mut plan = Plan::default();
    let answer = disk.plan(op, ByteRange { offset, len }, &mut plan);
    (answer == Planned::Ready).then(|| {
        let extent = |extent: &PlanExtent<'_>| match extent {
            PlanExtent::File { offset, len, .. } => (Some(*offset), *len),
            PlanExtent::Zero { len } => (None, *len),
        };
        plan.extents.iter().map(extent).collect()
    })
}

fn write_at(disk: &Driven, offset: u64, byte: u8) {
    block_on(write(disk, offset, &[byte; 512], false)).unwrap();
}

/// Where the image places a block.
fn place_of(disk: &Driven, block: u64) -> Option<u64> {
    let range = ByteRange { offset: block * MIB, len: MIB };
    let status = block_on(disk.block_status(range)).unwrap();
    (status.kind == StatusKind::Data).then(|| status.host.unwrap().1)
}

#[test]
fn a_write_maps_a_block_if_a_place_is_ready() {
    let host = Host::new(&Fixture::new(64 * MIB));
    let disk = host.open(None);
    assert_eq!(planned(&disk, WRITE, 0, 512), None, "the headers do not say yet that we write");
    (0..3).for_each(|block| write_at(&disk, block * MIB, 1));
    assert_eq!(planned(&disk, WRITE, 3 * MIB, 512), None, "the file must become longer first");
    assert_eq!(place_of(&disk, 3), None, "nothing was done");
    write_at(&disk, 3 * MIB, 1);
    // It grew by more than it had to.
    assert_eq!(host.len(), 9 * MIB);
    assert_eq!(planned(&disk, PlanOp::Write { fua: true }, 40 * MIB, 512), None);
    assert_eq!(planned(&disk, PlanOp::Read, 40 * MIB, 512), Some(vec![(None, 512)]));
    assert_eq!(planned(&disk, WRITE, 41 * MIB - 512, 512), Some(vec![(Some(9 * MIB - 512), 512)]));
    assert_eq!(planned(&disk, PlanOp::Read, 40 * MIB, 512), Some(vec![(Some(8 * MIB), 512)]));
    assert_eq!(planned(&disk, WRITE, 50 * MIB, 512), None);
    // Across blocks.
    block_on(disk.flush()).unwrap();
    (50..60).for_each(|block| write_at(&disk, block * MIB, 2));
    assert_eq!(host.len(), 21 * MIB);
    let extents = planned(&disk, WRITE, 10 * MIB - 512, 1024).unwrap();
    assert_eq!(extents, [(Some(20 * MIB - 512), 1024)]);
    write_at(&disk, 11 * MIB, 3);
    assert_eq!(host.len(), 24 * MIB);
    assert_eq!(block_on(read(&disk, 50 * MIB, 1024)), [[2; 512], [0; 512]].concat());
    block_on(disk.close()).unwrap();
    drop(disk);
    // What the file grew ahead of its use is gone, what was mapped is there.
    assert_eq!(host.len(), 22 * MIB);
    let disk = host.open(None);
    assert_eq!(place_of(&disk, 40), Some(8 * MIB));
    assert_eq!(place_of(&disk, 10), Some(20 * MIB));
    assert_eq!(block_on(read(&disk, 2 * MIB, 512)), [1; 512]);
}

/// The file of a parent that is not a VHDX image, which nobody checks here.
fn parent(host: &Host, content: &[u8]) -> Node {
    let path = host.dir.path().join("parent");
    std::fs::write(&path, content).unwrap();
    let file = HostFile::open(&path, crate::io::OpenOptions::default()).unwrap();
    Node::new(Arc::new(Raw::open(Arc::new(file), true).unwrap()), NodeOptions::default())
}

#[test]
fn what_is_the_parents_is_planned_through_it() {
    let host = Host::new(&Fixture { has_parent: true, ..Fixture::new(8 * MIB) });
    let node = parent(&host, &vec![9; 3 * MIB as usize + 512]);
    let disk = host.open_on(Some(node.clone()), None);
    block_on(read(&disk, 0, 512));
    assert_eq!(planned(&disk, PlanOp::Read, MIB, 4096), Some(vec![(Some(MIB), 4096)]));
    let across_its_end = planned(&disk, PlanOp::Read, 3 * MIB, 4096);
    assert_eq!(across_its_end, Some(vec![(Some(3 * MIB), 512), (None, 3584)]));
    // A block of which a sector is here, and the rest there: at this place, the file as well as
    // the parent goes on with what follows in the other one.
    write_at(&disk, MIB + 512, 1);
    let status = block_on(disk.block_status(ByteRange { offset: MIB + 512, len: 512 })).unwrap();
    let here = status.host.unwrap().1;
    let three = vec![(Some(MIB), 512), (Some(here), 512), (Some(MIB + 1024), 512)];
    assert_eq!(planned(&disk, PlanOp::Read, MIB, 1536), Some(three));
    // A plan holds on to the driver below, so one that was replaced is not planned through.
    let quiesced = Gate::new().quiesce();
    let other = parent(&host, &[7; 2 * MIB as usize]);
    node.replace_driver(other.driver(), &quiesced);
    assert!(disk.is_behind());
    assert_eq!(planned(&disk, PlanOp::Read, MIB, 512), None);
    assert_eq!(block_on(read(&disk, MIB, 512)), [7; 512]);
    let renewed = disk.on_backing(Some(node), &quiesced).unwrap();
    let mut plan = Plan::default();
    let range = ByteRange { offset: MIB, len: 512 };
    assert_eq!(renewed.plan(PlanOp::Read, range, &mut plan), Planned::Ready);
    assert!(!renewed.is_behind());
}

/// Of two queues that write to a new block, the durable write of one comes while the other maps it, or
/// the other maps it while that is planned.
#[test]
fn a_durable_write_that_finds_a_new_mapping_waits_for_a_commit() {
    const DURABLE: PlanOp = PlanOp::Write { fua: true };
    let host = Host::new(&Fixture::new(64 * MIB));
    let disk = Arc::new(host.open(None));
    let with_a_ready_place = || {
        (0..12).for_each(|block| write_at(&disk, block * MIB, 1));
        block_on(disk.flush()).unwrap();
        assert!(planned(&disk, DURABLE, 0, 512).is_some());
    };
    let other = || Arc::clone(&disk);
    with_a_ready_place();
    let (found, sees) = (Arc::new(OnceLock::new()), other());
    let put = Arc::clone(&found);
    visit_at(Moment::Changed, move || put.set(planned(&sees, DURABLE, 40 * MIB, 512)).unwrap());
    assert!(planned(&disk, WRITE, 40 * MIB, 512).is_some());
    assert_eq!(found.get(), Some(&None));
    with_a_ready_place();
    let maps = other();
    visit_at(Moment::Planning, move || assert!(planned(&maps, WRITE, 41 * MIB, 512).is_some()));
    assert_eq!(planned(&disk, DURABLE, 41 * MIB, 512), None);
    assert!(place_of(&disk, 41).is_some());
}

/// Nothing is kept, so who sets a bit waits until it is on disk; and so does who relies on it.
#[test]
fn bits_that_wait_for_a_commit_keep_others_waiting() {
    let host = Host::new(&Fixture { has_parent: true, ..Fixture::new(64 * MIB) });
    let disk = host.open(None);
    let image = disk.format();
    disk.begin_session(1).unwrap();
    write_at(&disk, 0, 1);
    assert!(!image.is_dirty());
    // As by a request that was not completed.
    let bitmap = block_on(image.bitmap_of(0)).unwrap();
    let bits = Edit::Bits { bitmap, first: 1, count: 1, set: true };
    let outcome = block_on(image.publish(&[bits], Conditions::default())).unwrap();
    assert_eq!(outcome, Outcome::CommitFirst);
    assert_eq!(planned(&disk, WRITE, 512, 512), None);
    write_at(&disk, 512, 2);
    assert!(!image.is_dirty(), "completed before the bit is on disk");
    assert!(planned(&disk, WRITE, 0, 1024).is_some());
}

#[test]
fn freed_places_are_used_before_others() {
    let host = Host::new(&Fixture::new(64 * MIB));
    let disk = host.open(None);
    (0..4).for_each(|block| write_at(&disk, block * MIB, 1));
    block_on(disk.discard(ByteRange { offset: MIB, len: MIB })).unwrap();
    block_on(disk.flush()).unwrap();
    assert_eq!(planned(&disk, WRITE, 20 * MIB, 512), Some(vec![(Some(5 * MIB), 512)]));
    assert_eq!(block_on(read(&disk, 20 * MIB, 512)), [0; 512]);
    // Freed, but somebody may still be there: a matter for more than a plan.
    let mut plan = Plan::default();
    let range = ByteRange { offset: 2 * MIB, len: 512 };
    assert_eq!(disk.plan(PlanOp::Read, range, &mut plan), Planned::Ready);
    block_on(disk.discard(ByteRange { offset: 2 * MIB, len: MIB })).unwrap();
    block_on(disk.flush()).unwrap();
    assert_eq!(planned(&disk, WRITE, 21 * MIB, 512), None);
    drop(plan);
    write_at(&disk, 21 * MIB, 3);
    assert_eq!(place_of(&disk, 21), Some(6 * MIB));
}

#[test]
fn what_must_be_kept_is_kept_or_not_planned() {
    let host = Host::new(&Fixture::new(64 * MIB));
    let fill = |disk: &Driven| {
        (0..4).for_each(|block| write_at(disk, block * MIB, 1));
        block_on(disk.flush()).unwrap();
    };
    let disk = host.open(None);
    fill(&disk);
    disk.begin_session(1).unwrap();
    assert_eq!(planned(&disk, WRITE, 20 * MIB, 512), None, "nothing would survive a kill");
    block_on(disk.close()).unwrap();
    drop(disk);

    let host = Host::new(&Fixture::new(64 * MIB));
    let dir = state_dir();
    let disk = host.open(Some(Keep::open(dir.path(), (1, 2), "vhdx").unwrap()));
    fill(&disk);
    disk.begin_session(1).unwrap();
    assert_eq!(planned(&disk, WRITE, 20 * MIB, 512), Some(vec![(Some(8 * MIB), 512)]));
    // Killed: neither flushed nor closed.
    drop(disk);
    let disk = host.open(Some(Keep::open(dir.path(), (1, 2), "vhdx").unwrap()));
    assert_eq!(place_of(&disk, 20), None);
    block_on(disk.resume(Some(1))).unwrap();
    assert_eq!(place_of(&disk, 20), Some(8 * MIB));
}

#[test]
fn after_a_guest_that_is_kept_for_comes_one_that_is_not() {
    let host = Host::new(&Fixture::new(64 * MIB));
    let dir = state_dir();
    let disk = host.open(Some(Keep::open(dir.path(), (1, 2), "vhdx").unwrap()));
    disk.begin_session(1).unwrap();
    write_at(&disk, 0, 1);
    block_on(disk.resume(None)).unwrap();
    write_at(&disk, MIB, 2);
    assert_eq!(block_on(read(&disk, 0, 512)), [1; 512]);
    assert_eq!(block_on(read(&disk, MIB, 512)), [2; 512]);
}

#[test]
fn a_session_begins_with_nothing_left_to_flush_and_goes_on_as_it_is() {
    let host = Host::new(&Fixture::new(64 * MIB));
    let dir = state_dir();
    let disk = host.open(Some(Keep::open(dir.path(), (1, 2), "vhdx").unwrap()));
    write_at(&disk, 0, 1);
    disk.begin_session(1).unwrap();
    write_at(&disk, MIB, 2);
    disk.begin_session(1).unwrap();
    assert_eq!(disk.keep().unwrap().found(), Some(1));
    disk.begin_session(2).unwrap();
    assert_eq!(disk.keep().unwrap().found(), None);
    drop(disk);
    let disk = host.open(None);
    assert_eq!(block_on(read(&disk, 0, 512)), [1; 512]);
    assert_eq!(block_on(read(&disk, MIB, 512)), [2; 512]);
}

/// A job may fill the image while its guest comes.
#[test]
fn a_change_that_was_under_way_when_the_session_began_carries_the_guests_own_write() {
    let host = Host::new(&Fixture::new(64 * MIB));
    let dir = state_dir();
    let open = || host.open(Some(Keep::open(dir.path(), (1, 2), "vhdx").unwrap()));
    let disk = Arc::new(open());
    write_at(&disk, 0, 1);
    block_on(disk.flush()).unwrap();
    let (image, (begun, has_begun)) = (Arc::clone(&disk), mpsc::channel());
    visit_at(Moment::Kept, move || {
        let begin = move || begun.send(image.begin_session(1)).unwrap();
        std::thread::spawn(begin);
        // It may wait for the change, or not.
        std::thread::sleep(Duration::from_millis(50));
    });
    // The job's, of which the guest's write changes nothing but the data.
    write_at(&disk, MIB, 1);
    has_begun.recv().unwrap().unwrap();
    write_at(&disk, MIB, 2);
    // Killed.
    drop(disk);
    let disk = open();
    block_on(disk.resume(Some(1))).unwrap();
    assert!(block_on(read(&disk, MIB, 512)) == [2; 512], "a completed write was lost");
}

/// It is recorded for the guest that has left, whose records go.
#[test]
fn a_change_that_comes_before_the_keep_begins_is_saved() {
    let host = Host::new(&Fixture::new(64 * MIB));
    let dir = state_dir();
    let open = || host.open(Some(Keep::open(dir.path(), (1, 2), "vhdx").unwrap()));
    let disk = Arc::new(open());
    (0..4).for_each(|block| write_at(&disk, block * MIB, 1));
    disk.begin_session(1).unwrap();
    let job = Arc::clone(&disk);
    visit_at(Moment::Saved, move || assert!(planned(&job, WRITE, 20 * MIB, 512).is_some()));
    disk.begin_session(2).unwrap();
    let place = place_of(&disk, 20);
    // Killed.
    drop(disk);
    let disk = open();
    block_on(disk.resume(Some(2))).unwrap();
    assert!(place.is_some() && place_of(&disk, 20) == place);
}

/// Records that were redone are still there when the image is closed; they name places that are then
/// cut off.
#[test]
fn nothing_that_is_kept_is_cut_off() {
    let host = Host::new(&Fixture::new(64 * MIB));
    let fresh = host.len();
    let dir = state_dir();
    let open = || host.open(Some(Keep::open(dir.path(), (1, 2), "vhdx").unwrap()));
    let kept = || Keep::is_there(dir.path(), (1, 2), "vhdx");
    let disk = open();
    disk.begin_session(1).unwrap();
    (0..4).for_each(|block| write_at(&disk, block * MIB, 1));
    drop(disk);
    let disk = open();
    block_on(disk.resume(Some(1))).unwrap();
    assert_eq!(place_of(&disk, 3), Some(7 * MIB));
    assert!(kept());
    block_on(disk.discard(ByteRange { offset: 0, len: 64 * MIB })).unwrap();
    // Killed: what was kept is redone, the blocks are there again, and their places, too.
    block_on(disk.flush()).unwrap();
    drop(disk);
    let disk = open();
    block_on(disk.resume(Some(1))).unwrap();
    block_on(disk.discard(ByteRange { offset: 0, len: 64 * MIB })).unwrap();
    block_on(disk.close()).unwrap();
    assert_eq!((host.len(), kept()), (fresh, false));
}

#[test]
fn many_threads_never_share_a_place() {
    const BLOCKS: u64 = 300;
    let host = Host::new(&Fixture::new(BLOCKS * MIB));
    let disk = host.open(None);
    write_at(&disk, 0, 0);
    std::thread::scope(|scope| {
        for thread in 0..3u64 {
            let disk = &disk;
            scope.spawn(move || {
                for step in 0..BLOCKS {
                    // Each block by all threads, mostly at different times.
                    let block = (step * 7 + thread * 3) % BLOCKS;
                    let offset = block * MIB + thread * 512;
                    if planned(disk, WRITE, offset, 512).is_none() {
                        write_at(disk, offset, block as u8);
                    }
                    if step % 100 == 50 && thread == 0 {
                        block_on(disk.flush()).unwrap();
                    }
                }
            });
        }
    });
    block_on(disk.close()).unwrap();
    drop(disk);
    let disk = host.open(None);
    let mut blocks = HashMap::new();
    for block in 0..BLOCKS {
        let place = place_of(&disk, block).unwrap_or_else(|| panic!("block {block} has no place"));
        assert!(place.is_multiple_of(MIB) && place >= 4 * MIB && place + MIB <= host.len());
        assert_eq!(blocks.insert(place, block), None, "place {place} of block {block}");
    }
}
