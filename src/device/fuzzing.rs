//! Bodies of the fuzz targets, in the library so that plain tests run them too.

#![allow(unsafe_code)]

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::chain::Chain;
use super::features::{EVENT_IDX, INDIRECT_DESC, VERSION_1};
use super::inflight::InflightRegion;
use super::mapping::memfd_create;
use super::memory::{GuestMemory, MemoryRegion};
use super::request::{Limits, Parsed, Request, Status};
use super::ring::{Ring, RingConfig};

/// Two regions side by side and one apart, each two pages.
const REGIONS: [u64; 3] = [0x1_0000, 0x1_2000, 0x8_0000];
const REGION_LEN: u64 = 0x2000;

/// Takes bytes as guest memory, ring addresses and features, and serves whatever requests that
/// makes. Panics if a range leaves guest memory or a rule of the ring is broken.
///
/// The first bytes are the ring's parameters, the rest is repeated over guest memory. Unless the
/// parameters say otherwise, most of what becomes a descriptor, a head or a header is bent towards
/// sense, because eight random bytes are hardly ever an address in memory.
pub fn chains(input: &[u8]) {
    let mut input = input;
    let mut byte = || match input.split_first() {
        Some((first, rest)) => {
            input = rest;
            *first
        }
        None => 0,
    };
    let features = VERSION_1
        | if byte() & 1 != 0 { EVENT_IDX } else { 0 }
        | if byte() & 1 != 0 { INDIRECT_DESC } else { 0 };
    let size = 1 << (byte() % 7);
    let base = u16::from_le_bytes([byte(), byte()]);
    let limits = Limits {
        capacity: u64::from(byte()) << 14,
        block_size: if byte() & 1 != 0 { 4096 } else { 512 },
        read_only: byte() & 7 == 7,
        ..Limits::new(0, 512, false, u64::MAX)
    };
    let with_inflight = byte() & 1 != 0;
    let bend = byte() & 7 != 7;
    // The ring lies in the first page of the first region, its parts in order.
    let desc_addr = REGIONS[0];
    let avail_addr = desc_addr + 16 * u64::from(size);
    let used_addr = (avail_addr + 6 + 2 * u64::from(size)).next_multiple_of(4);

    let memory = GuestMemory::from_regions(REGIONS.map(|guest_addr| {
        let file = memfd_create("vublk-fuzz", REGION_LEN, false).expect("memfd");
        if !input.is_empty() {
            // Each region starts at another place of the input.
            let skip = (guest_addr >> 12) as usize % input.len();
            let mut content: Vec<u8> =
                input.iter().copied().cycle().skip(skip).take(REGION_LEN as usize).collect();
            if bend {
                bend_content(&mut content, guest_addr, size, base);
            }
            file.write_all_at(&content, 0).expect("fill memory");
        }
        let region = MemoryRegion {
            guest_addr,
            size: REGION_LEN,
            front_end_addr: guest_addr,
            mmap_offset: 0,
        };
        (region, file)
    }))
    .expect("guest memory");
    let inflight = with_inflight.then(|| {
        let new = InflightRegion::create(1, size).expect("in-flight region");
        new.file.write_all_at(&input[..input.len().min(256)], 0).expect("fill in-flight region");
        let region = InflightRegion::from_front_end(new.file, new.mmap_size, 0, 1, size);
        region.expect("in-flight region").queue(0).expect("queue 0")
    });
    let config = RingConfig {
        size,
        desc_addr,
        avail_addr,
        used_addr,
        base,
        features,
        memory: Arc::clone(&memory),
        dirty_log: None,
        log_used_addr: None,
        inflight,
    };
    let Ok((mut ring, resubmit)) = Ring::new(config) else { return };
    assert!(resubmit.len() <= usize::from(size));

    let mut chain = Chain::new();
    let mut request = Request::new();
    let mut served = 0;
    let mut todo = resubmit.into_iter();
    loop {
        let head = match todo.next() {
            Some(head) => head,
            None => match ring.pop() {
                Some(Ok(head)) => head,
                Some(Err(_)) => break,
                None => {
                    let _interrupt = ring.publish();
                    ring.disable_notifications();
                    if !ring.enable_notifications() {
                        break;
                    }
                    continue;
                }
            },
        };
        serve(&mut ring, head, &mut chain, &mut request, &memory, &limits);
        served += 1;
        if served % 3 == 0 {
            let _interrupt = ring.publish();
        }
        // Writing status bytes and used elements into the rings can make this go on for ever.
        if served > 1000 {
            break;
        }
    }
    let _interrupt = ring.publish();
    assert_eq!(ring.in_flight(), if ring.broken().is_some() { ring.in_flight() } else { 0 });
    assert!(!memory.is_broken());
}

/// Bends what lies in a region: the first has the ring, then headers; the second tables of
/// descriptors; the third is left alone.
fn bend_content(content: &mut [u8], guest_addr: u64, size: u16, base: u16) {
    let entries = usize::from(size);
    let table = 16 * entries;
    let avail_end = table + 4 + 2 * entries;
    let after_ring = (avail_end + 2).next_multiple_of(4) + 6 + 8 * entries;
    match REGIONS.iter().position(|start| *start == guest_addr) {
        Some(0) => {
            content[..table].chunks_exact_mut(16).for_each(|desc| bend_descriptor(desc, size));
            let avail = &mut content[table..avail_end];
            if avail[1] & 7 != 7 {
                let ahead = u16::from(avail[2]) % (size + 1);
                avail[2..4].copy_from_slice(&base.wrapping_add(ahead).to_le_bytes());
            }
            for head in avail[4..].chunks_exact_mut(2) {
                if head[1] & 15 != 15 {
                    head[0] &= (size - 1) as u8;
                    head[1] = 0;
                }
            }
            for header in content[after_ring.next_multiple_of(16)..].chunks_exact_mut(16) {
                // A known type, or nearly, and a sector of a small disk.
                if header[4] & 7 != 7 {
                    header[0] &= 15;
                    header[1..4].fill(0);
                }
                if header[5] & 7 != 7 {
                    header[9..16].fill(0);
                }
            }
        }
        Some(1) => content.chunks_exact_mut(16).for_each(|desc| bend_descriptor(desc, size)),
        _ => {}
    }
}

/// Makes most descriptors point into memory, to one of their table, at a length that means
/// something.
fn bend_descriptor(desc: &mut [u8], size: u16) {
    let how = desc[7];
    if how & 7 != 7 {
        let region = REGIONS[usize::from(desc[6]) % REGIONS.len()];
        let mut offset = u64::from(u16::from_le_bytes([desc[0], desc[1]])) % REGION_LEN;
        if how & 8 != 0 {
            // Where headers and tables are.
            offset &= !15;
        }
        desc[..8].copy_from_slice(&(region + offset).to_le_bytes());
    }
    let len = match (how >> 4) & 7 {
        0 => u32::from_le_bytes([desc[8], desc[9], desc[10], desc[11]]),
        1 => u32::from(desc[8]),
        2 => 1,
        3 | 4 => 16 * (1 + u32::from(desc[8] & 7)),
        _ => 512 * (1 + u32::from(desc[8] & 7)),
    };
    desc[8..12].copy_from_slice(&len.to_le_bytes());
    if desc[13] & 7 != 7 {
        desc[13] = 0;
        // Indirect is rarer than the others.
        desc[12] &= if desc[12] & 0x30 == 0 { 7 } else { 3 };
    }
    if desc[15] & 15 != 15 {
        desc[14] &= (size - 1) as u8;
        desc[15] = 0;
    }
}

/// Walks, parses and answers one request.
pub(super) fn serve(
    ring: &mut Ring,
    head: u16,
    chain: &mut Chain,
    request: &mut Request,
    memory: &GuestMemory,
    limits: &Limits,
) {
    let walked = ring.walk(head, chain);
    if walked.is_err() {
        assert!(chain.readable().is_empty() && chain.writable_len() <= 1);
    }
    for (iovs, len) in
        [(chain.readable(), chain.readable_len()), (chain.writable(), chain.writable_len())]
    {
        assert_in_memory(iovs, memory);
        assert_eq!(iovs.iter().map(|iov| iov.iov_len as u64).sum::<u64>(), len);
    }
    // SAFETY: `memory` is the table the chain was walked in.
    let parsed = unsafe { request.parse(chain, limits) };
    assert_in_memory(&request.data, memory);
    let data: u64 = request.data.iter().map(|iov| iov.iov_len as u64).sum();
    assert_eq!(data, request.data_len);
    assert!(data <= chain.readable_len() + chain.writable_len());
    for segment in &request.segments {
        assert!(segment.range.end() <= limits.capacity);
        assert!(segment.range.is_aligned(limits.block_size.into()));
        assert!(!limits.read_only);
    }
    let status = match parsed {
        Parsed::Submit => Status::Ok,
        Parsed::Done(status) => status,
    };
    assert!(walked.is_ok() || parsed == Parsed::Done(Status::IoErr));
    // SAFETY: as above.
    let len = unsafe { request.finish(status) };
    assert!(u64::from(len) <= chain.writable_len());
    ring.complete(head, len);
}

/// Each range lies in guest memory and is not empty.
fn assert_in_memory(iovs: &[libc::iovec], memory: &GuestMemory) {
    for iov in iovs {
        assert_ne!(iov.iov_len, 0);
        assert!(memory.guest_addr(iov.iov_base.cast(), iov.iov_len).is_some());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn any_bytes_are_served(bytes in prop::collection::vec(any::<u8>(), 0..700)) {
            super::chains(&bytes);
        }

        #[test]
        fn any_bytes_are_served_on_a_larger_disk(
            bytes in prop::collection::vec(any::<u8>(), 2000..2100),
        ) {
            let mut bytes = bytes;
            // Indirect, a ring of 32, no odd blocks, not read-only.
            bytes[..10].copy_from_slice(&[1, 1, 5, 0, 0, 255, 0, 0, 0, 0]);
            super::chains(&bytes);
        }
    }
}
