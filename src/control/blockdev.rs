//! `BlockdevOptions`: nodes as clients and command lines describe them.
//!
//! What is declared here is what the parser takes, the schema says, and [`add`] honours; an option
//! of QEMU's that is not here is refused by name. To add a driver: a variant of `BlockdevDriverOptions`
//! with its options, and an arm in `open`.
//!
//! A child is named, or described in place; then it goes with its parent.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::block::{Graph, Node, NodeOptions, Quiesced, Rights, graph};
use crate::control::QmpError;
use crate::control::disks::Disks;
use crate::control::faults::FaultOptions;
use crate::control::qapi::{Flat, QmpResult};
use crate::control::recordings::LogOptions;
use crate::crash::{self, StateName};
use crate::filters::fault::{Fault, Settings};
use crate::filters::write_log::Stand;
use crate::images::blockdev::{self, BackingChoice, FormatRequest, ProtocolRequest};
use crate::images::recording::{RecordOptions, record_to};
use crate::images::{Access, CacheMode, Image, ImageFormat, Layer, Locking, crash_state};
use crate::io::{HostFile, OpenOptions, block_on};
use crate::qapi;

/// How long a node waits for a file that is locked: a killed predecessor's locks stay until the
/// kernel has finished its I/O.
const LOCK_WAIT: Duration = Duration::from_millis(500);

qapi! {
    /// What happens to discards.
    pub enum BlockdevDiscardOptions { Ignore = "ignore", Unmap = "unmap" }
}
qapi! {
    /// Whether zeros that are written are looked for; they are not.
    pub enum BlockdevDetectZeroesOptions { Off = "off" }
}
qapi! {
    /// Yes, no, or as usual.
    pub enum OnOffAuto { Auto = "auto", On = "on", Off = "off" }
}
qapi! {
    /// How the host caches.
    pub struct BlockdevCacheOptions {
        /// Bypass the page cache.
        pub direct: Option<bool>,
        /// Ignore flushes.
        pub no_flush: Option<bool>,
    }
}
qapi! {
    /// A file or block device of the host.
    pub struct BlockdevOptionsFile {
        /// Where it is.
        pub filename: String,
        /// Whether to lock it against other users; `auto` is `on`.
        pub locking: Option<OnOffAuto>,
    }
}
qapi! {
    /// A format that stands on its file only.
    pub struct BlockdevOptionsGenericFormat {
        /// The node below.
        pub file: BlockdevRef,
    }
}
qapi! {
    /// A format that may stand on a backing image.
    pub struct BlockdevOptionsGenericCOWFormat {
        /// The node below.
        pub file: BlockdevRef,
        /// The backing image; what the image names if absent, none if null.
        pub backing: Option<BlockdevRefOrNull>,
    }
}
qapi! {
    /// A disk that misbehaves.
    pub struct BlockdevOptionsFault {
        /// The node below.
        pub file: BlockdevRef,
        /// Its faults.
        pub faults: Flat<FaultOptions>,
    }
}
qapi! {
    /// A disk whose writes are recorded.
    pub struct BlockdevOptionsBlklogwrites {
        /// The disk.
        pub file: BlockdevRef,
        /// The log: a file or a device.
        pub log: BlockdevRef,
        /// How it is kept.
        pub options: Flat<LogOptions>,
    }
}
qapi! {
    /// A disk that a power cut could have left.
    pub struct BlockdevOptionsCrashState {
        /// The disk as it was when logging began; must be read-only.
        pub base: BlockdevRef,
        /// The log of writes: a file or a device.
        pub log: BlockdevRef,
        /// The name of the state.
        pub state: String,
    }
}
qapi! {
    /// A node by name, or a new one.
    pub alternate BlockdevRef {
        /// A new one.
        Definition(Box<BlockdevOptions>),
        /// The name of a node.
        Reference(String),
    }
}
qapi! {
    /// A node by name, a new one, or none.
    pub alternate BlockdevRefOrNull {
        /// A new one.
        Definition(Box<BlockdevOptions>),
        /// The name of a node.
        Reference(String),
        /// None.
        Null(()),
    }
}
qapi! {
    /// The options of each driver.
    pub union BlockdevDriverOptions by "driver" {
        AddCow(BlockdevOptionsGenericCOWFormat) = "add-cow",
        Blklogwrites(BlockdevOptionsBlklogwrites) = "blklogwrites",
        CrashState(BlockdevOptionsCrashState) = "crash-state",
        Fault(BlockdevOptionsFault) = "fault",
        File(BlockdevOptionsFile) = "file",
        HostDevice(BlockdevOptionsFile) = "host_device",
        Qcow2(BlockdevOptionsGenericCOWFormat) = "qcow2",
        Raw(BlockdevOptionsGenericFormat) = "raw",
        Vhdx(BlockdevOptionsGenericCOWFormat) = "vhdx",
    }
}
qapi! {
    /// A node.
    pub struct BlockdevOptions {
        /// Its name.
        pub node_name: Option<String>,
        /// What happens to discards; ignored if absent.
        pub discard: Option<BlockdevDiscardOptions>,
        /// How the host caches.
        pub cache: Option<BlockdevCacheOptions>,
        /// Whether it may only be read.
        pub read_only: Option<bool>,
        /// Whether to open it for reading where writing is not allowed.
        pub auto_read_only: Option<bool>,
        /// Whether others may write it meanwhile; only for what is read.
        pub force_share: Option<bool>,
        /// Whether to look for zeros that are written.
        pub detect_zeroes: Option<BlockdevDetectZeroesOptions>,
        /// The driver and its options.
        pub driver: Flat<BlockdevDriverOptions>,
    }
}

impl BlockdevOptions {
    fn access(&self) -> Access {
        if self.read_only == Some(true) { Access::Read } else { Access::Write }
    }

    fn cache(&self) -> Option<CacheMode> {
        let cache = self.cache.as_ref()?;
        Some(match (cache.direct == Some(true), cache.no_flush == Some(true)) {
            (false, false) => CacheMode::Writeback,
            (true, false) => CacheMode::None,
            (_, true) => CacheMode::Unsafe,
        })
    }

    /// The node below a format.
    fn file(&self) -> Option<&BlockdevRef> {
        match &self.driver.0 {
            BlockdevDriverOptions::File(_)
            | BlockdevDriverOptions::HostDevice(_)
            | BlockdevDriverOptions::CrashState(_) => None,
            BlockdevDriverOptions::Blklogwrites(filter) => Some(&filter.file),
            BlockdevDriverOptions::Fault(filter) => Some(&filter.file),
            BlockdevDriverOptions::Qcow2(format)
            | BlockdevDriverOptions::AddCow(format)
            | BlockdevDriverOptions::Vhdx(format) => Some(&format.file),
            BlockdevDriverOptions::Raw(format) => Some(&format.file),
        }
    }

    /// What the operator says of the backing.
    pub fn backing(&self) -> Option<&BlockdevRefOrNull> {
        match &self.driver.0 {
            BlockdevDriverOptions::Qcow2(format)
            | BlockdevDriverOptions::AddCow(format)
            | BlockdevDriverOptions::Vhdx(format) => format.backing.as_ref(),
            _ => None,
        }
    }
}

/// What a child inherits from its parent, where it does not say otherwise.
#[derive(Clone, Copy, Debug)]
struct Inherited {
    read_only: Option<bool>,
    auto_read_only: Option<bool>,
    cache: CacheMode,
    keeps_space: bool,
}

/// Adds the node that the operator describes, with what is described below it. Nothing is left of
/// it if that fails.
pub fn add(disks: &mut Disks, options: &BlockdevOptions) -> QmpResult<Node> {
    let Some(name) = &options.node_name else {
        return Err(QmpError::generic("'node-name' must be specified for the root node"));
    };
    let name = name.clone();
    let result = open(disks, options, None, true);
    if result.is_err() {
        // What was opened for it and is used by nobody.
        disks.collect();
    }
    result.inspect(|node| debug_assert_eq!(node.name(), name))
}

fn open(
    disks: &mut Disks,
    options: &BlockdevOptions,
    inherited: Option<Inherited>,
    explicit: bool,
) -> QmpResult<Node> {
    let name = match &options.node_name {
        Some(name) => {
            disks.graph().check_name(name)?;
            name.clone()
        }
        None => graph::auto_name(),
    };
    match &options.driver.0 {
        BlockdevDriverOptions::CrashState(state) => {
            open_crash_state(disks, options, state, &name, explicit)
        }
        BlockdevDriverOptions::Blklogwrites(filter) => {
            open_log(disks, options, filter, &name, inherited, explicit)
        }
        BlockdevDriverOptions::Fault(filter) => {
            open_fault(disks, options, filter, &name, inherited, explicit)
        }
        BlockdevDriverOptions::File(file) => {
            open_protocol(disks, options, file, "file", name, inherited, explicit)
        }
        BlockdevDriverOptions::HostDevice(file) => {
            open_protocol(disks, options, file, "host_device", name, inherited, explicit)
        }
        BlockdevDriverOptions::AddCow(_) => {
            open_format(disks, options, ImageFormat::AddCow, name, inherited, explicit)
        }
        BlockdevDriverOptions::Qcow2(_) => {
            open_format(disks, options, ImageFormat::Qcow2, name, inherited, explicit)
        }
        BlockdevDriverOptions::Raw(_) => {
            open_format(disks, options, ImageFormat::Raw, name, inherited, explicit)
        }
        BlockdevDriverOptions::Vhdx(_) => {
            open_format(disks, options, ImageFormat::Vhdx, name, inherited, explicit)
        }
    }
}

fn open_protocol(
    disks: &mut Disks,
    options: &BlockdevOptions,
    file: &BlockdevOptionsFile,
    driver: &'static str,
    node_name: String,
    inherited: Option<Inherited>,
    explicit: bool,
) -> QmpResult<Node> {
    let read_only = options.read_only.or(inherited.and_then(|i| i.read_only)) == Some(true);
    let locking = locking(options, file, read_only)?;
    let request = ProtocolRequest {
        node_name,
        path: PathBuf::from(&file.filename),
        driver,
        access: if read_only { Access::Read } else { Access::Write },
        auto_read_only: options.auto_read_only.or(inherited.and_then(|i| i.auto_read_only))
            == Some(true),
        cache: options.cache().or(inherited.map(|i| i.cache)).unwrap_or_default(),
        locking,
        lock_wait: LOCK_WAIT,
        keeps_space: match options.discard {
            Some(discard) => discard == BlockdevDiscardOptions::Ignore,
            None => inherited.is_none_or(|i| i.keeps_space),
        },
    };
    let image = blockdev::open_protocol(&request)?;
    let node = disks.layers.add_protocol(image, explicit)?;
    // Not where the image above has asked for it: that may be written later.
    disks.layers.keep_read_only(&node, options.read_only == Some(true));
    Ok(node)
}

/// How a file is guarded against others.
fn locking(
    options: &BlockdevOptions,
    file: &BlockdevOptionsFile,
    read_only: bool,
) -> QmpResult<Locking> {
    let shares = options.force_share == Some(true);
    if shares && !read_only {
        return Err(QmpError::generic("force-share=on can only be used with read-only images"));
    }
    Ok(match (&file.locking, shares) {
        (Some(OnOffAuto::Off), _) => Locking::Off,
        (_, true) => Locking::Share,
        _ => Locking::Guard,
    })
}

/// Force-share belongs to the file of a format.
fn refuse_force_share(options: &BlockdevOptions) -> QmpResult<()> {
    match options.force_share {
        Some(true) => Err(QmpError::generic(
            "force-share belongs to the file: give it to the node below (file.force-share=on)",
        )),
        _ => Ok(()),
    }
}

fn open_format(
    disks: &mut Disks,
    options: &BlockdevOptions,
    format: ImageFormat,
    node_name: String,
    inherited: Option<Inherited>,
    explicit: bool,
) -> QmpResult<Node> {
    refuse_force_share(options)?;
    let inherited = Inherited {
        read_only: options.read_only.or(inherited.and_then(|i| i.read_only)),
        auto_read_only: options.auto_read_only.or(inherited.and_then(|i| i.auto_read_only)),
        cache: options.cache().or(inherited.map(|i| i.cache)).unwrap_or_default(),
        keeps_space: options.discard != Some(BlockdevDiscardOptions::Unmap),
    };
    let file = options.file().expect("a format has a file");
    let below = child(disks, file, Some(inherited))?;
    let Some(layer) = disks.layers.of(&below).filter(|layer| layer.is_protocol) else {
        return Err(QmpError::generic(format!(
            "node '{}' is not a file: the file of a {format} node must be one (driver 'file' or \
             'host_device')",
            below.name()
        )));
    };
    let protocol = layer.image.clone();
    // Its rights on the host belong to whoever uses it; two formats in one file are none.
    disks.graph().check_unused(&below)?;
    let mut settled = None;
    let backing = match options.backing() {
        None => BackingChoice::AsNamed,
        Some(BlockdevRefOrNull::Null(())) => BackingChoice::Nothing,
        Some(BlockdevRefOrNull::Reference(name)) => {
            let node = by_name(disks.graph(), name)?;
            // Not where a job changes what is shown.
            drop(node.hold("a node", Rights::CONSISTENT_READ, Rights::ALL.and(Rights::GRAPH))?);
            settled = disks.settle(&node)?;
            BackingChoice::Image(Box::new(disks.image_to_stand_on(&node)?))
        }
        Some(BlockdevRefOrNull::Definition(options)) => {
            let read = Inherited { read_only: Some(true), ..inherited };
            let node = open(disks, options, Some(read), false)?;
            settled = disks.settle(&node)?;
            BackingChoice::Image(Box::new(disks.image_to_stand_on(&node)?))
        }
    };
    let wants = if inherited.read_only == Some(true) { Access::Read } else { Access::Write };
    let access = match (wants, protocol.access) {
        (Access::Write, Access::Read) if inherited.auto_read_only == Some(true) => Access::Read,
        (wants, _) => wants,
    };
    let request = FormatRequest {
        keeps_space: inherited.keeps_space,
        backing,
        settled,
        ..disks.layers.format_request(node_name, format, access)
    };
    let image = blockdev::open_format(&protocol, &request)?;
    if let Some(backing) = image.node.backing() {
        check_backing(disks, None, &image, &backing)?;
    }
    Ok(disks.layers.add_format(image, Some(below), explicit)?)
}

/// Refuses to put a node (with what stands on `place`) on another that guests write to, or where the
/// chain would be too long.
fn check_backing(
    disks: &Disks,
    place: Option<&Node>,
    overlay: &Image,
    below: &Node,
) -> QmpResult<()> {
    if disks.is_written_by_guest(below) {
        return Err(QmpError::generic(format!(
            "Node '{}' cannot be the backing of '{}' while it is written: {}; blockdev-snapshot puts \
             an overlay that has no backing yet on it",
            below.name(),
            overlay.node.name(),
            disks.users_of(below)
        )));
    }
    Ok(disks.layers.check_chain(place, overlay, below)?)
}

fn open_crash_state(
    disks: &mut Disks,
    options: &BlockdevOptions,
    state: &BlockdevOptionsCrashState,
    name: &str,
    explicit: bool,
) -> QmpResult<Node> {
    if options.force_share == Some(true) {
        return Err(QmpError::generic("force-share belongs to the files: give it to base and log"));
    }
    let wanted: StateName = state.state.parse()?;
    let read = Inherited {
        read_only: Some(true),
        auto_read_only: None,
        cache: options.cache().unwrap_or_default(),
        keeps_space: true,
    };
    // Both may be shared: many states of one log stand on one base.
    let base = child(disks, &state.base, Some(read))?;
    let base = disks.image_of(&base)?;
    let log_node = child(disks, &state.log, Some(read))?;
    let log = log_file(disks, &log_node)?;
    let image = crash_state::image(name, &log, &base, false, &wanted)?;
    Ok(disks.layers.add_format(image, Some(log_node), explicit)?)
}

fn open_fault(
    disks: &mut Disks,
    options: &BlockdevOptions,
    filter: &BlockdevOptionsFault,
    name: &str,
    inherited: Option<Inherited>,
    explicit: bool,
) -> QmpResult<Node> {
    refuse_for_filters(options)?;
    let settings = filter.faults.read()?;
    let below = child(disks, &filter.file, Some(filtered(options, inherited)))?;
    disks.graph().check_unused(&below)?;
    let node = disks.faults.make(Some(name), &below, settings);
    disks.layers.add_filter(node.clone(), explicit)?;
    Ok(node)
}

fn open_log(
    disks: &mut Disks,
    options: &BlockdevOptions,
    filter: &BlockdevOptionsBlklogwrites,
    name: &str,
    inherited: Option<Inherited>,
    explicit: bool,
) -> QmpResult<Node> {
    refuse_for_filters(options)?;
    let settings = filter.options.read()?;
    let inherited = filtered(options, inherited);
    let file = child(disks, &filter.file, Some(inherited))?;
    disks.graph().check_unused(&file)?;
    let log = child(disks, &filter.log, Some(Inherited { keeps_space: true, ..inherited }))?;
    disks.graph().check_unused(&log)?;
    let image = disks.image_below(&file)?;
    let log_file = writable_file(disks, &log)?;
    let stand = Arc::new(Stand::new(file.clone(), log.clone()));
    let locking = disks.layers.of(&log).map_or(Locking::Guard, |layer| layer.image.locking);
    let recording = RecordOptions {
        sidecar: filter.options.log_sidecar.clone().map(Into::into),
        locking,
        state_dir: disks.layers.state_dir().clone(),
        block_size: None,
        settings,
    };
    let recording = record_to(&image, stand, &log_file, &recording)?;
    recording.say(file.name());
    // What is not discarded below must not be in the log.
    let keeps_space = disks.layers.through_filters(&file).any(|node| node.keeps_space());
    let options = NodeOptions { name: name.into(), read_only: false, keeps_space };
    let node = disks.recordings.make_node(options, &file, &recording)?;
    disks.layers.add_filter(node.clone(), explicit)?;
    Ok(node)
}

/// The file of a node for a log.
fn log_file(disks: &Disks, node: &Node) -> QmpResult<Arc<HostFile>> {
    match disks.layers.of(node) {
        Some(layer) if layer.is_protocol => Ok(Arc::clone(&layer.image.file)),
        _ => Err(QmpError::generic(format!(
            "node '{}' is not a file: a log must be one (driver 'file' or 'host_device')",
            node.name()
        ))),
    }
}

/// The same for one that is written.
fn writable_file(disks: &Disks, node: &Node) -> QmpResult<Arc<HostFile>> {
    let file = log_file(disks, node)?;
    if !disks.is_writable(node) {
        return Err(QmpError::generic(format!("Block node is read-only: '{}'", node.name())));
    }
    Ok(file)
}

/// What the node below a filter inherits.
fn filtered(options: &BlockdevOptions, inherited: Option<Inherited>) -> Inherited {
    Inherited {
        read_only: options.read_only.or(inherited.and_then(|i| i.read_only)),
        auto_read_only: options.auto_read_only.or(inherited.and_then(|i| i.auto_read_only)),
        cache: options.cache().or(inherited.map(|i| i.cache)).unwrap_or_default(),
        keeps_space: match options.discard {
            Some(discard) => discard == BlockdevDiscardOptions::Ignore,
            None => inherited.is_none_or(|i| i.keeps_space),
        },
    }
}

/// What belongs to the image below a filter is said there.
fn refuse_for_filters(options: &BlockdevOptions) -> QmpResult<()> {
    let refused = [
        ("force-share", options.force_share == Some(true)),
        ("read-only", options.read_only == Some(true)),
    ];
    match refused.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((option, _)) => Err(QmpError::generic(format!(
            "'{option}' belongs to the node below: give it there (file.{option}=on)"
        ))),
    }
}

fn child(
    disks: &mut Disks,
    reference: &BlockdevRef,
    inherited: Option<Inherited>,
) -> QmpResult<Node> {
    match reference {
        BlockdevRef::Reference(name) => by_name(disks.graph(), name),
        // Not the operator's, whatever its name is: it goes with its parent.
        BlockdevRef::Definition(options) => open(disks, options, inherited, false),
    }
}

/// A node that options refer to.
pub fn by_name(graph: &Graph, name: &str) -> QmpResult<Node> {
    graph.find(name).ok_or_else(|| {
        QmpError::generic(format!("Cannot find device='{name}' nor node-name='{name}'"))
    })
}

/// Changes nodes that exist: `read-only` and `backing` may differ from how they were added, and
/// nothing else. Options that are absent go back to their defaults, as in QEMU. Guests see all
/// changes at once, or none where one is refused.
pub fn reopen(disks: &mut Disks, options: &[BlockdevOptions]) -> QmpResult<()> {
    // A file becomes writable before the image in it does, and read-only after that.
    let mut options: Vec<_> = options.iter().collect();
    options.sort_by_key(|options| match (options.file(), options.access()) {
        (None, Access::Write) => 0,
        (Some(_), _) => 1,
        (None, Access::Read) => 2,
    });
    let Some((first, others)) = options.split_first() else { return Ok(()) };
    // Here, so that most refusals cost guests no pause. Others may depend on those before them.
    let first = prepare_reopen(disks, first)?;
    let graph = Arc::clone(disks.graph());
    let mut nodes = vec![first.node.clone()];
    nodes.extend(others.iter().filter_map(|options| graph.find(options.node_name.as_deref()?)));
    let quiesced = graph.quiesce(&nodes);
    let mut undo = Vec::new();
    let mut result = first.apply(disks, &quiesced).map(|back| undo.push(back));
    for options in others {
        result = result.and_then(|()| {
            let change = prepare_reopen(disks, options)?;
            undo.push(change.apply(disks, &quiesced)?);
            Ok(())
        });
    }
    if result.is_err() {
        for back in undo.into_iter().rev() {
            let name = back.node.name().to_string();
            if let Err(err) = back.apply(disks, &quiesced) {
                tracing::error!("node '{name}' is not what it was before blockdev-reopen: {err}");
            }
        }
    }
    let pause = graph.resume(quiesced);
    let names: Vec<_> = nodes.iter().map(Node::name).collect();
    tracing::info!(
        "blockdev-reopen of '{}': guests paused for {} us",
        names.join("', '"),
        pause.as_micros()
    );
    result
}

/// How a node is to be.
struct Change {
    node: Node,
    to: Target,
}

enum Target {
    Fault(Arc<Fault>, Settings),
    Image {
        /// What it may be used for.
        access: Access,
        /// What it stands on, if that changes.
        backing: Option<Option<Node>>,
        /// For a file: whether the images in it may only be read.
        stays_read_only: bool,
    },
}

impl Change {
    /// Does it, and tells how to take it back. The gates of all that reach the node are closed.
    ///
    /// # Errors
    /// If that is not possible. Then the node is as it was.
    fn apply(self, disks: &mut Disks, quiesced: &Quiesced) -> QmpResult<Change> {
        let Change { node, to } = self;
        let back = match to {
            Target::Fault(filter, settings) => {
                let before = filter.settings();
                block_on(filter.set(settings))?;
                Target::Fault(filter, before)
            }
            Target::Image { access, backing, stays_read_only } => {
                // What was written so far is durable below the old backing.
                if !node.limits().read_only {
                    block_on(node.flush())?;
                }
                let before = disks.image_of(&node)?.access;
                let stood_on = node.backing();
                let stayed = disks.layers.keep_read_only(&node, stays_read_only);
                if let Err(err) = disks.layers.set_access(&node, access, quiesced) {
                    disks.layers.keep_read_only(&node, stayed);
                    return Err(err.into());
                }
                if let Some(backing) = &backing
                    && let Err(err) = disks.graph().set_backing(&node, backing.as_ref(), quiesced)
                {
                    disks.layers.keep_read_only(&node, stayed);
                    if let Err(err) = disks.layers.set_access(&node, before, quiesced) {
                        tracing::error!("node '{}' is not as it was: {err}", node.name());
                    }
                    return Err(err.into());
                }
                let backing = backing.map(|_| stood_on);
                Target::Image { access: before, backing, stays_read_only: stayed }
            }
        };
        Ok(Change { node, to: back })
    }
}

/// Checks what is asked for.
fn prepare_reopen(disks: &mut Disks, options: &BlockdevOptions) -> QmpResult<Change> {
    let Some(name) = &options.node_name else {
        return Err(QmpError::generic("node-name not specified"));
    };
    let node = disks
        .graph()
        .find(name)
        .ok_or_else(|| QmpError::generic(format!("Failed to find node with node-name='{name}'")))?;
    if let Some(faulty) = disks.faults.of(&node) {
        let BlockdevDriverOptions::Fault(filter) = &options.driver.0 else {
            return Err(QmpError::generic("Cannot change the option 'driver'"));
        };
        match &filter.file {
            BlockdevRef::Reference(file) if file == faulty.filter.below().name() => {}
            _ => return Err(QmpError::generic("Cannot change the option 'file'")),
        }
        refuse_for_filters(options)?;
        let settings = filter.faults.read()?;
        let to = Target::Fault(faulty.filter, settings);
        return Ok(Change { node, to });
    }
    let layer = disks.layers.of(&node).cloned();
    let Some(layer) = layer.filter(|layer| layer.image.format != ImageFormat::CrashState) else {
        return Err(QmpError::generic(format!("node '{name}' cannot be reopened")));
    };
    if options.access() == Access::Write && layer.image.access == Access::Read {
        check_no_state_on(disks.graph(), &node)?;
    }
    let cannot = |option: &str| QmpError::generic(format!("Cannot change the option '{option}'"));
    if options.driver.word() != node.driver().name() {
        return Err(cannot("driver"));
    }
    match &options.driver.0 {
        BlockdevDriverOptions::File(file) | BlockdevDriverOptions::HostDevice(file) => {
            if Path::new(&file.filename) != layer.image.file.path() {
                return Err(cannot("filename"));
            }
            let locking = locking(options, file, options.access() == Access::Read)?;
            match (layer.image.locking, locking) {
                (before, after) if before == after => {}
                (Locking::Share, _) | (_, Locking::Share) => return Err(cannot("force-share")),
                _ => return Err(cannot("locking")),
            }
        }
        _ => refuse_force_share(options)?,
    }
    if let Some(file) = options.file() {
        let now = disks.graph().children(&node).into_iter().find(|(role, _)| *role == "file");
        let is_same = match (file, now) {
            (BlockdevRef::Reference(name), Some((_, now))) => name == now.name(),
            _ => false,
        };
        if !is_same {
            return Err(cannot("file"));
        }
    }
    if options.cache().unwrap_or_default() != layer.image.cache {
        return Err(cannot("cache"));
    }
    if (options.discard != Some(BlockdevDiscardOptions::Unmap)) != node.keeps_space() {
        return Err(cannot("discard"));
    }
    let backing = match options.backing() {
        None if node.backing().is_some() => {
            return Err(QmpError::generic(format!("backing is missing for '{name}'")));
        }
        None => None,
        Some(BlockdevRefOrNull::Null(())) => None,
        Some(BlockdevRefOrNull::Reference(name)) => Some(by_name(disks.graph(), name)?),
        Some(BlockdevRefOrNull::Definition(_)) => return Err(cannot("backing")),
    };
    let access = match options.auto_read_only == Some(true) && !could_write(disks, &layer) {
        true => Access::Read,
        false => options.access(),
    };
    let moves = match (&backing, &node.backing()) {
        (Some(new), Some(old)) => !new.is_same(old),
        (None, None) => false,
        _ => true,
    };
    if let Some(backing) = backing.as_ref().filter(|_| moves) {
        disks.graph().check_cycle(&node, backing, "backing")?;
        check_backing(disks, Some(&node), &layer.image, backing)?;
        disks.settle(backing)?;
    }
    if access == Access::Read && disks.is_written(&node) {
        return Err(QmpError::generic(format!(
            "Read-only block node '{name}' cannot support read-write users: {}",
            disks.users_of(&node)
        )));
    }
    if access == Access::Read {
        check_no_writer_on(disks, &node)?;
    }
    // Not where a job works. None comes before we are done.
    drop(disks.hold_graph(&node, "blockdev-reopen")?);
    let to = Target::Image {
        access,
        backing: moves.then_some(backing),
        stays_read_only: layer.is_protocol && options.read_only == Some(true),
    };
    Ok(Change { node, to })
}

/// Whether an image may be written as far as its file is concerned.
fn could_write(disks: &Disks, layer: &Layer) -> bool {
    if layer.image.access == Access::Write {
        return true;
    }
    let children = disks.graph().children(&layer.image.node).into_iter();
    let file = children.filter(|(role, _)| *role == "file").find_map(|(_, f)| disks.layers.of(&f));
    let options = OpenOptions { write: true, ..OpenOptions::default() };
    !file.is_some_and(|file| file.stays_read_only)
        && HostFile::open(layer.image.file.path(), options).is_ok()
}

/// Refuses to take the right to write from a file whose format may.
fn check_no_writer_on(disks: &Disks, node: &Node) -> QmpResult<()> {
    let writes = |parent: &graph::Parent| match parent {
        graph::Parent::Node(above, "file") => {
            disks.layers.of(above).is_some_and(|layer| layer.image.access == Access::Write)
        }
        _ => false,
    };
    match disks.graph().parents(node).iter().find(|parent| writes(parent)) {
        Some(parent) => Err(QmpError::generic(format!(
            "Read-only block node '{}' cannot support read-write users: {parent}; reopen that read-only \
             first",
            node.name()
        ))),
        None => Ok(()),
    }
}

/// A base that is written to would change every state that stands on it.
fn check_no_state_on(graph: &Graph, node: &Node) -> QmpResult<()> {
    let is_state = |parent: &graph::Parent| matches!(parent, graph::Parent::Node(above, _) if above.driver().name() == crash::state::NAME);
    match graph.parents(node).iter().find(|parent| is_state(parent)) {
        Some(parent) => Err(QmpError::generic(format!(
            "node '{}' is the base of a crash state, {parent}, and must stay read-only",
            node.name()
        ))),
        None => Ok(()),
    }
}
