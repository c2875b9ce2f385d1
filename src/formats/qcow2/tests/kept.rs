//! What completed survives the death of the process.

use std::sync::mpsc;
use std::time::Duration;

use super::*;

#[test]
fn what_completed_survives_a_kill_for_the_same_guest_only() {
    for seed in 0..60 {
        let mut rng = Rng::new(seed);
        let cluster_size = [512, 4096, 65536][rng.below(3) as usize];
        let with_backing = rng.one_in(2);
        let size = 30 * cluster_size.max(4096);
        let base = random_bytes(seed, size / 2);
        let node = || with_backing.then(|| raw_node(&base, Alignment::NONE));
        let dir = state_dir();
        let keep = || Keep::open_with_capacity(dir.path(), IMAGE, "qcow2", 1 << 20).unwrap();
        let file = new_image(&backed(size, cluster_size, with_backing), Alignment::NONE);
        let mut model = vec![0; size as usize];
        if with_backing {
            model[..base.len()].copy_from_slice(&base);
        }
        let mut driver = open_image(&file, node(), Some(keep()));
        block_on(driver.resume(None)).unwrap();
        let mut nonce = 1000;
        driver.begin_session(nonce).unwrap();
        for _ in 0..6 {
            for _ in 0..rng.below(25) {
                let request = random_request(&mut rng, size, 512, 200);
                block_on(perform(&driver, &request)).unwrap();
                block_on(perform_on_model(&driver, &mut model, &request));
            }
            // Killed: nothing is closed or flushed; the page cache lives on.
            drop(driver);
            driver = open_image(&file, node(), Some(keep()));
            block_on(driver.resume(Some(nonce))).unwrap();
            let content = block_on(read(&driver, 0, size));
            assert!(content == model, "seed {seed}: a completed write was lost");
            nonce += 1;
            driver.begin_session(nonce).unwrap();
        }
        let named = with_backing.then_some(&base[..]);
        check_with_qemu(&file.volatile(), None, named, &format!("seed {seed}"));

        // A new guest gets what was flushed, and nothing of what was kept.
        block_on(driver.flush()).unwrap();
        let flushed = block_on(read(&driver, 0, size));
        let whole = ByteRange { offset: 0, len: size };
        block_on(driver.write_zeroes(whole, true)).unwrap();
        block_on(write(&driver, 0, &[9; 512])).unwrap();
        drop(driver);
        let driver = open_image(&file, node(), Some(keep()));
        let err = block_on(driver.resume(Some(7))).unwrap_err();
        assert!(err.to_string().contains("another guest's session"), "{err}");
        block_on(driver.resume(None)).unwrap();
        // (The last write went into its cluster's place, which is the flushed one.)
        let content = block_on(read(&driver, 0, size));
        let rest = cluster_size as usize..;
        assert!(content[rest.clone()] == flushed[rest], "seed {seed}: unflushed state shows");
        driver.begin_session(1).unwrap();
        block_on(driver.close()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "keep left behind");
    }
}

/// What is noted for the guest (in its in-flight region) follows the root from node to node.
#[test]
fn it_is_noted_whether_a_guests_writes_are_kept() {
    let dir = state_dir();
    let raw = || {
        let file = SimFile::with_alignment("raw", vec![0; 65536], Alignment::NONE);
        let options = NodeOptions { name: "raw".into(), read_only: false, ..Default::default() };
        Node::new(Arc::new(Raw::open(Arc::new(file), false).unwrap()), options)
    };
    let qcow2 = |keep| {
        let file = new_image(&backed(65536, 4096, false), Alignment::NONE);
        let options = NodeOptions { name: "qcow2".into(), read_only: false, ..Default::default() };
        Node::new(Arc::new(open_image(&file, None, keep)), options)
    };
    let keep = Keep::open(dir.path(), IMAGE, "qcow2").unwrap();
    let noted = Arc::new(Mutex::new(None));
    let root = Root::new("disk", raw());
    root.resume(None).unwrap();
    let note = Arc::clone(&noted);
    root.begin_session(1, move |kept| *note.lock().unwrap() = Some(kept)).unwrap();
    assert_eq!(*noted.lock().unwrap(), Some(false));
    root.replace_node(qcow2(Some(keep)), &root.quiesce()).unwrap();
    assert_eq!(*noted.lock().unwrap(), Some(true));
    root.replace_node(qcow2(None), &root.quiesce()).unwrap();
    assert_eq!(*noted.lock().unwrap(), Some(false));
    *noted.lock().unwrap() = Some(true);
    root.end_session();
    assert_eq!((*noted.lock().unwrap(), root.session()), (Some(false), None));
}

#[test]
fn after_a_guest_that_is_kept_for_comes_one_that_is_not() {
    let dir = state_dir();
    let file = new_image(&CreateOptions::new(1 << 20), Alignment::NONE);
    let keep = Keep::open(dir.path(), IMAGE, "qcow2").unwrap();
    let driver = open_image(&file, None, Some(keep));
    driver.begin_session(1).unwrap();
    block_on(write(&driver, 0, &[1; 512])).unwrap();
    block_on(driver.resume(None)).unwrap();
    block_on(write(&driver, 65536, &[2; 512])).unwrap();
    assert_eq!(block_on(read(&driver, 0, 512)), [1; 512]);
    assert_eq!(block_on(read(&driver, 65536, 512)), [2; 512]);
}

#[test]
fn a_session_begins_with_nothing_left_to_flush_and_goes_on_as_it_is() {
    let dir = state_dir();
    let file = new_image(&CreateOptions::new(1 << 20), Alignment::NONE);
    let keep = Keep::open(dir.path(), IMAGE, "qcow2").unwrap();
    let driver = open_image(&file, None, Some(keep));
    block_on(write(&driver, 0, &[1; 512])).unwrap();
    driver.begin_session(1).unwrap();
    block_on(write(&driver, 65536, &[2; 512])).unwrap();
    driver.begin_session(1).unwrap();
    assert_eq!(driver.keep().unwrap().found(), Some(1));
    driver.begin_session(2).unwrap();
    assert_eq!(driver.keep().unwrap().found(), None);
    let again = open_image(&file, None, None);
    assert_eq!(block_on(read(&again, 0, 512)), [1; 512]);
    assert_eq!(block_on(read(&again, 65536, 512)), [2; 512]);
}

/// A job may fill the image while its guest comes.
#[test]
fn a_write_that_was_under_way_when_the_session_began_carries_the_guests_own() {
    let dir = state_dir();
    let file = new_image(&CreateOptions::new(1 << 20), Alignment::NONE);
    let keep = || Keep::open(dir.path(), IMAGE, "qcow2").unwrap();
    let driver = open_image(&file, None, Some(keep()));
    let (started, has_started) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel();
    let (begun, has_begun) = mpsc::channel();
    let image = &driver;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            block_on(async {
                let range = ByteRange { offset: 0, len: 65536 };
                let place = image.format().prepare_write(range).await.unwrap();
                let data = AlignedBuf::from_slice(&[1; 65536], 4096);
                place.file.write(place.offset, data.buffers(), false).await.unwrap();
                started.send(()).unwrap();
                may_go_on.recv().unwrap();
                place.commit.unwrap().commit().await.unwrap();
            });
        });
        has_started.recv().unwrap();
        scope.spawn(move || {
            image.begin_session(1).unwrap();
            begun.send(()).unwrap();
        });
        // It may wait for the write, or not.
        let _ = has_begun.recv_timeout(Duration::from_millis(50));
        go_on.send(()).unwrap();
    });
    block_on(write(&driver, 512, &[2; 512])).unwrap();
    // Killed.
    drop(driver);
    let driver = open_image(&file, None, Some(keep()));
    block_on(driver.resume(Some(1))).unwrap();
    assert!(block_on(read(&driver, 512, 512)) == [2; 512], "a completed write was lost");
    block_on(driver.close()).unwrap();
}

#[test]
fn killed_in_the_middle_of_requests_and_flushes() {
    for seed in 0..120 {
        let mut rng = Rng::new(seed);
        let cluster_size = [512, 4096, 65536][rng.below(3) as usize];
        let lanes = 4u64;
        let size = 40 * cluster_size.max(4096);
        let dir = state_dir();
        let keep = || Keep::open_with_capacity(dir.path(), IMAGE, "qcow2", 256 << 10).unwrap();
        let file = new_image(&backed(size, cluster_size, false), Alignment::NONE);
        // Of each block: the values it may have, the last completed one first.
        let model: Mutex<Vec<Vec<u8>>> = Mutex::new(vec![vec![0]; (size / 512) as usize]);
        for nonce in 1..5 {
            let driver = open_image(&file, None, Some(keep()));
            if nonce == 1 {
                block_on(driver.resume(None)).unwrap();
            } else {
                block_on(driver.resume(Some(nonce - 1))).unwrap();
            }
            driver.begin_session(nonce).unwrap();
            let content = block_on(read(&driver, 0, size));
            for (block, possible) in model.lock().unwrap().iter_mut().enumerate() {
                let found = content[block * 512];
                assert!(content[block * 512..][..512].iter().all(|byte| *byte == found));
                assert!(possible.contains(&found), "seed {seed}: block {block} is {found}");
                *possible = vec![found];
            }
            let sim = Sim::new(rng.word());
            sim.attach(&file);
            let tasks: Vec<SimTask<'_>> = (0..lanes)
                .map(|i| {
                    let (driver, model) = (&driver, &model);
                    let mut rng = Rng::new(rng.word());
                    Box::pin(async move {
                        for _ in 0..12 {
                            if rng.one_in(8) {
                                driver.flush().await.unwrap();
                                continue;
                            }
                            let block = rng.below(size / 512 / lanes) * lanes + i;
                            let value = rng.word() as u8;
                            model.lock().unwrap()[block as usize].push(value);
                            write(driver, block * 512, &[value; 512]).await.unwrap();
                            model.lock().unwrap()[block as usize] = vec![value];
                        }
                    }) as SimTask<'_>
                })
                .collect();
            let stop = rng.below(250);
            sim.run_until(tasks, |step| step >= stop);
            drop(driver);
            // What the kernel was told to do happens, process or not.
            sim.drain();
            sim.detach(&file);
        }
        check_with_qemu(&file.volatile(), None, None, &format!("seed {seed}"));
    }
}

#[test]
fn without_a_keep_writes_that_allocate_wait_for_the_disk() {
    let file = new_image(&CreateOptions::new(1 << 20), Alignment::NONE);
    let driver = open_image(&file, None, None);
    driver.begin_session(1).unwrap();
    block_on(write(&driver, 0, &[1; 512])).unwrap();
    let flushes = file.count(SimOp::Flush);
    block_on(write(&driver, 512, &[2; 512])).unwrap();
    assert_eq!(file.count(SimOp::Flush), flushes, "a mapped cluster costs nothing extra");
    block_on(driver.discard(ByteRange { offset: 0, len: 65536 })).unwrap();
    block_on(write(&driver, 65536, &[3; 512])).unwrap();
    drop(driver);
    let driver = open_image(&file, None, None);
    assert_eq!(block_on(read(&driver, 0, 512)), [0; 512]);
    assert_eq!(block_on(read(&driver, 65536, 512)), [3; 512]);
}

#[test]
fn a_mapped_cluster_costs_no_record() {
    let dir = state_dir();
    let file = new_image(&CreateOptions::new(1 << 20), Alignment::NONE);
    let keep = Keep::open(dir.path(), IMAGE, "qcow2").unwrap();
    let path = keep.path().to_path_buf();
    let driver = open_image(&file, None, Some(keep));
    driver.begin_session(1).unwrap();
    block_on(write(&driver, 0, &[1; 65536])).unwrap();
    assert!(std::fs::metadata(&path).unwrap().len() > 65536, "not recorded");
    block_on(driver.flush()).unwrap();
    use std::os::unix::fs::MetadataExt;
    let blocks = std::fs::metadata(&path).unwrap().blocks();
    block_on(write(&driver, 4096, &[2; 4096])).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().blocks(), blocks, "recorded without need");
}

/// What is kept must lie inside the disk that the next process finds.
#[test]
fn a_guest_comes_back_after_a_kill_while_the_disk_grows() {
    let base = random_bytes(5, 2 << 20);
    let mut is_done = false;
    for stop in 0.. {
        if is_done {
            break;
        }
        let dir = state_dir();
        let file = new_image(&backed(100 << 10, 65536, true), Alignment::NONE);
        let open = |file: &SimFile| {
            let keep = Keep::open(dir.path(), IMAGE, "qcow2").unwrap();
            open_image(file, Some(raw_node(&base, Alignment::NONE)), Some(keep))
        };
        let driver = open(&file);
        driver.begin_session(7).unwrap();
        block_on(write(&driver, 512, &[1; 512])).unwrap();
        let sim = Sim::new(stop);
        sim.attach(&file);
        let grow: SimTask<'_> = Box::pin(async {
            driver.resize(1 << 20).await.unwrap();
            is_done = true;
        });
        sim.run_until(vec![grow], |step| step >= stop);
        drop(driver);
        let driver = open(&file.after_kill());
        let back = block_on(driver.resume(Some(7)));
        back.unwrap_or_else(|err| panic!("killed after {stop} steps: {err}"));
        assert_eq!(block_on(read(&driver, 512, 512)), [1; 512]);
    }
}

/// Without a keep, who zeroes a cluster completes once that is on disk, and not only who was the first.
#[test]
fn a_cluster_that_is_being_zeroed_is_not_yet_zero() {
    let cluster = ByteRange { offset: 0, len: 65536 };
    for range in [cluster, ByteRange { offset: 4096, len: 4096 }] {
        let file = new_image(&backed(4 * cluster.len, cluster.len, false), Alignment::NONE);
        let driver = open_image(&file, None, None);
        driver.begin_session(1).unwrap();
        block_on(write(&driver, 0, &vec![1; cluster.len as usize])).unwrap();
        block_on(driver.flush()).unwrap();
        let sim = Sim::new(0);
        sim.attach(&file);
        let first = Box::pin(async { driver.write_zeroes(cluster, false).await.unwrap() });
        let mut killed = None;
        let second = Box::pin(async {
            driver.write_zeroes(range, false).await.unwrap();
            killed = Some(file.after_kill());
        });
        sim.overtake(first, || driver.format().is_dirty(), second);
        let again = open_image(&killed.unwrap(), None, None);
        let found = block_on(read(&again, range.offset, range.len));
        assert!(found.iter().all(|byte| *byte == 0), "{range}");
    }
}
