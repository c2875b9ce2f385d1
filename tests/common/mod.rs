//! What the black box tests share: the commands, a back-end process, a driver that cuts requests
//! into any descriptors and checks what comes back, and seeded random numbers.

// Each test program is built with all of this and uses a part.
#![allow(dead_code)]

pub mod backend;
pub mod command;
pub mod driver;
pub mod guest;
pub mod host;
pub mod libvhdi;
pub mod loop_device;
pub mod qmp;
pub mod qsd;
pub mod random;

#[allow(unused_imports)]
pub use self::{
    backend::{Backend, Setup},
    command::{fails, have, ok, ok_or, tool, tool_ok, vublk},
    driver::{Done, Driver},
    host::Host,
    loop_device::LoopDevice,
    qmp::Qmp,
    qsd::Qsd,
    random::Random,
};

use std::time::{Duration, Instant};

/// A deadline that a healthy back-end never comes near, however busy the host is.
pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
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
