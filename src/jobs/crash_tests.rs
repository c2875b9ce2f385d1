//! Power cuts while layers are copied under a writing guest: whatever the disks may keep of what was
//! not flushed, the chain shows what was flushed, and nothing that nobody wrote.
//!
//! An add-cow layer stands on a raw base. Guests write to it through the filter while a commit or a
//! stream is under way; all operations of all files complete in any order. Between any two steps the
//! power may fail, and then each file has what was flushed of it and any torn subset of the
//! rest. The image file holds rubbish under clear bits, which no cut may show.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use super::layer_copy::{Copier, CopyDown, FillUp};
use crate::block::{Driver, FormatDriver, Node, NodeOptions};
use crate::filters::Intercept;
use crate::formats::addcow::{self, AddCow, Backing, Header};
use crate::formats::raw::Raw;
use crate::io::sim::{Rng, Sim, SimFile, SimTask};
use crate::io::{AlignedBuf, File, block_on, yield_now};
use crate::units::ByteRange;

const SECTOR: u64 = 512;
const SECTORS: u64 = 128;
/// What the job copies in a step, in sectors.
const PIECE: u64 = 8;
/// What lies in the image file under clear bits.
const RUBBISH: u8 = 0xdd;
/// What the base holds.
const BELOW: u8 = 1;
const GUESTS: u64 = 2;

/// The files of a chain.
struct Files {
    base: SimFile,
    file: SimFile,
    image: SimFile,
}

impl Files {
    fn new() -> Files {
        let len = (SECTORS * SECTOR) as usize;
        let file = SimFile::new("x.add-cow");
        let header = Header { backing: Some("base".into()), image: "x.raw".into() };
        block_on(addcow::create::create(&file, &header, len as u64)).unwrap();
        Files {
            base: SimFile::from_bytes("base", vec![BELOW; len]),
            file: SimFile::from_bytes("x.add-cow", file.durable()),
            image: SimFile::from_bytes("x.raw", vec![RUBBISH; len]),
        }
    }

    /// What is left after a power cut.
    fn cut(&self, rng: &mut Rng) -> Files {
        let cut =
            |file: &SimFile, rng: &mut Rng| SimFile::from_bytes("cut", file.power_cut(rng.word()));
        Files {
            base: cut(&self.base, rng),
            file: cut(&self.file, rng),
            image: cut(&self.image, rng),
        }
    }

    /// The base, and the driver of the layer on it.
    fn open(&self) -> (Node, Arc<dyn Driver>) {
        let file = |file: &SimFile| Arc::new(file.clone()) as Arc<dyn File>;
        let raw = Arc::new(Raw::open(file(&self.base), false).unwrap());
        let base = Node::new(raw, NodeOptions { name: "base".into(), ..NodeOptions::default() });
        let options = addcow::OpenOptions {
            read_only: false,
            image: file(&self.image),
            backing: Backing::Node(base.clone()),
            backing_format: None,
            keep: None,
        };
        let top = block_on(AddCow::open(file(&self.file), options)).unwrap();
        (base, Arc::new(FormatDriver::new(top).unwrap()))
    }
}

/// The bytes that each sector may be full of after a cut: all from the floor on.
#[derive(Clone)]
struct Sector {
    values: Vec<u8>,
    completed: usize,
    floor: usize,
}

struct Model(RefCell<Vec<Sector>>);

impl Model {
    fn new() -> Model {
        let sector = Sector { values: vec![BELOW], completed: 1, floor: 0 };
        Model(RefCell::new(vec![sector; SECTORS as usize]))
    }

    fn completed(&self) -> Vec<usize> {
        self.0.borrow().iter().map(|sector| sector.completed).collect()
    }

    fn flushed(&self, completed: &[usize]) {
        for (sector, completed) in self.0.borrow_mut().iter_mut().zip(completed) {
            sector.floor = sector.floor.max(completed - 1);
        }
    }

    fn check(&self, content: &[u8], what: &str) {
        for (at, bytes) in content.chunks(SECTOR as usize).enumerate() {
            let sector = &self.0.borrow()[at];
            let allowed = &sector.values[sector.floor..];
            assert!(
                bytes.iter().all(|byte| byte == &bytes[0]) && allowed.contains(&bytes[0]),
                "{what}: sector {at} is {:02x?}…, and {allowed:02x?} were possible",
                &bytes[..4]
            );
        }
    }
}

fn read_all(node: &Node) -> Vec<u8> {
    let buf = AlignedBuf::zeroed((SECTORS * SECTOR) as usize, 4096);
    block_on(node.read(0, buf.buffers())).unwrap();
    buf.to_vec()
}

/// A guest with half of the disk.
async fn guest(disk: &Node, model: &Model, number: u64, seed: u64, at_work: &Cell<u64>) {
    let mut rng = Rng::new(seed * 1000 + number);
    let half = SECTORS / GUESTS;
    for step in 0..30 {
        let first = rng.below(half);
        let count = 1 + rng.below((half - first).min(14));
        let first = number * half + first;
        let range = ByteRange { offset: first * SECTOR, len: count * SECTOR };
        let zero = rng.one_in(6);
        let value = if zero { 0 } else { (2 + step * GUESTS + number) as u8 };
        if rng.one_in(5) {
            let completed = model.completed();
            disk.flush().await.unwrap();
            model.flushed(&completed);
            continue;
        }
        let sectors = first as usize..(first + count) as usize;
        model.0.borrow_mut()[sectors.clone()].iter_mut().for_each(|s| s.values.push(value));
        if zero {
            disk.write_zeroes(range, rng.one_in(2)).await.unwrap();
        } else {
            let buf = AlignedBuf::from_slice(&vec![value; range.len as usize], 4096);
            disk.write(range.offset, buf.buffers(), false).await.unwrap();
        }
        model.0.borrow_mut()[sectors].iter_mut().for_each(|s| s.completed = s.values.len());
    }
    at_work.set(at_work.get() - 1);
}

/// Copies a range in pieces.
async fn copy(copier: &dyn Copier, range: ByteRange) {
    let mut at = range.offset;
    while at < range.end() {
        let piece = ByteRange { offset: at, len: (PIECE * SECTOR).min(range.end() - at) };
        let step = copier.step(piece).await.map_err(crate::Error::from).unwrap();
        at += step.done.min(piece.len);
    }
}

/// The work of a stream.
async fn stream(intercept: &Intercept, done: &Cell<bool>) {
    let fill = FillUp::new(intercept, None, true);
    copy(&fill, ByteRange { offset: 0, len: SECTORS * SECTOR }).await;
    intercept.inner().flush().await.unwrap();
    done.set(true);
}

/// When a guest's writes begin to go to the base as well.
#[derive(Clone, Copy, PartialEq)]
enum Mirror {
    Never,
    /// After all has been copied once.
    Late,
    /// Before anything has.
    Early,
}

/// The work of a commit of the active layer.
async fn commit(
    disk: &Node,
    base: &Node,
    intercept: &Intercept,
    at_work: &Cell<u64>,
    mirror: Mirror,
) {
    let mut down = CopyDown::new(disk, base);
    for now in [Mirror::Early, Mirror::Late] {
        if mirror == now {
            intercept.mirror_to(base.clone());
            down = CopyDown::beside(intercept, disk, base);
        }
        if now == Mirror::Early {
            copy(&down, ByteRange { offset: 0, len: SECTORS * SECTOR }).await;
        }
    }
    while at_work.get() > 0 {
        while let Some(mut taken) = intercept.dirty().take(0, u64::MAX) {
            copy(&down, taken.range()).await;
            taken.advance(taken.range().len);
        }
        yield_now().await;
    }
    while let Some(mut taken) = intercept.dirty().take(0, u64::MAX) {
        copy(&down, taken.range()).await;
        taken.advance(taken.range().len);
    }
    base.flush().await.unwrap();
}

/// One run, with cuts in between. Returns how many there were.
fn run(seed: u64, is_stream: bool) -> usize {
    let files = Files::new();
    let (base, top) = files.open();
    let intercept = Arc::new(Intercept::new(top, "top"));
    let driver = Arc::clone(&intercept) as Arc<dyn Driver>;
    let disk = Node::new(driver, NodeOptions { name: "top".into(), ..NodeOptions::default() });
    let model = Model::new();
    let sim = Sim::new(seed);
    for file in [&files.base, &files.file, &files.image] {
        sim.attach(file);
    }
    let (at_work, done) = (Cell::new(GUESTS), Cell::new(false));
    let mut tasks: Vec<SimTask<'_>> = (0..GUESTS)
        .map(|n| Box::pin(guest(&disk, &model, n, seed, &at_work)) as SimTask<'_>)
        .collect();
    tasks.push(match is_stream {
        true => Box::pin(stream(&intercept, &done)),
        false => {
            let mirror = [Mirror::Never, Mirror::Late, Mirror::Early][seed as usize % 3];
            Box::pin(commit(&disk, &base, &intercept, &at_work, mirror))
        }
    });
    let mut rng = Rng::new(!seed);
    let mut cuts = 0;
    let cut = |rng: &mut Rng, what: &str| {
        let left = files.cut(rng);
        let bits = left.file.durable();
        let data = left.image.durable();
        // The invariant itself, whatever anybody was told.
        for sector in 0..SECTORS as usize {
            if bits[2560 + sector / 8] >> (sector % 8) & 1 == 1 {
                let content = &data[sector * SECTOR as usize..][..SECTOR as usize];
                assert!(content.iter().any(|b| *b != RUBBISH), "{what}: bit {sector} too early");
            }
        }
        let (_, top) = left.open();
        model.check(&read_all(&Node::new(top, NodeOptions::default())), what);
        if is_stream && done.get() {
            // Nothing below is needed any more.
            assert!(bits[2560..].iter().all(|byte| *byte == 0xff), "{what}: bits are missing");
            model.check(&data, what);
        }
    };
    sim.run_until(tasks, |step| {
        if rng.one_in(8) {
            cuts += 1;
            cut(&mut rng, &format!("seed {seed}, stream: {is_stream}, step {step}"));
        }
        false
    });
    let disk_now = sim.block_on(async {
        let buf = AlignedBuf::zeroed((SECTORS * SECTOR) as usize, 4096);
        disk.read(0, buf.buffers()).await.unwrap();
        buf.to_vec()
    });
    model.check(&disk_now, "at the end");
    if !is_stream {
        assert!(files.base.durable() == disk_now, "seed {seed}: the base is not the disk");
    }
    cuts
}

#[test]
fn no_power_cut_in_a_stream_shows_what_is_not_there() {
    let cuts: usize = (0..40).map(|seed| run(seed, true)).sum();
    eprintln!("stream: {cuts} power cuts");
    assert!(cuts > 500, "too few cuts to mean anything: {cuts}");
}

#[test]
fn no_power_cut_in_a_commit_shows_what_is_not_there() {
    let cuts: usize = (0..60).map(|seed| run(seed, false)).sum();
    eprintln!("commit: {cuts} power cuts");
    assert!(cuts > 500, "too few cuts to mean anything: {cuts}");
}

#[test]
fn copies_and_mirrored_writes_leave_the_same_on_both_disks() {
    const LEN: u64 = 16 * SECTOR;
    for seed in 0..50 {
        let files = ["top", "base"].map(|name| SimFile::from_bytes(name, vec![0; LEN as usize]));
        let raw = |file: &SimFile| Arc::new(Raw::open(Arc::new(file.clone()), false).unwrap());
        let node = |driver: Arc<dyn Driver>| Node::new(driver, NodeOptions::default());
        let mirror = Arc::new(Intercept::new(raw(&files[0]), "top"));
        let (disk, base) = (node(Arc::clone(&mirror) as Arc<dyn Driver>), node(raw(&files[1])));
        mirror.mirror_to(base.clone());
        let sim = Sim::new(seed);
        files.iter().for_each(|file| sim.attach(file));
        let guest = async {
            for value in 1..40 {
                let buf = AlignedBuf::from_slice(&[value; 4 * SECTOR as usize], 4096);
                disk.write(u64::from(value % 5) * SECTOR, buf.buffers(), false).await.unwrap();
            }
        };
        let job = async {
            let down = CopyDown::beside(&mirror, &disk, &base);
            for _ in 0..20 {
                copy(&down, ByteRange { offset: 0, len: LEN }).await;
            }
        };
        sim.run(vec![Box::pin(guest), Box::pin(job)]);
        assert!(files[0].volatile() == files[1].volatile(), "seed {seed}");
    }
}

/// A stream that makes zeros of a part of the disk is dropped at each of its steps, with what it has given
/// to the host under way (a hole that is punched, say). The guest's next write to that part comes after it.
#[test]
fn what_a_dropped_job_has_left_with_the_host_lands_before_the_guests_next_write() {
    const NEW: u8 = 7;
    let half = ByteRange { offset: SECTORS / 2 * SECTOR, len: SECTORS / 2 * SECTOR };
    let mut left = 0;
    for seed in 0..6 {
        for at in 0.. {
            // What is behind the end of the base reads as zeros.
            let base = SimFile::from_bytes("base", vec![BELOW; half.offset as usize]);
            let files = Files { base, ..Files::new() };
            let (_, top) = files.open();
            let intercept = Arc::new(Intercept::new(top, "top"));
            let driver = Arc::clone(&intercept) as Arc<dyn Driver>;
            let disk = Node::new(driver, NodeOptions::default());
            let sim = Sim::new(seed);
            for file in [&files.base, &files.file, &files.image] {
                sim.attach(file);
            }
            let done = Cell::new(false);
            let job = Box::pin(stream(&intercept, &done)) as SimTask<'_>;
            sim.run_until(vec![job], |step| step == at);
            left += usize::from(sim.pending() > 0);
            let write = async {
                let buf = AlignedBuf::from_slice(&vec![NEW; half.len as usize], 4096);
                disk.write(half.offset, buf.buffers(), false).await.unwrap();
            };
            sim.run(vec![Box::pin(write)]);
            sim.drain();
            let found = sim.block_on(async {
                let buf = AlignedBuf::zeroed(half.len as usize, 4096);
                disk.read(half.offset, buf.buffers()).await.unwrap();
                buf.to_vec()
            });
            assert!(found == vec![NEW; half.len as usize], "seed {seed}, dropped at step {at}");
            if done.get() {
                break;
            }
        }
    }
    assert!(left > 20, "only {left} times was anything under way");
}
