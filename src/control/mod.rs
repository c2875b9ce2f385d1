//! The control socket: QMP, so that clients that were written for QEMU can steer a running daemon.
//!
//! ```text
//!  clients ══► control thread                              main thread
//!              epoll: listeners, clients, inbox            poll: signals, front-ends, mailbox
//!              frame, parse, negotiate, look up
//!                ├─ quick command: run here ──► reply
//!                └─ any other: mailbox ──────────────────► run, one after the other
//!              inbox ◄── reply, events ◄────────────────── (events: from any thread)
//!                ├─► reply to the client that asked
//!                └─► event to every negotiated client
//! ```
//!
//! # Threads
//!
//! The **control thread** does the wire and nothing that waits. It exists with `--control` only and
//! sleeps in one place; without a client or an event it never wakes. The **main thread** owns the
//! [`Daemon`]: it alone changes the graph, so commands need no locks among each other, and it may
//! block (open a file, drain a disk) without any client noticing more than a late answer.
//! Each client's commands are run in order; what one client waits for delays the greeting, the
//! quick commands and the events of no other. **Workers** and **message threads** know nothing of
//! all this; serving goes on whatever the two do. **Jobs** run on a thread of their own
//! (see [`crate::jobs`]).
//!
//! # Adding a command
//!
//! One file in [`commands`] with a unit struct that implements [`MainCommand`] (or
//! [`QuickCommand`], for what never waits): its name, its arguments as a
//! [`qapi!`](crate::qapi) type, what it returns, and `run`. Then a line in
//! [`commands::COMMANDS`]. Parser, `query-commands` and `query-qmp-schema` follow from that.
//!
//! # Bounds
//!
//! Nothing a client sends or leaves unread makes us grow without end: messages have a size and a
//! depth ([`json`]), a client that does not read its replies is not read from, and events that
//! nobody fetches are dropped and counted ([`client`]).

pub mod block_events;
pub mod blockdev;
pub mod client;
pub mod command;
pub mod commands;
pub mod crash_states;
pub mod daemon;
pub mod disks;
pub mod error;
pub mod events;
pub mod faults;
pub mod fuzzing;
mod inbox;
mod job_events;
pub mod json;
pub mod keyval;
pub mod qapi;
pub mod recordings;
pub mod request;
pub mod schema;
pub mod server;
pub mod snapshot;

pub use command::{Command, MainCommand, QuickCommand};
pub use daemon::{Daemon, Shared};
pub use disks::Disks;
pub use error::{Class, QmpError};
pub use events::{Event, Events};
pub use qapi::{Qapi, QmpResult};
pub use server::Server;
