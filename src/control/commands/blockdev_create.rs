//! `blockdev-create`: makes an image, as a job.
//!
//! As with QEMU's, that takes two steps for a format: make a file (driver `file`), add it as a
//! node, and then make the image on that node. In one step the file may be described in place of
//! the node's name. An image on a node is made beside its file first and then copied, holes left
//! out: the node has the file open and locked, and nobody else may write to it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::prelude::*;
use crate::block::{Node, Rights, Root};
use crate::control::blockdev::{BlockdevDriverOptions, BlockdevRef};
use crate::control::qapi::Flat;
use crate::error::{Error, Result};
use crate::images::{self, CreateRequest, ImageFormat};
use crate::io::{AlignedBuf, File, Fut, HostFile, OpenOptions, block_on};
use crate::jobs::{Body, Context, JobKind, Spec};

/// How much is copied at a time.
const PIECE: u64 = 1 << 20;

qapi! {
    /// A file.
    pub struct BlockdevCreateOptionsFile {
        /// Where.
        pub filename: String,
        /// How large.
        pub size: u64,
    }
}
qapi! {
    /// A qcow2 image.
    pub struct BlockdevCreateOptionsQcow2 {
        /// A node of driver `file`, or where to make a file.
        pub file: BlockdevRef,
        /// Size of the disk.
        pub size: u64,
        /// The image below, relative to the directory of this one.
        pub backing_file: Option<String>,
        /// Its format.
        pub backing_fmt: Option<String>,
        /// Unit of allocation.
        pub cluster_size: Option<u64>,
        /// Width of a reference count.
        pub refcount_bits: Option<u64>,
    }
}
qapi! {
    /// What a VHDX image allocates.
    pub enum BlockdevVhdxSubformat { Dynamic = "dynamic", Fixed = "fixed" }
}
qapi! {
    /// A VHDX image.
    pub struct BlockdevCreateOptionsVhdx {
        /// A node of driver `file`, or where to make a file.
        pub file: BlockdevRef,
        /// Size of the disk.
        pub size: u64,
        /// Size of the log.
        pub log_size: Option<u64>,
        /// Unit of allocation.
        pub block_size: Option<u64>,
        /// What it allocates.
        pub subformat: Option<BlockdevVhdxSubformat>,
        /// The image below, relative to the directory of this one; makes a differencing image.
        pub backing_file: Option<String>,
        /// Its format, which must be vhdx.
        pub backing_fmt: Option<String>,
        /// Call absent blocks zeros.
        pub block_state_zero: Option<bool>,
    }
}
qapi! {
    /// What can be made.
    pub union BlockdevCreateDriverOptions by "driver" {
        File(BlockdevCreateOptionsFile) = "file",
        Qcow2(BlockdevCreateOptionsQcow2) = "qcow2",
        Vhdx(BlockdevCreateOptionsVhdx) = "vhdx",
    }
}
qapi! {
    /// What to make.
    pub struct BlockdevCreateOptions {
        /// The driver and its options.
        pub driver: Flat<BlockdevCreateDriverOptions>,
    }
}
qapi! {
    /// Arguments of `blockdev-create`.
    pub struct BlockdevCreateArguments {
        /// Name of the job.
        pub job_id: String,
        /// What to make.
        pub options: BlockdevCreateOptions,
    }
}

pub struct BlockdevCreate;

impl MainCommand for BlockdevCreate {
    const NAME: &'static str = "blockdev-create";
    const DOC: &'static str = "Makes an image, as a job that has to be dismissed.";
    type Arguments = BlockdevCreateArguments;
    type Returns = Nothing;

    fn run(daemon: &mut Daemon, arguments: BlockdevCreateArguments) -> QmpResult<Nothing> {
        let BlockdevCreateArguments { job_id, options } = arguments;
        daemon.jobs().check_id(&job_id)?;
        let (request, file) = wanted(options.driver.0);
        let allow_dirs = daemon.disks().layers.allow_dirs().to_vec();
        let request = CreateRequest { allow_dirs, ..request };
        let mut spec = Spec::new(&job_id, JobKind::Create);
        let create = match file {
            None => Create::new(request, None),
            Some(BlockdevRef::Definition(options)) => match options.driver.0 {
                BlockdevDriverOptions::File(file) => {
                    Create::new(CreateRequest { path: file.filename.into(), ..request }, None)
                }
                _ => return Err(QmpError::generic("Parameter 'options.file' expects a file")),
            },
            Some(BlockdevRef::Reference(name)) => {
                let (node, file) = free_file(daemon, &name)?;
                let holder = format!("job '{job_id}'");
                let root = Root::new(holder.clone(), node.clone());
                spec.holds.push(node.hold(holder, Rights::ALL, Rights::NONE)?);
                spec.roots.push(root.clone());
                let name = file.path().file_name().unwrap_or_default().to_string_lossy();
                let beside = format!(".{name}.{}.new", std::process::id());
                let path = file.path().with_file_name(beside);
                Create::new(CreateRequest { path, ..request }, Some(root))
            }
        };
        daemon.jobs().start(spec, create)?;
        Ok(Nothing {})
    }
}

/// What is to be made, and on what if that is given by the client.
fn wanted(options: BlockdevCreateDriverOptions) -> (CreateRequest, Option<BlockdevRef>) {
    let request = |path: PathBuf, format, size, options| CreateRequest {
        size: Some(size),
        options,
        ..CreateRequest::new(path, format)
    };
    match options {
        BlockdevCreateDriverOptions::File(file) => {
            (request(file.filename.into(), ImageFormat::Raw, file.size, Vec::new()), None)
        }
        BlockdevCreateDriverOptions::Qcow2(qcow2) => {
            let options = given([
                ("cluster_size", qcow2.cluster_size.map(|n| n.to_string())),
                ("refcount_bits", qcow2.refcount_bits.map(|n| n.to_string())),
                ("backing_file", qcow2.backing_file),
                ("backing_fmt", qcow2.backing_fmt),
            ]);
            let path = PathBuf::new();
            (request(path, ImageFormat::Qcow2, qcow2.size, options), Some(qcow2.file))
        }
        BlockdevCreateDriverOptions::Vhdx(vhdx) => {
            let zero = vhdx.block_state_zero.map(|on| if on { "on" } else { "off" }.to_string());
            let options = given([
                ("log_size", vhdx.log_size.map(|n| n.to_string())),
                ("block_size", vhdx.block_size.map(|n| n.to_string())),
                ("subformat", vhdx.subformat.map(|subformat| subformat.to_string())),
                ("block_state_zero", zero),
                ("backing_file", vhdx.backing_file),
                ("backing_fmt", vhdx.backing_fmt),
            ]);
            (request(PathBuf::new(), ImageFormat::Vhdx, vhdx.size, options), Some(vhdx.file))
        }
    }
}

/// The options that were given.
fn given<const N: usize>(options: [(&str, Option<String>); N]) -> Vec<(String, String)> {
    let given = |(name, value): (&str, Option<String>)| Some((name.to_string(), value?));
    options.into_iter().filter_map(given).collect()
}

/// A node of driver `file` that nobody stands on.
fn free_file(daemon: &Daemon, name: &str) -> QmpResult<(Node, Arc<HostFile>)> {
    let disks = daemon.disks();
    let node = disks.find(None, Some(name))?;
    let image = disks.image_of(&node)?;
    let users = disks.users_of(&node);
    if !users.is_empty() {
        return Err(QmpError::generic(format!("Node '{name}' is in use by {users}")));
    }
    if image.format != ImageFormat::Raw {
        return Err(QmpError::generic(format!(
            "Node '{name}' is an image of format {}, and not a file",
            image.format
        )));
    }
    if node.limits().read_only {
        return Err(QmpError::generic(format!("Node '{name}' is read-only")));
    }
    Ok((node, image.file))
}

/// The job.
struct Create {
    request: Mutex<Option<CreateRequest>>,
    /// The node that gets the image, if it does not stay where it was made.
    onto: Option<Root>,
}

impl Create {
    fn new(request: CreateRequest, onto: Option<Root>) -> Create {
        Create { request: Mutex::new(Some(request)), onto }
    }

    async fn make(&self, context: &Context) -> Result<()> {
        let request = self.request.lock().unwrap().take();
        let request = request.ok_or_else(|| Error::invalid("a job runs once"))?;
        // Goes when the job does, however that ends.
        let beside = self.onto.as_ref().map(|_| Beside(request.path.clone()));
        context.blocking(move || images::create(&request).map(drop)).await?;
        match (&self.onto, &beside) {
            (Some(root), Some(beside)) => copy(context, beside, root).await,
            _ => Ok(()),
        }
    }
}

impl Body for Create {
    fn run<'a>(&'a self, context: &'a Context) -> Fut<'a, ()> {
        Box::pin(async move {
            context.set_total(1);
            let made = self.make(context).await;
            // Over is over for QEMU's clients, whatever became of it.
            context.set_current(1);
            made
        })
    }
}

/// A file that is there for a while only.
struct Beside(PathBuf);

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Makes a node's content that of a file.
async fn copy(context: &Context, from: &Beside, root: &Root) -> Result<()> {
    let file = HostFile::open(&from.0, OpenOptions::default())?;
    let len = file.len()?;
    let resized = root.clone();
    let resize = move |_: &mut images::Layers| {
        let quiesced = resized.quiesce();
        let node = resized.node();
        let align = node.limits().request_alignment.max(512);
        // What was there before goes, so that what is not copied is a hole.
        block_on(node.resize(0, &quiesced))?;
        block_on(node.resize(len.next_multiple_of(align), &quiesced))
    };
    context.on_main(resize).await?;
    for offset in (0..len).step_by(PIECE as usize) {
        let turn = context.turn().await;
        let node = root.node();
        let align = node.limits().request_alignment.max(512);
        let piece = PIECE.min(len - offset);
        let buf = AlignedBuf::zeroed(piece.next_multiple_of(align) as usize, 4096);
        file.read(offset, buf.buffers().slice(0, piece)).await?;
        if buf.to_vec().iter().any(|byte| *byte != 0) {
            node.write(offset, buf.buffers(), false).await?;
        }
        drop(turn);
    }
    let _turn = context.turn().await;
    root.node().flush().await
}
