//! Random writes, reads and flushes with every read verified, run inside a guest.
//!
//! The test program is its own guest program: the harness puts it into the initramfs, and the job
//! runs its one ignored test, which calls [`run`]. Host and guest so share the checksum, and no
//! second program has to be built.
//!
//! Each worker owns every n-th slot of the region and keeps, for every sector, the generation it
//! wrote last. A sector's bytes follow from its number and its generation, so a read tells at once
//! whether a completed write was lost, repeated late, or landed elsewhere. All I/O is direct: what
//! a worker reads comes from the back-end, not from the guest's page cache.
//!
//! The host steers by lines:
//!
//! | line                     | answer                                                            |
//! |--------------------------|-------------------------------------------------------------------|
//! | `ping N`                 | `@@pong N OPERATIONS`, once every worker has gone on              |
//! | `cache OFFSET LENGTH`    | `@@cached`: that range was read into the guest's page cache       |
//! | `sum OFFSET LENGTH`      | `@@sum CHECKSUM` of a range, through the page cache               |
//! | `stop`                   | `@@load-done CHECKSUM OPERATIONS LONGEST_MS`, after a full check  |

use std::fs::{File, OpenOptions};
use std::io::BufRead as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes of a device that the load works on, from its start.
pub const REGION: u64 = 16 << 20;

const SECTOR: usize = 512;
const SLOT: usize = 64 << 10;
const SLOT_SECTORS: usize = SLOT / SECTOR;
/// Alignment of direct I/O, in memory.
const ALIGN: usize = 4096;

/// The shell line that runs the load in a guest.
pub fn job(workers: u32, block: u32, seed: u64) -> String {
    format!(
        "LOAD_WORKERS={workers} LOAD_BLOCK={block} LOAD_SEED={seed} \
         guest-test --ignored --exact runs_inside_a_guest --nocapture </dev/ttyS0\n"
    )
}

/// A seed that differs from run to run. Tests print it when they fail.
pub fn seed() -> u64 {
    match std::env::var("VUBLK_TEST_SEED") {
        Ok(seed) => seed.parse().expect("VUBLK_TEST_SEED is a number"),
        Err(_) => std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(1, |since| since.as_nanos() as u64),
    }
}

/// The guest's side: works on `/dev/vda` until the host says stop. Does nothing where the variables
/// that [`job`] sets are missing, that is on the host.
pub fn run() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (Some(workers), Some(block), Some(seed)) =
        (number("LOAD_WORKERS"), number("LOAD_BLOCK"), number("LOAD_SEED"))
    else {
        return;
    };
    let device = Path::new("/dev/vda");
    let (workers, block) = (workers as usize, block as usize);
    let stop = AtomicBool::new(false);
    let progress: Vec<AtomicU64> = (0..workers).map(|_| AtomicU64::new(0)).collect();
    let longest = Mutex::new(Duration::ZERO);

    std::thread::scope(|scope| {
        for (index, count) in progress.iter().enumerate() {
            let (stop, longest) = (&stop, &longest);
            scope.spawn(move || {
                // A worker that panics must not leave the others, and the host, waiting for it.
                let worker = Worker::new(device, index, workers, block, seed);
                let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    worker.work(stop, count, longest);
                }));
                if outcome.is_err() {
                    println!("@@load-failed worker {index}");
                    std::process::exit(1);
                }
            });
        }
        println!("@@load-started {workers}");
        for line in std::io::stdin().lock().lines() {
            let line = line.expect("the host's line");
            let words: Vec<&str> = line.split_whitespace().collect();
            let range = |words: &[&str]| -> (u64, usize) {
                (words[1].parse().expect("an offset"), words[2].parse().expect("a length"))
            };
            match words.first().copied() {
                Some("ping") => {
                    let total = await_progress(&progress);
                    println!("@@pong {} {total}", words[1]);
                }
                Some("cache") => {
                    let (offset, length) = range(&words);
                    file_checksum(device, offset, length);
                    println!("@@cached");
                }
                Some("sum") => {
                    let (offset, length) = range(&words);
                    println!("@@sum {:016x}", file_checksum(device, offset, length));
                }
                Some("stop") => break,
                _ => println!("@@load-heard {line:?}"),
            }
        }
        stop.store(true, Ordering::Relaxed);
    });

    let whole = read_direct(device, 0, REGION as usize);
    let total: u64 = progress.iter().map(|count| count.load(Ordering::Relaxed)).sum();
    let longest = longest.lock().map_or(Duration::ZERO, |longest| *longest);
    println!("@@load-done {:016x} {total} {}", checksum(&whole), longest.as_millis());
}

/// A checksum of a range of a file: the host's counterpart of what the guest reports.
pub fn file_checksum(path: &Path, offset: u64, length: usize) -> u64 {
    let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset).expect("the range can be read");
    checksum(&bytes)
}

/// Cheap enough for an emulated processor and an unoptimised build; sensitive to place.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(0xcbf2_9ce4_8422_2325, |sum: u64, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (sum ^ u64::from_le_bytes(word)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23)
    })
}

/// Waits until every worker has completed two more operations, so at least one that began after
/// the call, and returns the sum. The host's deadline bounds the wait.
fn await_progress(progress: &[AtomicU64]) -> u64 {
    let before: Vec<u64> = progress.iter().map(|count| count.load(Ordering::Relaxed)).collect();
    loop {
        let now: Vec<u64> = progress.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        if before.iter().zip(&now).all(|(before, now)| *now >= before + 2) {
            return now.iter().sum();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A buffer that direct I/O takes.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    fn new(length: usize) -> Aligned {
        let bytes = vec![0; length + ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN);
        Aligned { bytes, start, length }
    }

    fn get(&mut self, length: usize) -> &mut [u8] {
        assert!(length <= self.length);
        &mut self.bytes[self.start..self.start + length]
    }
}

fn open_direct(device: &Path) -> File {
    let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(device).expect("the device")
}

fn read_direct(device: &Path, offset: u64, length: usize) -> Vec<u8> {
    let file = open_direct(device);
    let mut buffer = Aligned::new(SLOT);
    let mut whole = Vec::with_capacity(length);
    while whole.len() < length {
        let part = buffer.get(SLOT.min(length - whole.len()));
        file.read_exact_at(part, offset + whole.len() as u64).expect("the device can be read");
        whole.extend_from_slice(part);
    }
    whole
}

struct Worker {
    device: File,
    buffer: Aligned,
    /// The slots this worker alone touches.
    slots: Vec<usize>,
    /// For each slot of ours, each sector's generation; 0 is what was there before us.
    generations: Vec<[u64; SLOT_SECTORS]>,
    next_generation: u64,
    block_sectors: usize,
    random: u64,
}

impl Worker {
    fn new(device: &Path, index: usize, workers: usize, block: usize, seed: u64) -> Worker {
        let slots: Vec<usize> = (index..REGION as usize / SLOT).step_by(workers).collect();
        Worker {
            device: open_direct(device),
            buffer: Aligned::new(SLOT),
            generations: vec![[0; SLOT_SECTORS]; slots.len()],
            slots,
            next_generation: seed << 20,
            block_sectors: block / SECTOR,
            random: mix(seed.wrapping_add(index as u64)) | 1,
        }
    }

    fn work(mut self, stop: &AtomicBool, count: &AtomicU64, longest: &Mutex<Duration>) {
        while !stop.load(Ordering::Relaxed) {
            let begun = Instant::now();
            match self.below(16) {
                0..=8 => self.write(),
                9 => self.device.sync_data().expect("a flush succeeds"),
                _ => {
                    let slot = self.below(self.slots.len());
                    self.verify(slot);
                }
            }
            let mut longest = longest.lock().expect("no worker panics with it");
            *longest = begun.elapsed().max(*longest);
            count.fetch_add(1, Ordering::Relaxed);
        }
        for slot in 0..self.slots.len() {
            self.verify(slot);
        }
        self.device.sync_data().expect("a flush succeeds");
    }

    fn write(&mut self) {
        let slot = self.below(self.slots.len());
        let blocks = SLOT_SECTORS / self.block_sectors;
        let first = self.below(blocks);
        // Short writes most of the time, up to a whole slot now and then.
        let most = if self.below(4) == 0 { blocks - first } else { (blocks - first).min(8) };
        let first = first * self.block_sectors;
        let sectors = (1 + self.below(most)) * self.block_sectors;
        self.next_generation += 1;
        let generation = self.next_generation;
        let base = self.slots[slot] * SLOT_SECTORS;
        let bytes = self.buffer.get(sectors * SECTOR);
        for (index, sector) in bytes.chunks_mut(SECTOR).enumerate() {
            fill(sector, base + first + index, generation);
        }
        let offset = ((base + first) * SECTOR) as u64;
        self.device.write_all_at(bytes, offset).expect("a write succeeds");
        self.generations[slot][first..first + sectors].fill(generation);
    }

    fn verify(&mut self, slot: usize) {
        let base = self.slots[slot] * SLOT_SECTORS;
        let bytes = self.buffer.get(SLOT);
        self.device.read_exact_at(bytes, (base * SECTOR) as u64).expect("a read succeeds");
        let mut expected = [0; SECTOR];
        for (index, sector) in bytes.chunks(SECTOR).enumerate() {
            let generation = self.generations[slot][index];
            if generation == 0 {
                continue;
            }
            fill(&mut expected, base + index, generation);
            assert!(
                sector == expected,
                "sector {}: wanted generation {generation:#x}, found {:02x?}…",
                base + index,
                &sector[..16]
            );
        }
    }

    fn below(&mut self, limit: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % limit as u64) as usize
    }
}

/// The content of a sector: its generation, its number, and words that follow from both.
fn fill(sector: &mut [u8], number: usize, generation: u64) {
    let mut word = mix(generation ^ (number as u64).rotate_left(32));
    for chunk in sector.chunks_mut(8) {
        chunk.copy_from_slice(&word.to_le_bytes());
        word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    }
    sector[..8].copy_from_slice(&generation.to_le_bytes());
    sector[8..16].copy_from_slice(&(number as u64).to_le_bytes());
}

/// The finaliser of SplitMix64.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
