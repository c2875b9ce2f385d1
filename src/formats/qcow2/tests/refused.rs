//! What is not opened, not made, and not believed.

use super::*;

#[test]
fn only_what_the_caller_opened_is_used() {
    let file = new_image(&backed(1 << 20, 65536, true), Alignment::NONE);
    let header = block_on(Header::read(&(Arc::new(file.clone()) as Arc<dyn File>))).unwrap();
    let backing = header.backing.clone().unwrap();
    assert_eq!((backing.file.as_str(), backing.format.as_deref()), ("base.raw", Some("raw")));
    let open = |backing| {
        let options = OpenOptions { backing, ..OpenOptions::default() };
        block_on(Qcow2::open(Arc::new(file.clone()), options))
    };
    let err = open(None).unwrap_err();
    assert!(err.to_string().contains("'base.raw', which was not opened"), "{err}");
    let details = open(Some(raw_node(&[0; 512], Alignment::NONE))).unwrap().details();
    assert_eq!(details["compat"], "1.1");
    assert_eq!(details["backing-filename"], "base.raw");
    let plain = new_image(&CreateOptions::new(1 << 20), Alignment::NONE);
    let options =
        OpenOptions { backing: Some(raw_node(&[0; 512], Alignment::NONE)), ..Default::default() };
    block_on(Qcow2::open(Arc::new(plain), options)).unwrap_err();
}

#[test]
fn features_that_are_not_supported_are_named() {
    let image = new_image(&CreateOptions::new(1 << 20), Alignment::NONE).durable();
    let cases: [(usize, u8, bool, &str); 8] = [
        (79, 1, false, "qemu-img check -r all"),
        (79, 2, false, "marked corrupt"),
        (79, 4, true, "external data file"),
        (79, 8, true, "compression type"),
        (79, 16, true, "extended L2"),
        (78, 1, true, "incompatible feature 8"),
        (35, 1, true, "encrypted (AES)"),
        (35, 2, true, "encrypted (LUKS)"),
    ];
    for (at, value, refused_read_only, expected) in cases {
        let mut bytes = image.clone();
        bytes[at] = value;
        let file = SimFile::from_bytes("disk.qcow2", bytes.clone());
        let open = |read_only| {
            let options = OpenOptions { read_only, ..OpenOptions::default() };
            block_on(Qcow2::open(Arc::new(file.clone()), options))
        };
        let err = open(false).unwrap_err();
        assert!(err.to_string().contains(expected), "{err}");
        assert!(err.to_string().starts_with("disk.qcow2: "), "{err}");
        match open(true) {
            Ok(image) => {
                assert!(!refused_read_only);
                let driver = FormatDriver::new(image).unwrap();
                assert_eq!(block_on(read(&driver, 0, 512)), [0; 512]);
                let err = block_on(write(&driver, 0, &[1; 512])).unwrap_err();
                assert_eq!(err.kind(), ErrorKind::ReadOnly);
                block_on(driver.close()).unwrap();
            }
            Err(err) => assert!(refused_read_only && err.to_string().contains(expected), "{err}"),
        }
        assert_eq!(file.volatile(), bytes, "a refused image was modified");
    }
}

#[test]
fn bad_create_options_are_refused() {
    let good = CreateOptions::new(1 << 20);
    let named = |format: Option<&str>| {
        Some(Backing { file: "x".into(), format: format.map(str::to_string) })
    };
    let cases = [
        (CreateOptions { size: 100, ..good.clone() }, "multiple of 512"),
        (CreateOptions { cluster_size: 256, ..good.clone() }, "cluster size 256"),
        (CreateOptions { cluster_size: 3 << 10, ..good.clone() }, "cluster size 3072"),
        (CreateOptions { refcount_bits: 3, ..good.clone() }, "refcount width 3"),
        (CreateOptions { backing: named(None), ..good.clone() }, "format of backing file 'x'"),
    ];
    for (options, expected) in cases {
        let file = SimFile::new("new.qcow2");
        let err = block_on(create(Arc::new(file.clone()), &options)).unwrap_err();
        assert!(err.to_string().contains(expected), "{err}");
        assert!(file.volatile().is_empty());
    }
    let file = SimFile::from_bytes("new.qcow2", vec![1; 512]);
    block_on(create(Arc::new(file), &good)).unwrap_err();
}

#[test]
fn hostile_images_are_refused_or_read_without_harm() {
    let base = random_bytes(1, 128 << 10);
    let file = new_image(&backed(1 << 20, 4096, true), Alignment::NONE);
    let driver = open_image(&file, Some(raw_node(&base, Alignment::NONE)), None);
    for i in 0..40 {
        block_on(write(&driver, i * 20480, &[i as u8 + 1; 512])).unwrap();
    }
    block_on(driver.close()).unwrap();
    drop(driver);
    let good = file.durable();
    let mut opened = 0;
    for seed in 0..1500 {
        let mut rng = Rng::new(seed);
        let mut bytes = good.clone();
        if rng.one_in(4) {
            bytes.truncate(rng.below(good.len() as u64) as usize);
        }
        for _ in 0..1 + rng.below(4) {
            // The header, the tables, or anywhere; a byte or a whole big-endian field.
            let reach = [112, 512, 5 * 4096, bytes.len() as u64][rng.below(4) as usize];
            let at = rng.below(reach.min(bytes.len() as u64)) as usize;
            if rng.one_in(2) {
                let Some(byte) = bytes.get_mut(at) else { continue };
                *byte = rng.word() as u8;
            } else {
                let at = at & !7;
                let Some(field) = bytes.get_mut(at..at + 8) else { continue };
                let value = match rng.below(5) {
                    0 => u64::MAX,
                    1 => 0,
                    2 => 1 << rng.below(64),
                    3 => rng.below(1 << 24) << 9,
                    _ => u64::from_be_bytes(field.try_into().unwrap()).wrapping_add(512),
                };
                field.copy_from_slice(&value.to_be_bytes());
            }
        }
        let file = SimFile::from_bytes("hostile.qcow2", bytes);
        for read_only in [true, false] {
            let backing =
                |header: &Header| header.backing.as_ref().map(|_| raw_node(&base, Alignment::NONE));
            let shared: Arc<dyn File> = Arc::new(file.clone());
            let Ok(header) = block_on(Header::read(&shared)) else { continue };
            let options =
                OpenOptions { read_only, backing: backing(&header), ..Default::default() };
            let Ok(image) = block_on(Qcow2::open(shared, options)) else { continue };
            opened += 1;
            let driver = FormatDriver::new(image).unwrap();
            let size = driver.limits().size;
            for _ in 0..10 {
                let request = random_request(&mut rng, size.clamp(512, 1 << 40), 512, 64);
                let buf = AlignedBuf::zeroed(4096, 512);
                let offset = align_down(rng.below(size.saturating_sub(4096)), 512);
                if size >= 4096 {
                    let _ = block_on(driver.read(offset, buf.buffers()));
                }
                if !read_only && size >= 512 {
                    let _ = block_on(perform(&driver, &request));
                }
            }
            let _ = block_on(driver.flush());
        }
    }
    assert!(opened > 300, "only {opened} of the images could be opened: the test is too harsh");
}
