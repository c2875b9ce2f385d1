//! The block core: nodes, drivers, formats, and what keeps changes to the graph safe.
//!
//! ```text
//! Root ──► Node ──► dyn Driver ──► (filters forward to child Nodes)
//!                       ▲
//!                       └── FormatDriver<dyn Format> ──► File   (adapter: splitting, zero fill, payload I/O)
//! ```
//!
//! * [`Root`]: what an export or a job holds: a node that can be swapped, behind a gate.
//! * [`Graph`]: all nodes by name, who stands on whom, and how that changes.
//! * [`Node`]: the cheap-clone handle all callers hold. Checks range, alignment and rights, counts.
//! * [`Driver`]: a synchronous `plan` and asynchronous operations.
//! * [`InPlace`]: writes that a thread performs at once and completes together.
//! * [`Format`]: metadata only; [`FormatDriver`] turns one into a driver.
//! * [`Keep`]: what must outlive the process but not the power.
//! * [`RangeLock`]: the one lock that may be held across an await.
//! * [`Gate`]: the one place where a running export is paused, drained and changed.
//! * [`OpenGate`]: which files an image may pull in.

pub mod driver;
pub mod format;
pub mod gate;
pub mod graph;
pub mod in_place;
pub mod keep;
mod link;
pub mod node;
pub mod open_gate;
pub mod origin;
pub mod range_lock;
pub mod root;

pub use driver::{
    BlockStatus, CommitPlanned, Committed, Driver, Limits, Plan, PlanCommit, PlanExtent, PlanOp,
    Planned, StatusKind,
};
pub use format::{Extent, ExtentKind, Format, FormatDriver, Guard, Prepared, WriteCommit};
pub use gate::{Gate, Party, Quiesced};
pub use graph::Graph;
pub use in_place::{Attempt, InPlace, Settled, Submission};
pub use keep::Keep;
pub use node::{Node, NodeOptions, Rights};
pub use open_gate::OpenGate;
pub use range_lock::{OwnedRangeGuard, RangeGuard, RangeLock};
pub use root::Root;
