//! Random numbers that can be repeated.

use std::sync::OnceLock;

/// A small generator (xorshift), seeded by the clock and printed, or by `VUBLK_TEST_SEED`.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A generator of its own for the test called `name`: all of a run derive from one seed.
    pub fn new(name: &str) -> Random {
        static SEED: OnceLock<u64> = OnceLock::new();
        let seed = *SEED.get_or_init(|| match std::env::var("VUBLK_TEST_SEED") {
            Ok(text) => text.parse().expect("VUBLK_TEST_SEED is a number"),
            Err(_) => {
                std::time::SystemTime::UNIX_EPOCH.elapsed().expect("a clock").as_nanos() as u64
            }
        });
        eprintln!("{name}: VUBLK_TEST_SEED={seed}");
        let mut state = seed | 1;
        for byte in name.bytes() {
            state = (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3) | 1;
        }
        let mut random = Random(state);
        (0..8).for_each(|_| _ = random.next());
        random
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// So many random bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}
