//! The images behind the nodes of a daemon: how each was opened, so that it can be shown, frozen,
//! and opened again for writing.
//!
//! The [`Graph`] knows nodes and who stands on whom; this knows files. Both change together, on the
//! main thread.
//!
//! # Writable and frozen
//!
//! A node that becomes the backing of another stops being written: it is set read-only, and its
//! lock on the host goes down to a reader's, so that others may read it, too. Its file stays open
//! as it was. The way back (a commit into it) is the same in reverse; where its file was opened for
//! reading, a new one is opened, and the driver is replaced.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::block::open_gate::MAX_DEPTH;
use crate::block::{Graph, Node, Quiesced, graph};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::images::blockdev::{self, BackingChoice, FormatRequest, ProtocolRequest};
use crate::images::kept::{check_guest_is_back, look_among_others};
use crate::images::lock::{self, lock_rights};
use crate::images::open::protocol_name;
use crate::images::{Access, Image, ImageFormat, Locking, StateDir, frozen};
use crate::io::{File, HostFile, Rights, block_on};

/// A node and the image behind it.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The image; its `node` is the one in the graph, its `backing` is `None`.
    pub image: Image,
    /// Whether it stands for the file itself (`file`, `host_device`).
    pub is_protocol: bool,
    /// For a file: whether the operator has said that it is only read. No image in it is opened for
    /// writing then, whoever asks for that.
    pub stays_read_only: bool,
}

/// All layers of a daemon. See the [module](self).
#[derive(Debug)]
pub struct Layers {
    graph: Arc<Graph>,
    layers: Vec<Layer>,
    /// Nodes that filter others.
    filters: Vec<Node>,
    /// Directories that images may pull files from, for all images.
    allow_dirs: Vec<PathBuf>,
    /// The most memory for metadata of each image; see [`FormatRequest::metadata_cache`].
    pub metadata_cache: Option<u64>,
    /// Where is kept what must outlive the process.
    state_dir: StateDir,
}

impl Layers {
    /// No layers yet, of the nodes in `graph`.
    pub fn new(graph: Arc<Graph>, allow_dirs: Vec<PathBuf>, state_dir: StateDir) -> Layers {
        let (layers, filters, metadata_cache) = (Vec::new(), Vec::new(), None);
        Layers { graph, layers, filters, allow_dirs, metadata_cache, state_dir }
    }

    /// The graph.
    pub fn graph(&self) -> &Arc<Graph> {
        &self.graph
    }

    /// Directories that images may pull files from.
    pub fn allow_dirs(&self) -> &[PathBuf] {
        &self.allow_dirs
    }

    /// Where is kept what must outlive the process.
    pub fn state_dir(&self) -> &StateDir {
        &self.state_dir
    }

    /// A request to open an image with what holds for all of them here, and on what it names.
    pub fn format_request(
        &self,
        node_name: String,
        format: ImageFormat,
        access: Access,
    ) -> FormatRequest {
        FormatRequest {
            node_name,
            format,
            access,
            keeps_space: false,
            backing: BackingChoice::AsNamed,
            allow_dirs: self.allow_dirs.clone(),
            metadata_cache: self.metadata_cache,
            state_dir: self.state_dir.clone(),
            settled: None,
        }
    }

    /// The layer of a node.
    pub fn of(&self, node: &Node) -> Option<&Layer> {
        self.layers.iter().find(|layer| layer.image.node.is_same(node))
    }

    /// The node, what it filters, and so on down to an image.
    pub fn through_filters(&self, node: &Node) -> impl Iterator<Item = Node> {
        std::iter::successors(Some(node.clone()), |node| {
            if self.of(node).is_some() {
                return None;
            }
            // Only a filter stands in no list, and its file is the node it filters.
            let children = node.driver().children();
            children.into_iter().find(|(role, _)| *role == "file").map(|(_, below)| below)
        })
    }

    /// The layer of a node, or of what it filters.
    pub fn below_filters(&self, node: &Node) -> Option<&Layer> {
        self.through_filters(node).find_map(|node| self.of(&node))
    }

    /// The file of a node: its own, or that of what it filters.
    pub fn file_of(&self, node: &Node) -> Option<&Arc<HostFile>> {
        self.below_filters(node).map(|layer| &layer.image.file)
    }

    /// Adds a protocol node.
    pub fn add_protocol(&mut self, image: Image, explicit: bool) -> Result<Node> {
        let node = image.node.clone();
        self.graph.add(node.clone(), None, explicit)?;
        self.layers.push(Layer { image, is_protocol: true, stays_read_only: false });
        Ok(node)
    }

    /// Adds a format node that was opened on `protocol`, with all that it pulled in.
    pub fn add_format(
        &mut self,
        mut image: Image,
        protocol: Option<Node>,
        explicit: bool,
    ) -> Result<Node> {
        let node = image.node.clone();
        let protocol = match protocol {
            Some(node) => node,
            None => {
                let read_only = image.access == Access::Read;
                let file = &image.file;
                let node = blockdev::protocol_node(file, &graph::auto_name(), read_only, false)?;
                self.add_protocol(Image { node, backing: None, ..image.clone() }, false)?
            }
        };
        self.graph.add(node.clone(), Some(protocol), explicit)?;
        let backing = image.backing.take();
        self.layers.push(Layer { image, is_protocol: false, stays_read_only: false });
        // Unless the operator said what it stands on: then that is there already.
        if let Some(below) = backing
            && self.graph.find(below.node.name()).is_none()
        {
            self.add_format(*below, None, false)?;
        }
        Ok(node)
    }

    /// Adds a node that is no image of its own, a filter. Its driver's child with the role `file`
    /// is what it filters.
    pub fn add_filter(&mut self, node: Node, explicit: bool) -> Result<()> {
        self.graph.add(node.clone(), None, explicit)?;
        self.filters.push(node);
        Ok(())
    }

    /// Removes a node of the operator's and what goes with it, and closes their images.
    ///
    /// # Errors
    /// If it is in use, with by whom. What fails when an image is closed is logged: the node is gone.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        let gone = self.graph.remove(name)?;
        self.close(gone);
        Ok(())
    }

    /// Removes nodes that nobody uses and nobody has named, and closes their images.
    pub fn collect(&mut self) {
        let gone = self.graph.collect();
        self.close(gone);
    }

    fn close(&mut self, gone: Vec<Node>) {
        for node in gone {
            let is_filter = self.filters.iter().any(|filter| filter.is_same(&node));
            let is_protocol = !is_filter && self.of(&node).is_none_or(|layer| layer.is_protocol);
            self.filters.retain(|filter| !filter.is_same(&node));
            self.layers.retain(|layer| !layer.image.node.is_same(&node));
            if !is_protocol && let Err(err) = block_on(node.close()) {
                tracing::error!("cannot close node '{}': {err}", node.name());
            }
        }
    }

    /// Closes all images, at the end: the topmost first, so that nobody reads through one that is
    /// closed. Returns the first failure.
    pub fn close_all(&mut self) -> Result<()> {
        let mut result = Ok(());
        for filter in std::mem::take(&mut self.filters).iter().rev() {
            let closed = block_on(filter.close());
            let named =
                closed.map_err(|e| e.context(format!("cannot close node '{}'", filter.name())));
            if result.is_ok() {
                result = named;
            } else if let Err(err) = named {
                tracing::error!("{err}");
            }
        }
        for layer in std::mem::take(&mut self.layers).iter().rev().filter(|l| !l.is_protocol) {
            let closed = block_on(layer.image.node.close());
            let named =
                closed.map_err(|e| e.context(format!("cannot close {}", layer.image.name())));
            if result.is_ok() {
                result = named;
            } else if let Err(err) = named {
                tracing::error!("{err}");
            }
        }
        result
    }

    /// The layer below a node (or the node itself) whose image is at this path, for whoever names
    /// layers by their files.
    pub fn find_in_chain(&self, top: &Node, path: &Path) -> Option<Node> {
        let canonical = path.canonicalize().ok();
        std::iter::successors(Some(top.clone()), Node::backing).find(|node| {
            self.file_of(node).is_some_and(|file| {
                file.path() == path
                    || canonical.is_some() && file.path().canonicalize().ok() == canonical
            })
        })
    }

    /// Refuses to put `overlay` on `below` where that makes a chain of more files than can be opened
    /// again. What stands on `place` by now will stand on the overlay.
    ///
    /// # Errors
    /// Kind [`Unsupported`](crate::ErrorKind::Unsupported), with the length of the chain.
    pub fn check_chain(&self, place: Option<&Node>, overlay: &Image, below: &Node) -> Result<()> {
        let node = &overlay.node;
        self.check_len(place, (node.name(), files_of(overlay)), Some(node), below)
    }

    /// The same for an overlay that is still to be made, where `below` is.
    ///
    /// # Errors
    /// As for [`Layers::check_chain`].
    pub fn check_new_overlay(&self, name: &str, format: ImageFormat, below: &Node) -> Result<()> {
        let files = 1 + usize::from(format == ImageFormat::AddCow);
        self.check_len(Some(below), (name, files), None, below)
    }

    fn check_len(
        &self,
        place: Option<&Node>,
        (name, own): (&str, usize),
        overlay: Option<&Node>,
        below: &Node,
    ) -> Result<()> {
        let nodes_above = self.graph.nodes_above();
        let above = place.map_or(0, |node| self.files_above(node, overlay, &nodes_above));
        let files = above + own + self.files_below(below);
        if files <= MAX_DEPTH {
            return Ok(());
        }
        Err(Error::unsupported(format!(
            "With '{name}' on node '{}', the chain of images would have {files} files, and one of more \
             than {MAX_DEPTH} could not be opened again; commit some of its images first",
            below.name()
        )))
    }

    /// How many files are opened for a node and all that it stands on, as
    /// [`Chain`](crate::block::open_gate::Chain) counts them. Filters have none.
    fn files_below(&self, node: &Node) -> usize {
        let layers = std::iter::successors(self.below_filters(node), |layer| {
            self.below_filters(&layer.image.node.backing()?)
        });
        layers.map(|layer| files_of(&layer.image)).sum()
    }

    /// The same for what stands on a node, but for `overlay`: of the longest way up.
    fn files_above(
        &self,
        node: &Node,
        overlay: Option<&Node>,
        nodes_above: &HashMap<usize, Vec<Node>>,
    ) -> usize {
        let parents = nodes_above.get(&node.key()).into_iter().flatten();
        let others = parents.filter(|above| !overlay.is_some_and(|overlay| overlay.is_same(above)));
        let of_parent = |above: &Node| {
            let own = self.of(above).map_or(0, |layer| files_of(&layer.image));
            own + self.files_above(above, overlay, nodes_above)
        };
        others.map(of_parent).max().unwrap_or(0)
    }

    /// Drops an add-cow layer whose image file has all of the disk: from now on the node is that raw
    /// file. The guests' sessions go on there; the add-cow file gets a mark that says so. Everything
    /// is flushed, and the gates of all that reach the node are closed.
    ///
    /// # Errors
    /// If the image file is not just the disk. Then nothing has changed.
    pub fn stand_alone(&mut self, node: &Node, quiesced: &Quiesced) -> Result<()> {
        let image = match self.of(node) {
            Some(layer) if layer.image.format == ImageFormat::AddCow => layer.image.clone(),
            _ => return Err(Error::unsupported("only add-cow layers can be dropped")),
        };
        let Some(data) = &image.image_file else {
            return Err(Error::unsupported("its image file is not known"));
        };
        let (driver, protocol) = blockdev::open_raw_on(data, image.cache, node.keeps_space())?;
        if driver.limits().size != node.size() {
            return Err(Error::unsupported(format!(
                "{}: has {} bytes, and the disk has {}",
                data.name(),
                driver.limits().size,
                node.size()
            )));
        }
        self.graph.add(protocol.clone(), None, false)?;
        let old = node.replace_driver(driver, quiesced);
        self.graph.set_file(node, Some(protocol.clone()));
        let alone = Image {
            file: Arc::clone(data),
            format: ImageFormat::Raw,
            guessed: false,
            image_file: None,
            ..image.clone()
        };
        for layer in self.layers.iter_mut().filter(|l| l.image.node.is_same(node)) {
            layer.image = alone.clone();
        }
        let image_of_protocol = Image { node: protocol, ..alone };
        self.layers.push(Layer {
            image: image_of_protocol,
            is_protocol: true,
            stays_read_only: false,
        });
        for root in self.graph.roots_on(node) {
            // A raw file keeps nothing, so this cannot fail; it says that nothing is kept.
            root.renew_session(&*old, quiesced)?;
        }
        frozen::mark_moved(&image.file, data.path());
        if let Err(err) = block_on(old.close()) {
            tracing::error!("cannot close {}: {err}", image.name());
        }
        Ok(())
    }

    /// Makes a node (or what it filters, and all filters on the way) read-only, or writable again.
    /// The gates of all that reach it are closed.
    ///
    /// # Errors
    /// If its file cannot be opened or locked for writing. Then it stays as it was.
    pub fn set_access(&mut self, node: &Node, access: Access, quiesced: &Quiesced) -> Result<()> {
        let (filters, node) = node.skip_filters();
        let Some(at) = self.layers.iter().position(|l| l.image.node.is_same(&node)) else {
            return Err(Error::unsupported(format!("node '{}' is not an image", node.name())));
        };
        self.set_image_access(at, access, quiesced)?;
        for filter in filters.iter().rev() {
            filter.set_read_only(access == Access::Read, quiesced);
            // It has the limits of the node below.
            filter.set_backing(filter.backing(), quiesced)?;
        }
        Ok(())
    }

    fn set_image_access(&mut self, at: usize, access: Access, quiesced: &Quiesced) -> Result<()> {
        let node = self.layers[at].image.node.clone();
        let image = self.layers[at].image.clone();
        if image.access == access {
            return Ok(());
        }
        if access == Access::Write {
            self.check_may_write(&image)?;
        }
        let can_write = image.file.is_writable() && !node.driver().limits().read_only;
        if access == Access::Read || can_write {
            if let (Some(from), Some(to)) =
                (lock_rights(image.locking, image.access), lock_rights(image.locking, access))
            {
                relock(&image, from, to)?;
            }
            self.note_access(&image.file, access, quiesced);
            return Ok(());
        }
        self.reopen_for_writing(&self.layers[at].clone(), quiesced)
    }

    /// Says whether the file that a node stands for may only be read, by whatever image is in it.
    /// Returns whether that was so before.
    pub fn keep_read_only(&mut self, node: &Node, stays: bool) -> bool {
        let mut layers = self.layers.iter_mut();
        let layer = layers.find(|layer| layer.is_protocol && layer.image.node.is_same(node));
        layer.is_some_and(|layer| std::mem::replace(&mut layer.stays_read_only, stays))
    }

    /// Refuses to write to an image in a file that the operator wants to be read only, or that is not
    /// locked because it is.
    ///
    /// # Errors
    /// In QEMU's words, with the node of the file.
    pub fn check_may_write(&self, image: &Image) -> Result<()> {
        let mut on_file = self.layers.iter().filter(|l| Arc::ptr_eq(&l.image.file, &image.file));
        let text = match on_file.find(|layer| layer.stays_read_only) {
            Some(layer) => format!("Block node is read-only: '{}'", layer.image.node.name()),
            None if image.locking == Locking::Share => {
                format!("{}: force-share=on can only be used with read-only images", image.name())
            }
            None => return Ok(()),
        };
        Err(Error::new(ErrorKind::ReadOnly, text))
    }

    /// Redoes what an earlier process has kept for an image that another comes to stand on: that shows
    /// what the image's guest saw completed. Returns the session of that guest.
    ///
    /// # Errors
    /// If the image cannot be opened for writing, or what was kept does not fit it.
    pub fn settle(&mut self, node: &Node) -> Result<Option<u128>> {
        let (_, node) = node.skip_filters();
        let (StateDir::IfPossible(dir) | StateDir::Required(dir)) = &self.state_dir else {
            return Ok(None);
        };
        let Some(image) = self.of(&node).map(|layer| layer.image.clone()) else { return Ok(None) };
        let found = match node.driver().keep() {
            Some(keep) if keep.is_recording() => None,
            Some(keep) => keep.session().map(|session| (session, keep.awaited().is_some())),
            None => look_among_others(dir, &image.file, image.format)?,
        };
        let Some((session, true)) = found else { return Ok(found.map(|(session, _)| session)) };
        let graph = Arc::clone(&self.graph);
        let quiesced = graph.quiesce(std::slice::from_ref(&node));
        let redone = self.set_access(&node, Access::Write, &quiesced).and_then(|()| {
            let redone = block_on(node.driver().resume(Some(session)));
            self.set_access(&node, image.access, &quiesced)?;
            redone
        });
        graph.resume(quiesced);
        redone
            .context(|| format!("{}: redoing what an earlier process kept of it", image.name()))?;
        Ok(Some(session))
    }

    /// All nodes on a file (a format and its protocol) share its rights.
    fn note_access(&mut self, file: &Arc<HostFile>, access: Access, quiesced: &Quiesced) {
        for layer in self.layers.iter_mut().filter(|l| Arc::ptr_eq(&l.image.file, file)) {
            layer.image.access = access;
            layer.image.node.set_read_only(access == Access::Read, quiesced);
        }
    }

    fn reopen_for_writing(&mut self, layer: &Layer, quiesced: &Quiesced) -> Result<()> {
        let mut on_file =
            self.layers.iter().filter(|l| Arc::ptr_eq(&l.image.file, &layer.image.file));
        let image_file = on_file.find_map(|layer| layer.image.image_file.clone());
        let old = &Image { image_file, ..layer.image.clone() };
        if self.state_dir == StateDir::None && old.locking == Locking::Guard {
            check_guest_is_back(&old.file, old.format, Access::Write)?;
        }
        let request = ProtocolRequest {
            node_name: graph::auto_name(),
            path: old.file.path().to_path_buf(),
            driver: protocol_name(&old.file),
            access: Access::Write,
            auto_read_only: false,
            cache: old.cache,
            // Those of the old files would be in the way: locks belong to open files.
            locking: Locking::Off,
            lock_wait: Duration::ZERO,
            keeps_space: false,
        };
        // First where the image is open already, then beside that in the new files: so it is never
        // without a lock that somebody else could take.
        let rights =
            lock_rights(old.locking, old.access).zip(lock_rights(old.locking, Access::Write));
        if let Some((from, to)) = rights {
            relock(old, from, to)?;
        }
        let result = blockdev::open_protocol(&request).and_then(|new| {
            check_same(&new.file, &old.file)?;
            let drivers = self.drivers_on(&new, &old.file)?;
            let data = drivers.iter().find_map(|(_, (_, data))| data.as_ref());
            if let (Some(new), Some(old)) = (data, &old.image_file) {
                check_same(new, old)?;
            }
            if let Some((_, (held, shared))) = rights {
                for file in std::iter::once(&new.file).chain(data) {
                    file.lock_beside(held, shared)?;
                }
            }
            Ok((new, drivers))
        });
        let (new, drivers) = match result {
            Ok(opened) => opened,
            Err(err) => {
                if let Some((from, to)) = rights
                    && let Err(err) = relock(old, to, from)
                {
                    tracing::error!("{}: its locks are not what they were: {err}", old.name());
                }
                return Err(err);
            }
        };
        for file in std::iter::once(&old.file).chain(&old.image_file) {
            file.unlock();
        }
        for (node, (driver, image_file)) in drivers {
            node.replace_driver(driver, quiesced);
            for layer in self.layers.iter_mut().filter(|l| l.image.node.is_same(&node)) {
                layer.image.image_file = image_file.clone();
            }
        }
        let old_file = Arc::clone(&old.file);
        for layer in self.layers.iter_mut().filter(|l| Arc::ptr_eq(&l.image.file, &old_file)) {
            layer.image.file = Arc::clone(&new.file);
        }
        self.note_access(&new.file, Access::Write, quiesced);
        Ok(())
    }

    /// A driver over the new file for each node on the old one.
    fn drivers_on(
        &self,
        new: &Image,
        old: &Arc<HostFile>,
    ) -> Result<Vec<(Node, blockdev::Reopened)>> {
        let mut drivers = Vec::new();
        for layer in self.layers.iter().filter(|l| Arc::ptr_eq(&l.image.file, old)) {
            let node = &layer.image.node;
            let driver = if layer.is_protocol {
                (blockdev::protocol_driver(&new.file, false)?, None)
            } else {
                let below = node.backing().and_then(|below| {
                    let image = self.of(&below.skip_filters().1)?.image.clone();
                    Some(Image { node: below, ..image })
                });
                let name = node.name().to_string();
                let request = FormatRequest {
                    keeps_space: node.keeps_space(),
                    backing: match below {
                        Some(image) => BackingChoice::Image(Box::new(image)),
                        None => BackingChoice::Nothing,
                    },
                    ..self.format_request(name, layer.image.format, Access::Write)
                };
                blockdev::open_driver(new, &request)?
            };
            drivers.push((node.clone(), driver));
        }
        Ok(drivers)
    }
}

/// Refuses a file that has taken the place of another.
fn check_same(new: &HostFile, old: &HostFile) -> Result<()> {
    if new.identity()? == old.identity()? {
        return Ok(());
    }
    Err(Error::invalid(format!("{}: is another file now than when it was opened", old.name())))
}

/// How many files an image itself has.
fn files_of(image: &Image) -> usize {
    1 + usize::from(image.image_file.is_some())
}

/// Changes the locks on all files of an image, or on none.
fn relock(image: &Image, from: (Rights, Rights), to: (Rights, Rights)) -> Result<()> {
    lock::relock(&image.file, from, to)?;
    let Some(data) = &image.image_file else { return Ok(()) };
    lock::relock(data, from, to).inspect_err(|_| {
        if let Err(err) = image.file.relock(to, from) {
            tracing::error!("{}: its locks are not what they were: {err}", image.name());
        }
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    use super::*;
    use crate::block::Gate;
    use crate::error::ErrorKind;
    use crate::images::{self, CacheMode, OpenRequest};
    use crate::io::{AlignedBuf, OpenOptions};

    struct Bench {
        dir: tempfile::TempDir,
        layers: Layers,
    }

    impl Bench {
        /// A directory with `base` (raw, one MiB of ones) and `top`, a qcow2 over it.
        fn new() -> Bench {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("base"), vec![1; 1 << 20]).unwrap();
            images::create(&images::CreateRequest {
                backing: Some("base".into()),
                backing_format: Some(ImageFormat::Raw),
                ..images::CreateRequest::new(dir.path().join("top"), ImageFormat::Qcow2)
            })
            .unwrap();
            let layers = Layers::new(Graph::new(), Vec::new(), StateDir::None);
            Bench { dir, layers }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn protocol(&self, name: &str, access: Access) -> ProtocolRequest {
            ProtocolRequest {
                node_name: format!("{name}-file"),
                path: self.path(name),
                driver: "file",
                access,
                auto_read_only: false,
                cache: CacheMode::Writeback,
                locking: Locking::Guard,
                lock_wait: Duration::ZERO,
                keeps_space: false,
            }
        }

        fn format(&self, name: &str, format: ImageFormat, access: Access) -> FormatRequest {
            self.layers.format_request(name.into(), format, access)
        }

        fn add(&mut self, name: &str, format: ImageFormat, access: Access) -> Node {
            let protocol = blockdev::open_protocol(&self.protocol(name, access)).unwrap();
            let image =
                blockdev::open_format(&protocol, &self.format(name, format, access)).unwrap();
            let below = self.layers.add_protocol(protocol, true).unwrap();
            self.layers.add_format(image, Some(below), true).unwrap()
        }
    }

    fn first_byte(node: &Node) -> u8 {
        let mut buf = AlignedBuf::zeroed(512, 512);
        block_on(node.read(0, buf.buffers())).unwrap();
        buf.as_slice()[0]
    }

    fn write(node: &Node, byte: u8) -> Result<()> {
        let buf = AlignedBuf::zeroed(512, 512);
        buf.buffers().copy_from_slice(&[byte; 512]);
        block_on(node.write(0, buf.buffers(), false))
    }

    #[test]
    fn what_an_image_pulls_in_is_shown_and_goes_with_it() {
        let mut bench = Bench::new();
        let top = bench.add("top", ImageFormat::Qcow2, Access::Write);
        let graph = Arc::clone(bench.layers.graph());
        let drivers: Vec<_> = graph.nodes().iter().map(|n| n.driver().name()).collect();
        assert_eq!(drivers, ["file", "qcow2", "file", "raw"]);
        assert_eq!(first_byte(&top), 1);
        let base = top.backing().unwrap();
        let err = bench.layers.remove(base.name()).unwrap_err().to_string();
        assert_eq!(err, format!("Node {} is in use: node 'top' (backing)", base.name()));
        bench.layers.remove("top").unwrap();
        assert_eq!(graph.nodes().len(), 1, "the file node is the operator's");
        bench.layers.remove("top-file").unwrap();
        // Nothing is left that holds a lock.
        drop((top, base));
        images::open(&OpenRequest::write(bench.path("top"))).unwrap();
    }

    #[test]
    fn a_frozen_node_lets_readers_in_and_can_be_thawed() {
        let mut bench = Bench::new();
        let base = bench.add("base", ImageFormat::Raw, Access::Write);
        let reader = OpenRequest::read(bench.path("base")).format(Some(ImageFormat::Raw));
        let writer = OpenRequest { access: Access::Write, ..reader.clone() };
        images::open(&reader).unwrap_err();
        let quiesced = Gate::new().quiesce();
        bench.layers.set_access(&base, Access::Read, &quiesced).unwrap();
        assert_eq!(write(&base, 2).unwrap_err().kind(), ErrorKind::ReadOnly);
        let other = images::open(&reader).unwrap();
        images::open(&writer).unwrap_err();
        // Not while somebody reads it who relies on what it says.
        let err = bench.layers.set_access(&base, Access::Write, &quiesced).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Busy);
        images::open(&reader).unwrap();
        write(&base, 2).unwrap_err();
        drop(other);
        bench.layers.set_access(&base, Access::Write, &quiesced).unwrap();
        write(&base, 2).unwrap();
        images::open(&reader).unwrap_err();
    }

    #[test]
    fn a_backing_that_was_opened_for_reading_can_be_written() {
        let mut bench = Bench::new();
        let top = bench.add("top", ImageFormat::Qcow2, Access::Write);
        let base = top.backing().unwrap();
        let quiesced = Gate::new().quiesce();
        write(&base, 2).unwrap_err();
        // Somebody else who reads it keeps it as it is, and our lock on it stays.
        let reader = images::open(&OpenRequest::read(bench.path("base"))).unwrap();
        bench.layers.set_access(&base, Access::Write, &quiesced).unwrap_err();
        images::open(&OpenRequest::write(bench.path("base"))).unwrap_err();
        drop(reader);
        bench.layers.set_access(&base, Access::Write, &quiesced).unwrap();
        write(&base, 2).unwrap();
        assert_eq!(first_byte(&top), 2, "through the node on top");
        let protocol = bench.layers.graph().children(&base)[0].1.clone();
        assert!(!protocol.limits().read_only);
        bench.layers.set_access(&base, Access::Read, &quiesced).unwrap();
        write(&base, 3).unwrap_err();
        // A file that took its place is not written, and nobody gets in while that is found out.
        let mut bench = Bench::new();
        let top = bench.add("top", ImageFormat::Qcow2, Access::Write);
        std::fs::rename(bench.path("base"), bench.path("gone")).unwrap();
        std::fs::write(bench.path("base"), [9; 512]).unwrap();
        let base = top.backing().unwrap();
        let stop = AtomicBool::new(false);
        let other = HostFile::open(&bench.path("gone"), OpenOptions::default()).unwrap();
        std::thread::scope(|scope| {
            let taken = scope.spawn(|| {
                let (held, shared) = lock_rights(Locking::Guard, Access::Write).unwrap();
                let tries =
                    std::iter::from_fn(|| (!stop.load(Relaxed)).then(|| other.lock(held, shared)));
                tries.filter(Result::is_ok).count()
            });
            let thaw = |_| bench.layers.set_access(&base, Access::Write, &quiesced).unwrap_err();
            let errors: Vec<_> = (0..300).map(thaw).collect();
            stop.store(true, Relaxed);
            assert_eq!(taken.join().unwrap(), 0, "somebody else has locked it: {}", errors[299]);
        });
        let err = bench.layers.set_access(&base, Access::Write, &quiesced);
        assert!(err.unwrap_err().to_string().contains("is another file now"));
    }

    #[test]
    fn a_qcow2_is_reopened_over_its_own_backing() {
        let mut bench = Bench::new();
        let top = bench.add("top", ImageFormat::Qcow2, Access::Read);
        let quiesced = Gate::new().quiesce();
        write(&top, 2).unwrap_err();
        bench.layers.set_access(&top, Access::Write, &quiesced).unwrap();
        assert_eq!(first_byte(&top), 1);
        write(&top, 2).unwrap();
        bench.layers.close_all().unwrap();
        drop(top);
        bench.layers = Layers::new(Graph::new(), Vec::new(), StateDir::None);
        assert_eq!(first_byte(&bench.add("top", ImageFormat::Qcow2, Access::Read)), 2);
    }

    #[test]
    fn the_operator_says_what_an_image_stands_on() {
        let bench = Bench::new();
        let protocol = blockdev::open_protocol(&bench.protocol("top", Access::Write)).unwrap();
        let mut request = bench.format("top", ImageFormat::Qcow2, Access::Write);
        request.backing = BackingChoice::Nothing;
        let top = blockdev::open_format(&protocol, &request).unwrap().node;
        assert_eq!(first_byte(&top), 0);
        std::fs::write(bench.path("other"), vec![5; 1 << 20]).unwrap();
        let other = images::open(&OpenRequest::read(bench.path("other"))).unwrap();
        let quiesced = Gate::new().quiesce();
        top.set_backing(Some(other.node.clone()), &quiesced).unwrap();
        assert_eq!(first_byte(&top), 5);
        request.backing = BackingChoice::Image(Box::new(other));
        let top = blockdev::open_format(&protocol, &request).unwrap().node;
        assert_eq!(first_byte(&top), 5);
    }

    #[test]
    fn misuse_is_told() {
        let bench = Bench::new();
        let open = |request: &ProtocolRequest| {
            blockdev::open_protocol(request).map(drop).unwrap_err().to_string()
        };
        let gone = bench.path("gone").display().to_string();
        assert_eq!(
            open(&bench.protocol("gone", Access::Read)),
            format!("Could not open '{gone}': No such file or directory")
        );
        let device =
            ProtocolRequest { driver: "host_device", ..bench.protocol("base", Access::Read) };
        assert!(open(&device).ends_with("it needs driver 'file'"));
        let protocol = blockdev::open_protocol(&bench.protocol("base", Access::Read)).unwrap();
        assert_eq!(protocol.node.driver().name(), "file");
        let request = bench.format("base", ImageFormat::Raw, Access::Write);
        let err = blockdev::open_format(&protocol, &request).unwrap_err();
        assert!(err.to_string().starts_with("Block node is read-only"), "{err}");
        let err = blockdev::open_format(
            &protocol,
            &FormatRequest {
                format: ImageFormat::Qcow2,
                ..bench.format("x", ImageFormat::Raw, Access::Read)
            },
        );
        assert!(err.unwrap_err().to_string().contains("base"));
    }

    #[test]
    fn flushes_are_ignored_where_the_operator_says_so() {
        let bench = Bench::new();
        let request =
            ProtocolRequest { cache: CacheMode::Unsafe, ..bench.protocol("base", Access::Write) };
        let protocol = blockdev::open_protocol(&request).unwrap();
        let image = blockdev::open_format(
            &protocol,
            &bench.format("base", ImageFormat::Raw, Access::Write),
        )
        .unwrap();
        let driver = image.node.driver();
        let mut plan = crate::block::Plan::default();
        let planned = driver.plan(crate::block::PlanOp::Flush, Default::default(), &mut plan);
        assert_eq!(planned, crate::block::Planned::Ready);
        assert!(plan.extents.is_empty());
        assert_eq!(driver.name(), "raw");
        block_on(image.node.flush()).unwrap();
    }

    #[test]
    fn discards_are_ignored_where_nobody_asked_for_them() {
        let bench = Bench::new();
        let protocol = blockdev::open_protocol(&bench.protocol("base", Access::Write)).unwrap();
        let request = FormatRequest {
            keeps_space: true,
            ..bench.format("base", ImageFormat::Raw, Access::Write)
        };
        let node = blockdev::open_format(&protocol, &request).unwrap().node;
        let all = crate::units::ByteRange { offset: 0, len: 1 << 20 };
        block_on(node.discard(all)).unwrap();
        assert_eq!(first_byte(&node), 1);
    }

    /// As `--blockdev` for each has it.
    #[test]
    fn what_was_kept_of_a_node_is_redone_before_another_stands_on_it() {
        use crate::images::kept::tests::{SESSION, first_byte, killed, make};
        for access in [Access::Read, Access::Write] {
            let state = crate::block::keep::tests::state_dir();
            let mut bench = Bench::new();
            let state_dir = StateDir::Required(state.path().into());
            bench.layers = Layers::new(Graph::new(), Vec::new(), state_dir.clone());
            killed(&bench.path("killed"), state.path());
            make(&bench.path("over"), Some(&bench.path("killed")));
            let mut add = |name: &str, access, backing, settled| {
                let protocol = blockdev::open_protocol(&bench.protocol(name, access)).unwrap();
                let format = bench.format(name, ImageFormat::Qcow2, access);
                let state_dir = state_dir.clone();
                let request = FormatRequest { backing, state_dir, settled, ..format };
                let image = blockdev::open_format(&protocol, &request).unwrap();
                let below = bench.layers.add_protocol(protocol, true).unwrap();
                bench.layers.add_format(image.clone(), Some(below), true).unwrap();
                let settled = bench.layers.settle(&image.node).unwrap();
                (bench.layers.of(&image.node).unwrap().image.clone(), settled)
            };
            let (base, settled) = add("killed", access, BackingChoice::Nothing, None);
            assert_eq!((base.access, settled), (access, Some(SESSION)));
            let backing = BackingChoice::Image(Box::new(base));
            let (over, _) = add("over", Access::Write, backing, settled);
            assert_eq!(first_byte(&over), 2);
            assert_eq!(over.node.driver().keep().unwrap().session(), Some(SESSION));
            // Nothing is left that would be redone over what is written from now on.
            assert_eq!(bench.layers.settle(&over.node.backing().unwrap()).unwrap(), Some(SESSION));
            drop(over);
            bench.layers.close_all().unwrap();
        }
    }
}
