//! How large an image would be, by QEMU's arithmetic.

use super::CreateOptions;
use crate::error::{Error, Result};

/// Bytes of an L1, L2 or refcount table entry.
const ENTRY: u64 = 8;

/// The length that the file of a fully allocated image has, metadata included.
///
/// # Errors
/// If the options make no sense or the file would be larger than files can be.
pub fn fully_allocated(options: &CreateOptions) -> Result<u64> {
    options.check()?;
    let too_large = || Error::invalid(format!("an image of {} bytes is too large", options.size));
    // Far below where the sums could overflow; metadata is a small part of the data.
    if options.size > 1 << 62 {
        return Err(too_large());
    }
    let cluster = options.cluster_size;
    let per_cluster = cluster / ENTRY;
    let data = options.size.next_multiple_of(cluster);
    let l2_entries = (data / cluster).next_multiple_of(per_cluster);
    let l1_entries = (l2_entries / per_cluster).next_multiple_of(per_cluster);
    let tables = cluster + l2_entries * ENTRY + l1_entries * ENTRY;
    let counted = (tables + data) / cluster;
    let per_block = cluster * 8 / u64::from(options.refcount_bits);
    // The refcount structures count themselves, too.
    let (mut all, mut last) = (0, u64::MAX);
    let mut refcounts = 0;
    while all != last {
        last = all;
        let blocks = (counted + refcounts).div_ceil(per_block);
        refcounts = blocks + blocks.div_ceil(per_cluster);
        all = counted + refcounts;
    }
    (refcounts * cluster).checked_add(tables + data).ok_or_else(too_large)
}
