//! Which nodes of a daemon are being recorded in write logs.
//!
//! A recording is a filter in front of a node's driver, put there and taken away while the gates of
//! all that reach the node are closed: the guest sees a pause, and the log begins or ends between
//! two requests. While it lasts the graph around the node cannot be changed, because a snapshot, say,
//! would lead the guest's writes past the log without anybody noticing.
//!
//! Or it is a node of its own (`blklogwrites`), above the one that is recorded. Then it lasts as long
//! as that node does.

use std::sync::Arc;

use crate::block::node::Hold;
use crate::block::{Driver, Graph, Node, NodeOptions, Rights};
use crate::control::QmpError;
use crate::control::qapi::QmpResult;
use crate::error::Result;
use crate::filters::WriteLog;
use crate::filters::write_log::open::sectors_too_large;
use crate::filters::write_log::{Existing, Order, Settings};
use crate::images::Image;
use crate::images::recording::{RecordRequest, Recording, record};
use crate::io::block_on;
use crate::qapi;

qapi! {
    /// Where flushes stand in a log.
    pub enum LogOrder {
        /// Before all that had not completed when they were submitted.
        Strict = "strict",
        /// Before all that had not completed when they ended, as in QEMU.
        Completion = "completion",
    }
}
qapi! {
    /// How a log is kept.
    pub struct LogOptions {
        /// Size of the log's sectors, for a new log; 512 if absent.
        pub log_sector_size: Option<u32>,
        /// Add to the log whatever image it was of.
        pub log_append: Option<bool>,
        /// Start the log anew.
        pub log_overwrite: Option<bool>,
        /// Count entries in the superblock at least every so many of them.
        pub log_super_update_interval: Option<u64>,
        /// Where flushes stand; `strict` if absent.
        pub log_order: Option<LogOrder>,
        /// Its sidecar; beside the log if absent.
        pub log_sidecar: Option<String>,
    }
}

impl LogOptions {
    /// What they mean.
    ///
    /// # Errors
    /// Names what makes no sense.
    pub fn read(&self) -> QmpResult<Settings> {
        let existing = match (self.log_append == Some(true), self.log_overwrite == Some(true)) {
            (true, true) => return Err(exclusive("log-append", "log-overwrite")),
            (true, false) if self.log_sector_size.is_some() => {
                return Err(exclusive("log-append", "log-sector-size"));
            }
            (true, false) => Existing::Append,
            (false, true) => Existing::Overwrite,
            (false, false) => Existing::Continue,
        };
        let interval = self.log_super_update_interval.unwrap_or(Settings::default().interval);
        if interval == 0 {
            return Err(QmpError::generic(
                "Parameter 'log-super-update-interval' expects at least 1",
            ));
        }
        let order = match self.log_order {
            None | Some(LogOrder::Strict) => Order::Strict,
            Some(LogOrder::Completion) => Order::Completion,
        };
        Ok(Settings { sector_size: self.log_sector_size, existing, interval, order })
    }
}

fn exclusive(one: &str, other: &str) -> QmpError {
    QmpError::generic(format!("{one} and {other} are mutually exclusive"))
}

/// All recordings of a daemon.
#[derive(Debug, Default)]
pub struct Recordings(Vec<Recorded>);

/// A node that is being recorded.
#[derive(Debug)]
struct Recorded {
    node: Node,
    filter: Arc<WriteLog>,
    /// Whether the filter is the node, and not put before the driver of one.
    is_own_node: bool,
    /// Keeps the graph as it is.
    _hold: Hold,
}

impl Recordings {
    /// Starts to record a node.
    ///
    /// # Errors
    /// If it is recorded already, if the graph is being changed, or if the log is refused.
    pub fn start(
        &mut self,
        graph: &Graph,
        image: &Image,
        request: &RecordRequest,
    ) -> QmpResult<()> {
        let node = &image.node;
        if let Some(recorded) = self.of(node) {
            return Err(QmpError::generic(format!(
                "node '{}' is being recorded in {} already",
                node.name(),
                recorded.filter.log_name()
            )));
        }
        let hold = hold(node, &request.log.display().to_string())?;
        node.check_guest_is_back()?;
        let recording = record(image, node.driver(), request)?;
        let filter = Arc::clone(&recording.filter) as Arc<dyn Driver>;
        let quiesced = graph.quiesce(std::slice::from_ref(node));
        if let Err(err) = block_on(recording.filter.check_unchanged()) {
            graph.resume(quiesced);
            return Err(err.into());
        }
        recording.say(image.name());
        node.replace_driver(filter, &quiesced);
        graph.resume(quiesced);
        let (node, filter) = (node.clone(), recording.filter);
        self.0.push(Recorded { node, filter, is_own_node: false, _hold: hold });
        Ok(())
    }

    /// Takes note of a node whose driver is a recording one from the start.
    pub fn adopt(&mut self, node: &Node, recording: &Recording) -> QmpResult<()> {
        let hold = hold(node, recording.filter.log_name())?;
        let filter = Arc::clone(&recording.filter);
        self.0.push(Recorded { node: node.clone(), filter, is_own_node: false, _hold: hold });
        Ok(())
    }

    /// Makes a node of a recording of `below`, which nobody else may write from now on. The caller
    /// gives it a place in the graph.
    pub fn make_node(
        &mut self,
        options: NodeOptions,
        below: &Node,
        recording: &Recording,
    ) -> QmpResult<Node> {
        let holder = format!("the write log {}", recording.filter.log_name());
        let shared = Rights::ALL.without(Rights::WRITE);
        let hold = below.hold(holder, Rights::WRITE, shared)?;
        let filter = Arc::clone(&recording.filter);
        let node = Node::new(Arc::clone(&filter) as Arc<dyn Driver>, options);
        self.0.push(Recorded { node: node.clone(), filter, is_own_node: true, _hold: hold });
        Ok(node)
    }

    /// Lets go of what nodes that are gone have recorded. Their logs have ended; what is returned
    /// wants to hear when the images below are closed, too.
    pub fn forget_removed(&mut self, graph: &Graph) -> Vec<Arc<WriteLog>> {
        let nodes = graph.nodes();
        let is_gone = |recorded: &mut Recorded| {
            recorded.is_own_node && !nodes.iter().any(|node| node.is_same(&recorded.node))
        };
        self.0.extract_if(.., is_gone).map(|recorded| recorded.filter).collect()
    }

    /// All images are closed.
    pub fn images_were_closed(&mut self) -> Result<()> {
        let own = self.0.drain(..).filter(|recorded| recorded.is_own_node);
        let noted = own.map(|recorded| block_on(recorded.filter.image_was_closed()));
        noted.fold(Ok(()), Result::and)
    }

    /// Ends the recording of a node: its log gets its last mark.
    ///
    /// # Errors
    /// If it is not recorded. If the log cannot be ended in order: then it is not recorded any more
    /// all the same.
    pub fn stop(&mut self, graph: &Graph, node: &Node) -> QmpResult<()> {
        let Some(at) = self.0.iter().position(|recorded| recorded.node.is_same(node)) else {
            return Err(not_recorded(node));
        };
        if self.0[at].is_own_node {
            return Err(QmpError::generic(format!(
                "node '{0}' is a log of its own, which ends with it (blockdev-del node-name={0})",
                node.name()
            )));
        }
        let recorded = self.0.swap_remove(at);
        let quiesced = graph.quiesce(std::slice::from_ref(node));
        node.replace_driver(Arc::clone(recorded.filter.below()), &quiesced);
        let ended = block_on(recorded.filter.end());
        recorded.filter.unlock();
        graph.resume(quiesced);
        tracing::info!("recording in {} has ended", recorded.filter.log_name());
        Ok(ended?)
    }

    /// Adds a mark to the log of a node; it is durable on return.
    pub fn mark(&self, node: &Node, text: &str) -> QmpResult<()> {
        let recorded = self.of(node).ok_or_else(|| not_recorded(node))?;
        Ok(block_on(recorded.filter.mark(text.as_bytes()))?)
    }

    /// Refuses a guest whose blocks are smaller than the sectors of the log in which a node is recorded:
    /// its writes would fail.
    pub fn check_blocks(&self, node: &Node, block_size: u64) -> QmpResult<()> {
        let Some(recorded) = self.of(node) else { return Ok(()) };
        let sector_size = recorded.filter.sector_size();
        if sector_size <= block_size {
            return Ok(());
        }
        let refusal = sectors_too_large(sector_size, block_size, "logical-block-size=");
        Err(refusal.context(recorded.filter.log_name()).into())
    }

    /// Whether a node is recorded.
    pub fn is_recorded(&self, node: &Node) -> bool {
        self.of(node).is_some()
    }

    fn of(&self, node: &Node) -> Option<&Recorded> {
        self.0.iter().find(|recorded| recorded.node.is_same(node))
    }
}

fn hold(node: &Node, log: &str) -> QmpResult<Hold> {
    Ok(node.hold(format!("the write log {log}"), Rights::NONE, Rights::ALL)?)
}

fn not_recorded(node: &Node) -> QmpError {
    QmpError::generic(format!(
        "node '{}' is not being recorded (x-vublk-log-start begins that)",
        node.name()
    ))
}
