//! The `virtio-driver` crate, a front-end that shares nothing with this project.

use std::os::fd::AsRawFd;
use std::time::Instant;

use virtio_driver::{
    VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkReqBuf,
    VirtioBlkTransport, VirtioFeatureFlags,
};

use crate::common::{Backend, soon, wait_until};

/// Waits for so many completions, polling, and returns their contexts.
fn settle(queue: &mut VirtioBlkQueue<'_, u32>, count: usize) -> Vec<u32> {
    let deadline = soon();
    let mut done = Vec::new();
    while done.len() < count {
        for completion in queue.completions() {
            assert_eq!(completion.ret, 0, "request {}", completion.context);
            done.push(completion.context);
        }
        assert!(Instant::now() < deadline, "{} of {count} completed", done.len());
        std::thread::yield_now();
    }
    done
}

#[test]
#[allow(unsafe_code)]
fn the_driver_of_another_project_reads_what_it_wrote() {
    const BLOCK: usize = 4096;
    const COUNT: usize = 32;
    let mut backend = Backend::start(&[]);
    wait_until("the socket", || std::os::unix::net::UnixStream::connect(&backend.socket).is_ok());
    let features = (VirtioFeatureFlags::VERSION_1
        | VirtioFeatureFlags::RING_EVENT_IDX
        | VirtioFeatureFlags::RING_INDIRECT_DESC)
        .bits()
        | (VirtioBlkFeatureFlags::MQ | VirtioBlkFeatureFlags::FLUSH).bits()
        | (VirtioBlkFeatureFlags::DISCARD | VirtioBlkFeatureFlags::WRITE_ZEROES).bits();
    let path = backend.socket.to_str().expect("UTF-8");
    let transport =
        VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(path, features).expect("a connection");
    let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
    let capacity = transport.get_config().expect("a configuration").capacity.to_native();
    assert_eq!(capacity * 512, crate::common::backend::DISK);
    let mut queues: Vec<VirtioBlkQueue<'_, u32>> =
        VirtioBlkQueue::setup_queues(&mut *transport, 2, 128).expect("queues");
    let memory = vublk::frontend::Region::new(0, (2 * COUNT * BLOCK) as u64, Default::default());
    let memory = memory.expect("memory");
    let address = memory.user_addr() as usize;
    transport
        .map_mem_region(address, 2 * COUNT * BLOCK, memory.fd().as_raw_fd(), 0)
        .expect("shared memory");
    // SAFETY: the region stays mapped, and nothing else of this process refers to it.
    let bytes = unsafe { std::slice::from_raw_parts_mut(address as *mut u8, 2 * COUNT * BLOCK) };
    let (out, into) = bytes.split_at_mut(COUNT * BLOCK);
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = (i / 7 % 251) as u8;
    }
    for (number, queue) in queues.iter_mut().enumerate() {
        let kick = transport.get_submission_notifier(number);
        for (i, block) in out.chunks(BLOCK).enumerate() {
            queue.write((i * BLOCK) as u64, block, i as u32).expect("room");
        }
        kick.notify().expect("a kick");
        let mut done = settle(queue, COUNT);
        done.sort_unstable();
        assert_eq!(done, (0..COUNT as u32).collect::<Vec<_>>());
        queue.flush(100).expect("room");
        kick.notify().expect("a kick");
        assert_eq!(settle(queue, 1), [100]);
        into.fill(0);
        for (i, block) in into.chunks_mut(BLOCK).enumerate() {
            queue.read((i * BLOCK) as u64, block, i as u32).expect("room");
        }
        // This time asleep: notifications begin disabled, and the descriptor blocks.
        queue.set_used_notif_enabled(true);
        kick.notify().expect("a kick");
        let call = transport.get_completion_fd(number);
        let mut left = COUNT;
        while left > 0 {
            left -= queue.completions().inspect(|c| assert_eq!(c.ret, 0)).count();
            if left > 0 && !queue.completions().has_next() {
                // SAFETY: the descriptor is open as long as `call` lives.
                let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(call.as_raw_fd()) };
                let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
                let second = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
                let ready = rustix::event::poll(&mut fds, Some(&second)).expect("poll");
                assert!(ready > 0, "no interrupt, {left} left");
                call.read().expect("an eventfd");
            }
        }
        assert!(out == into, "queue {number} reads something else");
        queue.write_zeroes(0, BLOCK as u64, true, 7).expect("room");
        queue.discard(BLOCK as u64, BLOCK as u64, 8).expect("room");
        kick.notify().expect("a kick");
        settle(queue, 2);
        assert_eq!(backend.content()[..2 * BLOCK], [0; 2 * BLOCK]);
    }
    assert!(backend.content()[2 * BLOCK..COUNT * BLOCK] == out[2 * BLOCK..]);
    backend.assert_lives();
}
