//! Filters: drivers that stand above another driver and change something about it.

pub mod guess_guard;

pub use guess_guard::GuessGuard;
