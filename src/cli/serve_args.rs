//! The options of `vublk serve`.
//!
//! Names follow the conventions of vhost-user back-ends (`--socket-path`, `--fd`,
//! `--print-capabilities`, `--blk-file`, `--read-only`), so that a manager that starts other
//! back-ends can start this one.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::block::Keep;
use crate::cli::daemon_args::DaemonArgs;
use crate::cli::recording_args::RecordingArgs;
use crate::cli::socket_args::{ControlArgs, DiskSocketArgs};
use crate::cli::{DONE, output};
use crate::crash::StateName;
use crate::error::{Error, Result};
use crate::images::crash_state::StateOf;
use crate::images::{Access, CacheMode, ImageFormat, Locking, OpenRequest, StateDir};
use crate::units::parse_size;

/// The most queues that one disk can have: the wire's mask of queues has 64 bits.
pub const MAX_QUEUES: u16 = 64;
/// The largest size of a queue.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// The longest serial number: the request that reads it has room for so many bytes.
pub const MAX_SERIAL: usize = 20;
/// The longest path of a Unix socket, in bytes.
pub const MAX_SOCKET_PATH: usize = 107;
/// How long `serve` waits for an image that is locked. A killed predecessor's locks stay until the
/// kernel has finished its I/O, and a supervisor may be faster than that.
const LOCK_WAIT: Duration = Duration::from_millis(500);

/// The options for many disks, which the options for a single one do not go with.
const MANY: [&str; 4] = ["blockdevs", "exports", "chardevs", "monitors"];
/// Name of the node of a single disk. Its export is called [`EXPORT`].
pub const NODE: &str = "image";
/// Name of the export of a single disk.
pub const EXPORT: &str = "disk";

/// How the host's I/O is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Aio {
    /// io_uring; refused if the host does not allow it
    #[value(name = "io_uring")]
    IoUring,
    /// A pool of threads
    Threads,
}

/// Serve a disk to a virtual machine over vhost-user
#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    /// Listen for front-ends on this Unix socket; a stale one is replaced
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    #[arg(conflicts_with_all = MANY)]
    pub socket_path: Option<PathBuf>,
    /// Listen on this inherited socket
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..))]
    #[arg(conflicts_with_all = MANY)]
    pub fd: Option<RawFd>,
    /// Print what this back-end can do as JSON (vhost-user conventions) and exit
    #[arg(long)]
    pub print_capabilities: bool,

    /// The disk's image: a file or a block device
    #[arg(value_name = "IMAGE", required_unless_present_any = ["blk_file", "base", "print_capabilities", "blockdevs", "exports",
          "chardevs", "monitors"])]
    #[arg(conflicts_with_all = MANY)]
    pub image: Option<PathBuf>,
    /// The same as IMAGE, in vhost-user's spelling
    #[arg(long, value_name = "PATH", conflicts_with = "image")]
    #[arg(conflicts_with_all = MANY)]
    pub blk_file: Option<PathBuf>,
    /// The same as IMAGE, for a state of a log: the disk as it was when logging began
    #[arg(long, value_name = "IMAGE", requires = "state", conflicts_with_all = ["image", "blk_file"])]
    #[arg(conflicts_with_all = MANY)]
    pub base: Option<PathBuf>,
    /// Serve a disk that a power cut could have left (see --state), from this log of writes
    #[arg(long, value_name = "LOG", requires = "state")]
    #[arg(conflicts_with_all = MANY)]
    pub log: Option<PathBuf>,
    /// The name of the state, as `log explore` prints it (E412:s=01101). Base and log are not
    /// written to
    #[arg(long, value_name = "NAME", requires = "log")]
    #[arg(conflicts_with_all = MANY)]
    pub state: Option<StateName>,
    /// Keep what the guest writes to a state in this file (add-cow, with FILE.raw), and go on with
    /// it if it is there; forgotten at the end if not given
    #[arg(long, value_name = "FILE", requires = "state", conflicts_with = "read_only")]
    #[arg(conflicts_with_all = MANY)]
    pub overlay: Option<PathBuf>,
    /// Format of the image; guessed from its first bytes if not given
    #[arg(short = 'f', long = "format", value_name = "FORMAT")]
    #[arg(conflicts_with_all = MANY)]
    pub format: Option<ImageFormat>,
    /// Do not let the guest write
    #[arg(short = 'r', long)]
    #[arg(conflicts_with_all = MANY)]
    pub read_only: bool,
    /// Serve what is left of a damaged image (vhdx); what is missing is told and reads as zeros
    #[arg(long, requires = "read_only")]
    #[arg(conflicts_with_all = MANY)]
    pub salvage: bool,
    /// How the host caches: writeback (the page cache), none (O_DIRECT), writethrough and directsync
    /// (the same, every write durable before it completes), unsafe (flushes are ignored)
    #[arg(long, value_name = "MODE", default_value_t, hide_possible_values = true)]
    #[arg(conflicts_with_all = MANY)]
    pub cache: CacheMode,
    /// Allow images to pull in files (backing files, data files) from below DIR; their own
    /// directory is always allowed
    #[arg(long = "allow-dir", value_name = "DIR")]
    pub allow_dirs: Vec<PathBuf>,
    /// The most memory for metadata of each VHDX image (block allocation table, sector bitmaps), from 64K
    /// to 4G
    #[arg(long, value_name = "SIZE", default_value = "8M", value_parser = parse_metadata_cache)]
    pub metadata_cache: u64,
    /// Do not lock the image files against other users; two writers destroy an image
    #[arg(long)]
    #[arg(conflicts_with_all = MANY)]
    pub no_lock: bool,

    /// The most queues a front-end may use; those it does not use cost nothing
    #[arg(long, value_name = "N", default_value_t = MAX_QUEUES,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    #[arg(conflicts_with_all = MANY)]
    pub num_queues: u16,
    /// The largest queue a front-end may set up
    #[arg(long, value_name = "N", default_value_t = MAX_QUEUE_SIZE, value_parser = parse_queue_size)]
    #[arg(conflicts_with_all = MANY)]
    pub queue_size: u16,
    /// Serial number that the guest sees, at most 20 bytes
    #[arg(long, value_name = "TEXT", value_parser = parse_serial)]
    #[arg(conflicts_with_all = MANY)]
    pub serial: Option<String>,
    /// Size of the disk's blocks in bytes: 512 or 4096
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = parse_block_size)]
    #[arg(conflicts_with_all = MANY)]
    pub block_size: u64,

    /// How the host's I/O is done; io_uring where the host allows it, if not given
    #[arg(long, value_enum, value_name = "HOW")]
    pub aio: Option<Aio>,
    /// Number of worker threads; one for each queue in use, if not given
    #[arg(long, value_name = "N",
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    pub threads: Option<u16>,
    /// Before sleeping, look for new requests for up to this many microseconds; costs CPU time
    #[arg(long, value_name = "N", default_value_t = 0,
          value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub poll_us: u32,

    /// Many disks.
    #[command(flatten)]
    pub daemon: DaemonArgs,
    /// Recording.
    #[command(flatten)]
    pub recording: RecordingArgs,

    /// Who may use the disks' sockets.
    #[command(flatten)]
    pub disk_sockets: DiskSocketArgs,
    /// The control socket.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Name of the virtual machine, for control clients that ask (query-name)
    #[arg(long, value_name = "TEXT")]
    pub name: Option<String>,

    /// Write the process id here once the socket is ready, and lock it
    #[arg(long, value_name = "PATH")]
    pub pidfile: Option<PathBuf>,
    /// Where what must outlive this process is kept: a directory on tmpfs that stays when the
    /// process ends. If not given, $RUNTIME_DIRECTORY (of a systemd unit, which needs
    /// RuntimeDirectoryPreserve=yes), else /run/vublk-keep, $XDG_RUNTIME_DIR/vublk or /dev/shm/vublk-UID
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

impl ServeArgs {
    /// Checks what the grammar cannot.
    ///
    /// # Errors
    /// Names the option and the way out.
    pub fn check(&self) -> Result<()> {
        if self.daemon.is_used() {
            return Ok(());
        }
        if self.socket_path.is_none() && self.fd.is_none() && !is_socket_activated() {
            return Err(Error::invalid(
                "where to listen? give --socket-path PATH (or --fd N, or start it from a systemd \
                 socket unit)",
            ));
        }
        if self.socket_path.is_none() {
            self.disk_sockets.check_none()?;
        }
        if let Some(path) = &self.socket_path {
            let len = path.as_os_str().len();
            if len > MAX_SOCKET_PATH {
                return Err(Error::invalid(format!(
                    "--socket-path {}: has {len} bytes, and sockets allow {MAX_SOCKET_PATH}; use a \
                     shorter path, or a relative one",
                    path.display()
                )));
            }
        }
        Ok(())
    }

    /// The image's path. (The grammar sees to it that there is one, unless only capabilities are
    /// printed.)
    pub fn image_path(&self) -> Result<&Path> {
        let path = self.image.as_deref().or(self.blk_file.as_deref()).or(self.base.as_deref());
        path.ok_or_else(|| Error::invalid("which image? give IMAGE or --blk-file PATH"))
    }

    /// Where is kept what must outlive this process.
    pub fn state_dir(&self) -> StateDir {
        if let Some(dir) = &self.state_dir {
            return StateDir::Required(dir.clone());
        }
        // A unit with several has them separated by colons.
        let of_unit = std::env::var("RUNTIME_DIRECTORY").unwrap_or_default();
        match of_unit.split(':').next() {
            Some(dir) if !dir.is_empty() => StateDir::IfPossible(dir.into()),
            _ => StateDir::IfPossible(Keep::default_dir()),
        }
    }

    /// What to open for the guest.
    pub fn open_request(&self) -> Result<OpenRequest> {
        let access = if self.read_only { Access::Read } else { Access::Write };
        let locking = if self.no_lock { Locking::Off } else { Locking::Guard };
        let request = OpenRequest::read(self.image_path()?)
            .format(self.format)
            .cache(self.cache)
            .locking(locking)
            .allow_dirs(&self.allow_dirs);
        Ok(OpenRequest {
            metadata_cache: Some(self.metadata_cache),
            access,
            lock_wait: LOCK_WAIT,
            state_dir: self.state_dir(),
            node_name: NODE.into(),
            salvage: self.salvage,
            state: match (&self.log, &self.state) {
                (Some(log), Some(state)) => {
                    Some(StateOf { log: log.clone(), state: state.clone() })
                }
                _ => None,
            },
            ..request
        })
    }
}

/// Whether systemd passed a socket to this process.
fn is_socket_activated() -> bool {
    std::env::var_os("LISTEN_FDS").is_some()
}

/// Prints what a manager of vhost-user back-ends wants to know.
pub fn print_capabilities() -> Result<u8> {
    output::print("{\"type\":\"block\",\"features\":[\"read-only\",\"blk-file\"]}\n")?;
    Ok(DONE)
}

fn parse_serial(text: &str) -> Result<String> {
    if text.len() > MAX_SERIAL {
        return Err(Error::invalid(format!(
            "a serial number has at most {MAX_SERIAL} bytes, and this one {}",
            text.len()
        )));
    }
    if text.chars().any(char::is_control) {
        return Err(Error::invalid("a serial number has no control characters"));
    }
    Ok(text.to_string())
}

fn parse_queue_size(text: &str) -> Result<u16> {
    let size = text.parse::<u16>().ok();
    let size = size.filter(|n| n.is_power_of_two() && (4..=MAX_QUEUE_SIZE).contains(n));
    size.ok_or_else(|| {
        Error::invalid(format!("a queue's size is a power of two from 4 to {MAX_QUEUE_SIZE}"))
    })
}

fn parse_metadata_cache(text: &str) -> Result<u64> {
    let size = parse_size(text)?;
    match (64 << 10..=4 << 30).contains(&size) {
        true => Ok(size),
        false => Err(Error::invalid("memory for metadata is from 64K to 4G")),
    }
}

/// The size of a disk's blocks in bytes.
pub fn parse_block_size(text: &str) -> Result<u64> {
    match text {
        "512" => Ok(512),
        "4096" | "4k" | "4K" => Ok(4096),
        _ => Err(Error::invalid("a block has 512 or 4096 bytes")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Only {
        #[command(flatten)]
        serve: ServeArgs,
    }

    fn parse(line: &str) -> Result<ServeArgs, String> {
        let words = ["vublk"].into_iter().chain(line.split_whitespace());
        Only::try_parse_from(words).map(|only| only.serve).map_err(|err| err.to_string())
    }

    #[test]
    fn one_word_and_a_socket_are_enough() {
        let args = parse("--socket-path /run/x.sock disk.raw").unwrap();
        args.check().unwrap();
        assert_eq!(args.image_path().unwrap(), Path::new("disk.raw"));
        assert_eq!((args.num_queues, args.queue_size, args.block_size), (64, 1024, 512));
        let request = args.open_request().unwrap();
        assert_eq!(request.access, Access::Write);
        assert_eq!(request.locking, Locking::Guard);
    }

    #[test]
    fn the_spelling_of_vhost_user_works() {
        let args = parse("--fd=3 --blk-file=disk.raw --read-only").unwrap();
        args.check().unwrap();
        assert_eq!(args.fd, Some(3));
        assert_eq!(args.open_request().unwrap().access, Access::Read);
        parse("--print-capabilities").unwrap();
    }

    #[test]
    fn misuse_is_refused_by_name() {
        for (line, word) in [
            ("--socket-path s", "<IMAGE>"),
            ("--socket-path s --fd 3 x", "--fd"),
            ("--fd 3 --socket-group kvm x", "--fd"),
            ("--socket-path s --socket-mode 888 x", "octal"),
            ("--socket-path s --blk-file x y", "--blk-file"),
            ("--socket-path s --num-queues 65 x", "65 is not in 1..=64"),
            ("--socket-path s --num-queues 0 x", "0 is not in 1..=64"),
            ("--socket-path s --queue-size 2048 x", "a power of two from 4 to 1024"),
            ("--socket-path s --queue-size 100 x", "a power of two from 4 to 1024"),
            ("--socket-path s --serial 123456789012345678901 x", "at most 20 bytes"),
            ("--socket-path s --block-size 1024 x", "512 or 4096"),
            ("--socket-path s --metadata-cache 4k x", "from 64K to 4G"),
            ("--socket-path s --cache off x", "unknown cache mode 'off'"),
            ("--socket-path s -f qcow3 x", "unknown format 'qcow3'"),
            ("--socket-path s --aio native x", "io_uring"),
            ("--fd -1 x", "-1"),
        ] {
            let err = parse(line).unwrap_err();
            assert!(err.contains(word), "{line}: {err}");
        }
    }

    #[test]
    fn socket_paths_have_a_limit() {
        let long = format!("/{}", "x".repeat(MAX_SOCKET_PATH));
        let err = parse(&format!("--socket-path {long} x")).unwrap().check().unwrap_err();
        assert!(err.to_string().contains("has 108 bytes"), "{err}");
        parse(&format!("--socket-path {} x", &long[1..])).unwrap().check().unwrap();
    }
}
