//! The live graph: all nodes of a daemon by name, who stands on whom, and how that changes.
//!
//! ```text
//! roots      export e0      job j0          what somebody uses: a gate, and a node that is swapped
//!               │              │
//! nodes        top ──backing──► base        names, unique here; children as the drivers say
//!               │file           │file
//!              f1              f0
//! ```
//!
//! * Edges are not stored: a node's children are asked of its driver, and only what a driver cannot
//!   tell (the protocol node that a format's file is shown as) is noted here. A copy of the edges
//!   could be wrong. Whoever follows many of them asks all nodes once, and looks them up in that: a
//!   chain may have 512 files.
//! * A change closes the gates of all roots that reach a node that changes ([`Graph::quiesce`]):
//!   one barrier, however many disks. How long it took is counted ([`Graph::pauses`]).
//! * One thread makes all changes, the main one, so a look at the graph stays true until the change
//!   that it is for. Others may look, and ask the main thread for a change.
//! * A refusal says what is in the way: which export, job or node.
//!
//! Nodes that the operator made (`explicit`) stay until the operator removes them. Those that an
//! image pulled in go with the last node that stands on them.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::block::{Gate, Node, Quiesced, Root};
use crate::error::{Error, ErrorKind, Result};

/// The longest name of a node, in bytes, as in QEMU.
pub const MAX_NODE_NAME: usize = 31;

/// All nodes and roots of a process. See the [module](self).
#[derive(Debug, Default)]
pub struct Graph {
    content: Mutex<Content>,
    pauses: Mutex<Pauses>,
}

#[derive(Debug, Default)]
struct Content {
    /// In the order they were added.
    entries: Vec<Entry>,
    roots: Vec<Root>,
}

#[derive(Clone, Debug)]
struct Entry {
    node: Node,
    /// The protocol node that stands for the file of a format.
    file: Option<Node>,
    explicit: bool,
}

/// Who stands on a node.
#[derive(Clone, Debug)]
pub enum Parent {
    /// Somebody's root.
    Root(Root),
    /// A node, with the role that the child has for it.
    Node(Node, &'static str),
}

impl std::fmt::Display for Parent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Parent::Root(root) => f.write_str(root.name()),
            Parent::Node(node, role) => write!(f, "node '{}' ({role})", node.name()),
        }
    }
}

/// How long changes have kept guests waiting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pauses {
    /// How many there were.
    pub count: u64,
    /// The last one.
    pub last: Duration,
    /// The longest one.
    pub longest: Duration,
    /// The last ones, for percentiles; bounded.
    recent: VecDeque<Duration>,
}

impl Pauses {
    /// How many pauses percentiles are of.
    const RECENT: usize = 1024;

    fn note(&mut self, pause: Duration) {
        self.count += 1;
        self.last = pause;
        self.longest = self.longest.max(pause);
        if self.recent.len() == Self::RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(pause);
    }

    /// The pause that so many of 1000 recent ones do not exceed.
    pub fn permille(&self, permille: usize) -> Duration {
        let mut sorted: Vec<_> = self.recent.iter().copied().collect();
        sorted.sort_unstable();
        let at = (sorted.len() * permille.min(1000)).div_ceil(1000).saturating_sub(1);
        sorted.get(at).copied().unwrap_or_default()
    }
}

/// A name for a node that nobody gave one. `#` cannot start a name that somebody gives.
pub fn auto_name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("#block{:03}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Whether somebody may give this name: a letter, then letters, digits and `-._`.
pub fn is_well_formed(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

impl Graph {
    /// An empty graph.
    pub fn new() -> Arc<Graph> {
        Arc::default()
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap()
    }

    /// Checks that a new node may have this name.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn check_name(&self, name: &str) -> Result<()> {
        if !is_well_formed(name) {
            return Err(Error::invalid(format!("Invalid node-name: '{name}'")));
        }
        if name.len() > MAX_NODE_NAME {
            return Err(Error::invalid("Node name too long"));
        }
        if self.find(name).is_some() {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("Duplicate nodes with node-name='{name}'"),
            ));
        }
        Ok(())
    }

    /// Adds a node. `file` is the protocol node to show below a format; `explicit` whether the
    /// operator has made it, and not an image that pulled it in.
    pub fn add(&self, node: Node, file: Option<Node>, explicit: bool) -> Result<()> {
        let mut content = self.content();
        if content.entries.iter().any(|entry| entry.node.name() == node.name()) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("Duplicate nodes with node-name='{}'", node.name()),
            ));
        }
        content.entries.push(Entry { node, file, explicit });
        Ok(())
    }

    /// The node of that name.
    pub fn find(&self, name: &str) -> Option<Node> {
        let content = self.content();
        content.entries.iter().find(|e| e.node.name() == name).map(|e| e.node.clone())
    }

    /// All nodes, in the order they were added.
    pub fn nodes(&self) -> Vec<Node> {
        self.content().entries.iter().map(|entry| entry.node.clone()).collect()
    }

    /// Whether the operator has made the node.
    pub fn is_explicit(&self, node: &Node) -> bool {
        self.content().entries.iter().any(|e| e.explicit && e.node.is_same(node))
    }

    /// Hands a node over to the operator (who gave it a name), or takes it back.
    pub fn set_explicit(&self, node: &Node, explicit: bool) {
        if let Some(entry) = self.content().entries.iter_mut().find(|e| e.node.is_same(node)) {
            entry.explicit = explicit;
        }
    }

    /// Notes another protocol node below a format.
    pub fn set_file(&self, node: &Node, file: Option<Node>) {
        if let Some(entry) = self.content().entries.iter_mut().find(|e| e.node.is_same(node)) {
            entry.file = file;
        }
    }

    /// The nodes below a node, with their roles.
    pub fn children(&self, node: &Node) -> Vec<(&'static str, Node)> {
        let file = self
            .content()
            .entries
            .iter()
            .find(|e| e.node.is_same(node))
            .and_then(|e| e.file.clone());
        let mut children: Vec<_> = file.map(|file| ("file", file)).into_iter().collect();
        children.extend(node.driver().children());
        children
    }

    /// Who stands on a node.
    pub fn parents(&self, node: &Node) -> Vec<Parent> {
        let roots = self.roots().into_iter().filter(|root| root.node().is_same(node));
        let mut parents: Vec<_> = roots.map(Parent::Root).collect();
        for (entry, children) in self.edges() {
            let of_it = children.into_iter().filter(|(_, child)| child.is_same(node));
            parents.extend(of_it.map(|(role, _)| Parent::Node(entry.node.clone(), role)));
        }
        parents
    }

    /// All nodes, in the order they were added, and what is below each.
    fn edges(&self) -> Vec<(Entry, Vec<(&'static str, Node)>)> {
        let entries = self.content().entries.clone();
        let with_children = |entry: Entry| {
            let file = entry.file.clone().map(|file| ("file", file));
            let children = file.into_iter().chain(entry.node.driver().children()).collect();
            (entry, children)
        };
        entries.into_iter().map(with_children).collect()
    }

    /// The nodes that stand on each node, by its [key](Node::key), as of now.
    pub fn nodes_above(&self) -> HashMap<usize, Vec<Node>> {
        let mut above: HashMap<usize, Vec<Node>> = HashMap::new();
        for (entry, children) in self.edges() {
            for (_, child) in children {
                above.entry(child.key()).or_default().push(entry.node.clone());
            }
        }
        above
    }

    /// Whether `target` is `from` or below it.
    pub fn reaches(&self, from: &Node, target: &Node) -> bool {
        let files: HashMap<usize, Node> = (self.content().entries.iter())
            .filter_map(|entry| Some((entry.node.key(), entry.file.clone()?)))
            .collect();
        let mut seen = HashSet::new();
        let mut left = vec![from.clone()];
        while let Some(node) = left.pop() {
            if node.is_same(target) {
                return true;
            }
            if seen.insert(node.key()) {
                left.extend(files.get(&node.key()).cloned());
                left.extend(node.driver().children().into_iter().map(|(_, child)| child));
            }
        }
        false
    }

    /// Adds somebody's root: what its gate guards is part of every barrier that it must be part of.
    ///
    /// # Errors
    /// If the name is taken, by another root or by a node.
    pub fn add_root(&self, root: &Root) -> Result<()> {
        let mut content = self.content();
        if content.roots.iter().any(|other| other.name() == root.name()) {
            return Err(Error::new(ErrorKind::Busy, format!("'{}' exists already", root.name())));
        }
        content.roots.push(root.clone());
        Ok(())
    }

    /// Takes a root out. Nodes that only it kept alive are the caller's to
    /// [collect](Graph::collect).
    pub fn remove_root(&self, root: &Root) {
        self.content().roots.retain(|other| !other.is_same(root));
    }

    /// All roots.
    pub fn roots(&self) -> Vec<Root> {
        self.content().roots.clone()
    }

    /// The root of that name.
    pub fn root(&self, name: &str) -> Option<Root> {
        self.content().roots.iter().find(|root| root.name() == name).cloned()
    }

    /// The roots whose requests may come to any of the nodes.
    pub fn roots_reaching(&self, nodes: &[Node]) -> Vec<Root> {
        let reaches = |root: &Root| nodes.iter().any(|node| self.reaches(&root.node(), node));
        self.roots().into_iter().filter(reaches).collect()
    }

    /// Closes the gates of all roots that reach any of the nodes, and waits until they are quiet.
    /// Blocks; not for a thread whose own requests must be drained. To be ended with
    /// [`Graph::resume`], which notes how long it took.
    pub fn quiesce(&self, nodes: &[Node]) -> Quiesced {
        let roots = self.roots_reaching(nodes);
        Gate::quiesce_all(roots.iter().map(Root::gate))
    }

    /// The filters before a node, the one that is farthest from it first.
    pub fn filters_on(&self, node: &Node) -> Vec<Node> {
        let mut filters = Vec::new();
        for parent in self.parents(node) {
            if let Parent::Node(filter, _) = parent
                && filter.driver().is_filter()
            {
                filters.extend(self.filters_on(&filter));
                filters.push(filter);
            }
        }
        filters
    }

    /// The roots that stand on a node, or on filters before it.
    pub fn roots_on(&self, node: &Node) -> Vec<Root> {
        let stands = |root: &Root| {
            let (filters, below) = root.node().skip_filters();
            below.is_same(node) || filters.iter().any(|filter| filter.is_same(node))
        };
        self.roots().into_iter().filter(stands).collect()
    }

    /// Opens the gates again. Returns how long the guests were kept waiting.
    pub fn resume(&self, quiesced: Quiesced) -> Duration {
        self.catch_up(&quiesced);
        let pause = quiesced.elapsed();
        drop(quiesced);
        self.pauses.lock().unwrap().note(pause);
        pause
    }

    /// Where a node has another size or driver, has the layers above plan with that. Keeps nobody
    /// waiting if there is no such node.
    pub fn catch_up_all(&self) {
        let behind: Vec<_> =
            self.nodes().into_iter().filter(|node| node.driver().is_behind()).collect();
        if !behind.is_empty() {
            self.resume(self.quiesce(&behind));
        }
    }

    /// Where a driver was replaced, has the layers above plan with the new one.
    fn catch_up(&self, quiesced: &Quiesced) {
        // One that is renewed leaves the one above it behind, so at most once for each layer.
        let nodes = self.nodes();
        for _ in 0..nodes.len() {
            let Some(node) = nodes.iter().find(|node| node.driver().is_behind()) else { return };
            if let Err(err) = node.set_backing(node.backing(), quiesced) {
                // It is slow, and right.
                tracing::warn!("node '{}' plans nothing any more: {err}", node.name());
                return;
            }
        }
    }

    /// How long changes have kept guests waiting so far.
    pub fn pauses(&self) -> Pauses {
        self.pauses.lock().unwrap().clone()
    }

    /// Puts `child` (or nothing) below `parent` as its backing. The gates of all that reach `parent`
    /// are closed.
    ///
    /// # Errors
    /// If a node would come to stand on itself, the driver cannot change its backing, or a root above
    /// sends requests that are too small from then on. Nothing has changed then.
    pub fn set_backing(
        &self,
        parent: &Node,
        child: Option<&Node>,
        quiesced: &Quiesced,
    ) -> Result<()> {
        if let Some(child) = child {
            self.check_cycle(parent, child, "backing")?;
        }
        let before = parent.backing();
        parent.set_backing(child.cloned(), quiesced)?;
        self.check_units_above(parent, quiesced).inspect_err(|_| {
            if let Err(err) = parent.set_backing(before, quiesced) {
                tracing::error!("node '{}' is not on its backing again: {err}", parent.name());
            }
        })
    }

    /// Refuses to have those whose roots stand on `node` stand on another, which is called `name` and
    /// takes requests in units of `unit` bytes only.
    ///
    /// # Errors
    /// Whose requests may be smaller.
    pub fn check_unit(&self, node: &Node, name: &str, unit: u64) -> Result<()> {
        match self.roots_on(node).iter().find(|root| root.unit() < unit) {
            None => Ok(()),
            Some(root) => Err(Error::invalid(format!(
                "{} has blocks of {} bytes, and node '{name}' takes requests in units of {unit} \
                 bytes (logical-block-size={unit} for the one, or cache.direct=off for the other)",
                root.name(),
                root.unit()
            ))),
        }
    }

    /// The same for all that reach a node, which stands on another one by now. Layers in between may
    /// take what the node does not.
    fn check_units_above(&self, node: &Node, quiesced: &Quiesced) -> Result<()> {
        let unit = node.limits().request_alignment;
        let roots = self.roots_reaching(std::slice::from_ref(node));
        if roots.iter().all(|root| root.unit() >= unit) {
            return Ok(());
        }
        // What the layers above demand follows from what those below them do.
        self.catch_up(quiesced);
        roots.iter().try_for_each(|root| {
            let node = root.node();
            self.check_unit(&node, node.name(), node.limits().request_alignment)
        })
    }

    /// Refuses to put `child` below `parent` if that is above it already, or the chain would be
    /// longer than one that can be opened again.
    pub fn check_cycle(&self, parent: &Node, child: &Node, role: &str) -> Result<()> {
        if self.reaches(child, parent) {
            return Err(Error::invalid(format!(
                "Making '{}' a {role} child of '{}' would create a cycle",
                child.name(),
                parent.name()
            )));
        }
        Ok(())
    }

    /// Has everybody who stands on `from` stand on `to` instead, but for `to` itself: what a snapshot
    /// does with the overlay, and the end of a commit or a mirror with their targets. The gates of
    /// all that reach `from` are closed.
    ///
    /// # Errors
    /// If a parent cannot be moved, or a root sends requests that are too small for `to`; those that were
    /// moved before are moved back.
    pub fn replace(&self, from: &Node, to: &Node, quiesced: &Quiesced) -> Result<()> {
        let parents: Vec<_> = (self.parents(from).into_iter())
            .filter(|parent| !matches!(parent, Parent::Node(node, _) if node.is_same(to)))
            .collect();
        self.check_unit(from, to.name(), to.limits().request_alignment)?;
        let put_back = |parents: &[Parent]| {
            for parent in parents {
                // It stood there a moment ago, so it can stand there again.
                if let Err(err) = self.move_parent(parent, from, quiesced) {
                    tracing::error!("{parent} cannot be put back on {}: {err}", from.name());
                }
            }
        };
        for (done, parent) in parents.iter().enumerate() {
            if let Err(err) = self.move_parent(parent, to, quiesced) {
                put_back(&parents[..done]);
                return Err(err.context(format!("{parent} cannot use node '{}'", to.name())));
            }
        }
        self.check_units_above(to, quiesced).inspect_err(|_| put_back(&parents))
    }

    /// Has a parent stand on `to`, a root's session with it.
    fn move_parent(&self, parent: &Parent, to: &Node, quiesced: &Quiesced) -> Result<()> {
        match parent {
            Parent::Root(root) => root.replace_node(to.clone(), quiesced).map(drop),
            Parent::Node(node, "backing") => node.set_backing(Some(to.clone()), quiesced),
            Parent::Node(node, _) if node.driver().is_filter() => {
                let (before, driver) = (node.backing(), node.driver());
                node.set_backing(Some(to.clone()), quiesced)?;
                let renew = |before: &dyn crate::block::Driver| {
                    let mut roots = self.roots_on(node).into_iter();
                    roots.try_for_each(|root| root.renew_session(before, quiesced))
                };
                if let Err(err) = renew(&*driver) {
                    let driver = node.driver();
                    node.set_backing(before, quiesced)?;
                    renew(&*driver)?;
                    return Err(err);
                }
                Ok(())
            }
            Parent::Node(node, role) => Err(Error::unsupported(format!(
                "the {role} of node '{}' cannot be replaced",
                node.name()
            ))),
        }
    }

    /// Takes out a node of the operator's. The caller closes it, and what is returned with it:
    /// nodes that images had pulled in and that nobody uses any more.
    ///
    /// # Errors
    /// In QEMU's words, with who is in the way.
    pub fn remove(&self, name: &str) -> Result<Vec<Node>> {
        let Some(node) = self.find(name) else {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("Failed to find node with node-name='{name}'"),
            ));
        };
        self.check_unused(&node)?;
        if !self.is_explicit(&node) {
            return Err(Error::invalid(format!("Node {name} is not owned by the monitor")));
        }
        self.set_explicit(&node, false);
        Ok(self.collect())
    }

    /// Refuses if anybody stands on the node or holds it.
    pub fn check_unused(&self, node: &Node) -> Result<()> {
        let mut users: Vec<_> = self.parents(node).iter().map(Parent::to_string).collect();
        users.extend(node.holders());
        if users.is_empty() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Busy,
            format!("Node {} is in use: {}", node.name(), users.join(", ")),
        ))
    }

    /// Takes out the nodes that nobody has named and nobody uses, topmost first. The caller closes
    /// them in that order.
    pub fn collect(&self) -> Vec<Node> {
        let mut gone = Vec::new();
        let edges = self.edges();
        // How many stand on each. A node on which nobody does is the next to go.
        let mut users: HashMap<usize, usize> = HashMap::new();
        let roots = self.roots().into_iter().map(|root| root.node().key());
        let below = edges.iter().flat_map(|(_, children)| children).map(|(_, child)| child.key());
        roots.chain(below).for_each(|key| *users.entry(key).or_default() += 1);
        let is_unused = |entry: &Entry, users: &HashMap<usize, usize>| {
            !entry.explicit
                && users.get(&entry.node.key()).is_none_or(|count| *count == 0)
                && entry.node.holders().is_empty()
        };
        let by_key: HashMap<_, _> = edges.iter().map(|edge| (edge.0.node.key(), edge)).collect();
        let mut left: VecDeque<_> =
            edges.iter().filter(|(entry, _)| is_unused(entry, &users)).collect();
        while let Some((entry, children)) = left.pop_front() {
            gone.push(entry.node.clone());
            for (_, child) in children {
                *users.entry(child.key()).or_default() -= 1;
                let child = by_key.get(&child.key());
                left.extend(child.filter(|(entry, _)| is_unused(entry, &users)));
            }
        }
        let keys: HashSet<_> = gone.iter().map(Node::key).collect();
        self.content().entries.retain(|entry| !keys.contains(&entry.node.key()));
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::driver::{BlockStatus, Driver, Limits};
    use crate::block::{NodeOptions, Rights};
    use crate::io::{Buffers, Fut};
    use crate::units::ByteRange;

    /// A driver that does nothing but stand on another.
    #[derive(Clone, Debug, Default)]
    struct Dummy {
        backing: Arc<Mutex<Option<Node>>>,
        session: Arc<Mutex<Option<u128>>>,
        has_no_sessions: bool,
        is_filter: bool,
        /// How often it was asked for its children.
        asked: Arc<std::sync::atomic::AtomicUsize>,
    }

    impl Driver for Dummy {
        fn name(&self) -> &'static str {
            "dummy"
        }
        fn limits(&self) -> Limits {
            Limits {
                size: 4096,
                request_alignment: 512,
                memory_alignment: 1,
                optimal_io: 0,
                discard_granularity: 0,
                read_only: false,
            }
        }
        fn read<'a>(&'a self, _: u64, _: Buffers) -> Fut<'a, ()> {
            Box::pin(async { Ok(()) })
        }
        fn write<'a>(&'a self, _: u64, _: Buffers, _: bool) -> Fut<'a, ()> {
            Box::pin(async { Ok(()) })
        }
        fn write_zeroes<'a>(&'a self, _: ByteRange, _: bool) -> Fut<'a, ()> {
            Box::pin(async { Ok(()) })
        }
        fn discard<'a>(&'a self, _: ByteRange) -> Fut<'a, ()> {
            Box::pin(async { Ok(()) })
        }
        fn flush<'a>(&'a self) -> Fut<'a, ()> {
            Box::pin(async { Ok(()) })
        }
        fn block_status<'a>(&'a self, _: ByteRange) -> Fut<'a, BlockStatus> {
            Box::pin(async { Err(Error::unsupported("not asked for here")) })
        }
        fn children(&self) -> Vec<(&'static str, Node)> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            let role = if self.is_filter { "file" } else { "backing" };
            self.backing.lock().unwrap().iter().map(|node| (role, node.clone())).collect()
        }
        fn is_filter(&self) -> bool {
            self.is_filter
        }
        fn on_backing(&self, backing: Option<Node>, _: &Quiesced) -> Result<Arc<dyn Driver>> {
            *self.backing.lock().unwrap() = backing;
            Ok(Arc::new(self.clone()))
        }
        fn begin_session(&self, nonce: u128) -> Result<()> {
            if self.has_no_sessions {
                return Err(Error::unsupported("no sessions here"));
            }
            if self.is_filter {
                let below = self.backing.lock().unwrap().clone();
                return below.map_or(Ok(()), |below| below.driver().begin_session(nonce));
            }
            *self.session.lock().unwrap() = Some(nonce);
            Ok(())
        }
    }

    fn node_of(driver: Arc<Dummy>, name: &str) -> Node {
        Node::new(driver, NodeOptions { name: name.into(), ..NodeOptions::default() })
    }

    fn node(name: &str) -> Node {
        node_of(Arc::default(), name)
    }

    /// A graph of `root -> top -> base`, with a file below base that nobody named.
    fn sample() -> (Arc<Graph>, Root, Node, Node) {
        let graph = Graph::new();
        let (file, base, top) = (node("#block900"), node("base"), node("top"));
        graph.add(file.clone(), None, false).unwrap();
        graph.add(base.clone(), Some(file), true).unwrap();
        graph.add(top.clone(), None, true).unwrap();
        let quiesced = graph.quiesce(&[]);
        graph.set_backing(&top, Some(&base), &quiesced).unwrap();
        let root = Root::new("export 'e0'", top.clone());
        graph.add_root(&root).unwrap();
        (graph, root, top, base)
    }

    fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn names_follow_the_rules() {
        let (graph, ..) = sample();
        graph.check_name("disk-0.x_y").unwrap();
        for (name, words) in [
            ("", "Invalid node-name: ''"),
            ("0disk", "Invalid node-name: '0disk'"),
            ("#block900", "Invalid node-name: '#block900'"),
            ("a b", "Invalid node-name: 'a b'"),
            (&"x".repeat(32), "Node name too long"),
            ("base", "Duplicate nodes with node-name='base'"),
        ] {
            assert_eq!(message(graph.check_name(name)), words);
        }
        assert_ne!(auto_name(), auto_name());
        assert!(!is_well_formed(&auto_name()));
        message(graph.add(node("top"), None, true));
    }

    #[test]
    fn what_is_used_stays_and_says_by_whom() {
        let (graph, root, top, base) = sample();
        assert_eq!(message(graph.remove("base")), "Node base is in use: node 'top' (backing)");
        assert_eq!(message(graph.remove("top")), "Node top is in use: export 'e0'");
        assert_eq!(message(graph.remove("nope")), "Failed to find node with node-name='nope'");
        graph.remove_root(&root);
        let hold = top.hold("job 'j0'", Rights::CONSISTENT_READ, Rights::ALL).unwrap();
        assert_eq!(message(graph.remove("top")), "Node top is in use: job 'j0'");
        // Whoever holds a node keeps the graph around it as it is, unless it says otherwise.
        let err = message(top.hold("blockdev-snapshot", Rights::GRAPH, Rights::ALL));
        assert_eq!(err, "Node 'top' is busy: block device is in use by job 'j0'");
        drop(hold);
        let names = |nodes: Vec<Node>| -> Vec<_> {
            nodes.iter().map(|node| node.name().to_string()).collect()
        };
        assert_eq!(names(graph.remove("top").unwrap()), ["top"]);
        // The driver still stands on its backing; a node that is gone from the graph does not count.
        assert_eq!(names(graph.remove("base").unwrap()), ["base", "#block900"]);
        assert!(base.driver().children().is_empty() && graph.nodes().is_empty());
    }

    /// A chain as long as one may be: each step up and down asks each driver a few times at most.
    #[test]
    fn a_long_chain_is_walked_once() {
        let graph = Graph::new();
        let chain: Vec<_> = (0..1024)
            .map(|_| {
                let driver: Arc<Dummy> = Arc::default();
                let node = node_of(driver.clone(), &auto_name());
                graph.add(node.clone(), None, false).unwrap();
                (driver, node)
            })
            .collect();
        let quiesced = graph.quiesce(&[]);
        for pair in chain.windows(2) {
            pair[0].1.set_backing(Some(pair[1].1.clone()), &quiesced).unwrap();
        }
        let asked = || chain.iter().map(|(driver, _)| driver.asked.load(Ordering::Relaxed)).sum();
        let cost = |work: &dyn Fn()| -> usize {
            let before: usize = asked();
            work();
            asked() - before
        };
        let (top, base) = (&chain[0].1, &chain[1023].1);
        assert!(cost(&|| assert!(graph.reaches(top, base) && !graph.reaches(base, top))) <= 2048);
        assert!(cost(&|| assert_eq!(graph.parents(base).len(), 1)) <= 1024);
        let gone = std::cell::RefCell::new(Vec::new());
        let asked = cost(&|| *gone.borrow_mut() = graph.collect());
        assert!(asked <= 1024, "{asked}");
        let gone = gone.into_inner();
        assert!(gone.iter().zip(&chain).all(|(gone, (_, node))| gone.is_same(node)));
        assert_eq!((gone.len(), graph.nodes().len()), (1024, 0));
        // What a node drops it drops with all below it, and none of these stacks is so deep.
        for (_, node) in chain.iter().rev() {
            node.set_backing(None, &quiesced).unwrap();
        }
    }

    #[test]
    fn nothing_comes_to_stand_on_itself() {
        let (graph, _root, top, base) = sample();
        let quiesced = graph.quiesce(std::slice::from_ref(&top));
        let err = message(graph.set_backing(&base, Some(&top), &quiesced));
        assert_eq!(err, "Making 'top' a backing child of 'base' would create a cycle");
        message(graph.set_backing(&base, Some(&base), &quiesced));
        assert!(graph.children(&base).iter().all(|(role, _)| *role == "file"));
    }

    #[test]
    fn parents_move_and_sessions_follow() {
        let (graph, root, top, base) = sample();
        root.begin_session(7, |_| {}).unwrap();
        let driver = Arc::new(Dummy::default());
        let overlay = node_of(driver.clone(), "overlay");
        graph.add(overlay.clone(), None, true).unwrap();
        let quiesced = graph.quiesce(std::slice::from_ref(&top));
        graph.set_backing(&overlay, Some(&top), &quiesced).unwrap();
        graph.replace(&top, &overlay, &quiesced).unwrap();
        assert!(root.node().is_same(&overlay));
        // The overlay itself still stands on what it replaced.
        assert!(graph.reaches(&overlay, &base));
        assert_eq!(*driver.session.lock().unwrap(), Some(7));
        let pause = graph.resume(quiesced);
        assert_eq!((graph.pauses().count, graph.pauses().last), (1, pause));
        assert_eq!(graph.pauses().permille(990), pause);
    }

    /// A front-end comes while the graph changes; its session is begun by another thread.
    #[test]
    fn a_session_that_just_begins_moves_too() {
        use std::sync::mpsc::sync_channel;
        let (_graph, root, ..) = sample();
        let driver = Arc::new(Dummy::default());
        let overlay = node_of(driver.clone(), "overlay");
        let (begins, begun) = sync_channel(1);
        let (moves, moved) = sync_channel(1);
        std::thread::scope(|scope| {
            let mover = root.clone();
            scope.spawn(move || {
                begun.recv().unwrap();
                mover.replace_node(overlay, &mover.quiesce()).unwrap();
                let _ = moves.send(());
            });
            let between = move |_| {
                let _ = begins.try_send(());
                // The root is moved before the session is known to it, or waits for that.
                let _ = moved.recv_timeout(Duration::from_millis(100));
            };
            root.begin_session(7, between).unwrap();
        });
        assert_eq!((root.node().name(), root.session()), ("overlay", Some(7)));
        assert_eq!(*driver.session.lock().unwrap(), Some(7));
    }

    /// The same with a filter in between, whose place changes and not the root's.
    #[test]
    fn a_filter_whose_session_cannot_move_stays() {
        let (graph, _root, top, _base) = sample();
        let filter = node_of(Arc::new(Dummy { is_filter: true, ..Dummy::default() }), "filter");
        graph.add(filter.clone(), None, true).unwrap();
        let root = Root::new("export 'e1'", filter.clone());
        graph.add_root(&root).unwrap();
        let deaf = Arc::new(Dummy { has_no_sessions: true, ..Dummy::default() });
        let overlay = node_of(deaf, "overlay");
        let quiesced = graph.quiesce(std::slice::from_ref(&filter));
        filter.set_backing(Some(top.clone()), &quiesced).unwrap();
        root.begin_session(1, |_| {}).unwrap();
        message(graph.replace(&top, &overlay, &quiesced));
        assert!(filter.backing().unwrap().is_same(&top));
    }

    #[test]
    fn a_parent_that_cannot_move_leaves_all_as_it_was() {
        let (graph, root, top, _base) = sample();
        let other = Root::new("export 'e1'", top.clone());
        graph.add_root(&other).unwrap();
        root.begin_session(1, |_| {}).unwrap();
        let deaf = Arc::new(Dummy { has_no_sessions: true, ..Dummy::default() });
        let overlay = node_of(deaf, "overlay");
        graph.add(overlay.clone(), None, true).unwrap();
        let quiesced = graph.quiesce(std::slice::from_ref(&top));
        message(graph.replace(&top, &overlay, &quiesced));
        assert!(root.node().is_same(&top) && other.node().is_same(&top));
    }

    #[test]
    fn a_barrier_closes_what_reaches_the_nodes_and_nothing_else() {
        let (graph, root, _top, base) = sample();
        let lone = node("lone");
        graph.add(lone.clone(), None, true).unwrap();
        let apart = Root::new("export 'apart'", lone);
        graph.add_root(&apart).unwrap();
        let quiesced = graph.quiesce(&[base]);
        assert!(root.gate().join("late", || {}).is_closed());
        assert!(!apart.gate().join("late", || {}).is_closed());
        drop(quiesced);
    }
}
