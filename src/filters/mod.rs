//! Filters: drivers that stand above another driver and change something about it.

pub mod fault;
pub mod guess_guard;
pub mod intercept;
pub mod job_top;
pub mod no_flush;
pub mod write_log;

pub use fault::Fault;
pub use guess_guard::GuessGuard;
pub use intercept::Intercept;
pub use job_top::JobTop;
pub use no_flush::NoFlush;
pub use write_log::WriteLog;
