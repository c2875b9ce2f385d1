//! What jobs on a chain of layers have in common: who may stand where, and what is put in front of a
//! disk while a job is at work.

use std::sync::Arc;

use super::JobKind;
use crate::block::graph::Parent;
use crate::block::node::Hold;
use crate::block::{Driver, Graph, Node, NodeOptions, Quiesced, Rights, open_gate};
use crate::error::{Error, ErrorKind, Result, ResultExt};
use crate::filters::{Intercept, JobTop};
use crate::images::{self, Access, ImageFormat, Layers};
use crate::io::{HostFile, OpenOptions, block_on};

/// The nodes from `top` down to `base`, both included; to the bottom without a base. `None` if `base`
/// is not below `top`.
pub fn between(top: &Node, base: Option<&Node>) -> Option<Vec<Node>> {
    let mut nodes = Vec::new();
    for node in std::iter::successors(Some(top.clone()), Node::backing) {
        let is_base = base.is_some_and(|base| base.is_same(&node));
        nodes.push(node);
        if is_base {
            return Some(nodes);
        }
    }
    base.is_none().then_some(nodes)
}

/// Keeps everybody else from changing the graph around the nodes. `changing` are those whose
/// content changes: nobody may begin to read them either.
pub(super) fn hold(kind: JobKind, steady: &[Node], changing: &[Node]) -> Result<Vec<Hold>> {
    let holder = format!("block job: {}", kind.name());
    let unread = Rights::ALL.without(Rights::CONSISTENT_READ.and(Rights::WRITE));
    let steady = steady.iter().map(|node| (node, Rights::ALL));
    let changing = changing.iter().map(|node| (node, unread));
    let hold = |(node, shared): (&Node, Rights)| node.hold(&holder, Rights::GRAPH, shared);
    steady.chain(changing).map(hold).collect()
}

/// Shows a job as a node of this name on the disk that it works on, for as long as the hold lasts.
pub(super) fn show(
    layers: &mut Layers,
    kind: JobKind,
    driver: &'static str,
    name: Option<String>,
    below: &Node,
) -> Result<Option<Hold>> {
    let Some(name) = name else { return Ok(None) };
    let options = NodeOptions { name, read_only: true, ..NodeOptions::default() };
    let node = Node::new(Arc::new(JobTop::new(driver, below.clone())), options);
    layers.add_filter(node.clone(), false)?;
    node.hold(format!("block job: {}", kind.name()), Rights::NONE, Rights::ALL).map(Some)
}

/// Checks that each node below the first is read by the one above it and by nobody else: a commit
/// changes what these nodes show.
pub(super) fn check_alone(graph: &Graph, nodes: &[Node]) -> Result<()> {
    for pair in nodes.windows(2) {
        let others = graph.parents(&pair[1]).into_iter();
        let is_in_the_way = |parent: &Parent| match parent {
            Parent::Node(node, _) if node.is_same(&pair[0]) => false,
            Parent::Node(node, "backing") => is_used(graph, node),
            _ => true,
        };
        if let Some(other) = others.into_iter().find(is_in_the_way) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "Node '{}' is busy: {other} uses it as well, and its content would change",
                    pair[1].name()
                ),
            ));
        }
    }
    Ok(())
}

/// Whether anybody reads through a node. What the operator has left standing on a layer, with no
/// export or job on top, is not in the way of what happens to that.
pub fn is_used(graph: &Graph, node: &Node) -> bool {
    !graph.roots_reaching(std::slice::from_ref(node)).is_empty()
}

/// Has each layer above the last look at the driver below it anew, which may have been replaced:
/// else those whose plans lead through their backing would plan nothing any more.
pub(super) fn relink(nodes: &[Node], quiesced: &Quiesced) -> Result<()> {
    for pair in nodes.windows(2).rev() {
        pair[0].set_backing(Some(pair[1].clone()), quiesced)?;
    }
    Ok(())
}

/// Makes the last of the nodes ready to be written, where those above hide it: as large as the first,
/// and known to the one above it by whatever it is known by when it has changed.
///
/// # Errors
/// Says what is in the way; then the base is opened for writing, and nothing has changed.
pub fn open_base(layers: &mut Layers, nodes: &[Node], quiesced: &Quiesced) -> Result<()> {
    let (top, base) = (&nodes[0], &nodes[nodes.len() - 1]);
    layers.set_access(base, Access::Write, quiesced)?;
    if base.size() < top.size() {
        let (filters, image) = base.skip_filters();
        if image.driver().identity(true).is_some() {
            return Err(Error::unsupported(format!(
                "node '{}' has {} bytes, and '{}' {}: it would have to grow, and images of this format \
                 refuse a parent whose size was changed. Convert the chain to one image instead (vublk \
                 convert)",
                base.name(),
                base.size(),
                top.name(),
                top.size()
            )));
        }
        block_on(image.resize(top.size(), quiesced))
            .context(|| format!("making node '{}' as large as '{}'", base.name(), top.name()))?;
        relink(&[filters, vec![image]].concat(), quiesced)?;
    }
    follow(layers, nodes, true, quiesced)?;
    relink(nodes, quiesced)
}

/// Has the layer above the last of the nodes know that as it is, and as it is once it has changed if that
/// is still to come.
pub fn follow(
    layers: &mut Layers,
    nodes: &[Node],
    will_change: bool,
    quiesced: &Quiesced,
) -> Result<()> {
    let [overlays @ .., base] = nodes else { return Ok(()) };
    let above = overlays.iter().rfind(|node| !node.driver().is_filter());
    let identity = base.skip_filters().1.driver().identity(will_change);
    let (Some(above), Some(identity)) = (above, identity) else { return Ok(()) };
    let access = image_of(layers, above)?.access;
    layers.set_access(above, Access::Write, quiesced)?;
    let followed = block_on(above.driver().follow_backing(identity));
    layers.set_access(above, access, quiesced)?;
    followed
}

/// Puts a filter in front of a node's driver.
pub(super) fn intercept(node: &Node, quiesced: &Quiesced) -> Arc<Intercept> {
    let intercept = Arc::new(Intercept::new(node.driver(), node.name()));
    node.replace_driver(Arc::clone(&intercept) as Arc<dyn Driver>, quiesced);
    intercept
}

/// Takes the filter away.
pub(super) fn release(node: &Node, intercept: &Intercept, quiesced: &Quiesced) {
    node.replace_driver(Arc::clone(intercept.below()), quiesced);
}

/// Checks that the image of a node can be made to name the image of another one, by this name, or nothing.
pub(super) fn check_renaming(
    layers: &Layers,
    node: &Node,
    new: Option<(&str, &Node)>,
) -> Result<()> {
    let image = image_of(layers, node)?;
    if image.access == Access::Read {
        layers.check_may_write(&image)?;
    }
    let format = new.map(|(_, below)| image_of(layers, below)).transpose()?.map(|i| i.format);
    images::check_new_backing(&image, new.map(|(name, _)| name), format)
}

/// Refuses a name by which the image of a node would lead to another file than the base that it comes to stand
/// on. One that leads nowhere here may be meant for another place.
pub(super) fn check_leads_to(layers: &Layers, node: &Node, name: &str, base: &Node) -> Result<()> {
    let (image, base_image) = (image_of(layers, node)?, image_of(layers, base)?);
    let path = open_gate::combine(image.file.path(), name);
    let Ok(found) = HostFile::open(&path, OpenOptions::default()) else { return Ok(()) };
    if found.identity()? == base_image.file.identity()? {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "the backing file '{name}' is {} for {}, and not node '{}' ({}), which it comes to stand on: whoever \
         opens it later would see another disk",
        path.display(),
        image.name(),
        base.name(),
        base_image.name()
    )))
}

/// Has the image of a node name another backing file (or none); durable on return. What it names
/// must be durable before.
pub(super) fn rename_backing(
    layers: &mut Layers,
    node: &Node,
    name: Option<&str>,
    format: Option<ImageFormat>,
) -> Result<()> {
    let image = image_of(layers, node)?;
    if image.access == Access::Write {
        return images::set_backing(&image, name, format);
    }
    let graph = Arc::clone(layers.graph());
    let quiesced = graph.quiesce(std::slice::from_ref(node));
    let renamed = layers.set_access(node, Access::Write, &quiesced).and_then(|()| {
        let renamed = images::set_backing(&image_of(layers, node)?, name, format);
        layers.set_access(node, Access::Read, &quiesced)?;
        renamed
    });
    graph.resume(quiesced);
    renamed
}

/// The image of a node, or of what it filters.
pub(super) fn image_of(layers: &Layers, node: &Node) -> Result<images::Image> {
    let layer = layers.of(&node.skip_filters().1).map(|layer| layer.image.clone());
    layer.ok_or_else(|| Error::unsupported(format!("node '{}' is not an image", node.name())))
}

/// How an overlay is to name an image that it comes to stand on.
pub(super) fn name_of(layers: &Layers, node: &Node) -> Result<String> {
    let image = image_of(layers, node)?;
    let path = std::path::absolute(image.file.path()).map_err(Error::from)?;
    match path.to_str() {
        Some(name) => Ok(name.to_string()),
        None => Err(Error::invalid(format!("{}: its path is not text", image.name()))),
    }
}
