//! Guests and front-ends that would keep a worker's memory, or the worker itself.

use super::order::wait_until;
use super::*;

/// Length of the memory that all requests share.
const SHARED: u64 = 96 << 20;

/// A disk whose reads end when they are told to, one by one.
#[derive(Debug)]
struct Holding {
    active: AtomicUsize,
    /// How many may end, and who waits for that.
    may_end: Mutex<(usize, Vec<Waker>)>,
}

impl Holding {
    fn release(&self, reads: usize) {
        let mut may_end = self.may_end.lock().unwrap();
        may_end.0 += reads;
        may_end.1.drain(..).for_each(Waker::wake);
    }
}

impl Driver for Holding {
    fn name(&self) -> &'static str {
        "holding"
    }

    fn limits(&self) -> Limits {
        Limits {
            size: 1 << 40,
            request_alignment: 1,
            memory_alignment: 1,
            optimal_io: 4096,
            discard_granularity: 512,
            read_only: false,
        }
    }

    fn read<'a>(&'a self, _offset: u64, _buf: Buffers) -> Fut<'a, ()> {
        Box::pin(async {
            self.active.fetch_add(1, Ordering::SeqCst);
            std::future::poll_fn(|cx| {
                let mut may_end = self.may_end.lock().unwrap();
                if may_end.0 == 0 {
                    may_end.1.push(cx.waker().clone());
                    return Poll::Pending;
                }
                may_end.0 -= 1;
                Poll::Ready(())
            })
            .await;
            self.active.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        })
    }

    fn write<'a>(&'a self, offset: u64, buf: Buffers, _fua: bool) -> Fut<'a, ()> {
        self.read(offset, buf)
    }

    fn write_zeroes<'a>(&'a self, _range: ByteRange, _may_unmap: bool) -> Fut<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn discard<'a>(&'a self, _range: ByteRange) -> Fut<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn flush<'a>(&'a self) -> Fut<'a, ()> {
        Box::pin(async { Ok(()) })
    }

    fn block_status<'a>(&'a self, _range: ByteRange) -> Fut<'a, BlockStatus> {
        Box::pin(async { Err(Error::unsupported("not asked for here")) })
    }
}

/// A ring full of requests that name the same memory costs the guest nothing, and costs us memory and
/// the time of a drain. So only so many bytes are under way, whatever the ring holds; the rest
/// follows without a kick.
#[test]
fn a_worker_takes_no_more_than_so_many_bytes_at_a_time() {
    let _watchdog = Watchdog::new("the full ring");
    for engine in [EngineKind::Auto, EngineKind::Threads] {
        // One that is larger than the bound is done as well, alone.
        for (len, at_once) in [(32 << 20, 2), (SHARED, 1)] {
            let disk = Arc::new(Holding {
                active: AtomicUsize::new(0),
                may_end: Mutex::new((0, Vec::new())),
            });
            let pool = Pool::new(export(disk.clone(), engine, 1));
            let mut memory = Memory::with_region(RINGS_AT, 1 << 20, Pages::Small).unwrap();
            let data = crate::frontend::Region::new(DATA_AT, SHARED, Pages::Small).unwrap();
            memory.add(data).unwrap();
            let mut queues = [0, 1].map(|index| Queue::new(&memory, index, true));
            for (index, queue) in queues.iter_mut().enumerate() {
                for slot in 0..SLOTS {
                    let (header, status) = (queue.header(slot), queue.status(slot));
                    memory.write(header, &crate::frontend::request::header(0, 0)).unwrap();
                    let parts =
                        [(header, 16, false), (DATA_AT, len as u32, true), (status, 1, true)];
                    let parts = parts.map(|(addr, len, writable)| Segment { addr, len, writable });
                    let head = queue.ring.add_chain(&parts).unwrap();
                    queue.ring.push(head);
                }
                queue.ring.publish();
                pool.start(index, start_of(&queue.ring, 0, true, &memory)).unwrap();
            }
            let active = || disk.active.load(Ordering::SeqCst);
            for done in 0..2 * SLOTS as u16 {
                let left = usize::from(2 * SLOTS as u16 - done).min(at_once);
                wait_until("the next requests", || active() == left);
                std::thread::sleep(Duration::from_millis(2));
                assert_eq!(active(), left, "after {done}");
                disk.release(1);
                wait_until("an answer", || {
                    queues.iter().map(|queue| queue.ring.used_index()).sum::<u16>() == done + 1
                });
                if done == SLOTS as u16 / 2 {
                    // Neither ring keeps the other waiting.
                    for queue in &queues {
                        assert!(queue.ring.used_index() > 0);
                    }
                }
            }
            assert_eq!(pool.stop(0), Some(SLOTS as u16));
            // A drain waits for what was taken, not for all that is there.
            pool.stop(1).unwrap();
            pool.disconnected();
        }
    }
}

/// The descriptor of the interrupt is the front-end's as well: it can be made to block after it was
/// given to us. Whoever waits for the worker then gets it out of there.
#[test]
fn an_interrupt_that_blocks_keeps_nobody_waiting() {
    for engine in [EngineKind::Auto, EngineKind::Threads] {
        let export = export(Slow::new(), engine, 1);
        let pool = Arc::new(Pool::new(Arc::clone(&export)));
        let memory = guest_memory();
        let queues = [0, 1].map(|index| Queue::new(&memory, index, true));
        let full = || {
            let flags = rustix::event::EventfdFlags::CLOEXEC;
            let full = rustix::event::eventfd(0, flags).unwrap();
            rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
            Arc::new(full)
        };
        pool.start(0, start_of(&queues[0].ring, 0, true, &memory)).unwrap();
        pool.set_call(0, Some(full()));
        let waits = |what, act: Box<dyn FnOnce(&Pool) + Send>| {
            let (done, is_done) = channel();
            let pool = Arc::clone(&pool);
            std::thread::spawn(move || {
                act(&pool);
                done.send(()).unwrap();
            });
            let timeout = Duration::from_secs(20);
            is_done.recv_timeout(timeout).unwrap_or_else(|_| panic!("{what} hangs"));
        };
        waits("a change of the graph", Box::new(|pool| drop(pool.export().root.quiesce())));
        pool.set_call(0, Some(full()));
        let start = start_of(&queues[1].ring, 0, true, &memory);
        waits("another ring's start", Box::new(move |pool| pool.start(1, start).unwrap()));
        pool.set_call(0, Some(full()));
        let table = table(&memory);
        waits("a new memory table", Box::new(move |pool| pool.set_memory(table)));
        pool.set_call(1, Some(full()));
        waits("a stop", Box::new(|pool| assert_eq!(pool.stop(0), Some(0))));
        waits("the other stop", Box::new(|pool| assert_eq!(pool.stop(1), Some(0))));
        waits("the end", Box::new(|pool| pool.disconnected()));
    }
}
