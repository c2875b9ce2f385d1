//! CRC32C (Castagnoli), the checksum of VHDX and of everything that vublk keeps beside images.

use crc_fast::{CrcAlgorithm, Digest};

/// The checksum of `data`.
#[inline]
pub fn crc32c(data: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(data)
}

/// The checksum of something whose beginning has the checksum `crc`, and that goes on with `data`.
pub fn crc32c_append(crc: u32, data: &[u8]) -> u32 {
    // The state within is the other way round.
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(!crc));
    digest.update(data);
    digest.finalize() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit by bit, as the polynomial has it.
    fn slowly(data: &[u8]) -> u32 {
        let step = |crc: u32| (crc >> 1) ^ (0x82f6_3b78 & 0u32.wrapping_sub(crc & 1));
        !data.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
    }

    #[test]
    fn checksums_are_those_of_the_polynomial() {
        // RFC 3720, B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        let data: Vec<u8> =
            (0..70_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        // One processor has different ways for different lengths.
        for len in (0..600).chain([1000, 1024, 4095, 4096, 4608, 5000, 65_536, 70_000]) {
            let data = &data[..len];
            let expected = slowly(data);
            assert_eq!(crc32c(data), expected, "{len} bytes");
            for cut in [0, 1, len / 3, len] {
                let (one, other) = data.split_at(cut.min(len));
                assert_eq!(
                    crc32c_append(crc32c(one), other),
                    expected,
                    "{len} bytes, cut at {cut}"
                );
            }
        }
    }
}
