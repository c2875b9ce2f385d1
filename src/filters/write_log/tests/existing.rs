//! Where there is a log already: it is continued, refused, appended to or overwritten.

use super::*;

#[test]
fn a_log_goes_on_after_it_was_closed() {
    let bed = Bed::new();
    block_on(async {
        let filter = bed.open();
        write(&filter, 1, 1, 1).await.unwrap();
        filter.close().await.unwrap();
    });
    let again = bed.after_kill();
    let (filter, began) = again.try_open(Settings::default()).unwrap();
    assert_eq!(began, Began::After { entries: 2, counted_in: 0 });
    block_on(async {
        write(&filter, 2, 2, 1).await.unwrap();
        filter.close().await.unwrap();
    });
    let end = "M:dm-log-writes-end";
    assert_eq!(again.words(), ["W1+1", end, "W2+1", end]);
    // Nothing new, no other mark.
    let third = again.after_kill();
    block_on(third.open().close()).unwrap();
    assert_eq!(third.words().len(), 4);
}

#[test]
fn logs_of_others_are_refused_unless_somebody_insists() {
    let bed = Bed::new();
    block_on(async {
        let filter = bed.open();
        write(&filter, 1, 1, 1).await.unwrap();
        filter.close().await.unwrap();
    });
    let own = bed.after_kill();
    let foreign = Bed { sidecar: SimFile::new("w.log.sidecar"), ..bed.after_kill() };
    let before = foreign.log.volatile();
    let err = foreign.try_open(Settings::default()).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::InvalidArgument);
    let text = err.to_string();
    assert!(
        text.starts_with("w.log: holds a log already") && text.contains("--log-append"),
        "{err}"
    );
    assert!(text.contains("there is no sidecar w.log.sidecar"), "{text}");
    assert_eq!(foreign.log.volatile(), before);
    // As another image's.
    let other = own.after_kill();
    let subject =
        Subject { image: ImageIdentity { file: (1, 7), ..own.subject().image }, ..other.subject() };
    let (log, sidecar) = (Arc::new(other.log.clone()), Arc::new(other.sidecar.clone()));
    let err = block_on(open(subject, log, sidecar, Settings::default())).unwrap_err().to_string();
    assert!(err.contains("of another image, /disks/disk"), "{err}");
    // Told to append.
    let append = Settings { existing: Existing::Append, ..Settings::default() };
    let (filter, began) = foreign.try_open(append).unwrap();
    assert_eq!(began, Began::After { entries: 2, counted_in: 0 });
    block_on(async {
        write(&filter, 5, 5, 1).await.unwrap();
        filter.flush().await.unwrap();
    });
    assert_eq!(foreign.words(), ["W1+1", "M:dm-log-writes-end", "W5+1", "F"]);
    // Told to overwrite; what was there stays behind the count.
    let overwrite = Settings { existing: Existing::Overwrite, ..Settings::default() };
    let (filter, began) = own.try_open(overwrite).unwrap();
    assert_eq!(began, Began::New);
    block_on(filter.flush()).unwrap();
    assert_eq!(own.words(), ["F"]);
    // No log at all.
    let photo = Bed { log: SimFile::from_bytes("w.log", vec![0x55; 4096]), ..Bed::new() };
    for settings in [Settings::default(), append] {
        let err = photo.try_open(settings).unwrap_err().to_string();
        assert!(err.contains("neither empty nor a log"), "{err}");
    }
    photo.try_open(overwrite).unwrap();
    // Space that was set aside.
    let zeros = Bed { log: SimFile::from_bytes("w.log", vec![0; 4096]), ..Bed::new() };
    assert_eq!(zeros.try_open(Settings::default()).unwrap().1, Began::New);
}

/// Whoever overwrites a log has taken a new base: what was in it must not come back.
#[test]
fn a_log_that_could_not_be_overwritten_is_not_taken_for_the_new_one() {
    let bed = Bed::new();
    block_on(async {
        let filter = bed.open();
        write(&filter, 1, 1, 1).await.unwrap();
        filter.close().await.unwrap();
    });
    let overwrite = Settings { existing: Existing::Overwrite, ..Settings::default() };
    for op in [SimOp::Write, SimOp::Flush] {
        for file in 0..2 {
            for after in 0..3 {
                let again = bed.after_kill();
                let fault = Fault { op: Some(op), after, errno: libc::EIO, for_good: true };
                [&again.log, &again.sidecar][file].fail(fault);
                // As good as killed there.
                let _ = again.try_open(overwrite);
                let case = format!("{op:?} {after} of file {file}");
                let next = again.after_kill();
                let (filter, began) = next.try_open(overwrite).unwrap();
                let nothing = Began::After { entries: 0, counted_in: 0 };
                assert!([Began::New, nothing].contains(&began), "{case}: {began:?}");
                block_on(filter.flush()).unwrap();
                assert_eq!(next.words(), ["F"], "{case}");
            }
        }
    }
}

/// One that cannot be read to its end is what somebody overwrites who has read the message.
#[test]
fn a_damaged_log_that_was_ended_is_overwritten() {
    let bed = Bed::new();
    block_on(async {
        let filter = bed.open();
        write(&filter, 1, 1, 1).await.unwrap();
        filter.close().await.unwrap();
    });
    let mut log = bed.log.volatile();
    log[512 + 16] = 0xff;
    let mut sidecar = bed.sidecar.volatile();
    sidecar.truncate(4096);
    let (log, sidecar) = (SimFile::from_bytes("w.log", log), SimFile::from_bytes("s", sidecar));
    let damaged = Bed { log, sidecar, ..bed };
    let err = damaged.try_open(Settings::default()).unwrap_err().to_string();
    assert!(err.contains("entry 0: unknown flags"), "{err}");
    let overwrite = Settings { existing: Existing::Overwrite, ..Settings::default() };
    assert_eq!(damaged.try_open(overwrite).unwrap().1, Began::New);
}

/// A copy of the log that somebody has put back.
#[test]
fn an_older_copy_of_a_log_is_not_continued() {
    let bed = Bed::new();
    let record = |bed: &Bed, sector| {
        let filter = bed.open();
        block_on(async {
            write(&filter, sector, 1, 1).await.unwrap();
            filter.close().await.unwrap();
        });
    };
    record(&bed, 1);
    let old = bed.log.volatile();
    let later = bed.after_kill();
    record(&later, 2);
    let mixed = Bed { log: SimFile::from_bytes("w.log", old), ..later.after_kill() };
    let err = mixed.try_open(Settings::default()).unwrap_err().to_string();
    assert!(err.contains("does not belong to it"), "{err}");
    // The sidecar of another log of this image.
    let other = Bed { sidecar: later.sidecar.clone(), ..Bed::new() };
    let foreign = Bed::new();
    record(&foreign, 5);
    let mixed =
        Bed { sidecar: SimFile::from_bytes("s", other.sidecar.volatile()), ..foreign.after_kill() };
    let err = mixed.try_open(Settings::default()).unwrap_err().to_string();
    assert!(err.contains("does not belong to it"), "{err}");
}

#[test]
fn a_log_whose_process_died_is_never_started_anew() {
    let bed = Bed::new();
    let filter = bed.open();
    block_on(write(&filter, 1, 1, 1)).unwrap();
    let next = bed.after_kill();
    let overwrite = Settings { existing: Existing::Overwrite, ..Settings::default() };
    let (filter, began) = next.try_open(overwrite).unwrap();
    assert_eq!(began, Began::After { entries: 1, counted_in: 1 });
    block_on(filter.flush()).unwrap();
    assert_eq!(next.words(), ["W1+1", "F"]);
}

#[test]
fn after_the_host_went_down_a_log_is_not_continued() {
    let bed = Bed::new();
    let filter = bed.open();
    block_on(filter.flush()).unwrap();
    let mut sidecar = bed.sidecar.volatile();
    let header = crate::write_log::sidecar::Header::from_bytes(&sidecar).unwrap();
    let header = crate::write_log::sidecar::Header { boot_id: [b'x'; 40], ..header };
    sidecar[..4096].copy_from_slice(&header.to_bytes().unwrap());
    let next = Bed { sidecar: SimFile::from_bytes("s", sidecar), ..bed.after_kill() };
    let err = next.try_open(Settings::default()).unwrap_err().to_string();
    assert!(err.contains("the host went down"), "{err}");
    next.try_open(Settings { existing: Existing::Append, ..Settings::default() }).unwrap();
}
