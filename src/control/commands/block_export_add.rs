//! `block-export-add`: serves a node on a socket.

use std::path::PathBuf;

use super::prelude::*;
use crate::control::disks::{Disks, ExportRequest};
use crate::control::qapi::{Flat, TagOf};
use crate::device::export::CachePolicy;
use crate::device::server::ServerSocket;

/// The longest serial number: the request that reads it has room for so many bytes.
const MAX_SERIAL: usize = 20;
/// The most queues of a disk.
const MAX_QUEUES: u16 = 64;
/// The largest queue.
const MAX_QUEUE_SIZE: u16 = 1024;

qapi! {
    /// A path.
    pub struct UnixSocketAddress {
        /// Where.
        pub path: String,
    }
}
qapi! {
    /// A file descriptor.
    pub struct FdSocketAddress {
        /// Its number.
        pub str: String,
    }
}
qapi! {
    /// Where front-ends connect to.
    pub union SocketAddress by "type" {
        Fd(FdSocketAddress) = "fd",
        Unix(UnixSocketAddress) = "unix",
    }
}
qapi! {
    /// How a disk is served to a virtual machine.
    pub struct BlockExportOptionsVhostUserBlk {
        /// Where front-ends connect to.
        pub addr: SocketAddress,
        /// The size of the blocks that the guest sees: 512 (usual) or 4096.
        pub logical_block_size: Option<u64>,
        /// The most queues; 1 if absent.
        pub num_queues: Option<u16>,
        /// The serial number that the guest sees, at most 20 bytes.
        pub x_vublk_serial: Option<String>,
    }
}
qapi! {
    /// Each type's options.
    pub union BlockExportTypeOptions by "type" {
        VhostUserBlk(BlockExportOptionsVhostUserBlk) = "vhost-user-blk",
    }
}
qapi! {
    /// What is served, and how.
    pub struct BlockExportOptions {
        /// Looked at first.
        pub of_type: TagOf<BlockExportTypeOptions>,
        /// The export's name.
        pub id: String,
        /// The node.
        pub node_name: String,
        /// Whether the guest may write; not if absent.
        pub writable: Option<bool>,
        /// Whether each write is durable before it completes.
        pub writethrough: Option<bool>,
        /// The type and its options.
        pub export: Flat<BlockExportTypeOptions>,
    }
}

/// Serves a disk.
pub fn add(disks: &mut Disks, options: BlockExportOptions) -> QmpResult<()> {
    let BlockExportOptions { of_type: _, id, node_name, writable, writethrough, export } = options;
    let BlockExportTypeOptions::VhostUserBlk(options) = export.0;
    if !crate::block::graph::is_well_formed(&id) {
        return Err(QmpError::generic(format!("Invalid block export id '{id}'")));
    }
    if disks.exports.get(&id).is_some() {
        return Err(QmpError::generic(format!("Block export id '{id}' is already in use")));
    }
    let node = disks.find(None, Some(&node_name))?;
    let block_size = options.logical_block_size.unwrap_or(512);
    if !matches!(block_size, 512 | 4096) {
        return Err(QmpError::generic(format!(
            "Parameter 'logical-block-size' expects 512 or 4096, not {block_size}"
        )));
    }
    let num_queues = options.num_queues.unwrap_or(1);
    if num_queues == 0 || num_queues > MAX_QUEUES {
        return Err(QmpError::generic(format!("num-queues must be between 1 and {MAX_QUEUES}")));
    }
    let serial = options.x_vublk_serial.unwrap_or_else(|| "vublk".into());
    if serial.len() > MAX_SERIAL || serial.chars().any(char::is_control) {
        return Err(QmpError::generic(format!(
            "Parameter 'x-vublk-serial' expects at most {MAX_SERIAL} bytes of text"
        )));
    }
    let socket = match options.addr {
        SocketAddress::Unix(unix) => {
            ServerSocket::bind(&PathBuf::from(unix.path), disks.socket_rights)?
        }
        SocketAddress::Fd(fd) => {
            let number = fd.str.parse().map_err(|_| {
                QmpError::generic(format!(
                    "Parameter 'addr.str' expects a number, not '{}'",
                    fd.str
                ))
            })?;
            ServerSocket::from_fd(number)?
        }
    };
    disks.export(ExportRequest {
        id,
        node,
        socket,
        writable: writable == Some(true),
        cache: match writethrough {
            Some(true) => CachePolicy::WriteThrough,
            _ => CachePolicy::WriteBack,
        },
        block_size,
        num_queues: num_queues as usize,
        queue_size: MAX_QUEUE_SIZE,
        serial,
    })
}

pub struct BlockExportAdd;

impl MainCommand for BlockExportAdd {
    const NAME: &'static str = "block-export-add";
    const DOC: &'static str = "Serves a node to a virtual machine, on a socket of its own.";
    type Arguments = BlockExportOptions;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, options: BlockExportOptions) -> QmpResult<Nothing> {
        let id = options.id.clone();
        add(daemon.disks_mut(), options)?;
        daemon.watch_export(&id);
        Ok(Nothing {})
    }
}
