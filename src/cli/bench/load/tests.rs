//! A worker against a device that answers at once.

use super::*;
use crate::frontend::{Memory, Pages, RingLayout, SlotShape};
use clap::Parser;

/// The options as a command of their own.
#[derive(Parser)]
struct Command {
    #[command(flatten)]
    args: BenchArgs,
}

/// A device that completes every request at once, in batches of what it finds, and looks for
/// more without sleeping. Ends after `count` requests, and tells their sectors.
fn device(memory: Memory, layout: RingLayout, call: Waker, count: u64) -> Vec<u64> {
    let quad = |at: u64| u64::from_le_bytes(memory.read_vec(at, 8).unwrap().try_into().unwrap());
    let mut sectors = Vec::new();
    let word = |at: u64| {
        let mut bytes = [0; 2];
        memory.read(at, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    };
    let (mut taken, mut done) = (0u16, 0);
    while done < count {
        let available = word(layout.available + 2);
        if available == taken {
            // The driver may sleep; the test's waker makes it look.
            call.wake().unwrap();
            std::hint::spin_loop();
            continue;
        }
        std::sync::atomic::fence(Ordering::SeqCst);
        while taken != available {
            let slot = u64::from(taken % layout.size);
            let head = word(layout.available + 4 + 2 * slot);
            // Indirect: the status is the last descriptor of the table.
            let at = layout.descriptors + 16 * u64::from(head);
            let (table, len) = (quad(at), quad(at + 8) & 0xffff_ffff);
            memory.write(quad(table + len - 16), &[STATUS_OK]).unwrap();
            sectors.push(quad(quad(table) + 8));
            let mut element = [0; 8];
            element[0..2].copy_from_slice(&head.to_le_bytes());
            memory.write(layout.used + 4 + 8 * slot, &element).unwrap();
            taken = taken.wrapping_add(1);
            done += 1;
        }
        std::sync::atomic::fence(Ordering::SeqCst);
        memory.write(layout.used + 2, &taken.to_le_bytes()).unwrap();
    }
    call.wake().unwrap();
    sectors
}

/// Runs the worker of queue 0 of `queues` against the device, and tells the sectors it asked
/// for.
fn run(line: &str, blocks: u64, queues: u64, count: u64) -> (Worker, Vec<u64>) {
    let words = ["bench", "--socket-path", "none"].into_iter().chain(line.split(' '));
    let args = Command::parse_from(words).args;
    let memory = Memory::with_region(0, 4 << 20, Pages::Small).unwrap();
    let ring = Ring::new(&memory, 0, RingLayout::contiguous(0, 256)).unwrap();
    let shape = SlotShape { count: 32, data: 4096, segment: u32::MAX, indirect: true };
    let slots = Slots::new(&memory, ring.layout().end(), &ring, shape).unwrap();
    let requests = args.requests;
    let plan = Plan { offset: 8192, blocks, queues, requests, can_flush: true };
    let (layout, waker) = (ring.layout(), ring.waker());
    let mut worker = Worker::new(&args, plan, 0, ring, slots).unwrap();
    let (phase, shared) = (AtomicU8::new(MEASURE), Shared::default());
    let sectors = thread::scope(|scope| {
        let device = scope.spawn(|| device(memory.clone(), layout, waker, count));
        if let Err(err) = worker.run(&phase, &shared) {
            // The device would wait for ever.
            eprintln!("{err}");
            std::process::abort();
        }
        device.join().unwrap()
    });
    assert_eq!(shared.done.load(Ordering::Relaxed), count);
    assert_eq!(worker.errors, 0);
    (worker, sectors)
}

#[test]
fn a_worker_sends_its_quota_and_ends() {
    // With 32 slots in flight when the quota is reached, 31 more come back.
    let (worker, _) = run("--rw get-id --requests 50000", 1, 1, 50_000 + 31);
    assert_eq!(worker.latency.len(), 50_000);
}

#[test]
fn a_single_pass_touches_each_block_of_its_stripe_once() {
    // Two queues share 200 blocks, 64 KiB apart, behind the first 8 KiB.
    let (_, sectors) = run("--rw write --once --stride 64k", 200, 2, 100);
    let expected: Vec<u64> = (0..100).map(|block| 16 + block * 128).collect();
    assert_eq!(sectors, expected);
    // Fewer blocks than slots.
    let (_, sectors) = run("--rw read --once", 3, 1, 3);
    assert_eq!(sectors, [16, 24, 32]);
}

#[test]
fn flushes_come_between_the_writes() {
    let (_, sectors) = run("--rw write --once --flush-every 4", 9, 1, 11);
    assert_eq!(sectors, [16, 24, 32, 40, 0, 48, 56, 64, 72, 0, 80]);
}
