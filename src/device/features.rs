//! What the device offers: virtio feature bits and vhost-user protocol feature bits.
//!
//! Front-ends accept whatever they know of what is offered (QEMU acknowledges every protocol bit),
//! and some of it changes how they behave. So nothing is offered that is not implemented, and what
//! is left out on purpose says why below.

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_bindings::{virtio_blk, virtio_config, virtio_ring};

/// Largest number of queues a device serves.
pub const MAX_QUEUES: u16 = 64;
/// Largest ring a front-end may set up.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// The device follows virtio 1.x: little-endian rings, any descriptor layout.
pub const VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;
/// A descriptor may point to a table of descriptors.
pub const INDIRECT_DESC: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
/// Interrupts and kicks are suppressed by index instead of by flag.
pub const EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
/// `seg_max` in the config space is valid.
pub const SEG_MAX: u64 = 1 << virtio_blk::VIRTIO_BLK_F_SEG_MAX;
/// The disk cannot be written.
pub const RO: u64 = 1 << virtio_blk::VIRTIO_BLK_F_RO;
/// `blk_size` in the config space is valid.
pub const BLK_SIZE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_BLK_SIZE;
/// The device knows FLUSH, and without it writes may be volatile.
pub const FLUSH: u64 = 1 << virtio_blk::VIRTIO_BLK_F_FLUSH;
/// The topology in the config space is valid.
pub const TOPOLOGY: u64 = 1 << virtio_blk::VIRTIO_BLK_F_TOPOLOGY;
/// The guest may switch between writeback and writethrough.
pub const CONFIG_WCE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;
/// There may be more than one queue.
pub const MQ: u64 = 1 << virtio_blk::VIRTIO_BLK_F_MQ;
/// The device knows DISCARD.
pub const DISCARD: u64 = 1 << virtio_blk::VIRTIO_BLK_F_DISCARD;
/// The device knows WRITE_ZEROES.
pub const WRITE_ZEROES: u64 = 1 << virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES;
/// The device can log the pages it writes, for migration (vhost's own bit).
pub const LOG_ALL: u64 = 1 << 26;
/// The device speaks protocol features (vhost-user's own bit).
pub const PROTOCOL_FEATURES: u64 = 1 << 30;

/// The virtio feature bits to offer.
///
/// Left out on purpose: SIZE_MAX (Linux would clamp segments), GEOMETRY (nobody needs it),
/// NOTIFICATION_DATA and RING_RESET (front-ends would accept them and change what a kick means),
/// ACCESS_PLATFORM (it brings IOTLB messages), IN_ORDER (requests complete as the disk does) and
/// RING_PACKED.
pub fn device_features(read_only: bool) -> u64 {
    let always = VERSION_1
        | INDIRECT_DESC
        | EVENT_IDX
        | SEG_MAX
        | BLK_SIZE
        | FLUSH
        | TOPOLOGY
        | CONFIG_WCE
        | MQ
        | LOG_ALL
        | PROTOCOL_FEATURES;
    if read_only { always | RO } else { always | DISCARD | WRITE_ZEROES }
}

/// The vhost-user protocol feature bits to offer.
///
/// * MQ: the number of queues is asked for.
/// * CONFIG: config space messages; QEMU refuses a device without.
/// * REPLY_ACK: a message can ask for an answer.
/// * CONFIGURE_MEM_SLOTS: regions one by one, more than eight of them.
/// * BACKEND_REQ: our channel to the front-end, for changes of the config space.
/// * INFLIGHT_SHMFD: requests survive us.
/// * LOG_SHMFD: the migration log.
/// * RESET_DEVICE: the guest resets the device.
/// * DEVICE_STATE: snapshots carry a blob of ours.
pub fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::DEVICE_STATE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(numbers: &[u32]) -> u64 {
        numbers.iter().map(|bit| 1u64 << bit).sum()
    }

    #[test]
    fn bits_are_where_the_specs_have_them() {
        let read_write = bits(&[2, 6, 9, 10, 11, 12, 13, 14, 26, 28, 29, 30, 32]);
        assert_eq!(device_features(false), read_write);
        let read_only = bits(&[2, 5, 6, 9, 10, 11, 12, 26, 28, 29, 30, 32]);
        assert_eq!(device_features(true), read_only);
        assert_eq!(protocol_features().bits(), bits(&[0, 1, 3, 5, 9, 12, 13, 15, 19]));
    }
}
