//! Host I/O: buffers, files, the engine that moves bytes and the executor that waits for it.
//!
//! Every thread that does I/O owns a [`Reactor`]: an engine (an io_uring, or a thread pool where
//! io_uring is refused) and a small executor of local tasks. Drivers never see it; they call
//! [`File`], whose futures find the reactor of the thread they are polled on.
//!
//! ```text
//! device worker ──┐
//! main thread  ───┼──► Reactor ──► Engine (io_uring | threads) ──► host kernel
//! job thread   ───┘        └─────► executor: a slab of tasks, woken locally or by eventfd
//! ```
//!
//! Invariants:
//! * What the kernel may still touch is owned by the engine's slot until the completion arrives,
//!   even if the future that asked for it is dropped; and so is what keeps others away from where it
//!   lands ([`carrying`]).
//! * The engine is the only place where a thread of ours waits.

pub mod buf;
mod carry;
pub mod clock;
pub mod engine;
pub mod exec;
pub mod file;
pub mod flushes;
pub mod footprint;
pub mod host;
pub mod lock;
pub mod reactor;
pub mod shared_memory;
pub mod sim;
mod slow_calls;

pub use buf::{AlignedBuf, BufferOwner, Buffers, Scattered};
pub use carry::{Load, carrying};
pub use engine::{Engine, EngineKind};
pub use file::{Alignment, File, Fut, Hole};
pub use host::{HostFile, HostKind, OpenOptions};
pub use lock::{Rights, lock_notes};
pub use reactor::{Reactor, block_on, prepare_thread, spawn_local, yield_now};
pub use shared_memory::SharedMemory;
