//! Body of the fuzz target, in the library so that a plain test runs it, too.

use std::sync::Arc;

use crate::io::sim::SimFile;
use crate::io::{File, block_on};
use crate::write_log::sidecar::{self, Record, Sidecar};
use crate::write_log::{Index, Log, Start, Stop};

/// Takes bytes as a log, and as a log's sidecar, and reads them in every way there is. Panics if
/// an entry that is taken lies outside of the file, or if two ways disagree.
pub fn log(input: &[u8]) {
    let file: Arc<dyn File> = Arc::new(SimFile::from_bytes("fuzz.log", input.to_vec()));
    block_on(async {
        let _ = Record::from_bytes(input).map(|record| record.to_bytes());
        if let Ok(mut sidecar) = Sidecar::open(Arc::clone(&file)).await {
            for entry in [0, 1, 7, u64::MAX / 64, u64::MAX] {
                let _ = sidecar.record(entry).await;
            }
        }
        if let Ok(log) = Log::open(file).await {
            read_all_ways(&log, input.len() as u64).await;
        }
    });
}

async fn read_all_ways(log: &Log, len: u64) {
    let mut walk = log.walk_from(&Start::Entry(0)).await.expect("the first entry").with_data();
    let mut entries = Vec::new();
    let stop = Stop { next_flush: true, ..Stop::default() };
    let mut end = log.sector_size();
    while let Ok(Some(entry)) = walk.next().await {
        assert_eq!(entry.number, entries.len() as u64);
        assert_eq!(entry.position, end, "a gap");
        end = entry.end_position();
        assert!(end <= len, "past the end of the log");
        let _ = stop.at(&entry, walk.mark(), entry.number + 1);
        let _ = walk.mark().to_string();
        if let Some(data) = entry.data() {
            let at_once = log.read_bytes(data).await.expect("it lies inside of the log");
            if let Some(buffered) = walk.buffered(data) {
                let mut bytes = vec![0; data.len as usize];
                buffered.copy_to_slice(&mut bytes);
                assert_eq!(bytes, at_once);
            }
        }
        let again = log.entry_at(entry.number, entry.position).await.expect("it was taken before");
        assert_eq!(again, entry);
        entries.push(entry);
    }
    if let Ok(index) = Index::read(log).await {
        assert_eq!(index.entries(), entries);
        let _ = (index.mark_before(3), index.mark_after(3), index.highest_byte());
    }
    for entry in entries.iter().take(4) {
        let record = Record {
            entry: entry.number,
            log_sector: entry.log_sector(),
            submitted: 0,
            completed: 1,
            queue: None,
            crc: 0,
            state: sidecar::RecordState::Whole,
        };
        sidecar::matches(log, entry, &record).await.expect("it lies inside of the log");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::sim::Rng;
    use crate::units::ByteRange;
    use crate::write_log::LogBuilder;

    /// The seeds that the fuzzer starts from (`fuzz/seeds/write_log`).
    fn seeds() -> Vec<Vec<u8>> {
        let small = LogBuilder::new(512).mark("m").write(512, &[7; 1024]).flush();
        let large = LogBuilder::new(4096).discard(ByteRange { offset: 0, len: 8192 }).flush();
        vec![
            LogBuilder::new(512).finish(),
            small.discard(ByteRange { offset: 0, len: 512 }).finish(),
            large.write(0, &[1; 4096]).finish(),
        ]
    }

    #[test]
    fn damaged_logs_do_no_harm() {
        let mut rng = Rng::new(5);
        for seed in seeds() {
            log(&seed);
            for _ in 0..3000 {
                let mut bytes = seed.clone();
                for _ in 0..1 + rng.below(4) {
                    // Mostly where numbers are.
                    let at = match rng.below(4) {
                        0 => rng.below(bytes.len() as u64),
                        1 => rng.below(32),
                        _ => (rng.below(bytes.len() as u64 / 512) * 512) + rng.below(40),
                    };
                    bytes[at as usize] = match rng.below(3) {
                        0 => 0xff,
                        1 => rng.below(9) as u8,
                        _ => rng.word() as u8,
                    };
                }
                bytes.truncate(rng.below(bytes.len() as u64 * 3) as usize);
                log(&bytes);
            }
        }
    }

    #[test]
    fn the_seeds_of_the_fuzzer_are_these() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/write_log");
        for (at, seed) in seeds().into_iter().enumerate() {
            let file = dir.join(format!("log-{at}"));
            if std::env::var_os("VUBLK_WRITE_SEEDS").is_some() {
                std::fs::create_dir_all(&dir).unwrap();
                std::fs::write(&file, &seed).unwrap();
            }
            assert!(std::fs::read(&file).unwrap() == seed, "{}", file.display());
        }
    }
}
