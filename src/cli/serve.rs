//! `vublk serve`: gives a disk to a guest. (Stand-in until the device lands.)

use crate::cli::ServeArgs;
use crate::error::{Error, Result};

/// Serves a disk until told to stop; returns the exit code. [`ServeArgs::check`] has passed.
pub fn run(args: &ServeArgs) -> Result<u8> {
    let image = crate::formats::open(&args.open_request()?)?;
    image.check_for_guest(args.block_size)?;
    Err(Error::unsupported("serve is not built in yet"))
}
