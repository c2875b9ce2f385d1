//! The disks of a daemon: its nodes, the images behind them, and the exports they are served by.
//!
//! Part of the [`Daemon`](super::Daemon), so it belongs to the main thread.

use std::sync::Arc;

use crate::block::graph::Parent;
use crate::block::node::Hold;
use crate::block::{Graph, Node, Rights, Root};
use crate::control::QmpError;
use crate::control::error::Class;
use crate::control::faults::Faults;
use crate::control::qapi::QmpResult;
use crate::control::recordings::Recordings;
use crate::device::export::{CachePolicy, Export, ExportOptions};
use crate::device::exports::{Exports, Served};
use crate::device::server::{ServerSocket, SocketRights};
use crate::images::{Access, Image, ImageFormat, Layers, frozen};
use crate::io::{EngineKind, block_on};

/// See the [module](self).
#[derive(Debug)]
pub struct Disks {
    /// The images behind the nodes.
    pub layers: Layers,
    /// What is served.
    pub exports: Exports,
    /// What is recorded.
    pub recordings: Recordings,
    /// What misbehaves.
    pub faults: Faults,
    /// How exports do their I/O.
    pub workers: WorkerOptions,
    /// Who may use the sockets that are made for exports; what the umask leaves if absent.
    pub socket_rights: Option<SocketRights>,
}

/// How the workers of all exports are set up.
#[derive(Clone, Copy, Debug)]
pub struct WorkerOptions {
    /// How I/O is done.
    pub engine: EngineKind,
    /// The most threads of an export; one for each queue if absent.
    pub threads: Option<usize>,
    /// How long a worker may poll, in microseconds.
    pub poll_us: u32,
}

/// A disk to be served.
#[derive(Debug)]
pub struct ExportRequest {
    /// Its name.
    pub id: String,
    /// The node.
    pub node: Node,
    /// Where.
    pub socket: ServerSocket,
    /// Whether the guest may write.
    pub writable: bool,
    /// How writes and flushes are treated.
    pub cache: CachePolicy,
    /// Block size that the guest sees.
    pub block_size: u64,
    /// The most queues.
    pub num_queues: usize,
    /// The largest queue.
    pub queue_size: u16,
    /// What the guest gets for GET_ID.
    pub serial: String,
}

impl Disks {
    /// No disks yet.
    pub fn new(layers: Layers, workers: WorkerOptions) -> Disks {
        Disks {
            layers,
            exports: Exports::default(),
            recordings: Recordings::default(),
            faults: Faults::default(),
            workers,
            socket_rights: None,
        }
    }

    /// The graph.
    pub fn graph(&self) -> &Arc<Graph> {
        self.layers.graph()
    }

    /// The node that an export (`device`) stands on, or the node of that name.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn find(&self, device: Option<&str>, node_name: Option<&str>) -> QmpResult<Node> {
        if let Some(served) = device.and_then(|id| self.exports.get(id)) {
            return Ok(served.root().node());
        }
        if let Some(node) = node_name.and_then(|name| self.graph().find(name)) {
            return Ok(node);
        }
        Err(QmpError::generic(format!(
            "Cannot find device='{}' nor node-name='{}'",
            device.unwrap_or_default(),
            node_name.unwrap_or_default()
        )))
    }

    /// What a command that takes either in one argument means: an export first, then a node.
    pub fn find_any(&self, name: &str) -> QmpResult<Node> {
        self.find(Some(name), Some(name))
    }

    /// What a command that changes chains of images means by an export or a node: the image, below the
    /// filters before it, which stay where they are.
    pub fn find_image(&self, device: Option<&str>, node_name: Option<&str>) -> QmpResult<Node> {
        Ok(self.find(device, node_name)?.skip_filters().1)
    }

    /// The image behind a node.
    pub fn image_of(&self, node: &Node) -> QmpResult<Image> {
        let layer = self.layers.of(node).map(|layer| layer.image.clone());
        layer.ok_or_else(|| {
            let name = node.name();
            QmpError::generic(match self.layers.below_filters(node) {
                Some(layer) => format!(
                    "node '{name}' is not an image, but a filter ({}) before node '{}'",
                    node.driver().name(),
                    layer.image.node.name()
                ),
                None => format!("node '{name}' is not an image"),
            })
        })
    }

    /// The image that a node is, or that it filters.
    pub fn image_below(&self, node: &Node) -> QmpResult<Image> {
        match self.layers.below_filters(node) {
            Some(layer) => Ok(layer.image.clone()),
            None => self.image_of(node),
        }
    }

    /// The same, to stand on: what is seen of it is what the node shows.
    pub fn image_to_stand_on(&self, node: &Node) -> QmpResult<Image> {
        let image = self.image_of(&node.skip_filters().1)?;
        Ok(Image { node: node.clone(), ..image })
    }

    /// Has a node show what the guest of an earlier process saw completed, before another node comes to
    /// stand on it. Returns that guest's session.
    pub fn settle(&mut self, node: &Node) -> QmpResult<Option<u128>> {
        // Such a guest is still to come back, to this very disk.
        if self.is_written_by_guest(node) {
            return Ok(None);
        }
        Ok(self.layers.settle(node)?)
    }

    /// The node that is recorded: this one, or one that it filters; else the image below.
    pub fn recorded(&self, node: &Node) -> QmpResult<Node> {
        let mut below = self.layers.through_filters(node);
        match below.find(|node| self.recordings.is_recorded(node)) {
            Some(node) => Ok(node),
            None => Ok(self.image_below(node)?.node),
        }
    }

    /// Keeps jobs away from a node while the graph around it is changed; refused if one is there.
    pub fn hold_graph(&self, node: &Node, command: &str) -> QmpResult<Hold> {
        Ok(node.hold(command, Rights::GRAPH, Rights::ALL.and(Rights::GRAPH))?)
    }

    /// Whether an export or a job may write to the node, itself or by way of what has it as its file.
    pub fn is_written(&self, node: &Node) -> bool {
        let above = self.written_through(node);
        self.is_written_by_guest(node) || above.iter().any(|node| !node.holders().is_empty())
    }

    /// Whether it is an export that may.
    pub fn is_written_by_guest(&self, node: &Node) -> bool {
        let above = self.written_through(node);
        let mut writable = self.exports.iter().filter(|served| !served.export().options.read_only);
        writable.any(|served| above.iter().any(|node| node.is_same(&served.root().node())))
    }

    /// The node, and those whose writes come to it: what has it as its backing only reads.
    fn written_through(&self, node: &Node) -> Vec<Node> {
        let mut nodes = vec![node.clone()];
        for parent in self.graph().parents(node) {
            match parent {
                Parent::Node(above, role) if role != "backing" => {
                    nodes.extend(self.written_through(&above));
                }
                _ => {}
            }
        }
        nodes
    }

    /// Refuses a change (`right`, in QEMU's words) of a node by `who` where another node has it as its
    /// file or its backing: that relies on what it has left there.
    ///
    /// # Errors
    /// In QEMU's words, with the node to use instead.
    pub fn check_no_node_on(&self, node: &Node, right: &str, who: &str) -> QmpResult<()> {
        let (filters, image) = node.skip_filters();
        let is_ours = |above: &Node| filters.iter().any(|filter| filter.is_same(above));
        let users = filters.iter().chain([&image]).find_map(|node| {
            self.graph().parents(node).into_iter().find_map(|parent| match parent {
                Parent::Node(above, role) if !is_ours(&above) => Some((node, above, role)),
                _ => None,
            })
        });
        let Some((node, above, role)) = users else { return Ok(()) };
        let (name, above) = (node.name(), above.name());
        Err(QmpError::generic(match role {
            "backing" => is_backing_of(name, above),
            role => format!(
                "Permission conflict on node '{name}': permissions '{right}' are both required by \
                 {who} and unshared by node '{above}' (uses node '{name}' as '{role}' child); use \
                 '{above}' instead"
            ),
        }))
    }

    /// Refuses a node that is the backing, itself or by its filters, of another one that is in use: that
    /// relies on what is in it. Others are what a disk has left behind.
    ///
    /// # Errors
    /// In QEMU's words, with the node to use instead.
    pub fn check_no_overlay_on(&self, node: &Node) -> QmpResult<()> {
        let image = node.skip_filters().1;
        for parent in self.graph().parents(node) {
            match parent {
                Parent::Node(above, _) if above.skip_filters().1.is_same(&image) => {
                    self.check_no_overlay_on(&above)?;
                }
                Parent::Node(above, "backing")
                    if !self.graph().roots_reaching(std::slice::from_ref(&above)).is_empty() =>
                {
                    return Err(QmpError::generic(is_backing_of(node.name(), above.name())));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Who uses a node, for messages.
    pub fn users_of(&self, node: &Node) -> String {
        let mut users: Vec<_> =
            self.graph().parents(node).iter().map(|parent| parent.to_string()).collect();
        users.extend(node.holders());
        users.join(", ")
    }

    /// The writable exports of a node's image, by whatever filters.
    fn writers_of(&self, node: &Node) -> Vec<&Served> {
        let image = node.skip_filters().1;
        let writes = |served: &&Served| {
            let top = served.root().node().skip_filters().1;
            !served.export().options.read_only && top.is_same(&image)
        };
        self.exports.iter().filter(writes).collect()
    }

    /// Refuses to put an overlay on a node that several guests write to: what must outlive a kill is
    /// kept by the overlay for one of them.
    ///
    /// # Errors
    /// With the exports, one of which has to go.
    pub fn check_one_writer(&self, node: &Node) -> QmpResult<()> {
        match &self.writers_of(node)[..] {
            [first, second, ..] => Err(QmpError::generic(format!(
                "Node '{}' is written by {} and {}, and no overlay keeps what is written for more than \
                 one guest; delete one of them, or add it again without 'writable'",
                node.name(),
                first.root().name(),
                second.root().name()
            ))),
            _ => Ok(()),
        }
    }

    /// Serves a disk.
    ///
    /// # Errors
    /// In QEMU's words where it has them.
    pub fn export(&mut self, request: ExportRequest) -> QmpResult<()> {
        let ExportRequest { id, node, .. } = &request;
        if self.exports.get(id).is_some() {
            return Err(QmpError::generic(format!("Block export id '{id}' is already in use")));
        }
        if request.writable && node.limits().read_only {
            return Err(QmpError::generic(format!("Block node is read-only: '{}'", node.name())));
        }
        // Not where a job changes what is shown.
        let reads = Rights::CONSISTENT_READ;
        let rights = if request.writable { reads.and(Rights::WRITE) } else { reads };
        drop(node.hold("an export", rights, Rights::ALL.and(Rights::GRAPH))?);
        check_steady(node, "an export")?;
        if request.writable {
            self.check_no_node_on(node, "write", &format!("export '{id}'"))?;
        }
        let image = self.image_below(node)?;
        // Before what is the same to the image: the log is what can be changed.
        self.recordings.check_blocks(&self.recorded(node)?, request.block_size)?;
        image.check_for_guest(request.block_size)?;
        let unit = node.limits().request_alignment;
        if unit > request.block_size {
            return Err(QmpError::generic(format!(
                "node '{}' takes requests in units of {unit} bytes, more than the block size of \
                 {}; use logical-block-size={unit}",
                node.name(),
                request.block_size
            )));
        }
        if request.writable {
            // Of raw images nothing is kept: what a guest has written is in the host's memory.
            if image.format != ImageFormat::Raw
                && let Some(other) = self.writers_of(node).first()
            {
                return Err(QmpError::generic(format!(
                    "Node '{}' is written by {} already, and what its guest would lose by a kill is \
                     kept for one guest only; delete that export first, or add this one without \
                     'writable'",
                    node.name(),
                    other.root().name()
                )));
            }
            frozen::check(&image.file, self.layers.allow_dirs())?;
        }
        let options = ExportOptions {
            serial: request.serial,
            block_size: request.block_size as u32,
            num_queues: request.num_queues,
            queue_size: request.queue_size,
            threads: self.workers.threads.unwrap_or(request.num_queues).min(request.num_queues),
            cache: request.cache,
            engine: self.workers.engine,
            poll_us: self.workers.poll_us,
            read_only: !request.writable,
        };
        let name = format!("export '{}'", request.id);
        let root = Root::with_unit(name, request.node, request.block_size);
        self.graph().add_root(&root)?;
        let served = Served::start(request.id, root.clone(), options, request.socket);
        match served {
            Ok(served) => self.exports.add(served),
            Err(err) => {
                self.graph().remove_root(&root);
                return Err(err.into());
            }
        }
        Ok(())
    }

    /// Ends an export. Blocks until what is in flight has completed and is flushed.
    ///
    /// # Errors
    /// In QEMU's words: it is not there, or a front-end is connected and `hard` is not set.
    pub fn unexport(&mut self, id: &str, hard: bool) -> QmpResult<Arc<Export>> {
        let Some(served) = self.exports.get(id) else {
            return Err(QmpError::generic(format!("Export '{id}' is not found")));
        };
        if !hard && served.is_connected() {
            return Err(QmpError::new(
                Class::Generic,
                format!(
                    "export '{id}' still in use: a front-end is connected (mode 'hard' ends it)"
                ),
            ));
        }
        let served = self.exports.take(id)?;
        Ok(self.end(served))
    }

    /// Removes nodes that nobody uses and nobody has named.
    pub fn collect(&mut self) {
        self.layers.collect();
        self.faults.forget_removed(self.layers.graph());
        let logs = self.recordings.forget_removed(self.layers.graph());
        if !logs.is_empty() {
            // What they have recorded is held by nobody now.
            self.layers.collect();
        }
        for log in logs {
            if let Err(err) = block_on(log.image_was_closed()) {
                tracing::warn!("{}: may not be continued: {err}", log.log_name());
            }
        }
    }

    /// Ends an export that was taken out.
    pub fn end(&mut self, served: Served) -> Arc<Export> {
        let export = served.stop();
        self.graph().remove_root(&export.root);
        self.collect();
        export
    }

    /// Tells guests of a change of size of what they stand on.
    pub fn update_capacities(&self) {
        for served in self.exports.iter() {
            served.update_capacity();
        }
    }

    /// Whether an image may be written through its node: for messages.
    pub fn is_writable(&self, node: &Node) -> bool {
        self.layers.of(node).is_some_and(|layer| layer.image.access == Access::Write)
    }

    /// Ends all exports, then closes all images. Returns what was served.
    pub fn close(&mut self) -> (Vec<Arc<Export>>, crate::error::Result<()>) {
        let served = self.exports.stop_all();
        for export in &served {
            self.graph().remove_root(&export.root);
        }
        let closed = self.layers.close_all();
        (served, closed.and(self.recordings.images_were_closed()))
    }
}

/// Why a node is to be left as it is, in QEMU's words.
fn is_backing_of(name: &str, above: &str) -> String {
    format!(
        "Node '{name}' is busy: node is used as backing hd of '{above}', which relies on what is in it; \
         use '{above}' instead"
    )
}

/// Refuses to read through a node where a job changes what it shows, on whatever layer below it.
///
/// # Errors
/// In QEMU's words, with the layer and the job.
pub fn check_steady(node: &Node, who: &str) -> crate::error::Result<()> {
    let all = Rights::ALL.and(Rights::GRAPH);
    let mut left = vec![node.clone()];
    while let Some(node) = left.pop() {
        drop(node.hold(who, Rights::CONSISTENT_READ, all)?);
        // What a job keeps steady hides what it changes below.
        if node.hold(who, Rights::GRAPH, all).is_ok() {
            left.extend(node.driver().children().into_iter().map(|(_, below)| below));
        }
    }
    Ok(())
}
