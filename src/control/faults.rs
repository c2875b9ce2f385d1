//! Faults of disks: how clients and command lines describe them, and which nodes have them.
//!
//! A fault filter is a node of its own. It is made by `--blockdev` and `blockdev-add`, or put under
//! the exports of a node by `x-vublk-fault-set` while their guests run, between two requests. The
//! exports move to the filter and back; the nodes below stay as they are. So a write log that
//! records a node is below the filter, whichever of the two came first.

use std::sync::Arc;
use std::time::Duration;

use crate::block::{Driver, Graph, Node, NodeOptions, Root, graph};
use crate::control::QmpError;
use crate::control::qapi::{Flat, QmpResult};
use crate::filters::fault::{
    DelayRule, ErrorRule, Fault, FaultOp, Scope, Settings, VolatileSettings,
};
use crate::io::block_on;
use crate::qapi;
use crate::units::{ByteRange, MIB};

/// The most rules of a filter: each request looks at all of them.
const MAX_RULES: usize = 256;
/// The longest delay, in microseconds: an hour.
const MAX_DELAY_US: u64 = 3_600_000_000;
/// How much a volatile cache holds if nothing is said, in bytes.
const DEFAULT_VOLATILE: u64 = 64 * MIB;
/// The most that it may hold, in bytes.
const MAX_VOLATILE: u64 = 1024 * MIB;

qapi! {
    /// A kind of requests.
    pub enum FaultIOType {
        Discard = "discard",
        Flush = "flush",
        Read = "read",
        Write = "write",
        WriteZeroes = "write-zeroes",
    }
}
qapi! {
    /// Which requests a rule applies to.
    pub struct FaultScopeOptions {
        /// Those of this kind; of any if absent.
        pub iotype: Option<FaultIOType>,
        /// Those that touch the disk from this byte on.
        pub offset: Option<u64>,
        /// So many bytes; to the end of the disk if absent.
        pub length: Option<u64>,
        /// But for the first so many.
        pub after: Option<u64>,
        /// One of so many, at random; all if absent.
        pub one_in: Option<u64>,
        /// Only one request.
        pub once: Option<bool>,
    }
}
qapi! {
    /// Requests that fail.
    pub struct FaultErrorOptions {
        /// Which.
        pub scope: Flat<FaultScopeOptions>,
        /// With this error number; 5 (EIO) if absent.
        pub errno: Option<u32>,
    }
}
qapi! {
    /// Requests that wait before they begin.
    pub struct FaultDelayOptions {
        /// Which.
        pub scope: Flat<FaultScopeOptions>,
        /// How long, in microseconds.
        pub delay_us: u64,
        /// How long at most: then it is a random time between the two.
        pub delay_max_us: Option<u64>,
    }
}
qapi! {
    /// A write cache that a kill empties.
    pub struct FaultVolatileOptions {
        /// How many bytes it holds; 64 MiB if absent.
        pub size: Option<u64>,
        /// One of so many writes reaches the disk at once, at random; none if absent.
        pub survive_one_in: Option<u64>,
        /// Of one of so many writes a part reaches the disk at once, at random; none if absent.
        pub tear_one_in: Option<u64>,
    }
}
qapi! {
    /// The faults of a disk.
    pub struct FaultOptions {
        /// What random choices depend on; 0 if absent.
        pub seed: Option<u64>,
        /// Requests that fail.
        pub inject_error: Option<Vec<FaultErrorOptions>>,
        /// Requests that take long.
        pub inject_delay: Option<Vec<FaultDelayOptions>>,
        /// One of so many flushes is answered without having been done, at random; all with 1.
        pub flush_lies_one_in: Option<u64>,
        /// What is written is lost by a kill, unless it was flushed.
        pub volatile_cache: Option<FaultVolatileOptions>,
    }
}

impl FaultScopeOptions {
    fn read(&self) -> QmpResult<Scope> {
        let range = match (self.offset, self.length) {
            (None, None) => None,
            (offset, length) => {
                let offset = offset.unwrap_or(0);
                let len = length.unwrap_or(u64::MAX - offset);
                let range = ByteRange::new(offset, len).filter(|range| !range.is_empty());
                Some(range.ok_or_else(|| expects("length", "a range that is not empty"))?)
            }
        };
        if self.one_in == Some(0) {
            return Err(expects("one-in", "at least 1"));
        }
        Ok(Scope {
            op: self.iotype.map(|iotype| match iotype {
                FaultIOType::Read => FaultOp::Read,
                FaultIOType::Write => FaultOp::Write,
                FaultIOType::WriteZeroes => FaultOp::WriteZeroes,
                FaultIOType::Discard => FaultOp::Discard,
                FaultIOType::Flush => FaultOp::Flush,
            }),
            range,
            after: self.after.unwrap_or(0),
            one_in: self.one_in.unwrap_or(1),
            once: self.once == Some(true),
        })
    }
}

fn expects(parameter: &str, what: &str) -> QmpError {
    QmpError::generic(format!("Parameter '{parameter}' expects {what}"))
}

impl FaultErrorOptions {
    fn read(&self) -> QmpResult<ErrorRule> {
        let errno = i32::try_from(self.errno.unwrap_or(libc::EIO as u32)).unwrap_or(0);
        if !(1..=4095).contains(&errno) {
            return Err(expects("errno", "an error number from 1 to 4095"));
        }
        Ok(ErrorRule { scope: self.scope.read()?, errno })
    }
}

impl FaultDelayOptions {
    fn read(&self) -> QmpResult<DelayRule> {
        let least = self.delay_us;
        let most = self.delay_max_us.unwrap_or(least);
        if most < least || most > MAX_DELAY_US {
            let what = format!("at least delay-us, and at most {MAX_DELAY_US} (an hour)");
            return Err(expects("delay-max-us", &what));
        }
        let (least, most) = (Duration::from_micros(least), Duration::from_micros(most));
        Ok(DelayRule { scope: self.scope.read()?, least, most })
    }
}

impl FaultOptions {
    /// What they mean.
    ///
    /// # Errors
    /// Names the member that makes no sense.
    pub fn read(&self) -> QmpResult<Settings> {
        let errors = self.inject_error.iter().flatten().map(FaultErrorOptions::read);
        let delays = self.inject_delay.iter().flatten().map(FaultDelayOptions::read);
        let settings = Settings {
            seed: self.seed.unwrap_or(0),
            errors: errors.collect::<QmpResult<_>>()?,
            delays: delays.collect::<QmpResult<_>>()?,
            flush_lies_one_in: self.flush_lies_one_in.unwrap_or(0),
            volatile: self.volatile_cache.as_ref().map(|volatile| VolatileSettings {
                size: volatile.size.unwrap_or(DEFAULT_VOLATILE),
                survive_one_in: volatile.survive_one_in.unwrap_or(0),
                tear_one_in: volatile.tear_one_in.unwrap_or(0),
            }),
        };
        if settings.errors.len() + settings.delays.len() > MAX_RULES {
            return Err(QmpError::generic(format!("there are more than {MAX_RULES} faults")));
        }
        if settings.volatile.is_some_and(|volatile| volatile.size > MAX_VOLATILE) {
            return Err(expects("volatile-cache.size", &format!("at most {MAX_VOLATILE}")));
        }
        Ok(settings)
    }
}

/// All fault filters of a daemon.
#[derive(Debug, Default)]
pub struct Faults(Vec<Faulty>);

/// A fault filter and its node.
#[derive(Clone, Debug)]
pub struct Faulty {
    /// Its node.
    pub node: Node,
    /// What the node's driver is.
    pub filter: Arc<Fault>,
}

impl Faults {
    /// A new filter on a node. The caller gives it a place in the graph.
    pub fn make(&mut self, name: Option<&str>, below: &Node, settings: Settings) -> Node {
        let name = name.map_or_else(graph::auto_name, String::from);
        let filter = Arc::new(Fault::new(&name, below.clone(), settings));
        let options = NodeOptions { name, read_only: below.limits().read_only, keeps_space: false };
        let node = Node::new(Arc::clone(&filter) as Arc<dyn Driver>, options);
        self.0.push(Faulty { node: node.clone(), filter });
        node
    }

    /// The filter that a node is.
    pub fn of(&self, node: &Node) -> Option<Faulty> {
        self.0.iter().find(|faulty| faulty.node.is_same(node)).cloned()
    }

    /// All of them.
    pub fn all(&self) -> &[Faulty] {
        &self.0
    }

    /// Forgets those whose nodes have left the graph.
    pub fn forget_removed(&mut self, graph: &Graph) {
        let nodes = graph.nodes();
        self.0.retain(|faulty| nodes.iter().any(|node| node.is_same(&faulty.node)));
    }
}

/// Changes the faults of a filter, between two requests of the guests above.
///
/// # Errors
/// If what was kept from the disk cannot be written.
pub fn change(graph: &Graph, faulty: &Faulty, settings: Settings) -> QmpResult<()> {
    let quiesced = graph.quiesce(std::slice::from_ref(&faulty.node));
    let changed = block_on(faulty.filter.set(settings));
    graph.resume(quiesced);
    Ok(changed?)
}

/// Puts `roots` on another node, or none of them. Their gates are closed and opened again.
///
/// # Errors
/// If the session of a guest cannot go on there.
pub fn move_roots(graph: &Graph, roots: &[Root], from: &Node, to: &Node) -> QmpResult<()> {
    let quiesced = graph.quiesce(&[from.clone(), to.clone()]);
    let mut result = Ok(());
    for (done, root) in roots.iter().enumerate() {
        if let Err(err) = root.replace_node(to.clone(), &quiesced) {
            for root in &roots[..done] {
                // It was there a moment ago, and its session still is.
                if let Err(err) = root.replace_node(from.clone(), &quiesced) {
                    tracing::error!(
                        "{} cannot be put back on '{}': {err}",
                        root.name(),
                        from.name()
                    );
                }
            }
            result = Err(err.into());
            break;
        }
    }
    graph.resume(quiesced);
    result
}
