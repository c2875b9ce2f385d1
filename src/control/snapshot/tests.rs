//! Snapshots that fail at the barrier, and those that are killed.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::barrier::abandon;
use super::*;
use crate::block::{BlockStatus, Driver, Limits, Root};
use crate::control::disks::WorkerOptions;
use crate::images::frozen::tests::die_after;
use crate::images::{CreateRequest, ImageFormat, Layers, Locking, OpenRequest, StateDir};
use crate::io::{AlignedBuf, Buffers, EngineKind, Fut};
use crate::units::ByteRange;

const SIZE: u64 = 1 << 20;

/// A daemon with the disk `base` (qcow2), and the root of somebody whose guest's session runs.
struct Bench {
    dir: tempfile::TempDir,
    disks: Disks,
    base: Node,
    root: Root,
    /// Whether the disk was read-only while a guest stood on it.
    seen_read_only: Arc<AtomicBool>,
}

impl Bench {
    fn new() -> Bench {
        let workers = WorkerOptions { engine: EngineKind::Threads, threads: None, poll_us: 0 };
        let layers = Layers::new(Graph::new(), Vec::new(), StateDir::None);
        let dir = tempfile::tempdir().unwrap();
        let mut disks = Disks::new(layers, workers);
        let base = add(&mut disks, dir.path(), "base", ImageFormat::Qcow2);
        let root = Root::new("export 'e0'", base.clone());
        // As one that connects at the barrier would.
        let (seen, asks) = (Arc::new(AtomicBool::new(false)), base.clone());
        let sees = Arc::clone(&seen);
        let look = move |_| _ = sees.fetch_or(asks.limits().read_only, Ordering::Relaxed);
        root.begin_session(7, look).unwrap();
        disks.graph().add_root(&root).unwrap();
        Bench { dir, disks, base, root, seen_read_only: seen }
    }

    /// A snapshot into `overlay`, which is made for it; it is committed.
    fn snapshot(&mut self) -> (Box<dyn Action>, Quiesced) {
        let request = OverlayRequest {
            device: None,
            node_name: Some("base".into()),
            file: self.dir.path().join("overlay"),
            snapshot_node_name: Some("overlay".into()),
            format: ImageFormat::Qcow2,
            exists: false,
        };
        let prepared = Snapshot::of_file(&mut self.disks, request, &[]).unwrap();
        let mut action = make(&mut self.disks, vec![prepared]).unwrap().remove(0);
        write(&self.base, 1);
        let quiesced = self.disks.graph().quiesce(&action.nodes());
        action.commit(&mut self.disks, &quiesced).unwrap();
        assert_eq!(self.root.node().name(), "overlay");
        (action, quiesced)
    }
}

fn create_request(path: &Path, format: ImageFormat) -> CreateRequest {
    CreateRequest { size: Some(SIZE), ..CreateRequest::new(path, format) }
}

fn add(disks: &mut Disks, dir: &Path, name: &str, format: ImageFormat) -> Node {
    images::create(&create_request(&dir.join(name), format)).unwrap();
    let request = OpenRequest::write(dir.join(name)).format(Some(format));
    let image = images::open(&OpenRequest { node_name: name.into(), ..request }).unwrap();
    disks.layers.add_format(image, None, true).unwrap()
}

fn write(node: &Node, value: u8) {
    let memory = AlignedBuf::from_slice(&[value; 512], 512);
    block_on(node.write(0, memory.buffers(), false)).unwrap();
}

fn first_byte(node: &Node) -> u8 {
    let memory = AlignedBuf::zeroed(512, 512);
    block_on(node.read(0, memory.buffers())).unwrap();
    memory.to_vec()[0]
}

/// The guest writes until the barrier, so something is left to flush there.
#[test]
fn a_snapshot_under_a_guest_that_writes_is_undone() {
    let mut bench = Bench::new();
    let (mut action, quiesced) = bench.snapshot();
    let overlay = bench.root.node();
    action.undo(&mut bench.disks, &quiesced);
    assert!(bench.root.node().is_same(&bench.base));
    assert!(!overlay.owes_flush());
    drop((overlay, quiesced));
    abandon(&mut bench.disks, vec![action]);
    assert!(!bench.dir.path().join("overlay").exists());
    write(&bench.base, 2);
    assert_eq!(first_byte(&bench.base), 2);
}

#[test]
fn no_guest_finds_its_disk_read_only_at_the_barrier() {
    let mut bench = Bench::new();
    let (mut action, quiesced) = bench.snapshot();
    assert!(!bench.seen_read_only.load(Ordering::Relaxed) && bench.base.limits().read_only);
    action.undo(&mut bench.disks, &quiesced);
    assert!(!bench.seen_read_only.load(Ordering::Relaxed) && !bench.base.limits().read_only);
}

#[test]
fn an_overlay_that_its_guest_cannot_leave_stays_whole() {
    let mut bench = Bench::new();
    let (mut action, quiesced) = bench.snapshot();
    let old = bench.base.replace_driver(Arc::new(Stubborn(bench.base.driver())), &quiesced);
    action.undo(&mut bench.disks, &quiesced);
    bench.base.replace_driver(old, &quiesced);
    drop(quiesced);
    abandon(&mut bench.disks, vec![action]);
    let overlay = bench.root.node();
    assert_eq!(overlay.name(), "overlay");
    assert!(bench.dir.path().join("overlay").exists());
    assert!(overlay.backing().is_some_and(|below| below.is_same(&bench.base)));
    assert!(bench.base.limits().read_only);
    assert_eq!(first_byte(&overlay), 1);
    block_on(overlay.flush()).unwrap();
    assert!(!overlay.owes_flush());
}

#[test]
fn an_overlay_that_can_stand_on_nothing_is_refused_before_the_barrier() {
    let mut bench = Bench::new();
    let raw = add(&mut bench.disks, bench.dir.path(), "raw", ImageFormat::Raw);
    let refused = Snapshot::of_node(&mut bench.disks, "base", "raw").map(drop).unwrap_err();
    assert_eq!(refused.to_string(), "The overlay does not support backing images");
    assert!(raw.backing().is_none());
    let overlay = add(&mut bench.disks, bench.dir.path(), "other", ImageFormat::Qcow2);
    let action = Snapshot::of_node(&mut bench.disks, "base", "other").unwrap();
    assert!(overlay.backing().is_none());
    drop(action);
}

/// The image that the overlay stood on before needs to stay as it is no more, and keeps its mark as
/// long as the overlay names it.
#[test]
fn marks_tell_what_an_overlay_names_wherever_its_snapshot_is_killed() {
    let (mut before, mut over) = (0, 0);
    for after in 0.. {
        let mut bench = Bench::new();
        let path = |name: &str| bench.dir.path().join(name);
        let make_image = |name: &str, format, backing: Option<&str>| {
            let request = create_request(&path(name), format);
            let backing = backing.map(String::from);
            let backing_format = backing.as_ref().map(|_| ImageFormat::Raw);
            images::create(&CreateRequest { backing, backing_format, ..request }).unwrap();
        };
        make_image("old", ImageFormat::Raw, None);
        make_image("overlay", ImageFormat::AddCow, Some("old"));
        let file = |name: &str| HostFile::open(&path(name), Default::default()).unwrap();
        frozen::mark(&file("old"), &path("overlay"));
        let request = OpenRequest::write(path("overlay")).format(Some(ImageFormat::AddCow));
        let request = OpenRequest { node_name: "overlay".into(), ..request };
        let image = images::open_alone(&request).unwrap();
        bench.disks.layers.add_format(image, None, true).unwrap();
        die_after(Some(after));
        let snapshot = AssertUnwindSafe(|| {
            let prepared = Snapshot::of_node(&mut bench.disks, "base", "overlay").unwrap();
            let mut action = make(&mut bench.disks, vec![prepared]).unwrap().remove(0);
            let quiesced = bench.disks.graph().quiesce(&action.nodes());
            let killed = catch_unwind(AssertUnwindSafe(|| {
                action.commit(&mut bench.disks, &quiesced).unwrap();
                action.clean(&mut bench.disks);
            }));
            // Nothing is undone in order.
            std::mem::forget(action);
            drop(quiesced);
            killed.unwrap_or_else(|killed| resume_unwind(killed));
        });
        let done = catch_unwind(snapshot);
        die_after(None);
        let check = |name: &str| frozen::check(&file(name), &[]).map_err(|e| e.to_string());
        let request = OpenRequest::read(path("overlay")).locking(Locking::Off);
        let overlay = images::open_alone(&request).unwrap();
        if images::names_as_backing(&overlay, &file("old")).unwrap() {
            assert!(check("old").unwrap_err().contains("goes on in"), "{after}");
            before += 1;
        } else {
            check("old").unwrap_or_else(|err| panic!("{after}: {err}"));
            over += 1;
        }
        if done.is_ok() {
            break;
        }
    }
    assert!(before > 0 && over > 1, "{before} kills before, {over} after");
}

/// A driver that no session goes to.
#[derive(Debug)]
struct Stubborn(Arc<dyn Driver>);

impl Driver for Stubborn {
    fn name(&self) -> &'static str {
        "stubborn"
    }
    fn limits(&self) -> Limits {
        self.0.limits()
    }
    fn read<'a>(&'a self, offset: u64, buf: Buffers) -> Fut<'a, ()> {
        self.0.read(offset, buf)
    }
    fn write<'a>(&'a self, offset: u64, buf: Buffers, fua: bool) -> Fut<'a, ()> {
        self.0.write(offset, buf, fua)
    }
    fn write_zeroes<'a>(&'a self, range: ByteRange, may_unmap: bool) -> Fut<'a, ()> {
        self.0.write_zeroes(range, may_unmap)
    }
    fn discard<'a>(&'a self, range: ByteRange) -> Fut<'a, ()> {
        self.0.discard(range)
    }
    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        self.0.flush()
    }
    fn block_status<'a>(&'a self, range: ByteRange) -> Fut<'a, BlockStatus> {
        self.0.block_status(range)
    }
    fn begin_session(&self, _: u128) -> Result<()> {
        Err(Error::unsupported("no session comes here"))
    }
}
