//! Filters: drivers that stand above another driver and change something about it.

pub mod fault;
pub mod guess_guard;
pub mod intercept;
pub mod no_flush;
pub mod write_log;

pub use fault::Fault;
pub use guess_guard::GuessGuard;
pub use intercept::Intercept;
pub use no_flush::NoFlush;
pub use write_log::WriteLog;
