//! The body of the fuzz target `add_cow`: any bytes as an add-cow file.
//!
//! The file is opened, read, checked, written, repaired and opened again. Nothing may panic, what is
//! refused may not be modified, and a repaired file must read as it did before.

use std::sync::Arc;

use super::{AddCow, Backing, OpenOptions, check};
use crate::block::{Driver, FormatDriver};
use crate::io::sim::SimFile;
use crate::io::{AlignedBuf, File, block_on};

/// Size of the image file, in bytes. With an odd tail.
const IMAGE_LEN: usize = 700 * 512 + 100;

/// Tries one input.
pub fn run(bytes: &[u8]) {
    let file = SimFile::from_bytes("fuzz.add-cow", bytes.to_vec());
    let image = SimFile::from_bytes("fuzz.raw", vec![0x55; IMAGE_LEN]);
    let shared = Arc::new(file.clone()) as Arc<dyn File>;
    let checked = block_on(check::check(&shared, IMAGE_LEN as u64, false, false));
    let Some(before) = content(&file, &image) else {
        assert!(checked.is_err(), "refused to be opened, but not to be checked");
        assert_eq!(file.volatile(), bytes, "a refused file was modified");
        return;
    };
    assert_eq!(file.volatile(), bytes, "reading has modified the file");
    block_on(check::check(&shared, IMAGE_LEN as u64, true, true)).expect("it can be repaired");
    let found = block_on(check::check(&shared, IMAGE_LEN as u64, false, false)).expect("checked");
    assert_eq!((found.corruptions, found.leaks), (0, 0), "{:?}", found.findings);
    assert!(content(&file, &image).expect("opens") == before, "a repair has changed the disk");
    let disk = open(&file, &image).expect("opens");
    let buf = AlignedBuf::from_slice(&[7; 1024], 512);
    block_on(disk.write(698 * 512, buf.buffers(), true)).expect("it can be written");
    let after = content(&file, &image).expect("opens");
    assert!(after[..698 * 512] == before[..698 * 512] && after[698 * 512..] == [7; 1024]);
}

fn open(file: &SimFile, image: &SimFile) -> Option<FormatDriver<AddCow>> {
    let options = OpenOptions {
        read_only: false,
        image: Arc::new(image.clone()),
        backing: Backing::None,
        backing_format: None,
        keep: None,
    };
    block_on(AddCow::open(Arc::new(file.clone()), options)).and_then(FormatDriver::new).ok()
}

fn content(file: &SimFile, image: &SimFile) -> Option<Vec<u8>> {
    let disk = open(file, image)?;
    let buf = AlignedBuf::zeroed(disk.limits().size as usize, 512);
    block_on(disk.read(0, buf.buffers())).expect("what opens can be read");
    Some(buf.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::addcow::Header;
    use crate::io::sim::Rng;

    #[test]
    fn damaged_files_do_no_harm() {
        let header = Header { backing: Some("base.raw".into()), image: "disk.raw".into() };
        let mut good = header.encode().unwrap();
        good.extend((0..88).map(|i: u8| i.wrapping_mul(37)));
        for seed in 0..400 {
            let mut rng = Rng::new(seed);
            let mut bytes = good.clone();
            bytes.resize(rng.below(2800) as usize, rng.word() as u8);
            for _ in 0..rng.below(4) {
                let at = match rng.below(2) {
                    0 => rng.below(bytes.len() as u64 + 1),
                    _ => 2560 + rng.below(100),
                };
                if let Some(byte) = bytes.get_mut(at as usize) {
                    *byte = rng.word() as u8;
                }
            }
            run(&bytes);
        }
        run(&good);
        run(&[]);
    }
}
