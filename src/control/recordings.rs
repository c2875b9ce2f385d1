//! Which nodes of a daemon are being recorded in write logs.
//!
//! A recording is a filter in front of a node's driver, put there and taken away while the gates of
//! all that reach the node are closed: the guest sees a pause, and the log begins or ends between
//! two requests. While it lasts the graph around the node cannot be changed, because a snapshot, say,
//! would lead the guest's writes past the log without anybody noticing.

use std::sync::Arc;

use crate::block::node::Hold;
use crate::block::{Driver, Graph, Node, Rights};
use crate::control::QmpError;
use crate::control::qapi::QmpResult;
use crate::filters::WriteLog;
use crate::images::Image;
use crate::images::recording::{RecordRequest, Recording, record};
use crate::io::block_on;

/// All recordings of a daemon.
#[derive(Debug, Default)]
pub struct Recordings(Vec<Recorded>);

/// A node that is being recorded.
#[derive(Debug)]
struct Recorded {
    node: Node,
    filter: Arc<WriteLog>,
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
        let recording = record(image, node.driver(), request)?;
        recording.say(image.name());
        let filter = Arc::clone(&recording.filter) as Arc<dyn Driver>;
        let quiesced = graph.quiesce(std::slice::from_ref(node));
        node.replace_driver(filter, &quiesced);
        graph.resume(quiesced);
        self.0.push(Recorded { node: node.clone(), filter: recording.filter, _hold: hold });
        Ok(())
    }

    /// Takes note of a node whose driver is a recording one from the start.
    pub fn adopt(&mut self, node: &Node, recording: &Recording) -> QmpResult<()> {
        let hold = hold(node, recording.filter.log_name())?;
        let filter = Arc::clone(&recording.filter);
        self.0.push(Recorded { node: node.clone(), filter, _hold: hold });
        Ok(())
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
        let recorded = self.0.swap_remove(at);
        let quiesced = graph.quiesce(std::slice::from_ref(node));
        node.replace_driver(Arc::clone(recorded.filter.below()), &quiesced);
        let ended = block_on(recorded.filter.end());
        graph.resume(quiesced);
        tracing::info!("recording in {} has ended", recorded.filter.log_name());
        Ok(ended?)
    }

    /// Adds a mark to the log of a node; it is durable on return.
    pub fn mark(&self, node: &Node, text: &str) -> QmpResult<()> {
        let recorded = self.of(node).ok_or_else(|| not_recorded(node))?;
        Ok(block_on(recorded.filter.mark(text.as_bytes()))?)
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
