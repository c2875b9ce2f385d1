//! What the black box tests share: a back-end process, a driver that cuts requests into any
//! descriptors and checks what comes back, a model of the disk, and seeded random numbers.

pub mod backend;
pub mod driver;
pub mod random;

pub use backend::{Backend, Setup};
pub use driver::{Done, Driver};
pub use random::Random;

use std::time::{Duration, Instant};

/// A deadline that a healthy back-end never comes near, however busy the host is.
pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Says visibly that a test could not be done here.
pub fn skip(why: &str) {
    eprintln!("SKIPPED: {why}");
}

/// Looks at a condition until it holds; panics with `what` at the deadline.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = soon();
    while !holds() {
        assert!(Instant::now() < deadline, "still waiting for: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
