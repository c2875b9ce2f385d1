//! What a guest has seen completed, and what is flushed, after the process was killed.

use std::pin::pin;
use std::task::{Context, Waker};

use super::*;

/// A job may fill the image while its guest comes.
#[test]
fn bits_that_were_being_set_when_the_session_began_are_on_disk() {
    let dir = state_dir();
    let file = SimFile::from_bytes("x.add-cow", new_file(200 * 512, false));
    let image = SimFile::from_bytes("disk.raw", vec![0; 200 * 512]);
    let disk = open_disk(&file, &image, Backing::None, Some(open_keep(dir.path(), 4096)));
    block_on(disk.resume(None)).unwrap();
    let (disk, durability) = (&disk, &disk.format().shared.durability);
    let (started, has_started) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel();
    let (begun, has_begun) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let set = || {
                started.send(()).unwrap();
                may_go_on.recv().unwrap();
            };
            assert_eq!(durability.commit(ByteRange { offset: 0, len: 512 }, set), Committed::Done);
        });
        has_started.recv().unwrap();
        scope.spawn(move || {
            disk.begin_session(7).unwrap();
            begun.send(()).unwrap();
        });
        // It may wait for the bits, or not.
        let _ = has_begun.recv_timeout(Duration::from_millis(50));
        go_on.send(()).unwrap();
    });
    // The guest's own writes to these sectors set no bits, and so are not recorded.
    assert!(durability.is_settled(), "a kill would take them away");
}

/// A record finds no room, and before its bit is set a flush begins: that one makes nothing good for
/// those who see the bit then without having it in its copy of the page.
#[test]
fn a_flush_beside_a_record_without_room_waits_for_its_bit() {
    let dir = state_dir();
    let file = SimFile::from_bytes("x.add-cow", new_file(200 * 512, false));
    let image = SimFile::from_bytes("disk.raw", vec![0; 200 * 512]);
    let disk = open_disk(&file, &image, Backing::None, Some(open_keep(dir.path(), 4096)));
    block_on(disk.resume(None)).unwrap();
    disk.begin_session(7).unwrap();
    let shared = &disk.format().shared;
    let durability = &shared.durability;
    let range = ByteRange { offset: 0, len: 512 };
    let full = (0..10_000).any(|_| durability.commit(range, || ()) == Committed::FlushFirst);
    assert!(full);
    let mut flush = pin!(shared.flush_all());
    let committed = durability.commit(range, || {
        assert!(flush.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    });
    assert_eq!(committed, Committed::FlushFirst);
    assert!(durability.must_wait_for_bits(false));
    block_on(flush).unwrap();
    assert!(!durability.must_wait_for_bits(false));
}

/// A write to a sector whose bit another one is just setting has nothing to set itself, and may complete
/// before that one has said what it did.
#[test]
fn a_flush_finds_bits_that_are_just_being_set() {
    let file = SimFile::from_bytes("x.add-cow", new_file(200 * 512, true));
    let image = SimFile::from_bytes("disk.raw", vec![0; 200 * 512]);
    let disk = open_disk(&file, &image, backing_of(Some(&[9; 4096])), None);
    let shared = &disk.format().shared;
    let mut flush = pin!(disk.flush());
    let mut is_flushed = false;
    block_on(shared.pin(0)).unwrap();
    let committed = shared.durability.commit(ByteRange { offset: 0, len: 512 }, || {
        shared.pages.set(0, 1);
        block_on(write(&disk, 0, &[7; 512])).unwrap();
        is_flushed = flush.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready();
    });
    assert_eq!(committed, Committed::Done);
    shared.pages.unpin(0);
    if !is_flushed {
        block_on(flush).unwrap();
    }
    let (file, image) = (file.after_power_cut(0), image.after_power_cut(0));
    let disk = open_disk(&file, &image, backing_of(Some(&[9; 4096])), None);
    assert_eq!(block_on(read(&disk, 0, 512)), [7; 512]);
}

#[test]
fn a_kill_loses_nothing_of_a_guest_that_comes_back() {
    for seed in 0..20 {
        let dir = state_dir();
        let mut rng = Rng::new(seed);
        let base = numbered(0x80, 100);
        let mut model = base.clone();
        model.resize(200 * 512, 0);
        let mut file = SimFile::from_bytes("x.add-cow", new_file(200 * 512, true));
        let mut image = SimFile::from_bytes("disk.raw", vec![0x55; 200 * 512]);
        for life in 0..6u8 {
            let keep = open_keep(dir.path(), 4096);
            let disk = open_disk(&file, &image, backing_of(Some(&base)), Some(keep));
            block_on(disk.resume((life > 0).then_some(7))).unwrap();
            disk.begin_session(7).unwrap();
            let content = block_on(read(&disk, 0, model.len() as u64));
            assert!(content == model, "seed {seed}, life {life}");
            // More records than the keep holds now and then.
            for _ in 0..rng.below(400) {
                let first = rng.below(200);
                let count = 1 + rng.below((200 - first).min(8));
                let range = ByteRange { offset: first * 512, len: count * 512 };
                let part = &mut model[range.offset as usize..range.end() as usize];
                match rng.below(20) {
                    0 => block_on(disk.flush()).unwrap(),
                    1 => {
                        part.fill(0);
                        block_on(disk.write_zeroes(range, true)).unwrap();
                    }
                    _ => {
                        part.fill(life + 1);
                        block_on(write(&disk, range.offset, part)).unwrap();
                    }
                }
            }
            (file, image) = killed(&file, &image);
        }
    }
}

#[test]
fn a_new_guest_finds_what_was_flushed_and_another_is_refused() {
    let dir = state_dir();
    let file = SimFile::from_bytes("x.add-cow", new_file(200 * 512, false));
    let image = SimFile::from_bytes("disk.raw", vec![0; 200 * 512]);
    let disk = open_disk(&file, &image, Backing::None, Some(open_keep(dir.path(), 4096)));
    block_on(disk.resume(None)).unwrap();
    disk.begin_session(7).unwrap();
    block_on(write(&disk, 0, &[1; 512])).unwrap();
    block_on(disk.flush()).unwrap();
    block_on(write(&disk, 512, &[2; 512])).unwrap();
    drop(disk);
    let (file, image) = killed(&file, &image);
    let disk = open_disk(&file, &image, Backing::None, Some(open_keep(dir.path(), 4096)));
    let err = block_on(disk.resume(Some(8))).unwrap_err();
    assert!(err.to_string().contains("another guest's session"), "{err}");
    block_on(disk.resume(None)).unwrap();
    assert_eq!(block_on(read(&disk, 0, 1024)), [[1; 512], [0; 512]].concat());
}

#[test]
fn after_a_guest_that_is_kept_for_comes_one_that_is_not() {
    let dir = state_dir();
    let (file, image, backing) = example();
    let disk = open_disk(&file, &image, backing, Some(open_keep(dir.path(), 4096)));
    disk.begin_session(7).unwrap();
    block_on(write(&disk, 512, &[1; 512])).unwrap();
    block_on(disk.resume(None)).unwrap();
    block_on(write(&disk, 1024, &[2; 512])).unwrap();
    assert_eq!(block_on(read(&disk, 512, 1024)), [[1; 512], [2; 512]].concat());
}

#[test]
fn a_session_begins_with_nothing_left_to_flush_and_goes_on_as_it_is() {
    let dir = state_dir();
    let (file, image, backing) = example();
    let disk = open_disk(&file, &image, backing, Some(open_keep(dir.path(), 4096)));
    block_on(write(&disk, 512, &[1; 512])).unwrap();
    disk.begin_session(7).unwrap();
    assert_eq!(file.durable()[2560] & 0b10, 0b10);
    block_on(write(&disk, 1024, &[2; 512])).unwrap();
    disk.begin_session(7).unwrap();
    assert_eq!(disk.keep().unwrap().found(), Some(7));
    disk.begin_session(8).unwrap();
    assert_eq!(disk.keep().unwrap().found(), None);
    assert_eq!(file.durable()[2560] & 0b110, 0b110);
}
