//! How long a request takes in the ring alone: pop, walk, parse, finish, complete and a share of
//! publish, for 4 KiB reads of three descriptors in batches of eight.
//!
//! `cargo bench --bench ring`

#![allow(unsafe_code)]

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Instant;

use vublk::device::chain::Chain;
use vublk::device::features::{EVENT_IDX, INDIRECT_DESC, VERSION_1};
use vublk::device::inflight::InflightRegion;
use vublk::device::mapping::memfd_create;
use vublk::device::memory::{GuestMemory, MemoryRegion, RegionCache};
use vublk::device::request::{Limits, Parsed, Request, Status};
use vublk::device::ring::{Ring, RingConfig};

const SIZE: u16 = 128;
const BATCH: u16 = 8;
const ROUNDS: u32 = 1_000_000;
const MEMORY: u64 = 16 << 20;
const AVAIL: u64 = 16 * SIZE as u64;
const USED: u64 = AVAIL + 0x1000;

fn main() {
    for with_inflight in [false, true] {
        let ns = (0..5).map(|_| run(with_inflight)).fold(f64::INFINITY, f64::min);
        let what = if with_inflight { "with" } else { "without" };
        println!("4k read, {what} in-flight region: {ns:.1} ns a request");
    }
}

/// Serves all rounds once; nanoseconds a request.
fn run(with_inflight: bool) -> f64 {
    let file = memfd_create("ring-bench", MEMORY, false).unwrap();
    let heads = SIZE / 3;
    for head in 0..heads {
        let status = 0x10_0000 + u64::from(head) * 64;
        let data = 0x20_0000 + u64::from(head) * 4096;
        file.write_all_at(&[0; 16], status + 16).unwrap();
        let mut table = Vec::new();
        for (addr, len, flags, next) in [
            (status + 16, 16u32, 1u16, 3 * head + 1),
            (data, 4096, 3, 3 * head + 2),
            (status, 1, 2, 0),
        ] {
            table.extend_from_slice(&u64::to_le_bytes(addr));
            table.extend_from_slice(&u32::to_le_bytes(len));
            table.extend_from_slice(&u16::to_le_bytes(flags));
            table.extend_from_slice(&u16::to_le_bytes(next));
        }
        file.write_all_at(&table, u64::from(head) * 48).unwrap();
    }
    let region = MemoryRegion { guest_addr: 0, size: MEMORY, front_end_addr: 0, mmap_offset: 0 };
    let memory = GuestMemory::from_regions([(region, file)]).unwrap();
    let avail = memory.host_ptr(AVAIL, 4096, &mut RegionCache::default()).unwrap();
    // SAFETY: inside guest memory, aligned.
    let half = |index: usize| unsafe { AtomicU16::from_ptr(avail.cast::<u16>().add(index)) };
    let inflight = with_inflight.then(|| {
        let new = InflightRegion::create(1, SIZE).unwrap();
        let region = InflightRegion::from_front_end(new.file, new.mmap_size, 0, 1, SIZE);
        region.unwrap().queue(0).unwrap()
    });
    let (mut ring, _) = Ring::new(RingConfig {
        size: SIZE,
        desc_addr: 0,
        avail_addr: AVAIL,
        used_addr: USED,
        base: 0,
        features: VERSION_1 | EVENT_IDX | INDIRECT_DESC,
        memory,
        dirty_log: None,
        log_used_addr: None,
        inflight,
    })
    .unwrap();
    let limits = Limits::new(1 << 40, 512, false, 0);
    let (mut chain, mut request) = (Chain::new(), Request::new());
    let (mut avail_idx, mut next_head) = (0u16, 0u16);
    let start = Instant::now();
    for _ in 0..ROUNDS {
        for _ in 0..BATCH {
            half(2 + usize::from(avail_idx % SIZE)).store(3 * next_head, Ordering::Relaxed);
            avail_idx = avail_idx.wrapping_add(1);
            next_head = (next_head + 1) % heads;
        }
        half(1).store(avail_idx, Ordering::Release);
        while let Some(head) = ring.pop() {
            let head = head.unwrap();
            ring.walk(head, &mut chain).unwrap();
            // SAFETY: the ring keeps the memory mapped.
            let parsed = unsafe { request.parse(&chain, &limits) };
            assert_eq!(parsed, Parsed::Submit);
            // SAFETY: as above.
            let len = unsafe { request.finish(Status::Ok) };
            ring.complete(head, len);
        }
        std::hint::black_box(ring.publish());
    }
    start.elapsed().as_nanos() as f64 / (f64::from(ROUNDS) * f64::from(BATCH))
}
